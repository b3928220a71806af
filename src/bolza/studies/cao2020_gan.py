r"""The training of two players as a stochastic equation: growth, noise floor, and a small adversarial network.

    dz = (b − (η/2)(Db)b [+ η L b]) dt + √η Σ^{1/2} dW,      E⟨z, b⟩ = −(η/2) tr Σ

The paper approximates the training of generative adversarial networks, with simultaneous and with alternating updates,
by coupled equations with error bounds, and describes the long run by their invariant measures and a
fluctuation–dissipation relation. Everything is exact for linear games. For a network with noise-free gradients the same
linearisation predicts the rate at which training turns unstable, which is then tried.

Reference: Cao & Guo (2020), *SDE approximations of GANs training and its long-run behavior*.

Departures. The paper has theory only; games and numbers are ours. The network: a generator 2-8-2 with tanh against a
critic of 16 random features with a trained read-out, weight decay on both, 64 points on a ring of eight spots. With
that decay the generator stays near a line: what is tried is the training, not the fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bolza.report import Figure, role
from bolza.sde.game_stability import game_stability
from bolza.sde.games import CAO, Game, game_sde, game_step, linear_game
from bolza.sde.players import network_game
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "cao2020_gan"
TITLE = "Two players in training as a stochastic equation"
CLAIM = (
    "Coupled stochastic equations describe adversarial training: what simultaneous updates add, where the noise floor "
    "lies, and when training diverges"
)
REFERENCE = CAO

F64 = torch.float64
ETA, SIGMA = 0.1, 0.09
BILINEAR = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)
REGULARISED = torch.tensor([[-0.5, -1.0], [1.0, -0.8]], dtype=F64)
DECAY = (0.05, 0.6)  # of the generator and of the critic
FACTORS = (0.5, 3.0, 4.0)  # learning rates, in units of the predicted limit


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    paths: int
    steps: int
    points: int
    starts: tuple[int, ...]


BUDGETS = {
    "small": Budget(paths=4000, steps=200, points=64, starts=(1,)),
    "full": Budget(paths=40_000, steps=600, points=64, starts=(1, 2, 3, 4, 5)),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Solve linear games exactly, then predict and try the stability of a network.

    Args:
        scale: ``"small"``: some seconds on one core; ``"full"``: five networks, more paths and steps.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("cao2020_gan").reference.arxiv
        '2006.02047'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "linear games")
    rows = [*bilinear_rows(), *regularised_rows(), order_row(), floor_row(budget.paths)]
    trials = []
    for i, start in enumerate(budget.starts):
        report(0.2 + 0.8 * i / len(budget.starts), f"network {start}")
        found = try_network(start, budget.points, budget.steps)
        trials += [] if found is None else [found]
    rows += network_rows(trials)
    notes = (
        "Orders count over a fixed time as η → 0; at stationarity order 2 is not better by an order of η.",
        "The network's equilibrium is that of its best generator against the best critic, sharpened by Newton's "
        "method; its gradients use all points. Deviations start at 1e−8 and count to 1e−4.",
        f"{len(trials)} of {len(budget.starts)} networks have an equilibrium that is stable at small rates; the others "
        "are left out.",
        f"Rates tried: {', '.join(f'{f:g}' for f in FACTORS)} times the predicted limit of simultaneous updates.",
    )
    facts = {name: [getattr(one, name) for one in trials] for name in ("limit", "predicted", "measured")}
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(trials[0]),), notes, facts)


# ------------------------------------------------------------------------------------------ linear games


def linear(matrix: Tensor) -> Game:
    """The game b(z) = M z with one parameter a player."""
    return Game(lambda z: z @ matrix.T, 1, noise=SIGMA)


def bilinear_rows() -> list[Row]:
    """The game f = θω: outwards when both move at once, on a closed orbit when they take turns."""
    z = torch.tensor([0.6, -0.8], dtype=F64)
    growth = float(game_step(linear(BILINEAR), z, ETA).square().sum() / z.square().sum())
    turns = max(
        abs(linear_game(BILINEAR, 0.0, lr=eta, split=1, mode="alternating").radius - 1)
        for eta in (0.1, 1.0, 1.9)
    )
    beyond = linear_game(BILINEAR, 0.0, lr=2.1, split=1, mode="alternating").radius
    drift = game_sde(linear(BILINEAR), lr=ETA, order=2).drift(0.0, z)
    rate = float(2 * (z * drift).sum() / z.square().sum())
    return [
        Row(
            "f = θω, simultaneous: |z|² grows by 1 + η² a step",
            1 + ETA**2,
            growth,
            None,
            abs(growth - 1 - ETA**2) < 1e-12,
            f"η = {ETA}",
        ),
        Row(
            "f = θω, alternating: |eigenvalue| is 1 for η < 2",
            0.0,
            turns,
            1e-7,
            turns < 1e-7 and beyond > 1,
            f"largest distance from 1 at η = 0.1, 1, 1.9; {beyond:.3f} at η = 2.1",
        ),
        Row(
            "equation of order 2: |z|² grows at the rate η",
            ETA,
            rate,
            None,
            abs(rate - ETA) < 1e-12,
            "order 1 keeps it constant",
        ),
    ]


def regularised_rows() -> list[Row]:
    """A damped game: the invariant measure, the relation, and one alternating step."""
    found = linear_game(REGULARISED, SIGMA, lr=ETA, split=1)
    laws = {
        "the steps": (found.covariance, (0.008364, 0.007403)),
        "the equation of order 1": (found.sde_covariance[1], (0.007516, 0.006552)),
        "the equation of order 2": (found.sde_covariance[2], (0.007836, 0.006875)),
    }
    rows = []
    for name, (covariance, expected) in laws.items():
        assert covariance is not None
        values = covariance.diagonal().tolist()
        rows.append(
            Row(
                f"stationary variances of {name}",
                f"{expected[0]:.6f}, {expected[1]:.6f}",
                f"{values[0]:.6f}, {values[1]:.6f}",
                None,
                all(abs(a - b) < 1e-6 for a, b in zip(values, expected, strict=True)),
                "b = (−0.5 θ − ω, θ − 0.8 ω), Σ = 0.09, η = 0.1",
            )
        )
    first = found.sde_covariance[1]
    assert first is not None
    work, heat = float((REGULARISED @ first).trace()), -ETA / 2 * 2 * SIGMA
    rows.append(
        Row(
            "E⟨z, b⟩ = −(η/2) tr Σ at order 1",
            heat,
            work,
            None,
            abs(work - heat) < 1e-12,
            "−0.0090 both sides",
        )
    )
    exact, other = found.relation
    rows.append(
        Row(
            "E⟨z, b⟩ = −(η/2) E|b + noise|² for the steps",
            other,
            exact,
            None,
            abs(exact - other) < 1e-12,
            "exact at any η",
        )
    )
    alternating = linear_game(REGULARISED, SIGMA, lr=ETA, split=1, mode="alternating").step
    equation = game_sde(linear(REGULARISED), lr=ETA, order=2, mode="alternating")
    drift = equation.drift(0.0, torch.eye(2, dtype=F64)).T
    gap = float((alternating - torch.linalg.matrix_exp(ETA * drift)).norm())
    plain = float((alternating - torch.linalg.matrix_exp(ETA * REGULARISED)).norm())
    rows.append(
        Row(
            "one alternating step is the flow of the equation of order 2",
            0.0,
            gap,
            None,
            gap < 1e-3,
            f"‖J − exp(ηB)‖, below 1e−3; {plain:.4f} at order 1",
        )
    )
    return rows


def order_slopes(mode: Any) -> dict[int, float]:
    """Weak order of both equations in the second moments over a unit of time, by exact propagation."""
    z0 = torch.tensor([1.0, -0.5], dtype=F64)
    slopes = {}
    for order in (1, 2):
        errors = []
        for eta in (0.05, 0.025):
            count = round(1 / eta)
            game = linear(REGULARISED)
            exact = linear_game(REGULARISED, SIGMA, lr=eta, split=1, mode=mode)
            equation = game_sde(game, lr=eta, order=order, mode=mode)
            eye = torch.eye(2, dtype=F64)
            drift = equation.drift(0.0, eye).T.contiguous()
            factor = equation.factor(0.0, eye, eye).T
            steps = torch.outer(z0, z0)
            for _ in range(count):
                steps = exact.step @ steps @ exact.step.T + exact.noise
            # ṡ = B s + s Bᵀ + F Fᵀ: one exponential of the operator on 2 × 2 matrices
            lifted = torch.zeros(5, 5, dtype=F64)
            lifted[:4, :4] = torch.kron(drift, eye) + torch.kron(eye, drift)
            lifted[:4, 4] = (factor @ factor.T).reshape(-1)
            start = torch.cat([torch.outer(z0, z0).reshape(-1), torch.ones(1, dtype=F64)])
            flow = (torch.linalg.matrix_exp(lifted) @ start)[:4].reshape(2, 2)
            errors.append(float((steps - flow).abs().max()))
        slopes[order] = math.log2(errors[0] / errors[1])
    return slopes


def order_row() -> Row:
    """Weak orders of both equations under both orders of play."""
    found = [order_slopes(mode) for mode in ("simultaneous", "alternating")]
    told = "; ".join(f"{one[1]:.2f}, {one[2]:.2f}" for one in found)
    worst = max(abs(one[order] - order) for one in found for order in (1, 2))
    return Row(
        "weak orders 1 and 2 over a fixed time, simultaneous and alternating",
        "1, 2; 1, 2",
        told,
        None,
        worst < 0.15,
        "slopes of the error of E z zᵀ from η = 0.05 to 0.025, within 0.15, no random numbers",
    )


def floor_row(paths: int) -> Row:
    """The noise floor of many simulated runs."""
    generator = torch.Generator().manual_seed(0)
    game, z = linear(REGULARISED), torch.zeros(paths, 2, dtype=F64)
    for _ in range(150):
        noise = math.sqrt(SIGMA) * torch.randn(paths, 2, generator=generator, dtype=F64)
        z = game_step(game, z, ETA, noise=noise)
    exact = linear_game(REGULARISED, SIGMA, lr=ETA, split=1).covariance
    assert exact is not None
    wanted = float(exact.trace())
    squares = z.square().sum(1)
    error = float(squares.std()) / math.sqrt(paths)
    measured = float(squares.mean())
    return Row(
        "noise floor E|z|² of simulated runs",
        wanted,
        measured,
        error,
        abs(measured - wanted) < 3.5 * error,
        f"{paths} runs of 150 steps, within 3.5 errors",
    )


# ------------------------------------------------------------------------------------------ a network


@dataclass(frozen=True)
class Trial:
    """Prediction and measurement around the equilibrium of one network.

    Growths are factors a step, by order of play, one for each of ``FACTORS``.
    """

    limit: float
    period: float
    predicted: dict[str, list[float]]
    measured: dict[str, list[float]]
    distances: dict[str, Tensor]
    real: Tensor
    made: Tensor


def ring(count: int) -> tuple[Tensor, Tensor]:
    """Points at eight spots on a circle, and latents."""
    generator = torch.Generator().manual_seed(0)
    angle = 2 * math.pi * (torch.arange(count) % 8) / 8
    spots = torch.stack([angle.cos(), angle.sin()], 1).to(F64)
    return (
        spots + 0.05 * torch.randn(count, 2, generator=generator, dtype=F64),
        torch.randn(count, 2, generator=generator, dtype=F64),
    )


def equilibrium(start: int, points: int) -> tuple[Game, Tensor, nn.Module, Tensor, Tensor]:
    """A generator and a critic where neither gains by a small move."""
    real, latents = ring(points)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(start)
        generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        first = nn.Linear(2, 16)
        nn.init.normal_(first.weight, 0.0, 1.5)
        nn.init.normal_(first.bias)
        features = nn.Sequential(first, nn.Tanh()).double()
        critic = nn.Sequential(features, nn.Linear(16, 1, bias=False).double())
    features.requires_grad_(False)
    losses = (
        lambda G, D, s, x: -D(G(s)).mean(),
        lambda G, D, s, x: D(G(s)).mean() - D(x).mean(),
    )
    players = network_game(generator, critic, losses, (latents, real))
    n = players.split
    decay = torch.cat([torch.full((n,), DECAY[0]), torch.full((16,), DECAY[1])]).to(F64)
    game = Game(lambda z: players.field(z) - decay * z, n)

    # against its best critic the generator descends ‖gap of mean features‖²/(2ρ); there both are at rest
    params = list(generator.parameters())
    solver = torch.optim.LBFGS(
        params, max_iter=1000, history_size=50, line_search_fn="strong_wolfe", tolerance_grad=1e-8
    )

    def closure() -> Tensor:
        solver.zero_grad()
        gap = features(real).mean(0) - features(generator(latents)).mean(0)
        value = (
            gap @ gap / (2 * DECAY[1]) + DECAY[0] / 2 * torch.stack([p.square().sum() for p in params]).sum()
        )
        value.backward()
        return value

    solver.step(closure)
    with torch.no_grad():
        gap = features(real).mean(0) - features(generator(latents)).mean(0)
    z = torch.cat([*(p.detach().reshape(-1) for p in params), gap / DECAY[1]])
    for _ in range(2):
        z = z - torch.linalg.solve(torch.func.jacrev(game.field)(z), game.field(z))
    players.load(z)
    return game, z, generator, real, latents


def try_network(start: int, points: int, steps: int) -> Trial | None:
    """Find the limit, then let small deviations go at several rates under both orders of play.

    None where the equilibrium is unstable at every rate, so that there is no limit.
    """
    game, z, generator, real, latents = equilibrium(start, points)
    values = torch.linalg.eigvals(torch.func.jacrev(game.field)(z))
    limits = -2 * values.real / values.abs().square()
    limit = float(limits.min())
    if limit <= 0:
        return None
    rates = limit * torch.tensor(FACTORS, dtype=F64)
    predicted, measured, distances, periods = {}, {}, {}, {}
    first = torch.randn(z.numel(), generator=torch.Generator().manual_seed(0), dtype=F64)
    modes: tuple[Any, ...] = ("simultaneous", "alternating")
    for mode in modes:
        found = [game_stability(game, z, lr=float(rate), mode=mode) for rate in rates]
        predicted[mode], periods[mode] = [one.radius for one in found], found[1].period
        moved = z + 1e-8 * first / first.norm() * torch.ones(len(FACTORS), 1, dtype=F64)
        seen = [torch.full((len(FACTORS),), 1e-8, dtype=F64)]
        for _ in range(steps):
            moved = game_step(game, moved, rates[:, None], mode)  # type: ignore[arg-type]
            seen.append((moved - z).norm(dim=1))
        distances[mode] = torch.stack(seen)
        measured[mode] = [growth(column) for column in distances[mode].T]
    with torch.no_grad():
        made = generator(latents)
    return Trial(limit, periods[modes[0]], predicted, measured, distances, real, made)


def growth(distances: Tensor) -> float:
    """Factor a step, over the later half of the steps at which the deviation is still small."""
    small = distances[: int((distances.cummax(0).values <= 1e-4).sum())]
    late = small[len(small) // 2 :].log()
    time = torch.arange(len(late), dtype=F64)
    time = time - time.mean()
    return math.exp(float((time * late).sum() / time.square().sum()))


def network_rows(trials: list[Trial]) -> list[Row]:
    """Prediction against measurement."""
    worst = max(
        abs(math.log(m) / math.log(p) - 1)
        for one in trials
        for p, m in zip(one.predicted["simultaneous"][1:], one.measured["simultaneous"][1:], strict=True)
    )
    below = all(
        one.predicted["simultaneous"][0] < 1 and one.measured["simultaneous"][0] < 1 for one in trials
    )
    verdicts = [
        (p > 1) == (m > 1)
        for one in trials
        for p, m in zip(one.predicted["alternating"], one.measured["alternating"], strict=True)
    ]
    first = trials[0]
    told = ", ".join(
        f"{p:.4f} and {m:.4f}"
        for p, m in zip(*(d["simultaneous"][1:] for d in (first.predicted, first.measured)), strict=True)
    )
    calm = ", ".join(f"{m:.4f}" for m in first.measured["alternating"])
    return [
        Row(
            "network: predicted growth rate a step is the measured one, above the limit",
            0.0,
            worst,
            None,
            worst < 0.05,
            f"largest relative error, within 5 %; factors predicted and measured {told}; one turn takes "
            f"{first.period:.0f} steps",
        ),
        Row(
            "network: below the limit deviations die out",
            "yes",
            "yes" if below else "no",
            None,
            below,
            f"half the limit, which is {', '.join(f'{one.limit:.4f}' for one in trials)}",
        ),
        Row(
            "network: alternating updates stay or diverge as predicted",
            f"{len(verdicts)} of {len(verdicts)}",
            f"{sum(verdicts)} of {len(verdicts)}",
            None,
            all(verdicts),
            f"factors a step {calm} at rates up to {FACTORS[-1]:g} times the limit of simultaneous updates",
        ),
    ]


def _figure(one: Trial) -> Figure:
    return Figure(
        "Both at once, or in turns",
        partial(_draw, one=one),
        caption=(
            "Left: f = θω from the same start, 60 steps with η = 0.1; both at once spirals outwards as its equation of "
            "order 2 (dashed) says, in turns it circles. Middle: distance of the network from its equilibrium; dashed: "
            "the predicted growth. Right: the points, and the line that the generator makes, held back by its decay."
        ),
        alt="Orbits of a bilinear game; distances from equilibrium over steps; points on a ring.",
        size=(9.6, 3.3),
        key="play",
    )


def _draw(canvas: Any, one: Trial) -> None:
    left, middle, right = canvas.subplots(1, 3)
    game, count = linear(BILINEAR), 60
    modes: tuple[tuple[Any, str, str], ...] = (
        ("simultaneous", role("first"), "both at once"),
        ("alternating", role("second"), "in turns"),
    )
    for mode, colour, text in modes:
        z = [torch.tensor([1.0, 0.0], dtype=F64)]
        for _ in range(count):
            z.append(game_step(game, z[-1], ETA, mode))
        at = torch.stack(z)
        left.plot(at[:, 0], at[:, 1], ".", markersize=3, color=colour, label=text)
        drift = game_sde(game, lr=ETA, order=2, mode=mode).drift(0.0, torch.eye(2, dtype=F64)).T
        times = torch.linspace(0, count * ETA, 200, dtype=F64)
        flow = torch.linalg.matrix_exp(times[:, None, None] * drift) @ z[0]
        left.plot(flow[:, 0], flow[:, 1], "--", color=colour, linewidth=0.8)
    left.set(xlabel="θ", ylabel="ω", aspect="equal", xlim=(-1.6, 1.6), ylim=(-1.6, 2.0))
    left.legend(loc="upper right")
    for mode, colour, text in modes:
        for i, style in ((0, ":"), (1, "-")):
            values = one.distances[mode][:, i]
            label = f"{text}, {FACTORS[i]:g} η*"
            middle.plot(range(len(values)), values, linestyle=style, color=colour, linewidth=1.2, label=label)
    values = one.distances["simultaneous"][:, 1]
    half = len(values) // 2
    line = float(values[-1]) * one.predicted["simultaneous"][1] ** (
        torch.arange(half, len(values)) - len(values) + 1.0
    )
    middle.plot(range(half, len(values)), 1.6 * line, "--", color=role("muted"), label="predicted slope")
    middle.set_yscale("log")
    middle.set(xlabel="step", ylabel="distance from equilibrium")
    middle.legend(loc="upper left", fontsize=7)
    right.plot(one.real[:, 0], one.real[:, 1], "o", markersize=3, color=role("muted"), label="points")
    right.plot(one.made[:, 0], one.made[:, 1], "o", markersize=3, color=role("first"), label="generated")
    right.set(xlabel="x", ylabel="y", aspect="equal", xlim=(-1.6, 1.6), ylim=(-1.6, 2.0))
    right.legend(loc="upper right")
