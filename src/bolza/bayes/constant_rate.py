r"""A run of SGD turned into a sampler: the constant rate at which its own noise is the heat of the posterior.

    iterates of θ ← θ − ηg rest at N(θ*, S),  AS + SA = ηV,     V the covariance of the gradient of a batch

    closest to exp(−U/T), U = N · mean loss + λ|θ|²/2:       η* = 2Td/(N tr V),      by coordinate  η_i = 2T/(N V_ii)

No noise is injected; the batches have it already. A single rate matches a single number, the trace of AS: where noise
and curvature differ in shape some weights spread too far and others too little. A matrix of rates (2T/N) V⁻¹ would be
exact, near the minimum.

Reference: Mandt, Hoffman & Blei (2017), arXiv:1704.04289.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from bolza.bayes._sampler import Sampler, check_number
from bolza.core.errors import ArgumentError, DivergenceError, UnsupportedError
from bolza.core.reference import Reference, cites

__all__ = ["REFERENCE", "ConstantSGD", "constant_rate"]

REFERENCE = Reference(
    key="mandt2017stochastic",
    authors="Mandt, Stephan and Hoffman, Matthew D. and Blei, David M.",
    title="Stochastic Gradient Descent as Approximate Bayesian Inference",
    year=2017,
    venue="Journal of Machine Learning Research 18",
    arxiv="1704.04289",
)


def constant_rate(
    trace: float, size: int, num_data: int, temperature: float = 1.0, momentum: float = 0.0
) -> float:
    """η* = 2Td(1 − μ)/(N tr V), for ``trace`` tr V of the gradient of a batch and ``size`` d; infinite without noise.

    Example:
        >>> constant_rate(0.16, size=2, num_data=1000)         # tr C = 1.6 a sample, in batches of 10
        0.025
    """
    return 2 * temperature * size * (1 - momentum) / (num_data * trace) if trace > 0 else math.inf


@cites(REFERENCE)
class ConstantSGD(Sampler):
    r"""SGD at the constant rate at which its iterates are closest to the posterior, η* = 2Td(1 − μ)/(N tr V).

    Put it in the place of SGD when training has come to rest. For ``adapt`` steps it is SGD at the rate ``lr`` and
    measures the noise V of the batches; from then on the rate is η*, or ``lr`` where that is smaller, and stays.
    Collect the iterates with `Trace` once they have forgotten the old rate, 1/(η* · the least curvature) steps.

    Args:
        params: parameters, or groups of them, each with a rate of its own.
        lr: rate while the noise is measured, and the largest one that may come out: what SGD tolerates here.
        num_data: N, the number of samples of the whole training set.
        prior_precision: λ of the Gaussian prior N(0, 1/λ) of every weight; what is weight decay λ/N in SGD.
        temperature: T > 0 of the law that is sampled; 1 is the posterior.
        momentum: heavy-ball μ; the iterates move further in a step, and rest at the same law to first order in η.
        rule: ``"scalar"``: one rate a group; ``"diagonal"``: one a weight, closer wherever noise differs by weight.
        adapt: steps for which the noise is measured, at least 2.

    Raises:
        ArgumentError: a setting is out of its range.
        DivergenceError: (in ``step``) the noise is not finite.
        UnsupportedError: (in ``step``) a gradient is sparse.

    Warns:
        UserWarning: at the end of the measurement, if ``lr`` is the smaller rate for more than half of the weights: the
            noise of the batches is too small to sample with, and the iterates will stay too close together.

    Reference: Mandt, Hoffman & Blei (2017), §4.1, §4.2 (diagonal), §4.3 (momentum, to first order in η). Departures: V
    comes from the run itself, by an identity that is exact for a quadratic at rest; an upper bound on the rate.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> w = torch.nn.Parameter(torch.zeros(4000))                # four thousand chains at a minimum of curvature 3
        >>> sampler = ConstantSGD([w], lr=0.1, num_data=100, prior_precision=0.0, adapt=50)
        >>> for _ in range(400):
        ...     w.grad = 3 * w.detach() + torch.randn(4000, generator=draw)      # V = 1
        ...     sampler.step()
        >>> [round(r, 3) for r in sampler.rates()], round(300 * w.var().item(), 1)
        ([0.02], 1.0)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        num_data: int,
        prior_precision: float = 1.0,
        temperature: float = 1.0,
        momentum: float = 0.0,
        rule: Literal["scalar", "diagonal"] = "scalar",
        adapt: int = 200,
    ) -> None:
        check_number("temperature", temperature, positive=True)
        check_number("momentum", momentum)
        if not momentum < 1:
            raise ArgumentError(f"momentum is {momentum!r}: it must be below 1")
        if rule not in ("scalar", "diagonal"):
            raise ArgumentError(f"rule is {rule!r}: choose 'scalar' or 'diagonal'")
        if isinstance(adapt, bool) or not isinstance(adapt, int) or adapt < 2:
            raise ArgumentError(f"adapt is {adapt!r}: it must be a number of steps, at least 2")
        super().__init__(
            params,
            lr=lr,
            num_data=num_data,
            prior_precision=prior_precision,
            temperature=temperature,
            noise_estimate=None,
            seed=0,
            momentum=momentum,
            rule=rule,
            adapt=adapt,
            rate=None,
        )

    def _advance(
        self,
        group: dict[str, Any],
        theta: list[Tensor],
        g: list[Tensor],
        batch_noise: list[Tensor] | float,
        normal: Callable[[], list[Tensor]],
    ) -> None:
        lr = float(group["lr"])
        measuring = group["draws"] < group["adapt"]
        if measuring:
            self._meet(theta, g)
        elif group["rate"] is None:
            self._settle(group)
        if group["rate"] is None:
            moves = list(torch._foreach_mul(g, -lr))
        elif group["rule"] == "scalar":
            moves = list(torch._foreach_mul(g, -min(lr, group["rate"])))
        else:
            rates = torch._foreach_clamp_max([self._own_rate(group, p) for p in theta], lr)
            torch._foreach_neg_(rates)
            moves = list(torch._foreach_mul(g, rates))
        if group["momentum"]:
            for p in theta:
                if "velocity" not in self.state[p]:
                    self.state[p]["velocity"] = torch.zeros_like(p)
            velocity = [self.state[p]["velocity"] for p in theta]
            torch._foreach_mul_(velocity, group["momentum"])
            torch._foreach_add_(velocity, moves)
            moves = velocity
        torch._foreach_add_(theta, moves)
        if measuring and lr:
            for p, x, move in zip(theta, g, moves, strict=True):
                self.state[p].update(last_grad=x.clone(), last_move=move / -lr)

    def _meet(self, theta: list[Tensor], g: list[Tensor]) -> None:
        """Take up the last move, −v/η, and the sum of the gradients on either side of it.

        At rest θᵀAθ is on average the same before and after a move v, so that vᵀ(g + g′) is −η tr V exactly, with
        momentum too: differences of gradients, or their spread, would count a part of what the chain does as noise.
        """
        for p, x in zip(theta, g, strict=True):
            state = self.state[p]
            if "products" not in state:
                state.update({name: torch.zeros_like(p) for name in ("products", "moves", "sums")}, seen=0)
            if "last_grad" in state:
                around = x + state.pop("last_grad")
                move = state.pop("last_move")
                state["products"].addcmul_(move, around)
                state["moves"].add_(move)
                state["sums"].add_(around)
                state["seen"] += 1

    def _settle(self, group: dict[str, Any]) -> None:
        """Turn the measured noise into the rate that stays."""
        seen = [p for p in group["params"] if self.state.get(p, {}).get("seen", 0) > 1]
        size = sum(p.numel() for p in seen)
        trace = sum(float(self._variance(p).sum(dtype=torch.float64)) for p in seen)
        if not math.isfinite(trace):
            raise DivergenceError(
                "the noise of the batches is not finite: the run diverged while it was measured, so start from a "
                f"smaller rate than {float(group['lr']):.3g}"
            )
        group["rate"] = constant_rate(trace, size, group["num_data"], group["temperature"], group["momentum"])
        for p in seen:
            self.state[p].pop("last_grad", None)
            self.state[p].pop("last_move", None)
        if size and self._capped(group, seen) > 0.5 * size:
            warnings.warn(
                f"the posterior wants a rate beyond lr={float(group['lr']):.3g}, about {group['rate']:.3g}: the noise "
                "of the batches is too small to sample with; take smaller batches, or SGLD, which adds what is missing",
                stacklevel=4,
            )

    def _variance(self, p: Tensor) -> Tensor:
        """Variance of the gradient of a batch, by weight, about the mean of the run; an estimate may be negative."""
        state = self.state[p]
        n = state["seen"]
        variance: Tensor = (state["products"] - state["moves"] * state["sums"] / n) / max(n - 1, 1)
        return variance

    def _own_rate(self, group: dict[str, Any], p: Tensor) -> Tensor:
        """Rate of every entry; infinite where nothing was measured or there is no noise."""
        state = self.state[p]
        if state.get("seen", 0) < 2:
            return torch.full_like(p, math.inf)
        factor = constant_rate(1.0, 1, group["num_data"], group["temperature"], group["momentum"])
        return factor / self._variance(p).clamp_min(0)

    def _capped(self, group: dict[str, Any], seen: list[Tensor]) -> int:
        lr = float(group["lr"])
        if group["rule"] == "scalar":
            return sum(p.numel() for p in seen) if group["rate"] > lr else 0
        return sum(int((self._own_rate(group, p) > lr).sum()) for p in seen)

    def rates(self) -> list[float]:
        """The rate of each group as it is now; its mean over the weights with ``rule="diagonal"``."""
        found = []
        for group in self.param_groups:
            lr = float(group["lr"])
            if group["rate"] is None:
                found.append(lr)
            elif group["rule"] == "scalar":
                found.append(min(lr, group["rate"]))
            else:
                each = [self._own_rate(group, p).clamp_max(lr) for p in group["params"]]
                total = sum(float(e.sum(dtype=torch.float64)) for e in each)
                found.append(total / sum(e.numel() for e in each))
        return found

    def noise_excess(self) -> float:
        """The share of weights in which the batches bring more heat than the posterior has; about half, at one rate.

        Raises:
            UnsupportedError: the noise is not measured yet.
        """
        over, total = 0, 0
        for group in self.param_groups:
            for p in group["params"]:
                if group["rate"] is not None and self.state.get(p, {}).get("seen", 0) > 1:
                    over += int((self._variance(p) > 1.001 * self._allowed(group, p)).sum())
                    total += p.numel()
        if not total:
            raise UnsupportedError(
                "the noise of the batches is not measured yet: make more steps than `adapt` first"
            )
        return over / total

    def _allowed(self, group: dict[str, Any], p: Tensor) -> Tensor | float:
        factor = constant_rate(1.0, 1, group["num_data"], group["temperature"], group["momentum"])
        lr = float(group["lr"])
        if group["rule"] == "scalar":
            return factor / min(lr, group["rate"]) if lr else math.inf
        return factor / self._own_rate(group, p).clamp_max(lr)
