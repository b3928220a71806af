r"""An honest number for robustness: accuracy under attacks that the network was not trained on.

    accuracy(ε) = share of samples whose class no attack could change within the ball of radius ε

It is an upper bound on the robustness of the network: what was not broken may still break. Signs that the gradient
attacks were misled are looked for and said.

Reference: Croce & Hein (2020); Athalye, Carlini & Wagner (2018) on gradients that mislead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, DataError, DivergenceError, ShapeError
from bolza.core.reference import Reference, cites
from bolza.ops.replay import frozen_statistics, same_randomness
from bolza.robust.attacks import pgd, slope_at
from bolza.robust.balls import Ball, Norm, attacked_input, parameters_at_rest
from bolza.robust.suite import AUTOATTACK, STANDARD, suite_attacks

__all__ = ["ATHALYE", "RobustAccuracy", "RobustnessCurve", "robust_accuracy", "robustness_curve"]

ATHALYE = Reference(
    "athalye2018obfuscated",
    "Athalye, Anish and Carlini, Nicholas and Wagner, David",
    "Obfuscated Gradients Give a False Sense of Security: Circumventing Defenses to Adversarial Examples",
    2018,
    venue="International Conference on Machine Learning",
    arxiv="1802.00420",
)

Logits = Callable[[Tensor], Tensor]
_FLAT = 1e-6  # a rise of the loss across the ball, to first order, that rounding can hide


@dataclass(frozen=True)
class RobustAccuracy:
    """Accuracy under attack.

    Attributes:
        eps: radius.
        norm: of the ball.
        clean: accuracy without an attack.
        robust: share of samples that no attack broke: the number to report.
        error: its standard error as an estimate for new samples.
        after: accuracy left after each attack, in order; each attacks what the ones before left over.
        inputs: inputs that break, and the others as they were.
        broken: which samples are misclassified somewhere in their balls, shape ``(n,)``.
        notes: reasons to doubt the number, in words; empty where none was found.
    """

    eps: float | Tensor
    norm: Norm
    clean: float
    robust: float
    error: float
    after: Mapping[str, float]
    inputs: Tensor = field(repr=False)
    broken: Tensor = field(repr=False)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RobustnessCurve:
    """Accuracy against the radius of the ball.

    Attributes:
        eps: radii, ascending.
        robust: accuracy under attack at each; does not increase.
        errors: standard errors as estimates for new samples.
        clean: accuracy without an attack.
        notes: reasons to doubt it, in words.
    """

    eps: tuple[float, ...]
    robust: tuple[float, ...]
    errors: tuple[float, ...]
    clean: float
    notes: tuple[str, ...] = ()


@cites(AUTOATTACK, ATHALYE)
def robust_accuracy(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    norm: Norm = "linf",
    attack: Literal["auto", "pgd"] | Sequence[str] = "auto",
    clip: tuple[float, float] | None = (0.0, 1.0),
    steps: int = 40,
    restarts: int = 3,
    suite_steps: int = 100,
    queries: int = 5000,
    batch_size: int = 512,
    seed: int = 0,
) -> RobustAccuracy:
    r"""Accuracy under projected gradient ascent and an independent suite of attacks, with reasons to doubt it.

        robust = 1/n Σ_i 1[no attack changes the class of x_i within its ball]

    Args:
        model: a classifier that returns logits ``(n, classes)``, in the mode it is in: call ``model.eval()`` first.
        x: inputs, shape ``(n, *input)``, floating; any shape and range.
        y: classes, shape ``(n,)``.
        eps: radius in the units of x; for the suite one number.
        norm: ``"linf"`` or ``"l2"``.
        attack: ``"auto"``: gradient ascent, then the suite of Croce & Hein; ``"pgd"``: gradient ascent alone, which
            overstates robustness by some points; or names of attacks of the suite.
        clip: range of the data, two numbers; None for no limits.
        steps: steps of gradient ascent, at least 20 for a number to report.
        restarts: its restarts.
        suite_steps: steps of the gradient attacks of the suite, 100 for a number to report.
        queries: outputs that the black-box attack may see for each sample.
        batch_size: samples attacked at a time.
        seed: of all random numbers.

    Returns:
        RobustAccuracy.

    Raises:
        ArgumentError: an argument makes no sense.
        DataError: x or y cannot be used.
        DivergenceError: the loss is not finite.
        ShapeError: the model does not return ``(n, classes)``.
        UnsupportedError: the suite is asked for and not installed.

    Reference: Croce & Hein (2020), section 5. Departure: our gradient ascent goes first, and attacks go on with the
    samples that are left.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x = torch.rand(40, 2)
        >>> y = (x[:, 0] > x[:, 1]).long()
        >>> net = nn.Linear(2, 2).eval()
        >>> _ = net.weight.data.copy_(torch.tensor([[-9.0, 9.0], [9.0, -9.0]])), net.bias.data.zero_()
        >>> found = robust_accuracy(net, x, y, eps=0.1, attack="pgd")
        >>> exact = float(((x[:, 0] - x[:, 1]).abs() > 0.2).float().mean())
        >>> found.clean, found.robust == round(exact, 6) or abs(found.robust - exact) < 1e-6
        (1.0, True)
    """
    names = () if attack == "pgd" else STANDARD if attack == "auto" else tuple(attack)
    if isinstance(attack, str) and attack not in ("auto", "pgd"):
        raise ArgumentError(f"attack={attack!r} is unknown: choose 'auto', 'pgd' or a list of {STANDARD}")
    x, y = _checked(x, y, batch_size)
    if min(steps, restarts, suite_steps, queries) < 1:
        raise ArgumentError(
            f"steps={steps}, restarts={restarts}, suite_steps={suite_steps} and queries={queries} must all be at "
            "least 1"
        )
    if names and clip is not None and any(isinstance(end, Tensor) and end.numel() > 1 for end in clip):
        raise ArgumentError(
            "clip differs from entry to entry: the suite takes two numbers, so move the normalisation of the data into "
            "the model, or use attack='pgd'"
        )
    ball = Ball(x, eps, norm, clip)
    if isinstance(eps, Tensor) and names and eps.ndim:
        raise ArgumentError("eps differs from sample to sample: the suite takes one number; use attack='pgd'")
    with _still(model), same_randomness(seed, x.device):
        logits = _batched(model, batch_size)
        out = _clean(logits, x, y)
        right = out.argmax(1) == y
        notes = _doubts(model, x, y, out, right, ball, batch_size)
        run = _Run(logits, x, y, right)
        generator = torch.Generator(x.device).manual_seed(seed)
        for _ in range(restarts):
            run.attack(
                "pgd", lambda rows: _ascend(model, x, y, rows, eps, norm, clip, steps, generator), batch_size
            )
        run.attack(
            "random", lambda rows: _at_random(logits, x, y, rows, eps, norm, clip, generator), batch_size
        )
        if run.gained.get("random", 0) > 0:
            notes.append(
                f"{run.gained['random']} samples that survived gradient ascent fell to random points of the ball: "
                "gradients mislead, so attack the model with its non-smooth parts replaced"
            )
        if names:
            attacks = suite_attacks(
                model, x, y, ball, clip, out.shape[1], names, steps=suite_steps, queries=queries, seed=seed
            )
            for name, call in attacks:
                run.attack(name, partial(_within, ball, call), batch_size)
        if run.gained.get("square", 0) > max(1, 0.002 * len(x)):
            notes.append(
                f"the attack that sees outputs only broke {run.gained['square']} samples that no gradient attack "
                "could: gradients mislead, so an adaptive attack is needed"
            )
    robust = 1 - float(run.broken.double().mean())
    error = (robust * (1 - robust) / len(x)) ** 0.5
    return RobustAccuracy(
        eps,
        norm,
        float(right.double().mean()),
        robust,
        error,
        run.after,
        run.inputs,
        run.broken,
        tuple(notes),
    )


@cites(AUTOATTACK)
def robustness_curve(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    eps: Sequence[float],
    *,
    norm: Norm = "linf",
    attack: Literal["auto", "pgd"] | Sequence[str] = "pgd",
    clip: tuple[float, float] | None = (0.0, 1.0),
    steps: int = 20,
    restarts: int = 1,
    queries: int = 1000,
    batch_size: int = 512,
    seed: int = 0,
) -> RobustnessCurve:
    r"""Accuracy under attack for a range of radii; what breaks in a small ball stays broken in a larger one.

    Args:
        model: a classifier that returns logits ``(n, classes)``, in the mode it is in.
        x: inputs, shape ``(n, *input)``, floating.
        y: classes, shape ``(n,)``.
        eps: radii in the units of x; zero is the clean accuracy.
        norm: ``"linf"`` or ``"l2"``.
        attack: as for :func:`robust_accuracy`.
        clip: range of the data; None for no limits.
        steps: steps of gradient ascent.
        restarts: its restarts.
        queries: outputs that the black-box attack may see for each sample.
        batch_size: samples attacked at a time.
        seed: of all random numbers.

    Returns:
        RobustnessCurve.

    Raises:
        ArgumentError: no radius, or one that makes no sense.

    Reference: Croce & Hein (2020).

    Example:
        >>> x = torch.tensor([[0.1], [0.4], [0.45], [0.9]])
        >>> sign = lambda x: torch.cat([0.5 - x, x - 0.5], 1)
        >>> robustness_curve(sign, x, (x[:, 0] > 0.5).long(), [0.0, 0.2, 0.5], clip=None).robust
        (1.0, 0.5, 0.0)
    """
    radii = sorted(float(e) for e in eps)
    if not radii:
        raise ArgumentError("eps is empty: give at least one radius")
    x, y = _checked(x, y, batch_size)
    with _still(model):
        right = _clean(_batched(model, batch_size), x, y).argmax(1) == y
    clean = float(right.double().mean())
    left = torch.arange(len(x), device=x.device)
    robust: list[float] = []
    notes: list[str] = []
    for radius in radii:
        if radius == 0:
            left = left[right]
        elif len(left):
            found = robust_accuracy(
                model, x[left], y[left], radius,
                norm=norm, attack=attack, clip=clip, steps=steps, restarts=restarts, queries=queries,
                batch_size=batch_size, seed=seed,
            )  # fmt: skip
            left = left[~found.broken]
            notes += [
                f"at {radius:g}: {note}" for note in found.notes if not any(note in known for known in notes)
            ]
        robust.append(len(left) / len(x))
    errors = tuple((r * (1 - r) / len(x)) ** 0.5 for r in robust)
    return RobustnessCurve(tuple(radii), tuple(robust), errors, clean, tuple(notes))


class _Run:
    """Which samples are left, and what broke the others."""

    def __init__(self, logits: Logits, x: Tensor, y: Tensor, right: Tensor) -> None:
        self.logits, self.x, self.y = logits, x, y
        self.broken, self.inputs = ~right, x.detach().clone()
        self.after: dict[str, float] = {}
        self.gained: dict[str, int] = {}

    def attack(self, name: str, call: Callable[[Tensor], Tensor], batch_size: int) -> None:
        before = int(self.broken.sum())
        for rows in (~self.broken).nonzero().flatten().split(batch_size):
            if not len(rows):  # torch splits nothing into one empty part
                break
            found = call(rows)
            with torch.no_grad():
                fell = self.logits(found).argmax(1) != self.y[rows]
            self.inputs[rows[fell]] = found[fell]
            self.broken[rows[fell]] = True
        self.gained[name] = int(self.broken.sum()) - before
        if name != "random":
            self.after[name] = 1 - float(self.broken.double().mean())


def _ascend(
    model: Any,
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    eps: Any,
    norm: Norm,
    clip: Any,
    steps: int,
    generator: Any,
) -> Tensor:
    found: Tensor = pgd(
        model, F.cross_entropy, x[rows], y[rows], _of(eps, rows), steps,
        norm=norm, clip=clip, generator=generator,
    )  # fmt: skip
    return found


def _at_random(
    logits: Logits, x: Tensor, y: Tensor, rows: Tensor, eps: Any, norm: Norm, clip: Any, generator: Any
) -> Tensor:
    ball = Ball(x[rows], _of(eps, rows), norm, clip)
    found = ball.x
    for _ in range(5):
        other = ball.random(generator)
        with torch.no_grad():
            fell = logits(other).argmax(1) != y[rows]
        found = torch.where(fell.reshape(-1, *[1] * (x.ndim - 1)), other, found)
    return found


def _of(eps: Any, rows: Tensor) -> Any:
    return eps[rows] if isinstance(eps, Tensor) and eps.ndim else eps


def _within(ball: Ball, call: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    return ball_of(ball, rows).project(call(rows))


def ball_of(ball: Ball, rows: Tensor) -> Ball:
    """The balls of some rows."""
    part = object.__new__(Ball)
    part.x, part.norm = ball.x[rows], ball.norm
    part.eps = ball.eps[rows] if ball.eps.ndim else ball.eps
    part.low, part.high = (
        end[rows] if end is not None and end.shape == ball.x.shape else end for end in (ball.low, ball.high)
    )
    return part


def _doubts(
    model: Any, x: Tensor, y: Tensor, out: Tensor, right: Tensor, ball: Ball, batch_size: int
) -> list[str]:
    """Reasons to doubt gradient attacks that can be seen before any."""
    notes = []
    if isinstance(model, nn.Module) and model.training and any(_differs(part) for part in model.modules()):
        notes.append(
            "the model is in training mode, with dropout or batch statistics: call model.eval() first"
        )
    if bool((out >= -1e-5).all()) and bool(((out.sum(1) - 1).abs() < 1e-4).all()):
        notes.append(
            "the outputs look like probabilities: return logits, or the loss takes a second softmax, whose "
            "gradients vanish"
        )
    flat, count = 0, 0
    for rows in right.nonzero().flatten().split(batch_size):
        at = x[rows].detach().requires_grad_()
        with torch.enable_grad():
            slope = slope_at(F.cross_entropy(model(at), y[rows], reduction="sum"), at).flatten(1)
        part = ball_of(ball, rows)
        eps = part.eps.flatten().expand(len(rows))
        size = slope.abs().sum(1) if ball.norm == "linf" else torch.linalg.vector_norm(slope, dim=1)
        flat += int(((eps * size < _FLAT) & (eps > 0)).sum())
        count += int((eps > 0).sum())
    if flat > 0.1 * count:
        notes.append(
            f"the loss is flat at {flat} of {count} samples (it rises by less than {_FLAT:g} across the ball, to first "
            "order): gradients vanish there, and gradient ascent may fail for that reason alone"
        )
    return notes


def _differs(part: nn.Module) -> bool:
    return isinstance(part, nn.modules.dropout._DropoutNd | nn.modules.batchnorm._BatchNorm)


def _batched(model: Callable[[Tensor], Tensor], batch_size: int) -> Logits:
    return lambda x: torch.cat([model(part) for part in x.split(batch_size)])


def _still(model: Any) -> Any:
    if not isinstance(model, nn.Module):
        return nullcontext()
    from contextlib import ExitStack

    stack = ExitStack()
    stack.enter_context(frozen_statistics(model))
    stack.enter_context(parameters_at_rest(model))
    return stack


def _clean(logits: Logits, x: Tensor, y: Tensor) -> Tensor:
    """The outputs without an attack, if they are logits for the labels."""
    with torch.no_grad():
        out = logits(x)
    if out.ndim != 2 or len(out) != len(x):
        raise ShapeError(f"model(x) has shape {tuple(out.shape)}: it must be logits, ({len(x)}, classes)")
    if y.min() < 0 or y.max() >= out.shape[1]:
        raise DataError(
            f"y has the labels {int(y.min())} to {int(y.max())}, but the model has {out.shape[1]} outputs: labels "
            "count from 0, and samples without one must be left out"
        )
    if bool(out.isnan().any()):
        raise DivergenceError("model(x) is not a number somewhere: check the model's parameters")
    return out


def _checked(x: Tensor, y: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise DataError(f"{name} is {type(value).__name__}: give a tensor, samples first")
    if not x.is_floating_point() or x.ndim < 1 or not len(x):
        raise DataError(f"x is {x.dtype} of shape {tuple(x.shape)}: give floating inputs, samples first")
    if y.is_floating_point() or tuple(y.shape) != (len(x),):
        raise DataError(f"y is {y.dtype} of shape {tuple(y.shape)}: give {len(x)} classes as integers")
    if batch_size < 1:
        raise ArgumentError(f"batch_size={batch_size} must be at least 1")
    return attacked_input(x)[0], y.long()
