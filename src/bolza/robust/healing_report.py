r"""What control of hidden states gives, and where it gives nothing: measured side by side.

Five kinds of inputs: clean ones; with noise; under an attack on the bare network (oblivious: whoever made it knows
nothing of the control); under an attack through the control (adaptive); and under an attack confined to the subspace
that control leaves alone. Only the adaptive number says what an adversary can do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, DataError, ShapeError
from bolza.ops.batches import Loss, apply
from bolza.ops.trees import is_differentiable
from bolza.robust.attacks import pgd
from bolza.robust.balls import Clip, Norm, attacked_input, lengths

__all__ = ["HealingReport", "HealingRow", "healing_report", "right_answers"]


@dataclass(frozen=True)
class HealingRow:
    """Accuracy of a network without and with control on one kind of inputs.

    Attributes:
        name: which inputs.
        base: accuracy of the bare network.
        healed: accuracy under control.
        error: standard error of the difference, over samples.
    """

    name: str
    base: float
    healed: float
    error: float

    @property
    def gain(self) -> float:
        """What control adds; negative where it harms."""
        return self.healed - self.base


@dataclass(frozen=True)
class HealingReport:
    """What control of hidden states gives.

    Attributes:
        rows: clean, noise, oblivious, adaptive, restricted, as far as they were asked for; in the adaptive row each
            network is under the attack made for it.
        eps: radius of the attacks, or None.
        norm: its norm.
        noise: strength of the noise, or None.
        notes: what the numbers mean, in words.
    """

    rows: tuple[HealingRow, ...]
    eps: float | None
    norm: Norm
    noise: float | None
    notes: tuple[str, ...]

    def __getitem__(self, name: str) -> HealingRow:
        """The row of that name.

        Raises:
            ArgumentError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise ArgumentError(
            f"the report has no row {name!r}: it has {', '.join(row.name for row in self.rows)}"
        )

    def __str__(self) -> str:
        """The rows as a table, the adaptive attack next to the oblivious one, and the notes."""
        lines = [f"{'inputs':<12}{'base':>8}{'healed':>8}{'gain':>8}   ±"]
        for row in self.rows:
            lines.append(
                f"{row.name:<12}{row.base:>8.3f}{row.healed:>8.3f}{row.gain:>+8.3f}   {row.error:.3f}"
            )
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)])


def healing_report(
    base: nn.Module,
    healed: nn.Module,
    x: Any,
    y: Tensor,
    eps: float | None,
    *,
    noise: float | None,
    norm: Norm,
    steps: int,
    step_size: float | None,
    clip: Clip,
    loss: Loss,
    restrict: Callable[[Tensor], Tensor] | None,
    batch_size: int,
    seed: int,
) -> HealingReport:
    """Measure both networks; see :meth:`bolza.robust.SelfHealing.report`."""
    if noise is not None and not noise >= 0:
        raise ArgumentError(f"noise={noise} must not be negative")
    floats = any(is_differentiable(leaf) for leaf in torch.utils._pytree.tree_leaves(x))
    if eps is not None and not floats:
        raise DataError(
            "x holds tokens, which no attack of a ball moves: leave eps out, and give noise as a share"
        )
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    generator = _generator(x, seed)
    for rows in torch.arange(len(y)).split(batch_size):
        part, labels = _rows(x, rows, len(y)), y[rows.to(y.device)]

        def judge(name: str, on_base: Any, on_healed: Any, labels: Tensor = labels) -> None:
            with torch.no_grad():
                pair = tuple(
                    right_answers(apply(net, inputs), labels).double().reshape(len(labels), -1).mean(1)
                    for net, inputs in ((base, on_base), (healed, on_healed))
                )
            found.setdefault(name, []).append((pair[0], pair[1]))

        judge("clean", part, part)
        if noise is not None:
            noisy = _noisy(part, noise, generator)
            judge("noise", noisy, noisy)
        if eps is None:
            continue

        def attack(net: nn.Module, part: Any = part, labels: Tensor = labels, clip: Clip = clip) -> Any:
            return pgd(
                net, loss, part, labels, eps, steps,
                norm=norm, step_size=step_size, clip=clip, generator=generator,
            )  # fmt: skip

        against_base = attack(base)
        judge("oblivious", against_base, against_base)
        judge("adaptive", against_base, attack(healed))
        if restrict is not None:
            inside = _Inside(base, part, restrict, eps, norm)
            moved = inside.put(attack(inside, clip=None))
            judge("restricted", moved, moved)
    rows_found = tuple(_row(name, pairs) for name, pairs in found.items())
    return HealingReport(
        rows_found, eps, norm, noise, tuple(_notes({r.name: r for r in rows_found}, restrict))
    )


class _Inside(nn.Module):
    """The network as a function of a perturbation that is put into the subspace, and then back into the ball."""

    def __init__(
        self, net: nn.Module, x: Any, restrict: Callable[[Tensor], Tensor], eps: float, norm: Norm
    ) -> None:
        super().__init__()
        self.net, self.restrict, self.eps, self.norm = net, restrict, eps, norm
        self.centre, self.place = attacked_input(x)

    def put(self, moved: Any) -> Any:
        at, _ = attacked_input(moved)
        inside = self.restrict(at - self.centre)
        size = inside.flatten(1).abs().amax(1) if self.norm == "linf" else lengths(inside).flatten()
        scale = (self.eps / size.detach().clamp_min(torch.finfo(size.dtype).tiny)).clamp(max=1)
        return self.place(self.centre + scale.reshape(-1, *[1] * (at.ndim - 1)) * inside)

    def forward(self, *args: Any) -> Any:
        return apply(self.net, self.put(args if len(args) > 1 else args[0]))


def right_answers(out: Any, y: Tensor) -> Tensor:
    """Where the class of largest output is the right one, in the shape of y.

    Raises:
        ShapeError: the output is no tensor of scores for y.
    """
    if isinstance(out, Tensor) and not y.is_floating_point():
        if out.shape[:-1] == y.shape:
            return out.argmax(-1) == y.to(out.device)
        if out.ndim > 2 and out.shape[:1] + out.shape[2:] == y.shape:
            return out.argmax(1) == y.to(out.device)
    shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
    raise ShapeError(
        f"the network returns {shape} for labels of shape {tuple(y.shape)} ({y.dtype}): scores of classes are needed, "
        "with integer labels; to learn from all inputs call fit(x) without labels"
    )


def _row(name: str, pairs: list[tuple[Tensor, Tensor]]) -> HealingRow:
    base, healed = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
    error = float((healed - base).std() / len(base) ** 0.5) if len(base) > 1 else 0.0
    return HealingRow(name, float(base.mean()), float(healed.mean()), error)


def _notes(rows: dict[str, HealingRow], restrict: Any) -> list[str]:
    notes = []
    clean = rows["clean"]
    if clean.gain < -2 * clean.error:
        notes.append(f"clean accuracy falls by {-clean.gain:.3f}: raise c or fraction if that is too much")
    if "noise" in rows and rows["noise"].gain <= 2 * rows["noise"].error:
        notes.append(f"no clear gain under noise ({rows['noise'].gain:+.3f} ± {rows['noise'].error:.3f})")
    if "adaptive" in rows:
        oblivious, adaptive = rows["oblivious"], rows["adaptive"]
        notes.append(
            f"who knows of the control takes accuracy to {adaptive.healed:.3f}, not {oblivious.healed:.3f}: "
            f"the gain to count on is {adaptive.gain:+.3f}, not {oblivious.gain:+.3f}"
        )
        if adaptive.gain < -2 * adaptive.error:
            notes.append(
                "control harms against an adversary: do not use it here; networks trained against one need none"
            )
    if "restricted" in rows:
        row = rows["restricted"]
        words = (
            "nothing is gained"
            if row.gain <= 2 * row.error
            else f"{row.gain:+.3f} is gained by the layers behind"
        )
        notes.append(f"inside of the input's subspace, which control leaves alone by design, {words}")
    elif "adaptive" in rows and restrict is None:
        notes.append("no attack inside of the subspace: the input is not controlled, or by a curved manifold")
    return notes


def _noisy(x: Any, strength: float, generator: torch.Generator) -> Any:
    """Gaussian noise on a floating input; tokens replaced by others of the batch."""
    leaves = torch.utils._pytree.tree_leaves(x)
    if any(is_differentiable(leaf) for leaf in leaves):
        centre, put = attacked_input(x)
        drawn = torch.randn(centre.shape, generator=generator, dtype=centre.dtype, device=centre.device)
        return put(centre + strength * drawn)
    if not isinstance(x, Tensor) or strength > 1:
        raise DataError(
            f"noise={strength:g} on tokens is the share that is replaced, at most 1, of one tensor"
        )
    others = x.flatten()[torch.randint(x.numel(), x.shape, generator=generator, device=x.device)]
    hit = torch.rand(x.shape, generator=generator, device=x.device) < strength
    return torch.where(hit, others, x)


def _generator(x: Any, seed: int) -> torch.Generator:
    device = next(
        (leaf.device for leaf in torch.utils._pytree.tree_leaves(x) if isinstance(leaf, Tensor)), "cpu"
    )
    return torch.Generator(device).manual_seed(seed)


def _rows(x: Any, rows: Tensor, n: int) -> Any:
    return torch.utils._pytree.tree_map(
        lambda leaf: (
            leaf[rows.to(leaf.device)] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == n else leaf
        ),
        x,
    )
