r"""The two learning rates of MAML: the faster the inner steps, the faster the outer ones may be.

    β < 2 / max_i λ_i (1 − αλ_i)^{2K}

First tasks that share one Hessian, where the bound is exact; then a small network on sine waves, trained at every pair
of rates of a grid; last the limit that is measured at a trained network, beside what outer descent does there.

Reference: Takagi, Nagano, Yoshida & Okada (2019).

Departures: the bound without the paper's expansion in α; sine waves alone; plain outer descent on all
tasks at every step.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from bolza.data import Sinusoids, TaskBatch
from bolza.meta import MAML, RateReport, check_rates, meta_gradient, meta_rate_bound
from bolza.meta.adaptation import Adaptation, batched
from bolza.meta.rates import TAKAGI as REFERENCE
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error
from bolza.systems import SGD

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "takagi2019_rates"
TITLE = "The two learning rates of MAML"
CLAIM = "The largest stable outer rate grows with the inner rate: raise the inner one first, then tune the outer one"

D = torch.float64
SPECTRUM = (0.5, 1.0, 2.0)
TABLE = {0.0: 1.0, 0.1: 1.5625, 0.2: 2.7778, 0.3: 4.0816, 0.4: 5.5556}
ALPHAS = (0.0, 0.01, 0.03, 0.1)
BETAS = tuple(0.05 * 2 ** (k / 2) for k in range(13))


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    seeds: int = 3
    steps: int = 150
    tasks: int = 10


BUDGETS = {"small": Budget(), "full": Budget(seeds=6, steps=500, tasks=20)}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Check the bound where it is exact, race a grid of rates, and measure the limit at a trained network.

    Args:
        scale: ``"small"``: three seeds of 150 outer steps; ``"full"``: six of 500, more tasks.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("takagi2019_rates").reference.year
        2019
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    rows = bound_rows()
    finals, limits = [], []
    for seed in range(budget.seeds):
        report((seed + 0.2) / (budget.seeds + 1), f"a grid of rates, seed {seed}")
        finals.append(race(seed, budget))
        limits.append(measured(seed, budget))
    useful = mean_error(min(found["useful α"]) for found in limits)[0]
    rows += race_rows(finals, useful) + measured_rows(limits)
    notes = (
        f"Network: 1-20-1, tanh, {budget.tasks} fixed tasks of 10 points for each set, one inner step, {budget.steps} "
        f"outer steps at β from {BETAS[0]:g} to {BETAS[-1]:.3g} in steps of √2. A run holds if its outer loss ends "
        "finite and below where it began; the largest stable β is the last before the first that does not.",
        "The measured limit is that of the quadratic model. The trained network (α = 0.03) comes from steps at half "
        "the limit of the start; outer descent then goes on with a share of its own limit.",
        "The claim is for α below its own bound. One inner step is of use up to 1/λ_max of the sharpest task, the "
        "smaller of the values before and after training, averaged over seeds; beyond it the bound falls again.",
    )
    facts = {"final losses": [f.tolist() for f in finals], "limits": limits}
    report(1.0, "done")
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(finals),), notes, facts)


def bound_rows() -> list[Row]:
    """The bound on tasks of one Hessian, and what outer descent does on either side of it."""
    spectrum = torch.tensor(SPECTRUM, dtype=D)
    nothing = torch.zeros(1, 3, dtype=D)

    def task(w: Tensor, centre: Tensor) -> Tensor:
        return (spectrum * (w - centre).square()).sum() / 2

    rows, ends = [], []
    for alpha, expected in TABLE.items():
        bound = meta_rate_bound(SPECTRUM, alpha)
        rows.append(
            Row(
                f"one Hessian with eigenvalues 0.5, 1, 2: bound of β at α = {alpha:g}",
                expected,
                bound,
                None,
                abs(bound - expected) < 5e-5,
                "closed form",
            )
        )
        found = [meta_gradient(task, e, nothing, nothing, alpha).gradient for e in torch.eye(3, dtype=D)]
        for share in (0.98, 1.02):
            step = torch.eye(3, dtype=D) - share * bound * torch.stack(found, 1)
            ends.append(math.log10(float(torch.linalg.matrix_power(step, 3000).norm())))
    below, above = max(ends[::2]), min(ends[1::2])
    rows.append(
        Row(
            "distance after 3000 outer steps at 0.98 and at 1.02 of the bound",
            "< 1e−50 and > 1e50",
            f"at most 1e{below:.0f} and at least 1e{above:.0f}".replace("-", "−"),
            None,
            below < -50 and above > 50,
            "all five inner rates, with the meta-gradients",
        )
    )
    return rows


def network(seed: int) -> nn.Sequential:
    """The network, started from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)).to(D)


def fixed_tasks(seed: int, tasks: int) -> TaskBatch:
    """The tasks of a run."""
    return Sinusoids(10, 10, dtype=D).sample(tasks, torch.Generator().manual_seed(seed))


def race(seed: int, budget: Budget) -> Tensor:
    """Outer loss at the end over that at the start, (α, β); inf where it left the finite numbers.

    All runs go side by side: a run is a block of tasks with an initial point of its own.
    """
    net, tasks = network(seed), fixed_tasks(seed, budget.tasks)
    pairs = torch.cartesian_prod(torch.tensor(ALPHAS, dtype=D), torch.tensor(BETAS, dtype=D))
    runs, many = len(pairs), budget.tasks
    support, query = (tuple(part.repeat(runs, 1, 1) for part in pair) for pair in tasks)

    def loss(params: dict[str, Tensor], _: Any, data: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(functional_call(net, params, data[0]), data[1])

    def shaped(values: Tensor, like: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (like.ndim - 1))

    losses = batched(loss)
    params = {name: p.detach().expand(runs, *p.shape).clone() for name, p in net.named_parameters()}
    inner = pairs[:, 0].repeat_interleave(many)
    rates = {name: shaped(inner, p) for name, p in params.items()}
    adaptation = Adaptation(losses, support, SGD(lr=rates), 1)
    first = value = torch.zeros(runs, dtype=D)
    for step in range(budget.steps + 1):
        leaves = {name: p.requires_grad_() for name, p in params.items()}
        stacked = {name: p.repeat_interleave(many, 0) for name, p in leaves.items()}
        state = adaptation.run({"params": stacked, "shared": {}})
        value = losses(state["params"], {}, query).reshape(runs, many).mean(1)
        first = value.detach() if step == 0 else first
        slopes = torch.autograd.grad(value.sum(), list(leaves.values()))
        with torch.no_grad():
            params = {
                name: p - shaped(pairs[:, 1], p) * g
                for (name, p), g in zip(leaves.items(), slopes, strict=True)
            }
    ratio = (value.detach() / first).nan_to_num(math.inf, math.inf)
    return ratio.reshape(len(ALPHAS), len(BETAS))


def largest_stable(ratios: Sequence[float]) -> float:
    """The last β of the grid before the first whose run did not end below where it began."""
    stable = 0.0
    for beta, ratio in zip(BETAS, ratios, strict=True):
        if not ratio < 1:
            break
        stable = beta
    return stable


def measured(seed: int, budget: Budget) -> dict[str, Any]:
    """Limits at the untrained network for each α, and what outer descent does on either side of one later on."""
    tasks, draw = fixed_tasks(seed, budget.tasks), torch.Generator().manual_seed(seed)
    reports = [_report(MAML(network(seed), lr=max(alpha, 1e-9), steps=1), tasks, draw) for alpha in ALPHAS]
    net = network(seed)
    maml = MAML(net, lr=0.03, steps=1)
    _descend(maml, tasks, 0.5 * float(reports[ALPHAS.index(0.03)].outer_limit or 0), budget.steps // 3)
    trained = _report(maml, tasks, draw)
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    after = {}
    for share in (0.7, 1.5):
        before = float(maml(*tasks).detach())
        after[f"{share:g}"] = _descend(maml, tasks, share * float(trained.outer_limit or 0), 12) / before
        net.load_state_dict(kept)
    return {
        "limits": [found.outer_limit for found in reports],
        "after": after,
        "useful α": [reports[0].useful_lr, trained.useful_lr],
    }


def _report(maml: MAML, tasks: TaskBatch, draw: torch.Generator) -> RateReport:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return check_rates(maml, *tasks, generator=draw)


def _descend(maml: MAML, tasks: TaskBatch, rate: float, steps: int) -> float:
    """Largest outer loss of the last third of a run of plain descent."""
    outer = torch.optim.SGD(maml.parameters(), lr=rate)
    values = []
    for _ in range(steps):
        outer.zero_grad()
        loss = maml(*tasks)
        loss.backward()
        outer.step()
        values.append(float(loss.detach()))
    return max(values[-max(1, steps // 3) :])


def race_rows(finals: list[Tensor], useful: float) -> list[Row]:
    """What the grid says."""
    stable = [[largest_stable(line) for line in final.tolist()] for final in finals]
    rows = []
    for i in range(1, len(ALPHAS)):
        mean, _ = mean_error(found[i] for found in stable)
        rows.append(
            Row(
                f"sine waves: largest stable β at α = {ALPHAS[i]:g}, over that at α = {ALPHAS[i - 1]:g}",
                "> 1",
                *mean_error(found[i] / found[i - 1] for found in stable),
                all(found[i] > found[i - 1] for found in stable),
                f"every seed; β = {mean:.3g} on average; one inner step is of use up to α = {useful:.2g}",
            )
        )
    best = [final.min(1).values for final in finals]
    gain, error = mean_error(float(b[-1] / b[0]) for b in best)
    rows.append(
        Row(
            f"sine waves: lowest loss over the grid of β at α = {ALPHAS[-1]:g}, over that at α = 0",
            "< 1",
            gain,
            error,
            gain + 2 * error < 1,
            "α first, then β",
        )
    )
    return rows


def measured_rows(limits: list[dict[str, Any]]) -> list[Row]:
    """What the measured limits say."""
    growing = [
        all(a < b for a, b in zip(found["limits"], found["limits"][1:], strict=False)) for found in limits
    ]
    below, above = ([found["after"][share] for found in limits] for share in ("0.7", "1.5"))
    return [
        Row(
            "untrained network: measured limit of β grows with α",
            f"{len(limits)} of {len(limits)} seeds",
            f"{sum(growing)} of {len(limits)} seeds",
            None,
            all(growing),
            f"α = {', '.join(f'{a:g}' for a in ALPHAS)}",
        ),
        Row(
            "trained network: loss after 12 outer steps at 0.7 of its limit, over that before",
            "≤ 1",
            *mean_error(below),
            max(below) <= 1,
            "every seed",
        ),
        Row(
            "trained network: loss after 12 outer steps at 1.5 of its limit, over that before",
            "> 1",
            *mean_error(above),
            min(above) > 1,
            "every seed; the limit is local, and descent may jump to where it is flatter",
        ),
    ]


def _figure(finals: list[Tensor]) -> Figure:
    return Figure(
        "How fast may the outer steps be?",
        partial(_draw, finals=finals),
        caption=(
            "Left: the bound of β against the inner rate for tasks of one Hessian with eigenvalues 0.5, 1 and 2; each "
            "eigenvalue alone is thin. Right: outer loss of a network on sine waves after training, over that at the "
            "start, against β, one line for each inner rate (median of the seeds); lines end where training diverges."
        ),
        alt="Bound of the outer rate rising with the inner rate; loss curves that end at larger outer rates.",
        size=(8.6, 3.3),
        key="rates",
    )


def _draw(canvas: Any, finals: list[Tensor]) -> None:
    left, right = canvas.subplots(1, 2)
    grid = torch.linspace(0, 0.6, 241)
    for value in SPECTRUM:
        left.plot(grid, [meta_rate_bound([value], float(a)) for a in grid], color=role("muted"), lw=0.8)
    left.plot(grid, [meta_rate_bound(SPECTRUM, float(a)) for a in grid], color=role("first"), label="bound")
    left.plot(list(TABLE), list(TABLE.values()), "o", color=role("first"), ms=5)
    left.set(xlabel="inner rate α", ylabel="largest outer rate β", ylim=(0, 8))
    middle = torch.stack(finals).median(0).values
    for alpha, line, colour in zip(ALPHAS, middle, ("fourth", "third", "second", "first"), strict=True):
        shown = [(b, float(v)) for b, v in zip(BETAS, line, strict=True) if float(v) < 1.5]
        right.plot(
            [b for b, _ in shown],
            [v for _, v in shown],
            color=role(colour),
            marker="o",
            ms=3,
            label=f"α = {alpha:g}",
        )
    right.set(xlabel="outer rate β", ylabel="loss over that at the start", xscale="log", ylim=(0, 1.3))
    right.set_xticks(BETAS[::2], [f"{beta:g}" for beta in BETAS[::2]])
    right.minorticks_off()
    right.legend(loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=4, columnspacing=0.8, handlelength=1.2)
