r"""Adversarial training as a game: the adversary meets the first layer alone.

    η ← Π[η + σ sign ∇_η ⟨p, f_0(x + η)⟩],   p the costate behind the first layer, kept for n steps

Exact identities of the scheme; then digits (and at full scale images and a convolutional network) trained by YOPO-5-3
and by projected gradient ascent, judged by an attack suite that neither was trained on.

Reference: Zhang, Zhang, Lu, Zhu & Dong (2019), arXiv:1905.00877.

Departures: small data and networks, on one core; Adam in place of SGD with momentum; every rule sees the same samples
equally often, and has the best of the learning rates tried.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bolza.report import Figure, role
from bolza.robust import pgd, yopo
from bolza.robust.yopo import ZHANG_YOPO as REFERENCE
from bolza.studies._adversarial import robustness, train
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "zhang2019_yopo"
TITLE = "Adversarial training that propagates once"
CLAIM = (
    "A costate kept for several steps of the adversary gives the robustness of full attacks in fewer passes"
)

RULES = ("natural", "fast", "PGD-4", "PGD-10", "YOPO-5-3")
SETTINGS = {"digits": (0.15, 128), "mnist5k": (0.2, 128)}  # radius, batch
SUITE = {"attack": ["apgd-ce", "apgd-t"], "steps": 20, "restarts": 1, "suite_steps": 10}


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    data: tuple[str, ...] = ("digits",)
    seeds: int = 3
    epochs: dict[str, int] = field(default_factory=lambda: {"digits": 4})
    rates: tuple[float, ...] = (3e-3,)
    samples: int = 200
    suite: dict[str, Any] = field(default_factory=lambda: dict(SUITE))


BUDGETS = {
    "small": Budget(),
    "full": Budget(
        ("digits", "mnist5k"),
        5,
        {"digits": 25, "mnist5k": 10},
        (1e-3, 3e-3),
        1000,
        {"steps": 40, "restarts": 3, "queries": 1000},
    ),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Check the identities, train by every rule, and judge by the independent suite.

    Args:
        scale: ``"small"``: digits, three seeds, four epochs, a short suite; ``"full"``: five seeds, 25 epochs, images
            too, the whole suite: about an hour.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("zhang2019_yopo").reference.arxiv
        '1905.00877'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    rows, found = exact_rows(), {}
    for i, name in enumerate(budget.data):
        found[name] = trials(name, budget, partial(_part, report, i, len(budget.data)))
        rows += claims(name, found[name])
    notes = (
        "Robust: not broken by projected gradient ascent nor by the independent suite; radius 0.15 (digits) and 0.2 "
        "(images) in the largest pixel, pixels in [0, 1]. Adam; the rate falls to a tenth for the last quarter.",
        "A difference of YOPO-5-3 and PGD-10 holds if its mean is at least −0.01, fails if it is below by two standard "
        "errors, and cannot be told otherwise; errors are over seeds, seed by seed.",
        "On small networks the first layer is a large share of the cost, so passes fall and seconds do not.",
    )
    report(1.0, "done")
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(found),), notes, found)


def _part(report: Progress, i: int, n: int, share: float, text: str) -> None:
    report((i + share) / n, text)


def exact_rows() -> list[Row]:
    """What holds to rounding."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(16, 8, generator=g, dtype=torch.float64), torch.arange(16) % 4

    def layer(a: int, b: int) -> nn.Linear:
        made = nn.Linear(a, b).double()
        with torch.no_grad():
            made.weight.copy_(torch.randn(b, a, generator=g, dtype=torch.float64) / a**0.5)
            made.bias.zero_()
        return made

    tail = nn.Sequential(layer(8, 16), nn.Tanh(), layer(16, 4))
    first = layer(8, 8)
    with torch.no_grad():
        first.weight.copy_(torch.eye(8, dtype=torch.float64))
    net = nn.Sequential(first, *copy.deepcopy(tail))
    draw = partial(torch.Generator().manual_seed, 1)
    ascended = pgd(net, F.cross_entropy, x, y, 0.1, 5, step_size=0.03, best=False, generator=draw())
    played = yopo(net, F.cross_entropy, x, y, 0.1, 5, 1, step_size=0.03, generator=draw()).inputs
    same = float((ascended - played).abs().max())
    play = partial(yopo, tail, F.cross_entropy, x, y, 0.1, clip=None)
    added = float(
        (
            play(3, 4, step_size=0.01, generator=draw()).inputs
            - play(3, 1, step_size=0.04, generator=draw()).inputs
        )
        .abs()
        .max()
    )
    tail.zero_grad()
    play(2, 2, random_start=False, step_size=0.0)
    parameters = list(tail.parameters())
    exact = torch.autograd.grad(F.cross_entropy(tail(x), y), parameters)
    gradient = max(float((p.grad - e).abs().max()) for p, e in zip(parameters, exact, strict=True))  # type: ignore[operator]
    return [
        Row(
            "YOPO-5-1 behind an identity against PGD-5: largest difference of the inputs",
            0.0,
            same,
            0.0,
            same == 0.0,
            "bit for bit",
        ),
        Row(
            "linear first layer: four small steps against one of four times the size",
            0.0,
            added,
            1e-14,
            added < 1e-14,
            "no clipping to the range of the data",
        ),
        Row(
            "gradient of the first layer from the Hamiltonian against back-propagation",
            0.0,
            gradient,
            1e-14,
            gradient < 1e-14,
        ),
    ]


def trials(name: str, budget: Budget, report: Progress) -> dict[str, list[dict[str, float]]]:
    """Every rule from every seed; the rate is chosen on the first seed, by gradient ascent on training samples."""
    eps, batch = SETTINGS[name]
    found: dict[str, list[dict[str, float]]] = {rule: [] for rule in RULES}
    rates = dict.fromkeys(RULES, budget.rates[0])
    about: dict[str, Any] = {"eps": eps, "batch": batch, "epochs": budget.epochs[name]}
    if len(budget.rates) > 1:
        for rule in RULES:
            report(0.0, f"{name}, rates of {rule}")
            scores = {lr: _training_robustness(name, rule, lr, about) for lr in budget.rates}
            rates[rule] = max(scores, key=scores.__getitem__)
    for seed in range(budget.seeds):
        for i, rule in enumerate(RULES):
            report((seed * len(RULES) + i) / (budget.seeds * len(RULES)), f"{name}, {rule}, seed {seed}")
            trained = train(name, rule, seed, lr=rates[rule], **about)
            judged = robustness(trained, name, eps=eps, samples=budget.samples, suite=budget.suite)
            found[rule].append(
                {
                    "clean": judged.clean,
                    "pgd": judged.after["pgd"],
                    "robust": judged.robust,
                    "passes": trained.passes,
                    "seconds": trained.seconds,
                    "lr": rates[rule],
                }
            )
    return found


def _training_robustness(name: str, rule: str, lr: float, about: dict[str, Any]) -> float:
    from bolza.robust import robust_accuracy
    from bolza.studies._adversarial import pixels

    trained = train(name, rule, 999, lr=lr, **about)
    x, y, _, _ = pixels(name)
    clean_weight = 1.0 if rule == "natural" else 0.0
    judged = robust_accuracy(
        trained.model, x[-400:], y[-400:], about["eps"], attack="pgd", steps=20, restarts=1
    )
    return clean_weight * judged.clean + (1 - clean_weight) * judged.robust


def claims(name: str, found: dict[str, list[dict[str, float]]]) -> list[Row]:
    """What the paper says, for one data set."""

    def of(rule: str, key: str) -> tuple[float, float]:
        return mean_error(r[key] for r in found[rule])

    def gain(a: str, b: str) -> tuple[float, float]:
        return mean_error(r["robust"] - s["robust"] for r, s in zip(found[a], found[b], strict=True))

    natural, reference, own = of("natural", "robust"), of("PGD-10", "robust"), of("YOPO-5-3", "robust")
    difference, error = gain("YOPO-5-3", "PGD-10")
    equal, equal_error = gain("YOPO-5-3", "PGD-4")
    passes = of("YOPO-5-3", "passes")[0] / of("PGD-10", "passes")[0]
    seconds = sorted(
        r["seconds"] / s["seconds"] for r, s in zip(found["YOPO-5-3"], found["PGD-10"], strict=True)
    )
    middle = seconds[len(seconds) // 2]
    return [
        Row(
            f"{name}: robust accuracy without adversarial training",
            "below half of PGD-10",
            *natural,
            natural[0] < reference[0] / 2,
        ),
        Row(f"{name}: robust accuracy of PGD-10", "above natural", *reference, reference[0] > natural[0]),
        Row(f"{name}: robust accuracy of YOPO-5-3", "that of PGD-10", *own, own[0] > natural[0]),
        Row(
            f"{name}: YOPO-5-3 less PGD-10, robust accuracy",
            "≥ −0.01",
            difference,
            error,
            True if difference >= -0.01 else False if difference + 2 * error < -0.01 else None,
            "seed by seed, under the independent suite",
        ),
        Row(f"{name}: full passes of YOPO-5-3 over those of PGD-10", "≤ 0.5", passes, None, passes <= 0.5),
        Row(
            f"{name}: YOPO-5-3 less PGD-4, which takes as many passes, robust accuracy",
            "> 0",
            equal,
            equal_error,
            equal > 0 if abs(equal) > 2 * equal_error else None,
            "to two errors, seed by seed",
        ),
        Row(
            f"{name}: processor time of YOPO-5-3 over that of PGD-10",
            "0.2 to 0.25",
            middle,
            (seconds[-1] - seconds[0]) / 2,
            middle <= 0.3,
            "median over seeds; the paper's networks are large and on a GPU",
        ),
    ]


def _figure(found: dict[str, dict[str, list[dict[str, float]]]]) -> Figure:
    return Figure(
        "Robust accuracy and what it costs",
        partial(_draw, found=found),
        caption=(
            "Accuracy under the independent suite against full passes through the network (left) and against processor "
            "time relative to PGD-10 (right), one point for each seed, hollow: clean accuracy."
        ),
        alt="Two scatter plots of accuracy against cost for five training rules.",
        size=(9.6, 3.4 * len(found)),
        key="yopo",
    )


def _draw(canvas: Any, found: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    axes = canvas.subplots(len(found), 2, squeeze=False, sharey="row")
    colours = dict(zip(RULES, ("muted", "third", "second", "ink", "first"), strict=True))
    for (left, right), (name, results) in zip(axes, found.items(), strict=True):
        for rule, trials_ in results.items():
            colour = role(colours[rule])
            for r, s in zip(trials_, results["PGD-10"], strict=True):
                for axis, cost in ((left, r["passes"]), (right, r["seconds"] / s["seconds"])):
                    axis.plot(cost, r["robust"], "o", color=colour, ms=6)
                    axis.plot(cost, r["clean"], "o", color=colour, ms=6, mfc="none")
            left.plot([], [], "o", color=colour, label=rule)
        left.set(xlabel="full passes", ylabel=f"accuracy, {name}", ylim=(-0.08, 1.04))
        left.margins(x=0.12)
        right.set(xlabel="processor time over that of PGD-10", xlim=(0, None))
    axes[0, 0].figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(RULES)
    )
