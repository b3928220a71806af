r"""Gradient descent as a PID controller of the gradient signal.

    V ← α V + g                                 integral: momentum
    D ← α D + (1 − α)(g − g_prev)               derivative, filtered
    θ ← θ − η (g + K_i V + K_d D)

The derivative acts against a gradient that is still large but already falling, and so damps the overshoot
that momentum causes.

Reference: An, Wang, Sun, Xu, Dai & Zhang (2018), *A PID Controller Approach for Stochastic Optimization of Deep
Networks*, CVPR.

Departures: there is no derivative on the first step, where there is no change yet (the published code keeps
a gradient of zero before the first, which kicks the derivative). With V in steady state the step is that of
momentum at the rate η (K_i + 1 − α): compare at equal values of it, see :func:`equivalent_lr`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bolza.core.errors import UnsupportedError
from bolza.core.reference import Reference, cites
from bolza.optim.recorded import check_number

__all__ = ["PIDSGD", "equivalent_lr", "pid_step"]

REFERENCE = Reference(
    "an2018pid",
    "An, Wangpeng and Wang, Haoqian and Sun, Qingyun and Xu, Jun and Dai, Qionghai and Zhang, Lei",
    "A PID Controller Approach for Stochastic Optimization of Deep Networks",
    2018,
    venue="IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)",
)


def pid_step(
    theta: list[Tensor],
    g: list[Tensor],
    V: list[Tensor],
    D: list[Tensor],
    g_prev: list[Tensor],
    *,
    lr: float,
    alpha: float,
    K_i: float,
    K_d: float,
) -> None:
    """One step of the PID controller, in place on θ, V, D and g_prev.

    Example:
        >>> theta, V, D = ([torch.zeros(1)] for _ in range(3))
        >>> V, D, before = [torch.ones(1)], [torch.zeros(1)], [torch.tensor([3.0])]
        >>> pid_step(theta, [torch.ones(1)], V, D, before, lr=0.1, alpha=0.5, K_i=2.0, K_d=1.0)
        >>> V, D, theta
        ([tensor([1.5000])], [tensor([-1.])], [tensor([-0.3000])])
    """
    torch._foreach_mul_(V, alpha)
    torch._foreach_add_(V, g)
    torch._foreach_add_(theta, g, alpha=-lr)
    torch._foreach_add_(theta, V, alpha=-lr * K_i)
    if K_d:
        torch._foreach_mul_(D, alpha)
        torch._foreach_add_(D, g, alpha=1 - alpha)
        torch._foreach_add_(D, g_prev, alpha=alpha - 1)
        torch._foreach_add_(theta, D, alpha=-lr * K_d)
    torch._foreach_copy_(g_prev, g)


def equivalent_lr(lr: float, momentum: float = 0.9, integral: float = 5.0) -> float:
    """Rate η (K_i + 1 − α) at which SGD with momentum α takes the same step where the gradient is constant.

    Args:
        lr: η.
        momentum: α.
        integral: K_i.

    Returns:
        The rate for ``torch.optim.SGD(…, momentum=α)``.

    Reference: An et al. (2018); the published comparison is at equal η, where PID's steps are 3–5 times as large.

    Example:
        >>> round(equivalent_lr(0.01, 0.9, 3.0), 4)
        0.031
    """
    return lr * (integral + 1 - momentum)


@cites(REFERENCE)
class PIDSGD(torch.optim.Optimizer):
    r"""Stochastic gradient descent with integral and derivative action, θ ← θ − η (g + K_i V + K_d D).

    Args:
        params: parameters or groups of them.
        lr: learning rate η; momentum at the same size of step has the rate :func:`equivalent_lr`.
        momentum: memory α of V and D.
        integral: K_i. With K_i = α and K_d = 0 this is SGD with Nesterov momentum, with both zero plain SGD.
        derivative: K_d, in steps. On a quadratic of curvature h the overshoot falls until K_d is some 1/(η h).
        weight_decay: λ of λ‖θ‖²/2 added to the loss.

    Raises:
        ArgumentError: a hyper-parameter is out of its range.
        UnsupportedError: (in step) a gradient is sparse.

    Reference: An et al. (2018), §4. Departure: no derivative on the first step.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = PIDSGD([w], lr=0.01, integral=3.0, derivative=100.0)
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     (w**2 / 2).sum().backward()
        ...     optimizer.step()
        >>> abs(w.item()) < 1e-3
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        momentum: float = 0.9,
        integral: float = 5.0,
        derivative: float = 10.0,
        weight_decay: float = 0.0,
    ) -> None:
        check_number("momentum", momentum, high=1.0)
        values = {"lr": lr, "integral": integral, "derivative": derivative, "weight_decay": weight_decay}
        for name, value in values.items():
            check_number(name, value)
        super().__init__(params, {**values, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step; parameters without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            if not moving:
                continue
            if any(p.grad.is_sparse for p in moving):
                raise UnsupportedError(
                    "a gradient is sparse, but the derivative needs dense ones: make the embedding with sparse=False"
                )
            g = [p.grad for p in moving]
            if group["weight_decay"]:
                g = list(torch._foreach_add(g, moving, alpha=group["weight_decay"]))
            for p, gradient in zip(moving, g, strict=True):
                state = self.state[p]
                if not state:
                    state["V"] = torch.zeros_like(p)
                    state["D"] = torch.zeros_like(p)
                    state["g_prev"] = gradient.clone()  # no change yet
            pid_step(
                moving,
                g,
                *([self.state[p][name] for p in moving] for name in ("V", "D", "g_prev")),
                lr=float(group["lr"]),
                alpha=group["momentum"],
                K_i=group["integral"],
                K_d=group["derivative"],
            )
        return loss
