r"""Asynchronous SGD as a diffusion: stale gradients are momentum in the mean, and noise on the position.

    x_{k+1} = x_k − η g(x_{k−τ}),   P(τ = j) = (1 − μ)μʲ
    dX = Y dt + η^{3/4}(1−μ)^{−1/4} C^{1/2} dW,   dY = −∇f dt − √((1−μ)/η) Y dt,   t = k √(η(1−μ))

On quadratics the law of the method itself is known exactly, from a table of its second moments; on handwritten digits
many runs of a small network with stale gradients are set beside paths of the equation.

Reference: An, Lu & Ying (2018), arXiv:1805.08244.

Departures: the exact second moments, the network and the simulated check are ours; the control of the batch size that
the paper derives is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from bolza.core import simulate
from bolza.data import digits
from bolza.ops.batches import unflatten
from bolza.ops.factors import call_with
from bolza.report import Figure, role
from bolza.sde import ModifiedEquation, linear_law, modified_equation, stale_law, weak_errors
from bolza.sde.modified_equation import AN as REFERENCE
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "an2018_asynchronous"
TITLE = "Asynchronous SGD as a diffusion"
CLAIM = "SGD with gradients of geometric age follows, in law, a Langevin-type equation whose noise is on the position"

F64 = torch.float64
ONE = torch.eye(1, dtype=F64)
CASES = ((0.8, 0.05, 0.03125), (0.5, 0.05, 0.0275), (0.8, 0.02, 0.011))
BATCH, AGES = 4, 60


@dataclass(frozen=True)
class Budget:
    """Size of the simulations."""

    runs: int = 20_000
    steps: int = 300
    paths: int = 150
    samples: int = 60
    width: int = 4
    lr: float = 0.1
    momentum: float = 0.8
    time: float = 5.0


BUDGETS = {
    "small": Budget(),
    "full": Budget(runs=200_000, steps=600, paths=2000, width=8),
}


def bowl(x: Tensor) -> Tensor:
    """½ |x|²."""
    return 0.5 * x.square().sum(-1)


def ages(shape: tuple[int, ...], mu: float, generator: torch.Generator) -> Tensor:
    """Geometric delays, P(τ = j) = (1 − μ)μʲ, at most ``AGES``."""
    drawn = torch.rand(shape, generator=generator).clamp_min(1e-12).log() / math.log(mu)
    return drawn.floor().clamp_max(AGES).long()


def simulated_variance(mu: float, lr: float, budget: Budget, seed: int) -> tuple[float, float]:
    """Variance at rest of independent runs on ½x² with unit noise, and its standard error."""
    generator = torch.Generator().manual_seed(seed)
    ring = torch.zeros(AGES + 1, budget.runs)
    index = torch.arange(budget.runs)
    for k in range(budget.steps):
        stale = ring[(k - ages((budget.runs,), mu, generator)) % (AGES + 1), index]
        new = ring[k % (AGES + 1)] - lr * (stale + torch.randn(budget.runs, generator=generator))
        ring[(k + 1) % (AGES + 1)] = new
    variance = float(new.square().mean())
    return variance, variance * math.sqrt(2 / budget.runs)


def mean_difference() -> float:
    """Largest difference between the mean of stale gradients and averaged momentum, on a plane, over 60 steps."""
    A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
    lr, mu = 0.05, 0.8
    x = start = torch.tensor([1.0, -2.0], dtype=F64)
    m, worst = A @ start, 0.0
    for k in range(60):
        m = mu * m + (1 - mu) * (A @ x) if k else m
        x = x - lr * m
        if k % 10 == 9:
            law = stale_law(A, torch.eye(2), start, lr=lr, momentum=mu, steps=k + 1)
            worst = max(worst, float((law.mean - x).abs().max()))
    return worst


# ---------------------------------------------------------------------------------------- network


@dataclass(frozen=True)
class Race:
    """Mean losses along training, (times,), with their standard errors."""

    times: Tensor
    means: dict[str, Tensor]
    errors: dict[str, Tensor]

    def gap(self, kind: str) -> tuple[float, float]:
        """Mean difference from the stale runs over the course, as a share of the fall of the loss."""
        truth = self.means["stale runs"]
        fall = float(truth[0] - truth[-1])
        error = (self.errors[kind].square() + self.errors["stale runs"].square()).sqrt()
        return float((self.means[kind] - truth)[1:].mean()) / fall, float(error[1:].mean()) / fall


def stale_losses(
    net: nn.Module, data: tuple[Tensor, Tensor], sde: ModifiedEquation, budget: Budget, mode: str
) -> Tensor:
    """Losses (steps + 1, paths) of runs with stale gradients, averaged momentum, or plain SGD."""
    (x, y), mu, lr = data, budget.momentum, budget.lr
    names, like = [name for name, _ in net.named_parameters()], list(net.parameters())

    def loss(theta: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        values = dict(zip(names, unflatten(theta, like), strict=True))
        return F.cross_entropy(call_with(net, values, xs), ys)

    generator = torch.Generator().manual_seed(5)
    theta = sde.initial(paths=budget.paths)[:, 0]
    past, index = [theta] * (AGES + 1), torch.arange(budget.paths)
    assert sde.field is not None
    losses, average = [sde.field.value(theta)], sde.field.gradient(theta)
    for _ in range(round(budget.time / lr)):
        where = theta
        if mode == "stale":
            where = torch.stack(past)[ages((budget.paths,), mu, generator), index]
        where = where.clone().requires_grad_()
        drawn = torch.randint(len(x), (budget.paths, BATCH), generator=generator)
        (g,) = torch.autograd.grad(vmap(loss)(where, x[drawn], y[drawn]).sum(), where)
        if mode == "momentum":
            g = average = mu * average + (1 - mu) * g
        theta = theta - lr * g
        past = [theta, *past[:-1]]
        losses.append(sde.field.value(theta))
    return torch.stack(losses)


def race(budget: Budget) -> Race:
    """Stale runs, the equation, and two that leave the delay out."""
    data = digits()
    x, y = data.train_x[: budget.samples].flatten(1), data.train_y[: budget.samples]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(x.shape[1], budget.width), nn.Tanh(), nn.Linear(budget.width, 10))
    sde = modified_equation(
        net,
        F.cross_entropy,
        (x, y),
        lr=budget.lr,
        momentum=budget.momentum,
        method="asynchronous",
        batch_size=BATCH,
    )
    plain = modified_equation(net, F.cross_entropy, (x, y), lr=budget.lr, batch_size=BATCH)
    steps = round(budget.time / budget.lr)
    every = max(1, steps // 10)
    marks = torch.arange(0, steps + 1, every)
    means, errors = {}, {}

    def keep(kind: str, losses: Tensor) -> None:
        means[kind] = losses.mean(1)
        errors[kind] = losses.std(1) / math.sqrt(losses.shape[1])

    keep("stale runs", stale_losses(net, (x, y), sde, budget, "stale")[marks])
    keep("averaged momentum", stale_losses(net, (x, y), sde, budget, "momentum")[marks])
    for k, (kind, equation) in enumerate((("its equation", sde), ("equation without delay", plain))):
        states = simulate(
            equation,
            equation.initial(paths=budget.paths),
            dt=equation.time_step / 2,
            steps=2 * int(marks[-1]),
            scheme="heun",
            save_every=2 * every,
            generator=torch.Generator().manual_seed(20 + k),
        )
        keep(kind, equation.loss(states))
    return Race(marks, means, errors)


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Stale gradients on quadratics, exactly and simulated, and on a network.

    Args:
        scale: ``"small"``: 20,000 simulated runs on a line, 150 of a network; ``"full"``: 200,000 and 2000.
        progress: called with the share done and a few words.

    Returns:
        Rows on the mean, the variance at rest, the weak order and the network; one figure.

    Example:
        >>> from bolza.studies import get
        >>> get("an2018_asynchronous").title
        'Asynchronous SGD as a diffusion'
    """
    budget, report = BUDGETS[scale], progress or (lambda share, text: None)
    report(0.0, "quadratics")
    rows = [mean_row(), *rest_rows(budget), *order_rows()]
    report(0.5, "a network with stale gradients")
    found = race(budget)
    report(1.0, "done")
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        [*rows, *network_rows(found)],
        (_figure(found, budget),),
        notes=(
            f"Network: {budget.samples} digits, 64-{budget.width}-10, tanh, batches of {BATCH}, η = {budget.lr:g}, "
            f"μ = {budget.momentum:g}; {budget.paths} runs and as many paths; the equation by Heun's scheme with two "
            "steps an iteration. Bars are one standard error.",
            f"Delays are cut at {AGES} steps; before the start all gradients are those of the start.",
            "The equation leaves out that a gradient of random age varies by its age alone; the exact table does not.",
        ),
        facts={"gaps": {kind: found.gap(kind) for kind in found.means if kind != "stale runs"}},
    )


def mean_row() -> Row:
    """In the mean a geometric delay is averaged momentum."""
    worst = mean_difference()
    return Row(
        "mean of stale gradients less averaged momentum on a plane, largest difference",
        0.0,
        worst,
        2e-16,
        worst < 2e-15,
        "60 steps, to rounding",
    )


def rest_rows(budget: Budget) -> list[Row]:
    """Variance at rest: of the equation, of the method exactly, and simulated."""
    rows = []
    for k, (mu, lr, expected) in enumerate(CASES):
        sde = modified_equation(bowl, lr=lr, momentum=mu, method="asynchronous", noise=1.0)
        start = sde.initial(torch.zeros(1))
        law = linear_law(sde, start, 1e3).covariance[0, 0, 0, 0].item()
        exact = stale_law(ONE, ONE, torch.zeros(1), lr=lr, momentum=mu, steps=300).covariance.item()
        case = f"μ = {mu:g}, η = {lr:g}"
        rows.append(Row(f"variance at rest of the equation, {case}", expected, law, None, abs(law - expected) < 1e-9,
                        "ηΣ/2a + η²Σ/(2(1 − μ))"))  # fmt: skip
        found, error = simulated_variance(mu, lr, budget, k)
        rows.append(Row(f"variance of simulated runs against the exact table, {case}", exact, found, error,
                        abs(found - exact) < 3 * error, f"the equation is {law / exact - 1:+.1%} off"))  # fmt: skip
        if k == 0:
            # averaged momentum is heavy ball with the rate η(1 − μ)
            ball = modified_equation(bowl, lr=lr * (1 - mu), momentum=mu, noise=1.0)
            velocity = linear_law(ball, ball.initial(torch.zeros(1)), 1e4).covariance[0, 0, 0, 0].item()
            rows.append(Row("variance with the noise on the velocity, as momentum has it", lr / 2, velocity, None,
                            abs(velocity - lr / 2) < 1e-9, f"wrong here: the table says {exact:.5f}"))  # fmt: skip
    return rows


def order_rows() -> list[Row]:
    """Weak order of the equation."""
    A, C = torch.tensor([[2.0, 0.5], [0.5, 1.0]]), torch.tensor([[1.0, 0.3], [0.3, 0.5]])
    found = weak_errors(A, C, lrs=(0.05, 0.025, 0.0125), method="asynchronous", time=2.0)
    note = "step √(η(1−μ)), friction √((1−μ)/η) = 1 fixed; exact laws"
    return [
        Row(f"order of the error of {name}", 1.0, slope, None, abs(slope - 1) < 0.15, note)
        for name, slope in (("E x", found.mean_order), ("E xxᵀ", found.second_order))
    ]


def network_rows(found: Race) -> list[Row]:
    """Mean loss along training, against the runs with stale gradients."""
    (own, own_error), (plain, plain_error) = found.gap("its equation"), found.gap("equation without delay")
    ball, ball_error = found.gap("averaged momentum")
    gained, error = abs(plain) - abs(own), math.hypot(own_error, plain_error)
    return [
        Row(
            "network: the equation is nearer to stale runs than the one without delay, by a share of the fall",
            "> 0",
            gained,
            error,
            True if gained > 2 * error else False if gained < -2 * error else None,
            f"gaps {own:+.4f} and {plain:+.4f}; judged at two standard errors",
        ),
        Row(
            "network: averaged momentum, equal in the mean of the weights, has the lower mean loss (share of the fall)",
            "< 0",
            ball,
            ball_error,
            True if ball < -2 * ball_error else False if ball > 2 * ball_error else None,
            "the equations say so: its noise is on the velocity; judged at two standard errors",
        ),
    ]


# ----------------------------------------------------------------------------------------- figure

_COLOURS = {"its equation": "first", "averaged momentum": "second", "equation without delay": "muted"}


def _figure(found: Race, budget: Budget) -> Figure:
    return Figure(
        "Stale gradients and the diffusion that follows them",
        partial(_draw, found=found, budget=budget),
        caption="Left: variance at rest against the learning rate on ½x² with unit noise: the exact table of the "
        "method (dots), its equation, and what noise on the velocity would give. Middle: mean loss of a network. "
        "Right: its difference from the runs with stale gradients, with bands of two standard errors.",
        alt="Variance curves; falling loss curves; differences around zero.",
        size=(10.5, 3.5),
        key="stale",
    )


def _draw(canvas: Any, found: Race, budget: Budget) -> None:
    left, middle, right = canvas.subplots(1, 3)
    lrs = torch.linspace(0.02, 0.12, 6, dtype=F64)
    for mu, colour in ((0.8, "first"), (0.5, "second")):
        exact = [
            stale_law(
                ONE, ONE, torch.zeros(1), lr=float(lr), momentum=mu, steps=int(3 / lr)
            ).covariance.item()
            for lr in lrs
        ]
        left.plot(lrs, exact, "o", color=role(colour), ms=4)
        left.plot(lrs, lrs / 2 + lrs**2 / (2 * (1 - mu)), color=role(colour), label=f"equation, μ = {mu:g}")
    left.plot(lrs, lrs / 2, "--", color=role("muted"), label="noise on the velocity")
    left.set(xlabel="learning rate η", ylabel="variance at rest", title="quadratic, exact")
    left.legend(fontsize="small")
    truth, error = found.means["stale runs"], found.errors["stale runs"]
    middle.plot(found.times, truth, "o", color=role("ink"), ms=4, label="stale runs", zorder=3)
    for kind, colour in _COLOURS.items():
        middle.plot(found.times, found.means[kind], color=role(colour), label=kind, linewidth=1.3)
        apart = found.means[kind] - truth
        band = 2 * (found.errors[kind].square() + error.square()).sqrt()
        right.plot(found.times, apart, color=role(colour), linewidth=1.3)
        right.fill_between(
            found.times, apart - band, apart + band, color=role(colour), alpha=0.18, linewidth=0
        )
    right.axhline(0, color=role("ink"), linewidth=0.8)
    middle.set(
        xlabel="iteration", ylabel="mean loss", title=f"network, η = {budget.lr:g}, μ = {budget.momentum:g}"
    )
    right.set(xlabel="iteration", ylabel="mean loss less stale runs", title="difference")
    middle.legend(fontsize="small")
