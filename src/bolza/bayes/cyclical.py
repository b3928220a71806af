r"""A learning rate that falls from high to low again and again: each time another mode, each time samples of it.

    η_k = (η₀/2)(cos(π r) + 1),   r = (k mod L)/L,   L = ⌈K/M⌉             r < β: explore, at temperature 0
                                                                           r ≥ β: sample, at temperature T
Reference: Zhang, Li, Zhang, Chen & Wilson (2020), arXiv:1902.03932.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from bolza.bayes._sampler import check_number
from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites

__all__ = ["REFERENCE", "CyclicalSchedule", "cyclical_rate"]

REFERENCE = Reference(
    "zhang2020cyclical",
    "Zhang, Ruqi and Li, Chunyuan and Zhang, Jianyi and Chen, Changyou and Wilson, Andrew Gordon",
    "Cyclical Stochastic Gradient MCMC for Bayesian Deep Learning",
    2020,
    venue="International Conference on Learning Representations",
    arxiv="1902.03932",
)


def cyclical_rate(k: int, steps: int, cycles: int) -> tuple[float, float]:
    """Factor (cos πr + 1)/2 of the rate at step k, and the share r of the cycle that is over.

    Example:
        >>> cyclical_rate(0, 100, 4), cyclical_rate(30, 100, 4)[1]
        ((1.0, 0.0), 0.2)
    """
    length = math.ceil(steps / cycles)
    r = (k % length) / length
    return (math.cos(math.pi * r) + 1) / 2, r


@cites(REFERENCE)
class CyclicalSchedule(torch.optim.lr_scheduler.LRScheduler):
    r"""Cycles of the learning rate, with temperature 0 while it is high: η_k = (η₀/2)(cos(π (k mod L)/L) + 1).

    A learning rate scheduler for any sampler of this package: call ``step()`` after each step of the sampler, and
    collect samples where ``sampling`` is true. The last samples of a cycle are made at nearly no rate and hardly
    differ: thin by the number of cycles rather than by steps.

    Args:
        sampler: its groups have ``lr`` and ``temperature``.
        steps: K, length of the whole run.
        cycles: M; each takes ⌈K/M⌉ steps.
        exploration: β, the share of each cycle that is spent at temperature 0.
        last_epoch: as for every scheduler.

    Attributes:
        sampling: whether the chain is now in a sampling phase.
        cycle: number of the cycle, from 0.

    Raises:
        ArgumentError: a group has no temperature, or a number is out of its range.

    Reference: Zhang et al. (2020), eq. (1), Algorithm 1.

    Example:
        >>> from bolza.bayes import SGLD
        >>> sampler = SGLD([torch.nn.Parameter(torch.ones(1))], lr=1.0, num_data=10, seed=0)
        >>> schedule = CyclicalSchedule(sampler, steps=8, cycles=2, exploration=0.5)
        >>> for _ in range(4):
        ...     print(round(schedule.get_last_lr()[0], 3), sampler.param_groups[0]["temperature"], schedule.sampling)
        ...     sampler.step()
        ...     schedule.step()
        1.0 0.0 False
        0.854 0.0 False
        0.5 1.0 True
        0.146 1.0 True
    """

    def __init__(
        self,
        sampler: torch.optim.Optimizer,
        steps: int,
        cycles: int = 4,
        exploration: float = 0.8,
        last_epoch: int = -1,
    ) -> None:
        for name, value in {"steps": steps, "cycles": cycles}.items():
            if not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name} is {value!r}: it must be a positive whole number")
        if cycles > steps:
            raise ArgumentError(f"cycles is {cycles}, but there are only steps={steps}")
        check_number("exploration", exploration, high=1.0)
        for group in sampler.param_groups:
            if "temperature" not in group:
                raise ArgumentError(
                    "sampler has a group without 'temperature': a cyclical schedule is for the samplers of bolza.bayes"
                )
            group.setdefault("initial_temperature", group["temperature"])
        self.steps, self.cycles, self.exploration = steps, cycles, exploration
        self.temperatures = [group["initial_temperature"] for group in sampler.param_groups]
        self.sampling, self.cycle = False, 0
        super().__init__(sampler, last_epoch)

    def get_lr(self) -> list[Any]:
        """The rates of the groups at the present step."""
        factor, _ = cyclical_rate(self.last_epoch, self.steps, self.cycles)
        return [rate * factor for rate in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Go one step on: rates, temperatures and the phase."""
        super().step() if epoch is None else super().step(epoch)
        _, r = cyclical_rate(self.last_epoch, self.steps, self.cycles)
        self.sampling = r >= self.exploration
        self.cycle = self.last_epoch // math.ceil(self.steps / self.cycles)
        for group, temperature in zip(self.optimizer.param_groups, self.temperatures, strict=False):
            group["temperature"] = temperature if self.sampling else 0.0
