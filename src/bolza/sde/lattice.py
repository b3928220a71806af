r"""Edges between the cells of a grid, and the rates of the Markov chain on them that stands for a diffusion.

    D = Σ_e w_e (he)(he)ᵀ,  w_e ≥ 0,        rates T w B(−P) and T w B(P) across an edge,  B(z) = z/(e^z − 1)

Constant D: Selling's decomposition, for any positive definite matrix; D that varies: the eight neighbours.

Reference: Selling (1874); Kushner & Dupuis (2001), *Numerical Methods for Stochastic Control Problems in Continuous
Time*, §5.3, for a D that varies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, ShapeError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["generator", "matrices", "neighbours", "rates", "selling", "weights"]

F64 = torch.float64


def matrices(value: Tensor, x: Tensor) -> Tensor:
    """Numbers, diagonals or matrices at points as matrices."""
    if value.shape == x.shape[:-1]:
        return value[..., None, None] * torch.eye(x.shape[-1], dtype=F64)
    if value.shape == x.shape:
        return torch.diag_embed(value)
    if value.shape == (*x.shape, x.shape[-1]):
        return value
    raise ShapeError(
        f"diffusion gives {tuple(value.shape)} for points {tuple(x.shape)}: give numbers, diagonals or matrices"
    )


def weights(
    spread: Callable[[Tensor], Tensor], constant: Tensor | None, points: Tensor, widths: Sequence[float]
) -> list[tuple[tuple[int, ...], Tensor]]:
    """Edges by their offsets in cells, and w ≥ 0 on every cell, with D = Σ w (he)(he)ᵀ."""
    cells, h = points.shape[:-1], torch.tensor(widths, dtype=F64)
    if constant is not None and len(widths) == 2:
        return [
            (edge, torch.full(cells, w, dtype=F64)) for edge, w in selling(constant / h[:, None] / h).items()
        ]
    m = spread(points) / h[:, None] / h
    if not bool((torch.linalg.eigvalsh(m) > 0).all()):
        raise ArgumentError(
            "diffusion is not positive definite everywhere in the box: shrink the box, or add to D"
        )
    if len(widths) == 1:
        return [((1,), m[..., 0, 0])]
    oblique = m[..., 0, 1]
    found = [
        ((1, 0), m[..., 0, 0] - oblique.abs()),
        ((0, 1), m[..., 1, 1] - oblique.abs()),
        ((1, 1), oblique.clamp(min=0)),
        ((1, -1), (-oblique).clamp(min=0)),
    ]
    worst = min(float((w / m.diagonal(dim1=-2, dim2=-1).amin(-1)).min()) for _, w in found)
    if worst < -1e-12:
        raise ArgumentError(
            f"diffusion is too oblique for cells of {widths[0]:g} by {widths[1]:g}: choose cells with "
            "|D_xy|/D_yy ≤ h_x/h_y ≤ D_xx/|D_xy| everywhere"
        )
    return [(edge, w.clamp(min=0)) for edge, w in found if bool((w > 0).any())]


def selling(m: Tensor) -> dict[tuple[int, int], float]:
    """Edges e and weights w > 0 of a positive definite m = Σ w e eᵀ, from an obtuse superbase of the lattice."""
    a, b, c, d = (float(v) for v in m.reshape(-1))

    def dot(u: tuple[int, int], v: tuple[int, int]) -> float:
        return u[0] * (a * v[0] + b * v[1]) + u[1] * (c * v[0] + d * v[1])

    u, v = (1, 0), (0, 1)
    w = (-1, -1)
    tiny = 1e-14 * (a + d)
    while True:
        pair = next(((p, q) for p, q in ((u, v), (v, w), (w, u)) if dot(p, q) > tiny), None)
        if pair is None:
            break
        p, q = pair
        u, v, w = (-p[0], -p[1]), q, (p[0] - q[0], p[1] - q[1])
    found = {}
    for p, q, r in ((u, v, w), (v, w, u), (w, u, v)):
        weight, edge = -dot(p, q), (-r[1], r[0])
        if weight > tiny:
            found[edge if edge > (0, 0) else (-edge[0], -edge[1])] = weight
    return found


def neighbours(cells: Sequence[int], offset: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cells that have a neighbour at that offset, and these neighbours."""
    index = torch.arange(math.prod(cells)).reshape(tuple(cells))
    left = index[tuple(slice(max(0, -o), n - max(0, o)) for n, o in zip(cells, offset, strict=True))]
    right = index[tuple(slice(max(0, o), n - max(0, -o)) for n, o in zip(cells, offset, strict=True))]
    return left.reshape(-1), right.reshape(-1)


def rates(
    push: Tensor, weight: Tensor, left: Tensor, right: Tensor, temperature: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cells of the edges and the rates of jumps across them, T w B(∓P)."""
    from scipy.special import exprel

    if not bool(torch.isfinite(push).all()):
        raise ArgumentError("the drift is not finite everywhere in the box: shrink bounds")
    p, most = push.numpy(), 600.0  # the rate uphill is held above zero, so that every cell can be reached
    forward = temperature * weight[left].numpy() / exprel((-p).clip(max=most))  # B(z) = 1/exprel(z)
    back = temperature * weight[right].numpy() / exprel(p.clip(max=most))
    return left.numpy(), right.numpy(), forward, back


def generator(edges: Sequence[Any], size: int) -> Any:
    """The sparse matrix of the chain; its columns sum to zero."""
    import numpy as np
    from scipy.sparse import coo_matrix

    rows, columns, values = [], [], []
    for _, left, right, forward, back in edges:
        rows += [right, left, left, right]
        columns += [left, left, right, right]
        values += [forward, -forward, back, -back]
    triples = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
    return coo_matrix(triples, shape=(size, size)).tocsc()
