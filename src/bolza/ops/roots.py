"""Roots of many scalar functions at once, each kept in its bracket."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["bracketed_root"]


def bracketed_root(
    f: Callable[[Tensor, Tensor], Tensor],
    low: Tensor,
    high: Tensor,
    rtol: float = 4e-16,
    max_steps: int = 100,
) -> Tensor:
    r"""Solve f_i(x_i) = 0 for every i by Chandrupatla's method (inverse quadratic, else bisection).

    Args:
        f: ``f(x, index)`` gives the values of the functions number ``index`` at ``x``; both are
            one-dimensional and of equal length. Only functions not yet solved are asked for.
        low: left ends, shape ``(n,)``, float64.
        high: right ends; ``f`` has opposite signs at the two ends (or is zero at one).
        rtol: accepted width of the final bracket, relative to the root.
        max_steps: at most so many evaluations of each function.

    Returns:
        The roots, shape ``(n,)``. Where the ends do not bracket a root the better end comes back.

    Reference: Chandrupatla (1997), *A new hybrid quadratic/bisection algorithm for finding the zero
    of a nonlinear function without using derivatives*, Adv. Eng. Software 28.

    Example:
        >>> two = torch.tensor([2.0, 3.0], dtype=torch.float64)
        >>> root = bracketed_root(lambda x, i: x * x - two[i], torch.ones(2).double(), two)
        >>> bool((root - two.sqrt()).abs().max() < 1e-15)
        True
    """
    a, b = high.clone(), low.clone()
    index = torch.arange(len(a), device=low.device)
    fa, fb = f(a, index), f(b, index)
    answer = torch.where(fa.abs() < fb.abs(), a, b)
    c, fc = a.clone(), fa.clone()
    t = torch.full_like(a, 0.5)
    live = (fa * fb < 0).nonzero().squeeze(1)
    a, b, c, fa, fb, fc, t, index = (v[live] for v in (a, b, c, fa, fb, fc, t, index))
    for _ in range(max_steps):
        if not len(index):
            break
        x = a + t * (b - a)
        fx = f(x, index)
        same = torch.sign(fx) == torch.sign(fa)
        c, fc = torch.where(same, a, b), torch.where(same, fa, fb)
        b, fb = torch.where(same, b, a), torch.where(same, fb, fa)
        a, fa = x, fx
        nearer = fa.abs() < fb.abs()
        best = torch.where(nearer, a, b)
        answer[index] = best
        width = (2 * rtol * best.abs() + 1e-300) / (b - a).abs()
        keep = (width <= 0.5) & (torch.minimum(fa.abs(), fb.abs()) > 0)
        a, b, c, fa, fb, fc, width, index = (v[keep] for v in (a, b, c, fa, fb, fc, width, index))
        xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
        smooth = (phi * phi < xi) & ((1 - phi) ** 2 < 1 - xi)
        quadratic = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
        t = torch.where(smooth & torch.isfinite(quadratic), quadratic, torch.full_like(a, 0.5))
        t = torch.maximum(width, torch.minimum(1 - width, t))
    return answer
