r"""A population that copies and mutates its best members, against random search with the same gradients.

    θ ← θ + s N(0, σ²),   η ← η 2^{N(0, (γ s)²)},   s = 1 − 2/(2 + validation loss of the parent)

An MLP on digits with 300 samples to learn from and 300 to select on; learning rates and weight decays drawn over many
decades. The population is set against random searches of 5, 10 and 25 members that spend as many gradients, and then
once more where the prior is good already.

Reference: Pomalapally, El Mabsout & Mancuso (2023), arXiv:2310.14671.

Departures: digits and a small MLP in place of Fashion-MNIST and CIFAR; the loss is told on a third part that selection
never sees; the mutated learning rate is that of the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bolza.controllers import LogPrior, PopDescent, PopulationRun
from bolza.controllers.population import REFERENCE
from bolza.data import Dataset
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "pomalapally2023_population"
TITLE = "Population descent"
CLAIM = (
    "A population that replaces its worst members by mutated copies of good ones beats search at equal cost"
)

BROAD = {"lr": LogPrior(-4, 2), "weight_decay": LogPrior(-3.5, 2)}
GOOD = {"lr": LogPrior(-2, 1), "weight_decay": LogPrior(-3.5, 2)}
SEARCHES = (5, 10, 25)
BOUND = 0.85
LEARN, SELECT = 300, 300
ADAM_STEPS = 200


@dataclass(frozen=True)
class Budget:
    """Size of the runs: gradients of a search are 5 · rounds · steps."""

    seeds: int
    rounds: int
    steps: int

    @property
    def gradients(self) -> int:
        """Gradients of one search, all members together."""
        return 5 * self.rounds * self.steps


BUDGETS = {"small": Budget(seeds=3, rounds=15, steps=12), "full": Budget(seeds=8, rounds=40, steps=30)}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Let populations and random searches spend the same number of gradients.

    Args:
        scale: ``"small"``: some ten seconds on a quiet core, 900 gradients a search and three seeds; ``"full"``:
            6000 gradients a search, eight seeds, both priors and both scales of mutation.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("pomalapally2023_population").reference.year
        2023
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    plan: list[tuple[str, dict[str, LogPrior], dict[str, Any]]] = [("population", BROAD, {})]
    plan += [(f"search of {n}", BROAD, {"members": n}) for n in SEARCHES]
    if scale == "full":
        plan += [("population, gentle", BROAD, {"mutation": 3.0}), ("population, good prior", GOOD, {})]
        plan += [(f"search of {n}, good prior", GOOD, {"members": n}) for n in SEARCHES]
    found: dict[str, list[PopulationRun]] = {}
    for i, (name, prior, settings) in enumerate(plan):
        report(0.95 * i / len(plan), name)
        found[name] = [search(budget, seed, prior, **settings) for seed in range(budget.seeds)]
    blind = blindness()
    rows = comparison_rows(found) + lineage_rows(found["population"]) + blind_rows(blind)
    if scale == "full":
        rows += [*gentle_rows(found), *good_rows(found)]
    notes = (
        f"Digits: {LEARN} samples to learn from, {SELECT} to select on, the rest to tell the loss; MLP 64-64-10, SGD "
        f"with momentum 0.9, batches of 32, {budget.gradients} gradients a search, {budget.seeds} seeds. Learning "
        "rates from 10^N(−4, 2²), weight decays from 10^N(−3.5, 2²).",
        "A search of n members gives each of them an n-th of the gradients; its result is the member with the lowest "
        "validation loss. The ratio is against the best of the three sizes in the mean over seeds, which favours the "
        "search: its size was chosen with hindsight.",
    )
    losses = {name: [one.test_loss for one in runs] for name, runs in found.items()}
    report(1.0, "done")
    return StudyResult(
        KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(found, budget),), notes,
        {"test_loss": losses, "blind": blind, "schedule": found["population"][0].schedule("lr")},
    )  # fmt: skip


def mlp() -> nn.Module:
    """The network."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def heavy_ball(params: Any) -> torch.optim.Optimizer:
    """The optimizer of every member."""
    return torch.optim.SGD(params, lr=0.01, momentum=0.9, fused=True)


def parts(seed: int) -> tuple[Dataset, tuple[Tensor, Tensor]]:
    """Samples to learn from and to tell the loss, and those to select on; another split for every seed."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels, dtype=torch.long)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    learn, select, rest = order.split([LEARN, SELECT, len(y) - LEARN - SELECT])
    return Dataset(x[learn], y[learn], x[rest], y[rest], num_classes=10), (x[select], y[select])


def search(
    budget: Budget,
    seed: int,
    prior: dict[str, LogPrior],
    members: int | None = None,
    mutation: float = 15.0,
) -> PopulationRun:
    """A population of five, or a random search of so many members, with the same number of gradients."""
    data, held = parts(seed)
    shape: dict[str, Any] = {"rounds": budget.rounds, "steps": budget.steps, "members": 5, "replaced": 2}
    if members is not None:
        each = budget.gradients // members
        rounds = max(1, min(budget.rounds, each // 10))  # only looked at; nothing is replaced
        shape = {"rounds": rounds, "steps": each // rounds, "members": members, "replaced": 0}
    return PopDescent(
        mlp, data, hyper=prior, optimizer=heavy_ball, batch_size=32, mutation=mutation, validation=held, seed=seed,
        **shape,
    ).run()  # fmt: skip


def blindness() -> dict[str, float]:
    """Training loss after some steps of Adam on the loss times a factor: what the released program mutates."""
    data, _ = parts(0)
    found = {}
    for factor in (1.0, 100.0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for k in range(ADAM_STEPS):
            at = torch.arange(32 * k, 32 * k + 32) % LEARN
            optimizer.zero_grad()
            (factor * nn.functional.cross_entropy(model(data.train_x[at]), data.train_y[at])).backward()
            optimizer.step()
        with torch.no_grad():
            found[f"{factor:g}"] = float(nn.functional.cross_entropy(model(data.train_x), data.train_y))
    return found


# -------------------------------------------------------------------------------------------- the rows


def _losses(runs: Sequence[PopulationRun]) -> list[float]:
    return [run.test_loss for run in runs]


def ratio(found: dict[str, list[PopulationRun]], ours: str, suffix: str) -> tuple[float, float, str]:
    """Mean test loss over that of the best search, its standard error over seeds, and which search it was."""
    names = [f"search of {n}{suffix}" for n in SEARCHES]
    best = min(names, key=lambda name: mean_error(_losses(found[name]))[0])
    a, b = torch.tensor(_losses(found[ours])), torch.tensor(_losses(found[best]))
    value = float(a.mean() / b.mean())
    deviations = (a - value * b) / b.mean()  # seeds share their data: errors of a ratio of paired means
    error = float(deviations.std() / math.sqrt(len(a))) if len(a) > 1 else math.nan
    return value, error, best


def comparison_rows(found: dict[str, list[PopulationRun]]) -> list[Row]:
    """The ratio that decides, with the losses behind it."""
    value, error, best = ratio(found, "population", "")
    means = "; ".join(
        "{}: {:.3f} ± {:.3f}".format(name, *mean_error(_losses(found[name])))
        for name in ("population", *(f"search of {n}" for n in SEARCHES))
    )
    claim = "test loss of the population over that of the best random search"
    note = f"against the {best}; bound fixed beforehand. {means}"
    return [Row(claim, f"≤ {BOUND:g}", value, error, value <= BOUND, note)]


def lineage_rows(runs: Sequence[PopulationRun]) -> list[Row]:
    """Where the learning rate ends, and that mutation dies out."""
    rates = torch.tensor([run.schedule("lr")[-1] for run in runs]).log10()
    spread = float(rates.std()) if len(runs) > 1 else math.nan
    early, late = (mutation(runs, part) for part in (0, 1))
    changes = [
        sum(a != b for a, b in zip(one, one[1:], strict=False)) for one in (r.schedule("lr") for r in runs)
    ]
    return [
        Row("learning rate of the winner at the end: spread over seeds in decades", "below the prior's 2", spread,
            None, spread < 1 if len(runs) > 1 else None, f"less than 1; the mean is 10^{float(rates.mean()):.2f}"),
        Row("mutation of the learning rate, second half of the rounds over first", "below 1", late / early, None,
            late < early, f"root mean square over all children, {early:.1f} octaves at first; the winner's line "
            f"changes {sum(changes) / len(changes):.1f} times in {len(runs[0].parents) - 1} selections"),
    ]  # fmt: skip


def mutation(runs: Sequence[PopulationRun], half: int) -> float:
    """Root mean square of log₂(child's rate over parent's), over the children of one half of the rounds."""
    squares = []
    for run in runs:
        rounds = range(len(run.parents) - 1)
        middle = len(rounds) // 2
        for r in rounds[middle:] if half else rounds[:middle]:
            for slot, parent in enumerate(run.parents[r]):
                if parent != slot:
                    before, after = run.hyper["lr"][r][parent], run.hyper["lr"][r + 1][slot]
                    squares.append(math.log2(max(after, 1e-300) / max(before, 1e-300)) ** 2)
    return math.sqrt(sum(squares) / len(squares)) if squares else math.nan


def blind_rows(blind: dict[str, float]) -> list[Row]:
    """Adam does not see a factor on the loss."""
    change = abs(blind["100"] / blind["1"] - 1)
    return [
        Row("Adam's training loss when the loss is multiplied by 100: relative change", 0.0, change, None,
            change < 0.01, "what the released program mutates is without effect")
    ]  # fmt: skip


def gentle_rows(found: dict[str, list[PopulationRun]]) -> list[Row]:
    """A smaller scale of the mutation."""
    value, error, best = ratio(found, "population, gentle", "")
    return [Row("the same with γ = 3 in place of 15", f"≤ {BOUND:g}", value, error, value <= BOUND,
                f"against the {best}")]  # fmt: skip


def good_rows(found: dict[str, list[PopulationRun]]) -> list[Row]:
    """Where the prior is good, there is nothing to gain."""
    value, error, best = ratio(found, "population, good prior", ", good prior")
    return [Row("learning rates from 10^N(−2, 1²): ratio of losses", "1: a tie", value, error,
                abs(value - 1) <= max(0.1, 2 * error), f"against the {best}; within 10 % or two errors")]  # fmt: skip


# ------------------------------------------------------------------------------------------ the figure


def _figure(found: dict[str, list[PopulationRun]], budget: Budget) -> Figure:
    return Figure(
        "Learning rates that a population found",
        partial(_draw, found=found, budget=budget),
        caption=(
            "Left: learning rate of every member of one population over the rounds (points) and along the ancestors of "
            "its winner (line). Middle: lowest validation loss over the gradients spent, mean over seeds, and of the "
            "random searches. Right: test loss of each seed and its mean."
        ),
        alt="Learning rates over rounds; validation loss over gradients; test losses by method.",
        size=(9.6, 3.2),
        key="population",
    )


def _draw(canvas: Any, found: dict[str, list[PopulationRun]], budget: Budget) -> None:
    left, middle, right = canvas.subplots(1, 3)
    one = found["population"][0]
    for r, rates in enumerate(one.hyper["lr"]):
        alive = [rate for rate in rates if 1e-9 < rate < 1e4]
        left.plot([r + 1] * len(alive), alive, "o", markersize=2.5, color=role("muted"), alpha=0.7)
    left.plot(
        range(1, len(one.schedule("lr")) + 1), one.schedule("lr"), color=role("first"), label="winner's line"
    )
    left.set(xlabel="round", ylabel="learning rate", yscale="log")
    left.legend(loc="lower right")
    colours = {
        "population": "first",
        "search of 5": "second",
        "search of 10": "third",
        "search of 25": "muted",
    }
    curve: Callable[[PopulationRun], Tensor] = lambda run: torch.tensor(run.validation_loss).amin(1)  # noqa: E731
    for name, colour in colours.items():
        best = torch.stack([curve(run) for run in found[name]]).mean(0)
        spent = torch.linspace(budget.gradients / len(best), budget.gradients, len(best))
        middle.plot(spent, best, color=role(colour), label=name)
    middle.set(xlabel="gradients, all members", ylabel="lowest validation loss", yscale="log")
    middle.legend(loc="upper right")
    for i, (name, colour) in enumerate(colours.items()):
        losses = _losses(found[name])
        right.plot([i] * len(losses), losses, "o", markersize=3, color=role(colour), alpha=0.6)
        mean, error = mean_error(losses)
        right.errorbar([i], [mean], [error], fmt="_", markersize=16, color=role(colour))
    right.set(ylabel="test loss", ylim=(0, None))
    right.set_xticks(range(len(colours)), ["population", "5", "10", "25"])
    right.set_xlabel("random search of so many members", loc="right")
