"""Runs of SGD on a small network, and the loops that curvature and noise at its minimum predict."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bolza.data import digits
from bolza.sde import (
    AreaRate,
    LinearCurrent,
    area_rate,
    gradient_noise,
    network_current,
    network_moments,
)

SAMPLES, HIDDEN, BATCH, RATE = 600, 12, 4, 0.05


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    runs: int
    steps: int
    settle: int
    directions: int
    linear_steps: int
    cells: int


@dataclass(frozen=True)
class Loops:
    """What theory says of a network's loops, and what runs of it did."""

    predicted: LinearCurrent
    measured: AreaRate
    path: Tensor  # (steps, runs, k)
    plane_path: Tensor  # (steps, runs, 2), in the plane that theory names
    slope: float
    slope_error: float
    correlation: float
    in_plane: AreaRate
    expected_turn: float
    turns: float
    gradients: tuple[float, float]
    rank: float
    size: int


def data() -> tuple[Tensor, Tensor]:
    """Digits and their classes as unit vectors, 15 % of them random."""
    set_ = digits()
    draw = torch.Generator().manual_seed(0)
    labels = set_.train_y[:SAMPLES].clone()
    wrong = torch.rand(SAMPLES, generator=draw) < 0.15
    labels[wrong] = torch.randint(0, 10, (int(wrong.sum()),), generator=draw)
    return set_.train_x[:SAMPLES].float(), nn.functional.one_hot(labels, 10).float()


def loss(z: Tensor, y: Tensor) -> Tensor:
    """Half the squared distance, a mean over samples."""
    return (z - y).square().sum(-1).mean() / 2


def settled_network(x: Tensor, y: Tensor) -> nn.Sequential:
    """A small network at a minimum."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 10)).double()
    optimizer = torch.optim.LBFGS(
        net.parameters(), max_iter=150, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(net(x.double()), y.double())
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    return net.float()


def sgd_paths(
    net: nn.Sequential, x: Tensor, y: Tensor, directions: Tensor, budget: Budget
) -> tuple[Tensor, float]:
    """Coordinates ``(steps, runs, k)`` of runs of SGD from a network, all at once, and the mean last gradient norm."""
    draw = torch.Generator().manual_seed(1)
    stacks = [p.detach().repeat(budget.runs, *[1] * p.ndim).requires_grad_() for p in net.parameters()]
    start = torch.cat([p.detach().flatten() for p in net.parameters()]) @ directions
    path = torch.empty(budget.steps, budget.runs, directions.shape[1])

    def value(x: Tensor, y: Tensor) -> Tensor:
        w, b, v, c = stacks
        hidden = torch.tanh(torch.baddbmm(b[:, None], x, w.mT))
        return (torch.baddbmm(c[:, None], hidden, v.mT) - y).square().sum(-1).mean(1).sum() / 2

    for k in range(budget.steps):
        rows = torch.randint(0, len(x), (budget.runs, BATCH), generator=draw)
        gradients = torch.autograd.grad(value(x[rows], y[rows]), stacks)
        with torch.no_grad():
            for p, g in zip(stacks, gradients, strict=True):
                p.sub_(g, alpha=RATE)
            torch.sub(torch.cat([p.flatten(1) for p in stacks], 1) @ directions, start, out=path[k])
    everything = torch.autograd.grad(
        value(x.expand(budget.runs, -1, -1), y.expand(budget.runs, -1, -1)), stacks
    )
    norms = torch.cat([g.flatten(1) for g in everything], 1).norm(dim=1)
    return path, float(norms.mean())


def network_loops(budget: Budget) -> Loops:
    """Predict the areas of a network's runs, and measure them."""
    x, y = data()
    net = settled_network(x, y)
    noise = gradient_noise(net, loss, (x, y))
    moments = network_moments(
        net,
        loss,
        (x, y),
        lr=RATE,
        batch_size=BATCH,
        k=budget.directions,
        noise=noise,
        generator=torch.Generator().manual_seed(0),
    )
    theory = network_current(net, loss, (x, y), lr=RATE, batch_size=BATCH, moments=moments)
    assert theory.directions is not None
    path, moved = sgd_paths(net, x, y, theory.directions, budget)
    path = path[budget.settle :].double()
    blocks = max(48, budget.runs)
    measured = area_rate(path, dt=RATE, blocks=blocks)
    above = torch.triu_indices(path.shape[-1], path.shape[-1], 1)
    p, m, e = (a[above[0], above[1]] for a in (theory.area_rate, measured.matrix, measured.error))
    power = float((p / e).square().sum())
    # the plane that theory names, in coordinates that theory gives unit variance
    scale, axes = torch.linalg.eigh(theory.covariance)
    unit = axes / scale.sqrt()
    spin = torch.linalg.eigh(1j * (unit.mT @ theory.area_rate @ unit).to(torch.complex128)).eigenvectors[
        :, -1
    ]
    flat = torch.stack([spin.real, spin.imag], 1) * math.sqrt(2)
    seen = path @ unit @ flat
    named = area_rate(seen, dt=RATE, blocks=blocks)
    turn = float((unit @ flat)[:, 0] @ theory.area_rate @ (unit @ flat)[:, 1])
    back = (axes / scale.sqrt()).mT @ torch.diag(moments.curvature[~moments.unstable]) @ (axes * scale.sqrt())
    damping = float((flat.mT @ back @ flat).trace()) / 2
    return Loops(
        theory,
        measured,
        path,
        seen,
        slope=float((p * m / e**2).sum()) / power,
        slope_error=power**-0.5,
        correlation=float(torch.corrcoef(torch.stack([p, m]))[0, 1]),
        in_plane=named,
        expected_turn=turn,
        turns=abs(turn) / 2 / damping / (2 * math.pi),
        gradients=(float(noise.mean.norm()), moved),
        rank=float(noise.effective_rank()),
        size=noise.size,
    )
