r"""Running estimates of curvature, noise and slope from the gradients and positions that a run passes through anyway.

For every entry, or for every block of entries at once, with the weight w = 1 − β of the newest observation:

    ḡ ← ḡ + w(g − ḡ)      x̄ ← x̄ + w(x − x̄)      s ← (1 − w)(s + w δδ')  for the variances and the covariance
    a = s_gx/s_x          Σ = s_g               w = (1 − β_max) + (β_max − β_min) ḡ²/(ḡ² + s_g)

w starts as 1/k, so that the first estimates are plain averages. The memory is short while the mean of the gradient
stands out and long where noise rules. Of a block the squares are summed, ḡ² is rid of the noise in it, w/(2 − w) s_g,
and a is the curvature along the path. The slope a is *significant* where it exceeds z of its standard errors
√(Σ(1 − r²)/((n − 2)s_x)), r the correlation and n = (2 − w)/w the effective number of observations.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from bolza.controllers.controller import Controller
from bolza.controllers.coordinates import Coordinates, Piece
from bolza.controllers.entry_moments import observe_, slope
from bolza.core.errors import ArgumentError, UnsupportedError

__all__ = ["Form", "Granularity", "MomentsController", "at_most", "numbers_of"]

Granularity = Literal["coordinate", "layer", "global"]
Form = Literal["denoised", "released"]


def at_most(square: float, squares: Sequence[float]) -> float:
    """Largest decrease that an update of that square norm can promise, ‖x' − x‖ ‖g‖, given the squares of g."""
    return (square * sum(squares)) ** 0.5


class MomentsController(Controller):
    """What the laws on running moments share: the walk through the parameters, the blocks, the memory.

    A subclass says which rows and numbers it has beside the moments, and decides.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        granularity: Granularity,
        beta: tuple[float, float],
        z: float,
        every: int,
        form: Form,
        lower_bound: float | None,
    ) -> None:
        if granularity not in ("coordinate", "layer", "global"):
            raise ArgumentError(
                f"granularity={granularity!r} is unknown: choose 'coordinate', 'layer' or 'global'"
            )
        if len(beta) != 2 or not 0 <= beta[0] <= beta[1] < 1:
            raise ArgumentError(f"beta={beta!r} must be two numbers, 0 ≤ β_min ≤ β_max < 1")
        if not z >= 0:
            raise ArgumentError(f"z={z} must not be negative: it is a number of standard errors")
        if int(every) != every or every < 1:
            raise ArgumentError(f"every={every} must be a positive whole number of steps")
        if form not in ("denoised", "released"):
            raise ArgumentError(f"form={form!r} is unknown: choose 'denoised' or 'released'")
        super().__init__(optimizer)
        if any(group.get("maximize") for group in optimizer.param_groups):
            raise ArgumentError("maximize is set: the laws descend, so minimise minus the objective")
        self._note_kind()
        self.form, self.lower_bound = form, lower_bound
        self._promise = 1.0  # decrease that an update promises, over lr ‖g‖²
        self.granularity, self.beta, self.z, self.every = granularity, (beta[0], beta[1]), z, int(every)
        self.numbers: dict[str, float] = {}  # what log() shows, of the last observation
        self._room: Coordinates | None = None
        self._loaded: Any = None
        self._blocks: dict[str, list[float]] = {}
        self._measured: dict[Tensor, float] = {}  # effective rates that no formula gives

    def _note_kind(self) -> None:
        # momentum or weight decay may be set later, as OneCycleLR does
        self._keep = self._keep or not _plain(self.optimizer)

    def _note(self) -> None:
        self._note_kind()
        super()._note()

    # ------------------------------------------------------------------------------- memory

    @property
    def room(self) -> Coordinates:
        """The rows of all parameters, made when first needed."""
        if self._room is None:
            by_entry = self.granularity == "coordinate"
            rows = 5 if by_entry else 2
            room = Coordinates(self.optimizer.param_groups, rows + self.extra_rows(), merge=by_entry)
            self._room = room
            count = 1 if self.granularity == "global" else len(room.place)
            self._blocks = {
                name: [0.0] * count for name in ("square", "var_g", "var_x", "cov", "spread", "count", "w")
            } | self.new_blocks(count)
            self.prepare_(room)
            if self._loaded is not None:
                self._take(self._loaded)
        return self._room

    def extra_rows(self) -> int:
        """Rows a parameter entry beside the moments."""
        return 0

    def new_blocks(self, count: int) -> dict[str, list[float]]:
        """Numbers a block beside its moments."""
        return {}

    def prepare_(self, room: Coordinates) -> None:
        """Set the rows beside the moments before the first step."""

    def memory(self) -> Any:
        """Moments of everything, and what the law adds."""
        room = self.room
        return {
            "rows": list(room.rows),
            "counts": list(room.counts),
            "blocks": {k: list(v) for k, v in self._blocks.items()},
            "numbers": dict(self.numbers),
            "promise": self._promise,
            **self.own_memory(),
        }

    def own_memory(self) -> dict[str, Any]:
        """Entries of the memory beside the moments."""
        return {}

    def load_memory(self, memory: Any) -> None:
        """Take up what :meth:`memory` gave, at once or when the rows are made."""
        self._loaded = memory
        self.numbers, self._promise = dict(memory["numbers"]), memory["promise"]
        if self._room is not None:
            self._take(memory)

    def _take(self, memory: Mapping[str, Any]) -> None:
        room, self._loaded = self.room, None
        shapes = [tuple(r.shape) for r in room.rows], [tuple(r.shape) for r in memory["rows"]]
        if shapes[0] != shapes[1]:
            raise ArgumentError(
                f"the state has rows of the shapes {shapes[1]}, this controller {shapes[0]}: load it into one of the "
                "same granularity over the same parameters"
            )
        for mine, theirs in zip(room.rows, memory["rows"], strict=True):
            mine.copy_(theirs)
        room.counts = list(memory["counts"])
        room._pieces = None
        self._blocks = {k: list(v) for k, v in memory["blocks"].items()}

    def log(self) -> dict[str, float]:
        """Mean of what is controlled, share of significant curvatures, and share of the update let through."""
        return dict(self.numbers)

    # ---------------------------------------------------------------------------- one step

    def usable(self) -> tuple[list[Tensor], list[float]] | None:
        """Parameters with a gradient and the square norms of their gradients, unless these are not finite."""
        moving = self.moving
        grads = [p.grad for p in moving if p.grad is not None]
        if not grads or not self.moved:
            return None
        if any(g.is_sparse for g in grads):
            raise UnsupportedError("a gradient is sparse: make the embedding with sparse=False")
        squares = [n * n for n in numbers_of(torch._foreach_norm(grads))]
        if not math.isfinite(sum(squares)):
            return None
        if self._keep and not isinstance(self.optimizer, torch.optim.SGD):
            self._measure(moving, squares)
        return moving, squares

    def _measure(self, moving: Sequence[Tensor], squares: Sequence[float]) -> None:
        """Effective rates where the step has no formula here: ‖x' − x‖/‖g‖ √((1 + μ)/(1 − μ)), exact for white g."""
        group_of = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        for p, square in zip(moving, squares, strict=True):
            group = group_of[p]
            if square > 0 and self._root(group, p) is None:
                mu = float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))
                made = float((p - self.before([p])[0]).float().norm())
                self._measured[p] = made * ((1 + mu) / (1 - mu) / square) ** 0.5

    def guard(self, loss: Any, squares: Sequence[float]) -> float:
        """Share of the update that promises no more than the loss that there is."""
        if loss is None or self.lower_bound is None:
            return 1.0
        left = float(loss) - self.lower_bound
        if left < 0:
            warnings.warn(
                f"the loss is {float(loss):.4g}, below lower_bound={self.lower_bound:g}: its bound on the step is left "
                "out from here on; give the least value of the loss, or None",
                RuntimeWarning,
                stacklevel=4,
            )
            self.lower_bound = None
            return 1.0
        rate = float(self.optimizer.param_groups[self.leader]["lr"])
        promised = self._promise * rate * sum(squares)
        return min(1.0, left / promised) if promised > 0 and math.isfinite(left) else 1.0

    def promised(self, decrease: float, squares: Sequence[float]) -> None:
        """Note what an update promised to take off the loss."""
        one = float(self.optimizer.param_groups[self.leader]["lr"]) * sum(squares)
        if one > 0 and math.isfinite(decrease):
            self._promise = decrease / one

    def views(self, piece: Piece, plain: bool, scratch: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient, that of weight decay included, and parameters after and before the update of a piece."""
        parts = [p for p, *_ in piece.parts]
        group = self.optimizer.param_groups[piece.group]
        g = self.room.gather(piece, [p.grad for p in parts if p.grad is not None], scratch[0])
        after = self.room.gather(piece, [p.detach() for p in parts], scratch[1])
        if plain:
            return g, after, torch.add(after, g, alpha=float(group["lr"]), out=scratch[2])
        x, decay = (
            self.room.gather(piece, self.before(parts), scratch[2]),
            float(group.get("weight_decay", 0.0)),
        )
        if decay and group.get(
            "decoupled_weight_decay"
        ):  # shrinks x by lr · decay, whatever the effective rate
            share: Any = self.piece_rates(piece)
            g = torch.add(g, x / share, alpha=float(group["lr"]) * decay, out=scratch[0])
        elif decay:
            g = torch.add(g, x, alpha=decay, out=scratch[0])
        return g, after, x

    # ------------------------------------------------------------------------------ entries

    #: row of what is controlled
    controlled = 5

    def move_(
        self, rows: Sequence[Tensor], weight: Tensor, rate: float | Tensor, curvature: Tensor, scratch: Tensor
    ) -> None:
        """Move what is controlled in every entry towards its law by a share ``weight``, in place.

        Args:
            rows: the moments and the rows beside them.
            weight: w, or 0 where the curvature is not significant.
            rate: effective learning rates.
            curvature: a, which may be overwritten.
            scratch: a vector to write on.
        """
        raise NotImplementedError

    def learn_entries(self, piece: Piece, g: Tensor, x: Tensor, scratch: Sequence[Tensor]) -> list[Tensor]:
        """Take in one gradient and position of a piece, and move what is controlled.

        Returns:
            Number of entries with a significant curvature, and the sum of what is controlled.
        """
        rows, count = self.room.of(piece), self.room.counts[piece.parts[0][1]] + 1
        w = observe_(rows, g, x, count, self.beta, scratch)
        found = w.new_zeros(())
        if count > 2:
            curvature, sure = slope(rows, w, self.z, scratch[1:])
            found = sure.sum()
            self.move_(rows, w.mul_(sure), self.piece_rates(piece), curvature, scratch[3])
        return [found, rows[self.controlled].sum()]

    # ------------------------------------------------------------------------------- blocks

    def law(self, loss: Tensor, noise: Tensor, rate: Tensor, curvature: Tensor) -> Tensor:
        """What is wanted of blocks with these estimates."""
        raise NotImplementedError

    def learn_blocks(
        self, name: str, moving: Sequence[Tensor], squares: Sequence[float], share: float = 1.0
    ) -> list[float]:
        """Take in one gradient and position, and move a number of the blocks towards the law.

        Args:
            name: of the number.
            moving: parameters with a gradient.
            squares: square norms of the gradients.
            share: of the rates that the law is about, that the optimizer has now.

        Returns:
            As :meth:`observe_blocks`.
        """
        made = self.observe_blocks(moving, not self._keep)
        rates, found = self.block_rates(moving, squares), self.significant_blocks()
        loss, noise, curvature = self.estimates(found)
        rate = torch.tensor([rates[i] / share for i in found], dtype=torch.float64)
        self.move_blocks(name, found, self.law(loss, noise, rate, curvature))
        self.room.saw(moving)
        return made

    def block(self, piece: Piece) -> int:
        """Number of the block that a piece belongs to."""
        return 0 if self.granularity == "global" else piece.parts[0][1]

    def observe_blocks(self, moving: Sequence[Tensor], plain: bool) -> list[float]:
        """Take gradients and positions into the moments of the blocks.

        Returns:
            Of each block η‖g‖², the decrease that a plain update promised, or ‖x' − x‖².
        """
        room, b, (low, high) = self.room, self._blocks, self.beta
        pieces = room.pieces(moving)
        where = [self.block(piece) for piece in pieces]
        seen = sorted(set(where))
        for i in seen:
            b["count"][i] += 1
            total = max(b["square"][i] + b["var_g"][i], 1e-300)
            b["w"][i] = max(1 - high + (high - low) * b["square"][i] / total, 1 / b["count"][i])
        dots: list[Tensor] = []
        for piece, i in zip(pieces, where, strict=True):
            s = room.scratch(piece, 5)
            g, after, x = self.views(piece, plain, s)
            lr = float(self.optimizer.param_groups[piece.group]["lr"])
            made = g if plain else torch.sub(x, after, out=s[3])
            dots.append(made.dot(made) * (lr if plain else 1.0))
            mean_g, mean_x = room.of(piece)[:2]
            dg, dx = torch.sub(g, mean_g, out=s[3]), torch.sub(x, mean_x, out=s[4])
            mean_g.add_(dg, alpha=b["w"][i])
            mean_x.add_(dx, alpha=b["w"][i])
            dots += [dg.dot(dg), dx.dot(dx), dg.dot(dx), mean_g.dot(mean_g)]
        told = numbers_of(dots)
        sums = [[0.0] * 5 for _ in b["w"]]
        for k, i in enumerate(where):
            sums[i] = [old + new for old, new in zip(sums[i], told[5 * k : 5 * k + 5], strict=True)]
        for i in seen:
            _, gg, xx, gx, square = sums[i]
            w, odd = b["w"][i], (gx - b["cov"][i]) ** 2
            for name, new in (("var_g", gg), ("var_x", xx), ("cov", gx), ("spread", odd)):
                b[name][i] = (1 - w) * (b[name][i] + w * new)
            b["square"][i] = max(0.0, square - w / (2 - w) * b["var_g"][i])
        return [of_block[0] for of_block in sums]

    def significant_blocks(self) -> list[int]:
        """Blocks whose curvature exceeds z of its standard errors, from the spread of δg·δx over the run."""
        b, z2 = self._blocks, self.z**2
        return [
            i
            for i, w in enumerate(b["w"])
            if b["count"][i] > 2
            and b["cov"][i] ** 2 > z2 * b["spread"][i] * w / (2 - w)
            and b["var_x"][i] > 0
        ]

    def estimates(self, blocks: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, noise and curvature of some blocks."""
        square, noise, var_x, cov = (
            torch.tensor([self._blocks[name][i] for i in blocks], dtype=torch.float64)
            for name in ("square", "var_g", "var_x", "cov")
        )
        curvature = cov / var_x
        return (square + noise if self.form == "released" else square) / (2 * curvature), noise, curvature

    def move_blocks(self, name: str, blocks: Sequence[int], wanted: Tensor) -> None:
        """Move a number of some blocks towards what is wanted, by their weights; note it for the log."""
        held = self._blocks[name]
        for i, new in zip(blocks, wanted.tolist(), strict=True):
            if math.isfinite(new):  # not so where the squares of a gradient are below the least number
                held[i] += self._blocks["w"][i] * (new - held[i])
        used = [value for value, count in zip(held, self._blocks["count"], strict=True) if count]
        self.numbers[next(iter(self.numbers))] = sum(used) / len(used)
        self.numbers["significant"] = len(blocks) / len(used)

    def block_rates(self, moving: Sequence[Tensor], squares: Sequence[float]) -> list[float]:
        """Effective learning rate of every block, the root mean square weighted with the gradient."""
        total, rated = [[0.0] * len(self._blocks["w"]) for _ in range(2)]
        for p, square in zip(moving, squares, strict=True):
            index = self.room.index[p]
            rate = self.rate(self.optimizer.param_groups[self.room.place[index][2]], p)
            at = 0 if self.granularity == "global" else index
            assert p.grad is not None
            by_entry = isinstance(rate, Tensor)
            rated[at] += float((rate * p.grad).square().sum()) if by_entry else float(rate) ** 2 * square
            total[at] += square
        return [(a / b) ** 0.5 if b > 0 else 1.0 for a, b in zip(rated, total, strict=True)]

    def rate(self, group: Mapping[str, Any], p: Tensor) -> float | Tensor:
        """Effective learning rate of a parameter: η, η/(1 − μ) with momentum, η/(√v̂ + ε) of an Adam or RMSprop."""
        lr, root = float(group["lr"]), self._root(group, p)
        mu = float(group.get("momentum", 0.0))
        if root is None and p in self._measured:
            return self._measured[p]
        lr *= (1 - float(group.get("dampening", 0.0) if mu else 0.0)) / (1 - mu)
        return lr if root is None else lr / root

    def _root(self, group: Mapping[str, Any], p: Tensor) -> Tensor | None:
        """√v̂ + ε, what an Adam or RMSprop divides by."""
        state = self.optimizer.state.get(p, {})
        if "exp_avg_sq" in state:
            square = state["exp_avg_sq"] if "max_exp_avg_sq" not in state else state["max_exp_avg_sq"]
            beta2 = float(group["betas"][1]) if "betas" in group else 0.0
            scale = 1 - beta2 ** float(state.get("step", 1)) if beta2 else 1.0
        elif "square_avg" in state and "alpha" in group:
            square, scale = state["square_avg"], 1.0
            if group.get("centered"):
                square = (square - state["grad_avg"].square()).clamp_min_(0)
        else:
            return None
        return (square / scale).sqrt().add_(float(group.get("eps", 1e-8)))

    def piece_rates(self, piece: Piece) -> float | Tensor:
        """Effective learning rates of a piece: a number where all are equal."""
        group = self.optimizer.param_groups[piece.group]
        rates = [self.rate(group, p) for p, *_ in piece.parts]
        if not any(isinstance(r, Tensor) for r in rates):
            return float(rates[0])
        full = [
            r if isinstance(r, Tensor) else torch.full_like(p, r)
            for r, (p, *_) in zip(rates, piece.parts, strict=True)
        ]
        return self.room.gather(piece, full)


def numbers_of(scalars: Sequence[Tensor]) -> list[float]:
    """Values of tensors of one element, in one transfer where they are of one device and dtype."""
    kinds = {(t.device, t.dtype) for t in scalars}
    if len(kinds) > 1:
        scalars = [t.to(scalars[0].device, torch.float64) for t in scalars]
    found: list[float] = torch.stack(list(scalars)).tolist()
    return found


def _plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an update is −η g, so that the position before it need not be kept."""
    if type(optimizer) is not torch.optim.SGD:
        return False
    return all(
        not (g["momentum"] or g["weight_decay"] or g["maximize"] or g["nesterov"])
        for g in optimizer.param_groups
    )
