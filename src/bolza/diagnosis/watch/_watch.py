"""`Watch`: what the noise of a training run does, told while it trains, at a chosen share of its time."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, CheckpointError, UnsupportedError
from bolza.diagnosis.watch import words
from bolza.diagnosis.watch.arguments import checked_arguments, checked_loss
from bolza.diagnosis.watch.budget import Budget
from bolza.diagnosis.watch.looks import Looks
from bolza.diagnosis.watch.notes import Notes, common_momentum
from bolza.diagnosis.watch.probes import Probe, Sharpness, bare, probe_batch
from bolza.diagnosis.watch.record import Event, WatchRecord
from bolza.diagnosis.watch.series import Series
from bolza.diagnosis.watch.significance import kendall_z, level_of_look
from bolza.stability.limits import optimizer_limit

__all__ = ["Watch"]

# what work of unknown cost may take: training steps, and what does not grow with them
_STEPS, _SECONDS = 12.0, 0.03
_RECENT = 24  # steps over which the loss is seen to rise
_CHECK = 8  # steps between two checks of it
_FLUSH = 16
# of the budget; the rest is for what cannot be timed from inside, such as caches that are cold after
_INSIDE = 0.7
_NOTING = 0.5  # of that, at most, for what is noted at every few steps
_FAR = 1.5  # times the limit
_VAGUE = 0.25  # of the limit: a reading with a larger error does not tell the edge


class Watch:
    r"""Watch a training run: say when it becomes stationary, unstable or heavy-tailed, or moves in loops.

    Call ``step`` after ``optimizer.step()`` in any loop, or give it to :func:`bolza.training.train` as
    ``callback``. It only reads: parameters, gradients, buffers, optimizer and random state stay as they are bit for
    bit, so that a run that is watched ends where it would have ended. What needs derivatives is taken on a copy of
    the network, on one fixed batch.

    At steps that the budget allows it notes loss, gradient norm and ‖θ‖² (cheap), the sharpness beside the stability
    limit of the optimizer, and the gradients of single samples; and at growing intervals it tests for drift of loss
    and ‖θ‖², for heavy tails of the noise and for loops. :meth:`record` has all of it, with the events in words.

    Args:
        model: the network that is trained.
        loss: loss(outputs, targets), a mean over samples; None with a `bolza.data.Dataset`: that of its task.
        data: where the batch of the probes comes from: a `bolza.data.Dataset`, a pair (x, y), or an iterable of
            pairs. The training data, not the test data.
        optimizer: of the run, any ``torch.optim.Optimizer``.
        batch_size: samples a step, for the temperature and the noise of a step; without it they are not told.
        budget: share of the training time that watching may take.
        every: steps between two readings of every probe, whatever they cost, in place of ``budget``: then the
            record repeats from its seed.
        samples: of the batch of the probes.
        level: probability of a false alarm of each kind (heavy tails, loops, unstable) in the whole run.
        seed: of the batch, of random directions and coordinates.
        clock: seconds, for the budget.

    Raises:
        ArgumentError: an argument makes no sense, or the optimizer trains no parameter of the model.
        DataError: the data has fewer than two samples.

    Reference: Yaida (2019), arXiv:1810.00004, for stationarity; Cohen et al. (2021), arXiv:2103.00065, for the edge of
    stability; McCandlish et al. (2018), arXiv:1812.06162, for the noise scale.

    Example:
        >>> import bolza
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 3)
        >>> y, model = x @ torch.ones(3, 1), nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.5)
        >>> watch = bolza.Watch(model, nn.functional.mse_loss, (x, y), optimizer, batch_size=64, every=10)
        >>> for _ in range(40):
        ...     optimizer.zero_grad()
        ...     loss = nn.functional.mse_loss(model(x), y)
        ...     loss.backward()
        ...     optimizer.step()
        ...     watch.step(loss=loss)
        >>> watch.events[0].kind, watch.events[0].step < 40
        ('unstable', True)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor] | None = None,
        data: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        batch_size: int | None = None,
        budget: float = 0.1,
        every: int | None = None,
        samples: int = 128,
        level: float = 0.01,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        whole = {"batch_size": batch_size, "every": every}
        self.loss = checked_arguments(model, loss, data, optimizer, whole, samples, level, budget)
        assert optimizer is not None
        self.model, self.optimizer = bare(model), optimizer
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._named = {n: p for n, p in self.model.named_parameters() if p.requires_grad and id(p) in trained}
        if not self._named:
            raise ArgumentError(
                "the optimizer trains no parameter of the model: give the two that belong together"
            )
        self.batch_size, self.every, self.level, self.seed = batch_size, every, level, seed
        self._batches: Any = None
        self.count = 0
        self._budget = Budget(_INSIDE * budget)
        self._asked = budget
        first = next(iter(self._named.values()))
        if hasattr(data, "train_x"):  # converted to the kind of the network, as in training
            data = data.to(dtype=first.dtype.to_real() if first.is_complex() else first.dtype)
        self._batch = probe_batch(data, samples, seed)
        self._samples = samples
        self._probe: Probe | None = None
        self._notes = Notes(list(self._named.values()), coordinates=128, directions=4, seed=seed)
        self._series = Series(self._notes.columns)
        self._looks = Looks(level)
        self._events: list[Event] = []
        self._readings: dict[str, list[dict[str, Any]]] = {"sharpness": [], "noise": [], "drift": []}
        self._unavailable: dict[str, str] = {}
        self._failures: dict[str, int] = {}
        self._recent: deque[float | Tensor] = deque(maxlen=_RECENT)
        self._checks, self._from = 0, math.nan
        self._tried, self._brief = False, False
        self._clock = clock
        self._left: float | None = None
        self._elsewhere = 0.0
        self._beat = _CHECK if every is None else math.gcd(_CHECK, every)
        self._next = every or 0
        self._noted, self._paced, self._over = 0.0, (0.0, 0.0), 0

    # -------------------------------------------------------------------------------- the loop

    def attach_batches(self, batches: Any) -> None:
        """Follow the size of batches that change it: ``batches.batch_size`` is read at each reading."""
        self._batches = batches

    def step(self, *, loss: float | Tensor | None = None) -> None:
        """Note one step; call it after ``optimizer.step()`` and before the gradients are cleared.

        Args:
            loss: the loss of this step, if it is at hand.

        Raises:
            ArgumentError: the loss is not one number.
        """
        entered = self._clock()
        self.count += 1
        budget, left = self._budget, self._left
        if left is not None:
            budget.train(entered - left)
        self._elsewhere = 0.0
        try:
            if loss is not None:
                loss = checked_loss(loss)
                self._recent.append(loss)
            if self.count % self._series.stride == 0:
                self._note(loss)
            if self.count % self._beat == 0:
                self._attend(loss)
        finally:
            self._left = left = self._clock()
            budget.notes += left - entered - self._elsewhere

    def measure(self) -> None:
        """Take every reading and make every test now, whatever it costs; not counted in the budget."""
        for name in ("sharpness", "noise"):
            self._run(name, inside=False)
        self._run("tests", inside=False)

    def _note(self, loss: float | Tensor | None) -> None:
        value = math.nan if loss is None else loss
        entered = self._clock()
        self._series.add(self.count, (value, self._lr()), self._notes.take(self.optimizer))
        full = self._series.waiting >= _FLUSH
        if full:
            self._series.rows()
        self._noted += self._clock() - entered
        if full:
            self._pace()

    def _attend(self, loss: float | Tensor | None) -> None:
        """Every few steps: see whether the loss runs away, and take what is due."""
        # a loss that waits on a device is looked at less often
        if self._recent and not (isinstance(loss, Tensor) and loss.is_cuda and self.count % (4 * _CHECK)):
            self._check_growth()
        if self.every is not None:
            if self.count >= self._next:
                self._next = self.count + self.every
                self._run("sharpness")
                self._run("noise")
            self._judge_if_due()
            return
        budget, guess = self._budget, self._guess()
        names = [name for name in ("sharpness", "noise") if self._failures.get(name, 0) < 2]
        if not self._tried:  # learn what readings cost before the first one
            names = ["trial"]
        wanted = min(names, key=budget.turn, default=None)
        if wanted is not None and budget.allows(wanted, guess):
            self._run(wanted)
        if self._looks.due(self.count, self._since()) and budget.allows("tests", guess):
            self._run("tests")

    def _guess(self) -> float:
        return _STEPS * self._budget.step + _SECONDS

    def _judge_if_due(self) -> None:
        if self._looks.due(self.count, self._since()):
            self._run("tests")

    def _pace(self) -> None:
        """Note half as many steps where noting has twice in a row taken more than its part of the budget."""
        if self.every is not None:
            return
        spent, trained = self._noted, self._budget.trained  # what fewer rows would save
        recent = (spent - self._paced[0]) / max(trained - self._paced[1], 1e-12)
        self._paced = (spent, trained)
        self._over = self._over + 1 if recent > _NOTING * self._budget.share else 0
        if self._over == 2:
            self._series.thin()
            self._over = 0

    def _run(self, name: str, inside: bool = True) -> None:
        """Take a reading; one that fails says why, and after two failures it is left out."""
        if self._failures.get(name, 0) >= 2:
            return
        place = next(iter(self._named.values())).device
        before = self._clock()
        if place.type == "cuda":  # what is under way belongs to training
            torch.cuda.synchronize(place)
            self._budget.train(self._clock() - before)
        start = self._clock()
        self._brief = inside and self.every is None
        try:
            getattr(self, f"_take_{name}")()
            self._unavailable.pop(name, None)
        except Exception as error:  # the user's model and loss run in here, and the run must go on
            first = (str(error).strip().splitlines() or ["no message"])[0]
            self._unavailable[name] = first
            self._failures[name] = self._failures.get(name, 0) + 1
        finally:
            seconds = self._clock() - start
            self._budget.charge(name, seconds, inside=inside)
            self._elsewhere += self._clock() - before

    # -------------------------------------------------------------------------------- readings

    def _lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _ready(self) -> Probe:
        if self._probe is None:
            self._probe = Probe(self.model, list(self._named), self.loss, self._batch, self.seed)
        self._probe.follow()
        return self._probe

    def _take_trial(self) -> None:
        self._tried = True
        costs = self._ready().try_out(self._clock, self._guess() / 4)
        self._budget.usual |= {name: cost for name, cost in costs.items() if name not in self._budget.usual}

    def _take_sharpness(self) -> None:
        probe = self._ready()
        try:
            limit = optimizer_limit(self.optimizer, list(self._named.values()))
            self._unavailable.pop("stability limit", None)
        except (ArgumentError, UnsupportedError) as error:
            limit = None
            self._unavailable["stability limit"] = str(error)
        found = probe.sharpness(limit, brief=self._brief)
        self._readings["sharpness"].append({"step": self.count, **asdict(found)})
        if limit is not None:
            self._judge_sharpness(found, limit.lr, limit.formula)

    def _judge_sharpness(self, found: Sharpness, lr: float, formula: str) -> None:
        assert found.fraction is not None and found.fraction_error is not None
        above = found.fraction - 2 * found.fraction_error > 1
        near = found.fraction + 2 * found.fraction_error > 1 and found.fraction > 0.9
        near = near and found.fraction_error < _VAGUE
        # a network can stay a little above the limit for long, but nothing stays far above it
        runs_away = above and (self._rises(level=0.001) or found.fraction - 2 * found.fraction_error > _FAR)
        make = words.above_limit if runs_away else words.at_edge
        event = make(self.count, found, lr, formula) if above or near else None
        if event is not None and event.kind == "unstable":
            self._set("unstable", event)
        elif not self._by_growth():
            self._set("unstable", None)
        self._set("edge", event if event is not None and event.kind == "edge" else None)

    def _take_noise(self) -> None:
        found = asdict(self._ready().noise())
        if self._batches is not None:
            self.batch_size = self._batches.batch_size
        b, lr = self.batch_size, self._lr()
        mu = float(self.optimizer.param_groups[0].get("momentum", 0.0) or 0.0)
        if b is not None:
            found["batch_snr"], found["batch_snr_error"] = b * found["snr"], b * found["snr_error"]
            found["temperature"] = lr / (2 * b * (1 - mu))
            found["excess_loss"] = found["temperature"] * found["trace"] / 2
        self._readings["noise"].append({"step": self.count, **found})

    def _take_tests(self) -> None:
        lasting = {e.kind for e in self._events if e.lasts}
        mu = common_momentum(self.optimizer)
        found = self._looks.take(self._series, self.count, self._since(), lasting, mu)
        if "unstable" in lasting:  # what runs away is not at rest
            found.events = {"stationary": None, "plateau": None}
        for name, reading in found.readings.items():
            self._readings.setdefault(name, []).append({"step": self.count, **reading})
        for kind, event in found.events.items():
            self._set(kind, event)

    # -------------------------------------------------------------------------------- events

    def _since(self) -> int:
        """The step of the last change of the learning rate."""
        return self._looks.note_rate(self.count, self._lr())

    def _losses(self) -> Tensor:
        if len(self._recent) < 8:
            return torch.empty(0)
        return torch.tensor([float(v) for v in self._recent], dtype=torch.float64)

    def _rises(self, level: float) -> bool:
        values = self._losses()
        return len(values) > 0 and kendall_z(values) > -NormalDist().inv_cdf(level)

    def _check_growth(self) -> None:
        """Alarm where the loss at least doubles within a few steps, nearly without a fall, or is not finite."""
        before, after = float(self._recent[0]), float(self._recent[-1])
        lost = not math.isfinite(after)
        self._checks += 1
        level = max(level_of_look(self.level, self._checks), 1e-11)
        if lost or (after - before > abs(before) and self._rises(level)):
            if not self._by_growth():
                self._from = before
            self._set("unstable", words.growing(self.count, len(self._recent), before, after))
        elif self._by_growth() and after - self._from < 0.5 * abs(self._from):  # it has come back
            self._set("unstable", None)

    def _by_growth(self) -> bool:
        """Whether the run is unstable because its loss grew."""
        return any(e.kind == "unstable" and e.lasts and e.error is None for e in self._events)

    def _set(self, kind: str, event: Event | None) -> None:
        """Begin or end an event; one that lasts is not told again."""
        at = next((i for i, e in enumerate(self._events) if e.kind == kind and e.lasts), None)
        if event is not None and at is None:
            self._events.append(event)
        elif event is None and at is not None:
            self._events[at] = replace(self._events[at], until=self.count)

    # -------------------------------------------------------------------------------- what was seen

    @property
    def events(self) -> tuple[Event, ...]:
        """Events so far, in the order in which they began."""
        return tuple(self._events)

    def record(self) -> WatchRecord:
        """Everything seen so far."""
        budget = self._budget
        group = self.optimizer.param_groups[0]
        momentum = group.get("momentum", group.get("betas", (0.0,))[0])
        costs: dict[str, Any] = {
            "training": budget.trained,
            "budget": None if self.every is not None else self._asked,
            "share": budget.share_spent,
            "spent": {"notes": budget.notes, **budget.spent},
            "runs": {"notes": len(self._series), **budget.runs},
            "beyond": dict(budget.beyond),
            "stride": self._series.stride,
        }
        settings = {
            "optimizer": type(self.optimizer).__name__,
            "lr": self._lr(),
            "momentum": float(momentum),
            "batch_size": self.batch_size,
            "samples": self._samples,
            "parameters": self._notes.size,
            "every": self.every,
            "level": self.level,
            "seed": self.seed,
        }
        readings = {name: [dict(row) for row in rows] for name, rows in self._readings.items()}
        return WatchRecord(
            self.count,
            settings,
            tuple(self._events),
            readings,
            self._series.curves(),
            costs,
            self._missing(),
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the record as JSON, whole or not at all.

        Args:
            path: where to write.

        Raises:
            ReportError: the file cannot be written.
        """
        return self.record().to_json(path)

    def __str__(self) -> str:
        return str(self.record())

    def _missing(self) -> dict[str, str]:
        out = {name: why for name, why in self._unavailable.items() if name != "trial"}
        for name in ("sharpness", "noise"):
            if not self._readings[name] and name not in out:
                out[name] = "the run was too short for it at this budget"
        if not self._looks.taken and "tests" not in out:
            out["tests"] = "too few steps at one learning rate to tell drift, tails and loops"
        if self.batch_size is None:
            out["temperature"] = "the batch size is not known: give batch_size="
        return out

    # -------------------------------------------------------------------------------- resuming

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: tensors, numbers and strings in plain containers."""
        return {
            "count": self.count,
            "budget": self._budget.state_dict(),
            "series": self._series.state_dict(),
            "looks": self._looks.state_dict(),
            "directions": self._notes.directions,
            "top": None if self._probe is None else self._probe.top,
            "events": [asdict(event) for event in self._events],
            "readings": self._readings,
            "unavailable": dict(self._unavailable),
            "failures": dict(self._failures),
            "recent": [float(v) for v in self._recent],
            "checks": self._checks,
            "tried": self._tried,
            "next": self._next,
            "from": self._from,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, with the same network, data and settings.

        Raises:
            CheckpointError: the state is of another network or of other settings.
        """
        directions = state["directions"]
        if directions.shape != self._notes.directions.shape:
            raise CheckpointError(
                f"the state was taken of a network with {directions.shape[1]} parameters, and this one has "
                f"{self._notes.size}: watch the same network"
            )
        self.count = state["count"]
        self._budget.load_state_dict(state["budget"])
        self._series.load_state_dict(state["series"])
        self._looks.load_state_dict(state["looks"])
        self._notes.directions = directions.to(self._notes.directions)
        if state["top"] is not None:
            self._ready().top = state["top"].to(directions.device)
        self._events = [Event(**event) for event in state["events"]]
        self._readings = {name: [dict(row) for row in rows] for name, rows in state["readings"].items()}
        self._unavailable, self._failures = dict(state["unavailable"]), dict(state["failures"])
        self._recent = deque(state["recent"], maxlen=_RECENT)
        self._checks, self._next, self._from = state["checks"], state["next"], state["from"]
        self._tried = state["tried"]
        self._left = None
