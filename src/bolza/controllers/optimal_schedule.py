r"""The learning rate as the control of a measured quadratic: measure, plan to the end of the run, act, measure again.

At each measurement :func:`local_model` finds curvature, gradient and noise along a few directions, and
:func:`plan_rates` the rates of all remaining steps that are best for them. All of it happens in the coordinates in
which the optimizer is a heavy ball, P^{1/2}θ, so that Adam's preconditioner counts.

Reference: Li, Tai & E (2017), §4.1, for the control problem. Departures: many modes at once, measured by Lanczos; the
horizon is the end of the run; a new plan at every measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bolza.controllers.controller import Controller
from bolza.controllers.local_quadratic import SPREAD_COST, LocalModel, cut, local_model, pool_of
from bolza.controllers.moments import LI
from bolza.controllers.rate_plan import RatePlan
from bolza.core.errors import ArgumentError, DivergenceError
from bolza.core.reference import cites
from bolza.ops.batches import Data, Loss, count_samples, select_parameters

__all__ = ["OptimalSchedule"]

_SLOW, _FAST = 0.05, 0.2  # weights of a new loss in its two moving means
_WORSE = 2.0  # quick mean over its value at the measurement from which on the plan is mistrusted
_LEAST_SHARE = 0.1  # of the planned rate
_START = 0.5  # with momentum, the first rates as a share of those at which plain descent would go as fast
_WARMUP = 10  # steps until a preconditioner is measured
_FEWEST, _LEAST_K = 3, 4  # measurements of a run, for which products are saved, down to so many


def known_steps(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names of the parameters whose steps are known in advance: for Adam and its kin, those that were stepped once."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    plain = isinstance(optimizer, torch.optim.SGD)
    named = select_parameters(model).items()
    return [n for n, p in named if id(p) in held and (plain or optimizer.state.get(p))]


def settled(optimizer: torch.optim.Optimizer) -> float:
    """How far Adam's momentum has come, 1 − β₁ᵗ: its first steps are longer by the inverse, which passes."""
    for group in optimizer.param_groups:
        for p in group["params"] if "betas" in group else ():
            if "step" in optimizer.state.get(p, ()):
                return 1 - float(group["betas"][0]) ** float(optimizer.state[p]["step"])
    return 1.0


@cites(LI)
class OptimalSchedule(Controller):
    r"""Plan the learning rate to the end of the run from measured curvature and noise, and again as they change.

    Each measurement takes ``samples`` training samples, finds a :class:`LocalModel`, and plans the rates of all
    remaining steps; the rate follows the plan until the next measurement. The first one is made here, before the first
    step, if the optimizer can say how it steps (SGD); with Adam and its kin after the first step. So the rate that the
    optimizer was made with hardly matters: only the ratios between groups stay.

    The quadratic is local. What guards against that: rates stay below ``safety`` times the limit of stability in mean
    square; a new plan may exceed the present rate by ``growth`` at most; measurements are dense early in the run, where
    curvature moves, at steps that grow as k²; and where the loss that is passed to ``step`` rises to twice what it
    was around the measurement, the rate is halved until the next one. Directions of negative curvature count as
    flat ones of the same size. With momentum or a preconditioner, which go farther in as many steps, the loss is
    expected to fall like one over time instead of exponentially, and with momentum the first rates are at most half of
    those at which plain descent would go as fast. The velocity at a new plan is not part of it: it starts from rest.

    Args:
        optimizer: ``torch.optim.SGD`` with any options, ``Adam``, ``AdamW`` or ``RMSprop``.
        model: the network.
        loss: ``loss(prediction, y)``, a mean over samples.
        data: the training set as one pair ``(x, y)`` or a :class:`bolza.data.Dataset`, of which random samples are
            taken; or batches, of which the first few are kept.
        steps: length of the run.
        batch_size: B of the run.
        budget: share of the run's gradients that measurements may take, a Hessian product counted as two; one
            measurement is made at least.
        every: steps between measurements, instead of ``budget``.
        samples: samples of a measurement; ``batch_size``, but at least 32, by default.
        k: Hessian products of a measurement, the directions it sees; as few as 4 where the budget has no room for three
            measurements otherwise.
        safety: largest rate, as a share of the limit of stability.
        growth: largest factor by which a new plan may raise the rate.
        pieces: pieces of a plan.
        seed: of the choice of samples.

    Attributes:
        plan: the present :class:`RatePlan`; None before.
        seen: the last :class:`LocalModel`; None in a run that was resumed, until the next one.
        seen_loss: loss at the last measurement.
        sample_gradients: gradients of single samples spent so far; a Hessian product counts as two.

    Raises:
        ArgumentError: a setting is out of range, or all learning rates are zero.
        UnsupportedError: it is not known how the optimizer steps, or the network has no second derivatives.
        DivergenceError: the gradient of the samples is not finite.

    Reference: Li, Tai & E (2017), §4.1; departures in the module's text.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> x = torch.randn(256, 3, generator=draw)
        >>> y = x.sum(1, keepdim=True) + 0.1 * torch.randn(256, 1, generator=draw)
        >>> net = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)         # far too small
        >>> schedule = OptimalSchedule(optimizer, net, nn.functional.mse_loss, (x, y), steps=60, batch_size=8)
        >>> for step in range(60):
        ...     batch = slice(8 * (step % 32), 8 * (step % 32) + 8)
        ...     optimizer.zero_grad()
        ...     nn.functional.mse_loss(net(x[batch]), y[batch]).backward()
        ...     optimizer.step()
        ...     action = schedule.step()
        >>> nn.functional.mse_loss(net(x), y).item() < 0.02
        True
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        loss: Loss,
        data: Data,
        *,
        steps: int,
        batch_size: int,
        budget: float = 0.1,
        every: int | None = None,
        samples: int | None = None,
        k: int = 6,
        safety: float = 0.5,
        growth: float = 4.0,
        pieces: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer)
        if steps < 1 or batch_size < 1 or k < 1 or pieces < 1 or (every is not None and every < 1):
            raise ArgumentError(
                f"steps is {steps}, batch_size {batch_size}, k {k}, pieces {pieces} and every {every}: all must be "
                "positive"
            )
        if not 0 < safety < 1 or not growth > 1 or not budget > 0:
            raise ArgumentError(
                f"safety is {safety}, growth {growth} and budget {budget}: safety lies between 0 and 1, growth is "
                "above 1, and budget positive"
            )
        wanted = max(batch_size, 32) if samples is None else samples
        self.pool = pool_of(data, 16 * wanted)
        self.model, self.loss = model, loss
        self.steps, self.batch_size, self.budget, self.every = steps, batch_size, budget, every
        self.samples = min(wanted, count_samples(self.pool[0]))
        if self.samples < 4:
            raise ArgumentError(f"samples={self.samples}: measuring noise needs at least 4")
        self.k, self.safety, self.growth, self.pieces, self.seed = k, safety, growth, pieces, seed
        self._count = 1  # of measurements
        if every is None:
            while self.k > _LEAST_K and self._affordable(self.k) < _FEWEST:
                self.k -= 1
            self._count = max(1, self._affordable(self.k))
        self._spread: float | None = None
        self.plan: RatePlan | None = None
        self.seen: LocalModel | None = None
        self.seen_loss: float | None = None
        self.sample_gradients = 0
        self._measured = 0
        # of one step, a preconditioner has the sign of the gradient and little else
        self._due = 0 if isinstance(optimizer, torch.optim.SGD) else max(1, min(_WARMUP, steps // 10))
        self._planned_at = 0
        self._unit = 1.0  # rate of the plan over that of the first group
        self._caution = 1.0  # share of the planned rate that is taken
        # losses: slow mean, its value at the measurement, quick mean
        self._usual: float | None = None
        self._reference: float | None = None
        self._smoothed = 0.0
        self._logged = {"sharpness": 0.0, "noise": 0.0, "planned_loss": 0.0}
        if not any(float(group["lr"]) > 0 for group in optimizer.param_groups):
            raise ArgumentError(
                "all learning rates are zero: give one, so that the ratios between groups are known"
            )
        if isinstance(optimizer, torch.optim.SGD):
            self._replan(first=True)
            self._write("lr", self._rate(0))

    def decide(self, observation: Mapping[str, Any]) -> Mapping[str, float]:
        """The plan's rate for the next step; measure and plan anew where that is due."""
        step = self.count + 1
        loss = observation.get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            return {}
        if loss is not None and self.seen_loss is not None:
            self._watch(float(loss), self.seen_loss)
        if self._due <= step < self.steps and self._names():
            self._replan(first=self.plan is None, step=step)
        return {} if self.plan is None else {"lr": self._rate(step)}

    def log(self) -> dict[str, float]:
        """Sharpness, noise (tr Σ), loss that the plan expects above the bottom; gradients spent, in batches."""
        return {**self._logged, "spent": self.sample_gradients / self.batch_size}

    def memory(self) -> dict[str, Any]:
        """The plan and the count of measurements."""
        plan = self.plan
        return {
            "plan": None if plan is None else vars(plan),
            "counts": [self._measured, self._due, self._planned_at, self.sample_gradients],
            "factors": [self._unit, self._caution, self._spread],
            "losses": [self.seen_loss, self._usual, self._reference, self._smoothed],
            "logged": self._logged,
        }

    def load_memory(self, memory: dict[str, Any]) -> None:
        """Go on with a plan; its rate is written to the optimizer."""
        self.plan = None if memory["plan"] is None else RatePlan(**memory["plan"])
        self._measured, self._due, self._planned_at, self.sample_gradients = memory["counts"]
        self._unit, self._caution, self._spread = memory["factors"]
        self.seen_loss, self._usual, self._reference, self._smoothed = memory["losses"]
        self._logged = dict(memory["logged"])
        if self.plan is not None:
            self._write("lr", self._rate(self.count))

    # ------------------------------------------------------------------------------------ parts

    def _rate(self, step: int) -> float:
        assert self.plan is not None
        return self._caution * self.plan.rate(step - self._planned_at) / self._unit

    def _watch(self, loss: float, seen: float) -> None:
        """Halve the rate where the loss rises far above what it was around the measurement."""
        self._usual = loss if self._usual is None else self._usual + _SLOW * (loss - self._usual)
        if self._reference is None:
            self._reference = self._smoothed = max(seen, self._usual)
        self._smoothed += _FAST * (loss - self._smoothed)
        if self._smoothed > _WORSE * self._reference and self._caution > _LEAST_SHARE:
            self._caution, self._smoothed = self._caution / 2, self._reference

    def _names(self) -> list[str]:
        return known_steps(self.optimizer, self.model)

    def _replan(self, *, first: bool, step: int = 0) -> None:
        from bolza.stability.limits import optimizer_limit

        names = self._names()
        params = list(select_parameters(self.model, names).values())
        of = optimizer_limit(self.optimizer, params)
        draw = torch.Generator().manual_seed(self.seed + 1000003 * self._measured)
        chosen = torch.randperm(count_samples(self.pool[0]), generator=draw)[: self.samples]
        batch = cut(self.pool, chosen, params[0].device)
        try:
            seen = local_model(
                self.model,
                self.loss,
                batch,
                products=self.k,
                batch_size=self.batch_size,
                momentum=of.momentum,
                scale=None if of.plain else of.scale().double() * settled(self.optimizer) ** 0.5,
                decay=of.decay.double() if bool(of.decay.any()) else None,
                params=names,
                spread=self._spread,
                seed=self.seed,
            )
        except DivergenceError as error:
            raise DivergenceError(
                f"{error}, at step {step}, where the learning rate was to be planned anew", step=step
            ) from error
        self._spread = seen.spread
        self.seen, self.seen_loss = seen, seen.loss
        self._caution, self._reference = 1.0, None
        self.sample_gradients += seen.sample_gradients
        ours = float(self.optimizer.param_groups[self.leader]["lr"])
        self._unit = of.unit / ours if ours > 0 else 1.0
        cap = of.limit / (2 * (1 + of.momentum))  # Nesterov's limit is lower
        allowed = self.safety * cap * seen.limit
        simple = isinstance(self.optimizer, torch.optim.SGD)
        if not first:
            allowed = min(allowed, self.growth * of.unit)
        elif (
            simple and of.momentum
        ):  # curvature rises early, and momentum is 1/(1 - μ) times as quickly beyond it
            slower = (1 - of.momentum) / (1 + of.momentum)
            allowed = min(allowed, _START * self.safety * slower * seen.limit)
        if math.isfinite(allowed) and float(seen.curvature.abs().max()) > 0:
            left = self.steps - step
            slowing = of.momentum > 0 or not simple
            self.plan = seen.plan(left, self.batch_size, allowed, of.momentum, self.pieces, slowing=slowing)
            self._planned_at = step
            self._logged = {
                "sharpness": float(seen.curvature[0]),
                "noise": float(seen.noise.sum()),
                "planned_loss": self.plan.objective,
            }
        self._measured += 1
        self._due = step + self._pause(step)

    def _affordable(self, k: int) -> int:
        """Measurements with k products that the budget has room for; the first one is dearer."""
        one = self.samples * (1 + 2 * k)
        return int((self.budget * self.steps * self.batch_size - SPREAD_COST * self.samples) // one)

    def _pause(self, step: int) -> int:
        """Steps to the next measurement: of n, the one numbered i is at steps · (i/n)²."""
        if self.every is not None:
            return self.every
        if self._measured >= self._count:
            return self.steps + 1  # none any more
        return max(1, round(self.steps * (self._measured / self._count) ** 2) - step)
