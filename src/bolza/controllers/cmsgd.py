r"""Momentum by feedback: critical damping, less where the noise floor would exceed the loss.

    v ← μv − ηg,   x ← x + v,   μ ← μ + w(μ* − μ),   μ* = min{max(0, 1 − 2√(aη)), max(0, 1 − ηΣ/(4m))},   m = ḡ²/(2a)

and μ* = the cap where a ≤ 0. Curvature a, noise Σ and mean gradient ḡ come from running moments of gradient and
position, see :mod:`bolza.controllers.running_moments`.

Reference: Li, Tai & E (2017), arXiv:1511.06251, §4.2. Departures: m without the noise, as in
:mod:`bolza.controllers.csgd` (``form="released"`` is the authors' program, whose second bound is then at least
1 − aη/2 and seldom binds); momentum is held where the curvature is not significant, and capped, since at μ = 1 steps
pile up; no displacement may promise more decrease than the loss that there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bolza.controllers.coordinates import Coordinates
from bolza.controllers.moments import LI, momentum_law
from bolza.controllers.running_moments import (
    Form,
    Granularity,
    MomentsController,
    at_most,
    numbers_of,
)
from bolza.core.errors import ArgumentError
from bolza.core.reference import cites

__all__ = ["CMSGD"]


@cites(LI)
class CMSGD(MomentsController):
    r"""Give each entry, layer or the whole the momentum that its curvature, noise and slope ask for.

        μ* = min{max(0, 1 − 2√(aη)), max(0, 1 − ηΣa/(2ḡ²))}

    Call ``step(loss=…)`` after ``optimizer.step()`` and before the gradients are cleared. The controller keeps the
    velocity: the optimizer's own momentum becomes the start value and is then 0. Over another optimizer the velocity
    is made of its updates.

    Args:
        optimizer: any ``torch.optim.Optimizer``; its ``lr`` is η and stays as it is.
        granularity: one μ an ``"coordinate"``, ``"layer"`` (parameter tensor) or ``"global"``.
        form: ``"denoised"``, or ``"released"``, the authors' program, which counts the noise as loss: only critical
            damping is left of it. Its log is named ``"mu (damping only)"``.
        cap: largest momentum.
        beta: (β_min, β_max), memory of the running moments per observation.
        z: standard errors that the curvature must exceed; below, μ stays as it is.
        lower_bound: least value of the loss, for the bound on the first steps; used where ``step`` is given ``loss=``.
            None leaves it out.
        every: observe at every so many steps only.
        momentum: μ at the start; the optimizer's own where it has one, else 0.9.

    Raises:
        ArgumentError: a setting makes no sense.
        UnsupportedError: a parameter is complex, or a gradient sparse.

    Reference: Li, Tai & E (2017), arXiv:1511.06251, §4.2; departures in the module's text.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> theta = torch.full((100,), 3.0, requires_grad=True)
        >>> optimizer = torch.optim.SGD([theta], lr=0.2, momentum=0.9)
        >>> controller = CMSGD(optimizer)
        >>> for _ in range(500):        # a bowl ½θ² with noise: the floor of μ = 0.9 is 0.51
        ...     theta.grad = theta.detach() + torch.randn(100, generator=draw)
        ...     optimizer.step()
        ...     action = controller.step()
        >>> bool(theta.square().mean() / 2 < 0.12), controller.log()["mu"] < 0.4
        (True, True)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        granularity: Granularity = "coordinate",
        form: Form = "denoised",
        cap: float = 0.99,
        beta: tuple[float, float] = (0.9, 0.99),
        z: float = 1.0,
        lower_bound: float | None = 0.0,
        every: int = 1,
        momentum: float | None = None,
    ) -> None:
        if not 0 <= cap < 1:
            raise ArgumentError(f"cap={cap} must lie in [0, 1): at 1 steps pile up without bound")
        if momentum is not None and not 0 <= momentum < 1:
            raise ArgumentError(f"momentum={momentum} must lie in [0, 1)")
        if isinstance(optimizer, torch.optim.Optimizer):
            held = float(optimizer.param_groups[0].get("momentum", 0.0))
            momentum = momentum if momentum is not None else held or 0.9
            for group in optimizer.param_groups:
                if group.get("nesterov"):
                    raise ArgumentError(
                        "the optimizer has nesterov=True: the controller keeps a plain velocity"
                    )
                if "momentum" in group:
                    group["momentum"] = 0.0
        super().__init__(
            optimizer,
            granularity=granularity,
            beta=beta,
            z=z,
            every=every,
            form=form,
            lower_bound=lower_bound,
        )
        self.cap, self.start = cap, min(float(momentum or 0.0), cap)
        self.numbers = {self._name: self.start, "significant": 0.0, "guard": 1.0}

    controlled = 6

    @property
    def _name(self) -> str:
        return "mu" if self.form == "denoised" else "mu (damping only)"

    def extra_rows(self) -> int:
        """The velocity, and μ for entries."""
        return 2 if self.granularity == "coordinate" else 1

    def new_blocks(self, count: int) -> dict[str, list[float]]:
        """Momenta of the blocks."""
        return {"mu": [self.start] * count}

    def prepare_(self, room: Coordinates) -> None:
        """Start from the given momentum."""
        if self.granularity == "coordinate":
            for rows in room.rows:
                rows[6] = self.start

    @torch.no_grad()
    def decide(self, observation: Mapping[str, Any]) -> dict[str, float]:
        """Add the velocity to the last update; learn from it."""
        room, usable = self.room, self.usable()
        if usable is None:
            return {}
        moving, squares = usable
        observing = self.count % self.every == 0
        entries, plain = self.granularity == "coordinate", not self._keep
        momenta = self._blocks["mu"]
        if observing and not entries:
            self.learn_blocks("mu", moving, squares)
        sums: list[Tensor] = []
        size = 0
        for piece in room.pieces(moving):
            s = room.scratch(piece, 7)
            rows = room.of(piece)
            velocity = rows[5 if entries else 2]
            mu: Any = rows[6] if entries else momenta[self.block(piece)]
            g, after, x = self.views(piece, plain, s)
            velocity.mul_(mu).add_(torch.sub(after, x, out=s[3]))
            after.copy_(x).add_(velocity)
            room.scatter(piece, after)
            sums.append(velocity.dot(velocity))
            if observing and entries:
                sums += self.learn_entries(piece, g, x, s[3:])
                size += len(velocity)
        numbers = numbers_of(sums)
        if size:
            self.numbers[self._name] = min(self.cap, max(0.0, sum(numbers[2::3]) / size))
            self.numbers["significant"] = sum(numbers[1::3]) / size
            room.saw(moving)
        made = sum(numbers[::3] if size else numbers)
        self.promised(at_most(made, squares), squares)
        guard = self.numbers["guard"] = self.guard(observation.get("loss"), squares)
        if guard < 1:
            self._shorten(moving, guard)
        return {}

    def _shorten(self, moving: Sequence[Tensor], share: float) -> None:
        """Take back a part of the last displacement, and of the velocity."""
        number = 5 if self.granularity == "coordinate" else 2
        for p in moving:
            velocity = self.room.row(number, p)
            p.detach().sub_(velocity.to(p.dtype), alpha=1 - share)
            velocity.mul_(share)

    def move_(
        self, rows: Sequence[Tensor], weight: Tensor, rate: float | Tensor, curvature: Tensor, scratch: Tensor
    ) -> None:
        """Move μ towards min{1 − 2√(aη), 1 − ηΣa/(2ḡ²)}, both 1 where a ≤ 0, within 0 and the cap."""
        mean_g, var_g, mu = rows[0], rows[2], rows[6]
        damped = curvature.mul_(rate)
        square = torch.mul(mean_g, mean_g, out=scratch)
        if self.form == "released":
            square.add_(var_g)
        quiet = torch.div(var_g, square, out=scratch).mul_(damped).mul_(-0.5).add_(1)
        free = damped.clamp_min_(0).sqrt_().mul_(-2).add_(1)
        wanted = torch.minimum(free, quiet, out=scratch).clamp_(0, self.cap)
        mu.addcmul_(weight, wanted.sub_(mu).nan_to_num_(0.0))

    def law(self, loss: Tensor, noise: Tensor, rate: Tensor, curvature: Tensor) -> Tensor:
        """μ* of blocks."""
        return momentum_law(loss, noise, rate, curvature).clamp_max(self.cap)
