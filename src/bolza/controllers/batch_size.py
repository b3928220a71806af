"""Batch size by feedback: what draws the batches is told how large they are to be.

The laws are those of :mod:`bolza.controllers.batch_laws`, with the noise measured by a
:class:`bolza.controllers.NoiseTracker` or by per-sample gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from bolza.controllers.batch_laws import BALLES, SMITH, csgd_batch_size, priced_batch_size
from bolza.controllers.controller import Controller
from bolza.controllers.noise_tracker import MCCANDLISH, NoiseTracker
from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.core.reference import cites

__all__ = ["BatchSizeController"]

Law = Literal["loss", "curvature", "price", "noise_scale"]
_LAWS = ("loss", "curvature", "price", "noise_scale")
_LEAST_SHARE = 1e-6  # of the rate that is left when it takes over from a batch that may not grow


@cites(SMITH, BALLES, MCCANDLISH)
class BatchSizeController(Controller):
    r"""Set the batch size where c-SGD would lower the rate: B = η tr Σ/(2m), never beyond a bound.

    ===========  ============================  ===============================================
    ``law``      B                             needs
    ===========  ============================  ===============================================
    loss         η tr Σ/(2 (loss − floor))     ``step(loss=...)``; exact for equal curvatures
    curvature    η a tr Σ/|∇f|²                a, best tr(HΣ)/tr Σ
    price        η √(a tr Σ V_m/(2κ))          a, κ a sample, and the length of the run
    noise_scale  tr Σ/|∇f|²                    nothing; it contains no rate
    ===========  ============================  ===============================================

    η stands for η/(1 − μ) with momentum. Decisions are made every ``every`` steps and change B by at most the factor
    ``growth``. When B is at ``largest`` and the law wants more, the rate falls in its place (``lower_lr``).

    Args:
        optimizer: any; its rates at this moment are the reference.
        batches: anything with a ``batch_size`` to set, such as :class:`bolza.data.AdjustableBatchSampler`; or call
            :meth:`attach_batches` later.
        law: see above; ``"loss"`` by default, ``"noise_scale"`` for optimizers of the Adam type.
        floor: loss at the minimum.
        curvature: a, or a function that measures it at each decision.
        price: κ, loss that one sample may cost.
        steps: length of the run in steps, for ``"price"``.
        smallest: least batch size; by default the size at the start, as c-SGD never goes above its rate.
        largest: greatest batch size, what memory holds; the samples of ``batches`` at most.
        growth: largest factor of one decision, up or down.
        every: steps between decisions.
        beta: decay of the averages of loss and gradients.
        lower_lr: at the largest batch, lower the rate by what the batch cannot give.
        scale_lr: with ``"noise_scale"`` only: ``"linear"`` or ``"sqrt"`` scaling of the rate with the batch.
        noise: function that measures Σ by other means, for example
            ``lambda: bolza.sde.gradient_noise(model, loss, probe)``, called at each decision.

    Raises:
        ArgumentError: a setting is out of range, or the law lacks what it needs.
        UnsupportedError: a law that contains the rate over an optimizer that rescales gradients.

    Reference: Smith et al. (2018), Balles et al. (2017), McCandlish et al. (2018); equations and departures in
    :mod:`bolza.controllers.batch_laws`. Gradients must be those of the mean loss, not clipped: tr Σ is read off them.

    Example:
        >>> from bolza.data import AdjustableBatchSampler, digits
        >>> _ = torch.manual_seed(1)
        >>> data, net = digits(), torch.nn.Linear(64, 10)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        >>> sampler = AdjustableBatchSampler(1438, batch_size=8)
        >>> controller = BatchSizeController(optimizer, sampler, largest=256)
        >>> for batch in sampler:
        ...     loss = torch.nn.functional.cross_entropy(net(data.train_x[batch]), data.train_y[batch])
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     _ = controller.step(loss=loss)
        >>> 8 < sampler.batch_size <= 256
        True
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        batches: Any = None,
        *,
        law: Law | None = None,
        floor: float = 0.0,
        curvature: float | Callable[[], float] | None = None,
        price: float | None = None,
        steps: int | None = None,
        smallest: int | None = None,
        largest: int | None = None,
        growth: float = 1.5,
        every: int = 10,
        beta: float = 0.9,
        lower_lr: bool = True,
        scale_lr: Literal["linear", "sqrt"] | None = None,
        noise: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__(optimizer)
        rescales = "betas" in optimizer.defaults or "alpha" in optimizer.defaults
        self.law = law or ("noise_scale" if rescales else "loss")
        if self.law not in _LAWS:
            raise ArgumentError(f"law={law!r} is not known: choose one of {', '.join(_LAWS)}")
        if rescales and self.law != "noise_scale":
            raise UnsupportedError(
                f"law={law!r} contains the rate of SGD, which {type(optimizer).__name__} rescales parameter by "
                "parameter: use law='noise_scale'"
            )
        if self.law in ("curvature", "price") and curvature is None:
            raise ArgumentError(f"law={self.law!r} needs curvature=, a number or a function that measures it")
        if self.law == "price" and (price is None or steps is None or not price > 0):
            raise ArgumentError(f"law='price' needs price= and steps=; they are {price} and {steps}")
        if scale_lr is not None and (self.law != "noise_scale" or scale_lr not in ("linear", "sqrt")):
            raise ArgumentError(
                f"scale_lr={scale_lr!r} with law={self.law!r}: the rate can follow the batch ('linear', 'sqrt') only "
                "where the batch does not follow from the rate, with law='noise_scale'"
            )
        if (smallest is not None and smallest < 1) or (largest is not None and largest < (smallest or 1)):
            raise ArgumentError(f"smallest={smallest}, largest={largest}: give 1 ≤ smallest ≤ largest")
        if not growth > 1 or every < 1:
            raise ArgumentError(f"growth={growth} must be above 1, every={every} at least 1")
        self.floor, self.curvature, self.price, self.steps = floor, curvature, price, steps
        self.smallest, self.largest, self.growth, self.every = smallest, largest, growth, every
        self.lower_lr, self.scale_lr, self.measure = lower_lr, scale_lr, noise
        self.tracker = NoiseTracker(beta)
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.wanted = self.start = 0.0
        self._loss = [0.0, 0.0]  # average and the sum of its weights
        self._noise = self._signal = 0.0
        self.share = 1.0  # of the reference rates
        self._asked = 0
        if batches is not None:
            self.attach_batches(batches)

    def decide(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Take in the gradient, and now and then a new batch size."""
        if not self.moved:
            return {}
        size = observation.get("batch_size")
        if size is None:  # what was drawn: the last batch of an epoch may be smaller
            size = getattr(self.batches, "drawn_size", 0) or getattr(self.batches, "batch_size", None)
        if size is None:
            raise ArgumentError(
                "the size of the batch is not known: call attach_batches(sampler), or pass step(batch_size=...)"
            )
        if not self.wanted:
            self.wanted = self.start = float(size)
        whole = self.parameters
        taken = self.tracker.update([_dense(p.grad) for p in whole], float(size))
        self._take_loss(observation.get("loss"))
        if not taken or self.tracker.count % self.every or self.tracker.count < 2:
            return {}
        self._look()
        least = self.smallest or int(self.start)
        bound = max(least, self._bound())
        target = self._target()
        target = self.wanted if math.isnan(target) else target
        target = min(max(target, self.wanted / self.growth), self.wanted * self.growth)
        reach = bound / _LEAST_SHARE if self.lower_lr else bound
        self.wanted = min(max(target, float(least)), reach)
        new = int(min(max(round(self.wanted), least), bound))
        action: dict[str, Any] = {} if self.batches is None else {"batch_size": new}
        self._asked = new
        factor = self._factor(new, bound)
        if factor != self.share:
            self.share = factor
            action["lr"] = [factor * rate for rate in self.rates]
        return action

    def log(self) -> dict[str, float]:
        """Noise tr Σ, signal |∇f|², and the batch size that the law wants."""
        return {"noise": self._noise, "signal": self._signal, "wanted_batch_size": self.wanted}

    def memory(self) -> dict[str, Any]:
        """Averages and decisions."""
        return {
            "tracker": self.tracker.state_dict(),
            "loss": list(self._loss),
            "wanted": self.wanted,
            "start": self.start,
            "share": self.share,
            "asked": self._asked,
            "rates": list(self.rates),
            "seen": [self._noise, self._signal],
            "batch_size": None if self.batches is None else int(self.batches.batch_size),
        }

    def load_memory(self, memory: Any) -> None:
        """Go on where :meth:`memory` was taken, with the batch size of then."""
        self.tracker.load_state_dict(memory["tracker"])
        self._loss, self.rates = list(memory["loss"]), list(memory["rates"])
        self.wanted, self.start, self.share = memory["wanted"], memory["start"], memory["share"]
        self._noise, self._signal = memory["seen"]
        self._asked = memory["asked"]
        if memory["batch_size"] is not None and self.batches is not None:
            self.batches.batch_size = memory["batch_size"]

    # ---------------------------------------------------------------------------------- parts

    def _take_loss(self, loss: Any) -> None:
        if self.law != "loss":
            return
        if loss is None:
            raise ArgumentError("law='loss' needs the loss of the step: call step(loss=loss)")
        value, beta = float(loss), self.tracker.beta
        if math.isfinite(value):
            self._loss = [beta * self._loss[0] + (1 - beta) * value, beta * self._loss[1] + 1 - beta]

    def _look(self) -> None:
        if self.measure is None:
            self._noise, self._signal = self.tracker.noise, self.tracker.signal
            return
        found = self.measure()
        self._noise, self._signal = float(found.trace().value), float(found.squared_gradient().value)

    def _bound(self) -> int:
        bounds = [b for b in (self.largest, getattr(self.batches, "samples", None)) if isinstance(b, int)]
        given = int(self.batches.batch_size) if self.batches is not None else 0
        if 0 < given < self._asked:  # what draws the batches has bounds of its own
            bounds.append(given)
        return min(bounds) if bounds else 2**31

    def _target(self) -> float:
        """Batch size of the law, not yet bounded; nan for no opinion."""
        first = self.optimizer.param_groups[0]
        lr, momentum = self.rates[0], float(first.get("momentum", 0.0))
        rate = lr / (1 - momentum)
        if self._noise <= 0 or rate <= 0:
            return 0.0 if self.law != "price" and rate > 0 else math.nan
        if self.law == "loss":
            return csgd_batch_size(rate, self._noise, self._loss[0] / max(self._loss[1], 1e-300) - self.floor)
        if self.law == "noise_scale":
            return self._noise / self._signal if self._signal > 0 else math.inf
        a = float(self.curvature() if callable(self.curvature) else self.curvature or 0.0)
        if not a > 0 or math.isinf(a):
            return math.nan
        if self.law == "curvature":
            return rate * a * self._noise / self._signal if self._signal > 0 else math.inf
        assert self.price is not None and self.steps is not None
        left = rate * (self.steps - self.count - 1)
        return priced_batch_size(a, rate, self._noise, self.price, left)

    def _factor(self, new: int, bound: int) -> float:
        """What the reference rates are multiplied by."""
        if self.scale_lr is not None:
            ratio = new / self.start
            return ratio if self.scale_lr == "linear" else math.sqrt(ratio)
        if self.lower_lr and self.law != "noise_scale":
            return min(1.0, bound / self.wanted)
        return 1.0


def _dense(gradient: Tensor | None) -> Tensor | None:
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient
