r"""Whether a recorded path goes round in loops: the area that it sweeps.

    L = ⟨x ẋᵀ − ẋ xᵀ⟩,     L_ij: twice the area in the plane (i, j) for each unit of time, positive from i to j

It is zero for every stationary path that looks the same when it is run backwards.

Reference: Ghanta, Neu & Teitsworth (2017), *Fluctuation Loops in Noise-Driven Linear Dynamical Systems*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, DataError, ShapeError
from bolza.core.reference import Reference, cites
from bolza.ops.krylov import Estimate
from bolza.sde.currents import CHAUDHARI

__all__ = ["AreaRate", "area_rate"]

GHANTA = Reference(
    "ghanta2017fluctuation",
    "Ghanta, Akhil and Neu, John C. and Teitsworth, Stephen",
    "Fluctuation Loops in Noise-Driven Linear Dynamical Systems",
    2017,
    venue="Physical Review E",
)
DEMPSTER = Reference(
    "dempster1958significance",
    "Dempster, Arthur P.",
    "A High Dimensional Two Sample Significance Test",
    1958,
    venue="The Annals of Mathematical Statistics",
)

STEPS = 8  # the least number of steps in a block
SMALLEST = 1e-300  # a probability below it counts as this much, so that z stays finite


@dataclass(frozen=True)
class AreaRate:
    r"""How a recorded path circles; made by :func:`area_rate`.

    Attributes:
        matrix: L, antisymmetric ``(k, k)``: x_i dx_j − x_j dx_i for each unit of time.
        error: standard error of each entry, from blocks of the path.
        z: the whole matrix against a path without direction of time, as a two-sided normal score: above 1.96 in one of
            twenty such paths, above 3.29 in one of a thousand. It is capped at 37.
        p_value: the probability that z stands for.
        plane: ``(k, 2)``; ``(x − centre) @ plane`` are two coordinates of unit variance in which the path turns
            fastest, anticlockwise.
        frequency: angular velocity ω in that plane, radians for each unit of time; 2π/ω is the period. The fastest of
            all planes has ω > 0 by chance alone: z says whether it is more.
        centre: mean of the path, ``(k,)``.
        drift: largest share of the variance of any direction that lies between the blocks rather than within: near 1
            the path still moves or has not gone round often, and what circles is a transient.
        blocks: number of blocks.
    """

    matrix: Tensor
    error: Tensor
    z: float
    p_value: float
    plane: Tensor
    frequency: Estimate
    centre: Tensor
    drift: float
    blocks: int

    @property
    def settled(self) -> bool:
        """Whether the path is long enough, and at rest enough, for its area to be that of a stationary state."""
        return self.drift < 0.6


@cites(GHANTA, CHAUDHARI, DEMPSTER)
def area_rate(path: Tensor, *, dt: float = 1.0, blocks: int = 24) -> AreaRate:
    r"""Whether a recorded path goes round in loops: the area it sweeps for each unit of time, with a z-score.

        L = (1/n dt) Σ_t (x_t x_{t+1}ᵀ − x_{t+1} x_tᵀ),      x about the mean of the path

    A process that looks the same backwards (gradient descent with isotropic noise, a random walk) sweeps no area in
    the mean; SGD does where its noise is not aligned with the curvature. The path is cut into blocks, each about its
    own mean: reversing a block turns the sign of its area, so that the areas of a reversible process have mean zero,
    also while it is far from stationary. They are compared with their spread by Dempster's test on all planes at
    once, in coordinates of unit variance; the answer does not depend on the basis or the units of the coordinates.

    What is reversible in time but not in the state, such as gradient descent that curves into a minimum, does sweep
    area once: trust the answer as a loop where ``settled``.

    Args:
        path: recorded coordinates, ``(steps, k)`` with k ≥ 2, or several paths ``(steps, paths, k)``, as
            :func:`~bolza.core.simulate` gives. A few projections of the parameters of a network will do, recorded
            at equal distances well below the time of relaxation.
        dt: time between records; with the learning rate times the steps between records the frequency is in the time
            unit of gradient flow.
        blocks: number of blocks in all; fewer where that leaves less than eight steps in each.

    Returns:
        AreaRate, on the device and in the dtype of the path.

    Raises:
        ShapeError: the path has not the shape above.
        ArgumentError: ``dt`` is not positive, or fewer than four blocks are wanted or possible.
        DataError: the path is not finite.

    Reference: Ghanta, Neu & Teitsworth (2017) for the area; Chaudhari & Soatto (2018), §5, for the loops of SGD;
    Dempster (1958) for the test.

    Example:
        >>> t = 0.1 * torch.arange(2000.0)
        >>> found = area_rate(torch.stack([t.cos(), t.sin()], 1), dt=0.1)
        >>> round(found.frequency.value, 3), found.z > 10, found.settled
        (0.998, True, True)
    """
    if path.ndim not in (2, 3) or path.shape[-1] < 2:
        raise ShapeError(
            f"path has shape {tuple(path.shape)}: give (steps, k) or (steps, paths, k) with at least two coordinates"
        )
    if not (dt > 0 and math.isfinite(dt)):
        raise ArgumentError(f"dt is {dt}: it must be positive")
    path = path if path.is_floating_point() else path.double()
    x = path.detach().reshape(len(path), math.prod(path.shape[1:-1]), path.shape[-1]).to(torch.float64)
    count = max(min(blocks // x.shape[1], (len(x) - 1) // STEPS), 1 if len(x) > STEPS else 0)
    if blocks < 4 or count * x.shape[1] < 4:
        raise ArgumentError(
            f"blocks is {blocks} for a path of {len(x)} records: at least 4 blocks of {STEPS} steps are needed"
        )
    if not bool(torch.isfinite(x).all()):
        raise DataError("path holds values that are not finite: cut it before the run diverged")
    length = (len(x) - 1) // count
    x = x[-(count * length + 1) :]
    centre = x.mean((0, 1))
    x = x - centre
    scale, axes = torch.linalg.eigh(torch.einsum("tpi,tpj->ij", x, x) / (len(x) * x.shape[1]))
    kept = scale > 1e-12 * scale[-1].clamp_min(torch.finfo(torch.float64).tiny)
    to_unit = axes[:, kept] / scale[kept].sqrt()
    from_unit = axes[:, kept] * scale[kept].sqrt()
    x = x @ to_unit
    # (records of a block, coordinates) of every block of every path, the last record of one the first of the next
    parts = x.unfold(0, length + 1, length).permute(1, 0, 3, 2).flatten(0, 1)
    means = parts[:, :-1].mean(1)
    drift = (
        min(float(torch.linalg.eigvalsh(means.mT @ means / len(means))[-1]), 1.0) if bool(kept.any()) else 0.0
    )
    if x.shape[-1] < 2:
        return _on_a_line(path, centre, drift, len(parts))

    whole = _wedge(x.movedim(1, 0)).mean(0) / dt
    areas = _wedge(parts - parts.mean(1, keepdim=True)) / dt
    p, z = _dempster(areas)
    plane, turn = _fastest(whole)
    spread = areas.std(0)
    in_plane = torch.einsum("bij,i,j->b", areas, plane[:, 0], plane[:, 1])
    back = from_unit @ (areas - areas.mean(0)) @ from_unit.mT
    root = math.sqrt(len(areas))
    return AreaRate(
        matrix=(from_unit @ whole @ from_unit.mT).to(path),
        error=((back.square().sum(0) / (len(areas) - 1)).sqrt() / root).to(path),
        z=z,
        p_value=p,
        plane=(to_unit @ plane).to(path),
        frequency=Estimate(turn / 2, float(in_plane.std()) / 2 / root if bool(spread.any()) else 0.0),
        centre=centre.to(path),
        drift=drift,
        blocks=len(areas),
    )


def _wedge(x: Tensor) -> Tensor:
    """Mean of x_t x_{t+1}ᵀ − x_{t+1} x_tᵀ over the records of each block, ``(blocks, records, k)``."""
    product = x[:, :-1].mT @ x[:, 1:]
    return (product - product.mT) / (x.shape[1] - 1)


def _fastest(matrix: Tensor) -> tuple[Tensor, float]:
    """Orthonormal basis of the plane in which an antisymmetric matrix turns most, and its entry there."""
    # i L is Hermitian; of its eigenvector a + i b for the largest eigenvalue, a and b span the plane
    values, vectors = torch.linalg.eigh(1j * matrix.to(torch.complex128))
    top = vectors[:, -1] * math.sqrt(2)
    plane = torch.stack([top.real, top.imag], 1)
    turn = float(plane[:, 0] @ matrix @ plane[:, 1])
    return (plane, turn) if turn >= 0 else (plane.flip(1), -turn)


def _dempster(areas: Tensor) -> tuple[float, float]:
    """Probability and two-sided normal score of antisymmetric matrices ``(n, k, k)`` of mean zero."""
    from scipy.special import fdtrc, ndtri

    n, k = len(areas), areas.shape[1]
    rows, columns = torch.triu_indices(k, k, 1, device=areas.device)
    a = areas[:, rows, columns]
    mean = a.mean(0)
    gram = (a - mean) @ (a - mean).mT / (n - 1)
    trace, square = float(gram.trace()), float(gram.square().sum())
    # unbiased estimate of tr C² (Bai & Saranadasa), which gives the number of planes that matter
    square = (n - 1) ** 2 / ((n - 2) * (n + 1)) * (square - trace**2 / (n - 1))
    free = min(max(trace**2 / square, 1.0), float(a.shape[1])) if square > 0 else float(a.shape[1])
    size = n * float(mean.square().sum())
    if trace <= 1e-24 * size or trace == 0:  # every block alike
        p = SMALLEST if size > 0 else 1.0
    else:
        p = max(float(fdtrc(free, (n - 1) * free, size / trace)), SMALLEST)
    return p, max(-float(ndtri(p / 2)), 0.0)


def _on_a_line(path: Tensor, centre: Tensor, drift: float, blocks: int) -> AreaRate:
    """What is said of a path that fills no plane, or does not move."""
    k = path.shape[-1]
    zero = path.new_zeros(k, k)
    plane = torch.eye(k, 2, dtype=path.dtype, device=path.device)
    return AreaRate(zero, zero, 0.0, 1.0, plane, Estimate(0.0), centre.to(path), drift, blocks)
