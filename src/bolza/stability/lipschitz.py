r"""Certified Lipschitz constants of networks: ‖f(x) − f(x')‖ ≤ L ‖x − x'‖ for all inputs, or for those of a box.

The network is read from its graph, in evaluation mode and float64. Every method gives an upper bound; the record has
beside it the largest gain that was found at sample points, which is a lower bound.

Reference: Fazlyab, Robey, Hassani, Morari & Pappas (2019), *Efficient and Accurate Estimation of Lipschitz Constants
for Deep Neural Networks*; Pauli, Gramlich & Allgöwer (2024), *Lipschitz constant estimation for general neural network
architectures using control tools*. Departures: convolutions are written out as matrices, which is tighter than their
state-space form and limited to some thousand units; beyond that, products of gains; the optimiser.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bolza.core import Reference, cites
from bolza.core.errors import ArgumentError, BolzaError, DivergenceError, ShapeError, UnsupportedError
from bolza.ops.replay import differentiable_kernels
from bolza.stability.interval import slopes_on_box
from bolza.stability.layers import Reading, read_network
from bolza.stability.sectors import SectorNetwork, closed_form, gain, newton, semidefinite
from bolza.stability.segments import Box, pieces, product_gain, sector_network

__all__ = ["FAZLYAB", "LipschitzBound", "LipschitzPart", "PAULI", "lipschitz", "sampled_gain"]

FAZLYAB = Reference(
    "fazlyab2019efficient",
    "Fazlyab, Mahyar and Robey, Alexander and Hassani, Hamed and Morari, Manfred and Pappas, George J.",
    "Efficient and Accurate Estimation of Lipschitz Constants for Deep Neural Networks",
    2019,
    venue="NeurIPS",
    arxiv="1906.04893",
)
PAULI = Reference(
    "pauli2024lipschitz",
    "Pauli, Patricia and Gramlich, Dennis and Allgöwer, Frank",
    "Lipschitz constant estimation for general neural network architectures using control tools",
    2024,
    arxiv="2405.01125",
)

Method = Literal["product", "closed", "recursive", "sdp"]
_METHODS = ("product", "closed", "recursive", "sdp")


@dataclass(frozen=True)
class LipschitzPart:
    """The bound of one part of a network, between two values that everything passes through.

    Attributes:
        first: name of its first operation.
        last: name of its last operation.
        bound: its Lipschitz constant is at most this.
        method: how it was bound; ``"product"`` where the part is too large, or has more than activations in it.
        units: numbers in its signals.
        optimum: no multipliers of the matrix inequality give a bound below this; 0 if that is not known.
        multipliers: λ of the layers, which prove the bound; empty for a product.
    """

    first: str
    last: str
    bound: float
    method: str
    units: int
    optimum: float
    multipliers: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class LipschitzBound:
    """A certified Lipschitz constant with respect to Euclidean norms.

    Attributes:
        bound: upper bound; the product of those of the parts.
        lower: largest gain found at sample points: the constant is at least this.
        method: what was asked for.
        parts: the parts of the network, first to last.
        checked: whether each matrix inequality was verified anew, with a margin for rounding.
        local: whether the bound holds on a box only.
        notes: what makes the bound large, in words.
        seconds: time that it took.
    """

    bound: float
    lower: float
    method: str
    parts: tuple[LipschitzPart, ...]
    checked: bool
    local: bool
    notes: tuple[str, ...]
    seconds: float

    @property
    def slack(self) -> float:
        """Upper over lower bound."""
        return self.bound / self.lower if self.lower > 0 else math.inf

    def __float__(self) -> float:
        return self.bound

    def __str__(self) -> str:
        where = " on the box" if self.local else ""
        return f"{self.lower:.4g} ≤ L ≤ {self.bound:.4g}{where} ({self.method})"


@cites(PAULI, FAZLYAB)
def lipschitz(
    model: nn.Module,
    example: Tensor | None = None,
    method: Method = "recursive",
    *,
    box: Box | None = None,
    tol: float = 1e-3,
    max_units: int = 3000,
    samples: int = 32,
    generator: torch.Generator | None = None,
) -> LipschitzBound:
    r"""Certified upper bound on the Lipschitz constant of a network, with a sampled lower bound.

    Covered: dense layers, convolutions with their padding and stride, pooling, batch norm (as in evaluation),
    residual and dense connections, shared weights, and activations with bounded slopes. Maxima and softmax enter by
    their own gain; a layer norm by max|γ|/√ε, which is large. Refused, by name: products of two values that depend
    on the input (dot-product attention, gates), which have no Lipschitz constant on all of space.

    Args:
        model: any network of one input tensor; it is read in evaluation mode and not changed.
        example: a batch of inputs: its shape, and the points of the lower bound. May be left out for a first
            ``nn.Linear``.
        method: ``"product"``: norms along the graph. ``"closed"``: the layer-wise recursion with multipliers in closed
            form, milliseconds. ``"recursive"``: those multipliers optimised to the optimum of the semidefinite
            programme; no extra needed. ``"sdp"``: the programme by a solver, small networks only; extra ``certify``.
        box: lower and upper ends of the inputs ``(l, u)``, each of the shape of one input: then the bound holds on
            the box, with the slopes that are possible there.
        tol: ``"recursive"`` stops when no multipliers can be better by more than this share.
        max_units: parts of the network with more units are bound by products.
        samples: points of the lower bound: rows of the example, and normal draws if there are fewer.
        generator: of the draws; seeded with 0 by default.

    Returns:
        The bounds, part by part.

    Raises:
        ArgumentError: an unknown method, a negative tolerance, or no example where one is needed.
        DivergenceError: a parameter is not finite, or the bound overflows.
        TraceError: the graph of the network cannot be read.
        UnsupportedError: an operation that is not covered; the message names it.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.tensor([[1.0], [-1.0]])), net[2].weight.fill_(1.0)   # |x|
        >>> round(lipschitz(net, method="product").bound, 3), round(lipschitz(net).bound, 3)
        (2.0, 1.0)
    """
    start = time.perf_counter()
    if method not in _METHODS:
        raise ArgumentError(f"method={method!r} is unknown: choose one of {', '.join(map(repr, _METHODS))}")
    if not tol > 0:
        raise ArgumentError(f"tol is {tol}: it must be positive, the share that the bound may miss")
    if max_units < 2 or samples < 1:
        raise ArgumentError(f"max_units={max_units} and samples={samples} must be at least 2 and 1")
    if box is not None and example is None:
        example = torch.as_tensor(box[0])[None]
    reading = read_network(model, example)
    slopes = None if box is None else slopes_on_box(reading, *checked_box(reading, box))
    with torch.no_grad():
        parts = bound_parts(reading, method, tol, max_units, slopes)
        if (
            method != "product"
        ):  # where a leak or a cut costs more than the inequality gains, norms are better
            plain = _plain_parts(reading, slopes)
            if plain and math.prod(p.bound for p in plain) < math.prod(p.bound for p in parts):
                parts = plain
    bound = math.prod(part.bound for part in parts)
    if not math.isfinite(bound):
        raise DivergenceError("the product of the bounds of the parts overflows: the weights are too large")
    lower = sampled_gain(reading, samples, generator, box)
    if lower > bound * (1 + 1e-6) + 1e-12:  # either this library or the kernels of a layer are wrong
        raise BolzaError(
            f"the sampled gain {lower:.6g} exceeds the certified bound {bound:.6g}: please report this network"
        )
    notes = tuple(
        f"{reading.name(step.node)}: {step.reason}"
        for step in reading.steps
        if step.kind == "gain" and step.reason
    )
    return LipschitzBound(
        bound, lower, method, parts, True, box is not None, notes, time.perf_counter() - start
    )


def _plain_parts(reading: Reading, slopes: dict[torch.fx.Node, Box] | None) -> tuple[LipschitzPart, ...]:
    try:
        return bound_parts(reading, "product", 1.0, 0, slopes)
    except UnsupportedError:
        return ()


def checked_box(reading: Reading, box: Box) -> Box:
    """The ends of a box of inputs, in float64, one sample."""
    shape = reading.example.shape[1:]
    ends = [torch.as_tensor(end).to(reading.example) for end in box]
    for name, end in zip(("lower", "upper"), ends, strict=True):
        if end.shape not in (shape, torch.Size([])):
            raise ShapeError(
                f"the {name} end of box has shape {tuple(end.shape)}, one input has {tuple(shape)}"
            )
    low, high = (end.expand(shape)[None] for end in ends)
    if not bool((low <= high).all()):
        raise ArgumentError("box has lower ends above its upper ends: give (lower, upper)")
    return low, high


def bound_parts(
    reading: Reading,
    method: str,
    tol: float,
    max_units: int,
    slopes: dict[torch.fx.Node, Box] | None,
) -> tuple[LipschitzPart, ...]:
    """The bounds of the parts of a network."""
    gains = None
    if slopes is not None:
        gains = {n: float(torch.maximum(a.abs(), b.abs()).max()) for n, (a, b) in slopes.items()}
    found = []
    for piece in pieces(reading, 0 if method == "product" else max_units):
        if not piece.steps:
            continue
        names = reading.name(piece.steps[0].node), reading.name(piece.steps[-1].node)
        if not piece.whole:
            value = product_gain(reading, piece, gains)
            found.append(LipschitzPart(*names, value, "product", piece.units, 0.0))
            continue
        net = sector_network(reading, piece, slopes)
        value, multipliers, optimum = solve(net, method, tol)
        found.append(LipschitzPart(*names, value, method, net.units, optimum, tuple(multipliers)))
    return tuple(found)


def solve(net: SectorNetwork, method: str, tol: float) -> tuple[float, list[Tensor], float]:
    """Bound, multipliers, and the optimum as far as it is known."""
    if method == "closed":
        value, multipliers = closed_form(net)
        optimum = 0.0
    elif method == "recursive":
        value, multipliers, optimum = newton(net, tol)
    else:
        value, multipliers, _ = semidefinite(net)
        optimum = 0.0
    checked = gain(net, multipliers)
    if checked is None or checked > value * (1 + 1e-9):
        raise BolzaError(
            "the multipliers that were found fail the matrix inequality when it is computed anew: take method='closed'"
        )
    return value, multipliers, optimum


def sampled_gain(
    reading: Reading,
    samples: int = 32,
    generator: torch.Generator | None = None,
    box: Box | None = None,
    iterations: int = 15,
) -> float:
    """Largest gain found by power iteration on the Jacobians at sample points: a lower bound.

    Args:
        reading: the network.
        samples: number of points.
        generator: of the draws.
        box: points are drawn from it, where it is given.
        iterations: of the power method; each gives a lower bound.
    """
    draw = torch.Generator().manual_seed(0) if generator is None else generator
    shape = reading.example.shape[1:]

    def normal(count: int) -> Tensor:
        return torch.randn(count, *shape, generator=draw, dtype=torch.float64, device=draw.device).to(
            reading.example
        )

    if box is None:
        x = reading.example[:samples]
        if len(x) < samples:
            x = torch.cat([x, normal(samples - len(x))])
    else:
        low, high = checked_box(reading, box)
        share = torch.rand(samples, *shape, generator=draw, dtype=torch.float64, device=draw.device)
        x = low + (high - low) * share.to(reading.example)
    v = normal(len(x))
    axes = tuple(range(1, v.ndim))

    def unit(w: Tensor) -> Tensor:
        return w / torch.linalg.vector_norm(w, dim=axes, keepdim=True).clamp_min(1e-300)

    v, best = unit(v), 0.0
    with torch.enable_grad(), differentiable_kernels(reading.module):
        point = x.detach().requires_grad_()
        out = reading.module(point.clone())
        if not out.requires_grad:
            return 0.0
        w = torch.zeros_like(out, requires_grad=True)
        (pulled,) = torch.autograd.grad(
            out, point, w, create_graph=True
        )  # Jᵀw; its derivative in w gives J v
        for _ in range(iterations):
            try:
                (jv,) = torch.autograd.grad(pulled, w, v, retain_graph=True)
            except (
                RuntimeError
            ):  # a kernel without second derivatives: ‖Jᵀu‖/‖u‖ of any u is a lower bound, too
                u = torch.randn(out.shape, generator=draw, dtype=torch.float64, device=draw.device).to(out)
                (back,) = torch.autograd.grad(out, point, u, retain_graph=True)
                best = max(best, float((back.flatten(1).norm(dim=1) / u.flatten(1).norm(dim=1)).max()))
                continue
            best = max(best, float(jv.reshape(len(x), -1).norm(dim=1).max()))
            (back,) = torch.autograd.grad(out, point, jv, retain_graph=True)
            v = unit(back)
    return best
