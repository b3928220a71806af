r"""Late-phase weights: an ensemble of a few weights that is averaged at the end.

    φ_k ← U(φ_k, ∇_φ L_k),   θ ← U(θ, γ Σ_k ∇_θ L_k),   at the end φ ← mean_k φ_k

The paper reports better accuracy from versions of normalisation weights and head in the last part of training, for
large networks on CIFAR and ImageNet, and worse from versions that part at the first step. Two things are measured
here: the law behind it, on a noisy quadratic, where the mean of K versions has a K-th of the variance of
descent if the shared weights are frozen, or follow the mean gradient; and a small convolutional network with batch
normalisation on digits: trained as usual, with versions in the last part, and with versions from the start.

Reference: von Oswald, Kobayashi, Meulemans, Henning, Grewe & Sacramento (2021), arXiv:2007.12927.

Departures: a network of three layers on digits; constant learning rate. Each version sees its own mini-batches, as
published, so the shared weights take one step for K batches: equal epochs are equal batches.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from bolza.data import digits_images
from bolza.optim import LatePhase
from bolza.optim.late_phase import REFERENCE
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "oswald2021_late_phase"
TITLE = "Averaging versions of a few weights, late"
CLAIM = (
    "Late-phase versions of normalisation weights and head improve accuracy; versions from the start harm it"
)
MEMBERS = (2, 5, 10)


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    epochs: int = 12
    start: int = 8
    members: int = 10
    seeds: int = 3
    channels: int = 8
    train: int = 600
    chains: int = 20_000
    rounds: int = 60


BUDGETS = {
    "small": Budget(),
    "full": Budget(epochs=40, start=24, seeds=8, channels=24, train=1438, chains=200_000),
}


class Sum(nn.Module):
    """Shared θ and late φ that act as θ + φ, for many chains at once."""

    def __init__(self, chains: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(chains, dtype=torch.float64))
        self.phi = nn.Parameter(torch.zeros(chains, dtype=torch.float64))


def variance_ratio(
    members: int, gamma: float | None, chains: int, lr: float = 0.1, rounds: int = 60
) -> float:
    """Variance of θ + mean φ_k on ½ w² with unit gradient noise, over that of descent, η/(2 − η).

    ``gamma=None`` freezes θ.
    """
    net, draw = Sum(chains), torch.Generator().manual_seed(members)
    net.theta.requires_grad_(gamma is not None)
    optimizer = LatePhase(net, lr, members=members, start=0, late=[net.phi], gamma=gamma, momentum=0.0)
    for _ in range(rounds * members):
        noise = torch.randn(chains, generator=draw, dtype=torch.float64)
        gradient = net.theta.detach() + net.phi.detach() + noise
        net.theta.grad, net.phi.grad = (None if gamma is None else gradient), gradient
        optimizer.step()
    optimizer.finish()
    return float((net.theta + net.phi).detach().var()) * (2 - lr) / lr


def network(channels: int, seed: int) -> nn.Sequential:
    """Three convolutions with batch normalisation, and a linear head."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        layers: list[nn.Module] = []
        for fan_in, stride in ((1, 1), (channels, 2), (channels, 2)):
            layers += [
                nn.Conv2d(fan_in, channels, 3, stride, 1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            ]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * channels, 10))


def train(start: int | None, budget: Budget, seed: int) -> tuple[list[float], float]:
    """Test error after each epoch (of the mean of the versions), and the last test loss; ``None``: no versions."""
    data = digits_images()
    x, y = data.train_x[: budget.train], data.train_y[: budget.train]
    net = network(budget.channels, seed)
    batches = -(-len(x) // 32)
    begin = None if start is None else start * batches
    optimizer = LatePhase(net, lr=0.05, members=budget.members, start=begin, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    errors, loss = [], 0.0
    for _ in range(budget.epochs):
        for rows in torch.randperm(len(x), generator=draw).split(32):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
        error, loss = evaluate(net, optimizer, x, data.test_x, data.test_y)
        errors.append(error)
    return errors, loss


def evaluate(
    net: nn.Module, optimizer: LatePhase, x: Tensor, x_test: Tensor, y_test: Tensor
) -> tuple[float, float]:
    """Test error and loss of a copy with the mean of the versions and statistics of the whole training set."""
    mean = copy.deepcopy(net)
    with torch.no_grad():
        for p, q in zip(mean.parameters(), net.parameters(), strict=True):
            p.copy_(optimizer.mean(q))
        update_bn([x], mean)
        outputs = mean.eval()(x_test)
    return float((outputs.argmax(1) != y_test).float().mean()), float(F.cross_entropy(outputs, y_test))


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Measure the variances, and train in three ways.

    Args:
        scale: ``"small"``: 8 channels, 600 images, 12 epochs, three seeds; ``"full"``: 24 channels, all images, 40
            epochs, eight seeds.
        progress: called with the share done and a few words.

    Returns:
        Rows on variances and test errors, one figure.

    Example:
        >>> from bolza.studies import get
        >>> get("2007.12927").key
        'oswald2021_late_phase'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "noisy quadratic")
    frozen = {k: variance_ratio(k, None, budget.chains // k, rounds=budget.rounds) for k in MEMBERS}
    following = {
        gamma: variance_ratio(10, gamma, budget.chains // 10, rounds=budget.rounds) for gamma in (0.1, 1.0)
    }
    ways: dict[str, int | None] = {"base": None, "late": budget.start, "from the start": 0}
    errors: dict[str, list[list[float]]] = {name: [] for name in ways}
    for seed in range(budget.seeds):
        for i, (name, start) in enumerate(ways.items()):
            report(0.1 + 0.9 * (3 * seed + i) / (3 * budget.seeds), f"training, {name}, seed {seed}")
            errors[name].append(train(start, budget, seed)[0])
    report(1.0, "done")
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        [*variance_rows(frozen, following, budget), *error_rows(errors)],
        (_figure(frozen, following, errors, budget),),
        notes=(
            f"Digits, {budget.train} training images, three convolutions of {budget.channels} channels, K = "
            f"{budget.members}, versions from epoch {budget.start} of {budget.epochs}, {budget.seeds} paired seeds.",
            "Batch statistics are recomputed on the whole training set before each test.",
        ),
        facts={"frozen": {str(k): v for k, v in frozen.items()}, "errors": errors},
    )


def variance_rows(frozen: dict[int, float], following: dict[float, float], budget: Budget) -> list[Row]:
    """The law on a noisy quadratic, with the standard error of a variance."""
    rows = []
    for k, ratio in frozen.items():
        error = ratio * (2 / (budget.chains // k)) ** 0.5
        rows.append(
            Row(
                f"variance of the mean of {k} versions over that of descent, shared weights frozen",
                1 / k,
                ratio,
                error,
                abs(ratio - 1 / k) < 4 * error,
                "judged to four standard errors",
            )
        )
    n = (2 / (budget.chains // 10)) ** 0.5
    quiet, loud = following[0.1], following[1.0]
    rows.append(
        Row("the same with ten versions and γ = 1/10", "below 1", quiet, quiet * n, quiet < 1 - 4 * quiet * n)
    )
    rows.append(
        Row("the same with ten versions and γ = 1", "above 1", loud, loud * n, loud > 1 + 4 * loud * n)
    )
    return rows


def error_rows(errors: dict[str, list[list[float]]]) -> list[Row]:
    """Test errors at the end, seed by seed."""
    final = {
        name: torch.tensor([e[-1] for e in value], dtype=torch.float64) for name, value in errors.items()
    }
    rows = []
    for name, claim, sign in (
        ("late", "versions late: test error minus that of the base run", -1),
        ("from the start", "versions from the start: test error minus that of the base run", 1),
    ):
        mean, error = mean_error((final[name] - final["base"]).tolist())
        rows.append(
            Row(
                claim,
                "below 0" if sign < 0 else "above 0",
                mean,
                error,
                sign * mean > 2 * error,
                f"{float(final[name].mean()):.4f} against {float(final['base'].mean()):.4f}; judged to two errors",
            )
        )
    return rows


def _figure(
    frozen: dict[int, float],
    following: dict[float, float],
    errors: dict[str, list[list[float]]],
    budget: Budget,
) -> Figure:
    return Figure(
        "A K-th of the noise, and what a small network makes of it",
        partial(_draw, frozen=frozen, following=following, errors=errors, budget=budget),
        caption="Left: variance on a noisy quadratic over that of descent; the line is 1/K. Right: test error over "
        "epochs, mean and range over seeds.",
        alt="Variance ratio over the number of versions; test error over epochs of three ways of training.",
        size=(9.2, 3.5),
        key="late",
    )


def _draw(
    canvas: Any,
    frozen: dict[int, float],
    following: dict[float, float],
    errors: dict[str, list[list[float]]],
    budget: Budget,
) -> None:
    left, right = canvas.subplots(1, 2)
    ks = torch.linspace(1, 10, 50)
    left.plot(ks, 1 / ks, color=role("muted"), label="1/K")
    left.plot(
        list(frozen),
        list(frozen.values()),
        "o",
        color=role("second"),
        label="shared weights frozen",
        markersize=6,
    )
    for (gamma, ratio), marker in zip(following.items(), ("D", "s"), strict=True):
        left.plot([10], [ratio], marker, color=role("first"), label=f"γ = {gamma:g}", markersize=6)
    left.axhline(1, color=role("grid"))
    left.set(xlabel="versions K", ylabel="variance over that of descent", ylim=(0, None))
    left.legend()
    looks = {"base": ("ink", "-"), "late": ("second", "--"), "from the start": ("first", ":")}
    for name, (colour, dash) in looks.items():
        values = torch.tensor(errors[name])
        epochs = range(1, values.shape[1] + 1)
        right.plot(epochs, values.mean(0), dash, color=role(colour), label=name, linewidth=2)
        right.fill_between(
            epochs, values.amin(0), values.amax(0), color=role(colour), alpha=0.12, linewidth=0
        )
    right.axvline(budget.start, color=role("muted"), linewidth=0.8)
    right.set(xlabel="epoch", ylabel="test error", ylim=(0, 0.3))
    right.legend()
