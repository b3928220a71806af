"""What steers an optimizer during a run: stepped after it, like a torch scheduler."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from bolza.core.errors import ArgumentError
from bolza.core.history import History

__all__ = ["Controller"]

Action = Mapping[str, "float | Sequence[float]"]


class Controller:
    """Base of the controllers that are worn over an optimizer.

    Call ``step`` after ``optimizer.step()`` and before the gradients are cleared. A subclass says in :meth:`decide`
    what is to change; the base writes it to the parameter groups, keeps the :class:`History`, and saves and loads.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        keep_update: copy the parameters before each update, so that the update can be scaled afterwards.

    Attributes:
        optimizer: what is controlled.
        batches: what has the ``batch_size`` that an action may set, see :meth:`attach_batches`.
        history: learning rate, momentum, batch size and :meth:`log` over the run.

    Raises:
        ArgumentError: ``optimizer`` is not one.

    Example:
        >>> class Warmup(Controller):
        ...     def decide(self, observation):
        ...         return {"lr": min(0.1, 0.01 * (self.count + 1))}
        >>> weight = torch.ones(1, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=0.0)
        >>> controller = Warmup(optimizer)
        >>> for _ in range(3):
        ...     weight.square().sum().backward()
        ...     optimizer.step()
        ...     action = controller.step()
        >>> controller.history.values["lr"]
        [0.01, 0.02, 0.03]
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, keep_update: bool = False) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ArgumentError(
                f"optimizer={optimizer!r} is no torch.optim.Optimizer: make one and wear the controller over it"
            )
        self.optimizer = optimizer
        self.batches: Any = None
        self.history = History()
        self.count = 0
        self.moved = False
        self._keep = keep_update
        self._before: dict[Tensor, Tensor] = {}
        self._wear()

    def _wear(self) -> None:
        this = weakref.ref(self)  # the hook must not keep the controller alive

        def note(*_: Any) -> None:
            controller = this()
            if controller is not None:
                controller._note()

        self._hook = self.optimizer.register_step_pre_hook(note)
        weakref.finalize(self, self._hook.remove)

    def __getstate__(self) -> dict[str, Any]:
        """All but the hook, which belongs to this controller and its optimizer."""
        return {name: value for name, value in vars(self).items() if name != "_hook"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Wear a copy over the optimizer that was copied along."""
        vars(self).update(state)
        self._wear()

    # ------------------------------------------------------------------- what a subclass says

    def decide(self, observation: Mapping[str, Any]) -> Action:
        """Return what is to change.

        Args:
            observation: what the loop passed to :meth:`step`, tensors detached.

        Returns:
            New values of entries of the parameter groups, or of ``"batch_size"``: a number for all groups
            (``"lr"`` is that of the first group that has one other than 0; the ratios between groups stay), or one
            number a group.
        """
        raise NotImplementedError

    def log(self) -> dict[str, float]:
        """Numbers worth drawing, beside learning rate, momentum and batch size."""
        return {}

    def memory(self) -> Any:
        """What the next decision depends on: numbers, strings, tensors, and lists, tuples and dicts of them."""
        return None

    def load_memory(self, memory: Any) -> None:
        """Take up what :meth:`memory` gave."""

    # ------------------------------------------------------------------------- what it can use

    @property
    def parameters(self) -> list[Tensor]:
        """Parameters that the optimizer may move, group after group."""
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]

    @property
    def moving(self) -> list[Tensor]:
        """Those of them that have a gradient."""
        return [p for p in self.parameters if p.grad is not None]

    @property
    def leader(self) -> int:
        """Number of the group that stands for all: the first one whose learning rate is not 0."""
        rates = [float(group.get("lr", 0.0)) for group in self.optimizer.param_groups]
        return next((i for i, rate in enumerate(rates) if rate > 0), 0)

    def before(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Values of parameters before the last update, in buffers that the next update overwrites."""
        return [self._before[p] for p in parameters]

    @torch.no_grad()
    def scale_update_(
        self, parameters: Sequence[Tensor], u: float | Sequence[float] | Sequence[Tensor]
    ) -> None:
        """Replace the last update by u times itself, θ ← θ_before + u (θ − θ_before).

        Args:
            parameters: some of :attr:`moving`.
            u: a number; one number a parameter; or one tensor a parameter, of its shape.
        """
        after, before = list(parameters), self.before(parameters)
        if isinstance(u, int | float):
            torch._foreach_lerp_(after, before, 1.0 - u)
            return
        weights: Sequence[Any] = u
        for p, old, w in zip(after, before, weights, strict=True):
            p.lerp_(old, 1 - w)

    def attach_batches(self, batches: Any) -> None:
        """Name what draws the batches, so that an action can set their size.

        Args:
            batches: anything with a ``batch_size`` that can be set, or a loader whose ``batch_sampler`` has one.

        Raises:
            ArgumentError: it has none.
        """
        if isinstance(batches, DataLoader) and not isinstance(batches.batch_sampler, BatchSampler):
            batches = batches.batch_sampler  # torch's own reads its size only at the start of an epoch
        if isinstance(batches, DataLoader) or not hasattr(batches, "batch_size"):
            raise ArgumentError(
                f"batches={type(batches).__name__} has no batch_size: give a bolza.data.AdjustableBatchSampler"
            )
        self.batches = batches

    # ------------------------------------------------------------------------------- the face

    def step(self, **observation: Any) -> dict[str, Any]:
        """Observe, decide, act.

        Args:
            observation: what the loop knows, for example ``loss=``; the keys are the law's business.

        Returns:
            What was changed. Empty where a law that scales updates is stepped without one, as after a step that
            a gradient scaler left out.

        Raises:
            ArgumentError: the law sets what the optimizer does not have.
        """
        if self._keep and not self.moved:
            return {}
        given = {k: v.detach() if isinstance(v, Tensor) else v for k, v in observation.items()}
        action = dict(self.decide(given) or {})  # a law that changes nothing may return nothing
        for key, value in action.items():
            self._write(key, value)
        self.count += 1
        self.moved = False
        if self.history.wants(self.count):
            self.history.add(self.count, self.readings())
        return action

    def readings(self) -> dict[str, float]:
        """Learning rate and momentum of the leading group, batch size, and :meth:`log`."""
        first = self.optimizer.param_groups[self.leader]
        found: dict[str, float] = {n: float(first[n]) for n in ("lr", "momentum") if n in first}
        if self.batches is not None:
            found["batch_size"] = float(self.batches.batch_size)
        return found | self.log()

    def state_dict(self) -> dict[str, Any]:
        """State of the law; the hyper-parameters are in the optimizer's own state."""
        memory = copy.deepcopy(self.memory())
        return {"count": self.count, "history": self.history.state_dict(), "memory": memory}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.count = state_dict["count"]
        self.history.load_state_dict(state_dict["history"])
        self.load_memory(copy.deepcopy(state_dict["memory"]))

    def remove(self) -> None:
        """Take the controller off: the optimizer forgets it."""
        self._hook.remove()

    @torch.no_grad()
    def _note(self) -> None:
        self.moved = True
        if not self._keep:
            return
        parameters = self.parameters
        for p in parameters:
            if p not in self._before:
                self._before[p] = torch.empty_like(p, requires_grad=False)
        torch._foreach_copy_([self._before[p] for p in parameters], parameters)

    def _write(self, key: str, value: Any) -> None:
        if key == "batch_size":
            if self.batches is None:
                raise ArgumentError(
                    f"{type(self).__name__} sets batch_size={value}, but does not know what draws the batches: "
                    "call attach_batches(sampler)"
                )
            self.batches.batch_size = int(_usable(type(self).__name__, key, value))
            return
        groups = self.optimizer.param_groups
        if key not in groups[0]:
            raise ArgumentError(
                f"{type(self).__name__} sets {key!r}, which {type(self.optimizer).__name__} does not have: its "
                f"groups have {', '.join(k for k in groups[0] if k != 'params')}"
            )
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != len(groups):
                raise ArgumentError(
                    f"{type(self).__name__} sets {len(value)} values of {key!r} for {len(groups)} groups: give one each"
                )
            values = [_usable(type(self).__name__, key, v) for v in value]
        else:
            value = _usable(type(self).__name__, key, value)
            reference = float(groups[self.leader][key]) if key == "lr" else 0.0
            values = [value * (float(g[key]) / reference) if reference > 0 else value for g in groups]
        for group, new in zip(groups, values, strict=True):
            if isinstance(group[key], Tensor):
                group[key].fill_(new)  # a compiled step holds on to the tensor
            else:
                group[key] = new


def _usable(who: str, key: str, value: Any) -> float:
    """The number that a law wants to set, or an error before it can do harm."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"{who} sets {key}={value!r}, which is no number: return one from decide()"
        ) from error
    if not math.isfinite(number) or (key == "lr" and number < 0):
        must = "be finite" if not math.isfinite(number) else "not be negative"
        raise ArgumentError(f"{who} sets {key}={number}, which must {must}: bound it in decide()")
    return number
