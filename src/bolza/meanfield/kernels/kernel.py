r"""Kernels of one value of an infinitely wide network, for pairs of inputs.

For a value h of ``units`` units at each of P positions (P = 1 without positions), inputs a and b:

    nngp[p, a, b]  = E h_i(a, p) h_i(b, p)                 mean over units i: a second moment, not centred
    ntk[p, a, b]   = Σ_θ ∂h_i(a, p)/∂θ ∂h_i(b, p)/∂θ       of one unit, over the parameters so far

Convolutions, activations and normalisation respect equal positions; averages over positions do not, and
where one follows the kernels have two position indices, ``[p, p', a, b]`` (``all_pairs``). Positions come
first so that sliding a window moves whole blocks of pairs.

A network is gone through twice: once for every input with itself (``own``: the last index is the input),
which gives second moments and means of each input, then for blocks of pairs of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bolza.core.errors import UnsupportedError
from bolza.meanfield.kernels.recipes import Leaf, Recipe

__all__ = ["Ends", "Kernel", "KernelCall", "NeedsAllPairs", "Values", "spread"]


class NeedsAllPairs(Exception):
    """A layer mixes positions, so the kernels before it are needed for all pairs of positions."""


@dataclass(frozen=True)
class Ends:
    """Second moment and mean of the inputs at one end of the pairs, shaped to broadcast with the kernel."""

    second: Tensor
    mean: Tensor


@dataclass(frozen=True)
class Kernel:
    """Kernels of one value; see the module for the letters.

    Args:
        nngp: second moments, ``(P, *pairs)`` or ``(P, P, *pairs)``; pairs are ``(n1, n2)``, or ``(n,)``
            if each input is paired with itself.
        ntk: the tangent kernel in the same shape; None if it is zero or not wanted.
        left: moments of the first input of each pair.
        right: moments of the second one.
        space: sizes of the dimensions of positions, ``()`` if there are none.
        units: number of units.
        unit_dim: which dimension of the value holds them.
        all_pairs: whether there are two position indices.
        gaussian: whether the units are independent zero-mean Gaussians in the limit.
        sources: random layers it stems from without another one between.
        own: whether each input is paired with itself.
        mean: ``(P, n)``: mean over units, kept up where ``own``; else not used.
        known: how a unit comes from Gaussians, where it is not one itself; lost where ``nngp`` changes.
    """

    nngp: Tensor
    ntk: Tensor | None
    left: Ends
    right: Ends
    space: tuple[int, ...]
    units: int
    unit_dim: int
    all_pairs: bool
    gaussian: bool = False
    sources: frozenset[str] = frozenset()
    own: bool = False
    mean: Tensor | None = field(default=None, repr=False)
    known: Recipe | None = field(default=None, repr=False)

    @property
    def positions(self) -> int:
        """Number of positions."""
        return math.prod(self.space)

    @property
    def second(self) -> Tensor:
        """Second moment of each input at each position, ``(P, n)``; only where ``own``."""
        return self.nngp.diagonal(dim1=0, dim2=1).T if self.all_pairs else self.nngp

    def with_(self, **changes: Any) -> Kernel:
        """A copy with some fields replaced; with another ``nngp`` the recipe is lost unless it is given."""
        if "nngp" in changes:
            changes.setdefault("known", None)
        return replace(self, **changes)

    def map(self, f: Callable[[Tensor], Tensor], **changes: Any) -> Kernel:
        """The same linear map of both kernels."""
        return self.with_(nngp=f(self.nngp), ntk=None if self.ntk is None else f(self.ntk), **changes)

    @property
    def recipe(self) -> Recipe | None:
        """How a unit comes from independent Gaussians; None where that is not known."""
        if self.gaussian:
            return Leaf(self.nngp, self.ntk, self.left.second, self.right.second, self.sources, self.nngp)
        return self.known

    def paired(self) -> Kernel:
        """The kernel itself, if it has all pairs of positions (or one position).

        Raises:
            NeedsAllPairs: it has not; the pass starts again and keeps them.
        """
        if self.all_pairs:
            return self
        if self.positions > 1:
            raise NeedsAllPairs
        return self.map(lambda t: t[None], all_pairs=True)

    def reduced(self) -> Kernel:
        """Equal positions only."""
        if not self.all_pairs:
            return self

        def equal(t: Tensor) -> Tensor:
            return t.diagonal(dim1=0, dim2=1).movedim(-1, 0)

        def end(t: Tensor) -> Tensor:
            p = len(self.nngp)
            t = t.reshape(*[1] * (self.nngp.ndim - t.ndim), *t.shape)
            return equal(t.expand(p, p, *t.shape[2:]))

        def leaf(old: Leaf) -> Leaf:
            ntk = None if old.ntk is None else equal(old.ntk)
            return Leaf(equal(old.nngp), ntk, end(old.left), end(old.right), old.sources, old.origin)

        left, right = self.left, self.right
        if all(
            n in (1, len(self.nngp)) for e in (left, right) for n in e.second.shape[:2]
        ):  # else of the input
            left, right = (Ends(end(e.second), end(e.mean)) for e in (left, right))
        known = None if self.known is None else self.known.map(leaf)
        return self.map(equal, all_pairs=False, left=left, right=right, known=known)


@dataclass(frozen=True)
class Values:
    """A value that no random layer has touched yet: the inputs, or what is computed from them.

    Args:
        left: ``(n1, …)``.
        right: ``(n2, …)``; None where each input is paired with itself.
    """

    left: Tensor
    right: Tensor | None

    def kernel(self, unit_dim: int, all_pairs: bool) -> Kernel:
        """The mean over units of products, and no tangent kernel."""
        ndim = self.left.ndim
        if ndim < 2:
            raise UnsupportedError(
                f"a value of shape {tuple(self.left.shape)} has no units: give inputs (batch, …, units)"
            )
        unit_dim %= ndim
        a = _positions_first(self.left, unit_dim)  # (P, n, units)
        units = a.shape[-1]
        space = tuple(s for d, s in enumerate(self.left.shape) if d not in (0, unit_dim))
        pairs = all_pairs and a.shape[0] > 1
        second, mean = a.square().mean(-1), a.mean(-1)
        if self.right is None:
            nngp = torch.einsum("pnc,qnc->pqn", a, a) / units if pairs else second
            own = Ends(second, mean)
            left, right = (spread(own, axis, pairs, True) for axis in (0, 1))
            return Kernel(nngp, None, left, right, space, units, unit_dim, pairs, own=True, mean=mean)
        b = _positions_first(self.right, unit_dim)
        if pairs:
            nngp = a[:, None] @ b.transpose(1, 2)[None]
        else:
            nngp = a @ b.transpose(1, 2)
        left = spread(Ends(second, mean), 0, pairs, False)
        right = spread(Ends(b.square().mean(-1), b.mean(-1)), 1, pairs, False)
        return Kernel(nngp / units, None, left, right, space, units, unit_dim, pairs)


def _positions_first(value: Tensor, unit_dim: int) -> Tensor:
    return value.movedim(unit_dim, -1).reshape(len(value), -1, value.shape[unit_dim]).transpose(0, 1)


def spread(ends: Ends, axis: int, all_pairs: bool, own: bool) -> Ends:
    """Moments ``(P, n)`` of one end (0: left, 1: right), shaped to broadcast with the kernel."""

    def shape(t: Tensor) -> Tensor:
        if not own:
            t = t.unsqueeze(2 - axis)
        return t.unsqueeze(1 - axis) if all_pairs else t

    return Ends(shape(ends.second), shape(ends.mean))


@dataclass(frozen=True)
class KernelCall:
    """One call of a layer or function on kernels.

    Args:
        name: path of the module, or name of the node in the graph.
        function: plain name of the function; empty for a module.
        inputs: the arguments that carry data, in order.
        args: the arguments, tensors of data standing as empty ones of the right shape (of a small batch).
        kwargs: the same for keyword arguments.
        output: stands for the result in the same way.
        all_pairs: whether the result is wanted for all pairs of positions.
        ntk: whether the tangent kernel is wanted.
        dtype: of the kernels.
        parametrization: ``"ntk"`` or ``"standard"``.
        weight_var: σ_w² that stands for the layers' own, if given.
        bias_var: σ_b² that stands for the layers' own, if given.
        again: the call with its first data argument replaced by a tensor.
        cache: what a map wants to keep from block to block.
        samples: number of points for expectations that have neither a closed form nor a table.
        seed: of the points.
        roots: smallest and largest root of the second moments of the first input, over all inputs.
    """

    name: str
    function: str
    inputs: tuple[Kernel | Values, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    all_pairs: bool
    ntk: bool
    dtype: torch.dtype
    parametrization: str
    weight_var: float | None
    bias_var: float | None
    again: Callable[[Tensor], Any]
    cache: dict[Any, Any]
    samples: int
    seed: int
    roots: Callable[[], tuple[float, float]]

    def kernel(self, unit_dim: int = -1, index: int = 0) -> Kernel:
        """An input as a kernel; ``unit_dim`` says where a value without kernel yet has its units."""
        given = self.inputs[index]
        return given.kernel(unit_dim, self.all_pairs) if isinstance(given, Values) else given

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument by place or name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)
