r"""Lyapunov exponents of gradient descent, and the curvature and the learning rate that follow from them.

    v ← v ∓ η H v:   descent → log(1 − η λ_min)/η,   ascent → log(1 + η λ_max)/η

The paper reads curvature off the growth of a nearby twin trajectory, at one extra gradient a step; finds that SGD
lives where λ_max ~ 1/η over a wide range of rates; and sets the rate by η = c/λ_max. All three are tried on a
small network.

Reference: Sasdelli, Ajanthan, Chin & Carneiro (2021), *A Chaos Theory Approach to Understand Neural Network
    Optimization*.

Departures. 500 digits and an MLP of 2,410 parameters with squared loss, for CIFAR-10 and the paper's
architectures. The exponent is inverted exactly. Expected numbers are earlier runs of ours with another random
start; the identities are judged on the present one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bolza.ops.curvature import hessian_operator
from bolza.ops.krylov import top_eigenpairs
from bolza.report import Figure, role
from bolza.stability import TwinCurvature, curvature_exponent, lyapunov_exponents, twin_operator
from bolza.stability.curvature import SASDELLI
from bolza.studies._study import Progress, Row, Scale, StudyResult
from bolza.systems import SGD, TrainingSystem

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "sasdelli2021_chaos"
TITLE = "Chaos in gradient descent: curvature from twin trajectories"
CLAIM = "Twin trajectories give the extreme curvatures of the loss at the price of a gradient, and with them a rate"
REFERENCE = SASDELLI

F64 = torch.float64
RATE = 0.02
DESCENT = 0.03  # relative error that the slow descent exponent may have
CONSTANT = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    descent_steps: int
    seeds: int
    steps: int
    sgd_rates: tuple[float, ...]
    sgd_steps: int


BUDGETS = {
    "small": Budget(
        descent_steps=2000,
        seeds=2,
        steps=600,
        sgd_rates=(0.1, 0.2, 0.4),
        sgd_steps=1000,
    ),
    "full": Budget(
        descent_steps=12000,
        seeds=5,
        steps=600,
        sgd_rates=(0.05, 0.1, 0.2, 0.3, 0.4),
        sgd_steps=12000,
    ),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Measure curvatures by twins, follow SGD, and try the rule for the rate.

    Args:
        scale: ``"small"``: some fifteen seconds on one core; ``"full"``: longer runs and more seeds.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("sasdelli2021_chaos").reference.year
        2021
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    x, y = data()
    report(0.0, "frozen weights")
    rows = [*quadratic_rows(), *frozen_rows(x.double(), y.double(), budget)]
    report(0.4, "SGD at several rates")
    sharpness = [sgd_sharpness(x, y, rate, budget.sgd_steps) for rate in budget.sgd_rates]
    rows += edge_rows(budget.sgd_rates, sharpness)
    report(0.6, "the rule for the rate")
    races = [race(x, y, seed, budget.steps) for seed in range(budget.seeds)]
    rows.append(race_row(races))
    notes = (
        "MLP 64-32-10 with tanh, squared loss, the first 500 digits scaled to [0, 1]; the weights are frozen after 60 "
        f"steps of gradient descent at {RATE}.",
        "The descent exponent converges as e^(−gap · time), and the gap to the second smallest eigenvalue is of the "
        "order 0.001: it stays low for thousands of steps.",
        f"SGD with batches of 25, {budget.sgd_steps} steps; λ_max is that of the whole training set at the end.",
    )
    facts = {
        "sgd_rates": list(budget.sgd_rates),
        "sharpness": sharpness,
        "losses": [{str(name): values[-1] for name, values in one.losses.items()} for one in races],
    }
    report(1.0, "done")
    figures = (_figure(races[0], budget.sgd_rates, sharpness),)
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, figures, notes, facts)


def data() -> tuple[Tensor, Tensor]:
    """The first 500 digits, and their classes as unit vectors."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels[:500] / 16, dtype=torch.float32)
    return x, nn.functional.one_hot(torch.tensor(labels[:500], dtype=torch.long), 10).float()


def network(seed: int) -> nn.Sequential:
    """The MLP."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Half the squared error, summed over classes."""
    return (prediction - target).square().sum(1).mean() / 2


# ---------------------------------------------------------------------------------- frozen weights


def quadratic_rows() -> list[Row]:
    """The training map of a quadratic: log |1 − η λ|, one exponent for each curvature."""
    curvature = torch.tensor([0.5, 3.0, 7.0], dtype=F64)
    system = TrainingSystem(
        lambda w, batch: (curvature * w.square()).sum() / 2, lambda t: None, SGD(lr=0.1), horizon=50
    )
    found = lyapunov_exponents(system, system.initial_state(torch.ones(3, dtype=F64)), warmup=30)
    exact = (1 - 0.1 * curvature).abs().log().sort(descending=True).values
    worst = float((found.exponents - exact).abs().max())
    return [
        Row(
            "gradient descent on a quadratic: exponents log |1 − η λ|",
            0.0,
            worst,
            1e-6,
            worst < 1e-6,
            "largest error",
        )
    ]


def frozen_rows(x: Tensor, y: Tensor, budget: Budget) -> list[Row]:
    """Exponents at fixed weights against the eigenvalues that Lanczos finds."""
    net = network(0).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    for _ in range(60):
        optimizer.zero_grad()
        loss(net(x), y).backward()
        optimizer.step()
    hessian = hessian_operator(net, loss, (x, y))
    top = float(top_eigenpairs(hessian, 1, which="largest algebraic", tol=1e-10).eigenvalues)
    low = float(
        top_eigenpairs(hessian, 1, which="smallest algebraic", tol=1e-4, max_products=400).eigenvalues
    )
    up = curvature_exponent(hessian, lr=RATE, steps=400)
    down = curvature_exponent(hessian, lr=RATE, steps=budget.descent_steps, direction="descent")
    exact = math.log1p(RATE * top) / RATE
    params = dict(net.named_parameters())

    def value(theta: Tensor) -> Tensor:
        pieces = theta.split([p.numel() for p in params.values()])
        named = {n: v.reshape(p.shape) for (n, p), v in zip(params.items(), pieces, strict=True)}
        return loss(torch.func.functional_call(net, named, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in params.values()])
    twin = curvature_exponent(twin_operator(torch.func.grad(value), flat), lr=RATE, steps=100)
    truth = math.log1p(-RATE * low) / RATE
    near = abs(down.exponent / truth - 1)
    return [
        Row(
            "ascent exponent = log(1 + η λ_max)/η (8.1411 at another start)",
            exact,
            up.exponent,
            None,
            abs(up.exponent - exact) < 1e-4,
            f"within 1e−4; λ_max = {top:.4f} by Lanczos, 8.8414 at that start",
        ),
        Row(
            "λ_max from it",
            top,
            up.curvature,
            None,
            abs(up.curvature / top - 1) < 1e-4,
            "within 1e−4, relative",
        ),
        Row(
            "λ_max by a twin of two gradients, 100 steps (2.5 % low at another start)",
            top,
            twin.curvature,
            None,
            abs(twin.curvature / top - 1) < 0.05,
            "within 5 %",
        ),
        Row(
            "descent exponent, minus the most negative curvature (0.1975 for 0.2002 at another start)",
            truth,
            down.exponent,
            down.residual,
            True if near <= DESCENT else None if down.residual > DESCENT * abs(low) else False,
            f"within {DESCENT:.0%} after {budget.descent_steps} steps, open while the error ‖Hv − ρv‖ is above that",
        ),
    ]


# ----------------------------------------------------------------------------------- SGD and rates


def sgd_sharpness(x: Tensor, y: Tensor, rate: float, steps: int) -> float:
    """λ_max after SGD at a constant rate; nan where it diverged."""
    net = network(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        part = torch.randint(0, len(x), (25,), generator=generator)
        optimizer.zero_grad()
        loss(net(x[part]), y[part]).backward()
        optimizer.step()
    if not all(bool(p.isfinite().all()) for p in net.parameters()):
        return math.nan
    return float(
        top_eigenpairs(hessian_operator(net, loss, (x, y)), 1, which="largest algebraic").eigenvalues
    )


def edge_rows(rates: tuple[float, ...], sharpness: list[float]) -> list[Row]:
    """Whether λ_max follows 1/η."""
    lost = [rate for rate, value in zip(rates, sharpness, strict=True) if math.isnan(value)]
    u = torch.tensor(rates, dtype=F64).log()
    v = torch.tensor(sharpness, dtype=F64).log()
    u, v = u[~v.isnan()], v[~v.isnan()]
    centred = u - u.mean()
    slope = float((centred * v).sum() / centred.square().sum())
    rest = v - v.mean() - slope * centred
    error = float((rest.square().sum() / max(len(u) - 2, 1) / centred.square().sum()).sqrt())
    products = (u + v).exp().tolist()
    note = f"within two errors of −1; η λ_max runs from {min(products):.2f} to {max(products):.2f}"
    if lost:
        note += f"; SGD diverges at {', '.join(f'{rate:g}' for rate in lost)}"
    return [
        Row(
            "after SGD the slope of log λ_max over log η",
            -1.0,
            slope,
            error,
            abs(slope + 1) <= max(2 * error, 1e-6),
            note,
        )
    ]


@dataclass(frozen=True)
class Race:
    """Losses of constant rates and of the rule, and the rates of the rule."""

    losses: dict[float | str, list[float]]
    rates: list[float]

    @property
    def ratio(self) -> float:
        """Last loss of the rule over that of the best constant rate."""
        return self.losses["rule"][-1] / min(v[-1] for name, v in self.losses.items() if name != "rule")


def race(x: Tensor, y: Tensor, seed: int, steps: int) -> Race:
    """Full-batch gradient descent with every constant rate, and with 1.9/λ_max by a twin."""
    net = network(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    twin = TwinCurvature(net.parameters())
    rates, seen = [], []
    for t in range(steps):
        optimizer.zero_grad()
        value = loss(net(x), y)
        value.backward()
        twin.update(lambda: loss(net(x), y), [p.grad for p in net.parameters()])
        rates.append(twin.rate(1.9))
        optimizer.param_groups[0]["lr"] = rates[-1]
        optimizer.step()
        if t % 10 == 0:
            seen.append(value.item())
    with torch.no_grad():
        seen.append(float(loss(net(x), y)))
    return Race(dict(zip(CONSTANT, constant_rates(x, y, seed, steps), strict=True)) | {"rule": seen}, rates)


def constant_rates(x: Tensor, y: Tensor, seed: int, steps: int) -> list[list[float]]:
    """Losses under all constant rates, trained side by side from one start."""
    eta = torch.tensor(CONSTANT)
    w1, b1, w2, b2 = (p.detach().expand(len(eta), *p.shape).clone() for p in network(seed).parameters())
    params = [p.requires_grad_() for p in (w1.mT, b1[:, None], w2.mT, b2[:, None])]

    def losses() -> Tensor:
        hidden = torch.tanh(x @ params[0] + params[1])
        return ((hidden @ params[2] + params[3]) - y).square().sum(-1).mean(-1) / 2

    seen = []
    for t in range(steps):
        values = losses()
        if t % 10 == 0:
            seen.append(values.tolist())
        gradients = torch.autograd.grad(values.sum(), params)
        with torch.no_grad():
            for p, g in zip(params, gradients, strict=True):
                p -= eta[:, None, None] * g
    with torch.no_grad():
        seen.append(losses().tolist())
    return [list(column) for column in zip(*seen, strict=True)]


def race_row(races: list[Race]) -> Row:
    """The rule beside the best constant rate."""
    ratios = torch.tensor([one.ratio for one in races], dtype=F64)
    error = float(ratios.std()) / math.sqrt(len(ratios)) if len(ratios) > 1 else None
    mean = float(ratios.mean())
    return Row(
        "η = 1.9/λ_max: last loss over that of the best constant rate",
        1.013,
        mean,
        error,
        mean <= 1.05,
        "at most 1.05, mean over random starts; the best of six rates is chosen afterwards for each start",
    )


def _figure(one: Race, rates: tuple[float, ...], sharpness: list[float]) -> Figure:
    return Figure(
        "The rule for the rate, and where SGD comes to rest",
        partial(_draw, one=one, rates=rates, sharpness=sharpness),
        caption=(
            "Left: loss under constant rates (grey, light to dark) and under 1.9/λ_max, which needs no search. Middle: "
            "the rates it chose, the constant ones shaded. Right: the sharpness after SGD at several rates, beside "
            "1/η and 2/η."
        ),
        alt="Loss over steps; learning rate over steps; sharpness against learning rate.",
        size=(9.2, 3.2),
        key="rate",
    )


def _draw(canvas: Any, one: Race, rates: tuple[float, ...], sharpness: list[float]) -> None:
    left, middle, right = canvas.subplots(1, 3)
    for name, values in one.losses.items():
        at = [10 * i for i in range(len(values))]
        if name == "rule":
            left.plot(at, values, color=role("first"), linewidth=2.0, label="1.9/λ_max")
        else:
            left.plot(at, values, color=role("muted"), linewidth=1.0, alpha=0.25 + 2 * float(name))
    left.set(xlabel="step", ylabel="loss")
    left.set_yscale("log")
    left.set_yticks((0.1, 0.2, 0.4), ("0.1", "0.2", "0.4"))
    left.set_yticks((), minor=True)
    left.legend(loc="upper right")
    middle.plot(one.rates, color=role("first"))
    middle.axhspan(CONSTANT[0], CONSTANT[-1], color=role("cool"), linewidth=0, zorder=0)
    middle.set(xlabel="step", ylabel="learning rate", ylim=(0, 1.3 * max(max(one.rates), CONSTANT[-1])))
    fine = torch.linspace(min(rates), max(rates), 50).numpy()
    right.plot(fine, 1 / fine, color=role("muted"), linestyle="--", label="1/η")
    right.plot(fine, 2 / fine, color=role("muted"), linestyle=":", label="2/η")
    right.plot(rates, sharpness, "o", color=role("second"), label="λ_max after SGD")
    right.set(xlabel="learning rate η", ylabel="sharpness")
    right.set(xscale="log", yscale="log")
    right.set_xticks(rates, [f"{rate:g}" for rate in rates])
    right.set_yticks((5, 10, 20), ("5", "10", "20"))
    for which in ("x", "y"):
        right.tick_params(axis=which, which="minor", length=0, labelbottom=False, labelleft=False)
    right.legend(loc="lower left")
