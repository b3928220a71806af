r"""Binary and ternary weights by the maximum principle, on handwritten digits.

The Hamiltonian of an affine layer is linear in its weights, and is minimised over −1 and +1 by a sign. Averaged over
steps, and taken only where it is large, this trains a network without real-valued weights: here 64-128-128-10, each
affine layer without bias before batch normalisation, with the squared hinge loss for binary and cross-entropy for
ternary weights.

Compared, in the same run, on the same seeds and batches, with

* the same network with real weights, trained by Adam,
* the signs of those weights, with the statistics of normalisation taken anew: what binary weights cost if nothing is
  trained for them,
* binary weights trained without the average (α = 0), and without threshold as well: the plain method of successive
  approximation.

Reference: Li & Hao (2018), arXiv:1803.01299.

Departures: digits of 8 × 8 pixels in place of MNIST, CIFAR-10 and SVHN; α starts at 0.99 and approaches 1 by the
factor 0.95 an epoch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.data import Dataset, digits
from bolza.optim import BinaryMSA, TernaryMSA
from bolza.optim.discrete import REFERENCE
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "li2018_discrete"
TITLE = "Binary and ternary weights by the maximum principle"
CLAIM = (
    "Networks whose weights are −1, (0) and +1 throughout, trained by signs of an averaged Hamiltonian, come close to "
    "those with real weights"
)
BATCH = 64
ARMS = {
    "real": "real weights, Adam",
    "signs": "signs of the real weights",
    "binary": "binary",
    "ternary": "ternary",
    "no average": "binary, α = 0",
    "plain": "binary, α = 0 and ρ = 0",
}


@dataclass(frozen=True)
class Budget:
    """Size of the experiment."""

    epochs: int = 15
    seeds: int = 3
    width: int = 128


BUDGETS = {"small": Budget(), "full": Budget(epochs=60, seeds=10, width=256)}


def network(width: int, seed: int) -> nn.Sequential:
    """64-width-width-10, each linear layer without bias before batch normalisation."""
    torch_state = torch.get_rng_state()
    torch.manual_seed(seed)
    sizes = [64, width, width, 10]
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU()]
    torch.set_rng_state(torch_state)
    return nn.Sequential(*layers[:-1])


def squared_hinge(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean of max(0, 1 − t z)² with the targets t = ±1.

    Example:
        >>> squared_hinge(torch.tensor([[2.0, -0.5]]), torch.tensor([0]))
        tensor(0.1250)
    """
    targets = 2 * F.one_hot(labels, outputs.shape[1]).to(outputs.dtype) - 1
    return F.relu(1 - targets * outputs).square().mean()


def train(
    net: nn.Sequential,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor, Tensor], Tensor],
    data: Dataset,
    epochs: int,
    seed: int,
    anneal: float = 1.0,
) -> list[float]:
    """Test accuracy after every epoch; α approaches 1 by the factor ``anneal`` an epoch."""
    draw = torch.Generator().manual_seed(seed)
    accuracies = []
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_x), generator=draw).split(BATCH):
            if len(batch) < 2:
                continue
            optimizer.zero_grad()
            loss(net(data.train_x[batch]), data.train_y[batch]).backward()
            optimizer.step()
        optimizer.param_groups[0]["lr"] *= anneal
        accuracies.append(accuracy(net, data))
    return accuracies


@torch.no_grad()
def accuracy(net: nn.Module, data: Dataset) -> float:
    """Share of the test samples that are classified rightly, by the running statistics."""
    net.eval()
    share = (net(data.test_x).argmax(1) == data.test_y).double().mean()
    net.train()
    return float(share)


@torch.no_grad()
def signs_of(net: nn.Sequential, data: Dataset) -> nn.Sequential:
    """The network with the signs of its weights, statistics of normalisation taken anew over the training set."""
    net = copy.deepcopy(net)
    for layer in net:
        if isinstance(layer, nn.Linear):
            layer.weight.copy_(torch.where(layer.weight >= 0, 1.0, -1.0))
        elif isinstance(layer, nn.BatchNorm1d):
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean
    net.train()
    net(data.train_x)
    return net


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Train discrete and real networks side by side.

    Args:
        scale: ``"small"``: 15 epochs, three seeds, 128 units a layer; ``"full"``: 60 epochs, ten seeds, 256 units.
        progress: called with the share done and a few words.

    Returns:
        Rows on the accuracies, a figure of their course.

    Example:
        >>> from bolza.studies import get
        >>> get("li2018_discrete").title
        'Binary and ternary weights by the maximum principle'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    data = digits()
    courses: dict[str, list[list[float]]] = {name: [] for name in ARMS if name != "signs"}
    signs: list[float] = []
    nonzero: list[float] = []
    off_alphabet = 0
    for seed in range(budget.seeds):
        for k, name in enumerate(courses):
            report((seed + k / len(courses)) / budget.seeds, f"{ARMS[name]}, seed {seed}")
            net = network(budget.width, seed)
            loss = F.cross_entropy if name in ("real", "ternary") else squared_hinge
            annealed = 1.0
            if name == "real":
                optimizer: torch.optim.Optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
            elif name == "ternary":
                optimizer, annealed = TernaryMSA(net, anneal=1.0), 0.95
            elif name == "binary":
                optimizer, annealed = BinaryMSA(net, anneal=1.0), 0.95
            else:
                optimizer = BinaryMSA(net, alpha=0.0, rho=0.0 if name == "plain" else 0.5, anneal=1.0)
            courses[name].append(train(net, optimizer, loss, data, budget.epochs, seed, annealed))
            weights = torch.cat(
                [layer.weight.detach().flatten() for layer in net if isinstance(layer, nn.Linear)]
            )
            if name == "real":
                signs.append(accuracy(signs_of(net, data), data))
            else:
                known = (weights.abs() == 1) | ((weights == 0) & (name == "ternary"))
                off_alphabet += int((~known).sum())
            if name == "ternary":
                nonzero.append(float((weights != 0).double().mean()))
    report(1.0, "done")
    ends = {name: [course[-1] for course in found] for name, found in courses.items()} | {"signs": signs}
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        _rows(ends, nonzero, off_alphabet, budget),
        (_figure(courses, signs),),
        notes=(
            f"Digits of 8 × 8 pixels, 64-{budget.width}-{budget.width}-10 with batch normalisation, batches of "
            f"{BATCH}, {budget.epochs} epochs, {budget.seeds} seeds; accuracy on 359 test images.",
            "The first layer sees real pixels, and batch normalisation has real scales and shifts, as in the paper.",
            "Batch normalisation matters: without it sums of ±1 grow by √fan_in in every layer.",
        ),
        facts={"accuracy": ends, "nonzero": nonzero},
    )


def _rows(ends: dict[str, list[float]], nonzero: list[float], off_alphabet: int, budget: Budget) -> list[Row]:
    rows = [
        Row(
            "weights that were not in their alphabet at the end, of all discrete networks",
            0,
            off_alphabet,
            None,
            off_alphabet == 0,
            "there are no other weights: the optimizer keeps an average of derivatives, which is never added to one",
        )
    ]
    real, _ = mean_error(ends["real"])
    for name in ("binary", "ternary"):
        mean, error = mean_error(ends[name])
        rows.append(Row(f"test accuracy with {name} weights", "> 0.85", mean, error, mean > 0.85))
        gaps = [a - b for a, b in zip(ends["real"], ends[name], strict=True)]
        gap, error = mean_error(gaps)
        rows.append(
            Row(
                f"accuracy that {name} weights lose against real ones",
                "at most 0.025",
                gap,
                error,
                gap <= 0.025,
                f"real weights, Adam: {real:.3f}; differences seed by seed",
            )
        )
    gain, error = mean_error([a - b for a, b in zip(ends["binary"], ends["signs"], strict=True)])
    rows.append(
        Row(
            "accuracy gained over the signs of real weights",
            "> 0",
            gain,
            error,
            True if gain > 2 * error else False if gain < -2 * error else None,
            "the signs of the trained real weights reach {:.3f} ± {:.3f}; judged to two standard errors".format(
                *mean_error(ends["signs"])
            ),
        )
    )
    loss, error = mean_error([a - b for a, b in zip(ends["binary"], ends["no average"], strict=True)])
    rows.append(
        Row(
            "accuracy that the average brings",
            "> 0",
            loss,
            error,
            loss > 2 * error,
            "without it: {:.3f} ± {:.3f}".format(*mean_error(ends["no average"])),
        )
    )
    mean, error = mean_error(ends["plain"])
    rows.append(
        Row(
            "test accuracy of the plain method, all signs taken at each step",
            "about chance, 0.1",
            mean,
            error,
            mean < 0.25,
        )
    )
    mean, error = mean_error(nonzero)
    rows.append(Row("share of ternary weights that are not zero", "most", mean, error, mean > 0.5))
    return rows


def _figure(courses: dict[str, list[list[float]]], signs: list[float]) -> Figure:
    return Figure(
        "Training weights that are only ever −1 and +1",
        partial(_draw, courses=courses, signs=signs),
        caption="Test accuracy after each epoch, mean and range over seeds. The dotted line is the real network with "
        "its weights replaced by their signs.",
        alt="Accuracy over epochs for real, binary and ternary weights and two ablations.",
        size=(8.4, 4.2),
        key="accuracy",
    )


def _draw(canvas: Any, courses: dict[str, list[list[float]]], signs: list[float]) -> None:
    axes = canvas.subplots()
    colours = {
        "real": "muted",
        "binary": "first",
        "ternary": "second",
        "no average": "third",
        "plain": "fourth",
    }
    for name, found in courses.items():
        values = torch.tensor(found, dtype=torch.float64)
        epochs = range(1, values.shape[1] + 1)
        colour = role(colours[name])
        axes.plot(epochs, values.mean(0), color=colour, label=ARMS[name])
        axes.fill_between(epochs, values.amin(0), values.amax(0), color=colour, alpha=0.15, linewidth=0)
    axes.axhline(mean_error(signs)[0], color=role("muted"), linestyle=":", label=ARMS["signs"])
    axes.set(xlabel="epoch", ylabel="test accuracy", ylim=(0, 1.02))
    axes.legend(loc="center right")
