r"""Which examples help a target: the costate of a training run as a judge of data.

    G_n = η Σ_t ⟨λ_{t+1}, ∇ℓ_n(θ_t)⟩,      λ the costate of the area under the target's loss

Two pools of digits: one with random labels among its own, one in which most examples belong to a task with permuted
labels. Scores of one sweep against the habit of trusting low losses and against similarity of gradients at one place;
then nets trained from the start on what each rule keeps.

Reference: Gu, Dong, Wang, Hao, Dong, Wei & Huang (2025), arXiv:2410.07064.

Departures: digits and a small MLP in place of language models and web text; the network that scores and the one that is
trained are of one size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.controllers import (
    LinearScorer,
    data_values,
    example_losses,
    gradient_similarity,
    keep_best,
    select_data,
)
from bolza.controllers.data_scores import GU as REFERENCE
from bolza.data import digits
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "gu2025_selection"
TITLE = "Data selection by the costate of training"
CLAIM = "Examples whose gradients align with the costate of the target's loss are those worth training on"

D = torch.float64
RATE = 0.5
TASKS = {"random labels": 0.4, "another task": 0.3}  # share that is kept
RULES = ("costate", "low loss", "similarity at the start", "similarity at the end")
EXPECTED_AUC = {
    "random labels": (0.985, 0.992, 0.744, 0.799),
    "another task": (0.978, 0.294, 0.804, 0.889),
}


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    seeds: int = 3
    pool: int = 1000
    steps: int = 100
    training: int = 100
    rounds: int = 4


BUDGETS = {"small": Budget(), "full": Budget(seeds=12, pool=1300, training=400, rounds=10)}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Check the costate, score two pools, and train on what is kept.

    Args:
        scale: ``"small"``: three seeds, some ten seconds on one core; ``"full"``: twelve seeds, longer training.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("gu2025_selection").reference.arxiv
        '2410.07064'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    rows = exact_rows()
    found: dict[str, list[dict[str, Any]]] = {task: [] for task in TASKS}
    for seed in range(budget.seeds):
        for i, task in enumerate(TASKS):
            report((2 * seed + i + 1) / (2 * budget.seeds + 2), f"{task}, seed {seed}")
            found[task].append(trial(task, seed, budget))
    for task, results in found.items():
        rows += score_rows(task, results) + training_rows(task, results)
    report((2 * budget.seeds + 1) / (2 * budget.seeds + 2), "weights on the simplex")
    costs = loop(budget)
    rows.append(
        Row(
            "another task: area under the target's loss after the projected loop, over that of equal weights",
            "below 1",
            costs[-1] / costs[0],
            None,
            costs[-1] < 0.9 * costs[0],
            f"{len(costs) - 1} rounds; at least a tenth less",
        )
    )
    notes = (
        f"MLP 64-32-10 with tanh, descent at η = {RATE} for {budget.steps} steps on a pool of {budget.pool} digits, "
        "100 further ones as target. Expected areas under the curve and accuracies are of earlier "
        "runs of ours on data of this kind, not of the paper, which has language models.",
        "Random labels: 40 % of the pool is labelled at random. Another task: 61 % has the labels of a permutation.",
        "Trained from a new start on what is kept, the same number of steps (η = 0.2, momentum 0.9) for every rule; "
        "errors are over seeds. The projected loop sees 400 examples and half the steps.",
    )
    facts = {"costs": list(costs)} | {
        task: [{k: v for k, v in r.items() if k != "scores"} for r in results]
        for task, results in found.items()
    }
    report(1.0, "done")
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(found, costs),), notes, facts)


def network(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The MLP, started from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).to(dtype)


def pools(
    task: str, seed: int, size: int, dtype: torch.dtype = torch.float32
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Pool, target, and which examples of the pool are good."""
    data = digits().to(dtype=dtype)
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=draw)
    rows, aim = order[:size], order[size : size + 100]
    labels = data.train_y[rows].clone()
    if task == "random labels":
        changed = torch.rand(size, generator=draw) < 0.4
        labels[changed] = torch.randint(10, (int(changed.sum()),), generator=draw)
    else:
        changed = torch.rand(size, generator=draw) < 0.61
        labels[changed] = torch.randperm(10, generator=draw)[labels[changed]]
    good = labels == data.train_y[rows]
    return (data.train_x[rows], labels), (data.train_x[aim], data.train_y[aim]), good


def accuracy(batch: tuple[Tensor, Tensor], seed: int, steps: int) -> float:
    """Test accuracy of a new network trained on a batch by descent."""
    data, net = digits(), network(1000 + seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(batch[0]), batch[1]).backward()
        optimizer.step()
    with torch.no_grad():
        return float((net(data.test_x).argmax(1) == data.test_y).double().mean())


def trial(task: str, seed: int, budget: Budget) -> dict[str, Any]:
    """Scores of every rule, their areas under the curve, and the accuracies of what they keep."""
    from sklearn.metrics import roc_auc_score

    pool, target, good = pools(task, seed, budget.pool)
    net, loss = network(seed), F.cross_entropy
    values = data_values(net, loss, pool, target, steps=budget.steps, lr=RATE)
    scores = {
        "costate": values.scores,
        "low loss": -example_losses(net, loss, pool, values.params),
        "similarity at the start": gradient_similarity(net, loss, pool, target),
        "similarity at the end": gradient_similarity(net, loss, pool, target, params=values.params),
    }
    half = budget.pool // 2
    features = (pool[0][:, :, None] * F.one_hot(pool[1], 10)[:, None, :]).flatten(1)
    carried = LinearScorer(features[:half], values.scores[:half])(features[half:])
    chosen = {
        "costate": keep_best(values.scores, TASKS[task]),
        "low loss": keep_best(scores["low loss"], TASKS[task]),
        "at random": torch.randperm(budget.pool, generator=torch.Generator().manual_seed(seed))[
            : round(TASKS[task] * budget.pool)
        ],
        "everything": torch.arange(budget.pool),
    }
    accuracies = {
        name: accuracy((pool[0][rows], pool[1][rows]), seed, budget.training) for name, rows in chosen.items()
    }
    accuracies["the target alone"] = accuracy(target, seed, budget.training)
    return {
        "scores": (values.scores, good),
        "auc": {name: float(roc_auc_score(good, s)) for name, s in scores.items()},
        "carried": float(roc_auc_score(good[half:], carried)),
        "accuracy": accuracies,
    }


def loop(budget: Budget) -> tuple[float, ...]:
    """J over the rounds of the projected loop, on the pool with another task in it."""
    pool, target, _ = pools("another task", 0, budget.pool)
    few = (pool[0][:400], pool[1][:400])
    chosen = select_data(
        network(0), F.cross_entropy, few, target, rounds=budget.rounds, steps=budget.steps // 2, lr=RATE
    )
    return chosen.costs


def exact_rows() -> list[Row]:
    """The sweep against autograd through the run, one step in closed form, and the states that are held."""
    pool, target, _ = pools("random labels", 0, 40, D)
    net = network(0, D)
    params = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}
    start = dict(params)
    gamma = torch.full((40,), 1 / 40, dtype=D, requires_grad=True)

    def losses(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, p, batch[0]), batch[1], reduction="none")

    area = torch.zeros((), dtype=D)
    for _ in range(20):
        slopes = torch.autograd.grad(
            (gamma * losses(params, pool)).sum(), list(params.values()), create_graph=True
        )
        params = {name: p - RATE * g for (name, p), g in zip(params.items(), slopes, strict=True)}
        area = area + losses(params, target).mean()
    exact = -torch.autograd.grad(area, gamma)[0]
    swept = data_values(net, F.cross_entropy, pool, target, steps=20, lr=RATE)
    error = float((swept.scores - exact).norm() / exact.norm())
    one = data_values(net, F.cross_entropy, pool, target, steps=1, lr=RATE)
    after = torch.autograd.grad(
        losses(q := {n: p.detach().requires_grad_() for n, p in one.params.items()}, target).mean(),
        list(q.values()),
    )
    own = torch.autograd.grad(losses(start, pool)[7], list(start.values()))
    product = RATE * float(torch.stack([(a * b).sum() for a, b in zip(own, after, strict=True)]).sum())
    step = abs(float(one.scores[7]) / product - 1)
    held = data_values(
        net, F.cross_entropy, pool, target, steps=100, lr=RATE, checkpoint_every=10
    ).states_held
    return [
        Row("scores against autograd through 20 steps, relative error", 0.0, error, 1e-10, error < 1e-10),
        Row("one step: score over η⟨∇L(θ₁), ∇ℓ(θ₀)⟩, minus 1", 0.0, step, 1e-10, step < 1e-10),
        Row(
            "states held in a sweep over 100 steps with a checkpoint at every tenth",
            "T/k + k = 20",
            float(held),
            None,
            held <= 20,
        ),
    ]


def score_rows(task: str, results: list[dict[str, Any]]) -> list[Row]:
    """How well each rule tells good examples from others."""
    auc = {name: mean_error(r["auc"][name] for r in results) for name in RULES}
    rows = []
    for name, expected in zip(RULES, EXPECTED_AUC[task], strict=True):
        mean, error = auc[name]
        own = name == "costate" and task == "another task"
        rows.append(
            Row(
                f"{task}: area under the curve of {'the scores' if name == 'costate' else name}",
                "≥ 0.93" if own else expected,
                mean,
                error,
                mean >= 0.93 if own else abs(mean - expected) < 0.1 + 2 * error,
                f"{expected} in earlier runs" if own else "within 0.1 and two errors of earlier runs",
            )
        )
    gain, error = mean_error(r["auc"]["costate"] - r["auc"]["low loss"] for r in results)
    if task == "another task":
        rows.append(
            Row(
                f"{task}: scores against low loss, gain in area",
                "> 0.5",
                gain,
                error,
                gain > 0.5,
                "seed by seed",
            )
        )
    else:
        rows.append(
            Row(
                f"{task}: low loss is as good as the scores, gain in area of the scores",
                "≤ 0.02",
                gain,
                error,
                gain <= 0.02,
                "plain label noise needs no costate",
            )
        )
    mean, error = mean_error(r["carried"] for r in results)
    rows.append(
        Row(
            f"{task}: a linear scorer fitted to half of the pool, area on the other half",
            "> 0.8",
            mean,
            error,
            mean > 0.8,
            "features are products of pixels and label",
        )
    )
    return rows


def training_rows(task: str, results: list[dict[str, Any]]) -> list[Row]:
    """Accuracy of what was trained on the kept examples."""
    found = {name: mean_error(r["accuracy"][name] for r in results) for name in results[0]["accuracy"]}
    best, error = found["costate"]
    rows = [
        Row(f"{task}: test accuracy of what the scores keep", "≥ 0.85", best, error, best >= 0.85),
    ]
    gain, error = mean_error(r["accuracy"]["costate"] - r["accuracy"]["the target alone"] for r in results)
    clear = abs(gain) > 2 * error
    rows.append(
        Row(
            f"{task}: gain of what the scores keep over the target examples alone",
            "> 0",
            gain,
            error,
            gain > 0 if clear else None,
            "to two errors, seed by seed",
        )
    )
    if task == "another task":
        rows += [
            Row(f"{task}: test accuracy of {name}", "≤ 0.4", *found[key], found[key][0] <= 0.4)
            for key, name in (("low loss", "what low losses keep"), ("everything", "everything"))
        ]
    else:
        gain, error = mean_error(r["accuracy"]["costate"] - r["accuracy"]["at random"] for r in results)
        rows.append(
            Row(
                f"{task}: gain over as many at random",
                "> 0",
                gain,
                error,
                gain > 2 * error,
                "by more than two errors, seed by seed",
            )
        )
    return rows


def _figure(found: dict[str, list[dict[str, Any]]], costs: tuple[float, ...]) -> Figure:
    return Figure(
        "Telling what helps from what harms",
        partial(_draw, found=found, costs=costs),
        caption=(
            "Left: scores of a pool of which most belongs to a task with permuted labels. Middle: test accuracy of "
            "networks trained on what each rule keeps, with one standard error. Right: area under the target's loss "
            "over the rounds of the projected loop, relative to equal weights."
        ),
        alt="Histogram of scores; bars of accuracy; falling cost.",
        size=(10.2, 3.3),
        key="selection",
    )


def _draw(canvas: Any, found: dict[str, list[dict[str, Any]]], costs: tuple[float, ...]) -> None:
    left, middle, right = canvas.subplots(1, 3, width_ratios=[1.1, 1.4, 0.9])
    scores, good = found["another task"][0]["scores"]
    z = (scores - scores.mean()) / scores.std()
    edges = torch.linspace(-3, 3, 41).numpy()
    for mask, name, colour in ((~good, "permuted label", "second"), (good, "true label", "first")):
        left.hist(z[mask].clamp(-3, 3).numpy(), edges, color=role(colour), alpha=0.6, label=name)
    left.set(xlabel="score G, standard deviations", ylabel="examples")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=2)
    names = list(found["another task"][0]["accuracy"])
    for i, (task, colour) in enumerate(zip(TASKS, ("second", "first"), strict=True)):
        pairs = [mean_error(r["accuracy"][name] for r in found[task]) for name in names]
        places = [k + (i - 0.5) * 0.38 for k in range(len(names))]
        middle.barh(
            places,
            [mean for mean, _ in pairs],
            0.36,
            xerr=[error for _, error in pairs],
            color=role(colour),
            ecolor=role("ink"),
            label=task,
            alpha=0.85,
        )
    middle.set_yticks(range(len(names)), names)
    middle.invert_yaxis()
    middle.set(xlabel="test accuracy", xlim=(0, 1.0))
    middle.grid(False, axis="y")
    middle.legend(loc="upper center", bbox_to_anchor=(0.4, 1.17), ncols=2)
    right.plot(range(len(costs)), [cost / costs[0] for cost in costs], marker="o", color=role("first"))
    right.set(xlabel="round", ylabel="J over that of equal weights", ylim=(0, 1.05))
    right.xaxis.get_major_locator().set_params(integer=True)
