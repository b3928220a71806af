r"""Descent of the local entropy, which prefers wide valleys (Chaudhari et al., 2017).

The local entropy of a loss f at w, with scope γ, is

    F(w) = −log ∫ exp(−f(w′) − ½ γ |w − w′|²) dw′,      ∇F(w) = γ (w − ⟨w′⟩)

where ⟨·⟩ is the mean of the Gibbs law in the integral. A chain of L steps of noisy descent estimates it,

    d = ∇f(w′) with Nesterov momentum,   w′ ← w′ − η (d + γ (w′ − w)) + ε √(2η) ξ,   μ ← α μ + (1 − α) w′

from w′ = μ = w, and then w ← w − ζ (w − μ). The scope grows, γ = γ₀ (1 + γ₁)^t after t outer steps. F solves a
Hamilton–Jacobi equation with viscosity, in which 1/γ plays the part of time: it is the loss, smoothed.

Reference: Chaudhari, Choromanska, Soatto, LeCun, Baldassi, Borgs, Chayes, Sagun & Zecchina (2017), *Entropy-SGD:
Biasing Gradient Descent Into Wide Valleys*, arXiv:1611.01838.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bolza.core import Reference, cites
from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.optim.recorded import check_number

__all__ = ["REFERENCE", "EntropySGD", "langevin_step"]

REFERENCE = Reference(
    "chaudhari2017entropy",
    "Chaudhari, Pratik and Choromanska, Anna and Soatto, Stefano and LeCun, Yann and Baldassi, Carlo and "
    "Borgs, Christian and Chayes, Jennifer and Sagun, Levent and Zecchina, Riccardo",
    "Entropy-SGD: Biasing Gradient Descent Into Wide Valleys",
    2017,
    venue="International Conference on Learning Representations",
    arxiv="1611.01838",
)


@cites(REFERENCE)
def langevin_step(
    inner: Tensor, direction: Tensor, center: Tensor, lr: float, gamma: float, noise: Tensor | float = 0.0
) -> Tensor:
    r"""One step of the inner chain, w′ − η (d + γ (w′ − w)) + √(2η) · noise.

    With d = ∇f and noise of variance ε² it is Langevin dynamics at temperature ε² of f(w′) + ½ γ |w′ − w|².

    Args:
        inner: w′.
        direction: d, the gradient of the loss at w′, or one with momentum.
        center: w, of the same shape.
        lr: step size η.
        gamma: scope γ.
        noise: ε ξ, drawn by the caller.

    Returns:
        The new w′.

    Example:
        >>> langevin_step(torch.tensor(2.0), torch.tensor(1.0), torch.tensor(0.0), lr=0.1, gamma=0.5)
        tensor(1.8000)
    """
    return inner - lr * (direction + gamma * (inner - center)) + math.sqrt(2 * lr) * noise


@cites(REFERENCE)
class EntropySGD(torch.optim.Optimizer):
    r"""Stochastic descent of the local entropy: an inner chain of noisy steps, then a step towards its mean.

        w′ ← w′ − η (d + γ (w′ − w)) + ε √(2η) ξ,   after L of these   w ← w − ζ (w − μ)

    with the letters of :mod:`bolza.optim.entropy`. Each ``step()`` takes one gradient and makes one step of the inner
    chain; every ``inner_steps`` of them the outer step follows. So each batch counts once, an ordinary training
    loop draws a fresh one for every inner step as the method needs, and budgets compare by calls of ``step``. In
    between the parameters are those of the chain; :meth:`at_center` has those of the outer iteration.

    With ``inner_steps=0`` it is ``torch.optim.SGD`` with Nesterov momentum.

    Args:
        params: parameters or groups.
        lr: step size η of the inner chain, in units of the gradient.
        inner_steps: length L of the chain.
        gamma: scope γ₀ at the start: large keeps the chain near its centre.
        scoping: growth γ₁ of the scope with each outer step.
        outer: share ζ of the way to the mean of the chain that the outer step goes.
        momentum: Nesterov momentum of the chain, which starts anew with it.
        outer_momentum: Nesterov momentum of the outer steps.
        average: α, weight of the old mean.
        noise: ε; the temperature of the chain is ε².
        weight_decay: L2 term in the gradient.
        seed: of the noise, which is a function of the seed and the number of the step only.

    Raises:
        ArgumentError: an argument makes no sense.
        UnsupportedError: (in ``step``) a gradient is sparse.

    Reference: Chaudhari et al. (2017), arXiv:1611.01838, Algorithm 1 and §4.3. Departures: the gradient at the centre,
    which the outer step does not use, is not computed apart; the step length of the chain follows the learning rate.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([4.0]))
        >>> optimizer = EntropySGD([w], lr=0.1, inner_steps=5)
        >>> for _ in range(50):
        ...     optimizer.zero_grad()
        ...     (w**2).sum().backward()
        ...     optimizer.step()
        >>> abs(w.item()) < 1.0
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        inner_steps: int = 20,
        gamma: float = 0.01,
        scoping: float = 1e-3,
        outer: float = 1.0,
        momentum: float = 0.9,
        outer_momentum: float = 0.0,
        average: float = 0.75,
        noise: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        seed: int = 0,
    ) -> None:
        for name, value in {
            "lr": lr,
            "gamma": gamma,
            "scoping": scoping,
            "outer": outer,
            "noise": noise,
        }.items():
            check_number(name, value)
        for name, value in {
            "momentum": momentum,
            "outer_momentum": outer_momentum,
            "average": average,
        }.items():
            check_number(name, value, high=1.0)
        check_number("weight_decay", weight_decay)
        if not isinstance(inner_steps, int) or inner_steps < 0:
            raise ArgumentError(
                f"inner_steps is {inner_steps!r}: it must be a whole number, 0 for ordinary descent"
            )
        defaults = {
            "lr": lr,
            "inner_steps": inner_steps,
            "gamma": gamma,
            "scoping": scoping,
            "outer": outer,
            "momentum": momentum,
            "outer_momentum": outer_momentum,
            "average": average,
            "noise": noise,
            "weight_decay": weight_decay,
            "seed": int(seed),
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step of the inner chain, and the outer step if the chain is complete.

        Args:
            closure: computes the loss of a fresh batch and its gradients, and returns the loss.

        Returns:
            What the closure returns, ``None`` without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        index = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._advance(p, group, index)
                index += 1
        return loss

    def _advance(self, p: Tensor, group: dict[str, Any], index: int) -> None:
        state = self.state[p]
        length = group["inner_steps"]
        done = state.get("chain", 0)
        if done == 0 and length:
            state["center"], state["mean"] = p.clone(), p.clone()
            state.pop("momentum_buffer", None)
        grad: Tensor = p.grad  # type: ignore[assignment]
        if grad.is_sparse:
            raise UnsupportedError(
                "a gradient is sparse, but the chain moves every weight: make the embedding with sparse=False"
            )
        if group["weight_decay"]:
            grad = grad.add(p, alpha=group["weight_decay"])
        direction = _nesterov(state, "momentum_buffer", grad, group["momentum"])
        if not length:
            p.add_(direction, alpha=-group["lr"])
            return
        noise: Tensor | float = 0.0
        if group["noise"]:
            noise = group["noise"] * _draw(p, group["seed"], state.get("step", 0), index)
        gamma = group["gamma"] * (1 + group["scoping"]) ** state.get("outer", 0)
        p.copy_(langevin_step(p, direction, state["center"], float(group["lr"]), gamma, noise))
        state["mean"].lerp_(p, 1 - group["average"])
        state["step"] = state.get("step", 0) + 1
        state["chain"] = done + 1
        if state["chain"] >= length:
            center = state["center"]
            towards = _nesterov(state, "outer_buffer", center - state["mean"], group["outer_momentum"])
            p.copy_(center.sub_(towards, alpha=group["outer"]))
            state["chain"], state["outer"] = 0, state.get("outer", 0) + 1

    @contextmanager
    def at_center(self) -> Iterator[None]:
        """Have the parameters of the outer iteration in place of those of the chain, to evaluate or save them.

        Example:
            >>> w = torch.nn.Parameter(torch.tensor([4.0]))
            >>> optimizer = EntropySGD([w], lr=0.1, inner_steps=5)
            >>> w.grad = torch.ones(1)
            >>> optimizer.step()
            >>> with optimizer.at_center():
            ...     print(w.item())
            4.0
        """
        moved = [
            (p, p.detach().clone(), self.state[p]["center"])
            for group in self.param_groups
            for p in group["params"]
            if p in self.state and self.state[p].get("chain", 0)
        ]
        with torch.no_grad():
            for p, _, center in moved:
                p.copy_(center)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, inner, _ in moved:
                    p.copy_(inner)


def _nesterov(state: dict[str, Any], key: str, grad: Tensor, momentum: float) -> Tensor:
    if not momentum:
        return grad
    if key in state:
        state[key].mul_(momentum).add_(grad)
    else:
        state[key] = grad.clone()
    return grad.add(state[key], alpha=momentum)


def _draw(p: Tensor, seed: int, step: int, index: int) -> Tensor:
    """Standard normal numbers, the same for every process and after a restart."""
    mixed = (seed * 0x9E3779B1 + step * 0x85EBCA6B + index * 0xC2B2AE35) % (2**32 - 1)
    generator = torch.Generator(p.device).manual_seed(mixed)
    return torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device)
