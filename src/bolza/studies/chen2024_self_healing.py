r"""Self-healing: feedback at every layer of a trained network, with gains in closed form.

    u_t = −(1 − α_t) Q_t (x_t − m_t),   α_t = c/(1 + c + λ_{t+1}),   λ_t = c (1 + λ_{t+1})/(1 + c + λ_{t+1})

The gains and what they do to orthogonal layers, exactly; digits under noise, under attacks that do not know of the
control and attacks that do, and under attacks confined to what it leaves alone; networks that were trained against an
adversary; a small language model with replaced characters.

Reference: Chen, Wang, Yang, Li & Zhang (2024), arXiv:2404.00828.

Departures: digits and characters of a small text in place of sentences and language models of a billion parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bolza.data import text
from bolza.models import gpt
from bolza.report import Figure, role
from bolza.robust import HealingReport, SelfHealing, control_gains
from bolza.robust.self_healing import CHEN_PID as REFERENCE
from bolza.studies._adversarial import pixels
from bolza.studies._healing import EPS, NOISE, deviations, trained
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "chen2024_self_healing"
TITLE = "Networks that heal themselves by feedback"
CLAIM = (
    "Cheap feedback towards the states of clean inputs makes trained networks, robust ones too, more robust"
)

OPTIONS: dict[str, dict[str, Any]] = {"P": {}, "PID": {"terms": "PID"}}
SHARE = 0.1  # of characters that are replaced


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    seeds: int = 3
    epochs: int = 25
    hard_epochs: int = 16
    attack_steps: int = 5
    text_steps: int = 120
    text_seeds: int = 1
    samples: int = 359


BUDGETS = {
    "small": Budget(),
    "full": Budget(seeds=10, epochs=60, hard_epochs=60, attack_steps=10, text_steps=1500, text_seeds=5),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Check the gains, and measure what control gives to plain and to robust networks.

    Args:
        scale: ``"small"``: three seeds, some ten seconds on one core; ``"full"``: ten, trained for longer.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("chen2024_self_healing").reference.arxiv
        '2404.00828'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, words: None)
    rows = exact_rows()
    plain: dict[str, list[HealingReport]] = {name: [] for name in OPTIONS}
    hard: list[HealingReport] = []
    curves = []
    for seed in range(budget.seeds):
        report((seed + 0.2) / (budget.seeds + 1), f"digits, seed {seed}")
        model = trained(seed, budget.epochs)
        for name, options in OPTIONS.items():
            healed = heal(model, **options)
            plain[name].append(measure(healed, seed, budget.samples))
            if name == "P":
                curves.append(noise_curve(healed, seed, budget.samples))
        robust = trained(seed, budget.hard_epochs, budget.attack_steps)
        hard.append(measure(heal(robust), seed, budget.samples))
    rows += plain_rows(plain) + hard_rows(hard)
    report(budget.seeds / (budget.seeds + 1), "characters")
    words = [language(seed, budget.text_steps) for seed in range(budget.text_seeds)]
    rows += language_rows(words)
    notes = (
        "MLP 64-128-128-10 with tanh on digits, pixels in [0, 1]; subspaces carry 95 % of the variance of the states "
        f"of training samples that are right, c = 0.1; noise has standard deviation {NOISE}, attacks ε = {EPS} in the "
        "largest entry with 20 steps. Gains are seed by seed, errors over seeds. Thresholds were fixed "
        "beforehand, c and the share of variance on two other networks.",
        "In the adaptive row each network is under the attack made for it: the only gain to count on. The restricted "
        "attack stays in the subspace of the input; it is not clipped to the range of the data.",
        f"Characters: a decoder of two blocks of width 32, {SHARE:.0%} of characters replaced by others of the text; "
        "subspaces carry 99 %, as in the paper; "
        "accuracy of the next character, errors over positions in the small run.",
    )
    facts = {
        "plain": {name: [_numbers(r) for r in found] for name, found in plain.items()},
        "hard": [_numbers(r) for r in hard],
        "text": [_numbers(r) for r in words],
        "curves": curves,
    }
    report(1.0, "done")
    return StudyResult(
        KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(plain["P"], hard, curves),), notes, facts
    )


def heal(model: nn.Module, **options: Any) -> SelfHealing:
    """Control of a network, learned on the training digits."""
    x, y, _, _ = pixels("digits")
    return SelfHealing(model, c=0.1, fraction=0.95, **options).fit(x, y)


def measure(healed: SelfHealing, seed: int, samples: int) -> HealingReport:
    """The report on the test digits."""
    _, _, x, y = pixels("digits")
    return healed.report(x[:samples], y[:samples], EPS, noise=NOISE, seed=seed)


def noise_curve(healed: SelfHealing, seed: int, samples: int) -> dict[str, list[float]]:
    """Accuracy against the strength of noise."""
    _, _, x, y = pixels("digits")
    levels = [0.0, 0.15, 0.3, 0.5, 0.75, 1.0]
    found = [healed.report(x[:samples], y[:samples], noise=level, seed=seed)["noise"] for level in levels]
    return {"noise": levels, "base": [r.base for r in found], "healed": [r.healed for r in found]}


def language(seed: int, steps: int) -> HealingReport:
    """A small decoder, trained on characters, with and without control under replaced characters."""
    data = text(length=32, stride=16)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        vocabulary = int(max(data.train_x.max(), data.train_y.max())) + 1
        model = gpt(vocabulary, depth=2, width=32, length=32, heads=2)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3, fused=True)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(data.train_x), (32,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(data.train_x[rows]).flatten(0, 1), data.train_y[rows].flatten()).backward()
        optimizer.step()
    healed = SelfHealing(model.eval(), c=0.1, fraction=0.99, terms="PID").fit(data.train_x, data.train_y)
    return healed.report(data.test_x[:200], data.test_y[:200], noise=SHARE, seed=seed)


def exact_rows() -> list[Row]:
    """Gains, orthogonal layers, dear control, and independence of the batch."""
    alpha, value = control_gains(1.0, 4)
    error = max(abs(a - b) for a, b in zip(alpha, (13 / 34, 5 / 13, 2 / 5, 1 / 2), strict=True))
    limit = abs(control_gains(1.0, 60)[0][0] - (3 - 5**0.5) / 2)
    worst = 0.0
    for c in (0.1, 1.0, 3.0):
        lower = torch.tril(torch.ones(4, 4, dtype=torch.float64))
        one = torch.ones(4, dtype=torch.float64)
        u = torch.linalg.solve(lower.mT @ lower + c * torch.eye(4, dtype=torch.float64), -lower.mT @ one)
        cost = float(((one + lower @ u).square().sum() + c * u.square().sum()) / 2)
        worst = max(worst, abs(cost - control_gains(c, 4)[1][0] / 2))
    off, inside = deviations(1.0, 4)
    _, _, x, _ = pixels("digits")
    model = trained(0, 1)
    with torch.no_grad():
        healed = heal(model)
        dear = float((_dear(model)(x) - model(x)).abs().max())
        alone = torch.cat([healed(x[i : i + 1]) for i in range(20)])
        apart = float((alone - healed(x)[:20]).abs().max())
    return [
        Row("gains at c = 1 against 13/34, 5/13, 2/5, 1/2, largest error", 0.0, error, 1e-14, error < 1e-14),
        Row("gain of many layers at c = 1, distance to (3 − √5)/2", 0.0, limit, 1e-12, limit < 1e-12),
        Row("λ₀/2 against the minimum of the scalar problem, c = .1, 1, 3", 0.0, worst, 1e-9, worst < 1e-9),
        Row("four orthogonal layers, c = 1: left off the subspace", 1 / 34, off, 1e-7, abs(off - 1 / 34) < 1e-7),
        Row("the same inside of the subspace", 1.0, inside, 1e-7, abs(inside - 1) < 1e-7),
        Row("c = 10⁶: largest change of an output", "< 1e-5", dear, None, dear < 1e-5),
        Row("outputs of a sample alone and in its batch, largest difference", "< 1e-5", apart, None, apart < 1e-5),
    ]  # fmt: skip


def _dear(model: nn.Module) -> SelfHealing:
    x, y, _, _ = pixels("digits")
    return SelfHealing(model, c=1e6).fit(x, y)


def plain_rows(found: dict[str, list[HealingReport]]) -> list[Row]:
    """What control gives to networks that were trained plainly."""
    reports = found["P"]
    rows = []
    for name, words, least in (
        ("clean", "digits: gain of accuracy on clean inputs", -0.03),
        ("noise", "digits: gain under noise", 0.08),
        ("oblivious", "digits: gain under an attack that does not know of the control", 0.2),
    ):
        gain, error = mean_error(r[name].gain for r in reports)
        rows.append(
            Row(words, f"≥ {least}".replace("-", "−"), gain, error, gain >= least, _accuracies(reports, name))
        )
    gain, error = mean_error(r["adaptive"].gain for r in reports)
    rows.append(
        Row("digits: gain under an attack through the control", "> 0", gain, error, gain > 2 * error,
            f"{_accuracies(reports, 'adaptive')}; by more than two errors")
    )  # fmt: skip
    lost, error = mean_error(r["oblivious"].healed - r["adaptive"].healed for r in reports)
    rows.append(
        Row("digits: how much the attack that does not know of it overstates", "> 0", lost, error, lost > 2 * error,
            "oblivious minus adaptive accuracy under control")
    )  # fmt: skip
    gain, error = mean_error(r["restricted"].gain for r in reports)
    rows.append(
        Row("digits: gain under an attack inside of the input's subspace", "0, by design", gain, error,
            abs(gain) < 0.05, f"{_accuracies(reports, 'restricted')}; within 0.05, as layers behind may act")
    )  # fmt: skip
    for name in ("noise", "adaptive"):
        pairs = zip(found["PID"], reports, strict=True)
        gain, error = mean_error(a[name].healed - b[name].healed for a, b in pairs)
        rows.append(
            Row(f"digits, {name}: what means and differences (PID) add to P", "> 0", gain, error,
                gain > 0 if abs(gain) > 2 * error else None, "to two errors; at the same cost of inference")
        )  # fmt: skip
    return rows


def hard_rows(reports: list[HealingReport]) -> list[Row]:
    """What control gives to networks that were trained against an adversary."""
    rows = []
    for name, words in (
        ("oblivious", "an attack on the bare network"),
        ("adaptive", "an attack through the control"),
    ):
        gain, error = mean_error(r[name].gain for r in reports)
        rows.append(
            Row(f"networks trained against an adversary: gain under {words}", "> 0", gain, error,
                gain > 0 if abs(gain) > 2 * error else None,
                f"{_accuracies(reports, name)}; the paper's claim, with linear subspaces; to two errors")
        )  # fmt: skip
    return rows


def language_rows(reports: list[HealingReport]) -> list[Row]:
    """What control gives to a small decoder."""
    if len(reports) > 1:
        gain, error = mean_error(r["noise"].gain for r in reports)
    else:
        gain, error = reports[0]["noise"].gain, reports[0]["noise"].error
    judged = gain > 0 if abs(gain) > 2 * error else None
    return [
        Row("characters: gain where some are replaced", "> 0", gain, error, judged,
            f"{_accuracies(reports, 'noise')}; clean: {_accuracies(reports, 'clean')}; to two errors")
    ]  # fmt: skip


def _accuracies(reports: list[HealingReport], name: str) -> str:
    base, healed = (mean_error(getattr(r[name], which) for r in reports)[0] for which in ("base", "healed"))
    return f"{base:.3f} → {healed:.3f}"


def _numbers(report: HealingReport) -> dict[str, tuple[float, float]]:
    return {row.name: (row.base, row.healed) for row in report.rows}


def _figure(
    plain: list[HealingReport], hard: list[HealingReport], curves: list[dict[str, list[float]]]
) -> Figure:
    return Figure(
        "Where feedback heals, and where it does not",
        partial(_draw, plain=plain, hard=hard, curves=curves),
        caption=(
            "Left: accuracy on digits with noise. Middle: accuracy of a plainly trained network (filled) and of one "
            "trained against an adversary (open), without and with control; the adaptive attack is what counts. "
            "Right: what is left of a deviation along four orthogonal layers at c = 1."
        ),
        alt="Curves over noise; paired points for five kinds of inputs; a staircase to 1/34.",
        size=(10.4, 3.5),
        key="healing",
    )  # fmt: skip


def _draw(
    canvas: Any, plain: list[HealingReport], hard: list[HealingReport], curves: list[dict[str, list[float]]]
) -> None:
    left, middle, right = canvas.subplots(1, 3, width_ratios=[1.0, 1.5, 0.9])
    for which, colour, label in (("base", "second", "without control"), ("healed", "first", "with control")):
        values = torch.tensor([curve[which] for curve in curves])
        mean = values.mean(0)
        left.fill_between(
            curves[0]["noise"],
            values.amin(0).numpy(),
            values.amax(0).numpy(),
            color=role(colour),
            alpha=0.2,
            lw=0,
        )
        left.plot(curves[0]["noise"], mean.numpy(), marker="o", color=role(colour), label=label)
    left.set(xlabel="standard deviation of noise", ylabel="accuracy", ylim=(0, 1.02))
    left.legend(loc="lower left")
    names = [row.name for row in plain[0].rows]
    for reports, offset, filled in ((plain, -0.16, True), (hard, 0.16, False)):
        for i, name in enumerate(names):
            base, healed = (mean_error(getattr(r[name], w) for r in reports)[0] for w in ("base", "healed"))
            colour = (
                role("third")
                if healed > base + 0.01
                else role("fourth")
                if healed < base - 0.01
                else role("muted")
            )
            middle.plot([i + offset] * 2, [base, healed], color=colour, lw=2)
            for value, c in ((base, role("second")), (healed, role("first"))):
                middle.plot(i + offset, value, "o", color=c, mfc=c if filled else "white", ms=6)
    middle.set_xticks(range(len(names)), names, rotation=20)
    middle.set(ylim=(0, 1.02), ylabel="accuracy")
    alpha = control_gains(1.0, 4)[0]
    off = [1.0]
    for a in alpha:
        off.append(off[-1] * a)
    right.semilogy(range(5), off, marker="o", color=role("first"), label="off the subspace")
    right.semilogy(range(5), [1.0] * 5, marker="o", color=role("second"), label="inside of it")
    right.annotate(
        "1/34", (4, off[-1]), textcoords="offset points", xytext=(-10, -9), ha="right", color=role("ink")
    )
    right.set(xlabel="layers with control", ylabel="deviation that is left", ylim=(0.02, 1.6))
    right.legend(loc="lower left")
