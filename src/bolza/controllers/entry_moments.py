"""Running moments of gradient and position of every entry, and the curvature in them.

The equations are those of :mod:`bolza.controllers.running_moments`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["observe_", "slope"]


def observe_(
    rows: Sequence[Tensor],
    g: Tensor,
    x: Tensor,
    count: int,
    beta: tuple[float, float],
    scratch: Sequence[Tensor],
) -> Tensor:
    """Take one gradient and position into the five rows (ḡ, x̄, s_g, s_x, s_gx) of every entry, in place.

    Args:
        rows: five vectors.
        g: gradient, a vector.
        x: position where it was taken, a vector.
        count: number of this observation, from 1.
        beta: (β_min, β_max).
        scratch: four vectors to write on; the first is returned.

    Returns:
        w of every entry.
    """
    mean_g, mean_x, var_g, var_x, cov = rows[:5]
    w, dg, dx, t = scratch[:4]
    torch.mul(mean_g, mean_g, out=w)
    torch.add(w, var_g, out=t).add_(torch.finfo(w.dtype).tiny)
    torch.addcdiv(w.new_full((), 1 - beta[1]), w, t, value=beta[1] - beta[0], out=w)
    if count * (1 - beta[1]) < 1:
        w.clamp_min_(1 / count)
    torch.sub(g, mean_g, out=dg)
    torch.sub(x, mean_x, out=dx)
    torch.mul(w, dg, out=t)
    mean_g.add_(t)
    var_g.addcmul_(t, dg)
    cov.addcmul_(t, dx)
    torch.mul(w, dx, out=t)
    mean_x.add_(t)
    var_x.addcmul_(t, dx)
    torch.neg(w, out=t).add_(1)
    var_g.mul_(t)
    var_x.mul_(t)
    cov.mul_(t)
    return w


def slope(rows: Sequence[Tensor], w: Tensor, z: float, scratch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Curvature a = s_gx/s_x of every entry, and 1 where it exceeds z of its standard errors, else 0.

    r²(n − 2 + z²) > z² with n = (2 − w)/w, that is a s_gx (2 − (3 − z²)w) > z² w s_g. Where nothing moved yet the
    curvature is no number and not significant.

    Args:
        rows: as in :func:`observe_`.
        w: what that returned.
        z: standard errors.
        scratch: three vectors to write on; the first two are returned.
    """
    _, _, var_g, var_x, cov = rows[:5]
    curvature, sure, t = scratch[:3]
    torch.div(cov, var_x, out=curvature)
    torch.mul(w, z * z - 3, out=t).add_(2)
    torch.mul(curvature, cov, out=sure).mul_(t)
    torch.mul(w, var_g, out=t)
    return curvature, sure.gt_(t if z == 1 else t.mul_(z * z))
