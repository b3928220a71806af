r"""Neural ODEs: a layer that is the solution of a differential equation.

What can be checked on any machine: fixed-step solvers have their orders; the adjoint equation gives the gradient to
the tolerance of the solver, and its memory does not grow with the number of evaluations; a flow on a line preserves
the order of points, so that no Neural ODE maps −1 to 1 and 1 to −1; one block in the place of several residual blocks
classifies as well with fewer parameters; the number of evaluations that an adaptive solver takes grows in training.

Reference: Chen, Rubanova, Bettencourt & Duvenaud (2018), arXiv:1806.07366, §2, §3 and appendix B. That flows cannot
cross is in Dupont, Doucet & Teh (2019), *Augmented Neural ODEs*, arXiv:1904.01681, §2.

Departures: 8×8 digits and vectors instead of MNIST and convolutions; fixed RK4 steps in training, dopri5 beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bolza.data import Dataset, digits
from bolza.models.continuous import ContinuousBlock, NeuralODE, Piecewise
from bolza.models.continuous.block import CHEN as REFERENCE
from bolza.report import Figure, log_axis, role
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "chen2018_neural_ode"
TITLE = "Neural ordinary differential equations"
CLAIM = (
    "A layer defined by a differential equation can be trained by its adjoint equation in constant memory, and needs "
    "fewer parameters than the residual blocks it replaces"
)
ORDERS = {"euler": 1, "midpoint": 2, "rk4": 4}


@dataclass(frozen=True)
class Budget:
    """Size of the experiment."""

    tolerances: tuple[float, ...] = (1e-2, 1e-4, 1e-6)
    seeds: int = 3
    epochs: int = 8
    line_steps: int = 120
    width: int = 32
    blocks: int = 6


BUDGETS = {
    "small": Budget(),
    "full": Budget(tolerances=(1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7), seeds=8, epochs=30, line_steps=500),
}


def field(width: int, hidden: int) -> nn.Sequential:
    """W₂ tanh(W₁ x + b₁) + b₂."""
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width))


def orders() -> dict[str, tuple[list[int], list[float]]]:
    """Errors of a rotating, decaying linear flow against the exponential of its matrix, by number of steps."""
    a = torch.tensor([[-0.3, 2.0], [-2.0, -0.3]], dtype=torch.float64)
    layer, x = nn.Linear(2, 2, bias=False, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    layer.weight.data.copy_(a)
    exact, counts, out = torch.linalg.matrix_exp(a).T, [8, 16, 32, 64], {}
    with torch.no_grad():
        for method in ORDERS:
            block = NeuralODE(layer, method=method)
            out[method] = counts, [float((block(x, steps=n) - exact).norm()) for n in counts]
    return out


def adjoint_errors(tolerances: tuple[float, ...]) -> list[float]:
    """Relative error of the adaptive adjoint's gradient, against back-propagation through fine RK4 steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block, x = NeuralODE(field(8, 16), horizon=2.0).double(), torch.randn(16, 8, dtype=torch.float64)

    def gradient() -> Tensor:
        found = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
        return torch.cat([g.flatten() for g in found])

    block.steps = 100
    exact = gradient()
    block.method, block.gradient, out = "dopri5", "adjoint", []
    for tolerance in tolerances:
        block.rtol = block.atol = tolerance
        out.append(float((gradient() - exact).norm() / exact.norm()))
    return out


def kept(gradient: str, steps: int) -> int:
    """Bytes that the graph of one forward pass keeps, each tensor once."""
    block, x, sizes = NeuralODE(field(32, 64), steps=steps, gradient=gradient), torch.randn(64, 32), {}

    def note(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        block(x)
    return sum(sizes.values())


def reflection(steps: int, augmented: bool) -> float:
    """Mean square error after training on x → −x for x in {−1, 1}; with a second coordinate if augmented."""
    x = torch.tensor([[-1.0], [1.0]])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = NeuralODE(field(2 if augmented else 1, 16), steps=6)
    optimizer = torch.optim.Adam(net.parameters(), 0.03)
    start = torch.cat([x, torch.zeros_like(x)], 1) if augmented else x
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (net(start)[:, :1] + x).square().mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@cache
def _digits() -> Dataset:
    return digits()


@dataclass(frozen=True)
class Classifier:
    """A trained classifier: test accuracy, parameters, evaluations that dopri5 takes before and after training."""

    accuracy: float
    parameters: int
    before: int
    after: int


def classify(kind: str, seed: int, budget: Budget) -> Classifier:
    """Train on digits: a Neural ODE with RK4, or as many residual blocks as it has evaluations."""
    data, draw = _digits(), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = budget.width
        if kind == "ode":
            body: ContinuousBlock = NeuralODE(field(width, width), horizon=2.0, steps=2)
        else:
            cells = Piecewise(partial(field, width, width), budget.blocks)
            body = ContinuousBlock(cells, horizon=budget.blocks, method="euler", steps=budget.blocks)
        net = nn.Sequential(nn.Linear(64, width), body, nn.Linear(width, 10))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)

    @torch.no_grad()
    def evaluations() -> int:
        if kind != "ode":
            return 0
        body(net[0](data.test_x), method="dopri5")
        return body.evaluations

    before = evaluations()
    for _ in range(budget.epochs):
        for rows in torch.randperm(len(data), generator=draw).split(64):
            optimizer.zero_grad()
            cross_entropy(net(data.train_x[rows]), data.train_y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        right = float((net(data.test_x).argmax(1) == data.test_y).double().mean())
    return Classifier(right, sum(p.numel() for p in body.parameters()), before, evaluations())


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Measure orders, adjoint, memory, what a flow cannot do, and a classifier.

    Args:
        scale: ``"small"``: 3 seeds of 8 epochs; ``"full"``: 8 seeds of 30 epochs, more tolerances.
        progress: called with the share done and a few words.

    Returns:
        Rows, and a figure of orders, adjoint errors and memory.

    Example:
        >>> from bolza.studies import get
        >>> get("chen2018_neural_ode").title
        'Neural ordinary differential equations'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "orders of the solvers")
    measured = orders()
    report(0.1, "adjoint equation")
    errors = adjoint_errors(budget.tolerances)
    counts = (5, 10, 20, 40)
    memory = {g: [kept(g, n) for n in counts] for g in ("autograd", "checkpoint", "adjoint")}
    report(0.2, "reflection of a line")
    line, plane = reflection(budget.line_steps, False), reflection(budget.line_steps, True)
    results: dict[str, list[Classifier]] = {"ode": [], "residual": []}
    for k in range(budget.seeds):
        for i, (kind, found) in enumerate(results.items()):
            report(0.3 + 0.7 * (2 * k + i) / (2 * budget.seeds), f"digits, seed {k}, {kind}")
            found.append(classify(kind, k, budget))
    report(1.0, "done")
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        rows(measured, budget, errors, counts, memory, line, plane, results),
        (_figure(measured, budget, errors, counts, memory),),
        notes=(
            "Memory is that of the tensors which the graph of one forward pass keeps, weights included.",
            f"The classifier has a state of {budget.width} numbers; {budget.blocks} residual blocks of the same form "
            "stand against one field.",
        ),
        facts={
            "orders": {m: e for m, (_, e) in measured.items()},
            "adjoint_errors": dict(zip(map(str, budget.tolerances), errors, strict=True)),
            "bytes": {g: dict(zip(map(str, counts), sizes, strict=True)) for g, sizes in memory.items()},
            "classifiers": {kind: [vars(c) for c in found] for kind, found in results.items()},
        },
    )


def rows(
    measured: dict[str, tuple[list[int], list[float]]],
    budget: Budget,
    errors: list[float],
    counts: tuple[int, ...],
    memory: dict[str, list[int]],
    line: float,
    plane: float,
    results: dict[str, list[Classifier]],
) -> list[Row]:
    """The claims, judged."""
    out = []
    for method, order in ORDERS.items():
        found = math.log2(measured[method][1][-2] / measured[method][1][-1])
        out.append(
            Row(
                f"order of {method}", order, found, None, abs(found - order) < 0.1, "last halving of the step"
            )
        )
    last = budget.tolerances[-1]
    out.append(
        Row(
            f"relative error of the adjoint's gradient at tolerance {last:g}",
            "below 1e-4",
            errors[-1],
            None,
            errors[-1] < 1e-4 and errors[-1] < errors[0],
            f"{errors[0]:.1e} at tolerance {budget.tolerances[0]:g}",
        )
    )
    growth = {g: sizes[-1] / sizes[0] for g, sizes in memory.items()}
    out.append(
        Row(
            f"memory of the adjoint, {counts[-1]} over {counts[0]} steps",
            1.0,
            growth["adjoint"],
            None,
            growth["adjoint"] == 1.0,
            f"back-propagation {growth['autograd']:.1f}, checkpoints {growth['checkpoint']:.1f}; at {counts[-1]} steps "
            f"the adjoint keeps 1/{memory['autograd'][-1] / memory['adjoint'][-1]:.0f} of what back-propagation does",
        )
    )
    out.append(
        Row(
            "mean square error on x → −x in one dimension, where paths cannot cross",
            "1 at best",
            line,
            None,
            line > 0.99,
            f"with a second coordinate {plane:.1e} after as many steps",
        )
    )
    right = {k: torch.tensor([c.accuracy for c in cs], dtype=torch.float64) for k, cs in results.items()}
    gap = right["ode"] - right["residual"]
    error = float(gap.std() / len(gap) ** 0.5) if len(gap) > 1 else 0.0
    ratio = results["residual"][0].parameters / results["ode"][0].parameters
    mean = float(gap.mean())
    out.append(
        Row(
            f"test accuracy on digits over that of {budget.blocks} residual blocks, which have {ratio:.0f} times the "
            "parameters",
            "about 0",
            mean,
            error,
            True if mean >= -0.01 else None if mean + 2 * error >= -0.01 else False,
            f"at least −0.01; accuracy {float(right['ode'].mean()):.3f}",
        )
    )
    grown = torch.tensor([c.after / c.before for c in results["ode"]], dtype=torch.float64)
    out.append(
        Row(
            "evaluations that dopri5 takes after training over before it",
            "grows",
            float(grown.mean()),
            float(grown.std() / len(grown) ** 0.5) if len(grown) > 1 else None,
            bool((grown > 1).all()),
            f"from {results['ode'][0].before} to {results['ode'][0].after} for the first seed",
        )
    )
    return out


def _figure(
    measured: dict[str, tuple[list[int], list[float]]],
    budget: Budget,
    errors: list[float],
    counts: tuple[int, ...],
    memory: dict[str, list[int]],
) -> Figure:
    return Figure(
        "Solver, adjoint, memory",
        partial(_draw, measured=measured, budget=budget, errors=errors, counts=counts, memory=memory),
        caption="Left: error of the flow against the number of steps, with the slopes 1, 2 and 4. Middle: error of the "
        "adjoint's gradient against the tolerance. Right: what a forward pass keeps for the backward one.",
        alt="Three panels on logarithmic axes: orders of solvers, error of the adjoint, memory against steps.",
        size=(9.6, 3.6),
        key="solver",
    )


def _draw(canvas: Any, measured: Any, budget: Budget, errors: Any, counts: Any, memory: Any) -> None:
    left, middle, right = canvas.subplots(1, 3)
    for (method, (steps, found)), colour, marker in zip(
        measured.items(), ("first", "second", "third"), "osD", strict=True
    ):
        left.plot(steps, found, marker, color=role(colour), label=method)
        guide = [found[-1] * (steps[-1] / n) ** ORDERS[method] for n in steps]
        left.plot(steps, guide, "-", color=role(colour), alpha=0.5, linewidth=0.9)
    left.set(xlabel="steps", ylabel="error")
    middle.plot(budget.tolerances, errors, "o-", color=role("first"))
    middle.plot(budget.tolerances, budget.tolerances, "--", color=role("muted"), label="tolerance")
    middle.set(xlabel="tolerance", ylabel="relative error of the gradient")
    for (gradient, sizes), colour, marker in zip(
        memory.items(), ("first", "second", "third"), "osD", strict=True
    ):
        right.plot(counts, [s / 2**20 for s in sizes], marker + "-", color=role(colour), label=gradient)
    right.set(xlabel="steps", ylabel="MiB kept")
    for axes in (left, middle, right):
        log_axis(axes, "y")
        axes.legend()
    left.set_xscale("log", base=2)
    right.set_xscale("log", base=2)
    log_axis(middle, "x")
    for axes, ticks in ((left, measured["euler"][0]), (right, counts)):
        axes.set_xticks(ticks, [str(n) for n in ticks])
