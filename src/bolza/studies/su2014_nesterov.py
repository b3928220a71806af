r"""Nesterov's method as a differential equation, and the family of flows it belongs to.

    X″ + (3/t) X′ + ∇f(X) = 0            t = k √s            f − f* ≤ 2|x₀ − x*|²/t²
    X″ + ((p+1)/t) X′ + C p² t^{p−2} ∇f(X) = 0,   E = ½|Z − x*|² + C t^p (f − f*) never rises

Bessel functions on quadratics; the energy on convex functions that are not; the logistic regression of handwritten
digits, where a discrete energy certifies a real run; and a direct discretisation, which is unstable where one that
matches the rate is not.

Reference: Su, Boyd & Candès (2014), arXiv:1503.01243; Wibisono, Wilson & Jordan (2016), arXiv:1603.04245.

Departures: the test functions are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bolza.data import digits
from bolza.report import Figure, log_axis, role
from bolza.sde import (
    AcceleratedPath,
    accelerated_descent,
    accelerated_flow,
    accelerated_quadratic,
    nesterov_descent,
)
from bolza.sde.accelerated import SU as REFERENCE
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "su2014_nesterov"
TITLE = "Nesterov's method as a differential equation"
CLAIM = "Accelerated methods are discretised flows whose friction dies as 1/t and whose energy never rises"

D = torch.float64
EPS = 0.02
START = torch.tensor([2.0, -3.0], dtype=D)
VALUES = ((4.0, 1.0, 0.5767248), (4.0, 2.0, -0.0330217), (4.0, 5.0, 0.0086945),
          (2.0, 1.0, 0.7699866), (2.0, 5.0, 0.0046887), (2.0, 20.0, 0.0073271))  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """Size of the experiment."""

    times: int = 60
    end: float = 5.0
    samples: int = 150
    steps: int = 150
    long: int = 600


BUDGETS = {"small": Budget(), "full": Budget(times=400, end=20.0, samples=1000, steps=1000, long=20_000)}


def softened(x: Tensor) -> Tensor:
    """Convex with bounded derivatives of every order, minimum 0 at 0."""
    return (torch.logaddexp(x, -x) - math.log(2)).sum(-1)


def quartic(x: Tensor) -> Tensor:
    """Convex and flat at the minimum."""
    return x.pow(4).sum(-1) / 4


def direct_euler(curvature: float, eps: float, p: int, steps: int) -> Tensor:
    """The flow discretised as it stands on ½λx²: x_{k+1} = (p z_k + k x_k)/(k + p), z by the gradient at x."""
    x = z = 1.0
    course = [x]
    for k in range(1, steps + 1):
        x = (p * z + k * x) / (k + p)
        z -= p * (k + 1) ** (p - 1) * eps / p**2 * curvature * x
        course.append(x)
        if not abs(x) < 1e12:
            break
    return torch.tensor(course, dtype=D)


def regression(samples: int) -> tuple[Any, Tensor, float]:
    """Logistic regression of even against odd digits: loss of weights (..., 65), start, and a Lipschitz constant."""
    data = digits()
    x = torch.cat([data.train_x[:samples].flatten(1), torch.ones(samples, 1)], 1).double()
    sign = 1.0 - 2.0 * (data.train_y[:samples] % 2).double()

    def loss(w: Tensor) -> Tensor:
        margins = (w @ x.mT) * sign
        return torch.nn.functional.softplus(-margins).mean(-1) + 5e-4 * w.square().sum(-1)

    largest = float(torch.linalg.eigvalsh(x.mT @ x / samples)[-1])
    return loss, torch.zeros(x.shape[1], dtype=D), largest / 4 + 1e-3


def descent(loss: Any, x: Tensor, lr: float, steps: int) -> Tensor:
    """Values of plain gradient descent."""
    values = []
    for _ in range(steps + 1):
        x = x.requires_grad_()
        f = loss(x)
        values.append(f.detach())
        x = x.detach() - lr * torch.autograd.grad(f, x)[0]
    return torch.stack(values)


def minimum(loss: Any, x: Tensor) -> Tensor:
    """Minimiser by Newton's method from a start near enough."""
    for _ in range(30):
        x = x.requires_grad_()
        (g,) = torch.autograd.grad(loss(x), x)
        H = torch.autograd.functional.hessian(loss, x.detach())
        x = x.detach() - torch.linalg.solve(H, g)
        if float(g.norm()) < 1e-13:
            break
    return x


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Flows, certificates and discretisations.

    Args:
        scale: ``"small"``: flows to t = 5, 150 digits; ``"full"``: to t = 20, 1000 digits, longer runs.
        progress: called with the share done and a few words.

    Returns:
        Rows on Bessel values, energies, rates and stability; one figure.

    Example:
        >>> from bolza.studies import get
        >>> get("su2014_nesterov").title
        "Nesterov's method as a differential equation"
    """
    budget, report = BUDGETS[scale], progress or (lambda share, text: None)
    report(0.0, "flows on quadratics")
    rows = [*bessel_rows(), *step_rows()]
    report(0.2, "flows on convex functions")
    times = torch.linspace(0, budget.end, budget.times)
    flows = {p: accelerated_flow(softened, START, times=times, p=p) for p in (2, 3, 4)}
    rows += energy_rows(flows)
    report(0.5, "digits")
    found = digit_runs(budget)
    rows += digit_rows(found)
    report(0.8, "discretisations")
    direct = {p: direct_euler(1.0, EPS, p, budget.long) for p in (3, 4)}
    rows += euler_rows(direct, budget)
    one = torch.ones(1, dtype=D)
    matched = accelerated_descent(partial(_parabola, 1.0), one, lr=EPS, steps=budget.long // 2, p=3)
    report(1.0, "done")
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        rows,
        (_figure(flows, found, direct, matched),),
        notes=(
            f"Digits: even against odd, {budget.samples} samples, logistic loss and 5e-4 |w|², step 1/L for "
            "both methods, equal numbers of gradients; x* by Newton's method.",
            "The direct discretisation differs from the matched one only by the gradient step inside.",
        ),
        facts={
            "nesterov": found[0].values[:: max(1, budget.steps // 10)].tolist(),
            "descent": float(found[1][-1]),
        },
    )


def bessel_rows() -> list[Row]:
    """Flow against closed form, both against printed digits."""
    rows = []
    for curvature in (4.0, 2.0):
        cases = [(t, x) for c, t, x in VALUES if c == curvature]
        times = [t for t, _ in cases]
        path = accelerated_flow(partial(_parabola, curvature), torch.ones(1, dtype=D), times=times)
        closed = accelerated_quadratic(times, curvature)
        printed = torch.tensor([x for _, x in cases], dtype=D)
        off = float((path.positions[:, 0] - closed).abs().max())
        worst = float((closed - printed).abs().max())
        rows.append(Row(f"flow on a quadratic, curvature {curvature:g}: X(t) less 2J₁(√λt)/√λt", 0.0, off, 1e-8,
                        off < 1e-6 and worst < 6e-8, f"t = {times}; closed form as printed"))  # fmt: skip
    return rows


def _parabola(curvature: float, x: Tensor) -> Tensor:
    return curvature / 2 * x.square().sum(-1)


def step_rows() -> list[Row]:
    """The method follows its flow at t = k √s, with an error of √s."""
    last = float(nesterov_descent(_square, torch.ones(1, dtype=D), lr=1e-4, steps=500).positions[-1])
    truth = float(accelerated_quadratic(2.0, 2.0))
    errors = [
        abs(
            float(nesterov_descent(_square, torch.ones(1, dtype=D), lr=1 / n**2, steps=2 * n).positions[-1])
            - truth
        )
        for n in (50, 100)
    ]
    slope = math.log2(errors[0] / errors[1])
    return [
        Row("Nesterov's method on x², s = 1e-4, at t = 5", 0.005038, last, 5e-7, abs(last - 0.005038) < 6e-7,
            f"the flow is at {float(accelerated_quadratic(5.0, 2.0)):.6f}"),
        Row("order of its distance from the flow in √s", 1.0, slope, None, abs(slope - 1) < 0.15, "at t = 2"),
    ]  # fmt: skip


def _square(x: Tensor) -> Tensor:
    return x.square().sum(-1)


def energy_rows(flows: dict[int, AcceleratedPath]) -> list[Row]:
    """The energy never rises, and bounds the loss."""
    origin = torch.zeros(2, dtype=D)
    rows = []
    for p, path in flows.items():
        rise = path.rise(origin)
        share = float((path.values[1:] / path.bound(origin)[1:]).max())
        rows.append(Row(f"order {p}: largest rise of the energy from one time to the next", "≤ 0", rise, 1e-7,
                        rise <= 1e-7, "convex, not quadratic"))  # fmt: skip
        rows.append(Row(f"order {p}: largest share of the bound |x₀ − x*|²/(2Ct^p) that the loss takes", "≤ 1", share,
                        None, share <= 1 + 1e-7))  # fmt: skip
    apart = max(direct_distance(p, flows[p]) for p in (2, 3, 4))
    rows.append(
        Row("distance from the equation of second order, integrated in t as it stands", 0.0, apart, 1e-6, apart < 1e-5,
            "the largest over orders 2, 3, 4, at the last time")
    )  # fmt: skip
    return rows


def direct_distance(p: int, path: AcceleratedPath) -> float:
    """Distance at the end from X″ = −((p+1)/t) X′ − t^{p−2} ∇f(X), started from the flow at an early time."""
    from scipy.integrate import solve_ivp

    at = len(path.times) // 8 + 1
    t0, t1 = float(path.times[at]), float(path.times[-1])
    x, z = path.positions[at], path.anchors[at]

    def velocity(t: float, y: Any) -> Any:
        x, v = y[:2], y[2:]
        return np.concatenate([v, -(p + 1) / t * v - t ** (p - 2) * np.tanh(x)])

    y0 = torch.cat([x, p / t0 * (z - x)]).numpy()
    end = solve_ivp(velocity, (t0, t1), y0, "DOP853", rtol=1e-9, atol=1e-11).y[:2, -1]
    return float((path.positions[-1] - torch.as_tensor(end)).abs().max())


def digit_runs(budget: Budget) -> tuple[AcceleratedPath, Tensor, Tensor, float]:
    """Nesterov's method and gradient descent on the regression; the minimiser and the minimum."""
    loss, start, lipschitz = regression(budget.samples)
    path = nesterov_descent(loss, start, lr=1 / lipschitz, steps=budget.steps)
    best = minimum(loss, path.positions[-1])
    return path, descent(loss, start, 1 / lipschitz, budget.steps), best, float(loss(best).detach())


def digit_rows(found: tuple[AcceleratedPath, Tensor, Tensor, float]) -> list[Row]:
    """A certificate on a real run, and what acceleration is worth there."""
    path, plain, best, lowest = found
    rise = path.rise(best, lowest)
    share = float(((path.values - lowest) / path.bound(best)).max())
    ratio = float((plain[-1] - lowest) / (path.values[-1] - lowest))
    return [
        Row("digits: largest rise of the discrete energy", "≤ 0", rise, 1e-12, rise <= 1e-10, "step 1/L"),
        Row("digits: largest share of the bound 2|x₀ − x*|²/(s(k+1)²)", "≤ 1", share, None, share <= 1),
        Row("digits: excess loss of gradient descent over that of Nesterov's method", "> 1", ratio, None, ratio > 1,
            f"after {len(plain) - 1} gradients each, the same step"),
    ]  # fmt: skip


def euler_rows(direct: dict[int, Tensor], budget: Budget) -> list[Row]:
    """The direct discretisation and the one that matches the rate, at the same step."""
    rows = []
    for p, course in direct.items():
        top = float(course.abs().max())
        rows.append(
            Row(f"order {p}, direct discretisation: largest |x| from x₀ = 1", "diverges", top, None, top > 1e6,
                f"ε = {EPS:g}; {len(course) - 1} iterations")
        )  # fmt: skip
    steps = min(budget.long, 2000)
    for p in (2, 3):
        flat = accelerated_descent(quartic, torch.ones(2, dtype=D), lr=EPS, steps=steps, p=p)
        worst = flat.rise(torch.zeros(2, dtype=D))
        half = len(flat.values) // 2
        rate = float((flat.values[half] / flat.values[-1]).log() / math.log((len(flat.values) - 1) / half))
        rows.append(Row(f"order {p}, matched discretisation: largest rise of its energy", "≤ 0", worst, 1e-10,
                        worst <= 1e-10, f"quartic, {steps} iterations, ε = {EPS:g}"))  # fmt: skip
        rows.append(Row(f"order {p}, matched discretisation: rate of the loss", f"≥ {p}", rate, None, rate >= p,
                        "exponent of 1/k over the second half; the bound is one for all convex functions"))  # fmt: skip
    return rows


# ----------------------------------------------------------------------------------------- figure


def _figure(
    flows: dict[int, AcceleratedPath],
    found: tuple[AcceleratedPath, Tensor, Tensor, float],
    direct: dict[int, Tensor],
    matched: AcceleratedPath,
) -> Figure:
    return Figure(
        "Accelerated flows and methods",
        partial(_draw, flows=flows, found=found, direct=direct, matched=matched),
        caption="Left: loss along flows of three orders on a convex function, and their bounds (dashed). Middle: "
        "excess loss of a logistic regression of digits, with the bound that the energy certifies. Right: direct "
        "discretisations of orders 3 and 4 on a quadratic, and the matched one of order 3.",
        alt="Falling loss curves below dashed bounds; two curves that blow up and one that falls.",
        size=(10.5, 3.5),
        key="flows",
    )


def _draw(
    canvas: Any,
    flows: dict[int, AcceleratedPath],
    found: Any,
    direct: dict[int, Tensor],
    matched: AcceleratedPath,
) -> None:
    left, middle, right = canvas.subplots(1, 3)
    origin = torch.zeros(2, dtype=D)
    for (p, path), colour in zip(flows.items(), ("first", "second", "third"), strict=True):
        left.semilogy(path.times[1:], path.values[1:].clamp_min(1e-12), color=role(colour), label=f"p = {p}")
        left.semilogy(path.times[1:], path.bound(origin)[1:], "--", color=role(colour), linewidth=1)
    log_axis(left, "y")
    left.set(xlabel="t", ylabel="f − f*", title="flows", ylim=(1e-4, 1e3))
    left.legend()
    path, plain, best, lowest = found
    k = torch.arange(1, len(plain))
    middle.loglog(k, (plain - lowest)[1:], color=role("muted"), label="gradient descent")
    middle.loglog(k, (path.values - lowest)[1:].clamp_min(1e-14), color=role("first"), label="Nesterov")
    middle.loglog(k, path.bound(best)[1:], "--", color=role("first"), linewidth=1, label="its certificate")
    for which in ("x", "y"):
        log_axis(middle, which)
    middle.set(xlabel="gradients", ylabel="f − f*", title="logistic regression")
    middle.legend(fontsize="small")
    for (p, course), colour in zip(direct.items(), ("second", "third"), strict=True):
        right.loglog(
            range(1, len(course)),
            course[1:].abs().clamp_min(1e-12),
            color=role(colour),
            label=f"direct, p = {p}",
        )
    points = matched.positions[1:, 0].abs().clamp_min(1e-12)
    right.loglog(range(1, len(points) + 1), points, color=role("first"), label="matched, p = 3")
    for which in ("x", "y"):
        log_axis(right, which)
    right.set(xlabel="iteration", ylabel="|x|", title=f"discretised, ε = {EPS:g}", ylim=(1e-6, 1e6))
    right.legend(fontsize="small")
