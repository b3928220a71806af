r"""Stochastic gradient Langevin dynamics: descent with as much noise as makes it a sampler.

    θ ← θ − h ∇U(θ) + √(2hT) ξ,   ξ ~ N(0, I)              (the ε of the paper is 2h)

On a quadratic potential of precision λ, with gradients of variance V, the chain itself has the variance
(T + hV/2)/(λ(1 − hλ/2)): the step and the noise of the batches both heat it.

Reference: Welling & Teh (2011).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bolza.bayes._sampler import Sampler, spread
from bolza.core.reference import Reference, cites

__all__ = ["REFERENCE", "SGLD", "sgld_step"]

REFERENCE = Reference(
    "welling2011sgld",
    "Welling, Max and Teh, Yee Whye",
    "Bayesian Learning via Stochastic Gradient Langevin Dynamics",
    2011,
    venue="International Conference on Machine Learning",
)


def sgld_step(
    theta: Tensor, grad: Tensor, h: float | Tensor, noise: Tensor, temperature: float = 1.0
) -> Tensor:
    """One step θ − h ∇U + √(2hT) ξ, with ``grad`` of U and ``noise`` ξ.

    Example:
        >>> sgld_step(torch.tensor([1.0]), torch.tensor([2.0]), 0.125, torch.tensor([1.0]))
        tensor([1.2500])
    """
    return theta - h * grad + (2 * h * temperature) ** 0.5 * noise


@cites(REFERENCE)
class SGLD(Sampler):
    r"""Stochastic gradient Langevin dynamics, θ ← θ − η(g + λθ/N) + √(2ηT/N) ξ, as a ``torch.optim.Optimizer``.

    Your loop stays: the loss is the mean negative log-likelihood of the batch, and the iterates, once the chain has
    forgotten its start, are samples of exp(−U/T), U = N · mean loss + λ|θ|²/2. The bias is of first order in η;
    prefer `BAOAB` unless you want the simplest chain there is.

    Args:
        params: parameters, or groups of them.
        lr: η, as of SGD on the mean loss: N times the step h on U (the ε of the paper is 2η/N).
        num_data: N, the number of samples of the whole training set.
        prior_precision: λ of the Gaussian prior N(0, 1/λ) of every weight; what is weight decay λ/N in SGD.
        temperature: T; 1 samples the posterior, 0 is SGD with weight decay λ/N.
        noise_estimate: variance of the gradient of a batch that the injected noise is reduced by: a number,
            ``"running"`` for an estimate by coordinate from successive gradients (two more copies of the weights), or
            ``None`` for none: then the noise of the batches heats the chain by ηNV/(2T).
        seed: of the noise; chains with one seed see the same noise. Drawn from the global generator by default.

    Raises:
        ArgumentError: a setting is out of its range.
        UnsupportedError: (in ``step``) a gradient is sparse.

    Reference: Welling & Teh (2011), eq. (4). Departures: the learning rate counts on the mean loss; no schedule is
    built in, any of ``torch.optim.lr_scheduler`` makes the rate fall.

    Example:
        >>> x = torch.tensor([0.2, 0.4])                      # two data of unit variance, and a flat prior
        >>> w = torch.nn.Parameter(torch.zeros(4000))         # four thousand chains
        >>> sampler = SGLD([w], lr=0.2, num_data=2, prior_precision=0.0, seed=0)
        >>> for _ in range(40):
        ...     sampler.zero_grad()
        ...     ((x[:, None] - w) ** 2 / 2).mean(0).sum().backward()
        ...     sampler.step()
        >>> round(w.mean().item(), 1), round(w.var().item(), 1)      # 0.3 and 1/2 · 1/(1 − η/2)
        (0.3, 0.6)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        *,
        num_data: int,
        prior_precision: float = 1.0,
        temperature: float = 1.0,
        noise_estimate: float | str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            num_data=num_data,
            prior_precision=prior_precision,
            temperature=temperature,
            noise_estimate=noise_estimate,
            seed=seed,
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
        torch._foreach_add_(theta, g, alpha=-lr)
        heat = 2 * lr * group["temperature"] / group["num_data"]
        if heat:
            torch._foreach_add_(theta, spread(heat, batch_noise, lr**2, normal()))

    def _allowed(self, group: dict[str, Any], p: Tensor) -> float:
        lr = float(group["lr"])
        return 2 * group["temperature"] / (group["num_data"] * lr) if lr else float("inf")
