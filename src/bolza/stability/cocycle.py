r"""Tangent vectors carried along a trajectory: the one computation behind every Lyapunov exponent.

    Z = J_t Q_t,   Q_{t+1} R_{t+1} = Z   (QR),   λᵢ = (1/T) Σ_t log |R_t|ᵢᵢ,   J_t = ∂x_{t+1}/∂x_t

J_t is never formed: Z is k forward-mode products, for all samples and all directions in one pass. Steps and layers
are the same thing here. A direction that J_t maps to zero, to rounding, has the exponent −∞, not nan.

Reference: Benettin, Galgani, Giorgilli & Strelcyn (1980), *Lyapunov characteristic exponents for smooth dynamical
systems*, Meccanica 15; Shimada & Nagashima (1979).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError, UnsupportedError
from bolza.ops.trees import Tree, float_leaves, is_differentiable, with_float_leaves

__all__ = ["Cocycle", "Flow", "orthonormalise", "products", "run_cocycle"]

Step: TypeAlias = Callable[[int, Tree, Tree], Tree]

_RECORDS = 200  # finite-time exponents that are kept
_CHECKED = 4  # directions by which a recorded tangent is compared with the function
_WORTH = 64  # steps from which recording the tangent pays
_ROOM = 2**24  # numbers in the tangents of one pass


def orthonormalise(z: Tensor, resolution: float | None = None) -> tuple[Tensor, Tensor]:
    r"""Orthonormal directions Q with the span of Z = Q R, and log |R_jj|.

    Args:
        z: directions ``(k, batch, n)``.
        resolution: relative size below which the part of a direction that the earlier ones do not span is rounding;
            by default some units in the last place of the dtype of ``z``.

    Returns:
        Q ``(k, batch, n)`` in the dtype of ``z``, and the logarithms ``(batch, k)`` in float64, −∞ for what is
        lost.
    """
    k, _, n = z.shape
    eps = torch.finfo(z.dtype).eps
    a = z.double()
    if k == 1:
        length = torch.linalg.vector_norm(a, dim=-1)  # (1, batch)
        unit = torch.where(length[..., None] > 0, a / length[..., None], n**-0.5)
        return unit.to(z.dtype), length.log().T
    if resolution is None:
        resolution = 8 * eps + 4 * math.sqrt(n) * torch.finfo(torch.float64).eps
    q, r = torch.linalg.qr(a.permute(1, 2, 0))
    stretch = r.diagonal(dim1=-2, dim2=-1).abs()
    lost = stretch <= resolution * torch.linalg.vector_norm(r, dim=-2)
    return q.permute(2, 0, 1).to(z.dtype), stretch.log().masked_fill(lost, -math.inf)


@dataclass
class Flow:
    """A trajectory that tangent vectors can be carried along.

    Args:
        step: (t, x, u) → next state; a tree of tensors.
        state: the first state.
        batched: whether leaves have samples first; otherwise the whole state is one sample.
        inputs: t → what drives step t, a tree of tensors or ``None``.
        traceable: whether ``step`` is a pure function of x and u alone, so that its tangent may be recorded once.
    """

    step: Step
    state: Tree
    batched: bool
    inputs: Callable[[int], Tree] = lambda t: None
    traceable: bool = False
    _mode: str = field(default="vmap", init=False)
    _traced: Any = field(default=None, init=False)
    _count: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        leaves = float_leaves(self.state)
        if not leaves or any(leaf.is_complex() for leaf in leaves):
            raise UnsupportedError(
                "the state has no real floating-point tensor, so that it has no tangent: start from one, such as the "
                "output of an embedding, and give complex states as real and imaginary parts"
            )
        if self.batched and len({leaf.shape[:1] for leaf in leaves}) != 1:
            raise ShapeError(
                f"the state has leaves of shapes {[tuple(leaf.shape) for leaf in leaves]}, which do not agree on the "
                "number of samples: put samples first in each, or set batched=False for one state"
            )
        if any(leaf.numel() == 0 for leaf in leaves):
            raise ShapeError(
                f"the state has leaves of shapes {[tuple(leaf.shape) for leaf in leaves]}: give at least one sample, "
                "with at least one number"
            )
        if any(bool(leaf.isnan().any()) for leaf in leaves):
            raise DivergenceError(
                "the state to start from is not finite, it holds nan: check x0, and whatever made it", step=0
            )
        self.dtype, self.device = leaves[0].dtype, leaves[0].device

    # -- flat states (batch, n)

    def flat(self, tree: Tree) -> Tensor:
        """The differentiable leaves of a state, one row a sample."""
        rows = [
            leaf.reshape(leaf.shape[0], -1) if self.batched else leaf.reshape(1, -1)
            for leaf in float_leaves(tree)
        ]
        return rows[0] if len(rows) == 1 else torch.cat([row.to(self.dtype) for row in rows], 1)

    def tree(self, flat: Tensor, like: Tree) -> Tree:
        """The state of those rows; ``like`` gives its structure."""
        leaves = float_leaves(like)
        sizes = [leaf.numel() // leaf.shape[0] if self.batched else leaf.numel() for leaf in leaves]
        pieces = [flat] if len(sizes) == 1 else flat.split(sizes, 1)
        shaped = [
            piece.reshape(flat.shape[0] if self.batched else 1, *leaf.shape[1:]).to(leaf.dtype)
            if self.batched
            else piece.reshape(leaf.shape).to(leaf.dtype)
            for piece, leaf in zip(pieces, leaves, strict=True)
        ]
        return with_float_leaves(like, shaped)

    # -- one step

    def advance(self, t: int, frame: Tensor) -> Tensor:
        """Move the state by step ``t``, and return J_t applied to the frame ``(k, batch, n)``."""
        u = self.inputs(t)
        x = self.flat(self.state)
        if self.traceable:
            found = self._by_graph(t, x, frame, u)
            if found is not None:
                self.state = self.tree(found[0], self.state)
                return found[1]
        following, z = self._push(t, x, frame, u)
        self.state = following
        return z

    def _by_graph(self, t: int, x: Tensor, frame: Tensor, u: Tree) -> tuple[Tensor, Tensor] | None:
        """Run the recorded graph; check it against the function after 1, 2, 4, 8 and so on calls."""
        if self._traced is None:
            self._traced = self._record(t, x, frame, u)
            if self._traced is None:
                self.traceable = False
                return None
        out, z = self._traced(x, frame, *_tensors(u))
        count, self._count = self._count, self._count + 1
        if count and count & (count - 1) == 0:
            state, wanted = self._push(t, x, frame[:_CHECKED], u)
            for got, true in ((out, self.flat(state)), (z[:_CHECKED], wanted)):
                tolerance = 1e3 * torch.finfo(true.dtype).eps * (1 + true.abs().max())
                if not bool((got - true).abs().max() <= tolerance):
                    if bool(torch.isfinite(true).all()):
                        raise _NotPure
        return out, z

    def _record(self, t: int, x: Tensor, frame: Tensor, u: Tree) -> Any:
        from torch.fx.experimental.proxy_tensor import make_fx

        leaves, spec = _pytree.tree_flatten(u)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        like = self.state
        if any(
            isinstance(leaf, Tensor) and not is_differentiable(leaf) for leaf in _pytree.tree_leaves(like)
        ):
            return None

        def both(x: Tensor, frame: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
            filled = list(leaves)
            for i, value in zip(places, given, strict=True):
                filled[i] = value
            control = _pytree.tree_unflatten(filled, spec)

            def f(rows: Tensor) -> Tensor:
                out = self.flat(self.step(t, self.tree(rows.clone(), like), control))
                if out.shape != rows.shape:  # not a map of one space: the step by itself will say what it is
                    raise ShapeError("the state changes its size")
                return out

            def push(v: Tensor) -> tuple[Tensor, Tensor]:
                out, tangent = torch.func.jvp(f, (x,), (v,))[:2]
                return out, tangent

            out, z = torch.vmap(push, out_dims=(None, 0))(frame)  # type: ignore[arg-type]
            return out.clone(), z

        try:
            with torch.no_grad():
                graph = make_fx(both)(x, frame, *(leaves[i] for i in places))
        except Exception:  # whatever hinders the recording; the step itself will say what is wrong with it
            return None
        for node in list(graph.graph.nodes):
            if _does_nothing(node):
                node.replace_all_uses_with(node.args[0])
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return graph

    def _push(self, t: int, x: Tensor, frame: Tensor, u: Tree) -> tuple[Tree, Tensor]:
        with torch.no_grad():
            following = self.step(t, self.tree(x.clone(), self.state), u)
        if not float_leaves(following):
            raise UnsupportedError(
                f"step {t} gives {type(following).__name__} without a floating-point tensor: it must return the next "
                "state, of tensors that depend smoothly on the last one"
            )
        if self.batched and any(leaf.shape[:1] != x.shape[:1] for leaf in float_leaves(following)):
            shapes = [tuple(leaf.shape) for leaf in float_leaves(following)]
            raise ShapeError(
                f"the state after step {t} has leaves of shapes {shapes}, not {x.shape[0]} samples first: give each "
                "sample its own row, or set batched=False to take the whole state as one"
            )
        like, size = self.state, self.flat(following).shape[1]
        if size < frame.shape[0]:
            raise ArgumentError(
                f"k is {frame.shape[0]}, but the state after step {t} has only {size} numbers: at most {size} "
                "directions can be carried through it"
            )

        def f(rows: Tensor) -> Tensor:
            return self.flat(self.step(t, self.tree(rows.clone(), like), u))

        return following, products(self, f, x, frame)


def _does_nothing(node: torch.fx.Node) -> bool:
    """Whether a recorded operation returns its argument as it was; a quarter of all of them do."""
    aten = torch.ops.aten
    if node.target not in (
        aten.alias.default,
        aten.expand.default,
        aten._to_copy.default,
        aten.permute.default,
    ):
        return False
    source = node.args[0]
    if not isinstance(source, torch.fx.Node) or "val" not in node.meta or "val" not in source.meta:
        return False
    if node.target is aten.permute.default and list(node.args[1]) != sorted(node.args[1]):  # type: ignore[arg-type]
        return False
    a, b = node.meta["val"], source.meta["val"]
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


class _NotPure(Exception):
    """The recorded tangent is not that of the step: it depends on more than its arguments."""


def products(flow: Flow, f: Callable[[Tensor], Tensor], x: Tensor, frame: Tensor) -> Tensor:
    """J applied to each direction: in one pass if the operations allow it, else one by one, else by double backward."""
    modes = {"vmap": _all_at_once, "jvp": _one_by_one, "vjp": _twice_backward}
    first: Exception | None = None
    for name in list(modes)[list(modes).index(flow._mode) :]:
        try:
            z = modes[name](f, x, frame)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            first = first or error
            continue
        flow._mode = name
        return z
    assert first is not None
    if isinstance(first, torch.OutOfMemoryError):
        raise first
    raise UnsupportedError(
        f"torch cannot take the derivative of a step ({str(first).splitlines()[0]}): write it with differentiable "
        "operations of torch alone"
    ) from first


def _all_at_once(f: Callable[[Tensor], Tensor], x: Tensor, frame: Tensor) -> Tensor:
    def push(v: Tensor) -> Tensor:
        tangent: Tensor = torch.func.jvp(f, (x,), (v,))[1]
        return tangent

    chunk = max(1, _ROOM // max(1, x.numel()))
    z: Tensor = torch.vmap(push, chunk_size=chunk, randomness="same")(frame)
    return z


def _one_by_one(f: Callable[[Tensor], Tensor], x: Tensor, frame: Tensor) -> Tensor:
    return torch.stack([torch.func.jvp(f, (x,), (v,))[1] for v in frame])


def _twice_backward(f: Callable[[Tensor], Tensor], x: Tensor, frame: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = f(x)
        w = torch.zeros_like(y, requires_grad=True)
        pulled = torch.autograd.grad(y, x, w, create_graph=True)[0]
        return torch.stack([torch.autograd.grad(pulled, w, v, retain_graph=True)[0].detach() for v in frame])


def _tensors(tree: Tree) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Cocycle:
    """What was found along one trajectory a sample.

    Attributes:
        sums: Σ log |R_jj| after the last step, ``(batch, k)``, float64 on the CPU.
        history: the same sums at ``marks``, ``(len(marks), batch, k)``.
        marks: numbers of steps.
        lost: number of (sample, direction, step) at which a direction was mapped to zero, to rounding.
        frame: the last orthonormal directions, ``(k, batch, n)``.
        state: the last state.
    """

    sums: Tensor
    history: Tensor
    marks: tuple[int, ...]
    lost: int
    frame: Tensor
    state: Tree


def run_cocycle(
    flow: Callable[[bool], Flow], k: int, steps: int, warmup: int, every: int, seed: int
) -> Cocycle:
    """Carry k random directions along the trajectory, and sum the logarithms of their stretching.

    Args:
        flow: makes the flow at its first state; called with whether its tangent may be recorded.
        k: number of directions.
        steps: steps that count.
        warmup: steps before them, on which state and directions settle.
        every: steps between two orthonormalisations.
        seed: of the random directions; those of a smaller k are the first ones of a larger k.

    Raises:
        DivergenceError: state or directions are not finite.
    """
    try:
        return _run(flow(warmup + steps >= _WORTH), k, steps, warmup, every, seed)
    except _NotPure:
        return _run(flow(False), k, steps, warmup, every, seed)


@torch.no_grad()
def _run(flow: Flow, k: int, steps: int, warmup: int, every: int, seed: int) -> Cocycle:
    batch, n = flow.flat(flow.state).shape
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(k, batch, n, generator=generator, dtype=torch.float64)
    frame, _ = orthonormalise(draw.to(flow.device, flow.dtype))
    sums = torch.zeros(batch, k, dtype=torch.float64, device=flow.device)
    lost = torch.zeros((), dtype=torch.int64, device=flow.device)
    wanted, passed = _marks(steps), 0
    history: list[Tensor] = []
    marks: list[int] = []
    for t in range(warmup + steps):
        frame = flow.advance(t, frame)
        done = t + 1 - warmup
        if (t + 1) % every and done not in (0, steps):
            continue
        frame, logs = orthonormalise(frame)
        if done > 0:
            sums = sums + logs
            lost += (logs == -math.inf).sum()
            if done >= wanted[passed]:
                _check_finite(sums, frame, flow.flat(flow.state), t, n)
                history.append(sums.cpu())
                marks.append(done)
                while passed < len(wanted) and wanted[passed] <= done:
                    passed += 1
    return Cocycle(sums.cpu(), torch.stack(history), tuple(marks), int(lost), frame, flow.state)


def _marks(steps: int) -> list[int]:
    """About 200 numbers of steps, evenly spaced, the last one included."""
    count = min(steps, _RECORDS)
    return [round((i + 1) * steps / count) for i in range(count)]


def _check_finite(sums: Tensor, frame: Tensor, state: Tensor, t: int, n: int) -> None:
    bad: Sequence[bool] = (
        bool(sums.isnan().any()),
        bool((sums == math.inf).any()),
        not bool(frame.isfinite().all()),
        bool(state.isnan().any()),
        # between layers, where the size changes, an infinite number may be a mask
        state.shape[1] == n and bool(state.isinf().any()),
    )
    if any(bad):
        raise DivergenceError(
            f"the trajectory or its tangent directions stopped being finite at or before step {t}: the system leaves "
            "every bound from this x0; start inside the basin of an attractor, shorten dt, or orthonormalise more "
            "often (a smaller every)",
            step=t,
        )
