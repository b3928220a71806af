r"""Any network with a Gaussian in the place of every weight.

    q(θ) = N(μ, σ²),   σ = log(1 + e^ρ),       minimise over μ, ρ:     E_q[mean loss]  +  KL(q ‖ N(0, 1/λ)) / N

Of a loss ½a(w − b)² at w = μ + σε, the data b of mean 0 and variance s², the gradients have the moments

    E g_μ = aμ,   Var g_μ = a²(σ² + s²)            E g_σ = aσ,   Var g_σ = a²(μ² + 2σ² + s²)

The part with σ is the noise of the drawn weights, the rest that of the data; only the latter is left as σ → 0.

Reference: Winkler, Ojeda & Opper (2022), for the two kinds of noise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites

__all__ = ["WINKLER", "GradientMoments", "MeanField", "gradient_moments"]

WINKLER = Reference(
    "winkler2022stochastic",
    "Winkler, Ludwig and Ojeda, César and Opper, Manfred",
    "Stochastic Control for Bayesian Neural Network Training",
    2022,
    venue="Entropy 24",
)


@dataclass(frozen=True)
class GradientMoments:
    """Mean and variance of the gradients of a Gaussian weight.

    Attributes:
        mean: E g_μ.
        mean_variance: Var g_μ.
        scale: E g_σ.
        scale_variance: Var g_σ.
        mean_data: the part of Var g_μ that the data bring; the rest is that of the drawn weights.
        scale_data: the part of Var g_σ that the data bring.
    """

    mean: Tensor
    mean_variance: Tensor
    scale: Tensor
    scale_variance: Tensor
    mean_data: Tensor
    scale_data: Tensor


@cites(WINKLER)
def gradient_moments(
    curvature: Tensor | float, mean: Tensor | float, scale: Tensor | float, data: Tensor | float
) -> GradientMoments:
    r"""Moments of the gradients of a Gaussian weight on a quadratic loss: E g_μ = aμ, Var g_μ = a²(σ² + s²), and of σ.

    For σ they are E g_σ = aσ and Var g_σ = a²(μ² + 2σ² + s²); the loss is ½a(w − b)² at w = μ + σε.

    Args:
        curvature: a.
        mean: μ, from the mean of the data.
        scale: σ.
        data: s, standard deviation of b.

    Returns:
        GradientMoments, of the shape that the arguments broadcast to. The data's part of Var g_σ is a²s²: what is left
        of g_σ = a(μ + σε − b)ε at σ = 0 and μ = 0.

    Reference: Winkler, Ojeda & Opper (2022); the closed form is ours.

    Example:
        >>> found = gradient_moments(2.0, 0.7, 0.4, 0.3)
        >>> [round(float(v), 4) for v in (found.mean, found.mean_variance, found.scale, found.scale_variance)]
        [1.4, 1.0, 0.8, 3.6]
    """
    a, mu, sigma, s = torch.broadcast_tensors(*(torch.as_tensor(v) for v in (curvature, mean, scale, data)))
    square = a.square()
    data_part = square * s.square()
    return GradientMoments(
        a * mu,
        square * sigma.square() + data_part,
        a * sigma,
        square * (mu.square() + 2 * sigma.square()) + data_part,
        data_part,
        data_part.clone(),
    )


@cites(WINKLER)
class MeanField(nn.Module):
    r"""Any network with a Gaussian N(μ, σ²) in the place of every weight, μ and σ = log(1 + e^ρ) trained.

    In training mode each call draws new weights; in evaluation mode the weights are the means. The loss of your loop is
    the mean loss of a batch plus ``kl() / N``. After training, `sample` gives weights for `predict`.

    Args:
        model: the network; it is copied. Parameters that are frozen stay numbers.
        prior_precision: λ of the Gaussian prior N(0, 1/λ) of every weight.
        scale: σ at the start, one number.
        names: parameters that become Gaussians; all that are trained by default.
        generator: of the drawn weights, on their device; the global one by default.

    Attributes:
        module: the copy, with the means for weights: a network of its own.
        names: of the Gaussian weights.
        rho: ρ, in their order.

    Raises:
        ArgumentError: a number is not positive, a name is unknown, or there is nothing to train.

    Reference: Winkler, Ojeda & Opper (2022), §2; one draw for a batch.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> net = MeanField(nn.Linear(1, 1, bias=False), prior_precision=1.0, scale=0.3, generator=draw)
        >>> x = torch.randn(50, 1, generator=draw)
        >>> optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        >>> for _ in range(400):                                    # y = 2x + noise of variance 1
        ...     loss = ((net(x) - 2 * x) ** 2).mean() / 2 + net.kl() / 50
        ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
        >>> exact = 1 / (1 + x.square().sum())                      # variance of the posterior
        >>> round((net.scales()["weight"] / exact.sqrt()).item(), 1)
        1.0
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        prior_precision: float = 1.0,
        scale: float = 0.02,
        names: Iterable[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for word, value in (("prior_precision", prior_precision), ("scale", scale)):
            if not 0 < value < math.inf:
                raise ArgumentError(f"{word} is {value!r}: it must be positive and finite")
        self.module = copy.deepcopy(model)
        known = {n: p for n, p in self.module.named_parameters() if p.requires_grad and p.is_floating_point()}
        self.names = list(known) if names is None else list(names)
        unknown = [name for name in self.names if name not in known]
        if unknown or not self.names:
            raise ArgumentError(
                f"names holds {unknown}, which the model does not train: choose from {list(known)}"
            )
        rho = scale + math.log(-math.expm1(-scale))  # log(eˢ − 1)
        self.rho = nn.ParameterList(torch.full_like(known[name], rho) for name in self.names)
        self.prior_precision, self.generator = float(prior_precision), generator
        self._drawn: list[Tensor] = []

    def means(self) -> dict[str, nn.Parameter]:
        """μ by name."""
        own = dict(self.module.named_parameters())
        return {name: own[name] for name in self.names}

    def scales(self) -> dict[str, Tensor]:
        """σ by name."""
        return {name: F.softplus(rho) for name, rho in zip(self.names, self.rho, strict=True)}

    def groups(self) -> list[dict[str, Any]]:
        """Means and scales as two parameter groups, named; with the parameters that stayed numbers in a third."""
        means = list(self.means().values())
        ids = {id(p) for p in (*means, *self.rho)}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in ids]
        found: list[dict[str, Any]] = [
            {"params": means, "name": "mean"},
            {"params": list(self.rho), "name": "scale"},
        ]
        return [*found, {"params": rest, "name": "rest"}] if rest else found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network with drawn weights, in evaluation mode with their means."""
        if not self.training:
            return self.module(*args, **kwargs)
        weights = {}
        for (name, mean), scale in zip(self.means().items(), self.scales().values(), strict=True):
            noise = torch.randn(mean.shape, generator=self.generator, dtype=mean.dtype, device=mean.device)
            weights[name] = torch.addcmul(mean, scale, noise)
        self._drawn = [w.detach() for w in weights.values()]
        return functional_call(self.module, weights, args, kwargs)

    def drawn(self, mean: Tensor) -> Tensor | None:
        """The weight that the last call drew for a mean; None for other parameters, or if nothing was drawn yet."""
        for own, w in zip(self.means().values(), self._drawn, strict=False):
            if own is mean:
                return w
        return None

    def kl(self) -> Tensor:
        r"""Kullback–Leibler divergence from the prior, in nats: Σ ½ [λ(μ² + σ²) − 1 − log(λσ²)]."""
        total: Tensor | float = 0.0
        for mean, scale in zip(self.means().values(), self.scales().values(), strict=True):
            ratio = self.prior_precision * scale.square()
            total = total + (self.prior_precision * mean.square() + ratio - 1 - ratio.log()).sum() / 2
        return torch.as_tensor(total)

    @torch.no_grad()
    def sample(self, draws: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Independent draws of the weights by name, each ``(draws, *shape)``, as `predict` takes them.

        Args:
            draws: their number.
            generator: of the draws; that of the network by default.

        Raises:
            ArgumentError: draws is not positive.
        """
        if draws < 1:
            raise ArgumentError(f"draws is {draws}: it must be at least 1")
        found = {}
        for (name, mean), scale in zip(self.means().items(), self.scales().values(), strict=True):
            noise = torch.randn(
                (draws, *mean.shape),
                generator=generator or self.generator,
                dtype=mean.dtype,
                device=mean.device,
            )
            found[name] = mean + scale * noise
        return found

    def __getstate__(self) -> dict[str, Any]:
        """All but the weights of the last call."""
        return self.__dict__ | {"_drawn": []}
