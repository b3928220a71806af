"""How much of the training time may go into watching, and who has had how much."""

from __future__ import annotations

from typing import Any

from bolza.core.errors import ArgumentError

__all__ = ["Budget"]

_PAUSE = 5.0  # of a gap longer than this many usual steps, only so much counts as training


class Budget:
    """Seconds of training, and seconds of watching that may be spent on them.

    A piece of work is let in if, at its usual cost, the sum of all that was spent stays below ``share`` times the
    seconds of training so far. Only a run that costs more than was known before can go beyond; then nothing is let
    in until training has caught up. An entry of ``usual`` that is made before the first run replaces the guess.

    Args:
        share: watching time per training time.

    Attributes:
        trained: seconds of training.
        notes: seconds of what is done at every step.
        spent: seconds by name of the other work.
        runs: how often each was done.
        usual: typical seconds of one run of each.
        beyond: seconds that were asked for outside the budget, by name.

    Raises:
        ArgumentError: ``share`` is not positive.

    Example:
        >>> budget = Budget(0.1)
        >>> for _ in range(100):
        ...     budget.train(0.01)
        >>> budget.allows("sharpness", guess=0.05), budget.allows("sharpness", guess=0.2)
        (True, False)
        >>> budget.charge("sharpness", 0.04)
        >>> round(budget.share_spent, 6), budget.allows("sharpness", guess=0.2)
        (0.04, True)
    """

    def __init__(self, share: float) -> None:
        if not 0 < share < float("inf"):
            raise ArgumentError(
                f"budget={share} must be positive: it is a share of the training time, such as 0.1"
            )
        self.share = share
        self.trained = 0.0
        self.steps = 0
        self.notes = 0.0
        self.spent: dict[str, float] = {}
        self.runs: dict[str, int] = {}
        self.usual: dict[str, float] = {}
        self.beyond: dict[str, float] = {}

    @property
    def total(self) -> float:
        """Seconds spent within the budget."""
        return self.notes + sum(self.spent.values())

    @property
    def share_spent(self) -> float:
        """Seconds of watching per second of training."""
        return self.total / self.trained if self.trained else 0.0

    @property
    def step(self) -> float:
        """Seconds of a usual training step."""
        return self.trained / self.steps if self.steps else 0.0

    def train(self, seconds: float) -> None:
        """Count the time of one training step; of a long pause, only a part."""
        if self.steps > 10 and seconds * self.steps > _PAUSE * self.trained:
            seconds = _PAUSE * self.trained / self.steps
        self.steps += 1
        self.trained += seconds

    def allows(self, name: str, guess: float) -> bool:
        """Whether one more run of ``name`` fits; ``guess`` is its cost while none is known."""
        return self.total + self.usual.get(name, guess) <= self.share * self.trained

    def turn(self, name: str) -> tuple[float, float]:
        """Whose turn it is: the work that had least, and of those that had nothing, the cheapest."""
        return self.spent.get(name, 0.0), self.usual.get(name, 0.0)

    def charge(self, name: str, seconds: float, *, inside: bool = True) -> None:
        """Note what a run of ``name`` cost."""
        if not inside:
            self.beyond[name] = self.beyond.get(name, 0.0) + seconds
            return
        self.spent[name] = self.spent.get(name, 0.0) + seconds
        self.runs[name] = self.runs.get(name, 0) + 1
        # the first run pays for what later ones find prepared
        old = self.usual.get(name, seconds) if self.runs[name] > 2 else seconds
        self.usual[name] = old + 0.3 * (seconds - old)

    def state_dict(self) -> dict[str, Any]:
        """What was spent."""
        return {
            "trained": self.trained,
            "notes": self.notes,
            "steps": self.steps,
            "spent": dict(self.spent),
            "runs": dict(self.runs),
            "usual": dict(self.usual),
            "beyond": dict(self.beyond),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, value in state.items():
            setattr(self, name, dict(value) if isinstance(value, dict) else value)
