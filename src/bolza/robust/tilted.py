r"""Tilted losses: one number t that turns a mean loss into a robust one (t < 0) or a fair one (t > 0).

    R_t = (1/t) log( (1/N) Σ_i exp(t ℓ_i) ),      ∇R_t = Σ_i w_i ∇ℓ_i,   w = softmax(t ℓ)

t → 0 is the mean, t → +∞ the largest loss, t → −∞ the smallest. The same average over groups of samples, over
perturbations of the weights, or over the filters of a layer gives the other methods of this family.

Reference: Li, Beirami, Sanjabi & Smith (2023), *On Tilted Losses in Machine Learning: Theory and Applications*,
arXiv:2109.06141.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, DataError, DivergenceError, ShapeError
from bolza.core.reference import Reference, cites
from bolza.ops.batches import Loss, count_samples
from bolza.ops.sample_losses import sample_losses, without_reduction

__all__ = ["LI_TILTED", "TiltedLoss", "tilted_loss", "tilted_mean"]

LI_TILTED = Reference(
    "li2023tilted",
    "Li, Tian and Beirami, Ahmad and Sanjabi, Maziar and Smith, Virginia",
    "On Tilted Losses in Machine Learning: Theory and Applications",
    2023,
    venue="Journal of Machine Learning Research",
    arxiv="2109.06141",
)


@cites(LI_TILTED)
def tilted_mean(values: Tensor, t: float, dim: int = -1, weights: Tensor | None = None) -> Tensor:
    r"""Tilted mean along an axis: smallest value, mean and largest value are its cases −∞, 0 and +∞.

        T_t[ℓ] = (1/t) log Σ_i π_i exp(t ℓ_i)

    It never falls as t grows, and is exact to rounding for every t, from 10⁻¹² to ±∞. Its gradient is the softmax of
    t ℓ + log π.

    Args:
        values: ℓ, any shape, a floating dtype.
        t: the tilt, one over the unit of ℓ; ±inf too.
        dim: axis that is averaged over.
        weights: π, of a shape that goes with that of ℓ, not negative; scaled to the sum 1 along the axis. Equal
            weights by default. An entry of weight 0 does not count, whatever its value.

    Returns:
        Tensor of the shape of ``values`` without the axis; float32 where ``values`` has half precision.

    Raises:
        ArgumentError: t is not a number.
        DataError: the axis is empty, or no weight is positive.

    Reference: Li et al. (2023), equation 2. Departure: for |t ℓ| up to 1 around the mean, ``log1p`` of the mean of
    ``expm1``, which does not lose digits as t → 0.

    Example:
        >>> losses = torch.tensor([0.0, 1.0, 2.0])
        >>> [round(tilted_mean(losses, t).item(), 3) for t in (-math.inf, -1.0, 0.0, 1.0, math.inf)]
        [0.0, 0.691, 1.0, 1.309, 2.0]
    """
    if math.isnan(t):
        raise ArgumentError("t is nan: the tilt is a number, 0 for the mean, inf for the largest value")
    if values.shape[dim] == 0:
        raise DataError(f"values of shape {tuple(values.shape)} have nothing along axis {dim} to average")
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    if weights is None:
        log_share: Tensor | float = -math.log(values.shape[dim])
        counts: Tensor | None = None
        mean = values.mean(dim, keepdim=True)
    else:
        share = weights.to(values).expand_as(values)
        total = share.sum(dim, keepdim=True)
        if not bool((total > 0).all()) or not bool((share >= 0).all()):
            raise DataError("weights must not be negative, and one along the axis must be positive")
        share = share / total
        counts = share > 0
        values = torch.where(counts, values, values.detach().masked_fill(~counts, math.inf).amin(dim, True))
        log_share = share.log()
        mean = (share * values).sum(dim, keepdim=True)
    if t == 0:
        return mean.squeeze(dim)
    if math.isinf(t):
        return values.amax(dim) if t > 0 else values.amin(dim)
    z = t * (values - mean)
    near = z.detach().abs().amax(dim, keepdim=True) <= 1
    change = torch.expm1(z.clamp(-1, 1))
    small = change.mean(dim, True) if weights is None else (share * change).sum(dim, True)
    # each branch sees harmless numbers where the other one is taken
    small = mean + torch.log1p(torch.where(near, small, torch.zeros_like(small))) / t
    large = torch.logsumexp(t * values + log_share, dim, keepdim=True) / t
    return torch.where(near, small, large).squeeze(dim)


@cites(LI_TILTED)
def tilted_loss(
    losses: Tensor,
    t: float,
    groups: Tensor | None = None,
    *,
    within: float = 0.0,
    group_weights: str | Tensor = "size",
) -> Tensor:
    r"""Tilted loss of a batch, of its samples or of its groups of samples.

        R = (1/t) log (1/N) Σ_i exp(t ℓ_i),      or   R = (1/t) log Σ_g π_g exp(t R_g),   R_g = T_τ of group g

    t < 0 gives less weight to samples that fit badly (wrong labels, outliers), t > 0 more (rare cases, worst groups).
    The value is at most the largest loss and at least the smallest. Of a small batch it is biased towards the mean,
    by about 1/B; `TiltedLoss` keeps a running normaliser against that.

    Args:
        losses: ℓ, shape ``(n,)``, one number a sample.
        t: tilt between samples, or between groups if there are groups; one over the unit of ℓ.
        groups: group of each sample, integers of shape ``(n,)``; none by default.
        within: tilt τ inside of the groups.
        group_weights: π: ``"size"`` (share of the samples), ``"equal"``, or a tensor indexed by group number.

    Returns:
        Scalar tensor that can be differentiated.

    Raises:
        ArgumentError: an unknown ``group_weights``, or ``within`` without groups.
        ShapeError: the losses are not one number a sample, or groups have another shape.
        DataError: no losses, or group numbers that are not integers.
        DivergenceError: a loss is not finite.

    Reference: Li et al. (2023), equations 2 and 11 (hierarchical tilting).

    Example:
        >>> losses = torch.tensor([1.0, 1.0, 4.0, 6.0])
        >>> tilted_loss(losses, 50.0, torch.tensor([0, 0, 1, 1]), group_weights="equal").item() > 4.9
        True
    """
    _check_losses(losses)
    if groups is None:
        if within:
            raise ArgumentError(f"within={within} is the tilt inside of groups: give groups, or leave it out")
        return tilted_mean(losses, t, 0)
    present, member = _memberships(groups, len(losses), losses.device)
    inside = tilted_mean(losses.expand(len(present), -1), within, 1, member)
    return tilted_mean(inside, t, 0, _group_weights(group_weights, present, member.sum(1)))


@cites(LI_TILTED)
class TiltedLoss(nn.Module):
    r"""A loss, tilted: call it on outputs and targets where the loss was called.

        R = (1/t) log (1/B) Σ_i exp(t ℓ_i)                                of a batch, exact
        R̂ ← (1/t) log( (1 − λ) exp(t R̂) + λ exp(t R) ),                   with a running normaliser:
        ∇ = (1/B) Σ_i exp(t (ℓ_i − R̂)) ∇ℓ_i

    With ``running=λ`` the mean weight of a batch is at most 1/λ, and a batch of large losses counts for more than one
    of small ones, as it should; the value returned is R̂, and its gradient that of the last line. With ``groups=G``
    the losses of G groups are tilted by ``t`` and those inside of a group by ``within``; with ``running`` too, a group
    that is missing from a batch keeps its place in the weights of the others by its running loss.

    In evaluation mode the value is that of the batch, and nothing is remembered.

    Args:
        loss: ``loss(output, y)``, a mean over the samples or one number a sample.
        t: the tilt; ±1 to ±2 is a good first try for losses of order 1. It may be changed during a run.
        groups: number G of groups; 0 for none. Then each call takes the group of each sample.
        within: tilt τ inside of the groups.
        group_weights: weights of the groups: ``"equal"``, ``"size"`` (share of the samples), or a tensor ``(G,)``.
        running: λ in (0, 1], weight of the new batch in the running normaliser; 0 for none. 0.5 is a good first try;
            with a smaller one and t > 0 a batch of large losses makes a step up to 1/λ times as long.
        anneal: number of calls in training mode over which the tilt rises from 0 in equal steps. With t < 0 start
            near the mean, for otherwise a network that has learnt nothing may settle on the few samples it happens to
            fit.

    Raises:
        ArgumentError: an argument makes no sense.
        ShapeError, DataError, DivergenceError: (when called) see :func:`tilted_loss`.
        UserWarning: (once) a few samples carry nearly all the weight of a batch.

    Reference: Li et al. (2023), equations 2 and 11, algorithms 1 and 2. Departures: the normaliser of the hierarchy is
    one running number a group; annealing.

    Example:
        >>> net, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.arange(8) % 3
        >>> criterion = TiltedLoss(nn.CrossEntropyLoss(), t=-2.0, anneal=1000)
        >>> criterion(net(x), y).backward()          # the first call has the tilt 0: the mean
        >>> criterion.tilt
        -0.002
    """

    steps: Tensor
    level: Tensor
    seen: Tensor

    def __init__(
        self,
        loss: Loss,
        t: float,
        *,
        groups: int = 0,
        within: float = 0.0,
        group_weights: str | Tensor = "equal",
        running: float = 0.0,
        anneal: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("t", t), ("within", within)):
            if not isinstance(value, int | float) or math.isnan(value):
                raise ArgumentError(f"{name}={value!r} must be a number")
        if not callable(loss):
            raise ArgumentError(f"loss is a {type(loss).__name__}: give a function or module of (output, y)")
        if not 0 <= running <= 1:
            raise ArgumentError(f"running={running} must lie between 0 (none) and 1 (the batch alone)")
        if running and math.isinf(t):
            raise ArgumentError("running needs a finite t: a running largest loss has no gradient")
        if anneal < 0 or int(anneal) != anneal or (anneal and math.isinf(t)):
            raise ArgumentError(f"anneal={anneal} must be a whole number of calls, and t finite with it")
        if groups < 0 or (within and not groups):
            raise ArgumentError(f"groups={groups}: give the number of groups, which within={within} needs")
        if isinstance(group_weights, Tensor) and group_weights.shape != (groups,):
            raise ArgumentError(f"group_weights has shape {tuple(group_weights.shape)}, but groups={groups}")
        self.loss, self.t, self.within = loss, t, within
        self.groups, self.group_weights, self.running, self.anneal = groups, group_weights, running, anneal
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("level", torch.zeros(max(groups, 1)))
        self.register_buffer("seen", torch.zeros(max(groups, 1)))
        self._each: Loss | None = None
        self._warned = False

    @property
    def tilt(self) -> float:
        """The tilt of the next call: t, or less while it is annealed."""
        share = min(1.0, int(self.steps) / self.anneal) if self.anneal and self.training else 1.0
        return self.t * share

    def forward(self, output: Any, y: Any, groups: Tensor | None = None) -> Tensor:
        """The tilted loss of a batch, a scalar; ``groups`` are the group numbers ``(n,)``, 0 to G − 1."""
        if (groups is None) != (self.groups == 0):
            raise ArgumentError(
                f"the loss was made for groups={self.groups}: "
                + ("call it without group numbers" if self.groups == 0 else "give the group of each sample")
            )
        n = count_samples(output)
        if self._each is None:
            self._each = without_reduction(self.loss, output, y, n)
        losses = sample_losses(self._each, output, y, n)
        t = self.tilt
        if not self.training or not self.running:
            value = tilted_loss(losses, t, groups, within=self.within, group_weights=self.group_weights)
        else:
            _check_losses(losses)
            value = self._stochastic(losses, t, groups)
        if self.training:
            self.steps += 1
            self._warn(losses.detach(), t)
        return value

    def _stochastic(self, losses: Tensor, t: float, groups: Tensor | None) -> Tensor:
        """Value R̂, with the gradient of the batch under its weights."""
        if groups is None:
            present = torch.zeros(1, dtype=torch.long, device=losses.device)
            inside = tilted_mean(losses, t, 0)[None]
            tilt = t
        else:
            present, member = _memberships(groups, len(losses), losses.device)
            if int(present[-1]) >= self.groups or int(present[0]) < 0:
                raise DataError(f"group numbers must lie between 0 and {self.groups - 1}: see groups")
            inside = tilted_mean(losses.expand(len(present), -1), self.within, 1, member)
            tilt = self.within
        new, old = inside.detach().to(self.level), self.level[present]
        lam = self.running
        pair = torch.stack([old, new])
        share = pair.new_tensor([1 - lam, lam])
        known = self.seen[present] > 0
        self.level[present] = torch.where(known, tilted_mean(pair, tilt, 0, share[:, None]), new)
        if groups is None:
            self.seen += 1
            level = self.level[0].to(losses)
            weight = torch.exp(t * (inside[0].detach() - level))  # mean weight of the batch
            return level + weight * (inside[0] - inside[0].detach())
        self.seen += torch.bincount(groups.to(self.seen.device), minlength=self.groups)
        known = self.seen > 0
        share = torch.where(known, self._shares(), torch.zeros_like(self.seen))
        levels = self.level.clone().requires_grad_()
        with torch.enable_grad():
            total = tilted_mean(levels, t, 0, share)
        (weights,) = torch.autograd.grad(total, levels)
        inner = torch.exp(tilt * (new - self.level[present])) if math.isfinite(tilt) else torch.ones_like(new)
        factor = (weights[present] * inner).to(losses)
        return total.detach().to(losses) + (factor * (inside - inside.detach())).sum()

    def _shares(self) -> Tensor:
        return _group_weights(
            self.group_weights, torch.arange(self.groups, device=self.seen.device), self.seen
        ).to(self.seen)

    def _warn(self, losses: Tensor, t: float) -> None:
        n = len(losses)
        if self._warned or self.groups or not t or math.isinf(t) or n < 16 or (t > 0 and n > 256):
            return
        w = torch.softmax(t * losses, 0)
        count = float(1 / (w * w).sum())
        if count >= (0.15 * n if t < 0 else 4):
            return
        self._warned = True
        remedy = (
            "raise it slowly with anneal=, or take a smaller one"
            if t < 0
            else "take larger batches, a smaller learning rate, or a smaller one"
        )
        warnings.warn(
            f"the tilt t={t:g} leaves the weight of a batch of {n} to {count:.1f} samples: {remedy}",
            UserWarning,
            stacklevel=3,
        )

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"t={self.t}, groups={self.groups}, within={self.within}, running={self.running}, anneal={self.anneal}"


def _check_losses(losses: Tensor) -> None:
    if losses.ndim != 1:
        raise ShapeError(
            f"losses have shape {tuple(losses.shape)}: give one number a sample, (n,), such as reduction='none' does"
        )
    if len(losses) == 0:
        raise DataError("losses are empty: drop empty batches")
    if not bool(torch.isfinite(losses.detach()).all()):
        worst = int((~torch.isfinite(losses.detach())).nonzero()[0])
        raise DivergenceError(
            f"the loss of sample {worst} is {float(losses.detach()[worst])}: lower the learning rate, or check the data"
        )


def _memberships(groups: Tensor, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Groups that are present, and which sample is in which of them."""
    if groups.shape != (n,):
        raise ShapeError(f"groups have shape {tuple(groups.shape)}, but there are {n} losses: give ({n},)")
    if groups.is_floating_point() or groups.is_complex():
        raise DataError(f"groups are {groups.dtype}: give integers")
    groups = groups.to(device)
    present = groups.unique()
    return present, groups == present[:, None]


def _group_weights(weights: str | Tensor, present: Tensor, sizes: Tensor) -> Tensor:
    if isinstance(weights, Tensor):
        return weights.to(present.device)[present]
    if weights not in ("size", "equal"):
        raise ArgumentError(f"group_weights={weights!r}: choose 'size', 'equal', or give a tensor of them")
    return sizes.double() if weights == "size" else torch.ones_like(sizes, dtype=torch.double)
