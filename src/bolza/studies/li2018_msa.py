r"""Successive approximation of the maximum principle at a saddle: where gradient descent stays, and at what price.

A flow x ← x + δ tanh(W x + b) of five nodes that all start at the input is to end at its sine. Its weights start
almost at zero, where the loss has a saddle: descent soon reaches the best linear map and stays there. The extended
method minimises the Hamiltonian of every layer over a range of weights, and leaves.

Compared at an equal number of steps, as in the paper, and at an equal number of gradients: a sweep with ten iterations
of L-BFGS evaluates every layer eleven times or more, each time with second derivatives, about forty gradients in all.
Gradient descent is given the rate of the paper, 0.1, and others up to where it becomes unstable.

Reference: Li, Chen, Tai & E (2018), arXiv:1710.09513.

Departures: ρ weighs means over samples; the layers are minimised together; at the small scale ten layers of δ = 1/2
in place of twenty of 1/4.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.optim import EMSA, MSA
from bolza.optim.msa import REFERENCE
from bolza.report import Figure, log_axis, role
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "li2018_msa"
TITLE = "The maximum principle leaves a saddle"
CLAIM = (
    "Training by minimising extended Hamiltonians, layer by layer, makes fast progress from a flat start where "
    "gradient descent stays; without the extension it diverges"
)
TIME, WIDTH, POINTS = 5.0, 5, 100  # δ · layers, nodes, samples on [−π, π]
DECAY = 2e-4
GRADIENTS = 40  # gradients that a sweep is charged with


@dataclass(frozen=True)
class Budget:
    """Size of the experiment."""

    layers: int = 10
    sweeps: int = 24
    seeds: int = 3
    adaptive_seeds: int = 1
    rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)


BUDGETS = {
    "small": Budget(),
    "full": Budget(layers=20, sweeps=60, seeds=5, adaptive_seeds=5, rates=(0.03, 0.1, 0.3, 1.0, 2.0, 3.0)),
}


class Flow(nn.Module):
    """The network: x ← x + δ tanh(W x + b), weights from the uniform law on ±0.005."""

    def __init__(self, layers: int, seed: int) -> None:
        super().__init__()
        self.step = TIME / layers
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.005 * (2 * torch.rand(p.shape, generator=draw) - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the end of the flow."""
        for layer in self.layers:
            x = x + self.step * torch.tanh(layer(x))
        return x


def problem() -> tuple[Tensor, Tensor]:
    """Inputs and their sines, each repeated to all nodes."""
    x = torch.linspace(-torch.pi, torch.pi, POINTS)[:, None].expand(-1, WIDTH)
    return x.contiguous(), torch.sin(x)


def minimise(net: Flow, optimizer: torch.optim.Optimizer, sweeps: int) -> list[float]:
    """Loss ½ mean (x_T − sin x_0)² before each sweep and at the end."""
    x, y = problem()

    def closure() -> Any:
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y) / 2
        loss.backward()
        return loss

    losses = []
    for _ in range(sweeps):
        value: Any = optimizer.step(closure)
        losses.append(float(value.detach()))
    with torch.no_grad():
        losses.append(float(F.mse_loss(net(x), y) / 2))
    return losses


def descend(budget: Budget, steps: int) -> Tensor:
    """Loss of gradient descent at each rate and seed, shape ``(rates, seeds, steps + 1)``; all runs at once."""
    x, y = problem()
    nets = [Flow(budget.layers, seed) for _ in budget.rates for seed in range(budget.seeds)]
    rates = torch.tensor(budget.rates).repeat_interleave(budget.seeds)
    W = torch.stack([torch.stack([layer.weight for layer in net.layers]) for net in nets]).detach()  # type: ignore[misc]
    b = torch.stack([torch.stack([layer.bias for layer in net.layers]) for net in nets]).detach()  # type: ignore[misc]
    W, b = W.requires_grad_(), b.unsqueeze(2).requires_grad_()
    losses = []
    for _ in range(steps + 1):
        state = x.expand(len(nets), -1, -1)
        for layer in range(budget.layers):
            state = state + TIME / budget.layers * torch.tanh(
                torch.baddbmm(b[:, layer], state, W[:, layer].mT)
            )
        loss = (state - y).square().mean((1, 2)) / 2
        losses.append(loss.detach())
        slopes = torch.autograd.grad(loss.sum() + DECAY / 2 * (W.square().sum() + b.square().sum()), [W, b])
        with torch.no_grad():
            for p, slope in zip((W, b), slopes, strict=True):
                p.sub_(rates.view(-1, 1, 1, 1) * slope)
    return torch.stack(losses, 1).nan_to_num(nan=torch.inf).view(len(budget.rates), budget.seeds, -1)


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Train the flow by the maximum principle and by gradient descent, from the same almost zero weights.

    Args:
        scale: ``"small"``: ten layers, 24 sweeps, three seeds; ``"full"``: twenty layers, 60 sweeps, five seeds.
        progress: called with the share done and a few words.

    Returns:
        Rows on progress, stability and price, a figure of the losses.

    Example:
        >>> from bolza.studies import get
        >>> get("li2018_msa").title
        'The maximum principle leaves a saddle'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    total = 2 * budget.seeds + 2 * budget.adaptive_seeds + 2
    done = 0

    def tell(text: str, weight: int) -> None:
        nonlocal done
        report(done / total, text)
        done += weight

    start = time.process_time()
    extended = []
    for seed in range(budget.seeds):
        tell(f"extended method, seed {seed}", 2)
        net = Flow(budget.layers, seed)
        extended.append(
            minimise(net, EMSA(net, lr=1.0, rho=1.0, weight_decay=DECAY, iterations=10), budget.sweeps)
        )
    each = (time.process_time() - start) / (budget.seeds * budget.sweeps)
    adaptive = []
    for seed in range(budget.adaptive_seeds):
        tell(f"extended method that adapts, seed {seed}", 2)
        net = Flow(budget.layers, seed)
        optimizer = EMSA(net, lr=1.0, rho=1.0, weight_decay=DECAY, iterations=10, adapt=True)
        adaptive.append(minimise(net, optimizer, budget.sweeps))
    tell("basic method", 1)
    basic = []
    for seed in range(budget.seeds):
        net = Flow(budget.layers, seed)
        basic.append(minimise(net, MSA(net, lr=1.0, proximal=0.0, weight_decay=DECAY, iterations=10), 6))
    tell("gradient descent", 1)
    ratio = each / gradient_seconds(budget)
    descent = descend(budget, GRADIENTS * budget.sweeps)
    report(1.0, "done")
    return StudyResult(
        KEY,
        TITLE,
        REFERENCE,
        CLAIM,
        scale,
        _rows(extended, adaptive, basic, descent, budget),
        (_figure(extended, adaptive, descent, budget),),
        notes=(
            f"{budget.layers} layers of {WIDTH} nodes, δ = {TIME / budget.layers:g}, {POINTS} points, full batch, "
            f"ρ = 1, weight decay {DECAY:g}, ten iterations of L-BFGS; the loss is half the mean square.",
            f"A sweep took the processor time of {ratio:.0f} gradients of one network in this run; it is charged with "
            f"{GRADIENTS}.",
            "Gradient descent leaves the saddle too at a rate so large that its first steps are unstable: it takes "
            "a few hundred gradients, less than the extended method.",
        ),
        facts={
            "extended": extended,
            "adaptive": adaptive,
            "basic": basic,
            "descent": {
                str(rate): found[:, -1].tolist() for rate, found in zip(budget.rates, descent, strict=True)
            },
            "gradients_of_a_sweep": ratio,
        },
    )


def gradient_seconds(budget: Budget, repeat: int = 15) -> float:
    """Median processor time of a forward and backward pass of one network."""
    x, y = problem()
    net = Flow(budget.layers, 0)
    times = []
    for _ in range(repeat):
        start = time.process_time()
        (F.mse_loss(net(x), y) / 2).backward()
        times.append(time.process_time() - start)
    return sorted(times)[repeat // 2]


def _rows(
    extended: list[list[float]],
    adaptive: list[list[float]],
    basic: list[list[float]],
    descent: Tensor,
    budget: Budget,
) -> list[Row]:
    sweeps = budget.sweeps
    published = budget.rates.index(0.1)
    plateau = descent[published, :, -1]
    best, error = mean_error([min(losses) for losses in extended])
    equal_steps = descent[:, :, : sweeps + 1].amin(2).mean(1)
    equal_work = descent.amin(2)
    tuned = int(equal_work.mean(1).argmin())
    rows = [
        Row(
            f"lowest loss of gradient descent at the rate 0.1 in {GRADIENTS * sweeps} gradients",
            "about 0.107, the saddle",
            *mean_error(equal_work[published].tolist()),
            bool((plateau > 0.1).all()),
            "the best linear map ends at 0.107",
        ),
        Row(
            f"lowest loss of the extended method in {sweeps} sweeps",
            "< half of the saddle's",
            best,
            error,
            best < 0.107 / 2,
            ", ".join(f"{min(losses):.3f}" for losses in extended)
            + " by seed; the best iterate, because it is not "
            "monotone: it ended at " + ", ".join(f"{losses[-1]:.3f}" for losses in extended),
        ),
        Row(
            f"lower than gradient descent at its best rate after as many steps, {sweeps}",
            f"< {float(equal_steps.min()):.3f}",
            best,
            error,
            best < float(equal_steps.min()),
            f"rate {budget.rates[int(equal_steps.argmin())]:g}",
        ),
        Row(
            f"lower than gradient descent at its best rate after as many gradients, {GRADIENTS * sweeps}",
            f"< {float(equal_work[tuned].mean()):.3g}",
            best,
            error,
            best < float(equal_work[tuned].mean()),
            f"rate {budget.rates[tuned]:g}, at which the first steps are unstable; the paper compares by steps, at 0.1",
        ),
    ]
    growth = [max(losses) / losses[0] for losses in basic]
    rows.append(
        Row(
            "growth of the loss of the basic method, ρ = 0, in six sweeps",
            "> 1",
            *mean_error(growth),
            min(growth) > 1,
            "largest loss over that at the start",
        )
    )
    rises = sum(b > a for losses in adaptive for a, b in zip(losses, losses[1:], strict=False))
    rows.append(
        Row(
            "steps on which the loss rose when ρ is found by accept and reject",
            0,
            rises,
            None,
            rises == 0,
            "ends at " + ", ".join(f"{losses[-1]:.3f}" for losses in adaptive),
        )
    )
    return rows


def _figure(
    extended: list[list[float]], adaptive: list[list[float]], descent: Tensor, budget: Budget
) -> Figure:
    return Figure(
        "Off the saddle, and the price",
        partial(_draw, extended=extended, adaptive=adaptive, descent=descent, budget=budget),
        caption="Loss of every seed. Left: by steps, as papers show it. Right: by gradients, a sweep charged with "
        f"{GRADIENTS}.",
        alt="Loss over steps and over gradients for the extended method and gradient descent at several rates.",
        size=(9.6, 4.0),
        key="saddle",
    )


def _draw(
    canvas: Any, extended: list[list[float]], adaptive: list[list[float]], descent: Tensor, budget: Budget
) -> None:
    panels = canvas.subplots(1, 2, sharey=True)
    published, tuned = budget.rates.index(0.1), int(descent.amin(2).mean(1).argmin())
    for k, axes in enumerate(panels):
        scale = GRADIENTS if k else 1
        for runs, colour, name in (
            (extended, "first", "extended, ρ = 1"),
            (adaptive, "second", "extended, ρ adapted"),
        ):
            for i, losses in enumerate(runs):
                axes.plot(
                    [scale * s for s in range(len(losses))],
                    losses,
                    color=role(colour),
                    linewidth=1.3,
                    label=name if i == 0 else None,
                )
        for rate, colour in ((published, "muted"), (tuned, "third")):
            for i, losses in enumerate(descent[rate, :, : scale * budget.sweeps + 1]):
                axes.plot(
                    range(len(losses)),
                    losses,
                    color=role(colour),
                    linewidth=1.3,
                    label=f"descent, rate {budget.rates[rate]:g}" if i == 0 else None,
                )
        log_axis(axes, "y")
        axes.set_xlabel("gradients" if k else "steps")
    panels[0].set_ylabel("loss")
    panels[0].legend(loc="lower left")
