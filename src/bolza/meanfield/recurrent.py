r"""Fixed points of wide recurrent networks: state variance, its memory, and the phase.

Every cell reads Gaussian pre-activations e = W h + V x + b of variance σ_w² Q + σ_v² R + σ_b², with Q the
mean square of the state and R that of the input. Two copies of the network that read the same input
and start from different states have the correlation c = 1 as a fixed point; the slope there,

    χ = d E[h'_a h'_b] / d E[h_a h_b]   at c = 1,

is also the factor that the variance of a gradient gains per step back in time. Below 1 the past is
forgotten within 1/|log χ| steps; above 1 the network is chaotic.

    rnn       h' = φ(e)                                    χ = σ_w² E φ'²
    minimal   h' = u h + (1-u) z,  u = sigm(e)             χ = E u² + σ_w² E u'² (Q + R)
    gru       h' = z h + (1-z) n,  n = tanh(x_n + r a)
    lstm      c' = f c + i g,  h' = o tanh(c')

Gates at different times count as independent, as in the papers. In a GRU and an LSTM the same matrix W also
carries part of the state to itself with a coefficient of mean ā that is not zero, (1-z) r n' or i g' o tanh',
step after step: what it brings adds up in amplitude. A linear recursion s' = z̄ s + ā W s grows by
(z̄ + ā σ_w)² a step and not by z̄² + ā² σ_w². Here that part is summed exactly over all lags,

    E s² = ∫ dω/2π N / [(λ - z̄²)(1 - ā²σ_w²/|√λ e^{iω} - z̄|²)],

with λ = 1 for the state and λ = χ, the growth for which gain equals loss, for a small difference. `propagate`
follows a given network over its actual steps with no such approximation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites
from bolza.meanfield.activations import resolve_activation
from bolza.meanfield.fixed_point import fixed_point
from bolza.ops.gaussian import expectation
from bolza.ops.roots import bracketed_root

__all__ = ["CELLS", "CHEN", "GILBOA", "RecurrentFixedPoint", "recurrent_fixed_point"]

CHEN = Reference(
    "chen2018recurrent",
    "Chen, Minmin and Pennington, Jeffrey and Schoenholz, Samuel S.",
    "Dynamical Isometry and a Mean Field Theory of RNNs: Gating Enables Signal Propagation in Recurrent "
    "Neural Networks",
    2018,
    venue="ICML",
    arxiv="1806.05394",
)
GILBOA = Reference(
    "gilboa2019gated",
    "Gilboa, Dar and Chang, Bo and Chen, Minmin and Yang, Greg and Schoenholz, Samuel S. and Chi, Ed H. and "
    "Pennington, Jeffrey",
    "Dynamical Isometry and a Mean Field Theory of LSTMs and GRUs",
    2019,
    arxiv="1901.08987",
)

CELLS = ("rnn", "minimal", "gru", "lstm")
"""Cells that :func:`recurrent_fixed_point` knows."""

_REACH = 9.0  # standard deviations; 1e-18 of the mass lies beyond
_CHUNK = 1 << 18
_SMALLEST = 1e-13  # mean square of a state below which it counts as zero


@dataclass(frozen=True)
class RecurrentFixedPoint:
    """What a wide recurrent network settles at; every field has the broadcast shape of the inputs.

    Args:
        q: mean square of the state h.
        q_cell: mean square of the cell state c of an LSTM; ``q`` for the other cells.
        variance: variance of the pre-activations (of the gates).
        chi: factor that the variance of a small difference, or of a gradient, gains per step.
        xi: steps in which that variance changes by a factor e: 1/|log χ|.
        regime: ``"ordered"``, ``"critical"`` or ``"chaotic"``: a string for scalar input, else a numpy
            array of strings.

    Example:
        >>> point = recurrent_fixed_point("minimal", 1.0)
        >>> f"{point.chi:.4f} {point.xi:.2f} {point.regime}"
        '0.3645 0.99 ordered'
    """

    q: Tensor
    q_cell: Tensor
    variance: Tensor
    chi: Tensor
    xi: Tensor
    regime: Any


@cites(CHEN, GILBOA)
def recurrent_fixed_point(
    cell: str,
    weight_var: Tensor | float,
    input_var: Tensor | float = 1.0,
    bias_var: Tensor | float = 0.0,
    gate_bias: Tensor | float = 0.0,
    input_q: Tensor | float = 1.0,
    *,
    activation: Any = "tanh",
    tol: float = 1e-6,
) -> RecurrentFixedPoint:
    r"""Stationary state of a wide recurrent network that reads white noise, and how long it remembers.

    Args:
        cell: ``"rnn"``, ``"minimal"``, ``"gru"`` (in PyTorch's form: z near 1 keeps the state) or ``"lstm"``.
        weight_var: σ_w², width times the variance of a recurrent weight; all numbers broadcast.
        input_var: σ_v², number of inputs times the variance of an input weight. For ``"minimal"`` this
            is the matrix that leads from the embedded input to the gate.
        bias_var: σ_b², variance of the biases over the units.
        gate_bias: mean bias of the gate that keeps the state: u, z, or the forget gate. Unused by ``"rnn"``.
        input_q: R, mean square of the input; for ``"minimal"``, of the embedded input.
        activation: of ``"rnn"``, anything `resolve_activation` reads.
        tol: ``regime`` is ``"critical"`` if |χ - 1| ≤ tol.

    Returns:
        A `RecurrentFixedPoint` of float64 tensors.

    Raises:
        ArgumentError: the cell is unknown, or a variance is negative or not finite.

    Reference: Chen, Pennington & Schoenholz (2018) for ``"rnn"`` and ``"minimal"``; Gilboa et al. (2019) for
    the others. Departures, both for the others: weights are tied over time where gates let the state pass with
    one sign; and the cell state of an LSTM is a mixture of two Gaussians with two moments, where that paper
    samples it. In the ordered phase χ then agrees with wide networks within 8 %, mean squares of the state within
    20 % (of an LSTM's cell within 30 %). Where a GRU or an LSTM keeps itself going, ``regime`` is chaotic and χ
    too small. Since ξ = 1/|log χ|, an error of 8 % leaves ξ of these two cells uncertain from about ten steps on:
    for a network at hand, `bolza.stability.lyapunov_exponents` measures it.

    Example:
        Gates make criticality a region: bias them towards memory.

        >>> bias = torch.tensor([0.0, 2.0, 4.0, 6.0])
        >>> [round(float(c), 3) for c in recurrent_fixed_point("minimal", 1.0, gate_bias=bias).chi]
        [0.365, 0.744, 0.946, 0.992]
    """
    if cell not in CELLS:
        raise ArgumentError(f"cell={cell!r} is unknown; choose one of {', '.join(CELLS)}.")
    names = ("weight_var", "input_var", "bias_var", "gate_bias", "input_q")
    given = (weight_var, input_var, bias_var, gate_bias, input_q)
    shape, (weight, into, bias, mu, power) = _inputs(names, given)
    drive = into * power + bias
    if cell == "rnn":
        point = fixed_point(activation, weight, drive)
        variance, chi = point.q, point.chi_1
        second = resolve_activation(activation).second(variance.clamp_max(1e12))
        q = q_cell = torch.where(torch.isfinite(variance), second, torch.inf)
    verdict = None
    if cell != "rnn":
        solve, slope, untied = _SOLVERS[cell]
        q = solve(weight, drive, bias, mu, power)
        variance = weight * q + drive
        q_cell, chi = slope(weight, drive, bias, mu, power, q)
        if untied is not None:
            # A state that keeps itself going settles where its own memory just does not decay: χ is then
            # close to 1 from above, and χ of the state before that says on which side it is.
            verdict = torch.where((chi - 1).abs() < 0.1, untied(weight, drive, bias, mu, power), chi)
    rate = torch.log1p(chi - 1).abs()
    xi = torch.where(rate < 2e-15, torch.inf, 1 / rate)
    verdict = chi if verdict is None else verdict
    regime = np.where((verdict - 1).abs() <= tol, "critical", np.where(verdict < 1, "ordered", "chaotic"))
    label = regime.reshape(shape) if shape else str(regime[0])
    q, q_cell, variance, chi, xi = (t.reshape(shape) for t in (q, q_cell, variance, chi, xi))
    return RecurrentFixedPoint(q, q_cell, variance, chi, xi, label)


def _inputs(names: tuple[str, ...], given: tuple[Any, ...]) -> tuple[torch.Size, list[Tensor]]:
    tensors = []
    for name, value in zip(names, given, strict=True):
        if isinstance(value, str) or value is None:
            raise ArgumentError(f"{name} is {value!r}; give a number or a tensor.")
        t = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
        bad = ~torch.isfinite(t) | ((t < 0) & (name != "gate_bias"))
        if bool(bad.any()):
            raise ArgumentError(f"{name} is {t[bad][0]}; it must be finite, and a variance not negative.")
        tensors.append(t)
    try:
        full = torch.broadcast_tensors(*tensors)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        shapes = {n: tuple(t.shape) for n, t in zip(names, tensors, strict=True)}
        raise ArgumentError(f"these shapes do not broadcast: {shapes}.") from error
    return full[0].shape, [t.reshape(-1) for t in full]


# ------------------------------------------------------------------------------- Gaussian means


def _means(
    functions: Callable[[Tensor], tuple[Tensor, ...]], mean: Tensor, variance: Tensor
) -> tuple[Tensor, ...]:
    """Means of several functions of e ~ N(mean, variance), elementwise; poles no nearer than π/2."""
    root = variance.clamp_min(0).sqrt()
    wide = float(root.max()) if len(root) else 1.0
    half = min(4096, math.ceil(_REACH * (9.0 + 24.0 * wide) / (2 * math.pi)))
    z = torch.linspace(-_REACH, _REACH, 2 * half + 1, dtype=torch.float64)
    w = torch.exp(-z * z / 2) * (z[1] - z[0]) / math.sqrt(2 * math.pi)
    parts = []
    step = max(1, _CHUNK // len(z))
    for at in range(0, len(root), step):
        e = mean[at : at + step, None] + root[at : at + step, None] * z
        parts.append([(value * w).sum(-1) for value in functions(e)])
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _gate(e: Tensor) -> tuple[Tensor, ...]:
    """u, u², (1-u)², u'², u⁴ of the logistic function."""
    u = torch.sigmoid(e)
    back = torch.sigmoid(-e)
    return u, u * u, back * back, (u * back) ** 2, u**4


_TANH: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda e: torch.tanh(e) ** 2,
    lambda e: (1 - torch.tanh(e) ** 2) ** 2,
    lambda e: torch.tanh(e) ** 4,
    lambda e: (e * (1 - torch.tanh(e) ** 2)) ** 2,
    lambda e: 1 - torch.tanh(e) ** 2,
)
_LOW, _HIGH, _PER_DECADE = -9, 6, 60


@lru_cache(maxsize=1)
def _tanh_table() -> Tensor:
    """Means of the functions in ``_TANH`` over N(0, v), for v on a logarithmic grid, (5, grid)."""
    count = (_HIGH - _LOW) * _PER_DECADE + 4  # one more point on the left, two on the right
    v = 10 ** (_LOW + (torch.arange(count, dtype=torch.float64) - 1) / _PER_DECADE)
    return torch.stack([expectation(f, v) for f in _TANH])


def _tanh(variance: Tensor) -> tuple[Tensor, ...]:
    """E tanh², E tanh'², E tanh⁴, E e² tanh'², E tanh' of e ~ N(0, variance), to 1e-8: cubic interpolation."""
    at = (variance.clamp(10.0**_LOW, 10.0**_HIGH).log10() - _LOW) * _PER_DECADE
    left = at.floor().long().clamp_max((_HIGH - _LOW) * _PER_DECADE - 1)
    t = at - left
    table = _tanh_table()
    weights = (-t * (t - 1) * (t - 2) / 6, (t + 1) * (t - 1) * (t - 2) / 2, -(t + 1) * t * (t - 2) / 2,
               (t + 1) * t * (t - 1) / 6)  # fmt: skip
    mean = sum((w * table[:, left + i] for i, w in enumerate(weights)), torch.zeros(()))
    small = variance < 10.0**_LOW
    mean[[0, 3]] = torch.where(small, variance, mean[[0, 3]])
    mean[2] = torch.where(small, 3 * variance.square(), mean[2])
    return tuple(mean)


def _root(step: Callable[[Tensor, Tensor], Tensor], high: Tensor) -> Tensor:
    """Fixed point q = step(q) in (0, high]; zero where the map only shrinks."""
    low = torch.minimum(torch.full_like(high, _SMALLEST), high / 2)

    def excess(q: Tensor, i: Tensor) -> Tensor:
        return step(q, i) / q - 1

    index = torch.arange(len(high))
    dead = (high <= 0) | (excess(low.clamp_min(1e-300), index) <= 0)
    out = torch.zeros_like(high)
    live = (~dead).nonzero().squeeze(1)
    if len(live):
        out[live] = bracketed_root(
            lambda q, i: excess(q, live[i]), low[live], high[live] * (1 + 1e-12), rtol=1e-14
        )
    return out


# --------------------------------------------------------------------------------------- cells


def _minimal_state(weight: Tensor, drive: Tensor, bias: Tensor, mu: Tensor, power: Tensor) -> Tensor:
    """Q = R E(1-u)²/(1 - E u²)."""

    def step(q: Tensor, i: Tensor) -> Tensor:
        _, u2, back, _, _ = _means(_gate, mu[i], weight[i] * q + drive[i])
        return u2 * q + back * power[i]

    return _root(step, power)


def _minimal_slope(
    weight: Tensor, drive: Tensor, bias: Tensor, mu: Tensor, power: Tensor, q: Tensor
) -> tuple[Tensor, Tensor]:
    _, u2, _, slope, _ = _means(_gate, mu, weight * q + drive)
    return q, u2 + weight * slope * (q + power)


def _candidate(weight: Tensor, drive: Tensor, bias: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E n², E n'²(r² + r'² a²) and E r n' of a GRU, n = tanh(x_n + r a), by a rule over the reset gate."""
    z, w = (torch.from_numpy(t) for t in np.polynomial.hermite_e.hermegauss(24))
    w = w / w.sum()
    gates = weight * q + drive  # of r
    recurrent = (weight * q + bias)[:, None]  # of a
    r = torch.sigmoid(gates.sqrt()[:, None] * z)
    slope_r = (r * (1 - r)) ** 2
    total = drive[:, None] + r * r * recurrent
    t2, d2, _, ed2, d1 = _tanh(total)
    # a given e = x_n + r a has the mean r p/s² e and the variance p - r² p²/s².
    share = torch.where(total > 0, r * recurrent / total.clamp_min(1e-300), 0.0)
    a2 = share**2 * ed2 + (recurrent - share * r * recurrent) * d2
    return (t2 * w).sum(-1), ((r * r * d2 + slope_r * a2) * w).sum(-1), (r * d1 * w).sum(-1)


def _coherent(rate: Tensor, keep: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    r"""What the same weights at every step add up to.

    For s' = z s + ā W s + noise, with E z = keep, a = ā² σ_w² and a variance that grows by ``rate`` a step,
    noise of unit variance gives E s² = ∫ dω/2π 1/[(λ - z̄²)(1 - a/|√λ e^{iω} - z̄|²)] and, in units of ā σ_w²,
    E s (W s) with W s one step later. Infinite where √λ ≤ z̄ + √a.
    """
    below = rate.clamp_min(0).sqrt() <= keep + a.sqrt()
    m = rate + keep.square() - a
    s = (m.square() - 4 * rate * keep.square()).clamp_min(1e-300).sqrt()
    gap = (rate - keep.square()).clamp_min(1e-300)
    own = (1 + a / s) / gap
    # λ - z̄² - a - s over 2 z̄ s, without cancellation
    cross = 2 * a * keep / ((gap - a + s) * s * gap)
    return torch.where(below, torch.inf, own), torch.where(below, torch.inf, cross / a.clamp_min(1e-300))


def _growth(noise: Callable[[Tensor, Tensor], Tensor], low: Tensor) -> Tensor:
    """λ > low at which ``noise(λ, index)``, the gain through one round, is 1; it falls with λ."""
    low = low * (1 + 1e-9) + 1e-12
    high = 4 * low + 4
    index = torch.arange(len(low))
    for _ in range(60):
        grow = noise(high, index) > 1
        if not bool(grow.any()):
            break
        high = torch.where(grow, 4 * high, high)

    def excess(rate: Tensor, i: Tensor) -> Tensor:
        return (noise(rate, i).clamp_max(1e12)).log()

    return bracketed_root(excess, low, high, rtol=1e-14)


def _gru_parts(weight: Tensor, drive: Tensor, bias: Tensor, mu: Tensor, q: Tensor) -> dict[str, Tensor]:
    z, z2, back, slope, _ = _means(_gate, mu, weight * q + drive)
    n2, through, line = _candidate(weight, drive, bias, q)
    spread = z2 - z * z  # variance of z, and minus its covariance with 1 - z
    return {"z": z, "spread": spread, "back": back, "slope": slope, "n2": n2, "through": through, "line": line,
            "a": ((1 - z) * line).square() * weight}  # fmt: skip


def _gru_source(weight: Tensor, q: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """E h² that one round gives, and E[h n]."""
    own, cross = _coherent(torch.ones_like(q), p["z"], p["a"])
    mixed = (1 - p["z"]) * p["line"] * weight * cross  # E[h W h'] for unit noise
    fresh = p["spread"] * q + p["back"] * p["n2"] - p["a"] * q
    unit = fresh.clamp_min(0) / (1 + 2 * p["spread"] * p["line"] * mixed)
    return torch.where(torch.isfinite(own), unit * own, torch.inf), unit * mixed * p["line"]


def _gru_state(weight: Tensor, drive: Tensor, bias: Tensor, mu: Tensor, power: Tensor) -> Tensor:
    def step(q: Tensor, i: Tensor) -> Tensor:
        parts = _gru_parts(weight[i], drive[i], bias[i], mu[i], q)
        return _gru_source(weight[i], q, parts)[0].clamp_max(1e6)

    return _root(step, torch.ones_like(weight))


def _gru_untied(weight: Tensor, drive: Tensor, bias: Tensor, mu: Tensor, power: Tensor) -> Tensor:
    def step(q: Tensor, i: Tensor) -> Tensor:
        _, z2, back, _, _ = _means(_gate, mu[i], weight[i] * q + drive[i])
        return z2 * q + back * _candidate(weight[i], drive[i], bias[i], q)[0]

    q = _root(step, torch.ones_like(weight))
    return _gru_slope(weight, drive, bias, mu, power, q)[1]


def _gru_slope(
    weight: Tensor, drive: Tensor, bias: Tensor, mu: Tensor, power: Tensor, q: Tensor
) -> tuple[Tensor, Tensor]:
    p = _gru_parts(weight, drive, bias, mu, q)
    together = _gru_source(weight, q, p)[1].nan_to_num(0.0, 0.0, 0.0)
    distance = (q + p["n2"] - 2 * together).clamp_min(0)  # E (h - n)²
    total = p["spread"] + weight * (p["slope"] * distance + p["back"] * p["through"]) - p["a"]

    def noise(rate: Tensor, i: Tensor) -> Tensor:
        own, cross = _coherent(rate, p["z"][i], p["a"][i])
        mixed = (1 - p["z"][i]) * p["line"][i].square() * weight[i] * cross
        return total[i] * own - 2 * p["spread"][i] * mixed

    return q, _growth(noise, (p["z"] + p["a"].sqrt()).square())


def _lstm_gates(weight: Tensor, drive: Tensor, mu: Tensor, q: Tensor) -> Tensor:
    """Moments of an LSTM's gates at E h² = q, one a row; the output gate has those of the input gate."""
    e = weight * q + drive
    f, f2, _, df2, f4 = _means(_gate, mu, e)
    i, i2, _, di2, i4 = _means(_gate, torch.zeros_like(e), e)
    g2, dg2, g4, _, dg = _tanh(e)
    return torch.stack([f, f2, df2, f4, i, i2, di2, i4, g2, dg2, g4, dg])


def _cell_state(weight: Tensor, gates: Tensor, second: Tensor) -> dict[str, Tensor]:
    """Those of `_lstm_gates` with those of tanh of a cell state of mean square ``second``."""
    f, f2, df2, f4, i, i2, di2, i4, g2, dg2, g4, dg = gates
    # c = √v z with v = second · (1 ± s): the fourth moment is 3 second² (1 + s²).
    fourth = (6 * f2 * second * i2 * g2 + i4 * g4) / (1 - f4)
    excess = torch.where(second > 0, fourth / (3 * second.square()).clamp_min(1e-300) - 1, 0.0)
    s = excess.clamp(0, 1).sqrt()
    parts = [_tanh(second * (1 + sign * s)) for sign in (-1, 1)]
    t2, dt2, _, _, dt = ((x + y) / 2 for x, y in zip(*parts, strict=True))
    # Part of W_g h that stays the same function of c from step to step.
    a = (i * dg * i * dt).square() * weight
    return {"f": f, "spread": f2 - f * f, "df2": df2, "i2": i2, "di2": di2, "g2": g2, "dg2": dg2, "t2": t2,
            "dt2": dt2, "a": a}  # fmt: skip


def _cell_power(weight: Tensor, gates: Tensor) -> Tensor:
    """E c² for given gates: the root of E c² = (what one step adds) · (what tied weights make of it)."""

    def step(second: Tensor, i: Tensor) -> Tensor:
        p = _cell_state(weight[i], gates[:, i], second)
        own, _ = _coherent(torch.ones_like(second), p["f"], p["a"])
        fresh = p["spread"] * second + p["i2"] * p["g2"] - p["a"] * second
        return torch.where(torch.isfinite(own), fresh.clamp_min(0) * own, torch.inf).clamp_max(1e9)

    return _root(step, 4 / (1 - gates[0]).square())  # |c| ≤ 1/(1 - f) while the gates stand still


def _lstm_state(weight: Tensor, drive: Tensor, bias: Tensor, mu: Tensor, power: Tensor) -> Tensor:
    """Q = E o² E tanh(c)²."""

    def step(q: Tensor, i: Tensor) -> Tensor:
        gates = _lstm_gates(weight[i], drive[i], mu[i], q)
        p = _cell_state(weight[i], gates, _cell_power(weight[i], gates))
        return p["i2"] * p["t2"]

    return _root(step, torch.ones_like(weight))


def _lstm_untied(weight: Tensor, drive: Tensor, bias: Tensor, mu: Tensor, power: Tensor) -> Tensor:
    def second(gates: Tensor) -> Tensor:
        _, f2, _, _, _, i2, _, _, g2, *_ = gates
        return i2 * g2 / (1 - f2)

    def step(q: Tensor, i: Tensor) -> Tensor:
        gates = _lstm_gates(weight[i], drive[i], mu[i], q)
        p = _cell_state(weight[i], gates, second(gates))
        return p["i2"] * p["t2"]

    gates = _lstm_gates(weight, drive, mu, _root(step, torch.ones_like(weight)))
    return _lstm_rate(weight, gates, second(gates))


def _lstm_slope(
    weight: Tensor, drive: Tensor, bias: Tensor, mu: Tensor, power: Tensor, q: Tensor
) -> tuple[Tensor, Tensor]:
    gates = _lstm_gates(weight, drive, mu, q)
    second = _cell_power(weight, gates)
    return second, _lstm_rate(weight, gates, second)


def _lstm_rate(weight: Tensor, gates: Tensor, second: Tensor) -> Tensor:
    """χ at given gates and E c²."""
    p = _cell_state(weight, gates, second)
    into = weight * (p["df2"] * second + p["di2"] * p["g2"] + p["i2"] * p["dg2"])
    around = weight * p["di2"] * p["t2"]  # by way of the output gate, past the cell state

    def noise(rate: Tensor, i: Tensor) -> Tensor:
        own, _ = _coherent(rate, p["f"][i], p["a"][i])
        through = into[i] * p["i2"][i] * p["dt2"][i] / (1 - around[i] / rate)
        return own * (p["spread"][i] + through - p["a"][i])

    return _growth(noise, torch.maximum((p["f"] + p["a"].sqrt()).square(), around))


_Solver = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
_Slope = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
_SOLVERS: dict[str, tuple[_Solver, _Slope, _Solver | None]] = {
    "minimal": (_minimal_state, _minimal_slope, None),
    "gru": (_gru_state, _gru_slope, _gru_untied),
    "lstm": (_lstm_state, _lstm_slope, _lstm_untied),
}
