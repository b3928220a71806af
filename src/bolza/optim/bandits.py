r"""EXP3: choosing among a few arms when rewards may change in any way.

p_k = (1 − γ) w_k / Σ_j w_j + γ/K,     w_k ← w_k exp(γ r / (K p_k))
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites

__all__ = ["Exp3"]

REFERENCE = Reference(
    "auer2002bandit",
    "Auer, Peter and Cesa-Bianchi, Nicolò and Freund, Yoav and Schapire, Robert E.",
    "The Nonstochastic Multiarmed Bandit Problem",
    2002,
    venue="SIAM Journal on Computing",
    doi="10.1137/S0097539701398375",
)


@cites(REFERENCE)
class Exp3:
    r"""Bandit for rewards that follow no law: exponential weights with exploration.

        p_k = (1 − γ) w_k / Σ_j w_j + γ/K,     w_k ← w_k exp(γ r / (K p_k))

    for the arm k that was drawn and its reward r. Its expected gain is at most 2.63 √(n K log K) below that of the
    best single arm after n draws with γ = min(1, √(K log K / ((e − 1) n))).

    Args:
        arms: number of arms K.
        exploration: γ in (0, 1].
        log_weights: log w to start from, one number an arm; zeros by default.

    Raises:
        ArgumentError: there is no arm, γ is outside its range, or the weights are not one an arm.

    Reference: Auer et al. (2002), algorithm Exp3 and corollary 3.2. Departure: logarithms of the weights are kept,
        less their largest, which changes no probability.

    Example:
        >>> bandit = Exp3(2, exploration=0.2)
        >>> bandit.update(1, reward=1.0)
        >>> [round(p, 4) for p in bandit.probabilities()]
        [0.4601, 0.5399]
    """

    def __init__(
        self, arms: int, exploration: float = 0.1, log_weights: Sequence[float] | None = None
    ) -> None:
        if arms < 1:
            raise ArgumentError(f"arms is {arms}: there must be at least one")
        if not 0 < exploration <= 1:
            raise ArgumentError(f"exploration is {exploration}: choose a number above 0, at most 1")
        if log_weights is not None and len(log_weights) != arms:
            raise ArgumentError(
                f"log_weights has {len(log_weights)} entries for {arms} arms: give one an arm"
            )
        self.arms = arms
        self.exploration = exploration
        self.log_weights = [0.0] * arms if log_weights is None else [float(w) for w in log_weights]

    def probabilities(self) -> list[float]:
        """Probability of each arm."""
        weights = [math.exp(w - max(self.log_weights)) for w in self.log_weights]
        total, gamma = math.fsum(weights), self.exploration
        return [(1 - gamma) * w / total + gamma / self.arms for w in weights]

    def draw(self, generator: torch.Generator | None = None) -> int:
        """Draw an arm.

        Args:
            generator: of the random number; torch's own by default.
        """
        p = torch.tensor(self.probabilities(), dtype=torch.float64)
        return int(torch.multinomial(p, 1, generator=generator))

    def update(self, arm: int, reward: float) -> None:
        """Take in the reward of the arm that was drawn.

        Args:
            arm: its number.
            reward: from 0 to 1.

        Raises:
            ArgumentError: the reward is outside its range, or not a number.
        """
        if not 0 <= reward <= 1:
            raise ArgumentError(f"reward is {reward}: scale rewards to lie between 0 and 1")
        self.log_weights[arm] += self.exploration * reward / (self.arms * self.probabilities()[arm])
        largest = max(self.log_weights)
        self.log_weights = [w - largest for w in self.log_weights]
