r"""Control by reweighing random paths, checked against a problem whose every number is known.

    minimise over π   E[Φ(x_T) + Σ_t L_t(x_t)] + Σ_t KL(π_t ‖ ρ)
    V_t = L_t − log E_ρ[e^{−V_{t+1}(f(x, u))}],   π*(u|x) ∝ ρ(u) e^{−V_{t+1}(f(x, u))}

Penalising the divergence of the *input's* law from a reference keeps the problem solvable by a log-mean-exp over
paths, where the classical formulation would need a law of the next state that x⁺ = f(x, u) cannot have. Two problems:

* scalar and linear (a = 1.1, q = 0.3, q_T = 1, σ² = 0.4, T = 8, x_0 = 1.5): P_t = q + a²P/(1 + Pσ²) and its constant;
* a swing-up: a pendulum with noise in its torque, steered step after step by paths drawn around the plan before.

Reference: Ito & Kashima (2022), arXiv:2203.12864.

Departures: the pendulum, and drawing around the last plan, are the sampling controller of Williams, Aldrich & Theodorou
(2017).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bolza.core import CallableCost
from bolza.report import Figure, log_axis, role
from bolza.solve import LinearKLControl, linear_kl_control, path_integral_policy
from bolza.solve.path_integral import ITO as REFERENCE
from bolza.studies._study import Progress, Row, Scale, StudyResult
from bolza.systems import LinearSystem, ODESystem

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "ito2022_kl"
TITLE = "Control by reweighing random paths"
CLAIM = (
    "With a divergence cost on the input's law, value and optimal policy are a log-mean-exp and a reweighed mean over "
    "random paths"
)
F = torch.float64
ONE = torch.eye(1, dtype=F)


@dataclass(frozen=True)
class Budget:
    """Size of the experiment."""

    samples: tuple[int, ...] = (1000, 10_000, 100_000)
    repeats: tuple[int, ...] = (800, 60, 12)
    walks: int = 20_000
    pendulum_steps: int = 60
    pendulum_samples: int = 400
    pendulum_runs: int = 4


BUDGETS = {
    "small": Budget(),
    "full": Budget(
        samples=(1000, 10_000, 100_000, 1_000_000),
        repeats=(1000, 400, 60, 10),
        walks=400_000,
        pendulum_steps=120,
        pendulum_samples=2000,
        pendulum_runs=16,
    ),
}


def scalar() -> tuple[LinearSystem, CallableCost, LinearKLControl, Tensor]:
    """The linear problem and its exact answer."""
    system = LinearSystem(1.1 * ONE, ONE, horizon=8)
    cost = CallableCost(lambda x: x.square().sum() / 2, lambda t, x, u: 0.15 * x.square().sum())
    exact = linear_kl_control(1.1 * ONE, ONE, 0.3 * ONE, ONE, 0.4 * ONE, 8)
    return system, cost, exact, torch.tensor([1.5], dtype=F)


def estimates(samples: int, repeats: int, seed: int, iterations: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Values, first means and first variances of independent estimates."""
    system, cost, _, x0 = scalar()
    draw = torch.Generator().manual_seed(seed)
    parts = []
    rows = max(1, 1_000_000 // samples)
    for at in range(0, repeats, rows):
        found = path_integral_policy(
            system,
            cost,
            x0.expand(min(rows, repeats - at), 1),
            0.4 * ONE,
            samples=samples,
            iterations=iterations,
            generator=draw,
        )
        parts.append((found.value, found.mean[:, 0, 0], found.covariance[:, 0, 0]))
    value, mean, variance = (torch.cat(list(column)) for column in zip(*parts, strict=True))
    return value, mean, variance


def closed_loop(walks: int, seed: int) -> tuple[float, float]:
    """Mean of cost plus divergence along walks under the exact policy, and its standard error."""
    _, _, exact, x0 = scalar()
    draw = torch.Generator().manual_seed(seed)
    x, total = x0.expand(walks).clone(), torch.zeros(walks, dtype=F)
    for t in range(8):
        mean, variance = -float(exact.K[t]) * x, float(exact.covariance[t])
        divergence = 0.5 * (variance / 0.4 + mean.square() / 0.4 - 1 + math.log(0.4 / variance))
        total += 0.15 * x.square() + divergence
        u = mean + variance**0.5 * torch.randn(walks, generator=draw, dtype=F)
        x = 1.1 * x + u
    total += x.square() / 2
    return float(total.mean()), float(total.std() / walks**0.5)


def pendulum() -> tuple[ODESystem, CallableCost]:
    """A pendulum that hangs at angle π and should stand at 0, with a plan of 20 steps of 0.1."""

    def field(s: float, x: Tensor, u: Tensor) -> Tensor:
        return torch.stack([x[..., 1], 4 * torch.sin(x[..., 0]) - 0.1 * x[..., 1] + u[..., 0]], -1)

    def away(x: Tensor) -> Tensor:
        return 2 * (1 - torch.cos(x[..., 0])) + 0.1 * x[..., 1].square()

    system = ODESystem(field, horizon=20, dt=0.1, method="midpoint")
    return system, CallableCost(lambda x: 5 * away(x), lambda t, x, u: 0.3 * away(x))


def swing_up(budget: Budget, warm: bool) -> tuple[Tensor, Tensor]:
    """Angles of several runs, (runs, steps + 1), and the mean share of paths that count, (runs, steps)."""
    system, cost = pendulum()
    draw = torch.Generator().manual_seed(0)
    x = torch.tensor([math.pi, 0.0], dtype=F).expand(budget.pendulum_runs, 2)
    covariance = 4 * ONE
    plan = torch.zeros(budget.pendulum_runs, system.horizon, 1, dtype=F)
    angles, shares = [x[:, 0]], []
    for _ in range(budget.pendulum_steps):
        found = path_integral_policy(
            system, cost, x, covariance, samples=budget.pendulum_samples, nominal=plan, generator=draw
        )
        shares.append(found.effective_samples / budget.pendulum_samples)
        kick = 0.1 * torch.randn(len(x), 1, generator=draw, dtype=F)
        x = system.step(0, x, found.mean[:, 0] + kick)
        if warm:
            plan = torch.cat([found.mean[:, 1:], torch.zeros_like(plan[:, :1])], 1)
        angles.append(x[:, 0])
    return torch.stack(angles, 1), torch.stack(shares, 1)


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Estimate the value of the linear problem from paths, walk under its policy, and swing a pendulum up.

    Args:
        scale: ``"small"``: up to 100,000 paths an estimate; ``"full"``: a million.
        progress: called with the share done and a few words.

    Returns:
        Rows on value, policy, rate and the pendulum, two figures.

    Example:
        >>> from bolza.studies import get
        >>> get("ito2022_kl").title
        'Control by reweighing random paths'
    """
    budget, report = BUDGETS[scale], progress or (lambda share, text: None)
    _, _, exact, x0 = scalar()
    value = float(exact.value(0, x0))
    found, around = {}, {}
    for k, (m, repeats) in enumerate(zip(budget.samples, budget.repeats, strict=True)):
        report(0.5 * k / len(budget.samples), f"{repeats} estimates from {m} paths")
        found[m] = estimates(m, repeats, seed=k)
        around[m] = estimates(m, repeats, seed=100 + k, iterations=2)
    report(0.5, "walks under the policy")
    walked = closed_loop(budget.walks, seed=7)
    report(0.6, "pendulum")
    warm, cold = swing_up(budget, True), swing_up(budget, False)
    report(1.0, "done")
    rows = [*value_rows(found, around, exact, value), *loop_rows(walked, value), *pendulum_rows(warm, cold)]
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        rows,
        (_rate_figure(found, around, value), _pendulum_figure(warm, cold)),
        notes=(
            "The reference law of the inputs is Gaussian; the divergence of a Gaussian from it is a quadratic cost.",
            "The pendulum, and drawing around the last plan, follow Williams, Aldrich & Theodorou (2017).",
        ),
        facts={
            "exact_value": value,
            "spread": {m: float(v[0].std()) for m, v in found.items()},
            "spread_around_a_plan": {m: float(v[0].std()) for m, v in around.items()},
            "pendulum_shares": [float(warm[1].mean()), float(cold[1].mean())],
        },
    )


Estimates = dict[int, tuple[Tensor, Tensor, Tensor]]


def value_rows(found: Estimates, around: Estimates, exact: LinearKLControl, value: float) -> list[Row]:
    """Value and policy against the closed form, and the rate of the error."""
    rows = [
        Row(
            "V_0(1.5) of the linear problem, in closed form",
            3.18351,
            value,
            None,
            abs(value - 3.18351) < 5e-6,
        )
    ]
    most = max(found)
    for name, index, truth in (
        ("value", 0, value),
        ("mean of the first input", 1, -1.5 * float(exact.K[0])),
        ("variance of the first input", 2, float(exact.covariance[0])),
    ):
        v = found[most][index]
        error = float(v.std() / len(v) ** 0.5)
        mean = float(v.mean())
        rows.append(
            Row(
                f"{name} from {most} paths",
                truth,
                mean,
                error,
                abs(mean - truth) < 3 * error,
                "three standard errors",
            )
        )
    sizes = torch.tensor([math.log(m) for m in found], dtype=F)
    logs = torch.stack([v[0].std().log() for v in found.values()])
    # the log of a standard deviation from n draws has the error 1/√(2(n − 1))
    errors = torch.tensor([1 / math.sqrt(2 * (len(v[0]) - 1)) for v in found.values()], dtype=F)
    weights = (sizes - sizes.mean()) / (sizes - sizes.mean()).square().sum()
    slope, error = float(weights @ logs), float((weights * errors).norm())
    rows.append(
        Row(
            "exponent of the spread of the value in the number of paths",
            -0.5,
            slope,
            error,
            abs(slope + 0.5) < 3 * error,
            "spread " + ", ".join(f"{float(v[0].std()):.4f} at {m}" for m, v in found.items()),
        )
    )
    first = min(found)
    bias = found[first][0] - value
    z = float(bias.mean() / (bias.std() / len(bias) ** 0.5))
    rows.append(
        Row(
            f"the value from {first} paths is too high on average (a log of a mean)",
            "> 0",
            float(bias.mean()),
            float(bias.std() / len(bias) ** 0.5),
            True if z > 2 else None if z > -2 else False,
            f"to second order half the variance, {float(bias.var()) / 2:.4f}; open within two standard errors",
        )
    )
    gain = float(found[first][0].std() / around[first][0].std())
    error = gain * float(errors[0]) * 2**0.5
    rows.append(
        Row(
            f"spread from {first} paths over that of a second pass around the first plan",
            "> √2",
            gain,
            error,
            gain > 2**0.5 + 2 * error,
            "twice the paths are worth √2; two standard errors",
        )
    )
    return rows


def loop_rows(walked: tuple[float, float], value: float) -> list[Row]:
    """Cost plus divergence under the policy."""
    mean, error = walked
    return [
        Row(
            "cost plus divergence of walks under the optimal law",
            value,
            mean,
            error,
            abs(mean - value) < 3 * error,
            "it equals the value; three standard errors",
        )
    ]


def pendulum_rows(warm: tuple[Tensor, Tensor], cold: tuple[Tensor, Tensor]) -> list[Row]:
    """Whether the pendulum stands at the end, and what the plan before is worth."""
    last = warm[0][:, -10:]
    tilt = float((1 - torch.cos(last)).amax(1).max())
    shares = [100 * float(s.mean()) for s in (warm[1], cold[1])]
    return [
        Row(
            "the pendulum stands at the end: largest 1 − cos over the last 10 steps, worst run",
            "< 0.1",
            tilt,
            None,
            tilt < 0.1,
            f"{len(last)} runs with noise in the torque",
        ),
        Row(
            "share of paths that count, drawn around the plan before against around zero, in %",
            f"> {shares[1]:.3g}",
            shares[0],
            None,
            shares[0] > shares[1],
            "mean over the run of (Σw)²/Σw², over the number of paths",
        ),
    ]


# ---------------------------------------------------------------------------------------- figures


def _rate_figure(found: Estimates, around: Estimates, value: float) -> Figure:
    return Figure(
        "The value from random paths",
        partial(_draw_rate, found=found, around=around, value=value),
        caption="Left: estimates of the value; dashes: the closed form. Right: their spread, and the slope −1/2.",
        alt="Dots closing in on a line as paths grow more, and their spread on logarithmic axes.",
        size=(9.2, 3.4),
        key="rate",
    )


def _draw_rate(canvas: Any, found: Estimates, around: Estimates, value: float) -> None:
    left, right = canvas.subplots(1, 2)
    for values, colour, name, shift in (
        (found, "first", "around zero", 0.93),
        (around, "second", "second pass, around the plan", 1.07),
    ):
        for m, (v, _, _) in values.items():
            left.plot([m * shift] * len(v), v, "o", color=role(colour), alpha=0.25, markersize=3)
        spreads = [float(v[0].std()) for v in values.values()]
        right.plot(list(values), spreads, "D-", color=role(colour), markersize=5, label=name)
        if colour == "first":
            right.plot(
                list(values),
                [spreads[0] * (min(values) / m) ** 0.5 for m in values],
                "--",
                color=role("muted"),
                label="paths$^{-1/2}$",
            )
    left.axhline(value, linestyle="--", color=role("muted"), linewidth=1)
    left.set(xlabel="paths", ylabel="$V_0$")
    right.set(xlabel="paths", ylabel="standard deviation of the value")
    log_axis(left, "x")
    log_axis(right, "x")
    log_axis(right, "y")
    right.legend()


def _pendulum_figure(warm: tuple[Tensor, Tensor], cold: tuple[Tensor, Tensor]) -> Figure:
    return Figure(
        "A pendulum swung up by random paths",
        partial(_draw_pendulum, warm=warm, cold=cold),
        caption="Left: angle of each run, from hanging (π) to standing (a multiple of 2π). Right: share of the paths "
        "that carry the weight, on average over the runs.",
        alt="Angles that swing and settle; two curves of shares.",
        size=(9.2, 3.4),
        key="pendulum",
    )


def _draw_pendulum(canvas: Any, warm: tuple[Tensor, Tensor], cold: tuple[Tensor, Tensor]) -> None:
    left, right = canvas.subplots(1, 2)
    steps = [0.1 * k for k in range(warm[0].shape[1])]
    for (angles, shares), colour, name in (
        (cold, "first", "around zero"),
        (warm, "second", "around the plan before"),
    ):
        for k, row in enumerate(angles):
            label = {"label": name} if k == 0 else {}
            left.plot(steps, row / math.pi, color=role(colour), alpha=0.7, linewidth=1, **label)
        right.plot(steps[1:], 100 * shares.mean(0), color=role(colour))
    for level in (0, 2):
        left.axhline(level, linestyle="--", color=role("muted"), linewidth=1)
    left.set(xlabel="time", ylabel="angle over π")
    left.legend(loc="center left")
    right.set(xlabel="time", ylabel="paths that count, %")
