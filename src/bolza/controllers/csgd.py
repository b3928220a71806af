r"""Learning rates by feedback: every entry's rate from its own curvature, noise and slope.

    x ← x − η u g,      u ← u + w(u* − u),      u* = min(1, 2m/(η(Σ + 2am))),   m = ḡ²/(2a),      1 where a ≤ 0

u is large while the mean of the gradient stands out from its noise, and falls like 1/t from where it does not.
Curvature a, noise Σ and mean gradient ḡ come from running moments of gradient and position, see
:mod:`bolza.controllers.running_moments`.

Reference: Li, Tai & E (2017), arXiv:1511.06251, §4.1. Departures, each with its reason:

* m is ḡ²/(2a), the loss without the noise. The authors' program has (ḡ² + Σ)/(2a): then u* ≥ 1/(aη), and u never falls
  while aη < 1. ``form="released"`` is that law.
* The law of the step, u* ≤ 1/(aη), takes the place of that of the diffusion, 2m/(ηΣ): it is optimal for steps of any
  length, and keeps a rate stable that is too large. ``stable=False`` is the diffusion's.
* Where the curvature is not significant, u stays as it is. To go back to u = 1 there would undo the annealing whenever
  the iterate rests; to trust the estimate would end it, since a slope estimated within its own memory is too steep.
* u is the one from before the gradient that it multiplies, so that the step has the mean direction of the gradient.
* No step may promise a decrease beyond the loss that there is, η u ‖g‖² ≤ loss − bound (the bounded Polyak step of
  Loizou et al. 2021). It matters in the first steps, before the moments can tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bolza.controllers.coordinates import Coordinates
from bolza.controllers.moments import LI, learning_rate_law
from bolza.controllers.running_moments import (
    Form,
    Granularity,
    MomentsController,
    at_most,
    numbers_of,
)
from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites

__all__ = ["CSGD"]

LOIZOU = Reference(
    "loizou2021stochastic",
    "Loizou, Nicolas and Vaswani, Sharan and Laradji, Issam and Lacoste-Julien, Simon",
    "Stochastic Polyak Step-size for SGD: An Adaptive Learning Rate for Fast Convergence",
    2021,
    "International Conference on Artificial Intelligence and Statistics",
    "2002.10542",
)


@cites(LI, LOIZOU)
class CSGD(MomentsController):
    r"""Scale each update by u ∈ [0, 1], the optimal rate for the measured curvature, noise and slope.

        u* = min(1, ḡ²/(aη(Σ + ḡ²))),      η the optimizer's own rate, "as large as it tolerates or larger"

    Call ``step(loss=…)`` after ``optimizer.step()`` and before the gradients are cleared. Works over any optimizer: u
    scales its update. η is the group's ``lr``, ``lr/(1 − μ)`` with momentum, ``lr/(√v̂ + ε)`` over an Adam or RMSprop;
    over other optimizers it is measured, from the length of update and gradient of each tensor. Weight decay counts as
    a part of the loss.

    * ``granularity="coordinate"``: one u an entry, the paper's law; six numbers an entry.
    * ``"layer"``: one u a parameter tensor, from sums of squares over it; two numbers an entry.
    * ``"global"``: one u, written to ``lr``; two numbers an entry. With one u for many curvatures the law looks one
      step ahead only, and the steep directions decide: it anneals earlier than is best for a long run.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        granularity: ``"coordinate"``, ``"layer"`` or ``"global"``.
        form: ``"denoised"``, or ``"released"``, the authors' program, which counts the noise as loss: it holds u below
            1/(aη) where that is less than 1, and never anneals. Its log is named ``"u (limiter only)"``.
        stable: the law of the step, u ≤ 1/(aη), instead of the diffusion's.
        beta: (β_min, β_max), memory of the running moments per observation. u ends near
            (1 − β_max)/(1 + β_max)/(aη): a longer run wants β_max = 0.999.
        z: standard errors that the curvature must exceed; below, u stays as it is. 0 trusts every estimate.
        lower_bound: least value of the loss, for the bound on the first steps; used where ``step`` is given ``loss=``.
            None leaves it out.
        every: observe at every so many steps only, and scale all updates. The memory, counted in observations, is as
            many times longer: statistics of the same spread, slower to follow.
        u0: u at the start.

    Raises:
        ArgumentError: a setting makes no sense.
        UnsupportedError: a parameter is complex, or a gradient sparse.

    Reference: Li, Tai & E (2017), arXiv:1511.06251, §4.1; departures in the module's text.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> theta = torch.full((100,), 3.0, requires_grad=True)
        >>> optimizer = torch.optim.SGD([theta], lr=0.5)
        >>> controller = CSGD(optimizer)
        >>> for _ in range(500):        # a bowl ½θ² with noise: the floor of SGD is 0.17
        ...     theta.grad = theta.detach() + torch.randn(100, generator=draw)
        ...     optimizer.step()
        ...     action = controller.step()
        >>> bool(theta.square().mean() / 2 < 0.03), controller.log()["u"] < 0.2
        (True, True)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        granularity: Granularity = "coordinate",
        form: Form = "denoised",
        stable: bool = True,
        beta: tuple[float, float] = (0.9, 0.99),
        z: float = 1.0,
        lower_bound: float | None = 0.0,
        every: int = 1,
        u0: float = 1.0,
    ) -> None:
        if not 0 < u0 <= 1:
            raise ArgumentError(f"u0={u0} must lie in (0, 1]: it is a share of the learning rate")
        super().__init__(
            optimizer,
            granularity=granularity,
            beta=beta,
            z=z,
            every=every,
            form=form,
            lower_bound=lower_bound,
        )
        self.stable, self.u0 = stable, u0
        self.numbers = {self._name: float(u0), "significant": 0.0, "guard": 1.0}
        self._promise = float(u0)
        self._base: list[float] = []
        self._brakes: dict[Tensor, Tensor] = {}

    @property
    def _name(self) -> str:
        return "u" if self.form == "denoised" else "u (limiter only)"

    # ------------------------------------------------------------------------------- memory

    def extra_rows(self) -> int:
        """1 − u, for entries."""
        return 1 if self.granularity == "coordinate" else 0

    def new_blocks(self, count: int) -> dict[str, list[float]]:
        """Start of u, for blocks."""
        return {"u": [float(self.u0)] * count}

    def prepare_(self, room: Coordinates) -> None:
        """Start from u0."""
        if self.granularity == "coordinate":
            for rows in room.rows:
                rows[5] = 1 - self.u0

    def __getstate__(self) -> dict[str, Any]:
        """All but the hook and the views of rows."""
        return super().__getstate__() | {"_brakes": {}}

    def own_memory(self) -> dict[str, Any]:
        """The rates that u multiplies."""
        return {"base": list(self._base)}

    def load_memory(self, memory: Any) -> None:
        """Take up what :meth:`memory` gave."""
        super().load_memory(memory)
        self._base = list(memory["base"])

    # ------------------------------------------------------------------------------ one step

    @torch.no_grad()
    def decide(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Scale the last update; learn from it."""
        room, usable = self.room, self.usable()
        if usable is None:
            return {}
        moving, squares = usable
        observing = self.count % self.every == 0
        if self.granularity != "coordinate":
            return self._by_blocks(moving, observation.get("loss"), observing, squares)
        if not (observing and self._keep):
            self.numbers["guard"] = self.guard(observation.get("loss"), squares)
        if observing:
            self._entries(moving, squares)
            room.saw(moving)
            if self._keep:  # only now is it known what the update promises
                guard = self.numbers["guard"] = self.guard(observation.get("loss"), squares)
                if guard < 1:
                    self.scale_update_(moving, guard)
        else:
            self._scale_entries(moving, self.numbers["guard"])
        return {}

    def _entries(self, moving: Sequence[Tensor], squares: Sequence[float]) -> None:
        room, plain, groups = self.room, not self._keep, self.optimizer.param_groups
        guard = self.numbers["guard"]
        sums: list[Tensor] = []
        rates: list[float] = []
        size = 0
        for piece in room.pieces(moving):
            s = room.scratch(piece, 7)
            brake = room.of(piece)[5]
            g, after, x = self.views(piece, plain, s)
            if plain:
                lr = float(groups[piece.group]["lr"])
                kept_back = torch.mul(g, brake, out=s[3])
                told = g.dot(g).sub_(g.dot(kept_back))
                after.add_(kept_back, alpha=lr * guard)
                if guard < 1:
                    after.add_(g, alpha=lr * (1 - guard))
            else:
                lr = 1.0
                after.lerp_(x, brake)
                made = torch.sub(after, x, out=s[3])
                told = made.dot(made)
            room.scatter(piece, after)
            sums += [told, *self.learn_entries(piece, g, x, s[3:])]
            rates.append(lr)
            size += len(brake)
        numbers = numbers_of(sums)
        made_ = sum(lr * told for lr, told in zip(rates, numbers[::3], strict=True))
        self.promised(made_ if plain else at_most(made_, squares), squares)
        self.numbers[self._name] = min(1.0, max(0.0, 1 - sum(numbers[2::3]) / size))
        self.numbers["significant"] = sum(numbers[1::3]) / size

    def move_(
        self, rows: Sequence[Tensor], weight: Tensor, rate: float | Tensor, curvature: Tensor, scratch: Tensor
    ) -> None:
        """Move 1 − u towards 1 − 1/max(1, aη(Σ + ḡ²)/ḡ²)."""
        mean_g, var_g, brake = rows[0], rows[2], rows[5]
        # quotients of like sizes: products of three moments would leave the range of float32
        wanted = torch.mul(mean_g, mean_g, out=scratch)
        if self.form == "released":
            wanted.add_(var_g)
        torch.div(var_g, wanted, out=wanted)
        if self.stable and self.form == "denoised":
            wanted.add_(1)
        wanted.mul_(curvature).mul_(rate).nan_to_num_(1.0).clamp_min_(1).reciprocal_()
        brake.addcmul_(weight, wanted.add_(brake).sub_(1), value=-1)

    def _scale_entries(self, moving: Sequence[Tensor], guard: float) -> None:
        for p in moving:
            if p not in self._brakes:
                self._brakes[p] = self.room.row(5, p)
        for group in self.optimizer.param_groups:
            members = [p for p in group["params"] if p.requires_grad and p.grad is not None]
            if not members:
                continue
            brakes = [self._brakes[p] for p in members]
            if self._keep:
                for p, old, brake in zip(members, self.before(members), brakes, strict=True):
                    p.lerp_(old, (brake * guard + (1 - guard)).to(p.dtype))
                continue
            grads, lr = [p.grad for p in members], float(group["lr"])
            torch._foreach_addcmul_(members, grads, brakes, lr * guard)
            if guard < 1:
                torch._foreach_add_(members, grads, alpha=lr * (1 - guard))

    # -------------------------------------------------------------------------------- blocks

    def law(self, loss: Tensor, noise: Tensor, rate: Tensor, curvature: Tensor) -> Tensor:
        """u* of blocks."""
        exact = self.stable and self.form == "denoised"
        return learning_rate_law(loss, noise, rate, curvature, exact=exact)

    def _by_blocks(
        self, moving: Sequence[Tensor], told: Any, observing: bool, squares: Sequence[float]
    ) -> dict[str, Any]:
        room, blocks, whole = self.room, self._blocks, self.granularity == "global"
        groups = self.optimizer.param_groups
        self._follow()
        u = list(blocks["u"])
        if observing:
            # the rates of global hold u already
            made = self.learn_blocks("u", moving, squares, u[0] if whole and self.count else 1.0)
            factors = [1.0] if whole else u
            if self._keep:
                decrease = at_most(sum(m * f * f for m, f in zip(made, factors, strict=True)), squares)
            else:
                decrease = sum(m * f for m, f in zip(made, factors, strict=True))
            self.promised(decrease, squares)
        guard = self.numbers["guard"] = self.guard(told, squares)
        first = self.u0 if whole and self.count == 0 else 1.0  # lr is not yet u0 times itself
        scale = {p: guard * (first if whole else u[room.index[p]]) for p in moving}
        self._scale(moving, scale)
        if not whole:
            return {}
        factor = max(blocks["u"][0], 1e-8)
        rates = [base * factor for base in self._base]
        return {"lr": rates} if rates != [group["lr"] for group in groups] else {}

    def _follow(self) -> None:
        """Base rates of the groups: what others make of ``lr`` is theirs, what u makes of it ours."""
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        factor = max(self._blocks["u"][0], 1e-8) if self.granularity == "global" else 1.0
        expected = [base * factor for base in self._base]
        if len(expected) != len(rates):
            self._base = [rate for rate in rates]
            return
        for i, (rate, old) in enumerate(zip(rates, expected, strict=True)):
            if not math.isclose(rate, old, rel_tol=1e-6) and factor > 0:
                self._base[i] = rate / factor

    def _scale(self, moving: Sequence[Tensor], scale: Mapping[Tensor, float]) -> None:
        if all(u == 1 for u in scale.values()):
            return
        if self._keep:
            self.scale_update_(moving, [scale[p] for p in moving])
            return
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p in scale and scale[p] != 1:
                    p.detach().add_(p.grad, alpha=float(group["lr"]) * (1 - scale[p]))
