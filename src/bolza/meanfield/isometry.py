r"""Singular values of the input–output Jacobian: does every direction get through alike?

    J = ∂x_T/∂x_0 = Π_t D_t W_t,     mean of s²(J) = χ₁^L,
    Var[s²] = L (μ₂/μ₁² − 1 − s₁)   where χ₁ = 1;   s₁ = −1 for Gaussian, 0 for orthogonal weights,
    μ_k = E φ'(√q* z)^{2k}

Dynamical isometry asks that *all* singular values be near 1, not only their mean square. Here they are measured
on the samples a user has, whatever the network.

Reference: Pennington, Schoenholz & Ganguli (2017), *Resurrecting the Sigmoid in Deep Learning through Dynamical
Isometry*, and (2018), *The Emergence of Spectral Universality in Deep Networks*, eq. 12–14.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError, UnsupportedError
from bolza.core.reference import Reference, cites
from bolza.core.system import System
from bolza.meanfield.activations import resolve_activation
from bolza.ops.krylov import Estimate
from bolza.ops.noise import batch_statistics, each_sample_alone
from bolza.ops.replay import differentiable_kernels, same_randomness

__all__ = ["IsometryResult", "IsometryTheory", "isometry", "isometry_theory"]

PENNINGTON = Reference(
    "pennington2017resurrecting",
    "Pennington, Jeffrey and Schoenholz, Samuel S. and Ganguli, Surya",
    "Resurrecting the sigmoid in deep learning through dynamical isometry: theory and practice",
    2017,
    venue="NeurIPS",
    arxiv="1711.04735",
)

EMERGENCE = Reference(
    "pennington2018emergence",
    "Pennington, Jeffrey and Schoenholz, Samuel S. and Ganguli, Surya",
    "The Emergence of Spectral Universality in Deep Networks",
    2018,
    venue="AISTATS",
    arxiv="1802.09979",
)

_EXACT = 512  # smaller side of the Jacobian up to which it is formed
_ROWS = 4096  # samples times directions in one pass
_STEPS = 24  # Lanczos steps for the largest singular value where the Jacobian is not formed


@dataclass(frozen=True)
class IsometryResult:
    """Singular values s of the Jacobians of a few samples.

    Averages over the spectrum are over its min(input, output) singular values. Errors are standard errors
    over samples, at these weights; they say nothing about another draw of the weights.

    Attributes:
        singular_values: ``(samples, r)``, largest first, float64; only the largest where not ``exact``.
        mean_square: mean of s² over the spectrum.
        variance: variance of s² over the spectrum.
        largest: largest singular value.
        condition: largest over smallest singular value; nan where not ``exact``.
        input_size: elements of one input.
        output_size: elements of one output.
        exact: whether the Jacobians were formed; otherwise moments are from random probes.
    """

    singular_values: Tensor
    mean_square: Estimate
    variance: Estimate
    largest: Estimate
    condition: Estimate
    input_size: int
    output_size: int
    exact: bool

    @property
    def relative_variance(self) -> float:
        """Var[s²] / (mean s²)²: zero at isometry up to a factor; what mean field theory predicts at χ₁ = 1."""
        return self.variance.value / self.mean_square.value**2 if self.mean_square.value else math.nan


@dataclass(frozen=True)
class IsometryTheory:
    """The spectrum of J for infinite width.

    Args:
        mean_square: mean of s², χ₁^L.
        variance: variance of s².
        largest: upper edge of the spectrum of s.
    """

    mean_square: float
    variance: float
    largest: float


@cites(PENNINGTON, EMERGENCE)
def isometry_theory(
    activation: Any, *, q: float, depth: int, orthogonal: bool = True, weight_var: float | None = None
) -> IsometryTheory:
    r"""Mean, variance and upper edge of the singular values of J = Π_l D_l W_l for infinite width.

    With d = σ_w² φ'(√q z)² and its moment function M(x) = E d/(x − d), the edge is

        s²_max = min over x > max d of  (1 + M)/M · (x M/(1 + M))^L       (orthogonal weights),
                                        (1 + M)/M · (x M)^L               (Gaussian weights),

    which for Gaussian weights and φ(h) = h is (L + 1)^(L+1) / L^L.

    Args:
        activation: anything `resolve_activation` reads.
        q: variance of the pre-activations, the same in all layers.
        depth: L, layers with weights and an activation.
        orthogonal: orthogonal weights; Gaussian ones otherwise.
        weight_var: σ_w²; the critical one, 1/E φ'², by default.

    Returns:
        IsometryTheory.

    Raises:
        ArgumentError: ``q`` or ``depth`` is not positive.

    Reference: Pennington, Schoenholz & Ganguli (2018), eq. 12–14 for the moments; the edge from the product of
    S-transforms of their section 3, at finite depth instead of its limit.

    Example:
        >>> theory = isometry_theory("linear", q=1.0, depth=5, orthogonal=False)
        >>> round(theory.variance, 6), round(theory.largest**2, 3)
        (5.0, 14.93)
    """
    if not (q > 0 and depth >= 1):
        raise ArgumentError(f"q is {q} and depth {depth}: both must be positive")
    act = resolve_activation(activation)
    # the midpoint rule: no node on a kink at 0
    nodes = torch.arange(-9 + 9 / 4000, 9, 18 / 4000, dtype=torch.float64)
    weights = torch.exp(-nodes.square() / 2)
    weights = weights / weights.sum()
    slope = act.derivative(math.sqrt(q) * nodes).square()
    d = slope * (1 / float(weights @ slope) if weight_var is None else weight_var)
    mean = float(weights @ d)
    spread = float(weights @ d.square()) / mean**2 - 1 + (not orthogonal)
    top = float(d.max())
    x = top * (1 + torch.logspace(-9, 3, 1200, dtype=torch.float64))
    m = (weights * d / (x[:, None] - d)).sum(1)
    ratio = torch.log(x * m / (1 + m)) if orthogonal else torch.log(x * m)
    edge = (torch.log1p(1 / m) + depth * ratio).min()
    return IsometryTheory(mean**depth, depth * spread * mean ** (2 * depth), float(torch.exp(edge / 2)))


def _mean(values: Tensor) -> Estimate:
    n = values.numel()
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(n) if n > 1 else math.nan)


@dataclass(frozen=True)
class _Jacobian:
    """Products with the Jacobians of all samples; ``x`` is (n, d), the outputs (n, m)."""

    function: Callable[[Tensor], Tensor]
    x: Tensor
    outputs: int

    def pull(self, p: Tensor) -> Tensor:
        """Jᵀ p for ``p`` (k, n, m): (k, n, d)."""
        k, n, m = p.shape
        with torch.enable_grad():
            x = self.x.expand(k, *self.x.shape).flatten(0, 1).requires_grad_()
            return torch.autograd.grad(self.function(x), x, p.reshape(k * n, m))[0].reshape(k, n, -1)

    def push(self, v: Tensor) -> Tensor:
        """J v for ``v`` (k, n, d): (k, n, m), as the derivative of p ↦ Jᵀ p."""
        k, n, d = v.shape
        with torch.enable_grad():
            x = self.x.expand(k, *self.x.shape).flatten(0, 1).requires_grad_()
            z = x.new_zeros(k * n, self.outputs, requires_grad=True)
            pulled = torch.autograd.grad(self.function(x), x, z, create_graph=True)[0]
            return torch.autograd.grad(pulled, z, v.reshape(k * n, d))[0].reshape(k, n, -1)

    def matrices(self) -> Tensor:
        """The Jacobians, or their transposes, from the smaller side: (n, r, larger)."""
        n, d = self.x.shape
        by_rows = self.outputs <= d
        size = self.outputs if by_rows else d
        step = max(1, _ROWS // n)
        parts = []
        for at in range(0, size, step):
            unit = torch.eye(size, dtype=self.x.dtype, device=self.x.device)[at : at + step]
            directions = unit[:, None].expand(-1, n, -1)
            parts.append(self.pull(directions) if by_rows else self.push(directions))
        return torch.cat(parts).transpose(0, 1)


def _source(
    model: nn.Module | System, x: Any, stages: tuple[int, int] | None
) -> tuple[Callable[[Tensor], Any], Tensor]:
    """The map whose Jacobian is meant, and the value it starts from."""
    if isinstance(model, nn.Module) and stages is None and isinstance(x, Tensor) and x.is_floating_point():
        return model, x
    system: System
    if isinstance(model, nn.Module):
        from bolza.systems import as_system

        system = as_system(model, x)
    else:
        system = model
    start, stop = (0, system.horizon) if stages is None else stages
    if not 0 <= start < stop <= system.horizon:
        raise ArgumentError(
            f"stages is {stages}: it must be (start, stop) with 0 <= start < stop <= {system.horizon}"
        )
    state = x
    with torch.no_grad():
        for t in range(start):
            state = system.step(t, state, system.controls[t])
        # without stages, an integer input is followed to the first state that has derivatives
        while stages is None and not _is_float(state) and start < stop - 1:
            state = system.step(start, state, system.controls[start])
            start += 1
    if not _is_float(state):
        raise UnsupportedError(
            f"the state at stage {start} is not one floating-point tensor, so that it has no Jacobian: choose "
            "stages=(start, stop) that begin at one, such as the output of an embedding"
        )

    def run(value: Tensor) -> Any:
        for t in range(start, stop):
            value = system.step(t, value, system.controls[t])
        return value

    return run, state


def _is_float(state: Any) -> bool:
    return isinstance(state, Tensor) and state.is_floating_point()


@cites(PENNINGTON)
def isometry(
    model: nn.Module | System,
    x: Any,
    *,
    stages: tuple[int, int] | None = None,
    max_samples: int = 16,
    probes: int = 8,
    seed: int = 0,
) -> IsometryResult:
    r"""Singular values of the input–output Jacobian J = ∂output/∂input, for each sample.

    Where the smaller side of J has at most 512 elements, J is formed from that side, all samples and
    directions in one pass, and its singular values are exact. Otherwise the moments come from random probes v,
    through |Jv|² and |JᵀJv|², and the largest singular value from Lanczos iteration on JᵀJ.

    Samples are taken alone: evaluation mode, and a batch norm in training mode is held at the statistics of
    ``x`` (all of it).

    Args:
        model: a network, or a system such as :func:`bolza.as_system` returns.
        x: inputs, samples first; with integers (tokens) the Jacobian is with respect to the first state of the
            network that is a floating-point tensor, the output of its embedding.
        stages: ``(start, stop)``: the Jacobian from the state before stage ``start`` to the state after stage
            ``stop − 1``, by the stages of :func:`bolza.as_system`.
        max_samples: the first so many samples are used.
        probes: random directions a sample, where J is not formed.
        seed: of the probes.

    Returns:
        IsometryResult.

    Raises:
        ArgumentError: ``stages`` or ``max_samples`` out of range.
        DivergenceError: the Jacobian is not finite.
        ShapeError: the output is not one tensor with samples first.
        UnsupportedError: the input has no derivative.

    Reference: Pennington et al. (2017). Departure: measured, with errors over samples, instead of the
    limit of infinite width.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> for layer in net:
        ...     _ = nn.init.orthogonal_(layer.weight)
        >>> result = isometry(net, torch.randn(3, 4))
        >>> torch.allclose(result.singular_values, torch.ones(3, 4, dtype=torch.float64), atol=1e-5)
        True
    """
    if max_samples < 1 or probes < 2:
        raise ArgumentError(f"max_samples is {max_samples} and probes {probes}: at least 1 and 2 are needed")
    module = model if isinstance(model, nn.Module) else getattr(model, "module", None)
    with ExitStack() as stack:
        if isinstance(module, nn.Module):
            stack.enter_context(differentiable_kernels(module))
            device = next((p.device for p in module.parameters()), torch.device("cpu"))
            stack.enter_context(same_randomness(seed, device))
            statistics = batch_statistics(module, [(x, None)], device)
            stack.enter_context(each_sample_alone(module, statistics))
        function, start = _source(model, x, stages)
        start = start[:max_samples].detach()
        shape = start.shape[1:]

        def flat(v: Tensor) -> Tensor:
            out = function(v.reshape(-1, *shape))
            if not isinstance(out, Tensor) or out.ndim == 0 or out.shape[0] != v.shape[0]:
                what = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
                raise ShapeError(f"the output is {what}, not one tensor with {v.shape[0]} samples first")
            return out.flatten(1) if out.ndim > 1 else out[:, None]

        with torch.no_grad():
            inputs = start.flatten(1) if start.ndim > 1 else start[:, None]
            outputs = flat(inputs).shape[1]
        jacobian = _Jacobian(flat, inputs, outputs)
        if min(inputs.shape[1], outputs) <= _EXACT:
            return _from_matrices(jacobian)
        return _from_products(jacobian, probes, torch.Generator().manual_seed(seed))


def _from_matrices(jacobian: _Jacobian) -> IsometryResult:
    matrices = jacobian.matrices().double()
    if not bool(torch.isfinite(matrices).all()):
        raise DivergenceError("the input–output Jacobian is not finite: check the weights and the inputs")
    s = torch.linalg.svdvals(matrices).cpu()
    squares = s.square()
    return IsometryResult(
        s,
        _mean(squares.mean(1)),
        _mean(squares.var(1, unbiased=False)),
        _mean(s[:, 0]),
        _mean(s[:, 0] / s[:, -1]),
        jacobian.x.shape[1],
        jacobian.outputs,
        True,
    )


def _from_products(jacobian: _Jacobian, probes: int, generator: torch.Generator) -> IsometryResult:
    n, d = jacobian.x.shape
    scale = d / min(d, jacobian.outputs)

    def unit() -> Tensor:
        v = torch.randn(n, d, generator=generator).to(jacobian.x)
        return v / v.norm(dim=1, keepdim=True)

    def gram(v: Tensor) -> tuple[Tensor, Tensor]:
        pushed = jacobian.push(v[None])
        return pushed[0], jacobian.pull(pushed)[0]

    first, second = [], []
    for _ in range(probes):
        pushed, back = gram(unit())
        first.append(scale * pushed.double().square().sum(1))
        second.append(scale * back.double().square().sum(1))
    a, b = torch.stack(first).cpu(), torch.stack(second).cpu()
    # products of different probes, so that the square of the mean carries no bias
    square_of_mean = (a.sum(0) ** 2 - a.square().sum(0)) / (probes * (probes - 1))
    if not bool(torch.isfinite(b).all()):
        raise DivergenceError("the input–output Jacobian is not finite: check the weights and the inputs")
    top = _largest(lambda v: gram(v)[1], unit()).clamp_min(0).sqrt().cpu()
    return IsometryResult(
        top[:, None],
        _mean(a.mean(0)),
        _mean(b.mean(0) - square_of_mean),
        _mean(top),
        Estimate(math.nan, math.nan),
        d,
        jacobian.outputs,
        False,
    )


def _largest(product: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """Largest eigenvalue of a positive matrix for each sample, by Lanczos steps on all of them: (n,)."""
    n, d = v.shape
    steps = min(_STEPS, d)
    basis = v.new_zeros(n, steps, d)
    t = torch.zeros(n, steps, steps, dtype=torch.float64, device=v.device)
    for i in range(steps):
        basis[:, i] = v
        w = product(v)
        for _ in range(2):
            h = (basis[:, : i + 1] @ w[:, :, None])[..., 0]
            w = w - (h[:, None] @ basis[:, : i + 1])[:, 0]
            t[:, i, i] += h[:, i].double()
        norm = w.norm(dim=1)
        if i + 1 < steps:
            t[:, i, i + 1] = t[:, i + 1, i] = norm.double()
        v = w / norm.clamp_min(torch.finfo(v.dtype).tiny)[:, None]
    return torch.linalg.eigvalsh(t)[:, -1]
