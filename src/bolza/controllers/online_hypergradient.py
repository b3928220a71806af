r"""Hyper-parameters that follow their own gradient while the network trains.

With z_t = ∂θ_t/∂h the tangent of the parameters in a hyper-parameter h, kept along the run,

    ∂ℓ_t/∂h = g_t · z_t,      z_{t+1} = ρ (z_t − η H_t z_t) + ∂(step t)/∂h,      ρ = 1 − 1/window

For the learning rate, in the coordinate log η, the last term is the step d_t = θ_{t+1} − θ_t itself, whatever the
optimizer. A window of one step leaves z_t = d_{t−1}: g_t · d_{t−1}, for SGD −η g_t · g_{t−1}, costs an inner product.
Each hyper-parameter moves against its gradient in a coordinate of its own (log η, logit of the momentum, log of the
weight decay), by the cosine of g_t and z_t, which has no units.

Reference: Baydin, Cornish, Rubio, Schmidt & Wood (2018), *Online Learning Rate Adaptation with Hypergradient Descent*,
arXiv:1703.04782; Franceschi, Donini, Frasconi & Pontil (2017), *Forward and Reverse Gradient-Based Hyperparameter
Optimization*, arXiv:1703.01785; Wu, Ren, Liao & Grosse (2018), *Understanding Short-Horizon Bias in Stochastic
Meta-Optimization*, arXiv:1803.02021.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bolza.controllers.controller import Action, Controller
from bolza.controllers.rounds import Rounds
from bolza.controllers.tangents import Part, Tangent, check_optimizer, inner, norm
from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites
from bolza.systems import module_loss

__all__ = ["HyperGradient", "shortened"]

BAYDIN = Reference(
    "baydin2018hypergradient",
    "Baydin, Atılım Güneş and Cornish, Robert and Martínez Rubio, David and Schmidt, Mark and Wood, Frank",
    "Online Learning Rate Adaptation with Hypergradient Descent",
    2018,
    "International Conference on Learning Representations",
    "1703.04782",
)
FRANCESCHI = Reference(
    "franceschi2017forward",
    "Franceschi, Luca and Donini, Michele and Frasconi, Paolo and Pontil, Massimiliano",
    "Forward and Reverse Gradient-Based Hyperparameter Optimization",
    2017,
    "International Conference on Machine Learning",
    "1703.01785",
)

_KNOWN = ("lr", "momentum", "weight_decay")
_LIMITS = {"lr": (1e-10, 1e3), "momentum": (1e-3, 0.999), "weight_decay": (1e-10, 1.0)}
_MEMORY = 0.9  # of the running mean of the loss


def shortened(slope: float, loss: float, tolerance: float) -> float:
    r"""Share s of the last step to keep, when its learning rate has proved too large.

    The slope g_t · d_{t−1} is what the loss would change, to first order, if the step were longer by its own length. Up
    to tolerance · loss nothing is done, s = 1; beyond that s = min(½, tolerance · loss / slope).

    Args:
        slope: g_t · d_{t−1}, in the units of the loss.
        loss: level of the loss, positive.
        tolerance: largest slope in parts of the loss.

    Example:
        >>> shortened(0.1, 1.0, 0.25), shortened(0.3, 1.0, 0.25), shortened(2.5, 1.0, 0.25)
        (1.0, 0.5, 0.1)
    """
    bound = tolerance * loss
    return 1.0 if loss <= 0 or slope <= bound else min(0.5, bound / slope)


@cites(BAYDIN, FRANCESCHI)
class HyperGradient(Controller):
    r"""Learning rate, momentum and weight decay that descend the loss along their own gradients.

        coordinate ← coordinate − meta_lr · cos(g_t, z_t)       log η, logit momentum, log weight decay

    A new rate applies to the step that was just made, as in Baydin et al., and a rate that has proved too large takes
    the step before back as well, see :func:`shortened`; so that a start at a rate far too large is survived.

    Args:
        optimizer: any ``torch.optim.Optimizer`` for the learning rate alone and without ``model``; with ``model``,
            ``SGD``, ``Adam`` or ``AdamW``.
        model: the network that is trained. Without it the curvature within the window is left out, and nothing but
            inner products is computed.
        loss: (prediction, target) → scalar; needed with ``model``.
        data: batches (x, y) for one Hessian product a step and hyper-parameter: a pair, a list or a loader, read round
            and round, or a :class:`bolza.data.Dataset`, of which batches of 32 are drawn; ``step(batch=(x, y))``
            takes the place of the next one.
        hyper: what is adapted, among ``"lr"``, ``"momentum"`` and ``"weight_decay"``; the last two need ``model``.
        window: steps over which the effect of a hyper-parameter is followed, at least 1; ``math.inf`` for all.
            A window of 1 is greedy: it decays the rate too early where noise is large (short-horizon bias).
        meta_lr: change of a coordinate in a step where the cosine is one.
        slack: cosine that is put up with, added to minus the cosine for the learning rate: 0.1 keeps the rate higher,
            against the short-horizon bias, and never lets it anneal to nothing.
        tolerance: see :func:`shortened`; ``None`` takes nothing back, as in the paper. It needs ``step(loss=…)`` of
            a loss that is positive.
        validation: batches whose gradient takes the place of that of the training batch, at one gradient a step;
            needs ``model``.
        per_group: one value a parameter group, rather than one factor for all.
        limits: (least, largest) by name; defaults are 1e-10 to 1e3, 1e-3 to 0.999 and 1e-10 to 1.
        stabilize: damp the curvature where the tangents would grow by it, beyond the stability limit of the optimizer.
        seed: of random numbers that the model draws in products and validation.

    Raises:
        ArgumentError: a name that is unknown or that the optimizer lacks, a start value that cannot move by factors,
            a setting out of range, or ``model`` without ``loss`` and ``data``.
        UnsupportedError: an optimizer whose step has no tangent here.

    Reference: Baydin et al. (2018), arXiv:1703.04782, Alg. 4 and the multiplicative rule; Franceschi et al. (2017),
    arXiv:1703.01785, §4 (real-time hyper-gradients). Departures: exp(κ cos) for 1 + κ cos; tangents are discounted;
    steps are taken back; Hessian products use batches of their own.

    Example:
        >>> weight = torch.full((2,), 4.0, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=1e-4)         # far too small for ½‖w‖²
        >>> controller = HyperGradient(optimizer, meta_lr=0.2)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     loss = weight.square().sum() / 2
        ...     loss.backward()
        ...     optimizer.step()
        ...     action = controller.step(loss=loss)
        >>> optimizer.param_groups[0]["lr"] > 0.1, float(loss.detach()) < 1e-3
        (True, True)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        data: Any = None,
        *,
        hyper: Sequence[str] = ("lr",),
        window: float = 1,
        meta_lr: float = 0.1,
        slack: float = 0.0,
        tolerance: float | None = 0.25,
        validation: Any = None,
        per_group: bool = False,
        limits: Mapping[str, tuple[float, float]] | None = None,
        stabilize: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, keep_update=True)
        hyper = (hyper,) if isinstance(hyper, str) else tuple(hyper)
        self.hyper, self.window, self.meta_lr, self.tolerance = hyper, window, meta_lr, tolerance
        self.per_group, self.stabilize, self.seed, self.slack = per_group, stabilize, seed, slack
        self.limits = _LIMITS | dict(limits or {})
        self._check(model, loss, data, validation)
        self.model, self._loss = model, loss
        self._names = [] if model is None else _names_in(model, self.parameters)
        # curvature and velocity matter from the second step of a window on, and for all but the rate at once
        self.follows = model is not None and (window > 1 or hyper != ("lr",))
        if self.follows:
            check_optimizer(optimizer)  # refuses here rather than in the first step
        self._batches = Rounds(data, seed)
        self._validation = Rounds(validation, seed)
        self._last: list[Tensor] | None = None
        self._length = 0.0  # of the last step
        self._sum: list[Tensor] | None = None
        self._tangents: list[Tangent] = []
        self._mean: float | None = None
        self._cosines = dict.fromkeys(hyper, 0.0)
        self._damping = 1.0
        self.retracted = 0

    def _check(self, model: Any, loss: Any, data: Any, validation: Any) -> None:
        groups = self.optimizer.param_groups
        for name in self.hyper:
            if name not in _KNOWN:
                raise ArgumentError(f"hyper has {name!r}: choose among {', '.join(_KNOWN)}")
            if name not in groups[0]:
                raise ArgumentError(
                    f"hyper has {name!r}, which {type(self.optimizer).__name__} does not have"
                )
            low, high = self.limits[name]
            for group in groups if name != "lr" else ():
                if not low <= float(group[name]) <= high:
                    raise ArgumentError(
                        f"{name} starts at {float(group[name]):g}, outside of {low:g} … {high:g}: it moves by factors, "
                        "so start inside, or pass limits="
                    )
        if not self.hyper or len(set(self.hyper)) < len(self.hyper):
            raise ArgumentError(f"hyper={self.hyper} must name each hyper-parameter once, and at least one")
        if not self.window >= 1:
            raise ArgumentError(f"window={self.window} must be at least 1: it is a number of steps")
        if not 0 < self.meta_lr < math.inf:
            raise ArgumentError(f"meta_lr={self.meta_lr} must be positive and finite")
        if not 0 <= self.slack < 1:
            raise ArgumentError(f"slack={self.slack} must be at least 0 and below 1: it is a cosine")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ArgumentError(f"tolerance={self.tolerance} must be positive, or None to take nothing back")
        if any(group.get("maximize") for group in groups):
            raise ArgumentError("maximize is set: hyper-gradients descend, so minimise minus the objective")
        if model is None and (self.hyper != ("lr",) or validation is not None):
            raise ArgumentError(
                f"hyper={self.hyper} and validation need derivatives of the loss: pass model, loss and data"
            )
        if model is not None and (
            loss is None or (data is None and (self.window > 1 or self.hyper != ("lr",)))
        ):
            raise ArgumentError("model is given without loss or data: Hessian products need both")

    # ------------------------------------------------------------------------------- the law

    @torch.no_grad()
    def decide(self, observation: Mapping[str, Any]) -> Action:
        """Move each hyper-parameter, rescale the step just made, and follow the tangents through it."""
        parameters = self.parameters
        gradient = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        before, size = self.before(parameters), norm(gradient)
        if not math.isfinite(size):
            self._forget()  # what is not finite teaches nothing
            return {}
        level = self._level(observation.get("loss"))
        slope = None if self._last is None else inner(gradient, self._last)
        if slope is not None and "lr" in self.hyper and self.tolerance and level is not None:
            share = shortened(slope, level, self.tolerance)
            if share < 1:
                return self._retract(parameters, before, share)
        if self._validation.there:
            seen = self._slope(before, self._validation.next(before[0]), graph=False)[1]
            action = self._moves(seen, None, norm(seen))
        else:
            action = self._moves(gradient, slope, size)
        self._rescale(parameters, action)
        step = self._last = self._last or [torch.empty_like(old) for old in before]
        for new, old, d in zip(parameters, before, step, strict=True):
            torch.sub(new, old, out=d)
        self._length = norm(step)
        if not math.isfinite(self._length):
            self._forget()
            return {}
        rho = 1 - 1 / self.window
        if self.follows:
            self._follow(parameters, before, gradient, step, action, rho, observation.get("batch"))
        elif self.window > 1:
            if self._sum is None:
                self._sum = [torch.zeros_like(d) for d in step]
            torch._foreach_mul_(self._sum, rho)
            torch._foreach_add_(self._sum, step)
        return action

    def _level(self, loss: Any) -> float | None:
        """Running mean of the loss before this step; what is far above it counts as twice."""
        value = float(loss) if loss is not None else math.nan
        level = self._mean
        if math.isfinite(value) and value > 0:
            seen = value if level is None else min(value, 2 * level)
            self._mean = seen if level is None else _MEMORY * level + (1 - _MEMORY) * seen
        return level

    def _retract(self, parameters: list[Tensor], before: list[Tensor], share: float) -> Action:
        """Leave out the step just made, and all but a share of the one before it; lower the rate by as much."""
        assert self._last is not None
        torch._foreach_copy_(parameters, before)
        torch._foreach_add_(parameters, self._last, alpha=share - 1)
        self.retracted += 1
        self._forget()
        rates = [float(group["lr"]) * share for group in self.optimizer.param_groups]
        return {"lr": [max(rate, self.limits["lr"][0]) for rate in rates]}

    def _forget(self) -> None:
        self._last, self._sum, self._tangents = None, None, []

    def _moves(self, gradient: list[Tensor], slope: float | None, size: float) -> dict[str, list[float]]:
        """New values, one a group; those of one factor for all groups move together."""
        values: dict[str, list[float]] = {}
        for name in self.hyper:
            values[name] = [float(group[name]) for group in self.optimizer.param_groups]
        for name, own, product, length in self._effects(gradient, slope, size):
            cosine = product / length if length > 0 else 0.0
            if not math.isfinite(cosine):
                continue
            self._cosines[name] = cosine
            excess = cosine - (self.slack if name == "lr" and length > 0 else 0.0)
            for i, mine in enumerate(own):
                if mine:
                    values[name][i] = self._moved(name, values[name][i], -self.meta_lr * excess)
        return values

    def _effects(
        self, gradient: list[Tensor], slope: float | None, size: float
    ) -> Iterator[tuple[str, list[bool], float, float]]:
        """Hyper-parameter, whose it is, g · z and ‖g‖ ‖z‖, for every value that may move."""
        if self.follows:
            for tangent in self._tangents:
                z = tangent.theta
                yield tangent.name, tangent.own, inner(gradient, z), size * norm(z)
            return
        effect = self._last if self.window == 1 else self._sum
        if effect is None:
            return
        for own in self._owners():
            if all(own):
                known = slope is not None and self.window == 1
                product = slope if slope is not None and known else inner(gradient, effect)
                yield "lr", own, product, size * (self._length if self.window == 1 else norm(effect))
                continue
            part = next(s for s, mine in zip(self._slices(), own, strict=True) if mine)
            g, z = gradient[part], effect[part]
            yield "lr", own, inner(g, z), norm(g) * norm(z)

    def _moved(self, name: str, value: float, by: float) -> float:
        """A value moved in its coordinate and kept within its limits; a rate of zero stays."""
        if value <= 0:
            return value
        low, high = self.limits[name]
        if name == "momentum":
            new = 1 / (1 + (1 / value - 1) * math.exp(-by))
        else:
            new = value * math.exp(by)
        return min(max(new, min(low, value)), max(high, value))

    def _rescale(self, parameters: list[Tensor], action: Action) -> None:
        """Make the step just made one of the new rate."""
        if "lr" not in action:
            return
        rates: Any = action["lr"]
        for group, new, part in zip(self.optimizer.param_groups, rates, self._slices(), strict=True):
            old = float(group["lr"])
            if old > 0 and new != old and parameters[part]:
                self.scale_update_(parameters[part], new / old)

    def _owners(self) -> list[list[bool]]:
        count = len(self.optimizer.param_groups)
        return [[i == j for j in range(count)] for i in range(count)] if self.per_group else [[True] * count]

    def _slices(self) -> list[slice]:
        """Where the parameters of each group are in the list of all."""
        found, at = [], 0
        for group in self.optimizer.param_groups:
            size = sum(p.requires_grad for p in group["params"])
            found.append(slice(at, at + size))
            at += size
        return found

    # -------------------------------------------------------------------------- derivatives

    def _follow(
        self,
        parameters: list[Tensor],
        before: list[Tensor],
        gradient: list[Tensor],
        step: list[Tensor],
        action: Mapping[str, Any],
        rho: float,
        batch: Any,
    ) -> None:
        groups = self.optimizer.param_groups
        rates = action.get("lr", [float(group["lr"]) for group in groups])
        parts = [
            Part(group, self.optimizer.state, float(lr), parameters[s], before[s], gradient[s], step[s])
            for group, lr, s in zip(groups, rates, self._slices(), strict=True)
        ]
        if not self._tangents:
            self._tangents = [
                Tangent(name, own, [torch.zeros_like(p) for p in parameters])
                for name in self.hyper
                for own in self._owners()
            ]
            curved = [[torch.zeros_like(p) for p in parameters] for _ in self._tangents]
        else:
            for tangent in self._tangents:
                tangent.discount(rho)
            if rho:
                batch = self._batches.next(parameters[0]) if batch is None else batch
                curved = self._products(before, batch)
            else:
                curved = [[torch.zeros_like(p) for p in parameters] for _ in self._tangents]
        shares = []
        for tangent, hz in zip(self._tangents, curved, strict=True):
            share = tangent.damping(parts, hz) if self.stabilize else 1.0
            if share < 1:
                torch._foreach_mul_(hz, share)
            shares.append(share)
            tangent.advance(parts, hz)
        self._damping = sum(shares) / len(shares)
        if not math.isfinite(sum(norm(tangent.theta) for tangent in self._tangents)):
            self._tangents = []

    def _slope(self, before: list[Tensor], batch: Any, graph: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Copies of the parameters before the step, and the gradient there."""
        assert self.model is not None and self._loss is not None
        leaves = [p.detach().clone().requires_grad_() for p in before]
        objective = module_loss(self.model, self._loss, seed=self.seed + self.count)
        with torch.enable_grad():
            value = objective(dict(zip(self._names, leaves, strict=True)), batch)
            found = torch.autograd.grad(
                value, leaves, create_graph=graph, allow_unused=True, materialize_grads=True
            )
        return leaves, list(found)

    def _products(self, before: list[Tensor], batch: Any) -> list[list[Tensor]]:
        """Hθ̇ for every tangent, from one graph of the gradient."""
        leaves, slope = self._slope(before, batch, graph=True)
        kept = [(g, i) for i, g in enumerate(slope) if g.requires_grad]
        return [
            list(
                torch.autograd.grad(
                    [g for g, _ in kept],
                    leaves,
                    [tangent.theta[i] for _, i in kept],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
            for tangent in self._tangents
        ]

    # ---------------------------------------------------------------------------- the record

    def log(self) -> dict[str, float]:
        """Cosine of gradient and tangent by hyper-parameter, steps taken back, and what is not in the base."""
        found = {f"cosine_{name}": cosine for name, cosine in self._cosines.items()}
        found["retracted"] = float(self.retracted)
        if "weight_decay" in self.hyper:
            found["weight_decay"] = float(self.optimizer.param_groups[0]["weight_decay"])
        if self.follows:
            found["damping"] = self._damping
        return found

    def memory(self) -> dict[str, Any]:
        """Steps, tangents and the level of the loss."""
        return {
            "last": self._last,
            "sum": self._sum,
            "tangents": [[t.name, t.own, t.theta, t.memory] for t in self._tangents],
            "mean": self._mean,
            "cosines": self._cosines,
            "damping": self._damping,
            "retracted": self.retracted,
            "read": [self._batches.read, self._validation.read],
        }

    def load_memory(self, memory: dict[str, Any]) -> None:
        """Take up what :meth:`memory` gave; batches are read up to the same place."""
        self._last, self._sum, self._mean = memory["last"], memory["sum"], memory["mean"]
        self._length = norm(self._last) if self._last else 0.0
        self._tangents = [Tangent(*fields) for fields in memory["tangents"]]
        self._cosines, self._damping = memory["cosines"], memory["damping"]
        self.retracted = memory["retracted"]
        self._batches.read, self._validation.read = memory["read"]


def _names_in(model: nn.Module, parameters: list[Tensor]) -> list[str]:
    """Names of the optimizer's parameters in the model."""
    known = {id(p): name for name, p in model.named_parameters()}
    missing = sum(id(p) not in known for p in parameters)
    if missing:
        raise ArgumentError(
            f"the optimizer moves {missing} parameters that the model does not have: pass the model they are in"
        )
    return [known[id(p)] for p in parameters]
