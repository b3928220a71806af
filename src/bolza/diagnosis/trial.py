"""The proof: the network trained as it is and treated, under one budget.

All runs share the steps, the batch size, the order of the data, the optimizer (SGD with momentum, its rate falling
linearly to zero) and the seed. The network as it is runs with the learning rate of the user, and once more with
the prescribed one, so that what the initialisation does is not confused with what the learning rate does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from bolza.data import Dataset
from bolza.diagnosis.problem import Problem
from bolza.diagnosis.record import Finding, Prescription, Trial, Verdict
from bolza.report import number, percent
from bolza.training import Run, train

__all__ = ["DEFAULT_LR", "STEPS", "findings", "run_trials"]

DEFAULT_LR = 0.01
STEPS = 300

Progress = Callable[[str, int, int, Mapping[str, float]], object]


def run_trials(
    problem: Problem,
    prescription: Prescription,
    treat: Callable[[nn.Module], object] | None,
    *,
    lr: float = DEFAULT_LR,
    steps: int = STEPS,
    progress: Progress | None = None,
) -> dict[str, Trial]:
    """Train before and after.

    Args:
        problem: network and data; its pristine model is copied for each run.
        prescription: of `prescribe`.
        treat: applies the prescribed initialisation in place; None where it stays as it is.
        lr: learning rate of the network as it is.
        steps: of each run.
        progress: called with (label, step, steps, latest numbers).

    Returns:
        ``before``, ``after`` and, where they differ from both, ``before_with_prescribed_lr``. A run that was
        interrupted is the last one.
    """
    prescribed = float(prescription.learning_rate.value or lr)
    plan = [
        ("before", "as it is", lr, False),
        ("after", "treated" if treat is not None else "with the prescription", prescribed, True),
    ]
    if treat is not None and not math.isclose(lr, prescribed, rel_tol=1e-3):
        plan.append(("before_with_prescribed_lr", "as it is, prescribed learning rate", prescribed, False))
    trials: dict[str, Trial] = {}
    for key, label, rate, treated in plan:
        model = copy.deepcopy(problem.pristine)
        if treated and treat is not None:
            treat(model)
        run = train(
            model,
            problem.dataset,
            loss=problem.own_loss,
            optimizer="sgd",
            lr=rate,
            momentum=prescription.momentum,
            controller=_falling,
            batch_size=int(prescription.batch_size.value),
            steps=steps,
            seed=problem.seed,
            device=problem.x.device,
            progress=None if progress is None else _relay(progress, label),
        )
        trials[key] = _trial(label, rate, treated and treat is not None, run, problem.dataset)
        if run.status == "interrupted":
            break
    return trials


def _falling(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Learning rate that falls linearly to zero over the run."""
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)


def _relay(progress: Progress, label: str) -> Callable[[int, int, Mapping[str, float]], object]:
    return lambda step, steps, latest: progress(label, step, steps, latest)


def _trial(label: str, lr: float, treated: bool, run: Run, dataset: Dataset) -> Trial:
    curves: dict[str, list[Any]] = {"step": list(run.steps)}
    for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        if values := list(getattr(run, name)):
            curves[name] = values
    if dataset.task == "regression" and "test_loss" in curves and len(dataset.test_y) > 1:
        spread = float(dataset.test_y.to(torch.float64).var(0, unbiased=False).mean())
        curves["test_r2"] = [1 - loss / spread if spread > 0 else math.nan for loss in curves["test_loss"]]
    metrics: dict[str, float | None] = {
        name: curves[name][-1]
        for name in ("test_accuracy", "test_loss", "test_r2", "train_loss")
        if name in curves
    }
    return Trial(label, lr, run.batch_size, run.step, run.status, run.seconds, curves, metrics, treated)


def findings(trials: Mapping[str, Trial], dataset: Dataset) -> list[Finding]:
    """What the trial showed.

    Args:
        trials: of `run_trials`.
        dataset: whose test part was used.
    """
    out = []
    chance = _chance(dataset)
    for key, trial in trials.items():
        metric = next(
            (m for m in ("test_accuracy", "test_r2", "test_loss", "train_loss") if m in trial.metrics), None
        )
        if metric is None:
            continue
        value = trial.metrics[metric]
        error = None
        verdict: Verdict = "info"
        name = {"test_accuracy": "test accuracy", "test_r2": "R² on test data", "test_loss": "test loss"}.get(
            metric, metric
        )
        if metric == "test_accuracy" and value is not None:
            counted = dataset.test_y.numel()
            error = math.sqrt(max(value * (1 - value), 0.25 / counted) / counted)
            reached = key == "after" and value >= (trials["before"].metrics.get(metric) or 0.0) - 2 * error
            verdict = "bad" if value < chance + 3 * error + 0.05 else "good" if reached else "info"
            text = f"{percent(value)} of {counted} test labels after {trial.steps} steps at lr {number(trial.lr)}"
            text += f"; chance is {percent(chance)}." if verdict == "bad" else "."
        else:
            text = f"{name} {number(value)} after {trial.steps} steps at lr {number(trial.lr)}."
            if metric == "test_r2" and value is not None:
                verdict = "bad" if value < 0.02 else "good" if key == "after" else "info"
        if trial.status != "finished":
            text += (
                f" The run was {trial.status}."
                if trial.status == "interrupted"
                else " It diverged: this is the last good state."
            )
            verdict = "warn" if trial.status == "interrupted" else "bad"
        out.append(Finding(f"training.{key}", f"{name}, {trial.label}", value, error, verdict, text))
    return out


def _chance(dataset: Dataset) -> float:
    """Share of the most frequent test label: what a constant answer gets."""
    if dataset.task == "regression" or dataset.test_y.numel() == 0:
        return 0.0
    return float(dataset.test_y.flatten().bincount().max()) / dataset.test_y.numel()
