r"""Batch size as the control of gradient noise: the laws, on the quadratic model.

    dm = (−2a m + ½ a η Σ/B) dt,      t = kη,   m the expected loss above the minimum, Σ the noise of one sample

Feedback. The rate that c-SGD multiplies by u = 2m/(ηΣ/B_0) keeps ηΣu/2B_0 = m. A batch B = B_0/u has the same noise
without the slower drift: ṁ = −a m, exponential decay in steps. Its samples grow as e^{at}, so that m → Σ/(2 a s) after
s samples, as for the annealed rate u = 1/(1 + a(t − t*)), which needs as many steps as samples/B_0.

Open loop. The moment equation is linear in m, so that the value of a unit of m, V_m = e^{−2a(T−t)}, does not depend on
the state, and min_B {V_m aηΣ/(2B) + κB/η} is solved by one formula. On a budget of S samples it leaves
m_0 e^{−2aT} + Σ(1 − e^{−aT})²/(2aS): as T → ∞ no unbiased use of S samples does better.

Reference: Smith, Kindermans, Ying & Le (2018), arXiv:1711.00489, for batch in place of rate; Balles, Romero & Hennig
(2017), arXiv:1612.05086, for B = η tr Σ/loss; Li, Tai & E (2017), arXiv:1511.06251, for u; An, Lu & Ying (2018),
arXiv:1805.08244, for batches that switch from small to large. Departures: the factor ½ on the rule of Balles et al. is
that of the moment equation; the priced batch size and the time of the switch are derived here.
"""

from __future__ import annotations

import math

from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites

__all__ = ["csgd_batch_size", "held_excess", "least_excess", "priced_batch_size", "switch_time"]

SMITH = Reference(
    "smith2018dont",
    "Smith, Samuel L. and Kindermans, Pieter-Jan and Ying, Chris and Le, Quoc V.",
    "Don't Decay the Learning Rate, Increase the Batch Size",
    2018,
    arxiv="1711.00489",
)
BALLES = Reference(
    "balles2017coupling",
    "Balles, Lukas and Romero, Javier and Hennig, Philipp",
    "Coupling Adaptive Batch Sizes with Learning Rates",
    2017,
    "Uncertainty in Artificial Intelligence",
    "1612.05086",
)
AN = Reference(
    "an2018stochastic",
    "An, Jing and Lu, Jianfeng and Ying, Lexing",
    "Stochastic modified equations for the asynchronous stochastic gradient descent",
    2018,
    arxiv="1805.08244",
)


def _positive(**given: float) -> None:
    for name, value in given.items():
        if not value > 0 or math.isinf(value):
            raise ArgumentError(f"{name}={value} must be positive and finite")


@cites(SMITH, BALLES)
def csgd_batch_size(lr: float, noise: float, excess: float, *, momentum: float = 0.0) -> float:
    r"""Batch size that does what c-SGD does with the rate: B = ηΣ/(2m), so that the noise term is m.

    With u = min(1, 2m/(ηΣ/B_0)) of c-SGD it is B_0/u wherever u < 1.

    Args:
        lr: learning rate η.
        noise: tr Σ of single-sample gradients.
        excess: loss above its minimum, m; in one dimension |∇f|²/2a.
        momentum: heavy-ball μ; the rate that counts is η/(1 − μ).

    Returns:
        B, not rounded; infinite where ``excess`` is not positive and there is noise.

    Raises:
        ArgumentError: a rate that is not positive, negative noise, or a momentum outside [0, 1).

    Reference: Smith et al. (2018) for B in place of η; Balles et al. (2017), eq. for η tr Σ/f, without the ½.

    Example:
        >>> csgd_batch_size(0.2, noise=1.0, excess=0.001)
        100.0
    """
    _positive(lr=lr)
    if not noise >= 0:
        raise ArgumentError(f"noise={noise} is a trace of a covariance: it cannot be negative")
    if not 0 <= momentum < 1:
        raise ArgumentError(f"momentum={momentum} must be in [0, 1)")
    if excess <= 0:
        return math.inf if noise > 0 else 0.0
    return lr / (1 - momentum) * noise / (2 * excess)


def held_excess(
    excess: float, curvature: float, lr: float, steps: int, noise: float = 1.0
) -> tuple[float, float]:
    r"""Expected loss and samples after steps of SGD with B = ηΣ/(2m): m_k = m_0 (1 − ηa + η²a²)^k.

    The exact moments of the discrete chain, m' = (1 − ηa)² m + ½ a η² Σ/B, with the law put in.

    Args:
        excess: m_0.
        curvature: a.
        lr: η.
        steps: k.
        noise: Σ of a single sample.

    Returns:
        m_k and Σ_{j<k} B_j.

    Raises:
        ArgumentError: a number that must be positive is not.

    Example:
        >>> m, samples = held_excess(0.1, curvature=1.0, lr=0.2, steps=100)
        >>> f"{m:.3e}", round(2 * m * samples, 2)  # m → Σ/(2as), up to ηa
        ('2.679e-09', 1.05)
    """
    _positive(excess=excess, curvature=curvature, lr=lr, noise=noise)
    step = lr * curvature
    factor = 1 - step + step**2
    m = excess * factor**steps
    first = csgd_batch_size(lr, noise, excess)
    if factor == 1:
        return m, first * steps
    return m, first * (factor**-steps - 1) / (1 / factor - 1)


def priced_batch_size(curvature: float, lr: float, noise: float, price: float, time_left: float) -> float:
    r"""Best batch where samples cost something: B* = η √(aΣ V_m/(2κ)), V_m = e^{−2a(T−t)}.

    Minimises E f(θ_T) + κ · samples over all schedules of the moment equation; it does not depend on the state.

    Args:
        curvature: a.
        lr: η.
        noise: Σ of a single sample.
        price: κ, in units of loss a sample.
        time_left: T − t = (steps left) · η.

    Returns:
        B*, not rounded.

    Raises:
        ArgumentError: a number that must be positive is not.

    Example:
        >>> round(priced_batch_size(1.0, 0.1, noise=1.0, price=1e-6, time_left=0.0), 3)
        70.711
    """
    _positive(curvature=curvature, lr=lr, noise=noise, price=price)
    return lr * math.sqrt(curvature * noise / (2 * price)) * math.exp(-curvature * max(0.0, time_left))


@cites(AN)
def switch_time(curvature: float, lr: float, noise: float, price: float, small: float, large: float) -> float:
    r"""When to go from small batches to large ones: T − t = log(η²aΣ/(2κ B_s B_l))/2a before the end.

    Of two batch sizes the larger one pays once V_m ½aηΣ(1/B_s − 1/B_l) exceeds the price κ(B_l − B_s)/η; V_m only
    grows, so that there is one switch.

    Args:
        curvature: a.
        lr: η.
        noise: Σ of a single sample.
        price: κ, in units of loss a sample.
        small: B_s.
        large: B_l.

    Returns:
        The time T − t = (steps left) · η at the switch; 0 where large batches never pay.

    Raises:
        ArgumentError: a number that must be positive is not, or ``large`` is not the larger one.

    Reference: An, Lu & Ying (2018) control batch sizes on the modified equation of asynchronous SGD; this is the
    synchronous, quadratic case, derived here.

    Example:
        >>> round(switch_time(1.0, 0.1, noise=1.0, price=1e-6, small=4, large=64), 4)
        1.486
    """
    _positive(curvature=curvature, lr=lr, noise=noise, price=price, small=small)
    if not large > small:
        raise ArgumentError(f"large={large} must be above small={small}")
    worth = lr**2 * curvature * noise / (2 * price * small * large)
    return max(0.0, math.log(worth) / (2 * curvature))


def least_excess(excess: float, curvature: float, noise: float, time: float, samples: float) -> float:
    r"""Least expected loss on a budget of samples: m_0 e^{−2aT} + Σ(1 − e^{−aT})²/(2aS).

    Reached by batches that grow as e^{at}, B = S ηa e^{−a(T−t)}/(1 − e^{−aT}), the law of
    :func:`priced_batch_size`.

    Args:
        excess: m_0.
        curvature: a.
        noise: Σ of a single sample.
        time: T = steps · η.
        samples: S.

    Returns:
        The loss above its minimum at T.

    Raises:
        ArgumentError: a number that must be positive is not.

    Example:
        >>> round(least_excess(1.0, 1.0, noise=1.0, time=5.0, samples=1000), 7)
        0.0005387
    """
    _positive(excess=excess, curvature=curvature, noise=noise, time=time, samples=samples)
    decay = math.exp(-curvature * time)
    return excess * decay**2 + noise * (1 - decay) ** 2 / (2 * curvature * samples)
