r"""Networks with weights −1, (0) and +1, trained by the maximum principle (Li & Hao, 2018).

The Hamiltonian of an affine stage is linear in its weights, ⟨p_{t+1}, W x_t⟩ = −⟨M, W⟩ with M = −Σ p_{t+1} x_tᵀ. Over
a discrete alphabet its minimiser is a sign. The signs of one batch would make all weights jump, so M is averaged,
and a weight leaves its old value only where |M| is large:

    M̄ ← M̄ + (1 − α)(M − M̄)
    binary    θ ← sign M̄                 where |M̄| > ρ m,       m = max{|M̄_kl| : sign(M̄_kl) ≠ θ_kl}
    ternary   θ ← argmax_{−1, 0, 1}  M̄ θ − λ θ² − ρ m (θ − θ_old)²

The weights are never anything else, and there are no real-valued weights behind them. In a network without any
normalisation layer they are these numbers times 1/√fan_in, a constant of each layer. The paper's M is minus the
derivative of the loss, summed over the batch; what is averaged here is that of the loss as it is.

Reference: Li & Hao (2018), *An Optimal Control Approach to Deep Learning and Applications to Discrete-Weight Neural
Networks*, arXiv:1803.01299, algorithms for binary and ternary networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core import Reference, binary_rule, cites, ternary_rule
from bolza.core.errors import ArgumentError, DivergenceError
from bolza.optim.recorded import check_number, unwrapped

__all__ = ["BinaryMSA", "TernaryMSA"]

REFERENCE = Reference(
    "li2018discrete",
    "Li, Qianxiao and Hao, Shuji",
    "An Optimal Control Approach to Deep Learning and Applications to Discrete-Weight Neural Networks",
    2018,
    arxiv="1803.01299",
)
_DISCRETE = (nn.Linear, nn.modules.conv._ConvNd)
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


class _DiscreteMSA(torch.optim.Optimizer):
    """What binary and ternary weights share: two groups, the averages, and Adam for all other parameters."""

    _kind = ""

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        alpha: float,
        anneal: float,
        betas: tuple[float, float],
        discrete: Iterable[str] | None,
        **rule: float,
    ) -> None:
        module, _ = unwrapped(model)
        check_number("lr", lr)
        check_number("alpha", alpha, high=1.0)
        check_number("anneal", anneal, open_low=True)
        for name, value in {"rho": rule["rho"], "beta": betas[0], "second beta": betas[1]}.items():
            check_number(name, value, high=float("inf") if name == "rho" else 1.0)
        if anneal > 1:
            raise ArgumentError(f"anneal is {anneal}: it is the factor of 1 − α in each step, at most 1")
        weights = _weights(module, discrete)
        chosen = {id(p) for p in weights.values()}
        rest = [p for p in module.parameters() if p.requires_grad and id(p) not in chosen]
        normalised = any(isinstance(layer, _NORMS) for layer in module.modules())
        levels = [1.0 if normalised else p[0].numel() ** -0.5 for p in weights.values()]
        groups: list[dict[str, Any]] = [
            {
                "params": list(weights.values()),
                "lr": 1 - alpha,
                "anneal": anneal,
                "kind": self._kind,
                "levels": levels,
                **rule,
            }
        ]
        if rest:
            groups.append({"params": rest, "lr": lr, "betas": betas, "kind": "adam"})
        super().__init__(groups, {"lr": lr})
        with torch.no_grad():
            for p, level in zip(weights.values(), levels, strict=True):
                p.copy_(level * self._alphabet(p))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train further parameters, by Adam."""
        others = {"kind": "adam", "betas": (0.9, 0.999)} if self.param_groups else {}
        super().add_param_group({**others, **param_group})

    @staticmethod
    def _alphabet(p: Tensor) -> Tensor:
        """The discrete weights to start from."""
        raise NotImplementedError

    @staticmethod
    def _rule(mean: Tensor, theta: Tensor, group: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step with the present gradients.

        Args:
            closure: computes the loss and its gradients, and returns the loss.

        Returns:
            What the closure returns, ``None`` without one.

        Raises:
            DivergenceError: a gradient is not finite.
            ArgumentError: something else has changed discrete weights, such as clipping, or averaging of weights.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not bool(p.grad.isfinite().all()):
                    raise DivergenceError(
                        f"the gradient of a parameter of shape {tuple(p.shape)} is not finite, and no step was made"
                    )
        for group in self.param_groups:
            levels = group.get("levels", [1.0] * len(group["params"]))
            for p, level in zip(group["params"], levels, strict=True):
                if p.grad is None:
                    continue
                if group["kind"] == "adam":
                    self._adam(p, p.grad, group)
                else:
                    self._discrete(p, p.grad, group, level)
        return loss

    def _discrete(self, p: Tensor, gradient: Tensor, group: dict[str, Any], level: float) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float64)
            state["mean"] = torch.zeros_like(p)
        share = group["lr"] * group["anneal"] ** float(state["step"])
        state["step"] += 1
        if (
            share == 0
        ):  # as at the start of a warm-up: no gradient counts, so that there is nothing to decide by
            return
        state["mean"].lerp_(-gradient, share)
        p.copy_(level * self._rule(state["mean"], p.sign(), group))

    def _adam(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float64)
            state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        k, (first, second) = float(state["step"]), group["betas"]
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].lerp_(gradient.square(), 1 - second)
        scale = (state["square"] / (1 - second**k)).sqrt_().add_(1e-8)
        p.addcdiv_(state["mean"], scale, value=-group["lr"] / (1 - first**k))


def _weights(module: nn.Module, chosen: Iterable[str] | None) -> dict[str, nn.Parameter]:
    """Weights of affine layers by name, or those that are named."""
    known: dict[str, nn.Parameter] = {
        f"{path}.weight".lstrip("."): layer.weight
        for path, layer in module.named_modules()
        if isinstance(layer, _DISCRETE)
        and isinstance(layer.weight, nn.Parameter)
        and layer.weight.requires_grad
    }
    if chosen is None:
        found = known
    else:
        wanted = [chosen] if isinstance(chosen, str) else list(chosen)
        missing = [name for name in wanted if name not in known]
        if missing:
            raise ArgumentError(
                f"discrete names {missing[0]!r}, which is no trainable weight of a linear or convolution layer: "
                f"choose from {', '.join(known) or 'none, as there is no such layer'}"
            )
        found = {name: known[name] for name in wanted}
    if not found:
        raise ArgumentError(
            "model has no linear or convolution layer with a trainable weight: there is nothing to make discrete"
        )
    once = {id(p): name for name, p in reversed(found.items())}
    return {name: p for name, p in found.items() if once[id(p)] == name}


@cites(REFERENCE)
class BinaryMSA(_DiscreteMSA):
    r"""Train a network whose linear and convolution weights are −1 and +1, without real-valued weights behind them.

    The weights become their signs when the optimizer is made, and stay −1 or +1. All other parameters (normalisation,
    biases) are trained by Adam. Follow each discrete layer by batch normalisation. In a network without any
    normalisation ±1 would make activations grow by √fan_in a layer: there the weights are ±1/√fan_in, one fixed number
    a layer.

    A step costs about what one of Adam costs, and one buffer of the size of the weights.

    Args:
        model: the network; its discrete weights are changed at once.
        lr: learning rate of Adam.
        alpha: α, how much of the average stays in a step. 1 − α is the ``lr`` of the first parameter group, so that a
            scheduler anneals it too.
        rho: ρ, the share of the largest wrong entry that an entry needs to flip its weight; 0 flips all, 1 none.
        anneal: factor of 1 − α in each step; 0.95 for each epoch of N steps is ``0.95 ** (1 / N)``. 1 for none: the
            weights then go on flipping.
        betas: of Adam.
        discrete: names of the weights to make discrete, ``'0.weight'``; all linear and convolution layers by default.

    Raises:
        ArgumentError: a number is out of its range, or a name is not that of such a weight.
        DivergenceError: in ``step``: a gradient is not finite.

    Reference: the binary algorithm; α annealed by step in place of epoch, loss and mean over the batch as given.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(),
        ...                     nn.Linear(32, 2, bias=False), nn.BatchNorm1d(2))
        >>> opt = BinaryMSA(net, lr=1e-2, alpha=0.9)
        >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> y = (x[:, 0] > x[:, 1]).long()
        >>> for _ in range(60):
        ...     opt.zero_grad()
        ...     loss = nn.functional.cross_entropy(net(x), y)
        ...     loss.backward()
        ...     opt.step()
        >>> bool(loss < 0.5), net[0].weight.unique().tolist()
        (True, [-1.0, 1.0])
    """

    _kind = "binary"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        *,
        alpha: float = 0.99,
        rho: float = 0.5,
        anneal: float = 0.998,
        betas: tuple[float, float] = (0.9, 0.999),
        discrete: Iterable[str] | None = None,
    ) -> None:
        super().__init__(model, lr, alpha, anneal, betas, discrete, rho=rho)

    @staticmethod
    def _alphabet(p: Tensor) -> Tensor:
        return torch.where(p >= 0, 1.0, -1.0).to(p.dtype)

    @staticmethod
    def _rule(mean: Tensor, theta: Tensor, group: dict[str, Any]) -> Tensor:
        return binary_rule(mean, theta, group["rho"])


@cites(REFERENCE)
class TernaryMSA(_DiscreteMSA):
    r"""Train a network whose linear and convolution weights are −1, 0 and +1.

    As :class:`BinaryMSA`, with zeros: a weight moves by one level at a time where |M̄| exceeds ρ m, and by two where it
    exceeds 3 ρ m. When the optimizer is made, the third of each weight that is nearest to zero becomes 0, the rest its
    sign; weights that are ternary already stay.

    Args:
        model: the network; its discrete weights are changed at once.
        lr: learning rate of Adam.
        alpha: as for :class:`BinaryMSA`.
        rho: ρ, threshold relative to the largest wrong entry.
        sparsity: λ, what a weight that is not zero costs, in units of the derivative of the loss.
        anneal: as for :class:`BinaryMSA`.
        betas: of Adam.
        discrete: names of the weights to make discrete.

    Raises:
        ArgumentError: a number is out of its range, or a name is not that of such a weight.
        DivergenceError: in ``step``: a gradient is not finite.

    Reference: the ternary algorithm; departures as for :class:`BinaryMSA`.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
        >>> opt = TernaryMSA(net, lr=1e-2, alpha=0.9)
        >>> sorted(net[0].weight.unique().tolist())
        [-1.0, 0.0, 1.0]
    """

    _kind = "ternary"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        *,
        alpha: float = 0.99,
        rho: float = 0.25,
        sparsity: float = 1e-7,
        anneal: float = 0.998,
        betas: tuple[float, float] = (0.9, 0.999),
        discrete: Iterable[str] | None = None,
    ) -> None:
        check_number("sparsity", sparsity)
        super().__init__(model, lr, alpha, anneal, betas, discrete, rho=rho, sparsity=sparsity)

    @staticmethod
    def _alphabet(p: Tensor) -> Tensor:
        size = p.abs()
        if bool(((size == size.max()) | (p == 0)).all()):
            return p.sign()
        smallest = size.flatten().kthvalue(max(size.numel() // 3, 1)).values
        return torch.where(size <= smallest, 0.0, p.sign()).to(p.dtype)

    @staticmethod
    def _rule(mean: Tensor, theta: Tensor, group: dict[str, Any]) -> Tensor:
        return ternary_rule(mean, theta, group["rho"], group["sparsity"])
