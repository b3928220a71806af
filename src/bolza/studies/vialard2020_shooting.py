r"""Shooting: a trajectory of weights from the initial conditions of a few particles.

Weights that minimise their energy over depth obey Hamilton's equations, so the states and momenta of P particles at
depth 0 stand for the weights of all depths. Checked here: the energy ½|θ|² is conserved; without momentum nothing
moves; a cubic is fitted; and the comparison that the paper's accuracy has to bear, the same field with weights that
are constant in depth and trained directly, with the same loss, optimizer and number of gradients.

Reference: Vialard, Kwitt, Wei & Niethammer (2020), arXiv:2006.10330, §4 and §5.

Departures: rates decay along a cosine instead of on plateaus; at the small scale α = 16, fewer steps of training and of
the solver.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bolza.models.continuous import NeuralODE, ShootingNet
from bolza.models.continuous.shooting import VIALARD as REFERENCE
from bolza.report import Figure, log_axis, role
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "vialard2020_shooting"
TITLE = "Weights of all depths, shot from particles"
CLAIM = "The weights of a deep network can be parameterised by initial conditions of a few particles alone"


@dataclass(frozen=True)
class Budget:
    """Size of the experiment."""

    inflation: int = 16
    particles: int = 15
    seeds: int = 2
    iterations: int = 150
    steps: int = 5
    batch: int = 50
    circles: int = 0


BUDGETS = {"small": Budget(), "full": Budget(inflation=64, seeds=4, iterations=500, steps=10, circles=300)}


class StaticField(nn.Module):
    """The field of the shooting network, with weights that are parameters and constant in depth."""

    def __init__(self, width: int, inflation: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width * inflation, width), nn.Linear(width, width * inflation)

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Velocities of the pair."""
        return self.down(torch.tanh(x[1])), self.up(x[0])


class StaticNet(nn.Module):
    """A Neural ODE of the same form: linear lift, the field, the first half of the state."""

    def __init__(self, width: int, inflation: int, steps: int) -> None:
        super().__init__()
        self.lift = nn.Linear(width, width * inflation)
        self.body = NeuralODE(StaticField(width, inflation), steps=steps)

    def energy(self) -> Tensor:
        """½|θ|²."""
        return torch.stack([p.square().sum() for p in self.body.parameters()]).sum() / 2

    def forward(self, x: Tensor) -> Tensor:
        """Batch to batch."""
        return self.body((x, self.lift(x)))[0]


def make(kind: str, width: int, seed: int, budget: Budget) -> ShootingNet | StaticNet:
    """A network of one of the two kinds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "particles":
            return ShootingNet(
                width, width, inflation=budget.inflation, particles=budget.particles, steps=budget.steps
            )
        return StaticNet(width, budget.inflation, budget.steps)


def fit_cubic(kind: str, seed: int, budget: Budget) -> tuple[float, list[float], Tensor]:
    """Test error on x³ over [−1.5, 1.5] after 100 MSE + energy by Adam; the course; the fitted values."""
    net, draw = make(kind, 1, seed, budget), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.iterations)
    course = []
    for _ in range(budget.iterations):
        x = 3 * torch.rand(budget.batch, 1, generator=draw) - 1.5
        error = (net(x) - x**3).square().mean()
        optimizer.zero_grad()
        (100 * error + net.energy()).backward()
        optimizer.step()
        schedule.step()
        course.append(float(error.detach()))
    x = torch.linspace(-1.5, 1.5, 200)[:, None]
    with torch.no_grad():
        values = net(x)
    return float((values - x**3).square().mean()), course, values[:, 0]


def fit_circles(kind: str, seed: int, budget: Budget) -> float:
    """Share of 400 points on two concentric circles that are told apart after training."""
    draw = torch.Generator().manual_seed(seed)

    def points(n: int) -> tuple[Tensor, Tensor]:
        angle = 6.283185307 * torch.rand(n, generator=draw)
        label = torch.arange(n) % 2
        radius = 0.5 + label + 0.1 * torch.randn(n, generator=draw)
        return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), label

    net, head = make(kind, 2, seed, Budget(inflation=20, particles=20, steps=budget.steps)), nn.Linear(2, 2)
    optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], 5e-3)
    for _ in range(budget.circles):
        x, y = points(128)
        optimizer.zero_grad()
        (100 * nn.functional.cross_entropy(head(net(x)), y) + net.energy()).backward()
        optimizer.step()
    x, y = points(400)
    with torch.no_grad():
        return float((head(net(x)).argmax(1) == y).double().mean())


def drifts(counts: tuple[int, ...]) -> list[float]:
    """Largest relative drift of the energy along the flow, by number of RK4 steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ShootingNet(2, 2, inflation=8, particles=10).double()
    out = []
    with torch.no_grad():
        for n in counts:
            along = [float(torch.stack([p.square().sum() for p in w]).sum()) for w in net.weights_along(n)]
            out.append(max(abs(e / along[0] - 1) for e in along))
    return out


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Measure conservation, fit a cubic with particles and with static weights.

    Args:
        scale: ``"small"``: α = 16, 2 seeds of 150 iterations; ``"full"``: α = 64, 500 iterations, 4 seeds, and
            concentric circles.
        progress: called with the share done and a few words.

    Returns:
        Rows on conservation and accuracy, one figure.

    Example:
        >>> from bolza.studies import get
        >>> get("vialard2020_shooting").title
        'Weights of all depths, shot from particles'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "energy along the flow")
    counts = (10, 20, 40)
    drift = drifts(counts)
    net = make("particles", 2, 0, budget)
    assert isinstance(net, ShootingNet)
    nn.init.zeros_(net.flow.p)
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        still = float((net(x) - x).abs().max())
    fits: dict[str, list[tuple[float, list[float], Tensor]]] = {"particles": [], "static": []}
    jobs = 2 * budget.seeds * (2 if budget.circles else 1)
    for s in range(budget.seeds):
        for i, (kind, found) in enumerate(fits.items()):
            report((2 * s + i) / jobs, f"cubic, {kind}, seed {s}")
            found.append(fit_cubic(kind, s, budget))
    circles: dict[str, list[float]] = {"particles": [], "static": []}
    if budget.circles:
        for s in range(budget.seeds):
            for i, (kind, shares) in enumerate(circles.items()):
                report(0.5 + (2 * s + i) / jobs, f"circles, {kind}, seed {s}")
                shares.append(fit_circles(kind, s, budget))
    report(1.0, "done")
    sizes = {kind: sum(p.numel() for p in make(kind, 1, 0, budget).parameters()) for kind in fits}
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        rows(drift, still, fits, circles, sizes, budget),
        (_figure(counts, drift, fits),),
        notes=(
            f"Cubic on [−1.5, 1.5]: P = {budget.particles} particles, α = {budget.inflation}, {budget.iterations} "
            f"iterations of Adam at 0.01, loss 100 · MSE + ½|θ|², RK4 with {budget.steps} steps, {budget.seeds} seeds.",
            "The static network has the same lift, field, loss and number of gradients; the weights of its field are "
            "trained directly.",
        ),
        facts={
            "drift": drift,
            "test_mse": {kind: [mse for mse, _, _ in found] for kind, found in fits.items()},
            "parameters": sizes,
            "circles": circles,
        },
    )


def rows(
    drift: list[float],
    still: float,
    fits: dict[str, list[tuple[float, list[float], Tensor]]],
    circles: dict[str, list[float]],
    sizes: dict[str, int],
    budget: Budget,
) -> list[Row]:
    """The claims, judged."""
    worst = max(mse for mse, _, _ in fits["particles"])
    mine = torch.tensor([mse for mse, _, _ in fits["particles"]]).log()
    other = torch.tensor([mse for mse, _, _ in fits["static"]]).log()
    ratio = float((mine.mean() - other.mean()).exp())
    n = len(mine)
    error = ratio * float((mine.var() / n + other.var() / n).sqrt()) if n > 1 else None
    out = [
        Row("relative drift of the energy in 10 RK4 steps", "below 1e-6", drift[0], None, drift[0] < 1e-6),
        Row(
            "fall of the drift when the step is halved",
            16.0,
            drift[0] / drift[1],
            None,
            12 < drift[0] / drift[1] < 20,
            "fourth order; between 12 and 20",
        ),
        Row("without momentum the flow moves points by", 0.0, still, None, still == 0.0),
        Row(
            "a cubic is fitted: worst test error over seeds",
            "below 5e-3",
            worst,
            None,
            worst < 5e-3 if budget.inflation >= 64 else (True if worst < 5e-3 else None),
            "of a function of mean square 1.6; a miss is open below α = 64, where the fit is known to be unreliable",
        ),
        Row(
            "test error with particles over that with static weights, same loss and gradients",
            "1 or less, if particles are to pay off",
            ratio,
            error,
            None if error and abs(ratio - 1) < 2 * error else ratio <= 1,
            f"geometric means {float(mine.mean().exp()):.2g} and {float(other.mean().exp()):.2g}; "
            f"{sizes['particles']} and {sizes['static']} parameters",
        ),
    ]
    if circles["particles"]:
        good = sum(share > 0.99 for share in circles["particles"]) / len(circles["particles"])
        out.append(
            Row(
                "concentric circles, α = 20: share of starts that tell them apart",
                0.9,
                good,
                (0.1 * 0.9 / len(circles["particles"])) ** 0.5,
                good >= 0.75,
                f"more than 99 % of new points; static weights "
                f"{sum(share > 0.99 for share in circles['static']) / len(circles['static']):.2f}",
            )
        )
    return out


def _figure(
    counts: tuple[int, ...], drift: list[float], fits: dict[str, list[tuple[float, list[float], Tensor]]]
) -> Figure:
    return Figure(
        "Particles carry the weights",
        partial(_draw, counts=counts, drift=drift, fits=fits),
        caption="Left: drift of the conserved energy against the number of steps, with slope −4. Middle: error on "
        "batches during training, each seed. Right: the cubic and what the first seed of each kind fits.",
        alt="Drift of energy, courses of training, and fitted curves of a cubic.",
        size=(9.6, 3.6),
        key="particles",
    )


def _draw(canvas: Any, counts: Any, drift: Any, fits: Any) -> None:
    left, middle, right = canvas.subplots(1, 3)
    left.plot(counts, drift, "o", color=role("first"))
    left.plot(
        counts,
        [drift[-1] * (counts[-1] / n) ** 4 for n in counts],
        "--",
        color=role("muted"),
        label="slope −4",
    )
    left.set_xscale("log", base=2)
    left.set_xticks(counts, [str(n) for n in counts])
    left.set(xlabel="RK4 steps", ylabel="relative drift of ½|θ|²")
    left.legend()
    x = torch.linspace(-1.5, 1.5, 200)
    right.plot(x, x**3, "--", color=role("muted"), label="$x^3$")
    for (kind, found), colour in zip(fits.items(), ("first", "second"), strict=True):
        for k, (_, course, _) in enumerate(found):
            name = {"label": kind} if k == 0 else {}
            middle.plot(course, color=role(colour), alpha=0.7, linewidth=0.9, **name)
        right.plot(x, found[0][2], color=role(colour), label=kind)
    middle.set(xlabel="iteration", ylabel="mean square error")
    right.set(xlabel="$x$")
    for axes in (middle, right):
        axes.legend()
    for axes in (left, middle):
        log_axis(axes, "y")
