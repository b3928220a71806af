"""What the samplers share: the posterior that they sample, their random numbers, and the noise of a batch.

The user's loop computes the gradient g of the mean negative log-likelihood of a batch. With N samples of data, a
Gaussian prior of precision λ and a temperature T the law that is sampled is

    exp(−U(θ)/T),   U(θ) = N · mean loss + λ|θ|²/2,      ∇U ≈ N (g + λθ/N)

and the learning rate counts as that of SGD on the mean loss: it is N times the step on U.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bolza.core.errors import ArgumentError, UnsupportedError

__all__ = ["MomentumSampler", "Sampler", "check_number"]

_MEMORY = 0.99  # of the running estimate of the noise of a batch


def check_number(name: str, value: Any, *, high: float = math.inf, positive: bool = False) -> None:
    """Raise an ArgumentError unless ``0 <= value <= high`` (``0 < value`` if ``positive``) and finite."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    good = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    if not good or number < 0 or (positive and number == 0) or number > high:
        least = "greater than 0" if positive else "at least 0"
        most = "" if math.isinf(high) else f" and at most {high:g}"
        raise ArgumentError(f"{name} is {value!r}: it must be a finite number, {least}{most}")


class Sampler(torch.optim.Optimizer):
    """A sampler of exp(−U/T) in the place of an optimizer.

    The random numbers are a function of the seed and of the number of the step, so that a run that is restored from
    ``state_dict()`` goes on bit for bit.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, as of SGD on the mean loss.
        num_data: N.
        prior_precision: λ.
        temperature: T.
        noise_estimate: ``None``, ``"running"`` or a variance.
        seed: of the random numbers; drawn from the global generator by default.
        more: further settings of a group.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        num_data: int,
        prior_precision: float,
        temperature: float,
        noise_estimate: float | str | None,
        seed: int | None,
        **more: Any,
    ) -> None:
        check_number("lr", lr)
        check_number("num_data", num_data, positive=True)
        check_number("prior_precision", prior_precision)
        check_number("temperature", temperature)
        if isinstance(noise_estimate, str) and noise_estimate != "running":
            raise ArgumentError(
                f"noise_estimate is {noise_estimate!r}: choose 'running', a variance of the batch gradient, or None"
            )
        if noise_estimate is not None and not isinstance(noise_estimate, str):
            check_number("noise_estimate", noise_estimate)
        if seed is None:
            seed = int(torch.randint(2**31, ()))
        defaults = {
            "lr": lr,
            "num_data": num_data,
            "prior_precision": prior_precision,
            "temperature": temperature,
            "noise_estimate": noise_estimate,
            "seed": int(seed),
            "draws": 0,
            **more,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with settings of its own.

        Raises:
            ArgumentError: one of them is out of its range.
            UnsupportedError: a parameter is complex.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        limits: dict[str, dict[str, Any]] = {
            "lr": {},
            "num_data": {"positive": True},
            "prior_precision": {},
            "temperature": {},
            "friction": {"high": 1.0, "positive": True},
        }
        try:
            for name in limits.keys() & group.keys():
                check_number(name, group[name], **limits[name])
            if any(p.is_complex() for p in group["params"]):
                raise UnsupportedError(
                    "a parameter is complex: hold its real and imaginary part as two real parameters"
                )
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step of the chain; parameters without a gradient stay.

        Args:
            closure: computes the mean loss of a fresh batch and its gradients, and returns the loss.

        Returns:
            What the closure returns, ``None`` without one.

        Raises:
            UnsupportedError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            theta = [p for p in group["params"] if p.grad is not None]
            if not theta:
                continue
            g: list[Tensor] = [p.grad for p in theta]
            if any(x.is_sparse for x in g):
                raise UnsupportedError(
                    "a gradient is sparse, but noise moves every weight: make the embedding with sparse=False"
                )
            batch_noise = self._batch_noise(group, theta, g)
            if group["prior_precision"]:
                g = list(torch._foreach_add(g, theta, alpha=group["prior_precision"] / group["num_data"]))
            self._advance(group, theta, g, batch_noise, partial(_normal, theta, group, index))
            group["draws"] += 1
        return loss

    def _advance(
        self,
        group: dict[str, Any],
        theta: list[Tensor],
        g: list[Tensor],
        batch_noise: list[Tensor] | float,
        normal: Callable[[], list[Tensor]],
    ) -> None:
        """One step of a group, in place on θ; g is not to be changed."""
        raise NotImplementedError

    def _batch_noise(
        self, group: dict[str, Any], theta: list[Tensor], g: list[Tensor]
    ) -> list[Tensor] | float:
        """The variance of the mean gradient of a batch, by coordinate, as far as it is to be corrected for.

        Half the squared difference of successive gradients: unlike a variance about a running mean, it does not take
        for noise what the gradient changes as the chain moves along.
        """
        if group["noise_estimate"] is None:
            return 0.0
        if group["noise_estimate"] != "running":
            return float(group["noise_estimate"])
        states = [self.state[p] for p in theta]
        for state, p, x in zip(states, theta, g, strict=True):
            if "last_grad" not in state:
                state.update(last_grad=x.clone(), noise=torch.zeros_like(p), seen=0)
        last, noise = [s["last_grad"] for s in states], [s["noise"] for s in states]
        change = torch._foreach_sub(g, last)
        torch._foreach_copy_(last, g)
        for state in states:
            state["seen"] += 1
        # the first gradient has none before it: its zero is left out of the mean below
        torch._foreach_mul_(noise, _MEMORY)
        torch._foreach_addcmul_(noise, change, change, value=(1 - _MEMORY) / 2)
        weights = [1 / max(1 - _MEMORY ** (s["seen"] - 1), 1e-30) if s["seen"] > 1 else 0.0 for s in states]
        return list(torch._foreach_mul(noise, weights))

    def noise_excess(self) -> float:
        """The share of coordinates in which the noise of the batches alone exceeds the heat that a step may bring.

        There the chain is too hot, whatever is injected: take larger batches, or a smaller learning rate. Needs
        ``noise_estimate="running"``.

        Raises:
            UnsupportedError: the noise is not estimated, or no step was made yet.

        Example:
            >>> from bolza.bayes import SGLD
            >>> w = torch.nn.Parameter(torch.zeros(3))
            >>> sampler = SGLD([w], lr=0.1, num_data=100, noise_estimate="running", seed=0)
            >>> for sign in (1.0, -1.0):
            ...     w.grad = torch.tensor([0.0, 0.0, 5.0]) * sign
            ...     sampler.step()
            >>> round(sampler.noise_excess(), 3)
            0.333
        """
        over, total = 0, 0
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p, {})
                if state.get("seen", 0) > 1:
                    variance = state["noise"] / (1 - _MEMORY ** (state["seen"] - 1))
                    over += int((variance > self._allowed(group, p)).sum())
                    total += p.numel()
        if not total:
            raise UnsupportedError(
                "the noise of the batches is not known: pass noise_estimate='running' and make two steps first"
            )
        return over / total

    def _allowed(self, group: dict[str, Any], p: Tensor) -> Tensor | float:
        """The largest variance of the batch gradient that the step can absorb."""
        raise NotImplementedError


class MomentumSampler(Sampler):
    """A sampler whose momentum loses the share ``friction`` in every step."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        *,
        num_data: int,
        prior_precision: float = 1.0,
        temperature: float = 1.0,
        friction: float = 0.1,
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
            friction=friction,
        )


def spread(
    heat: float, batch_noise: list[Tensor] | float, factor: float, normal: list[Tensor]
) -> list[Tensor]:
    """Normal numbers of variance ``heat − factor · batch_noise``, at least 0, by coordinate."""
    if isinstance(batch_noise, float):
        scale = math.sqrt(max(heat - factor * batch_noise, 0.0))
        torch._foreach_mul_(normal, scale)
        return normal
    variance = torch._foreach_mul(batch_noise, -factor)
    torch._foreach_add_(variance, heat)
    torch._foreach_clamp_min_(variance, 0.0)
    torch._foreach_sqrt_(variance)
    torch._foreach_mul_(normal, variance)
    return normal


def momenta(sampler: Sampler, theta: list[Tensor]) -> list[Tensor]:
    """The momenta of the parameters, zeros at the start; unit mass, so that they rest at N(0, T)."""
    for p in theta:
        if "momentum" not in sampler.state[p]:
            sampler.state[p]["momentum"] = torch.zeros_like(p)
    return [sampler.state[p]["momentum"] for p in theta]


def _normal(theta: list[Tensor], group: dict[str, Any], index: int) -> list[Tensor]:
    """Standard normal numbers of the shapes of θ: one draw for all parameters of a device and dtype."""
    mixed = (
        group["seed"] * 0x9E3779B97F4A7C15 + group["draws"] * 0xC2B2AE3D27D4EB4F + index * 0x165667B19E3779F9
    ) % (2**63 - 1)
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, p in enumerate(theta):
        kinds.setdefault((p.device, p.dtype), []).append(i)
    found: list[Tensor] = [theta[0]] * len(theta)
    for (device, dtype), places in kinds.items():
        generator = torch.Generator(device).manual_seed(mixed)
        sizes = [theta[i].numel() for i in places]
        draw = torch.randn(sum(sizes), generator=generator, dtype=dtype, device=device)
        for i, part in zip(places, draw.split(sizes), strict=True):
            found[i] = part.view(theta[i].shape)
    return found
