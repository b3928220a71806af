"""What a training run leaves behind."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from bolza.core.errors import DivergenceError

__all__ = ["Run", "Status"]

Status = Literal["finished", "interrupted", "diverged"]


@dataclass
class Run:
    """Curves and outcome of a training run.

    The curves have one entry per recorded step. Training values are means over the mini-batches since
    the record before (of the network as it was at each of them); test values are of the whole test set.

    Args:
        steps: optimizer steps done at each record; the first record, at 0, is made before training.
        train_loss: training loss.
        train_accuracy: share of right answers on the mini-batches; empty for regression.
        test_loss: test loss; empty without test samples.
        test_accuracy: share of right answers on the test set; empty for regression.
        status: ``'finished'``, ``'interrupted'`` or ``'diverged'``.
        step: optimizer steps done.
        total_steps: optimizer steps asked for.
        seconds: wall-clock time of training and evaluation, over all resumed parts.
        gradients: number of mini-batch gradients computed.
        samples: gradients of single samples computed, the sum of the sizes of those mini-batches.
        control_steps: steps at which ``controls`` were noted, at most a thousand.
        controls: hyper-parameters in force at each of these steps, by name: ``lr`` and the like of the first
            parameter group (``lr_1``, … of the others), ``batch_size``, and what the controller logged after the step.
        reason: one sentence on why the run stopped early; empty if it finished.
        unsaved: why the last checkpoint could not be written; empty if it was, or if none was asked for.
        failed_step: step at which a number stopped being finite.
        failed_layer: layer or parameter where it did.
        optimizer: class name of the optimizer.
        batch_size: samples in a mini-batch at the start.
        seed: seed of the order of the data and of the noise inside the network.

    Example:
        >>> run = Run(steps=[0, 10], test_accuracy=[0.1, 0.9], step=10, total_steps=10)
        >>> run.final_test_accuracy, run.status
        (0.9, 'finished')
    """

    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    status: Status = "finished"
    step: int = 0
    total_steps: int = 0
    seconds: float = 0.0
    gradients: int = 0
    samples: int = 0
    control_steps: list[int] = field(default_factory=list)
    controls: dict[str, list[float]] = field(default_factory=dict)
    reason: str = ""
    unsaved: str = ""
    failed_step: int | None = None
    failed_layer: str | None = None
    optimizer: str = ""
    batch_size: int = 0
    seed: int = 0

    @property
    def final_test_accuracy(self) -> float:
        """Last entry of ``test_accuracy``; nan where there is none."""
        return self.test_accuracy[-1] if self.test_accuracy else math.nan

    @property
    def final_test_loss(self) -> float:
        """Last entry of ``test_loss``; nan where there is none."""
        return self.test_loss[-1] if self.test_loss else math.nan

    def raise_if_diverged(self) -> Run:
        """Turn a diverged run into an exception.

        Returns:
            The run itself, if it did not diverge.

        Raises:
            DivergenceError: the run diverged; carries ``step`` and ``layer``.
        """
        if self.status == "diverged":
            raise DivergenceError(self.reason, step=self.failed_step, layer=self.failed_layer)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; numbers that are not finite become ``None``."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
