r"""Learning rate, batch size and momentum as one number: the temperature of SGD.

    T = η/(2B(1 − μ))                    dθ = −∇f dt + (2TΣ)^{1/2} dW;   times (N − B)/(N − 1) without replacement
    g = η(N − B)/(B(1 − μ)) ≈ ηN/(B(1 − μ))                       the noise scale of a whole data set
    excess loss = η tr Σ/(4B(1 − μ)) = ½ T tr Σ                   where ηλ ≪ 1

Settings of equal temperature do the same per unit of the time kη/(1 − μ), as long as η stays far below the limit
2(1 + μ)/λ_max: the exact excess loss of a mode is larger by 1/(1 − ηλ/(2(1 + μ))).

Reference: Jastrzębski et al. (2017), *Three Factors Influencing Minima in SGD*; Smith & Le (2018); Smith et
al. (2018), *Don't Decay the Learning Rate, Increase the Batch Size*; Goyal et al. (2017) for linear scaling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites
from bolza.sde.moments import check_settings

__all__ = ["Equivalent", "equivalent_settings", "grow_batch", "noise_scale", "temperature"]

JASTRZEBSKI = Reference(
    key="jastrzebski2017three",
    authors="Jastrzębski, Stanisław and Kenton, Zachary and Arpit, Devansh and Ballas, Nicolas and Fischer, Asja and "
    "Bengio, Yoshua and Storkey, Amos",
    title="Three Factors Influencing Minima in SGD",
    year=2017,
    arxiv="1711.04623",
)
SMITH_LE = Reference(
    key="smith2018bayesian",
    authors="Smith, Samuel L. and Le, Quoc V.",
    title="A Bayesian Perspective on Generalization and Stochastic Gradient Descent",
    year=2018,
    arxiv="1710.06451",
)
SMITH = Reference(
    key="smith2018dont",
    authors="Smith, Samuel L. and Kindermans, Pieter-Jan and Ying, Chris and Le, Quoc V.",
    title="Don't Decay the Learning Rate, Increase the Batch Size",
    year=2018,
    arxiv="1711.00489",
)
GOYAL = Reference(
    key="goyal2017accurate",
    authors="Goyal, Priya and Dollár, Piotr and Girshick, Ross and Noordhuis, Pieter and Wesolowski, Lukasz and "
    "Kyrola, Aapo and Tulloch, Andrew and Jia, Yangqing and He, Kaiming",
    title="Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour",
    year=2017,
    arxiv="1706.02677",
)


@cites(JASTRZEBSKI)
def temperature(lr: float, batch_size: int, momentum: float = 0.0, samples: int | None = None) -> float:
    r"""Temperature of SGD: T = η/(2B(1 − μ)), times (N − B)/(N − 1) without replacement.

    Args:
        lr: learning rate η.
        batch_size: B.
        momentum: heavy-ball μ.
        samples: size N of the data set if batches are drawn without replacement, each batch anew. Shuffled epochs
            are colder still over a whole epoch: their noise takes back at the end what it did at the start.

    Returns:
        T, in units of loss over tr Σ: the mean loss at rest lies T tr Σ/2 above the minimum.

    Raises:
        ArgumentError: a setting is out of range.

    Reference: Jastrzębski et al. (2017); the factor 1/(1 − μ) is that of Smith & Le (2018).

    Example:
        >>> temperature(0.1, 50, momentum=0.5), temperature(0.1, 500, samples=500)
        (0.002, 0.0)
    """
    return lr * check_settings(lr, batch_size, momentum, samples) / (2 * (1 - momentum))


@cites(SMITH_LE)
def noise_scale(lr: float, batch_size: int, samples: int, momentum: float = 0.0) -> float:
    r"""Noise scale of SGD on a data set: g = η(N − B)/(B(1 − μ)) ≈ ηN/(B(1 − μ)).

    Args:
        lr: learning rate η.
        batch_size: B.
        samples: size N of the data set.
        momentum: heavy-ball μ.

    Returns:
        g.

    Raises:
        ArgumentError: a setting is out of range.

    Reference: Smith & Le (2018); Smith et al. (2018) for momentum.

    Example:
        >>> noise_scale(0.1, 100, 50_000)
        49.9
    """
    check_settings(lr, batch_size, momentum, samples)
    return lr * (samples - batch_size) / (batch_size * (1 - momentum))


@dataclass(frozen=True)
class Equivalent:
    """Settings of SGD at the temperature of others.

    Attributes:
        lr: learning rate.
        batch_size: batch size.
        momentum: momentum.
        temperature: the temperature of these settings; not exactly the wanted one where B was rounded.
        speed: time kη/(1 − μ) that one step covers, relative to the old settings: so many fewer steps are needed.
        share: η/η_max with η_max = 2(1 + μ)/λ, the largest stable rate; nan without a curvature.
        distortion: factor on the excess loss of the steepest mode that the same temperature does not remove,
            (1 − share of the old)/(1 − share of the new); 1 is perfect, infinite is unstable, nan without a curvature
            or where the old settings are unstable.
    """

    lr: float
    batch_size: int
    momentum: float
    temperature: float
    speed: float
    share: float
    distortion: float


@cites(GOYAL, SMITH)
def equivalent_settings(
    lr: float,
    batch_size: int,
    momentum: float = 0.0,
    *,
    new_lr: float | None = None,
    new_batch_size: int | None = None,
    new_momentum: float | None = None,
    samples: int | None = None,
    curvature: float | None = None,
) -> Equivalent:
    r"""Settings that keep the temperature when one of them changes: the linear scaling rule, with its limit.

        η'/(B'(1 − μ')) = η/(B(1 − μ)),      valid while η' ≪ 2(1 + μ')/λ_max

    Args:
        lr: learning rate now.
        batch_size: B now.
        momentum: μ now.
        new_lr: the new rate; found from the others where it is left out.
        new_batch_size: the new B; found (and rounded) where a new rate is given without it, else kept.
        new_momentum: the new μ; kept where it is left out.
        samples: size N of the data set if batches are drawn without replacement.
        curvature: λ_max of the Hessian, to tell how far the rule can be trusted.

    Returns:
        Equivalent.

    Raises:
        ArgumentError: a setting is out of range; or both a new rate and a new batch size are given, which leaves
            nothing to choose.

    Reference: Goyal et al. (2017), §2.1; Smith et al. (2018).

    Example:
        >>> larger = equivalent_settings(0.1, 32, new_batch_size=256, curvature=2.0)
        >>> larger.lr, larger.speed, round(larger.share, 3), round(larger.distortion, 3)
        (0.8, 8.0, 0.8, 4.5)
    """
    old = temperature(lr, batch_size, momentum, samples)
    mu = momentum if new_momentum is None else new_momentum
    if new_lr is not None and new_batch_size is not None:
        raise ArgumentError(
            f"new_lr={new_lr} and new_batch_size={new_batch_size} are both given: leave out the one that is to follow"
        )
    if new_lr is not None:
        unit = temperature(new_lr, 1, mu)  # a batch of one, with replacement
        if old == 0:
            raise ArgumentError(
                f"batch_size={batch_size} is the whole data set: no other rate has its temperature 0"
            )
        ratio = unit / old  # 1/B' in the units of Σ
        b = ratio if samples is None else ratio * samples / (samples - 1 + ratio)
        # short of the whole data set, which has no temperature at all
        size = max(1, round(b) if samples is None else min(round(b), samples - 1))
        rate = new_lr
    else:
        size = batch_size if new_batch_size is None else new_batch_size
        per_rate = temperature(1.0, size, mu, samples)
        if per_rate == 0 and old:
            raise ArgumentError(
                f"new_batch_size={size} is the whole data set: its temperature is 0 at any rate"
            )
        rate = old / per_rate if per_rate else lr
    if curvature is not None and curvature < 0:
        raise ArgumentError(f"curvature is {curvature}: the largest curvature of a minimum is not negative")
    share = rate * curvature / (2 * (1 + mu)) if curvature else math.nan
    before = lr * curvature / (2 * (1 + momentum)) if curvature else math.nan
    distortion = math.nan if before >= 1 else math.inf if share >= 1 else (1 - before) / (1 - share)
    return Equivalent(
        lr=rate,
        batch_size=size,
        momentum=mu,
        temperature=temperature(rate, size, mu, samples),
        speed=rate / (1 - mu) * (1 - momentum) / lr,
        share=share,
        distortion=distortion,
    )


@cites(SMITH)
def grow_batch(
    rates: Sequence[float], batch_size: int, *, samples: int | None = None, largest: int | None = None
) -> list[tuple[float, int]]:
    r"""A schedule that grows the batch where another one cuts the rate: B_t = B η_0/η_t at the rate η_0.

    Temperatures are those of the decaying schedule, with fewer steps an epoch; where the batch has reached its largest
    size, or where a rate that grows has brought it down to a single sample, the rate takes over.

    Args:
        rates: learning rates of the schedule, one a stage; the first one is kept.
        batch_size: B of all stages of that schedule.
        samples: size N of the data set if batches are drawn without replacement.
        largest: largest batch; N, or without bound, by default.

    Returns:
        ``(lr, batch_size)`` of each stage.

    Raises:
        ArgumentError: a setting is out of range, or there are no rates.

    Reference: Smith et al. (2018).

    Example:
        >>> grow_batch([0.4, 0.1, 0.025], 32, largest=256)
        [(0.4, 32), (0.4, 128), (0.2, 256)]
    """
    if not rates:
        raise ArgumentError("rates is empty: give the learning rate of each stage")
    bound = largest if largest is not None else samples
    if bound is not None and bound < batch_size:
        raise ArgumentError(f"largest is {bound}, below batch_size={batch_size}: it must leave room to grow")
    if samples is not None:
        bound = min(bound or samples, max(batch_size, samples - 1))  # all of them would have no noise
    stages = []
    for rate in rates:
        found = equivalent_settings(rate, batch_size, new_lr=rates[0], samples=samples)
        lr, size = found.lr, found.batch_size
        if (bound is not None and size >= bound) or size == 1:
            size = size if bound is None else min(size, bound)
            lr = equivalent_settings(rate, batch_size, new_batch_size=size, samples=samples).lr
        stages.append((lr, size))
    return stages
