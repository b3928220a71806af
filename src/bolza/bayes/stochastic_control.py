r"""Rates by feedback for means and scales of Gaussian weights: every entry's own curvature, noise and slope.

    x ← x − η u g,     u ← u + w(u* − u),     u* = ḡ² / max(ḡ², aη(Σ + ḡ²)),     x one of μ, ρ

u is 1 while the mean of the gradient stands out from its noise Σ, of data and of drawn weights together, and falls
like 1/t from where it does not. a is the slope of the gradient over the weight, from running moments. For a mean the
weight is the one that was drawn, if the optimizer is told: drawn weights never stop varying, so that the curvature is
known from the first steps on and stays known when the mean comes to rest.

Reference: Winkler, Ojeda & Opper (2022); Li, Tai & E (2017), §4.1, for the law.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bolza.bayes._sampler import check_number
from bolza.bayes.variational import WINKLER
from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.core.reference import cites

__all__ = ["StochasticControl", "optimal_control"]


def optimal_control(slope: Tensor, noise: Tensor, curvature: Tensor, lr: float) -> Tensor:
    """u* = min(1, ḡ²/(aη(Σ + ḡ²))), 1 where a ≤ 0 or nothing is known.

    Example:
        >>> one = torch.tensor([1.0, 1.0, 1.0])
        >>> optimal_control(one, torch.tensor([0.0, 3.0, 3.0]), torch.tensor([2.0, 2.0, -2.0]), lr=1.0)
        tensor([0.5000, 0.1250, 1.0000])
    """
    square = slope.square()
    inverse = (noise / square + 1) * curvature * lr  # a quotient of like sizes stays in range
    return inverse.nan_to_num_(1.0).clamp_min_(1.0).reciprocal_()


@cites(WINKLER)
class StochasticControl(torch.optim.Optimizer):
    r"""SGD with a share u ∈ [0, 1] of the rate for every mean and every scale, set by feedback.

    Made for the two groups of a `MeanField` network; any parameters will do. No rates to tune for means and scales: η
    is the largest rate that may be of use, and u falls where noise or curvature forbid it. Six numbers an entry.

    Args:
        params: parameters or groups, ``net.groups()`` of a `MeanField`.
        lr: η.
        beta: (β_min, β_max), memory of the running moments: short where the slope stands out, long where it is noise. A
            longer run wants β_max nearer to 1: u ends near (1 − β_max)/(1 + β_max)/(aη).
        z: standard errors that a curvature must exceed; below, u stays as it is.
        u0: u at the start.
        drawn: tells for a mean which weight was drawn for the gradient, ``net.drawn`` of a `MeanField`; None, or a
            result of None: the mean itself is what the gradient is a function of.

    Raises:
        ArgumentError: a setting is out of its range.
        UnsupportedError: (in ``step``) a gradient is sparse or complex.

    Reference: Winkler, Ojeda & Opper (2022); the program of the authors is not public, so that the estimates are those
    of Li, Tai & E (2017). Departures: the law of the step, u* ≤ 1/(aη), in place of that of the diffusion, which is
    unstable at large rates; u stays where the curvature is not significant; the drawn weights as a probe.

    Example:
        >>> from bolza.bayes import MeanField
        >>> draw = torch.Generator().manual_seed(0)
        >>> net = MeanField(torch.nn.Linear(4, 1), scale=0.1, generator=draw)
        >>> optimizer = StochasticControl(net.groups(), lr=1.0, drawn=net.drawn)
        >>> x = torch.randn(200, 4, generator=draw)
        >>> y = x.sum(1, keepdim=True)
        >>> for _ in range(300):
        ...     optimizer.zero_grad()
        ...     (((net(x) - y) ** 2).mean() / 2 + net.kl() / 200).backward()
        ...     optimizer.step()
        >>> bool((net.means()["weight"] - 1).abs().max() < 0.1), optimizer.log()["mean"] < 0.5
        (True, True)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        *,
        beta: tuple[float, float] = (0.9, 0.99),
        z: float = 1.0,
        u0: float = 1.0,
        drawn: Callable[[Tensor], Tensor | None] | None = None,
    ) -> None:
        check_number("lr", lr)
        check_number("z", z)
        check_number("u0", u0, high=1.0, positive=True)
        low, high = beta
        if not 0 <= low <= high < 1:
            raise ArgumentError(f"beta is {beta!r}: give (β_min, β_max) with 0 ≤ β_min ≤ β_max < 1")
        super().__init__(params, {"lr": lr, "beta": (float(low), float(high)), "z": float(z), "u0": u0})
        self.drawn = drawn

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step, and learn from it; parameters without a gradient stay.

        Args:
            closure: computes the loss and its gradients, and returns the loss.

        Returns:
            What the closure returns, ``None`` without one.

        Raises:
            UnsupportedError: a gradient is sparse or complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse or p.is_complex():
                    raise UnsupportedError(
                        "a gradient is sparse or complex, but moments are kept of every entry: make the embedding with "
                        "sparse=False, the weights real"
                    )
                state = self.state[p]
                if not state:
                    kind = torch.promote_types(p.dtype, torch.float32)
                    for name in ("mean_g", "mean_x", "var_g", "var_x", "cov"):
                        state[name] = torch.zeros_like(p, dtype=kind)
                    state["u"] = torch.full_like(p, group["u0"], dtype=kind)
                    state["seen"] = 0
                at = None if self.drawn is None else self.drawn(p)
                g = p.grad.to(state["u"].dtype)
                w = _observe(state, g, (p if at is None else at).to(g.dtype), group["beta"])
                move = g * state["u"]  # of before this gradient: the step has its mean direction
                self._steer(state, w, group)
                p.add_(move.to(p.dtype), alpha=-float(group["lr"]))
        return loss

    def _steer(self, state: dict[str, Any], w: Tensor, group: dict[str, Any]) -> None:
        """Move u towards u* where the curvature is significant."""
        curvature, square = state["cov"] / state["var_x"], group["z"] ** 2
        # r²(n − 2 + z²) > z² with n = (2 − w)/w observations
        sure = curvature * state["cov"] * (2 - (3 - square) * w) > square * w * state["var_g"]
        sure &= curvature > 0
        wanted = optimal_control(state["mean_g"], state["var_g"], curvature, float(group["lr"]))
        state["u"].add_(torch.where(sure, w * (wanted - state["u"]), 0.0))

    def log(self) -> dict[str, float]:
        """Mean of u over each group, by its name, ``"mean"`` and ``"scale"`` for a `MeanField`."""
        found = {}
        for index, group in enumerate(self.param_groups):
            rows = [self.state[p]["u"] for p in group["params"] if self.state.get(p)]
            size = sum(u.numel() for u in rows)
            total = sum(float(u.sum(dtype=torch.float64)) for u in rows)
            found[str(group.get("name", index))] = total / size if size else float(group["u0"])
        return found


def _observe(state: dict[str, Any], g: Tensor, x: Tensor, beta: tuple[float, float]) -> Tensor:
    """Take one gradient and weight into the running moments; returns the weight w of this observation, by entry."""
    state["seen"] += 1
    square = state["mean_g"].square()
    # the memory is β_max where all is noise, β_min where all is slope
    share = square / (square + state["var_g"] + torch.finfo(g.dtype).tiny)
    w = (1 - beta[1]) + (beta[1] - beta[0]) * share
    if state["seen"] * (1 - beta[1]) < 1:
        w.clamp_min_(1 / state["seen"])
    off_g, off_x = g - state["mean_g"], x - state["mean_x"]
    for name, one, two in (("var_g", off_g, off_g), ("var_x", off_x, off_x), ("cov", off_g, off_x)):
        state[name].addcmul_(w * one, two).mul_(1 - w)
    state["mean_g"].addcmul_(w, off_g)
    state["mean_x"].addcmul_(w, off_x)
    return w
