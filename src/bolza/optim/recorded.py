"""The base of optimizers that work on the states and costates of a network, not only on its gradients."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.core.trajectory import Trajectory
from bolza.systems.module import ModuleSystem
from bolza.systems.patched import Patched
from bolza.systems.recorder import Recorder
from bolza.systems.stages import Split
from bolza.systems.trace import library_runs

__all__ = ["RecordedOptimizer", "check_number", "unwrapped"]


def unwrapped(model: Any) -> tuple[nn.Module, Any]:
    """The network itself, and the group of processes that share its gradients (``None`` for one process).

    Raises:
        ArgumentError: ``model`` is no module.
        UnsupportedError: the model is compiled, or replicated over devices by threads.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"model is of type {type(model).__name__}, but this optimizer needs the network itself, not only its "
            "parameters: pass the nn.Module"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.module, model.process_group
    if isinstance(model, nn.DataParallel):
        raise UnsupportedError(
            "DataParallel replicates the network in threads, where its states cannot be seen: "
            "use DistributedDataParallel"
        )
    if hasattr(model, "_orig_mod"):
        raise UnsupportedError(
            "a compiled network hides its layers: pass the network that torch.compile was given, and train it "
            "uncompiled"
        )
    return model, None


def check_number(
    name: str, value: Any, *, low: float = 0.0, high: float = math.inf, open_low: bool = False
) -> None:
    """Raise an ArgumentError unless ``low <= value < high`` (``low < value`` if ``open_low``) and finite."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    good = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    if not good or number < low or (open_low and number == low) or number >= high:
        least = f"greater than {low:g}" if open_low else f"at least {low:g}"
        most = "" if math.isinf(high) else f" and below {high:g}"
        raise ArgumentError(f"{name} is {value!r}: it must be a number, {least}{most}")


def loss_scale(factor: float) -> float:
    """The scale S of the loss that a factor between ``.grad`` and the recorded gradients stands for.

    A factor just below 1 is clipping, which the states and costates say nothing about; 1/256 and less is that of a
    loss that was scaled for half precision, by a power of two.
    """
    return 2.0 ** math.floor(-math.log2(factor) + 1e-3) if 0 < factor <= 2.0**-8 else 1.0


class RecordedOptimizer(Optimizer):
    """An optimizer that sees what its network did: states x_t and costates p_t of each stage.

    The network is read as stages when it first runs with gradients; from then on each ``backward()`` leaves
    a trajectory (several, when gradients are accumulated), which :meth:`step` hands to :meth:`_update`.
    When the optimizer is deleted, or closed, its hooks are taken off the network. Copy or pickle an optimizer together
    with its network, as one tuple: then the new pair belongs together.

    Args:
        model: the network, or a DistributedDataParallel around it.
        defaults: defaults of the parameter groups.
        params: parameters or groups, as for any optimizer; by default all that require gradients.
        example: a batch of inputs, to read the network now rather than at its first run.
        stages: where to cut, as for :func:`~bolza.systems.as_system`.
        split: as for :func:`~bolza.systems.as_system`.
        record: whether to record at all; without, ``_update`` is given no trajectories.

    Attributes:
        module: the network itself.
        system: the network as stages; ``None`` before its first run.
        group: the group of processes that share gradients, or ``None``.

    Raises:
        ArgumentError: ``model`` is no module, or has nothing to train, or ``params`` are not its own.
        UnsupportedError: the model hides its layers.
    """

    _layers = False  # whether the signals of layers are recorded too
    _settings: tuple[str, ...] = ()  # attributes that go into a copy

    def __init__(
        self,
        model: nn.Module,
        defaults: dict[str, Any],
        *,
        params: Iterable[Any] | None = None,
        example: Any = None,
        stages: Sequence[str] | None = None,
        split: Split = "parameters",
        record: bool = True,
    ) -> None:
        self.module, self.group = unwrapped(model)
        own = [p for p in self.module.parameters() if p.requires_grad]
        if not own:
            raise ArgumentError("model has no parameter that requires a gradient: there is nothing to train")
        super().__init__(own if params is None else list(params), defaults)
        self._stages, self._split, self._record = stages, split, record
        self._fresh()
        if record and example is not None:
            self._open(example)
        elif record:
            self._wait()

    def _fresh(self) -> None:
        """Begin without anything that hangs on a network that was read."""
        self._recorder: Recorder | None = None
        self._opening: Patched | None = None

    def _wait(self) -> None:
        """Read the network at its next run with gradients."""
        self._opening = Patched(self.module, "forward", self._first_run)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train further parameters of the network.

        Raises:
            ArgumentError: one is not a parameter of the network, whose states say nothing about it.
        """
        super().add_param_group(param_group)
        known = {id(p) for p in self.module.parameters()}
        for p in self.param_groups[-1]["params"]:
            if id(p) not in known:
                self.param_groups.pop()
                raise ArgumentError(
                    f"params: a tensor of shape {tuple(p.shape)} is no parameter of {type(self.module).__name__}: join "
                    "the networks in one module and give that as model, or train it by an optimizer of its own"
                )

    @property
    def system(self) -> ModuleSystem | None:
        """The network as stages, along the arguments that it last ran with; ``None`` before its first run."""
        if self._recorder is None:
            return None
        passes = self._recorder.passes
        return passes[-1].layout.system if passes else self._recorder.system

    def _open(self, example: Any) -> Recorder:
        self._recorder = self._watched(
            Recorder(
                self.module, example, stages=self._stages, split=self._split, keep="all", layers=self._layers
            )
        )
        return self._recorder

    def _watched(self, recorder: Recorder) -> Recorder:
        """The recorder, which is closed when the optimizer is deleted."""
        weakref.finalize(self, recorder.close).atexit = False
        return recorder

    def _first_run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if library_runs.get() or not torch.is_grad_enabled() or self._opening is None:
            return original(*args, **kwargs)
        self._opening.undo()
        self._opening = None
        try:
            bound = inspect.signature(self.module.forward).bind(*args, **kwargs)
            recorder = self._open(tuple(bound.arguments.values()))
        except BaseException:
            self._wait()
            raise
        recorder._begin(args, kwargs)
        output = self.module.forward(*args, **kwargs)
        noted = recorder._end(output)  # the hooks set in this call may come too late for it
        return output if noted is None else noted

    def close(self) -> None:
        """Take all hooks off the network; the optimizer cannot step any more."""
        if self._opening is not None:
            self._opening.undo()
        if self._recorder is not None:
            self._recorder.close()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and forget the passes that they came from."""
        if self._recorder is not None:
            self._recorder.clear()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step with the gradients and passes since the last ``zero_grad``.

        Args:
            closure: computes the loss and its gradients, and returns the loss.

        Returns:
            What the closure returns, ``None`` without one.

        Raises:
            UnsupportedError: there are gradients, but the passes that they came from were not seen.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            return loss
        recorder = self._recorder
        if recorder is None:
            if self._opening is not None:
                raise UnsupportedError(
                    "there are gradients, but the network has not been called since the optimizer was made: call the "
                    "module itself (not functional_call or one of its layers), after making the optimizer"
                )
            self._update(())
            return loss
        trajectories = recorder.trajectories
        if not trajectories:
            raise UnsupportedError(
                f"there are gradients, but no pass of the network was recorded: {recorder._reason}. Call the "
                "module itself, then backward(), then step()"
            )
        with recorder.paused():
            self._update(trajectories)
        recorder.clear()
        return loss

    def _update(self, trajectories: tuple[Trajectory, ...]) -> None:
        """Change the parameters, in place; called without gradients."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:  # hooks and passes stay behind
        names = ("module", "group", "_stages", "_split", "_record", *self._settings)
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "module" in state:  # a copy, and no state_dict
            self._fresh()
            if self._record:
                self._wait()
