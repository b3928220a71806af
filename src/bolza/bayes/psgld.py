r"""Stochastic gradient Langevin dynamics with a diagonal metric from the gradients' own size.

    V ← βV + (1 − β) g²,    G = 1/(ε + √V),    θ ← θ − h (G ∇U − Γ) + √(2hTG) ξ,    Γ_i = T ∂G_i/∂θ_i

Where curvatures differ by orders of magnitude one step size is too large for some weights and too small for the
others; G evens them out. Γ would need second derivatives and is left out, as is usual; with a metric that is frozen
after the chain has come to rest there is none to leave out.

Reference: Li, Chen, Carlson & Carin (2016), arXiv:1512.07666.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bolza.bayes._sampler import Sampler, check_number, spread
from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites

__all__ = ["PSGLD", "REFERENCE"]

REFERENCE = Reference(
    "li2016psgld",
    "Li, Chunyuan and Chen, Changyou and Carlson, David and Carin, Lawrence",
    "Preconditioned Stochastic Gradient Langevin Dynamics for Deep Neural Networks",
    2016,
    venue="AAAI Conference on Artificial Intelligence",
    arxiv="1512.07666",
)


@cites(REFERENCE)
class PSGLD(Sampler):
    r"""Preconditioned stochastic gradient Langevin dynamics, θ ← θ − ηG(g + λθ/N) + √(2ηTG/N) ξ.

    G = 1/(ε + √V), V the running mean of squared gradients. At temperature 0 it is RMSprop. While G still follows the
    chain the samples are off by what Γ leaves out, of order 1 − β; give ``adapt`` a number of steps, and after them G
    is a constant and the chain samples what SGLD samples.

    Args:
        params: parameters, or groups of them.
        lr: η, as of RMSprop on the mean loss.
        num_data: N, the number of samples of the whole training set.
        prior_precision: λ of the Gaussian prior N(0, 1/λ) of every weight.
        temperature: T; 1 samples the posterior, 0 is RMSprop.
        beta: memory β of V.
        eps: ε, in the unit of a gradient of the mean loss; bounds G by 1/ε.
        adapt: steps for which V follows the gradients, after which it stays; ``None``: always.
        noise_estimate: as for :class:`SGLD`.
        seed: as for :class:`SGLD`.

    Raises:
        ArgumentError: a setting is out of its range.
        UnsupportedError: (in ``step``) a gradient is sparse.

    Reference: Li et al. (2016), Algorithm 1. Departures: ``adapt``; V starts at the first squared gradient rather than
    at zero, so that the first steps are not the largest.

    Example:
        >>> stiff = torch.tensor([100.0, 1.0]).expand(2000, 2)                # two thousand chains
        >>> w = torch.nn.Parameter(torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)))
        >>> sampler = PSGLD([w], lr=0.02, num_data=1, prior_precision=0.0, adapt=20, eps=0.1, seed=0)
        >>> for _ in range(400):
        ...     sampler.zero_grad()
        ...     (stiff * w**2 / 2).sum().backward()
        ...     sampler.step()
        >>> [round(v, 1) for v in (stiff[0] * w.detach().var(0)).tolist()]            # 1 and 1 at a small step
        [1.1, 1.0]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        num_data: int,
        prior_precision: float = 1.0,
        temperature: float = 1.0,
        beta: float = 0.99,
        eps: float = 1e-5,
        adapt: int | None = None,
        noise_estimate: float | str | None = None,
        seed: int | None = None,
    ) -> None:
        check_number("beta", beta, high=1.0)
        check_number("eps", eps, positive=True)
        if adapt is not None and (not isinstance(adapt, int) or adapt < 1):
            raise ArgumentError(f"adapt is {adapt!r}: it must be a positive number of steps, or None")
        super().__init__(
            params,
            lr=lr,
            num_data=num_data,
            prior_precision=prior_precision,
            temperature=temperature,
            noise_estimate=noise_estimate,
            seed=seed,
            beta=beta,
            eps=eps,
            adapt=adapt,
        )

    def _advance(
        self,
        group: dict[str, Any],
        theta: list[Tensor],
        g: list[Tensor],
        batch_noise: list[Tensor] | float,
        normal: Callable[[], list[Tensor]],
    ) -> None:
        beta, lr = group["beta"], float(group["lr"])
        fresh, follow = [], []
        for p in theta:
            state = self.state[p]
            if "square" not in state:
                state.update(square=p.grad.square(), step=0)  # type: ignore[union-attr]
                fresh.append(p)
            elif group["adapt"] is None or state["step"] < group["adapt"]:
                follow.append(p)
            state["step"] += 1
        if follow:
            squares, grads = (
                [self.state[p]["square"] for p in follow],
                [p.grad for p in follow if p.grad is not None],
            )
            torch._foreach_mul_(squares, beta)
            torch._foreach_addcmul_(squares, grads, grads, value=1 - beta)
        G = torch._foreach_sqrt([self.state[p]["square"] for p in theta])
        torch._foreach_add_(G, group["eps"])
        torch._foreach_reciprocal_(G)
        torch._foreach_addcmul_(theta, g, G, value=-lr)
        heat = 2 * lr * group["temperature"] / group["num_data"]
        if not heat:
            return
        root = torch._foreach_sqrt(G)
        # of a step −ηGg the noise of g brings η²G²V, out of 2ηTG/N
        if isinstance(batch_noise, list):
            batch_noise = list(torch._foreach_mul(batch_noise, G))
        elif batch_noise:
            batch_noise = list(torch._foreach_mul(G, batch_noise))
        noise = spread(heat, batch_noise, lr**2, normal())
        torch._foreach_addcmul_(theta, noise, root)

    def _allowed(self, group: dict[str, Any], p: Tensor) -> Tensor | float:
        lr = float(group["lr"])
        root = self.state[p]["square"].sqrt() + group["eps"]
        return 2 * group["temperature"] / (group["num_data"] * lr) * root if lr else float("inf")
