"""The four questions, asked in order: facts → findings → prescription → trial."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from bolza.diagnosis import dynamics as motion
from bolza.diagnosis import hold as firmness
from bolza.diagnosis import landscape as land
from bolza.diagnosis import noise as noises
from bolza.diagnosis import prescription as remedy
from bolza.diagnosis import propagation as signals
from bolza.diagnosis import trial as trials
from bolza.diagnosis.problem import Loss, Problem, prepare
from bolza.diagnosis.record import Diagnosis, Finding, Prescription, Trial
from bolza.ops.errors import ArgumentError, BolzaError
from bolza.ops.krylov import EigenResult
from bolza.sde import GradientNoise
from bolza.training.checks import check_seed

__all__ = ["Progress", "diagnose"]

T = TypeVar("T")
_ORDER = ("structure", "propagation", "landscape", "noise", "dynamics", "prescription", "training", "hold")


class Progress(Protocol):
    """What `diagnose` tells while it works."""

    def __call__(self, stage: str, done: int, total: int, numbers: Mapping[str, float]) -> object:
        """Take note of ``done`` of ``total`` in a stage; ``total`` is 0 where it is not known."""


def diagnose(
    model: nn.Module | Callable[[], nn.Module],
    data: Any,
    loss: Loss | None = None,
    *,
    train: bool = False,
    hold: bool = False,
    samples: int = 256,
    seed: int = 0,
    lr: float | None = None,
    batch_size: int | None = None,
    steps: int | None = None,
    treat: bool | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Say whether a network can be trained, why not, and what would help.

    Four questions are answered on a real batch: whether signal and gradient get through, how steep the loss is, how
    noisy the gradient is, and what follows for initialisation, learning rate and batch. With ``train`` the answer is
    tried out, and with ``hold`` the trained network is asked whether its result holds. The model that is given stays
    as it is: parameters, buffers, gradients, mode and random state.

    Args:
        model: network before training, or a function of no arguments that makes one.
        data: a `bolza.data.Dataset`, a name such as ``"digits"``, a pair ``(x, y)`` of tensors, or a loader of such
            pairs.
        loss: ``loss(output, target)``, a scalar mean over the samples; by default cross-entropy for integer targets
            and mean squared error for real ones.
        train: train before and after the remedy, under one budget.
        hold: attack the trained network, certify it, add noise and weigh its confidence. With ``train`` that is the
            better one of the trial; without, the network as given, which should be trained then.
        samples: how many samples to measure signals on; curvature, noise and attacks use at most
            128 of them.
        seed: of everything random.
        lr: learning rate of the network as it is in the trial; 0.01 by default.
        batch_size: samples a step of the trial, in place of the prescribed.
        steps: steps of each run of the trial; 300 by default.
        treat: whether to prescribe an initialisation; None lets the findings decide.
        device: where to work; where the parameters are by default.
        progress: told what is being done.

    Returns:
        The diagnosis.

    Raises:
        ArgumentError: an argument makes no sense, or the loss depends on no parameter.
        DataError: the data is empty, has one sample, is not finite, or has labels out of range.
        ShapeError: the loss is not a scalar, or outputs and targets do not fit.
        UnsupportedError: half precision on a CPU, or a model that cannot be copied or holds no values.
        UserCodeError: the model, its factory or the loss raised.

    Reference: Liu & Theodorou (2019), *Deep learning theory review: an optimal control and dynamical systems
    perspective*, §3 and §5, joined in one report.

    Example:
        >>> import bolza
        >>> net = bolza.models.mlp(depth=20, width=30)
        >>> d = bolza.diagnose(net, "digits", samples=32)
        >>> d["propagation.phase"].value, d["propagation.gradient_ratio"].verdict
        ('ordered', 'bad')
    """
    for name, value in (("lr", lr), ("batch_size", batch_size), ("steps", steps)):
        if value is not None and not 0 < value < math.inf:
            raise ArgumentError(f"{name}={value} must be positive and finite")
    tell = progress or _silent
    tell("reading model and data", 0, 0, {})
    check_seed(seed)
    with torch.random.fork_rng(
        devices=[]
    ):  # a forward pass may draw, and lazy layers make their weights in one
        problem = prepare(
            model, data, loss, samples=samples, seed=seed, device=device, test_fraction=0.2 if train else 0.0
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _answer(problem, tell, train, hold, lr, batch_size, steps, treat)


def _answer(
    problem: Problem,
    tell: Progress,
    train: bool,
    hold: bool,
    lr: float | None,
    batch_size: int | None,
    steps: int | None,
    treat: bool | None,
) -> Diagnosis:
    found: list[Finding] = _structure(problem)
    raw = _Raw()
    facts = _measured(problem, found, tell, raw)
    wanted = remedy.wants_treatment(found) if treat is None else treat
    treated, obstacle = remedy.treated_problem(problem) if wanted else (None, "")
    after = _Facts()
    if treated is not None:
        tell("the treated network", 0, 0, {})
        raw = _Raw()
        after = _measured(treated, [], _silent, raw)
    final = facts if treated is None else after
    prescription = remedy.prescribe(
        problem,
        found,
        facts.propagation,
        after.propagation,
        final.landscape,
        final.noise,
        obstacle,
        batch_size,
    )
    own_lr = trials.DEFAULT_LR if lr is None else lr
    rate = float(prescription.learning_rate.value or own_lr)
    found.append(noises.temperature_finding(rate, int(prescription.batch_size.value), prescription.momentum))
    found += remedy.prescription_findings(prescription)
    moved = _dynamics(treated or problem, raw, rate, prescription, found)

    training: dict[str, Trial] | None = None
    trained: dict[str, nn.Module] = {}
    if train:
        treatment = None
        if treated is not None:
            example = problem.x[: remedy.EXAMPLE]
            treatment = partial(remedy.treat_, setting=remedy.SETTING, example=example, seed=problem.seed)
        training, failure = trials.run_trials(
            problem,
            prescription,
            treatment,
            lr=own_lr,
            steps=steps or trials.STEPS,
            progress=tell,
            keep=trained,
        )
        found += trials.findings(training, problem.dataset)
        if failure:
            found.append(Finding("training.unavailable", "not trained", None, None, "warn", failure))
    held = _held(problem, training, trained, found, tell) if hold else None
    phases = [None if f.propagation is None else f.propagation.phase for f in (facts, after)]
    diagram = _ask("propagation", lambda: signals.phase_diagram(phases), found)
    found.sort(key=lambda f: _ORDER.index(f.question))
    return Diagnosis(
        _subject(problem),
        tuple(found),
        _plain(
            asdict(facts)
            | {"phase_diagram": diagram}
            | {"dynamics": None if moved is None else asdict(moved)}
            | {"hold": None if held is None else asdict(held)}
        ),
        _plain(asdict(after)) if treated is not None else {},
        prescription,
        training or None,
    )


@dataclass(frozen=True)
class _Facts:
    propagation: signals.Propagation | None = None
    landscape: land.Landscape | None = None
    noise: noises.Noise | None = None


@dataclass
class _Raw:
    """What one question measured and another needs as well."""

    hessian: list[EigenResult] = field(default_factory=list)
    noise: list[GradientNoise] = field(default_factory=list)


def _measured(problem: Problem, found: list[Finding], tell: Progress, raw: _Raw) -> _Facts:
    """The facts of a network; what they say goes to ``found``, what lies behind them to ``raw``."""
    tell("signals and gradients", 0, 0, {})
    propagation = _ask("propagation", lambda: signals.measure_propagation(problem), found)
    found += signals.findings(propagation) if propagation else []
    tell("curvature", 0, 0, {})
    landscape = _ask("landscape", lambda: land.measure_landscape(problem, keep=raw.hessian), found)
    found += land.findings(landscape) if landscape else []
    tell("gradient noise", 0, 0, {})
    noise = _ask("noise", lambda: noises.measure_noise(problem, keep=raw.noise), found)
    found += noises.findings(noise) if noise else []
    return _Facts(propagation, landscape, noise)


def _dynamics(
    problem: Problem, raw: _Raw, rate: float, prescription: Prescription, found: list[Finding]
) -> motion.Dynamics | None:
    """What the noise will do at the prescribed settings; nothing where curvature or noise are not known."""
    if not raw.hessian or not raw.noise:
        return None
    batch, momentum = int(prescription.batch_size.value), prescription.momentum
    hessian, noise = raw.hessian[0], raw.noise[0]
    facts = _ask(
        "dynamics", lambda: motion.measure_dynamics(problem, hessian, noise, rate, batch, momentum), found
    )
    found += motion.findings(facts) if facts else []
    return facts


def _held(
    problem: Problem,
    training: dict[str, Trial] | None,
    trained: dict[str, nn.Module],
    found: list[Finding],
    tell: Progress,
) -> firmness.Hold | None:
    """Whether the result of the trial holds, or that of the network as given."""
    model, which = None, "by the network as given"
    if training is not None:
        stopped = not trained or any(trial.status == "interrupted" for trial in training.values())
        if stopped:
            text = "The trial did not end, so there is no trained network to ask."
            found.append(Finding("hold.unavailable", "not measured", None, None, "warn", text))
            return None
        key = "before" if trials.did_not_help(training) or "after" not in trained else "after"
        model, which = trained[key], f"by the network of the trial, {training[key].label}"
    tell("does it hold?", 0, 0, {})
    facts = _ask("hold", lambda: firmness.measure_hold(problem, model, which), found)
    found += firmness.findings(facts) if facts else []
    return facts


def _ask(question: str, answer: Callable[[], T], found: list[Finding]) -> T | None:
    """An answer, or a finding that says why there is none: one question that fails does not lose the others."""
    try:
        return answer()
    except Exception as error:  # code of the user's runs in here, and may raise anything
        first = (str(error).strip().splitlines() or ["no message"])[0]
        if not isinstance(error, BolzaError | RuntimeError):
            first = f"{type(error).__name__}: {first}"
        found.append(Finding(f"{question}.unavailable", "not measured", None, None, "warn", first))
        return None


def _structure(problem: Problem) -> list[Finding]:
    out = []
    if problem.without_gradient:
        names = ", ".join(problem.without_gradient[:5])
        more = len(problem.without_gradient) - 5
        out.append(
            Finding(
                "structure.no_gradient",
                "parameters without gradient",
                len(problem.without_gradient),
                None,
                "warn",
                f"The loss does not reach {names}{f' and {more} more' if more > 0 else ''}: training leaves "
                "them as they are.",
                "Use them in forward, remove them, or freeze them with requires_grad_(False).",
                "tensors",
            )
        )
    if problem.frozen:
        out.append(
            Finding(
                "structure.frozen",
                "frozen parameters",
                len(problem.frozen),
                None,
                "info",
                f"Not trained by choice: {', '.join(problem.frozen[:5])}.",
                unit="tensors",
            )
        )
    if problem.batch_coupled:
        out.append(
            Finding(
                "structure.batch_coupled",
                "layers that mix samples",
                len(problem.batch_coupled),
                None,
                "info",
                f"{problem.batch_coupled[0]} and others normalise over the batch: measured with the statistics "
                "of the batch.",
                unit="layers",
            )
        )
    return out


def _subject(problem: Problem) -> dict[str, Any]:
    from bolza import __version__

    model, data = problem.model, problem.dataset
    return {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": data.name,
        "task": problem.task,
        "training_samples": len(data),
        "test_samples": len(data.test_y),
        "samples": len(problem.x),
        "loss": problem.initial_loss,
        "seed": problem.seed,
        "device": str(problem.x.device),
        "dtype": str(problem.parameters[0].dtype).removeprefix("torch."),
        "versions": {"bolza": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    from bolza.report import jsonable

    plain: dict[str, Any] = jsonable(facts)
    return plain


def _silent(stage: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
    """Say nothing."""
