r"""Does a driven network follow its input? Conditional exponent, auxiliary system, mutual false nearest neighbours.

    r_{t+1} = F(r_t, u_t)

Generalised synchronisation: after a transient r is a function of the driver's state alone. Then copies with other
    first
states fall together (auxiliary system), nearby states do too (the largest exponent of r, conditional on u, is
negative), and, where that function can be inverted, neighbours in the one space are neighbours in the other. None
of the three implies another: with a negative exponent there can be two attracting responses, and with a short
    memory a function that
cannot be inverted.

Reference: Verzelli, Alippi & Livi (2021), *Learn to Synchronize, Synchronize to Learn*; Rulkov, Sushchik, Tsimring
    &
Abarbanel (1995); Abarbanel, Rulkov & Sushchik (1996).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, DataError, DivergenceError, ShapeError
from bolza.core.reference import Reference, cites
from bolza.ops.operators import Estimate
from bolza.ops.trees import Tree, tree_detach
from bolza.stability.lyapunov import driven_flow, lyapunov_exponents

__all__ = [
    "MutualNeighbours",
    "apart",
    "conditional_exponent",
    "drive",
    "mutual_false_neighbours",
    "synchronisation_error",
]

VERZELLI = Reference(
    "verzelli2021synchronize",
    "Verzelli, Pietro and Alippi, Cesare and Livi, Lorenzo",
    "Learn to Synchronize, Synchronize to Learn",
    2021,
    venue="Chaos",
    arxiv="2010.02860",
)

RULKOV = Reference(
    "rulkov1995generalized",
    "Rulkov, Nikolai F. and Sushchik, Mikhail M. and Tsimring, Lev S. and Abarbanel, Henry D. I.",
    "Generalized synchronization of chaos in directionally coupled chaotic systems",
    1995,
    venue="Physical Review E",
)

Response = nn.Module | Callable[[Tree, Tree], Tree]

_CHUNK = 2**22  # distances at a time


@cites(VERZELLI)
def conditional_exponent(
    response: Response, inputs: Any, x0: Tree = None, *, warmup: int = 0, seed: int = 0
) -> Estimate:
    """Largest Lyapunov exponent of a driven system, its input given: negative if nearby responses fall together.

    Args:
        response: a recurrent module of ``torch.nn``, or a function (r, u) → next r.
        inputs: driving sequence, time first (a module: in its own form).
        x0: first state, samples first; zeros for a module.
        warmup: steps that do not count.
        seed: of the first direction.

    Returns:
        Nats per step, with the standard error of :func:`bolza.stability.lyapunov_exponents`.

    Raises:
        ArgumentError: no inputs, or fewer than ``warmup``.

    Reference: Verzelli et al. (2021).

    Example:
        >>> step = lambda r, u: 0.5 * r + u
        >>> print(conditional_exponent(step, torch.randn(50, 1), torch.zeros(4, 3)).value)
        -0.693147...
    """
    if inputs is None:
        raise ArgumentError("inputs is None: the exponent is conditional on a driving sequence")
    return lyapunov_exponents(response, x0, k=1, inputs=inputs, warmup=warmup, seed=seed).largest


@cites(VERZELLI)
def drive(response: Response, inputs: Any, x0: Tree = None, *, warmup: int = 0) -> Tensor:
    """Responses r_1, r_2, … to an input, as flat rows.

    Args:
        response: a recurrent module of ``torch.nn``, or a function (r, u) → next r.
        inputs: driving sequence, time first (a module: in its own form).
        x0: first state, samples first; zeros for a module.
        warmup: first states that are left out.

    Returns:
        ``(steps − warmup, batch, size)``.

    Raises:
        ArgumentError: nothing is left after the warm-up.

    Reference: Verzelli et al. (2021).

    Example:
        >>> drive(lambda r, u: r + u, torch.ones(3, 1), torch.zeros(1, 1)).flatten()
        tensor([1., 2., 3.])
    """
    flow, steps = driven_flow(response, None if x0 is None else tree_detach(x0), inputs)
    if not 0 <= warmup < steps:
        raise ArgumentError(f"warmup is {warmup}, but the input has {steps} steps: at least one must be left")
    rows = []
    with torch.no_grad():
        for t in range(steps):
            flow.state = flow.step(t, flow.state, flow.inputs(t))
            if t >= warmup:
                rows.append(flow.flat(flow.state))
    out = torch.stack(rows)
    if not bool(out.isfinite().all()):
        raise DivergenceError("the response is not finite: the driven system leaves every bound")
    return out


@cites(VERZELLI)
def synchronisation_error(response: Response, inputs: Any, x0: Tree, *, window: int = 100) -> Tensor:
    r"""Auxiliary-system test: how far copies with different first states are apart at the end.

        e = sqrt( mean over the last steps, pairs and units of (r − r')² )

    Zero, to rounding, if the response has forgotten where it began: generalised synchronisation, the echo-state
        property
    on this input. A negative conditional exponent alone does not imply it.

    Args:
        response: a recurrent module of ``torch.nn``, or a function (r, u) → next r.
        inputs: driving sequence, the same for all copies, time first (a module: in its own form, batch 1).
        x0: first states, two copies or more, samples first (a module: in its own form).
        window: how many of the last steps are compared.

    Returns:
        e as a float64 scalar.

    Raises:
        ArgumentError: fewer than two copies, or a window longer than the input.

    Reference: Abarbanel, Rulkov & Sushchik (1996), *Generalized synchronization of chaos: the auxiliary system
    approach*.

    Example:
        >>> step = lambda r, u: 0.5 * r + u
        >>> bool(synchronisation_error(step, torch.randn(200, 1), torch.randn(2, 3)) < 1e-6)
        True
    """
    flow, steps = driven_flow(response, tree_detach(x0), inputs)
    copies = flow.flat(flow.state).shape[0]
    if copies < 2 or not 1 <= window <= steps:
        raise ArgumentError(
            f"x0 has {copies} copies and window is {window} of {steps} steps: two copies, and a window within the input"
        )
    last = []
    with torch.no_grad():
        for t in range(steps):
            flow.state = flow.step(t, flow.state, flow.inputs(t))
            if t >= steps - window:
                last.append(flow.flat(flow.state))
    return apart(torch.stack(last))


def apart(r: Tensor) -> Tensor:
    """Root mean square distance between copies ``(steps, copies, units)``, over steps, pairs and units."""
    return (2 * r.double().var(1).mean()).sqrt().cpu()  # over pairs, (r − r')² is twice the unbiased variance


@dataclass(frozen=True)
class MutualNeighbours:
    """Mutual false nearest neighbours: near 1 if neighbours correspond.

    Attributes:
        values: the index at each point, float64; nan where a neighbour coincides with the point.
        median: over points.
        mean: over points; heavy-tailed, so that the median is what to compare.
    """

    values: Tensor
    median: float
    mean: float


@cites(RULKOV, VERZELLI)
def mutual_false_neighbours(
    driver: Tensor, response: Tensor, *, theiler: int = 0, max_points: int = 2000, seed: int = 0
) -> MutualNeighbours:
    r"""Mutual false nearest neighbours of two simultaneous series.

        P(n) = |y_n − y_a| |x_n − x_b| / ( |x_n − x_a| |y_n − y_b| )

    with a the nearest neighbour of n in the driver's space and b that in the response's. Near 1: neighbours
    correspond, the response is an invertible function of the driver. Large: no such function, or not at this
    accuracy. It is also large where the response is a function of the driver but remembers too little of it to be
    inverted.

    Args:
        driver: x, ``(steps, p)``.
        response: y, ``(steps, q)``.
        theiler: neighbours must be more than so many steps away in time; needed where sampling is dense.
        max_points: indices n that are looked at, drawn at random; their neighbours are sought among all steps.
        seed: of that draw.

    Returns:
        MutualNeighbours.

    Raises:
        ArgumentError: ``theiler`` or ``max_points`` out of range.
        DataError: fewer points than a neighbour needs, or series that are not finite.
        ShapeError: the series are not two matrices of one length.

    Reference: Rulkov et al. (1995), eq. 3.

    Example:
        >>> x = torch.randn(100, 3)
        >>> mutual_false_neighbours(x, x).median
        1.0
    """
    if driver.ndim != 2 or response.ndim != 2 or driver.shape[0] != response.shape[0]:
        raise ShapeError(
            f"driver is {tuple(driver.shape)} and response {tuple(response.shape)}: give (steps, p) and (steps, q)"
        )
    if theiler < 0 or max_points < 1:
        raise ArgumentError(f"theiler is {theiler} and max_points {max_points}: at least 0 and 1")
    x, y = driver.detach().double(), response.detach().double()
    steps = x.shape[0]
    if steps < 2 * theiler + 3 or not bool(x.isfinite().all() and y.isfinite().all()):
        raise DataError(
            f"there are {steps} points with a Theiler window of {theiler}: at least {2 * theiler + 3} finite ones are "
            "needed"
        )
    points = torch.arange(steps, device=x.device)
    if steps > max_points:
        draw = torch.randperm(steps, generator=torch.Generator().manual_seed(seed))[:max_points]
        points = draw.sort().values.to(x.device)
    values = torch.cat([_index(x, y, part, theiler) for part in points.split(max(1, _CHUNK // steps))]).cpu()
    valid = values[~values.isnan()]
    if not valid.numel():
        raise DataError("every point coincides with another one: the series must vary")
    return MutualNeighbours(values, float(valid.median()), float(valid.mean()))


def _index(x: Tensor, y: Tensor, n: Tensor, theiler: int) -> Tensor:
    time = torch.arange(x.shape[0], device=x.device)
    near = (time[None] - n[:, None]).abs() <= theiler
    exact = "donot_use_mm_for_euclid_dist"
    dx = torch.cdist(x[n], x, compute_mode=exact)
    dy = torch.cdist(y[n], y, compute_mode=exact)
    a = dx.masked_fill(near, math.inf).argmin(1, keepdim=True)
    b = dy.masked_fill(near, math.inf).argmin(1, keepdim=True)
    above = dy.gather(1, a) * dx.gather(1, b)
    below = dx.gather(1, a) * dy.gather(1, b)
    return torch.where(below > 0, above / below, math.nan)[:, 0]
