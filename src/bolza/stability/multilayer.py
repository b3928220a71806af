r"""Finite-time exponents of deep networks: layers as time, one number for each input.

    λ(x) = (1/L) log σ_max(∂h_L/∂x),   h_L = f_L ∘ … ∘ f_1

A trained network expands where it must tell classes apart and contracts elsewhere, so that the field λ(x) traces
the decision boundary. As a warning of errors it is weaker than the softmax probability: it localises, it does not
calibrate.

Reference: Kondo, Sunada & Niiyama (2021), *Lyapunov exponent analysis for multilayer neural networks*.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, ConvergenceWarning, DivergenceError
from bolza.core.reference import Reference, cites
from bolza.core.system import System
from bolza.ops.trees import Tree
from bolza.stability.cocycle import Flow, products
from bolza.stability.lyapunov import layer_flow

__all__ = ["MultilayerExponents", "ftmle"]

KONDO = Reference(
    "kondo2021multilayer",
    "Kondo, Misaki and Sunada, Satoshi and Niiyama, Tomoaki",
    "Lyapunov exponent analysis for multilayer neural networks",
    2021,
    venue="Nonlinear Theory and Its Applications, IEICE",
)

_FORMED = 128  # inputs up to this size have their Jacobian formed
_BLOCK = 4  # directions of the iteration for larger ones


@dataclass(frozen=True)
class MultilayerExponents:
    """Finite-time maximum exponents, one for each input.

    Attributes:
        exponents: λ(x) = log σ_max / layers, ``(batch,)``, in nats per layer, float64.
        sigma_max: largest singular values of ∂h_L/∂x, ``(batch,)``.
        layers: L, the number of stages.
    """

    exponents: Tensor
    sigma_max: Tensor
    layers: int


@cites(KONDO)
def ftmle(
    model: nn.Module | System,
    x: Tree,
    *,
    stages: tuple[int, int] | None = None,
    head: bool = False,
    tolerance: float = 1e-4,
    iterations: int = 100,
    seed: int = 0,
) -> MultilayerExponents:
    r"""Finite-time maximum Lyapunov exponent of a network at each input: (1/L) log σ_max(∂h_L/∂x).

    Inputs of at most 128 numbers have their Jacobian formed from forward-mode products, all in one pass; larger
    ones go through block power iteration on JᵀJ. Samples are taken alone, as
    :func:`bolza.stability.lyapunov_exponents` takes them.

    Args:
        model: a network, or a system such as :func:`bolza.as_system` returns.
        x: inputs, samples first.
        stages: ``(start, stop)``: which stages are the layers; by default all but the last, which is taken for the
            head.
        head: whether the last stage counts as a layer, where ``stages`` is not given.
        tolerance: relative change of σ_max at which the iteration stops.
        iterations: at most so many.
        seed: of the iteration.

    Returns:
        MultilayerExponents.

    Raises:
        ArgumentError: stages out of range, or no stage but the head.
        DivergenceError: a Jacobian is not finite.

    Warns:
        ConvergenceWarning: the iteration did not reach ``tolerance``.

    Reference: Kondo et al. (2021).

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> for layer in net[:2]:
        ...     _ = nn.init.orthogonal_(layer.weight)
        >>> bool(ftmle(net, torch.randn(3, 4)).exponents.abs().max() < 1e-6)   # isometry: 0 everywhere
        True
    """
    if iterations < 1 or not tolerance > 0:
        raise ArgumentError(f"iterations is {iterations} and tolerance {tolerance}: both must be positive")
    with ExitStack() as stack:
        layers = layer_flow(model, x, stages, seed, stack, head=head if stages is None else True)
        flow, count = layers.flow(), layers.count

        def through(t: int, state: Tree, u: Any) -> Tree:
            for s in range(count):
                state = flow.step(s, state, flow.inputs(s))
            return state

        whole = Flow(through, flow.state, True)
        rows = whole.flat(whole.state)

        def f(v: Tensor) -> Tensor:
            return whole.flat(through(0, whole.tree(v.clone(), whole.state), None))

        with torch.no_grad():
            if rows.shape[1] <= _FORMED:
                sigma = _from_matrices(whole, f, rows)
            else:
                sigma = _from_products(whole, f, rows, tolerance, iterations, seed)
    if not bool(sigma.isfinite().all()):
        raise DivergenceError("a Jacobian is not finite: check the network and its inputs")
    sigma = sigma.double().cpu()
    return MultilayerExponents(sigma.log() / count, sigma, count)


def _from_matrices(whole: Flow, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    n = x.shape[1]
    unit = torch.eye(n, dtype=x.dtype, device=x.device)[:, None].expand(n, *x.shape)
    columns = products(whole, f, x, unit)  # (n, batch, m)
    if not bool(columns.isfinite().all()):
        return columns.new_full((x.shape[0],), math.nan)
    return torch.linalg.svdvals(columns.permute(1, 2, 0))[:, 0]


def _from_products(
    whole: Flow, f: Callable[[Tensor], Tensor], x: Tensor, tolerance: float, iterations: int, seed: int
) -> Tensor:
    """Block power iteration on JᵀJ, every sample with its own block."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(_BLOCK, *x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)
    v = torch.linalg.qr(draw.permute(1, 2, 0))[0].permute(2, 0, 1)
    last = x.new_zeros(x.shape[0])
    for _ in range(iterations):
        w = products(whole, f, x, v)
        if not bool(w.isfinite().all()):
            return w.new_full((x.shape[0],), math.nan)
        sigma = torch.linalg.svdvals(w.permute(1, 2, 0))[:, 0]
        if bool(((sigma - last).abs() <= tolerance * sigma).all()):
            return sigma
        last = sigma
        pulled = torch.stack([_pull(f, x, p) for p in w])
        v = torch.linalg.qr(pulled.permute(1, 2, 0))[0].permute(2, 0, 1)
    warnings.warn(
        f"the largest singular value still changed by more than {tolerance:g} after {iterations} iterations: "
        "raise iterations",
        ConvergenceWarning,
        stacklevel=3,
    )
    return last


def _pull(f: Callable[[Tensor], Tensor], x: Tensor, p: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(f(x), x, p)[0]
