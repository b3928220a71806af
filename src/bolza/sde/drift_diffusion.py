r"""Drift and diffusion of each layer along a run: when the noise of the gradient overtakes the gradient.

    signal to noise of a step = B |∇f|² / tr Σ          per layer; above 1 the run drifts, below 1 it diffuses

|∇f|² and tr Σ are unbiased estimates for the population (:mod:`bolza.sde.gradient_noise`), with jackknife
errors over samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites
from bolza.ops.krylov import Estimate
from bolza.sde.gradient_noise import gradient_noise

__all__ = ["DriftDiffusion", "phase_transition"]

REFERENCE = Reference(
    key="shwartzziv2017opening",
    authors="Shwartz-Ziv, Ravid and Tishby, Naftali",
    title="Opening the Black Box of Deep Neural Networks via Information",
    year=2017,
    arxiv="1703.00810",
)

WHOLE = "all layers"


@cites(REFERENCE)
def phase_transition(
    steps: Sequence[float], ratios: Sequence[Estimate], threshold: float = 1.0
) -> Estimate | None:
    r"""Step from which the signal-to-noise ratio stays below a threshold, with its standard error.

    Between the last reading above and the next one the ratio is taken as exponential in the step (linear where one
    of them is not positive). The error adds that of the two readings and that of not knowing where between
    them the line was crossed, Δ/√12.

    Args:
        steps: steps of the readings, increasing.
        ratios: signal-to-noise ratio at each, with its error.
        threshold: where drift ends; 1 is where gradient and noise of one step are equal.

    Returns:
        The step, or None where the last reading is still above, or none was.

    Raises:
        ArgumentError: the lists differ in length, hold fewer than two readings, or steps do not increase; or the
            threshold is not positive.

    Reference: Shwartz-Ziv & Tishby (2017), §3.3, who compare the mean of the gradient with its standard deviation.

    Example:
        >>> phase_transition([0, 10, 20], [Estimate(4.0, 0.0), Estimate(4.0, 0.0), Estimate(0.25, 0.0)]).value
        15.0
    """
    if len(steps) != len(ratios) or len(steps) < 2:
        raise ArgumentError(
            f"steps and ratios hold {len(steps)} and {len(ratios)} readings: give at least two, paired"
        )
    if any(not b > a for a, b in zip(steps, steps[1:], strict=False)):
        raise ArgumentError(f"steps={list(steps)} must increase")
    if not (math.isfinite(threshold) and threshold > 0):
        raise ArgumentError(f"threshold={threshold} must be positive and finite")
    above = [i for i, r in enumerate(ratios) if r.value > threshold]
    if not above or above[-1] == len(steps) - 1:
        return None
    i = above[-1]
    span = steps[i + 1] - steps[i]
    (s, e), (t, f) = _height(ratios[i : i + 2], threshold)
    share, width = s / (s - t), s - t
    error = math.hypot(t / width * (e / width), share * (f / width), 1 / math.sqrt(12))
    return Estimate(steps[i] + share * span, span * error)


def _height(pair: Sequence[Estimate], threshold: float) -> list[tuple[float, float]]:
    """How far two readings lie above the threshold, in logarithms where both have one."""
    if min(r.value for r in pair) > 0 and max(r.value for r in pair) < math.inf:
        return [(math.log(r.value / threshold), r.error / r.value) for r in pair]
    return [(min(r.value, 1e300) - threshold, r.error if math.isfinite(r.error) else 0.0) for r in pair]


@cites(REFERENCE)
@dataclass
class DriftDiffusion:
    r"""Signal to noise of each layer's gradient, B |∇f|²/tr Σ, read at chosen steps of a run.

    May be given to ``train`` as ``progress``.

    Args:
        model: the network that is being trained; it is only read.
        loss: ``loss(prediction, y)``, a mean over samples.
        x: inputs of a fixed sample of the data; a few hundred give errors of some per cent.
        y: their targets.
        batch_size: B of the run.
        at: steps at which to read; every step by default.

    Attributes:
        steps: steps that were read.
        readings: for each of them, layer → ratio with its jackknife error; ``"all layers"`` for the whole network.

    Reference: Shwartz-Ziv & Tishby (2017), §3.3; the ratio is that of McCandlish et al. (2018).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net, x = nn.Linear(3, 1), torch.randn(64, 3)
        >>> watch = DriftDiffusion(net, nn.functional.mse_loss, x, x.sum(1, keepdim=True), batch_size=8, at=[0])
        >>> watch(0, 10)
        >>> watch.layers, watch.readings[0]["all layers"].value > 1
        (['all layers'], True)
    """

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    y: Tensor
    batch_size: int
    at: Sequence[int] | None = None
    steps: list[int] = field(default_factory=list)
    readings: list[dict[str, Estimate]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check the batch size.

        Raises:
            ArgumentError: it is below 1.
        """
        if self.batch_size < 1:
            raise ArgumentError(f"batch_size={self.batch_size} must be at least 1")

    def __call__(self, step: int, steps: int, values: Mapping[str, float] | None = None) -> None:
        """The form of a ``progress`` callback."""
        self.note(step)

    def note(self, step: int) -> None:
        """Read the ratios now, if ``step`` is one of those wanted and was not read yet."""
        if (self.at is not None and step not in self.at) or step in self.steps:
            return
        with torch.enable_grad():
            noise = gradient_noise(self.model, self.loss, (self.x, self.y))
        found = {WHOLE: noise.snr()}
        layers = noise.per_layer_snr()
        if len(layers) > 1:
            found |= layers
        b = self.batch_size
        self.steps.append(step)
        self.readings.append({name: Estimate(b * r.value, b * r.error) for name, r in found.items()})

    @property
    def layers(self) -> list[str]:
        """Names of what was read."""
        return list(self.readings[0]) if self.readings else []

    def curve(self, layer: str = WHOLE) -> tuple[Tensor, Tensor]:
        """Ratio and its standard error of one layer at each reading: two tensors ``(readings,)``."""
        found = self._of(layer)
        return torch.tensor([r.value for r in found]), torch.tensor([r.error for r in found])

    def transition(self, layer: str = WHOLE, threshold: float = 1.0) -> Estimate | None:
        """Step at which a layer goes from drift to diffusion, see :func:`phase_transition`."""
        return phase_transition(self.steps, self._of(layer), threshold)

    def _of(self, layer: str) -> list[Estimate]:
        if layer not in self.layers:
            raise ArgumentError(f"layer {layer!r} was not read: choose one of {', '.join(self.layers)}")
        return [reading[layer] for reading in self.readings]
