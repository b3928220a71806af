r"""Minimisers of the Hamiltonian over one control: v ∈ argmin_v H(v), by descent, exactly, by signs, or by sampling.

All have one signature, (H, u) → v: ``H`` is a function of the control, ``u`` where to start. The maximum principle,
successive approximation and the optimizers built on it take any of them.

==============================  ===========================================================================
:func:`gradient_minimizer`      one step down ∇H; in every stage at once this is gradient descent
:func:`lbfgs_minimizer`         a few iterations of L-BFGS
:func:`proximal_minimizer`      the same on H(v) + ρ/2 ‖v − u‖², which is bounded where H is linear
:func:`quadratic_minimizer`     the minimum itself where H is quadratic in v
:func:`sign_minimizer`          the minimum over weights −1 and +1, or −1, 0 and +1, of a linear H
:func:`gibbs_minimizer`         a draw from exp(−H(v)/τ)
==============================  ===========================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from bolza.ops.blockwise import blockwise_lbfgs
from bolza.ops.errors import ArgumentError, UnsupportedError
from bolza.ops.trees import Tree, float_leaves, tree_add, tree_map, tree_to_vector, vector_to_tree

__all__ = [
    "Minimizer",
    "binary_rule",
    "gibbs_minimizer",
    "gradient_minimizer",
    "lbfgs_minimizer",
    "proximal_minimizer",
    "quadratic_minimizer",
    "sign_minimizer",
    "ternary_rule",
]

Function: TypeAlias = Callable[[Tree], Tensor]
Minimizer: TypeAlias = Callable[[Function, Tree], Tree]


def _gradient(function: Function, u: Tree) -> tuple[Tensor, Tree]:
    """Value and gradient of a function at a control."""
    v = tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), u)
    leaves = float_leaves(v)
    with torch.enable_grad():
        value = function(v)
        # not backward(): that would also fill .grad of parameters that are no part of the control
        grads = _grad(value, leaves)
    return value.detach(), vector_to_tree(torch.cat([g.reshape(-1) for g in grads]), u)


def _grad(value: Tensor, leaves: list[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    if not value.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    return torch.autograd.grad(
        value, leaves, create_graph=create_graph, materialize_grads=True, allow_unused=True
    )


def gradient_minimizer(lr: float) -> Minimizer:
    """One step down the gradient, v = u − lr ∇H(u).

    With it in every stage, successive approximation is gradient descent: ∇_u H_t = ∂J/∂u_t.

    Args:
        lr: step length, positive.

    Returns:
        A function (H, u) → v.

    Raises:
        ArgumentError: ``lr`` is not positive.

    Example:
        >>> gradient_minimizer(0.1)(lambda v: v.square().sum() / 2, torch.ones(1))
        tensor([0.9000])
    """
    _positive(lr=lr)

    def minimise(function: Function, u: Tree) -> Tree:
        if not float_leaves(u):
            return u
        return tree_add(tree_map(Tensor.detach, u), _gradient(function, u)[1], alpha=-lr)

    return minimise


def lbfgs_minimizer(iterations: int = 10) -> Minimizer:
    r"""A minimiser of H(v) by a few iterations of L-BFGS from u.

    For an H that has a minimum: with a running cost of the control, or extended by the feasibility terms of
    :func:`~bolza.core.extended_hamiltonian`. The result never has a larger H than u.

    Args:
        iterations: iterations of L-BFGS.

    Returns:
        A function (H, u) → v.

    Raises:
        ArgumentError: ``iterations`` is not positive.

    Example:
        >>> lbfgs_minimizer()(lambda v: (v - 3).square().sum(), torch.zeros(1))
        tensor([3.])
    """
    _positive(iterations=iterations)
    return _lbfgs(0.0, iterations)


def proximal_minimizer(rho: float = 1.0, iterations: int = 20) -> Minimizer:
    r"""A minimiser of H(v) + (ρ/2)‖v − u‖² over v, by L-BFGS from u.

    The proximal term keeps the minimum finite where H is linear in the control, as it is in the
    weights of an affine layer. The result never has a larger H than u.

    Args:
        rho: weight ρ of the proximal term, in units of H per squared control; positive.
        iterations: L-BFGS iterations.

    Returns:
        A function (H, u) → v.

    Raises:
        ArgumentError: ``rho`` or ``iterations`` is not positive.

    Example:
        >>> minimise = proximal_minimizer(rho=1.0)
        >>> minimise(lambda v: 2 * v.sum(), torch.zeros(1))
        tensor([-2.])
    """
    if not (rho > 0 and iterations > 0):
        raise ArgumentError(f"rho is {rho} and iterations is {iterations}: both must be positive")
    return _lbfgs(rho, iterations)


def _lbfgs(rho: float, iterations: int) -> Minimizer:
    def minimise(function: Function, u: Tree) -> Tree:
        if not float_leaves(u):
            return u
        start = tree_to_vector(tree_map(Tensor.detach, u))

        def evaluate(vector: Tensor) -> tuple[Tensor, Tensor]:
            v = vector.detach().requires_grad_()
            with torch.enable_grad():
                value = function(vector_to_tree(v, u))
                if rho:
                    value = value + rho / 2 * (v - start).square().sum()
                (gradient,) = _grad(value, [v])
            return value.detach().reshape(1), gradient

        with torch.no_grad():
            found = vector_to_tree(blockwise_lbfgs(evaluate, start, [len(start)], iterations=iterations), u)
            kept = tree_map(Tensor.detach, u)
            return found if bool(function(found) <= function(kept)) else kept

    return minimise


def quadratic_minimizer(rho: float = 0.0, tolerance: float = 1e-12) -> Minimizer:
    r"""The exact minimiser of an H that is quadratic in the control, (∇²H + ρ)(u − v) = ∇H(u).

    By conjugate gradients on products with ∇²H: no matrix is formed, and a control of n entries takes at most n
    products. For an H that is not quadratic this is one step of Newton's method, damped by ρ.

    Args:
        rho: weight ρ of a proximal term (ρ/2)‖v − u‖², zero or positive.
        tolerance: residual, relative to ‖∇H(u)‖, at which to stop. It is not taken below a few units of the precision.

    Returns:
        A function (H, u) → v.

    Raises:
        ArgumentError: ``rho`` is negative or ``tolerance`` is not positive; and when it is called, an H that is
            unbounded below along a direction that was met.

    Example:
        >>> quadratic_minimizer()(lambda v: 2 * (v - 3).square().sum() + v.sum(), torch.zeros(1))
        tensor([2.7500])
    """
    _positive(tolerance=tolerance)
    if not rho >= 0:
        raise ArgumentError(f"rho is {rho}: it must be zero or positive")

    def minimise(function: Function, u: Tree) -> Tree:
        if not float_leaves(u):
            return u
        v = tree_to_vector(tree_map(Tensor.detach, u)).requires_grad_()
        with torch.enable_grad():
            (slope,) = _grad(function(vector_to_tree(v, u)), [v], create_graph=True)
        gradient = slope.detach()

        def curvature(d: Tensor) -> Tensor:
            if not slope.requires_grad:
                return rho * d
            (product,) = torch.autograd.grad(
                slope, v, d, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            return product + rho * d

        with torch.no_grad():
            step = _conjugate_gradients(curvature, -gradient, tolerance)
            return vector_to_tree(v.detach() + step, u)

    return minimise


def _conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, tolerance: float) -> Tensor:
    x, r = torch.zeros_like(b), b
    d, size = r, float(r @ r)
    eps = torch.finfo(b.dtype).eps
    target = size * max(tolerance, 4 * eps) ** 2
    for _ in range(b.numel() + 5):  # rounding may take a few more than in theory
        if size <= target:
            break
        h = product(d)
        bend = float(d @ h)
        if not bend > eps * float(d @ d) * 1e-3:
            raise ArgumentError(
                f"the Hamiltonian has the curvature {bend / float(d @ d):.3g} along a direction of descent, so that it "
                "has no minimum: add a running cost of the control, or rho > 0"
            )
        step = size / bend
        x, r = x + step * d, r - step * h
        size, before = float(r @ r), size
        d = r + (size / before) * d
    return x


def binary_rule(M: Tensor, theta: Tensor, rho: float) -> Tensor:
    r"""Signs that minimise ⟨−M, θ⟩ over {−1, 1}, where |M| is large enough to leave the old ones.

    θ ← sign(M) where |M| > ρ max{|M_kl| : sign(M_kl) ≠ θ_kl}, else θ; the sign of zero is +1. With ρ = 0 all signs are
    taken, with ρ = 1 none.

    Args:
        M: minus the derivative of the Hamiltonian, any shape.
        theta: old weights, −1 or +1, of the same shape.
        rho: threshold from 0 to 1.

    Returns:
        New weights, −1 or +1.

    Reference: Li & Hao (2018), *An Optimal Control Approach to Deep Learning and Applications to Discrete-Weight Neural
    Networks*, arXiv:1803.01299, binary networks.

    Example:
        >>> M, theta = torch.tensor([3.0, -2.0, 0.5]), torch.tensor([-1.0, 1.0, -1.0])
        >>> binary_rule(M, theta, rho=0.5)
        tensor([ 1., -1., -1.])
    """
    sign = torch.where(M >= 0, 1.0, -1.0).to(theta.dtype)
    size = M.abs()
    threshold = rho * torch.where(sign != theta, size, 0.0).max()
    return torch.where(size > threshold, sign, theta)


def ternary_rule(M: Tensor, theta: Tensor, rho: float, sparsity: float = 1e-7) -> Tensor:
    r"""Minimise ⟨−M, θ⟩ + λ‖θ‖₀ + ρ_t ‖θ − θ_old‖² over {−1, 0, 1}, with ρ_t = ρ max{|M_kl| : sign(M_kl) ≠ θ_kl}.

    θ ← +1 where M > ρ_t (1 − 2θ) + λ; −1 where M < −ρ_t (1 + 2θ) − λ; else 0.

    Args:
        M: minus the derivative of the Hamiltonian, any shape.
        theta: old weights −1, 0 or +1, of the same shape.
        rho: threshold, zero or positive.
        sparsity: price λ of a weight that is not zero, in units of M.

    Returns:
        New weights −1, 0 or +1.

    Reference: Li & Hao (2018), arXiv:1803.01299, ternary networks.

    Example:
        >>> M, theta = torch.tensor([3.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 1.0])
        >>> ternary_rule(M, theta, rho=0.25)
        tensor([1., 0., 1.])
    """
    sign = torch.where(M >= 0, 1.0, -1.0).to(theta.dtype)
    step = rho * torch.where(sign != theta, M.abs(), 0.0).max()
    up = M > step * (1 - 2 * theta) + sparsity
    down = M < -step * (1 + 2 * theta) - sparsity
    return up.to(theta.dtype) - down.to(theta.dtype)


def sign_minimizer(
    rho: float = 0.0, weights: Literal["binary", "ternary"] = "binary", sparsity: float = 1e-7
) -> Minimizer:
    """The minimiser over discrete weights of an H that is linear in them, by its signs.

    Each leaf of the control takes :func:`binary_rule` or :func:`ternary_rule` with M = −∇H(u).

    Args:
        rho: threshold of the rule; zero for the minimiser itself.
        weights: ``'binary'`` for −1 and +1, ``'ternary'`` for −1, 0 and +1.
        sparsity: price of a ternary weight that is not zero.

    Returns:
        A function (H, u) → v.

    Raises:
        ArgumentError: ``rho`` or ``sparsity`` is negative, or ``weights`` is unknown; and when it is called, a control
            that is not in the alphabet.

    Example:
        >>> sign_minimizer()(lambda v: v @ torch.tensor([2.0, -1.0]), torch.ones(2))
        tensor([-1.,  1.])
    """
    if not (rho >= 0 and sparsity >= 0):
        raise ArgumentError(f"rho is {rho} and sparsity is {sparsity}: both must be zero or positive")
    if weights not in ("binary", "ternary"):
        raise ArgumentError(f"weights is {weights!r}: choose 'binary' or 'ternary'")

    def change(leaf: Tensor, slope: Tensor) -> Tensor:
        leaf = leaf.detach()
        known = leaf.abs() == 1 if weights == "binary" else (leaf.abs() == 1) | (leaf == 0)
        if not bool(known.all()):
            raise ArgumentError(
                f"the control has the entry {float(leaf[~known][0]):.4g}, which is no {weights} weight: start from "
                f"{'−1 and +1' if weights == 'binary' else '−1, 0 and +1'}"
            )
        if weights == "binary":
            return binary_rule(-slope, leaf, rho)
        return ternary_rule(-slope, leaf, rho, sparsity)

    def minimise(function: Function, u: Tree) -> Tree:
        return tree_map(change, u, _gradient(function, u)[1]) if float_leaves(u) else u

    return minimise


def gibbs_minimizer(
    temperature: float, lr: float, steps: int = 1, *, generator: torch.Generator | None = None
) -> Minimizer:
    r"""A draw from the Gibbs law exp(−H(v)/τ) by Langevin steps from u: v ← v − lr ∇H(v) + √(2 lr τ) ξ.

    The law minimises E H − τ·entropy: the minimiser of a Hamiltonian whose control is a probability law. The chain
    is not corrected for its step length: for H = λ v²/2 it has the variance τ/(λ (1 − lr λ/2)) in place of τ/λ.

    Args:
        temperature: τ, in units of H; positive.
        lr: step length, positive.
        steps: Langevin steps.
        generator: where the random numbers come from; the default generator of the device if None.

    Returns:
        A function (H, u) → v, which draws anew at each call.

    Raises:
        ArgumentError: an argument is not positive.

    Reference: Hu, Kazeykina & Ren (2019), *Mean-field Langevin System, Optimal Control and Deep Neural Networks*,
    arXiv:1909.07278.

    Example:
        >>> draw = gibbs_minimizer(0.5, lr=0.1, steps=50, generator=torch.Generator().manual_seed(0))
        >>> v = draw(lambda v: v.square().sum() / 2, torch.zeros(5000))
        >>> round(float(v.var()), 1)
        0.5
    """
    _positive(temperature=temperature, lr=lr, steps=steps)

    def minimise(function: Function, u: Tree) -> Tree:
        if not float_leaves(u):
            return u
        noise = math.sqrt(2 * lr * temperature)
        v = tree_map(Tensor.detach, u)
        for _ in range(steps):
            slope = _gradient(function, v)[1]
            v = tree_map(
                lambda leaf, g: (
                    leaf
                    - lr * g
                    + noise
                    * torch.randn(leaf.shape, dtype=leaf.dtype, device=leaf.device, generator=generator)
                ),
                v,
                slope,
            )
        if not all(bool(leaf.isfinite().all()) for leaf in float_leaves(v)):
            raise UnsupportedError(
                f"the chain left the finite numbers within {steps} steps: lr={lr:g} is too long for this Hamiltonian"
            )
        return v

    return minimise


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ArgumentError(f"{name} is {value}: it must be positive")
