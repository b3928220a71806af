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
from bolza.diagnosis.course import Course
from bolza.diagnosis.problem import Problem
from bolza.diagnosis.record import Finding, Prescription, Trial, Verdict
from bolza.ops.errors import BolzaError
from bolza.report import number, percent
from bolza.training import InterruptGuard, Run, train

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
    keep: dict[str, nn.Module] | None = None,
) -> tuple[dict[str, Trial], str]:
    """Train before and after.

    Args:
        problem: network and data; its pristine model is copied for each run.
        prescription: of `prescribe`.
        treat: applies the prescribed initialisation in place; None where it stays as it is.
        lr: learning rate of the network as it is.
        steps: of each run.
        progress: called with (label, step, steps, latest numbers).
        keep: a dict that the trained networks are put into, for who asks more of them.

    Returns:
        ``before``, ``after`` and, where they differ from both, ``before_with_prescribed_lr``; and what kept a run
        from being made, or an empty text. A run that was interrupted, or could not be made, is the last one.
    """
    prescribed = float(prescription.learning_rate.value or lr)
    plan = [
        ("before", "as it is", lr, False),
        ("after", "treated" if treat is not None else "with the prescription", prescribed, True),
    ]
    if treat is not None and not math.isclose(lr, prescribed, rel_tol=1e-3):
        plan.append(("before_with_prescribed_lr", "as it is, prescribed learning rate", prescribed, False))
    trials: dict[str, Trial] = {}
    with InterruptGuard():  # Ctrl-C between two runs must not lose the first; the next run takes note of it
        for key, label, rate, treated in plan:
            try:
                model = copy.deepcopy(problem.pristine)
                if treated and treat is not None:
                    treat(model)
                size = int(prescription.batch_size.value)
                course = Course(problem, model, batch_size=size, momentum=prescription.momentum)
                course.note(0, steps, rate)
                run = train(
                    model,
                    problem.dataset,
                    loss=problem.own_loss,
                    optimizer="sgd",
                    lr=rate,
                    momentum=prescription.momentum,
                    controller=_falling,
                    batch_size=size,
                    steps=steps,
                    seed=problem.seed,
                    device=problem.x.device,
                    progress=_relay(progress, label, course, rate),
                )
            except (BolzaError, RuntimeError) as error:
                reason = str(error).strip().split("\n")[0].rstrip(".")
                return trials, f"Training the network {label} failed: {reason}."
            if keep is not None:
                keep[key] = model
            trials[key] = _trial(label, rate, treated and treat is not None, run, problem.dataset, course)
            if run.status == "interrupted":
                break
    return trials, ""


def _falling(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Learning rate that falls linearly to zero over the run."""
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)


def _relay(
    progress: Progress | None, label: str, course: Course, lr: float
) -> Callable[[int, int, Mapping[str, float]], object]:
    def after_step(step: int, steps: int, latest: Mapping[str, float]) -> None:
        course.note(step, steps, lr * (1 - step / steps))
        if progress is not None:
            progress(label, step, steps, latest)

    return after_step


def _trial(label: str, lr: float, treated: bool, run: Run, dataset: Dataset, course: Course) -> Trial:
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
    return Trial(
        label,
        lr,
        run.batch_size,
        run.step,
        run.status,
        run.seconds,
        curves,
        metrics,
        treated,
        course.curves,
    )


def findings(trials: Mapping[str, Trial], dataset: Dataset) -> list[Finding]:
    """What the trial showed.

    Args:
        trials: of `run_trials`.
        dataset: whose test part was used.
    """
    out: list[Finding] = []
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
            verdict = "bad" if value < chance + 3 * error + 0.05 else "good" if key == "after" else "info"
            text = f"{percent(value)} of {counted} test labels after {trial.steps} steps at lr {number(trial.lr)}"
            text += f"; chance is {percent(chance)}." if verdict == "bad" else "."
        else:
            text = f"{name} {number(value)} after {trial.steps} steps at lr {number(trial.lr)}."
            if metric == "test_r2" and value is not None:
                verdict = "bad" if value < 0.02 else "good" if key == "after" else "info"
        if key == "after" and did_not_help(trials):
            text += f" As it is: {number(trials['before'].metrics[metric])}; keep your own setting."
            verdict = "warn" if verdict == "good" else verdict
        if trial.status != "finished":
            text += (
                f" The run was {trial.status}."
                if trial.status == "interrupted"
                else " It diverged: this is the last good state."
            )
            verdict = "warn" if trial.status == "interrupted" else "bad"
        out.append(Finding(f"training.{key}", f"{name}, {trial.label}", value, error, verdict, text))
    if "after" in trials:
        out += course_findings(trials["after"])
    return out


def did_not_help(trials: Mapping[str, Trial]) -> bool:
    """Whether the network was better before, by more than two parts in a hundred.

    Args:
        trials: of `run_trials`.
    """
    if "before" not in trials or "after" not in trials:
        return False
    before, after = trials["before"].metrics, trials["after"].metrics
    for metric, sign in (("test_accuracy", 1.0), ("test_r2", 1.0), ("test_loss", -1.0)):
        a, b = before.get(metric), after.get(metric)
        if a is not None and b is not None:
            slack = 0.02 * abs(a) if metric == "test_loss" else 0.02
            return sign * (a - b) > slack
    return False


def course_findings(trial: Trial) -> list[Finding]:
    """What happened along a run, on both clocks.

    Args:
        trial: usually that of the treated network.
    """
    out = []
    both = _ends(trial, "stationarity")
    if both is not None:
        start, end = both
        text = f"Pontryagin's principle: ‖∂H/∂u‖ over all stages, {number(start)} at the start and zero at an optimum."
        ends = _ends(trial, "costate_ratio")
        if ends is not None:
            text += f" The first stage gets {number(ends[1])} of the last costate, at the start {number(ends[0])}."
        out.append(
            Finding("training.stationarity", "what is left of ∂H/∂u at the end", end, None, "info", text)
        )
    both = _ends(trial, "signal_to_noise")
    if both is not None:
        pairs = zip(trial.course["step"], trial.course["signal_to_noise"], strict=True)
        crossed = next((step for step, value in pairs if value is not None and value < 1), None)
        text = f"Signal over noise in the gradient of a batch, {number(both[0])} at the start: "
        text += (
            "it drifts to the end." if crossed is None else f"from step {crossed} at the latest it diffuses."
        )
        out.append(Finding("training.signal_to_noise", "drift or diffusion", both[1], None, "info", text))
    both = _ends(trial, "gram_condition")
    if both is not None:
        text = (
            f"Largest over smallest rate at which it can fit single samples; {number(both[0])} at the start."
        )
        out.append(
            Finding("training.gram_condition", "condition of the Gram matrix", both[1], None, "info", text)
        )
    return out


def _ends(trial: Trial, name: str) -> tuple[float, float] | None:
    known = [value for value in trial.course.get(name, []) if value is not None]
    return (known[0], known[-1]) if len(known) > 1 else None


def _chance(dataset: Dataset) -> float:
    """Share of the most frequent test label: what a constant answer gets."""
    if dataset.task == "regression" or dataset.test_y.numel() == 0:
        return 0.0
    return float(dataset.test_y.flatten().bincount().max()) / dataset.test_y.numel()
