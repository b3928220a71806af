r"""The horizon of a continuous-depth block as a control of its own (Liu, Chen & Theodorou, 2021).

The cost J = E[Φ(x(T))] + ½ c T² has in T, to first order in the dynamics,

    s = E[⟨Φ_x, F(T, x_T)⟩],   Q_T = c T + s,   Q_TT = c + s²,   Q_Tu = s ∇_θJ

and the second-order step answers the weight change Δθ that was just made, as feedback:

    T ← T − η (Q_T + ⟨Q_Tu, Δθ⟩) / Q_TT

Near its optimum this step behaves like η (ds/dT) / c: without a lower limit of c, or a limit of the step, it
oscillates. Both are there.

Reference: Liu, Chen & Theodorou (2021), *Second-Order Neural ODE Optimizer*, arXiv:2109.14158, §3.4.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from bolza.core import cites
from bolza.core.errors import ArgumentError, DivergenceError, UnsupportedError
from bolza.ops.replay import frozen_statistics
from bolza.ops.trees import Tree, float_leaves, tree_detach
from bolza.optim.recorded import check_number
from bolza.optim.second_order import REFERENCE
from bolza.optim.sites import Hook, counts

__all__ = ["HorizonController", "horizon_step"]


@cites(REFERENCE)
def horizon_step(
    T: float,
    s: float,
    s2: float,
    *,
    lr: float,
    c: float,
    feedback: float = 0.0,
    curvature: bool = True,
    max_change: float = math.inf,
) -> float:
    r"""One step of the horizon, T − η (c T + s + s ⟨∇θ, Δθ⟩) / (c + s²).

    Args:
        T: horizon.
        s: derivative of the loss in T, E⟨Φ_x, F⟩.
        s2: its square, or the mean of its square.
        lr: step size η.
        c: weight of the cost ½ c T².
        feedback: ⟨∇θ, Δθ⟩, gradient times the change of the weights.
        curvature: without, the plain gradient step T − η (c T + s).
        max_change: largest change, as a share of T.

    Returns:
        The new horizon.

    Example:
        >>> horizon_step(2.0, s=1.0, s2=1.0, lr=0.5, c=1.0)         # 2 − ½ (2 + 1) / 2
        1.25
        >>> horizon_step(2.0, s=1.0, s2=1.0, lr=0.5, c=1.0, max_change=0.1)
        1.8
    """
    slope = c * T + s
    change = lr * ((slope + s * feedback) / (c + s2) if curvature else slope)
    limit = max_change * abs(T)
    return T - min(max(change, -limit), limit)


@cites(REFERENCE)
class HorizonController:
    r"""Training of the horizon of a continuous-depth block beside its weights.

        T ← T − η (c T + s + s ⟨∇θ, Δθ⟩) / (c + s²),   s = E[⟨Φ_x, F(T, x_T)⟩]

    every few steps of an optimizer, with running means of s and of s². Call :meth:`step` after ``optimizer.step()``,
    like a scheduler. A short horizon is a shallow network: what it saves is evaluations, if the block takes steps of
    a fixed length or adapts them.

    Args:
        block: module with an attribute ``horizon`` (T, a number that may be changed) whose output is the state at T,
            and a method ``velocity(T, x_T)``, such as :class:`bolza.models.continuous.ContinuousBlock`.
        optimizer: of the weights, whose steps are answered.
        lr: step size η; with ``curvature``, as a share of a Newton step.
        c: weight of the cost ½ c T²: what a unit of horizon costs, in units of the loss; at least 1e-4, because the
            second-order step has c in its denominator.
        every: steps of the optimizer between two of the horizon.
        decay: of the running means.
        low: least horizon.
        high: largest horizon.
        max_change: largest change in one step, as a share of T; ``inf`` for no limit.
        curvature: without, a plain gradient step of size η on T.
        feedback: whether the change of the weights is answered.
        velocity: F(T, x_T), instead of the method of the block.
        scaler: of the loss, if there is one: passes that overflow its scale are left out, as its steps are.

    Attributes:
        history: the horizons so far, the first one included.

    Raises:
        ArgumentError: an argument makes no sense.
        UnsupportedError: the block has no horizon or no velocity.
        DivergenceError: in ``step``: the derivative is not finite.

    Reference: Liu, Chen & Theodorou (2021), arXiv:2109.14158, §3.4. Departures: the weight c has a lower limit and
    the step an upper one; the running means start unbiased.

    Example:
        >>> class Drift(nn.Module):                          # ẋ = v from x(0) = x
        ...     horizon = 2.0
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.v = nn.Parameter(torch.ones(1))
        ...     def velocity(self, t, x):
        ...         return self.v.expand_as(x)
        ...     def forward(self, x):
        ...         return x + self.horizon * self.v
        >>> block = Drift()
        >>> optimizer = torch.optim.SGD(block.parameters(), lr=0.0)
        >>> control = HorizonController(block, optimizer, lr=0.1, c=0.1, every=1)
        >>> ((block(torch.zeros(4, 1)) - 1) ** 2).mean().backward()
        >>> optimizer.step(); control.step()
        >>> round(block.horizon, 4), control.derivative       # s = 2 (T − 1) = 2, T − 0.1 (0.2 + 2) / (0.1 + 4)
        (1.9463, 2.0)
    """

    def __init__(
        self,
        block: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        lr: float = 0.05,
        c: float = 1e-3,
        every: int = 50,
        decay: float = 0.99,
        low: float = 0.1,
        high: float = 10.0,
        max_change: float = 0.1,
        curvature: bool = True,
        feedback: bool = True,
        velocity: Callable[[float, Tree], Tree] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if not isinstance(getattr(block, "horizon", None), int | float):
            raise UnsupportedError(
                f"block is a {type(block).__name__} without a number `horizon`: give the continuous-depth block itself"
            )
        if velocity is None and not callable(getattr(block, "velocity", None)):
            raise UnsupportedError(
                f"{type(block).__name__} has no method velocity(T, x): pass velocity=, the field at the final time"
            )
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ArgumentError(
                f"optimizer is a {type(optimizer).__name__}: give the optimizer of the weights"
            )
        check_number("lr", lr)
        check_number("c", c, low=1e-4)
        check_number("every", every, low=1)
        check_number("decay", decay, high=1.0)
        check_number("low", low, open_low=True)
        check_number("high", high, low=low)
        if max_change != math.inf:
            check_number("max_change", max_change, open_low=True)
        duck: Any = block
        self._block = duck
        self.optimizer = optimizer
        self.lr, self.c, self.every, self.decay = lr, c, int(every), decay
        self.low, self.high, self.max_change = low, high, max_change
        self.curvature, self.feedback = curvature, feedback
        self._velocity, self._scaler = velocity, scaler
        self._s: list[Tensor] = []  # of the passes since the last step
        self._answer: Tensor | float = 0.0  # ⟨∇θ, Δθ⟩ of the last step of the weights
        self._before: list[tuple[Tensor, Tensor]] = []
        self._means: Tensor | None = None  # of s and s², biased
        self._count = 0
        self.history: list[float] = [float(self._block.horizon)]
        self._handles = self._attach()

    @property
    def block(self) -> nn.Module:
        """The block whose horizon moves."""
        return self._block

    @property
    def derivative(self) -> float:
        """The running mean of s, the derivative of the loss in T; zero before the first step."""
        return self._running()[0]

    def step(self) -> None:
        """Take in the passes since the last call; every few calls, move the horizon."""
        if not self._s:
            return
        s = torch.stack(self._s).sum()
        self._s.clear()
        group = getattr(self.optimizer, "group", None)
        if group is not None:  # the loss is the mean over processes of mean losses
            torch.distributed.all_reduce(s, group=group)
            s = s / torch.distributed.get_world_size(group)
        if self._scaler is not None and not bool(s.isfinite()):
            return
        new = torch.stack([s, s.square()]) * (1 - self.decay)
        self._means = new if self._means is None else self.decay * self._means + new
        self._count += 1
        if self._count % self.every:
            return
        mean, square = self._running()
        if not math.isfinite(square):
            raise DivergenceError(
                f"the derivative of the loss in the horizon is not finite at step {self._count}: "
                "lower the learning rate of the weights",
                step=self._count,
            )
        moved = horizon_step(
            float(self._block.horizon),
            mean,
            square,
            lr=self.lr,
            c=self.c,
            feedback=float(self._answer),
            curvature=self.curvature,
            max_change=self.max_change,
        )
        self._block.horizon = min(max(moved, self.low), self.high)
        self.history.append(self._block.horizon)

    def state_dict(self) -> dict[str, Any]:
        """The running means, the count and the horizons so far."""
        return {
            "means": None if self._means is None else self._means.tolist(),
            "count": self._count,
            "history": list(self.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; the block's horizon is set too."""
        means = state["means"]
        self._means = None if means is None else torch.tensor(means, dtype=torch.float64)
        self._count, self.history = int(state["count"]), list(state["history"])
        self._block.horizon = self.history[-1]
        self._s.clear()

    def close(self) -> None:
        """Take the hooks off block and optimizer."""
        for handle in self._handles:
            handle.remove()

    def _running(self) -> tuple[float, float]:
        if self._means is None:
            return 0.0, 0.0
        mean, square = (self._means / (1 - self.decay**self._count)).tolist()
        return mean, square

    def _attach(self) -> list[Any]:
        me = weakref.ref(self)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            control = me()
            # not a copy of the block, which carries its hooks
            if control is None or module is not control._block or not counts():
                return
            if all(leaf.requires_grad for leaf in float_leaves(output)):
                control._note(output)

        def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            control = me()
            if control is not None and control.feedback and (control._count + 1) % control.every == 0:
                held = (p for group in optimizer.param_groups for p in group["params"])
                control._before = [(p, p.detach().clone()) for p in held if p.requires_grad]

        def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            control = me()
            if control is not None and control._before:
                pairs = [(p.grad, p.detach() - old) for p, old in control._before if p.grad is not None]
                control._before = []
                control._answer = torch.stack([(g * d).sum() for g, d in pairs]).sum() if pairs else 0.0

        return [
            self._block.register_forward_hook(Hook(after)),
            self.optimizer.register_step_pre_hook(before_step),
            self.optimizer.register_step_post_hook(after_step),
        ]

    def _note(self, output: Tree) -> None:
        """Evaluate the field at the end of a pass; when the costate comes back, their product."""
        velocity = self._velocity or self._block.velocity
        with torch.no_grad(), frozen_statistics(self._block):
            speeds = float_leaves(velocity(float(self._block.horizon), tree_detach(output)))
        noted = self._s
        for leaf, speed in zip(float_leaves(output), speeds, strict=True):
            leaf.register_hook(partial(_note_product, noted, speed, self._scaler))


def _note_product(
    noted: list[Tensor], speed: Tensor, scaler: torch.amp.GradScaler | None, costate: Tensor
) -> None:
    scale = 1.0 if scaler is None else scaler.get_scale()
    noted.append((costate.detach() * speed).sum().double() / scale)
