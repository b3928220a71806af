r"""Differential dynamic programming of layers: exact identities, and learning rates that are too large.

The rank-one sweep is compared with the sweep by matrices, and the optimizer without feedback with torch's. Then a tanh
network is trained on digits at four learning rates, by gradient descent and with feedback, from the same start and on
the same batches; what feedback adds to each step is drawn by layer.

Reference: Liu, Chen & Theodorou (2021), arXiv:2002.08809.

Departures: the damped form, which the paper does not have, at the batch size 16 of the paper's dense experiments;
64-32×4-10 tanh with PyTorch's initialisation, whole batches only, pixels in [0, 1], a
stratified split of 1347 and 450 samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.core import TerminalCost, adjoint, linearize, rollout
from bolza.models import mlp
from bolza.ops.bellman import bellman_sweep
from bolza.optim import DDPNOpt, value_factors
from bolza.optim.ddp import REFERENCE
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult
from bolza.systems import as_system

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "liu2021_ddpnopt"
TITLE = "Feedback from layer to layer"
CLAIM = (
    "Layers that respond to the change of the layers before them train at rates where gradient descent fails"
)
BATCH = 16
RATES = (0.3, 0.7, 1.0, 1.5)
BUDGETS: dict[str, dict[str, Any]] = {
    "small": {"epochs": 5, "seeds": 2, "rates": (0.3, 1.0)},
    "full": {"epochs": 5, "seeds": 6, "rates": RATES},
}

Make = Callable[[nn.Module, float], torch.optim.Optimizer]
METHODS: dict[str, Make] = {
    "descent": lambda net, lr: torch.optim.SGD(net.parameters(), lr),
    "paper": lambda net, lr: DDPNOpt(net, lr, mode="paper"),
    "damped": lambda net, lr: DDPNOpt(net, lr),
}
LABELS = {"descent": "gradient descent", "paper": "feedback, as published", "damped": "feedback, damped"}


def network(*sizes: int) -> nn.Sequential:
    """A tanh network."""
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def split(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels in [0, 1] and labels, stratified: training and test pixels, training and test labels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        images / 16, labels, test_size=0.25, stratify=labels, random_state=seed
    )
    return torch.tensor(x).float(), torch.tensor(x_test).float(), torch.tensor(y), torch.tensor(y_test)


def train(make: Make, lr: float, epochs: int, seed: int) -> float:
    """Test accuracy after some epochs; chance where it diverged."""
    x, x_test, y, y_test = split(seed)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        net = mlp(5, 32)
    optimizer, draw = make(net, lr), torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=draw)[: len(x) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x[rows]), y[rows])
            if not bool(loss.isfinite()):
                return 0.1
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return float((net(x_test).argmax(1) == y_test).float().mean())


def sweep_difference(lr: float = 0.05) -> float:
    """Largest difference of V_x and V_xx between two numbers a layer and matrices."""
    torch_state = torch.random.get_rng_state()
    torch.random.default_generator.manual_seed(0)
    net, x = network(5, 6, 4, 3).double(), torch.randn(1, 5, dtype=torch.float64)
    torch.random.set_rng_state(torch_state)
    system = as_system(net, x)
    run = adjoint(system, TerminalCost(F.cross_entropy, torch.tensor([1])), rollout(system, x))
    assert run.costates is not None and run.gradients is not None
    value = run.costates[-1].flatten()
    hessian = torch.outer(value, value)
    norms = torch.stack([lr * sum(g.square().sum() for g in u.values())[None] for u in run.gradients])
    factors = value_factors(norms, batch=1, scale=1.0, mode="paper")
    worst = 0.0
    for t in reversed(range(system.horizon)):
        A, B = linearize(system, t, run.states[t].detach()).matrices()
        Qu, Qux = B.T @ value, B.T @ hessian @ A
        value, hessian = A.T @ value - lr * Qux.T @ Qu, A.T @ hessian @ A - lr * Qux.T @ Qux
        p = run.costates[t].flatten()
        for found, exact in (
            (factors.beta[t] * p, value),
            (factors.alpha[t] ** 2 * torch.outer(p, p), hessian),
        ):
            worst = max(worst, float((found - exact).abs().max()))
    return worst


def distance_to_torch(steps: int = 20) -> float:
    """Largest difference of the weights from torch's, without feedback."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 5, generator=draw), torch.randint(0, 3, (16,), generator=draw)
    worst = 0.0
    pairs: tuple[tuple[Literal["identity", "rmsprop"], Any], ...] = (
        ("identity", torch.optim.SGD),
        ("rmsprop", torch.optim.RMSprop),
    )
    for curvature, other in pairs:
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(0)
            net = network(5, 6, 4, 3)
        twin = copy.deepcopy(net)
        for model, optimizer in (
            (net, DDPNOpt(net, 0.01, curvature=curvature, feedback=False)),
            (twin, other(twin.parameters(), 0.01)),
        ):
            for _ in range(steps):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        weights = zip(net.parameters(), twin.parameters(), strict=True)
        worst = max(worst, *(float((a - b).detach().abs().max()) for a, b in weights))
    return worst


def chain() -> tuple[float, float, float, float]:
    """Costs of a linear-quadratic chain: at the start, after a sweep, after stage-wise steps; and |sweep − optimum|."""
    draw = torch.Generator().manual_seed(0)
    T, n, m = 6, 4, 3

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    A, B = [0.8 * normal(n, n) for _ in range(T)], [normal(n, m) for _ in range(T)]
    Q, R, goal, x0 = (
        torch.eye(n, dtype=torch.float64),
        0.1 * torch.eye(m, dtype=torch.float64),
        normal(n),
        normal(n),
    )

    def states(u: list[Tensor]) -> list[Tensor]:
        x = [x0]
        for t in range(T):
            x.append(A[t] @ x[-1] + B[t] @ u[t])
        return x

    def cost(u: list[Tensor]) -> Tensor:
        return (states(u)[-1] - goal).square().sum() / 2 + sum(0.1 * v.square().sum() / 2 for v in u)

    sweep = bellman_sweep(A, B, 0 * Q, R, Q, terminal_gradient=-goal[:, None])
    x, policy, stagewise = x0, [], []
    for t in range(T):
        policy.append(sweep.K[t] @ x + sweep.k[t][:, 0])
        x = A[t] @ x + B[t] @ policy[-1]
    start = [torch.zeros(m, dtype=torch.float64) for _ in range(T)]
    along = states(start)  # the plain step of each stage, with the others as they were
    for t in range(T):
        stagewise.append(sweep.K[t] @ along[t] + sweep.k[t][:, 0])
    joint = torch.zeros(T * m, dtype=torch.float64)
    gradient = torch.func.grad(lambda v: cost(list(v.split(m))))(joint)
    newton = torch.func.hessian(lambda v: cost(list(v.split(m))))(joint)
    optimum = -torch.linalg.solve(newton, gradient)
    gap = float((torch.cat(policy) - optimum).abs().max())
    return float(cost(start)), float(cost(policy)), float(cost(stagewise)), gap


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Check the identities, and train at learning rates from good to far too large.

    Args:
        scale: ``"small"``: two rates and seeds; ``"full"``: four rates, six seeds.
        progress: called with the share done and a few words.

    Returns:
        Rows on identities and accuracies, one figure.

    Example:
        >>> from bolza.studies import get
        >>> get("liu2021_ddpnopt").reference.year
        2021
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    start, swept, stagewise, gap = chain()
    rank, torch_gap = sweep_difference(), distance_to_torch()
    rows = [
        Row(
            "rank-one sweep against the sweep by matrices, largest difference", 0.0, rank, None, rank < 1e-12
        ),
        Row("one sweep of a linear chain against the joint optimum", 0.0, gap, None, gap < 1e-12),
        Row(
            "cost of that chain: at the start, by the sweep, by plain steps of each stage",
            "only the sweep lowers it",
            f"{start:.3g}, {swept:.3g}, {stagewise:.3g}",
            None,
            swept < start < stagewise,
        ),
        Row(
            "without feedback, difference from torch.optim after 20 steps",
            0.0,
            torch_gap,
            None,
            torch_gap < 1e-6,
        ),
    ]
    found: dict[tuple[str, float], list[float]] = {}
    jobs = [(method, lr) for lr in budget["rates"] for method in METHODS]
    for i, (method, lr) in enumerate(jobs):
        report(i / len(jobs), f"{LABELS[method]} at {lr:g}")
        found[method, lr] = [
            train(METHODS[method], lr, budget["epochs"], seed) for seed in range(budget["seeds"])
        ]
    report(1.0, "done")
    rows += accuracy_rows(found, budget["rates"])
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        rows,
        (_figure(found, budget["rates"]),),
        notes=(
            f"Means over {budget['seeds']} seeds with standard errors; {budget['epochs']} epochs, batch {BATCH}.",
            "Rates are not tuned for either side; the plain run at a large rate is the case the claim is about.",
        ),
        facts={f"{method} at {lr:g}": values for (method, lr), values in found.items()},
    )


def accuracy_rows(found: dict[tuple[str, float], list[float]], rates: tuple[float, ...]) -> list[Row]:
    """Accuracy of the three methods at each rate, and what the claim says of it."""
    rows = []
    for lr in rates:
        plain, damped = (torch.tensor(found[method, lr]) for method in ("descent", "damped"))
        error = float(damped.std() / len(damped) ** 0.5)
        if lr >= 1:
            name, expected = f"accuracy at rate {lr:g}, damped feedback", "at least 0.9, descent at most 0.5"
            holds = bool(damped.mean() >= 0.9 and plain.mean() <= 0.5)
        else:
            name, expected = f"accuracy at rate {lr:g}, damped feedback", "descent's, less 0.02 at most"
            holds = bool(damped.mean() >= plain.mean() - 0.02)
        others = ", ".join(
            f"{LABELS[method]} {torch.tensor(found[method, lr]).mean():.3f}"
            for method in ("descent", "paper")
        )
        rows.append(Row(name, expected, float(damped.mean()), error, holds, others))
    return rows


def _figure(found: dict[tuple[str, float], list[float]], rates: tuple[float, ...]) -> Figure:
    return Figure(
        "Test accuracy against the learning rate",
        partial(_draw, found=found, rates=rates),
        caption="Every seed, and the mean. The same starts and batches for all three.",
        alt="Accuracies of gradient descent and of feedback in two forms over learning rates.",
        size=(6.4, 3.6),
        key="rates",
    )


def _draw(canvas: Any, found: dict[tuple[str, float], list[float]], rates: tuple[float, ...]) -> None:
    axes = canvas.subplots()
    places = torch.arange(len(rates), dtype=torch.float64)
    for i, (method, colour) in enumerate((("descent", "second"), ("paper", "muted"), ("damped", "first"))):
        at = places + 0.12 * (i - 1)
        for place, lr in zip(at, rates, strict=True):
            axes.plot(
                [float(place)] * len(found[method, lr]),
                found[method, lr],
                "o",
                color=role(colour),
                alpha=0.35,
                ms=4,
            )
        means = [sum(found[method, lr]) / len(found[method, lr]) for lr in rates]
        axes.plot(at, means, "-", color=role(colour), label=LABELS[method], linewidth=2)
    axes.axhline(0.1, color=role("muted"), linewidth=0.8, linestyle=":")
    axes.set(xlabel="learning rate", ylabel="test accuracy", ylim=(0, 1))
    axes.set_xticks(places, [f"{lr:g}" for lr in rates])
    axes.legend(loc="center left")
