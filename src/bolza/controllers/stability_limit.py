r"""Keep the learning rate below the limit of stability, wherever the curvature goes.

    η ← min(η₀, safety · c/λ₁),      c/λ₁ the rate at which the steepest direction starts to grow: 2(1 + μ)/λ₁ for
                                     heavy ball, with λ₁ the largest eigenvalue of the (preconditioned) Hessian

The eigenvalue comes from a Lanczos iteration started at the last eigenvector, a few products a measurement.

Reference: Cohen, Kaur, Li, Kolter & Talwalkar (2021), *Gradient Descent on Neural Networks Typically Occurs at the Edge
of Stability*, for the limit; Cohen et al. (2022) for preconditioned optimizers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bolza.controllers.controller import Controller
from bolza.controllers.local_quadratic import cut, pool_of
from bolza.controllers.optimal_schedule import known_steps, settled
from bolza.core.errors import ArgumentError, DivergenceError
from bolza.core.reference import cites
from bolza.ops.batches import Data, Loss, count_samples
from bolza.stability.landscape import Sharpness
from bolza.stability.limits import COHEN, COHEN_ADAPTIVE

__all__ = ["StabilityLimit", "StabilityWarning"]


# steps of measurements that are made whatever they cost: curvature moves most at the start
_EARLY = (4, 36)


class StabilityWarning(UserWarning):
    """A learning rate lies beyond what the curvature of the loss allows."""


@cites(COHEN, COHEN_ADAPTIVE)
class StabilityLimit(Controller):
    r"""Keep the learning rate below a share of the limit of stability, η = min(η₀, safety · 2(1 + μ)/λ₁).

    The rates that the optimizer was made with, η₀, are kept where they are stable, and taken up again where the
    curvature allows them again; all groups are lowered by the same factor. The first measurement is made here, before
    the first step; with Adam and its kin, whose preconditioner is not known before, after the first step.

    The limit is that of the full batch. Mini-batches lower it, by 1 + 2/B in linear regression; ``safety`` leaves room
    for them, and for what the curvature does until the next measurement.

    Args:
        optimizer: ``torch.optim.SGD`` with any options, ``Adam``, ``AdamW`` or ``RMSprop``.
        model: the network.
        loss: ``loss(prediction, y)``.
        data: the training set as one pair ``(x, y)`` or a :class:`bolza.data.Dataset`, of which ``samples`` random ones
            are measured, always the same; or batches, of which the first are.
        safety: share of the limit, between 0 and 1; at 0.5 the steepest direction is at rest after one step.
        batch_size: samples of a step of the run, for ``budget``.
        budget: share of the gradients so far that measurements may have taken, a Hessian product counted as two. The
            first three, before steps 0, 4 and 36, are made whatever they cost, some 30 gradients.
        every: steps between measurements, instead of ``budget``.
        samples: samples that the curvature is that of.
        tol: relative accuracy of λ₁.
        max_products: Hessian products of the first measurement at most; later ones, which start at the last
            eigenvector, take a third.
        warn: tell, once, when the rate has to be lowered.
        seed: of the choice of samples, and of the first direction.

    Attributes:
        sample_gradients: gradients of single samples spent so far; a Hessian product counts as two.

    Raises:
        ArgumentError: a setting is out of range.
        UnsupportedError: the limit of the optimizer is not known, or the network has no second derivatives.
        DivergenceError: the loss or the curvature is not finite.
        StabilityWarning: (as a warning) the rate was beyond its limit.

    Reference: Cohen et al. (2021), §2; Cohen et al. (2022). Departure: there the limit is observed, here it is kept.

    Example:
        >>> net, x = nn.Linear(2, 1, bias=False), torch.diag(torch.tensor([1.0, 2.0]))
        >>> half = lambda z, y: (z - y).square().sum() / 2                        # curvatures 1 and 4
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=10.0)
        >>> limit = StabilityLimit(optimizer, net, half, (x, torch.zeros(2, 1)), warn=False)
        >>> round(optimizer.param_groups[0]["lr"], 4)                             # half of 2/4
        0.25
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        loss: Loss,
        data: Data,
        *,
        safety: float = 0.5,
        batch_size: int = 32,
        budget: float = 0.1,
        every: int | None = None,
        samples: int = 32,
        tol: float = 0.05,
        max_products: int = 8,
        warn: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer)
        if not 0 < safety <= 1 or not budget > 0 or batch_size < 1 or samples < 1 or max_products < 2:
            raise ArgumentError(
                f"safety is {safety}, budget {budget}, batch_size {batch_size}, samples {samples} and max_products "
                f"{max_products}: safety lies between 0 and 1, max_products is at least 2, the others are positive"
            )
        if every is not None and every < 1:
            raise ArgumentError(f"every={every} must be at least 1 step")
        pool = pool_of(data, samples)
        count = count_samples(pool[0])
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
        device = next(iter(model.parameters())).device
        self.model, self.loss, self.data = model, loss, cut(pool, chosen, device)
        self.safety, self.budget, self.every, self.warn = safety, budget, every, warn
        self.batch_size, self.samples = batch_size, min(samples, count)
        self.tol, self.max_products, self.seed = tol, max_products, seed
        self.sharpness: Sharpness | None = None
        self.sample_gradients = 0
        self._given = [float(group["lr"]) for group in optimizer.param_groups]
        self._share = 1.0  # of the given rates
        self._due = 1
        self._seen = {"sharpness": 0.0, "edge": 0.0}
        if isinstance(optimizer, torch.optim.SGD):
            self._measure(0)
            self._write("lr", [self._share * lr for lr in self._given])

    def decide(self, observation: Mapping[str, Any]) -> Mapping[str, Any]:
        """Measure where that is due; the given rates, or what is stable of them."""
        step = self.count + 1
        if not math.isfinite(float(observation.get("loss", 0.0))):
            return {}
        if step >= self._due and known_steps(self.optimizer, self.model):
            self._measure(step)
        return {"lr": [self._share * lr for lr in self._given]}

    def log(self) -> dict[str, float]:
        """Sharpness, its share of the limit at the given rates, and gradients spent, in batches."""
        return {**self._seen, "spent": self.sample_gradients / self.batch_size}

    def memory(self) -> dict[str, Any]:
        """The last eigenvector and the factor."""
        sharp = self.sharpness
        return {
            "sharpness": None if sharp is None else sharp.state_dict(),
            "params": None if sharp is None else self._names,
            "given": self._given,
            "numbers": [self._share, self._due, self.sample_gradients],
            "seen": self._seen,
            "warn": self.warn,
        }

    def load_memory(self, memory: dict[str, Any]) -> None:
        """Go on from there; the rates are written to the optimizer."""
        if memory["sharpness"] is not None:
            self._make(memory["params"]).load_state_dict(memory["sharpness"])
        self._given, self.warn = list(memory["given"]), memory["warn"]
        self._share, self._due, self.sample_gradients = memory["numbers"]
        self._seen = dict(memory["seen"])
        self._write("lr", [self._share * lr for lr in self._given])

    def _make(self, names: list[str]) -> Sharpness:
        self._names = names
        self.sharpness = Sharpness(
            self.model,
            self.loss,
            self.data,
            tol=self.tol,
            max_products=self.max_products,
            params=names,
            seed=self.seed,
        )
        return self.sharpness

    def _measure(self, step: int) -> None:
        warm = self.sharpness is not None
        sharp = self.sharpness or self._make(known_steps(self.optimizer, self.model))
        sharp.max_products = max(2, self.max_products // 3) if warm else self.max_products
        try:
            point = sharp.measure(self.optimizer, step)
        except DivergenceError as error:
            raise DivergenceError(
                f"{error}, at step {step}, where curvature was to be measured", step=step
            ) from error
        sharp.history = [point]  # its length is the seed of the next measurement
        cost = self.samples * (1 + 2 * point.products)
        self.sample_gradients += cost
        if not math.isfinite(point.sharpness):
            raise DivergenceError(f"the curvature of the loss is {point.sharpness} at step {step}", step=step)
        edge = max(point.edge, 0.0) * settled(self.optimizer) / self._share  # at the given rates
        self._seen = {"sharpness": point.sharpness, "edge": edge}
        self._share = self.safety / edge if edge > self.safety else 1.0
        self._due = step + self._pause(step, cost)
        if self._share < 1 and self.warn:
            self.warn = False
            warnings.warn(
                f"the learning rate {self._given[0]:g} is {edge:.2g} times the limit of stability at step {step}: it "
                f"is lowered to {self._share * self._given[0]:.3g}, which is {self.safety:g} times the limit",
                StabilityWarning,
                stacklevel=4,
            )

    def _pause(self, step: int, cost: int) -> int:
        """Steps to the next measurement."""
        if self.every is not None:
            return self.every
        for early in _EARLY:
            if step < early:
                return early - step
        affordable = (self.sample_gradients + cost) / (self.budget * self.batch_size)
        return max(_EARLY[-1], math.ceil(affordable) - step)
