r"""You only propagate once: the adversary meets the first stage alone.

By the maximum principle for the game the perturbation η enters H_0 only, so that the costate p of the first stage's
output, once known, serves several cheap steps:

    repeat m times:   z = f_0(x + η),   ℓ(g(z), y) back to z:   p = ∂ℓ/∂z,   gradients of g
        repeat n times:   η ← Π[η + σ sign ∇_η ⟨p, f_0(x + η)⟩]
        gradients of f_0 from ⟨p, f_0(x + η)⟩

One full pass for n steps of ascent.

Reference: Zhang, Zhang, Lu, Zhu & Dong (2019).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from bolza.core.errors import ArgumentError, DataError, UnsupportedError
from bolza.core.reference import Reference, cites
from bolza.ops.batches import Loss
from bolza.ops.trees import is_differentiable
from bolza.robust.adversarial_training import AdversarialStep, finite_mean
from bolza.robust.balls import Ball, Clip, Norm, attacked_input
from bolza.systems.module import ModuleSystem, as_system, bind
from bolza.systems.replay import Replay, restored_randomness
from bolza.systems.stages import Stage, split_into_stages
from bolza.systems.tracer import random_states

__all__ = ["ZHANG_YOPO", "yopo"]

ZHANG_YOPO = Reference(
    "zhang2019yopo",
    "Zhang, Dinghuai and Zhang, Tianyuan and Lu, Yiping and Zhu, Zhanxing and Dong, Bin",
    "You Only Propagate Once: Accelerating Adversarial Training via Maximal Principle",
    2019,
    venue="Advances in Neural Information Processing Systems",
    arxiv="1905.00877",
)


@cites(ZHANG_YOPO)
def yopo(
    model: nn.Module | ModuleSystem,
    loss: Loss,
    x: Any,
    y: Any,
    eps: float | Tensor,
    outer: int = 5,
    inner: int = 3,
    *,
    norm: Norm = "linf",
    step_size: float | Tensor | None = None,
    first: str | None = None,
    clip: Clip = (0.0, 1.0),
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> AdversarialStep:
    r"""Adversarial training that back-propagates once for several steps of ascent through the first stage.

        η ← Π[η + σ sign ∇_η ⟨p, f_0(x + η)⟩],   p = ∂ℓ/∂f_0 of the last full pass

    The network is read as stages, and the first one with parameters ends before its first nonlinearity. Costs m full
    passes, and m·n passes through the first stage. With n = 1 the perturbation is that of m steps of projected
    gradient ascent. Gradients are the mean over the m passes, so that the learning rate is that of plain training.
    A first stage with dropout keeps its mask for the whole call, as p belongs to it.

    Args:
        model: the network, in training mode; or the system that :func:`bolza.systems.as_system` makes of it: in a loop
            make it once, or the network is read again at each call.
        loss: ``loss(output, y)``: a mean over the samples, or one number a sample.
        x: inputs, shape ``(n, *input)``; or a tuple of the arguments of ``forward``, one of them floating.
        y: targets.
        eps: radius in the units of x, one number or one a sample.
        outer: full passes m.
        inner: steps n of ascent for each of them.
        norm: ``"linf"`` or ``"l2"``.
        step_size: σ in the units of x; 2.5 ε / (m n) by default.
        first: name of the module after which the first stage ends, where the rule is not to decide.
        clip: range of the data; None for no limits.
        random_start: start from a random point of the ball, not from x.
        generator: where the random start comes from.

    Returns:
        AdversarialStep, with the mean loss over the full passes; gradients have been added to ``.grad``.

    Raises:
        ArgumentError: outer or inner below 1, no stage has parameters, or a radius or norm that makes no sense.
        DataError: x has no floating tensor, is not finite, or lies outside of the range.
        DivergenceError: the loss is not finite.
        TraceError: the network cannot be read as stages.
        UnsupportedError: the first stage normalises by the statistics of the batch.

    Reference: Zhang et al. (2019), algorithm 1. Departures: costates have the sign of gradients; gradients are averaged
    over the m passes, which the authors do by the learning rate; the first stage is evaluated once at each η.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x, y = torch.rand(5, 4), torch.arange(5) % 3
        >>> system = as_system(net, x)
        >>> step = yopo(system, nn.functional.cross_entropy, x, y, eps=0.1, outer=2, inner=3)
        >>> step.full_passes, step.first_stage_passes, net[0].weight.grad.shape
        (2, 6, torch.Size([8, 4]))
    """
    if outer < 1 or inner < 1:
        raise ArgumentError(f"outer={outer} and inner={inner} must both be at least 1")
    if isinstance(x, dict):
        raise DataError("x is a dict: give the arguments of forward in order, as a tensor or a tuple")
    centre, put = attacked_input(x)
    ball = Ball(centre, eps, norm, clip)
    step = 2.5 / (outer * inner) * ball.eps if step_size is None else ball.per_sample(step_size, "step_size")
    system = model if isinstance(model, ModuleSystem) else as_system(model, x)
    halves = _halves(system, first)
    own = [p for p in halves.head_parameters if p.requires_grad]
    losses = []
    with torch.enable_grad():
        at = (ball.random(generator) if random_start else ball.x.clone()).requires_grad_()
        system.initial_state(*(x if isinstance(x, tuple) else (x,)))  # says so, where the sizes do not fit
        drawn = random_states(x) if halves.random else None
        z = halves.head(put(at))
        for _ in range(outer):
            leaves, spec = _pytree.tree_flatten(z)
            floats = [i for i, leaf in enumerate(leaves) if is_differentiable(leaf) and leaf.requires_grad]
            cut = list(leaves)
            for i in floats:
                cut[i] = leaves[i].detach().requires_grad_()
            value = finite_mean(loss(halves.tail(_pytree.tree_unflatten(cut, spec)), y))
            (value / outer).backward()  # type: ignore[no-untyped-call]
            losses.append(value.detach())
            p = [cut[i].grad if cut[i].grad is not None else torch.zeros_like(cut[i]) for i in floats]
            for _ in range(inner):
                slope = torch.autograd.grad([leaves[i] for i in floats], at, p, allow_unused=True)[0]
                slope = torch.zeros_like(at) if slope is None else slope
                at = ball.ascend(at.detach(), slope, step).requires_grad_()
                with nullcontext() if drawn is None else restored_randomness(drawn, x):
                    z = halves.head(put(at))  # by the numbers that p was found with
                leaves = _pytree.tree_leaves(z)
            if own:  # the graph is kept: its slope in the inputs is needed for the next p
                torch.autograd.backward([leaves[i] for i in floats], p, inputs=own, retain_graph=True)
    return AdversarialStep(torch.stack(losses).mean(), put(at.detach()), outer, outer * inner)


class _Halves:
    """The first stage of a network and the rest, as the network itself would run them."""

    def __init__(self, system: ModuleSystem, first: str | None) -> None:
        traced = system.traced
        stages = (
            split_into_stages(traced, split="affine")
            if first is None
            else split_into_stages(traced, stages=[first])
        )
        steps = [(stage, Replay(system.module, stage.nodes, traced.constants)) for stage in stages]
        owners = [i for i, (_, replay) in enumerate(steps) if replay.names]
        if not owners:
            raise ArgumentError("the model has no parameters: there is nothing to train against an adversary")
        end = owners[0] + 1
        self._head, self._tail = steps[:end], steps[end:]
        self._module, self._names = (
            system.module,
            {name for _, replay in self._head for name in replay.names},
        )
        self.random = any(replay.random for _, replay in self._head)
        for stage, replay in self._head:
            _refuse_batch_statistics(stage, replay)

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters of the first stage, those that the network has now."""
        return [p for name, p in self._module.named_parameters() if name in self._names]

    def head(self, x: Any) -> Any:
        """Z = f_0(x)."""
        return _run(self._head, x[0] if isinstance(x, tuple) and len(x) == 1 else x)

    def tail(self, z: Any) -> Any:
        """The output from z; running statistics move, random numbers are drawn."""
        return _run(self._tail, z)


def _run(steps: list[tuple[Stage, Replay]], x: Any) -> Any:
    for stage, replay in steps:
        env = replay.in_place(bind(stage, x))
        x = torch.fx.node.map_arg(stage.outputs, env.__getitem__)
    return x


def _refuse_batch_statistics(stage: Stage, replay: Replay) -> None:
    layers = [part for layer in replay.layers for part in layer.modules()]
    if any(
        isinstance(part, nn.modules.batchnorm._BatchNorm) and (part.training or part.running_mean is None)
        for part in layers
    ):
        raise UnsupportedError(
            f"the first stage {stage.name!r} normalises by the statistics of the batch, which move with the "
            "perturbation: put that layer in evaluation mode, or end the first stage before it with "
            "first='name of a module'"
        )


_KEPT: WeakKeyDictionary[ModuleSystem, dict[Any, _Halves]] = WeakKeyDictionary()


def _halves(system: ModuleSystem, first: str | None) -> _Halves:
    """The halves of a system in the present mode of its network, made once."""
    kept = _KEPT.setdefault(system, {})
    key = (first, tuple(part.training for part in system.module.modules()))
    if key not in kept:
        kept[key] = _Halves(system, first)
    return kept[key]
