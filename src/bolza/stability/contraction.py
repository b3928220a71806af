r"""Contraction of a map x⁺ = f(x): a norm in which any two states come closer, and how fast.

    ‖D(f(x) − f(x'))‖ ≤ ρ ‖D(x − x')‖,   D = diag(d) > 0,

certified by the matrix inequality of :mod:`bolza.stability.sectors` for the map seen in the weighted norm. With ρ < 1
there is one fixed point, iteration converges to it as ρᵏ, and a recurrent network forgets its start: the condition
number of D is the only overshoot. The weights come from the Perron vectors of the absolute gains and from a descent on
the norm of the linear part; any weights give a valid bound, so only tightness is at stake.

Reference: Revay, Wang & Manchester (2024), *Recurrent Equilibrium Networks*, arXiv:2104.05942, for contraction by
matrix inequalities; the weights are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bolza.core import Reference, cites
from bolza.core.errors import ArgumentError, ShapeError, UnsupportedError
from bolza.stability.layers import read_network
from bolza.stability.sectors import SectorNetwork, newton
from bolza.stability.segments import Piece, sector_network

__all__ = ["ContractionRate", "contraction_rate"]

REVAY = Reference(
    "revay2024recurrent",
    "Revay, Max and Wang, Ruigang and Manchester, Ian R.",
    "Recurrent Equilibrium Networks: Flexible Dynamic Models with Guaranteed Stability and Robustness",
    2024,
    venue="IEEE Transactions on Automatic Control",
    arxiv="2104.05942",
)


@dataclass(frozen=True)
class ContractionRate:
    """The rate at which any two states of a map come closer, and the norm in which they do.

    Attributes:
        rate: ρ, certified.
        weights: d of the norm ‖diag(d) x‖, largest 1.
        unweighted: ρ in the Euclidean norm.
        lower: no norm gives less: the spectral radius of the linear part at slope 1; 0 if that slope is not reached.
    """

    rate: float
    weights: Tensor
    unweighted: float
    lower: float

    @property
    def contracting(self) -> bool:
        """Whether the map is certainly a contraction."""
        return self.rate < 1

    @property
    def overshoot(self) -> float:
        """Largest factor by which a Euclidean distance may grow on the way."""
        return float(self.weights.max() / self.weights.min())


@cites(REVAY)
def contraction_rate(
    model: nn.Module | Tensor,
    example: Tensor | None = None,
    *,
    tol: float = 1e-3,
    max_units: int = 3000,
) -> ContractionRate:
    r"""Certified contraction rate of a recurrent layer, or of any network whose output is as its input.

    For ``nn.RNN`` and ``nn.RNNCell`` the state is the hidden one and the input any sequence, the same for both states:
    x⁺ = φ(W x + …). LSTM and GRU gate the state by itself and have no such rate on all of space.

    Args:
        model: ``nn.RNN`` of one layer, ``nn.RNNCell``, a square matrix W for x⁺ = φ(Wx) with slopes in [0, 1], or
            a network x ↦ f(x) with outputs of the shape of the inputs.
        example: a batch of states, for networks.
        tol: share by which the rate may miss the optimum for its weights.
        max_units: largest number of units of the network.

    Returns:
        The rate and the weights.

    Raises:
        ShapeError: the map does not go from a space to itself.
        UnsupportedError: gates, several layers, or operations without a Lipschitz constant.

    Example:
        >>> W = torch.tensor([[0.5, 4.0], [0.0, 0.5]])
        >>> found = contraction_rate(W)
        >>> found.unweighted > 4, found.contracting
        (True, True)
    """
    net, linear = _network(model, example, max_units)
    n = net.sizes[0]
    plain, *_ = newton(net, tol)
    with torch.no_grad():
        absolute = _linear_part(net, torch.abs)
        candidates = [_perron(absolute)]
    candidates.append(_descend(linear, torch.zeros(n, dtype=torch.float64, device=linear.device)))
    candidates.append(_descend(linear, candidates[0]))
    best, weights = plain, torch.ones(n, dtype=torch.float64, device=linear.device)
    for log_d in candidates:
        d = torch.exp(log_d - log_d.max()).clamp_min(1e-8)
        value, *_ = newton(_weighted(net, d), tol)
        if value < best:
            best, weights = value, d
    reached = isinstance(model, Tensor | nn.RNNBase | nn.RNNCellBase)
    lower = float(torch.linalg.eigvals(linear).abs().max()) if reached else 0.0
    return ContractionRate(best, weights, plain, min(lower, best))


def _network(
    model: nn.Module | Tensor, example: Tensor | None, max_units: int
) -> tuple[SectorNetwork, Tensor]:
    """The map as signals and linear maps, and its linear part at slope 1."""
    if isinstance(model, Tensor):
        return _recurrent(model)
    if isinstance(model, nn.RNN):
        if model.num_layers > 1 or model.bidirectional:
            raise UnsupportedError(
                "model is an nn.RNN of several layers or directions: certify each layer apart, as an nn.RNN of its own"
            )
        return _recurrent(model.get_parameter("weight_hh_l0"))
    if isinstance(model, nn.RNNCell):
        return _recurrent(model.weight_hh)
    if isinstance(model, nn.RNNBase | nn.RNNCellBase):
        raise UnsupportedError(
            f"{type(model).__name__} gates its state by the state itself, which has no contraction rate on all of "
            "space: measure it along a run with lyapunov_exponents"
        )
    reading = read_network(model, example)
    if reading.shape(reading.start) != reading.shape(reading.end):
        raise ShapeError(
            f"the network maps shape {tuple(reading.shape(reading.start)[1:])} to "
            f"{tuple(reading.shape(reading.end)[1:])}: a contraction rate needs outputs of the shape of the inputs"
        )
    other = next((step for step in reading.steps if step.kind not in ("affine", "activation")), None)
    units = reading.size(reading.start) + sum(reading.size(s.node) for s in reading.steps if s.slopes)
    if other is not None or units > max_units:
        what = (
            f"has {units} units, above max_units"
            if other is None
            else f"has {reading.name(other.node)!r} in it"
        )
        raise UnsupportedError(
            f"{type(model).__name__} {what}: weighted norms need affine maps and activations; take lipschitz, whose "
            "bound is a rate in the Euclidean norm"
        )
    with torch.no_grad():
        net = sector_network(reading, Piece(reading.start, reading.end, reading.steps, True, units))
        return net, _linear_part(net)


def _recurrent(weight: Tensor) -> tuple[SectorNetwork, Tensor]:
    w = weight.detach().to(torch.float64)
    if w.ndim != 2 or w.shape[0] != w.shape[1]:
        raise ShapeError(f"the recurrent matrix has shape {tuple(w.shape)}: it must be square")
    if not bool(torch.isfinite(w).all()):
        raise ArgumentError("the recurrent matrix is not finite: restore a checkpoint")
    n = len(w)
    one = torch.eye(n, dtype=w.dtype, device=w.device)
    return SectorNetwork((n, n), {(1, 0): w}, {1: one}), w


def _linear_part(net: SectorNetwork, of: Callable[[Tensor], Tensor] = lambda block: block) -> Tensor:
    """The map from x to the output with every function the identity (of absolute values: the largest gains)."""
    some = next(iter(net.C.values()))
    signals = [torch.eye(net.sizes[0], dtype=some.dtype, device=some.device)]
    for k in range(1, len(net.sizes)):
        own = some.new_zeros(net.sizes[k], net.sizes[0])
        for j in range(k):
            if (k, j) in net.Y:
                own = own + of(net.Y[k, j]) @ signals[j]
        signals.append(own)
    total = some.new_zeros(some.shape[0], net.sizes[0])
    for j, block in net.C.items():
        total = total + of(block) @ signals[j]
    return total


def _weighted(net: SectorNetwork, d: Tensor) -> SectorNetwork:
    """The same map for z = Dx."""
    y = {(k, j): block / d if j == 0 else block for (k, j), block in net.Y.items()}
    c = {j: d[:, None] * (block / d if j == 0 else block) for j, block in net.C.items()}
    return SectorNetwork(net.sizes, y, c)


def _perron(gains: Tensor, iterations: int = 200) -> Tensor:
    """Logarithm of d with d = √(left / right) of the Perron vectors: optimal for non-negative matrices."""
    g = gains + 1e-9 * gains.max().clamp_min(1e-30)
    right, left = torch.ones_like(g[0]), torch.ones_like(g[0])
    for _ in range(iterations):
        right, left = g @ right, left @ g
        right, left = right / right.sum(), left / left.sum()
    return 0.5 * (left.clamp_min(1e-30).log() - right.clamp_min(1e-30).log())


def _descend(matrix: Tensor, log_d: Tensor, iterations: int = 60) -> Tensor:
    """Make ‖D A D⁻¹‖ small, a convex problem in log d, by L-BFGS on a smooth norm of high order."""
    if len(matrix) > 1000 or not bool(matrix.any()):
        return log_d
    scale = torch.linalg.matrix_norm(matrix, 2)
    x = log_d.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=iterations, line_search_fn="strong_wolfe", tolerance_grad=1e-9
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen = torch.exp(x)[:, None] * (matrix / scale) * torch.exp(-x)
        top = torch.linalg.eigvalsh(seen @ seen.mT).clamp_min(1e-30).log()
        value = torch.logsumexp(40 * top, 0) / 40 + 1e-6 * x.square().mean()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[arg-type]
    found = x.detach()
    return found if bool(torch.isfinite(found).all()) and math.isfinite(float(found.sum())) else log_d
