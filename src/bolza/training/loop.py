"""The one run loop: `train`."""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, CheckpointError
from bolza.training.checkpoint import check_writable, discard_partial, load_tree, save_tree
from bolza.training.checks import (
    at_least_one,
    check_loss,
    check_model,
    check_seed,
    count_steps,
    make_controller,
    stepping,
    usable_device,
    user_call,
)
from bolza.training.controls import ControlRecord
from bolza.training.divergence import (
    first_nonfinite_gradient,
    first_nonfinite_layer,
    first_nonfinite_state,
)
from bolza.training.interrupt import InterruptGuard
from bolza.training.optimizers import OptimizerSpec, default_loss, make_optimizer
from bolza.training.order import BatchOrder
from bolza.training.run import Run
from bolza.training.stored import checked_record, is_setting, kind_of, upgraded

if TYPE_CHECKING:
    from bolza.data import Dataset

__all__ = ["train"]

Loss = Callable[[Any, Tensor], Tensor]
Progress = Callable[[int, int, Mapping[str, float]], object]

_EVALUATION_BATCH = 2048
_RECORDS = 20
_CURVES = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")


def train(
    model: nn.Module,
    data: Dataset,
    *,
    loss: Loss | None = None,
    optimizer: OptimizerSpec = "sgd",
    lr: float | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    batch_size: int = 64,
    steps: int | None = None,
    epochs: float | None = None,
    controller: Any = None,
    callback: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    eval_every: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    clip: float | None = None,
) -> Run:
    r"""Train a network in place: θ_{k+1} = optimizer(θ_k, ∇ loss(model(x_B), y_B)).

    The run repeats from its seed, stops cleanly on Ctrl-C after the step in progress, and, with a
    checkpoint, continues bit for bit: network, optimizer, controller, order of the data and random state.
    A loss or gradient that is not finite stops it *before* the update, so that the network keeps its
    last good state. A checkpoint that cannot be written after the start is a warning, tried again at the
    next record and told in ``Run.unsaved``: the run goes on.

    Args:
        model: the network; left in the mode it came in.
        data: a :class:`bolza.data.Dataset`; floating inputs are converted to the dtype and device of the
            model.
        loss: (outputs, targets) → scalar; by default cross-entropy, or mean squared error for regression.
        optimizer: see :func:`make_optimizer`.
        lr: learning rate; the optimizer's default where not given.
        momentum: passed on if not 0.
        weight_decay: passed on if not 0.
        batch_size: samples a step; at most the whole training set.
        steps: optimizer steps in all, those of a resumed run included.
        epochs: passes through the data, in place of ``steps``; 20 where neither is given. If a controller
            changes the size of the batches, the steps follow, so that the samples are the same.
        controller: what changes hyper-parameters during the run: an object with ``step`` (a torch
            scheduler, stepped after every update, or one of :mod:`bolza.controllers`, given ``loss=``), or a
            function (optimizer, steps) that makes one. ``attach_batches``, where there is one, is called with the
            :class:`BatchOrder` of the run, whose ``batch_size`` may be set.
        callback: what only looks on: an object whose ``step(loss=…)`` is called after every update and the
            controller, before the next gradient, such as :class:`bolza.Watch`; or a function (optimizer, steps)
            that makes one. Its ``state_dict``, if it has one, is kept in the checkpoint.
        checkpoint: file that is rewritten at every record; must not exist unless ``resume``.
        resume: continue from ``checkpoint``.
        seed: seed of the data order and of noise inside the network; the global random state is untouched.
        progress: called after each step with (step, steps, values): ``'loss'`` of this step and the latest
            records.
        eval_every: steps between records, 1/20 of the run by default.
        device: moves the model first.
        dtype: converts the model first.
        clip: largest allowed norm of the whole gradient.

    Returns:
        :class:`Run` with the curves; ``status`` says whether it finished.

    Raises:
        ArgumentError: a setting, the loss or a parameter is unusable, each by name.
        DataError: the labels do not fit the outputs of the model.
        CheckpointError: the file is there already, is damaged, belongs to another run or cannot be written.
        UserCodeError: the model or the loss raised.

    Example:
        >>> from bolza.data import digits
        >>> model = nn.Linear(64, 10)
        >>> run = train(model, digits(), lr=0.1, epochs=4)
        >>> run.status, run.final_test_accuracy > 0.9
        ('finished', True)
    """
    if not hasattr(data, "train_x"):
        raise ArgumentError(f"data is a {type(data).__name__}: give bolza.data.load(...) of it")
    check_seed(seed)
    place = None if device is None else usable_device(device)
    if isinstance(model, nn.Module) and (place is not None or dtype is not None):
        model.to(device=place, dtype=dtype)
    parameter = check_model(model)
    data = data.to(parameter.device, parameter.dtype.to_real())
    order = BatchOrder(data.train_x, data.train_y, at_least_one("batch_size", batch_size), seed)
    given_in_steps = steps is not None
    steps = count_steps(steps, epochs, order.steps_per_epoch)
    if clip is not None and not clip > 0:
        raise ArgumentError(f"clip={clip} must be positive: it is the largest norm of the gradient")
    options = {"lr": lr, "momentum": momentum or None, "weight_decay": weight_decay or None}
    made = make_optimizer(optimizer, model, **options)
    every = at_least_one("eval_every", eval_every) if eval_every is not None else max(1, steps // _RECORDS)
    loop = _Loop(
        model, data, loss, made, make_controller(controller, made, steps), order, every, clip, progress
    )
    loop.callback = make_controller(callback, made, steps, "callback")
    for one in (loop.controller, loop.callback):
        if hasattr(one, "attach_batches"):
            one.attach_batches(order)
    loop.run.total_steps, loop.run.seed = steps, seed
    loop.samples = None if given_in_steps else steps * order.batch_size
    if checkpoint is not None:
        check_writable(checkpoint)
        if os.path.exists(checkpoint) and not resume:
            raise CheckpointError(
                f"the checkpoint {str(checkpoint)!r} exists: pass resume=True to go on from it, or name "
                "another file"
            )
        loop.checkpoint = checkpoint
    elif resume:
        raise ArgumentError("resume=True needs the file to go on from: pass checkpoint=")
    devices = [parameter.device] if parameter.device.type == "cuda" else []
    mode = model.training
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), InterruptGuard() as guard:
        torch.manual_seed(seed)
        try:
            if resume:
                loop.restore()
            loop.go(guard)
        finally:
            model.train(mode)
    return loop.run


class _Diverged(Exception):
    def __init__(self, what: str, layer: str | None) -> None:
        super().__init__(what)
        self.what, self.layer = what, layer


class _Loop:
    """State of a run between two steps; everything here is saved, or follows from the arguments."""

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        loss: Loss | None,
        optimizer: torch.optim.Optimizer,
        controller: Any,
        order: BatchOrder,
        every: int,
        clip: float | None,
        progress: Progress | None,
    ) -> None:
        self.model, self.data, self.optimizer, self.controller = model, data, optimizer, controller
        self.order, self.every, self.clip, self.progress = order, every, clip, progress
        self.loss = loss or default_loss(data.task)
        # where the loss is known, what it needs of the outputs is known too
        functional = (None, nn.functional.cross_entropy, nn.functional.mse_loss)
        self.known_loss = loss in functional or isinstance(loss, nn.CrossEntropyLoss | nn.MSELoss)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.closure = _needs_closure(optimizer)
        self.callback: Any = None
        self.checkpoint: str | os.PathLike[str] | None = None
        self.run = Run(optimizer=type(optimizer).__name__, batch_size=order.batch_size)
        self.controls = ControlRecord(optimizer, order, controller)
        self.samples: int | None = None  # asked for, where the length is not given in steps
        self.loss_sum, self.right, self.seen, self.since = 0.0, 0, 0, 0
        self.latest, self.good = dict[str, float](), dict[str, Tensor]()
        self.checked, self.between_steps = False, True

    # ------------------------------------------------------------------------------- the loop

    def go(self, guard: InterruptGuard) -> None:
        run, started, before = self.run, time.perf_counter(), self.run.seconds
        run.status, run.reason = "finished", ""
        try:
            if not run.steps:
                self.model.train()
                self.first_record()
            self.model.train()
            while run.step < run.total_steps and not guard.requested:
                self.step()
                run.seconds = before + time.perf_counter() - started
                if run.step % self.every == 0 or run.step == run.total_steps:
                    self.record()
                    self.save()
                if self.progress is not None:
                    self.progress(run.step, run.total_steps, self.latest)
            interrupted = guard.requested and run.step < run.total_steps
        except KeyboardInterrupt:
            interrupted = True
        except _Diverged as failure:
            self.keep_last_good(failure)
            interrupted = False
        guard.patience = sys.maxsize  # the end is short, and another Ctrl-C must not lose the curves
        run.seconds = before + time.perf_counter() - started
        if interrupted:
            run.status = "interrupted"
            run.reason = f"interrupted after {run.step} of {run.total_steps} steps"
            if self.between_steps:  # a second Ctrl-C can strike within a step; then the file stays as it is
                self.save()

    def step(self) -> None:
        self.between_steps = False
        self.controls.before(self.run.step + 1)
        x, y = self.order.next()
        if self.closure:
            values: list[float] = []
            self.optimizer.step(lambda: self._evaluate_closure(x, y, values))  # type: ignore[arg-type]
            value = values[0]
        else:
            value = self.gradient(x, y)
            self.optimizer.step()
        self.run.step += 1
        self.loss_sum += value
        self.since += 1
        self.latest["loss"] = value
        with stepping("controller", self.controller, self.run.step):
            self._control(value)
            self.controls.after(self.run.step, self.run)
        if self.callback is not None:
            with stepping("callback", self.callback, self.run.step):
                self.callback.step(loss=value)
        self.between_steps = True

    def _evaluate_closure(self, x: Tensor, y: Tensor, values: list[float]) -> float:
        with torch.enable_grad():
            values.append(self.gradient(x, y))
        return values[-1]

    def gradient(self, x: Tensor, y: Tensor) -> float:
        """Put the gradient of a mini-batch into ``.grad``; return the loss; refuse what is not finite."""
        self.optimizer.zero_grad()
        outputs, loss = self._loss(x, y) if self.checked else self._checked_loss(x, y)
        value = loss.item()
        if not math.isfinite(value):
            # parameters, then layers; buffers may be the victims of a layer before them
            layer = first_nonfinite_state(self.model, buffers=False) or first_nonfinite_layer(self.model, x)
            raise _Diverged(f"the loss became {value}", layer)
        loss.backward()
        if not self.checked:
            self._check_gradients()
            self.checked = True
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if not math.isfinite(norm.item()):
            raise _Diverged("a gradient stopped being finite", first_nonfinite_gradient(self.model))
        if self.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        self.run.gradients += 1
        self.run.samples += len(x)
        if self._scores(outputs, y):
            self.right += int((outputs.detach().argmax(-1) == y).sum())
            self.seen += y.numel()
        return value

    def _loss(self, x: Tensor, y: Tensor) -> tuple[Any, Tensor]:
        step = self.run.step
        outputs = user_call("the model", lambda: self.model(x), x, step)
        return outputs, user_call("the loss", lambda: self.loss(outputs, y), x, step)

    def _control(self, value: float) -> None:
        if self.controller is None:
            return
        size, schedulers = self.order.batch_size, torch.optim.lr_scheduler
        if isinstance(self.controller, schedulers.ReduceLROnPlateau):
            self.controller.step(value)
        elif isinstance(self.controller, schedulers.LRScheduler):
            self.controller.step()
        else:
            self.controller.step(loss=value)
        if self.order.batch_size != size:
            self._count_again()

    def _count_again(self) -> None:
        """Let the steps of a run whose length is in samples follow the size of its batches."""
        if self.samples is not None:
            left = max(0, self.samples - self.order.drawn)
            self.run.total_steps = self.run.step + math.ceil(left / self.order.batch_size)

    def _scores(self, outputs: Any, y: Tensor) -> bool:
        return self.data.task != "regression" and isinstance(outputs, Tensor) and outputs.ndim == y.ndim + 1

    # ------------------------------------------------- what is checked once, on the first batch

    def _checked_loss(self, x: Tensor, y: Tensor) -> tuple[Any, Tensor]:
        outputs = user_call("the model", lambda: self.model(x), x)
        if self.known_loss:
            self.data.check_outputs(outputs, y)
        loss = user_call("the loss", lambda: self.loss(outputs, y), x)
        check_loss(loss)
        return outputs, loss

    def _check_gradients(self) -> None:
        missing = [n for n, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
        if missing:
            others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ArgumentError(
                f"the parameter {missing[0]!r}{others} receives no gradient, because the loss does not "
                "depend on it: use it in forward, or freeze it with requires_grad_(False)"
            )

    # ---------------------------------------------------------------------------- records

    def first_record(self) -> None:
        x, y = self.data.train_x[:_EVALUATION_BATCH], self.data.train_y[:_EVALUATION_BATCH]
        user_call("the model", lambda: self._checked_first(x[:2], y[:2]), x[:2])
        loss, accuracy = self.evaluate(x, y)
        self._record(loss, accuracy)
        self.save()

    def _checked_first(self, x: Tensor, y: Tensor) -> None:
        self.model.eval()
        with torch.no_grad():
            outputs = self.model(x)
        if self.known_loss:
            self.data.check_outputs(outputs, y)

    def record(self) -> None:
        self._record(self.loss_sum / self.since, self.right / self.seen if self.seen else None)
        self.loss_sum, self.right, self.seen, self.since = 0.0, 0, 0, 0

    def _record(self, train_loss: float, train_accuracy: float | None) -> None:
        x, y = self.data.test_x, self.data.test_y
        test = self.evaluate(x, y) if len(x) else (None, None)
        run = self.run
        run.steps.append(run.step)
        for name, value in zip(_CURVES, (train_loss, train_accuracy, *test), strict=True):
            if value is not None:
                getattr(run, name).append(value)
                self.latest[name] = value
        self.good = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor) -> tuple[float, float | None]:
        """Loss and accuracy over all samples, the network in evaluation mode."""
        self.model.eval()
        total, right, scored = 0.0, 0, False
        for i in range(0, len(x), _EVALUATION_BATCH):
            xs, ys = x[i : i + _EVALUATION_BATCH], y[i : i + _EVALUATION_BATCH]
            outputs = user_call("the model", partial(self.model, xs), xs, self.run.step)
            value = user_call("the loss", partial(self.loss, outputs, ys), xs, self.run.step)
            # what is no real scalar is refused at the first step, with a better message than here
            real = isinstance(value, Tensor) and value.is_floating_point()
            total += float(value.mean() if real else math.nan) * len(xs)
            if self._scores(outputs, ys):
                scored = True
                right += int((outputs.argmax(-1) == ys).sum())
        self.model.train()
        return total / len(x), right / y.numel() if scored else None

    def keep_last_good(self, failure: _Diverged) -> None:
        run, kept = self.run, "the network is as it was before this step"
        if first_nonfinite_state(self.model) is not None:
            self.model.load_state_dict(self.good, strict=False)
            kept = f"the network was set back to step {run.steps[-1]}"
        where = f" at {failure.layer!r}" if failure.layer else ""
        run.status, run.failed_step, run.failed_layer = "diverged", run.step, failure.layer
        run.reason = f"{failure.what} at step {run.step}{where}; {kept}: use a smaller learning rate or clip="

    # ------------------------------------------------------------------------ checkpoints

    def fingerprint(self) -> dict[str, Any]:
        shapes = {k: [str(v.dtype), *v.shape] for k, v in self.model.state_dict().items()}
        return {
            "optimizer": self.run.optimizer,
            "controller": kind_of(self.controller),
            "batch size": self.run.batch_size,
            "seed": self.run.seed,
            "loss": getattr(self.loss, "__qualname__", type(self.loss).__name__),
            "clip": self.clip,
            **{f"{k} of the optimizer": v for k, v in self.optimizer.defaults.items() if is_setting(k, v)},
            "data": [self.data.name, str(self.data.train_x.dtype), *self.data.train_x.shape],
            **{f"tensor {name}": shape for name, shape in shapes.items()},
        }

    def save(self) -> None:
        if self.checkpoint is None:
            return
        random = {"cpu": torch.get_rng_state()}
        if self.order.x.is_cuda:
            random["cuda"] = torch.cuda.get_rng_state(self.order.x.device)
        self.run.unsaved = ""
        state = {
            "fingerprint": self.fingerprint(),
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "controller": self._controller_state(),
            "callback": self.callback.state_dict() if hasattr(self.callback, "state_dict") else None,
            "order": self.order.state_dict(),
            "random": random,
            "run": asdict(self.run),
            "sums": (self.loss_sum, self.right, self.seen, self.since),
        }
        try:
            save_tree(state, self.checkpoint)
        except CheckpointError as error:
            if not self.run.step:  # nothing is lost yet: better to stop now than to find out after hours
                raise
            self.run.unsaved = str(error)
            warnings.warn(f"{error}; the run goes on", RuntimeWarning, stacklevel=2)

    def _controller_state(self) -> Any:
        if self.controller is None:
            return None
        if not hasattr(self.controller, "state_dict"):
            raise CheckpointError(
                f"the controller {type(self.controller).__name__} has no state_dict(), so that a checkpoint would be "
                "without it: add state_dict and load_state_dict, or leave checkpoint= out"
            )
        return self.controller.state_dict()

    def restore(self) -> None:
        assert self.checkpoint is not None
        state = load_tree(self.checkpoint)
        discard_partial(self.checkpoint)
        try:
            state = upgraded(state)
            was, now = state["fingerprint"], self.fingerprint()
            for key in {**now, **was}:
                if was.get(key) != now.get(key):
                    raise CheckpointError(
                        f"the checkpoint {str(self.checkpoint)!r} belongs to another run: {key} was "
                        f"{was.get(key)}, now it is {now.get(key)}; give the same settings, or name another file"
                    )
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.controller is not None:
                self.controller.load_state_dict(state["controller"])
            # a run may be looked at from its middle on, or no longer
            if hasattr(self.callback, "load_state_dict") and state.get("callback") is not None:
                self.callback.load_state_dict(state["callback"])
            self.order.load_state_dict(state["order"])
            torch.set_rng_state(state["random"]["cpu"])
            if "cuda" in state["random"]:
                torch.cuda.set_rng_state(state["random"]["cuda"], self.order.x.device)
            self.run = Run(**{**checked_record(state["run"]), "total_steps": self.run.total_steps})
            self.controls.resume(self.run)
            self._count_again()
            self.loss_sum, self.right, self.seen, self.since = state["sums"]
        except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            lack = (
                f"it lacks {error}, as one of another version would" if isinstance(error, KeyError) else error
            )
            raise CheckpointError(
                f"the checkpoint {str(self.checkpoint)!r} cannot be used: {lack}"
            ) from error
        self.good = {k: v.detach().clone() for k, v in self.model.state_dict().items()}


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.LBFGS)
