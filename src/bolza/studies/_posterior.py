"""Posteriors whose moments are known beforehand, and chains of samplers on them, for the studies of samplers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bolza.bayes import rhat, sample

__all__ = ["Logistic", "Moments", "Reference", "breast_cancer", "chains_on", "quadratic", "reference"]


@dataclass(frozen=True)
class Logistic:
    """Bayesian logistic regression with the prior N(0, 1) on every weight.

    Args:
        x: inputs with a column of ones, ``(n, d)``.
        y: labels 0 or 1, ``(n,)``.
        test_x: inputs held out.
        test_y: their labels.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    def potential(self, w: Tensor) -> Tensor:
        """U of many weights, ``(chains, d)`` → ``(chains,)``."""
        z = w @ self.x.T
        return (F.softplus(z) - self.y * z).sum(-1) + w.square().sum(-1) / 2

    def slope(self, w: Tensor, rows: Tensor | None) -> Tensor:
        """Gradient of the mean loss of a batch for each chain, ``rows`` of shape ``(chains, batch)``; None for all."""
        if rows is None:
            return (torch.sigmoid(w @ self.x.T) - self.y) @ self.x / len(self.x)
        x = self.x[rows]
        residual = torch.sigmoid((x @ w[..., None])[..., 0]) - self.y[rows]
        return (residual[:, None] @ x)[:, 0] / rows.shape[1]

    def score(self, w: Tensor) -> Tensor:
        """Log probability of each test label under the mean prediction of weights ``(draws, d)``."""
        signed = (2 * self.test_y - 1) * (w @ self.test_x.T)
        return torch.logsumexp(F.logsigmoid(signed.double()), 0) - math.log(len(w))


@cache
def breast_cancer() -> Logistic:
    """Breast cancer of scikit-learn, 30 standardised features and a constant; every fourth sample held out."""
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    x, y = torch.tensor(features, dtype=torch.float32), torch.tensor(labels, dtype=torch.float32)
    held = torch.arange(len(x)) % 4 == 3
    x = (x - x[~held].mean(0)) / x[~held].std(0)
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    return Logistic(x[~held], y[~held], x[held], y[held])


@dataclass(frozen=True)
class Reference:
    """Moments of a posterior from Hamiltonian Monte Carlo with acceptance.

    Attributes:
        mean: of the weights.
        variance: along the axes, least first.
        axes: orthogonal directions, the eigenvectors of the covariance, in columns.
        rhat: the largest over the weights.
        draws: some of the samples, ``(draws, d)``.
    """

    mean: Tensor
    variance: Tensor
    axes: Tensor
    rhat: float
    draws: Tensor


@cache
def reference(chains: int, steps: int, seed: int = 0) -> Reference:
    """Moments of the posterior of `breast_cancer`."""
    problem, draw = breast_cancer(), torch.Generator().manual_seed(seed)
    start = torch.randn(chains, problem.x.shape[1], generator=draw)
    found = sample(
        problem.potential,
        start,
        steps=steps,
        warmup=max(60, steps // 4),
        method="hmc",
        batched=True,
        generator=draw,
    )
    variance, axes = torch.linalg.eigh(found.covariance.double())
    flat = found.samples.flatten(0, 1)
    return Reference(
        found.mean.double(),
        variance,
        axes,
        float(rhat(found.samples).max()),
        flat[:: max(1, len(flat) // 500)],
    )


@dataclass(frozen=True)
class Moments:
    """What chains of a sampler found, along the axes of a reference and in its standard deviations.

    Attributes:
        mean: error of the mean of all chains, ``(d,)``.
        ratio: variance over that of the reference, ``(d,)``.
        ratio_error: its standard error over chains.
        single: root mean square error of the mean that a single chain has after some steps, at `marks`.
        marks: numbers of steps.
        draws: the last weights of every chain.
    """

    mean: Tensor
    ratio: Tensor
    ratio_error: Tensor
    single: Tensor
    marks: tuple[int, ...]
    draws: Tensor


def chains_on(
    build: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    known: Reference,
    *,
    chains: int,
    steps: int,
    batch: int | None,
    warmup: int = 0,
    schedule: Callable[[int], float] | None = None,
    seed: int = 0,
) -> Moments:
    """Run a sampler on `breast_cancer`, every chain with batches of its own, from draws of the prior.

    Args:
        build: parameters → sampler.
        known: the moments to compare with.
        chains: their number.
        steps: after the warm-up.
        batch: size of a batch; None for all of the data.
        warmup: steps that are left out.
        schedule: factor of the rate at each step.
        seed: of starts and batches.
    """
    problem, draw = breast_cancer(), torch.Generator().manual_seed(seed)
    w = torch.nn.Parameter(torch.randn(chains, problem.x.shape[1], generator=draw))
    sampler = build([w])
    rates = torch.optim.lr_scheduler.LambdaLR(sampler, schedule) if schedule is not None else None
    marks = sorted({max(1, round(steps * 2.0**-k)) for k in range(6)})
    axes, centre, scale = known.axes.float(), known.mean.float(), known.variance.sqrt().float()
    total, square = torch.zeros_like(w), torch.zeros_like(w)
    single = []
    with torch.no_grad():
        for k in range(-warmup, steps):
            rows = torch.randint(len(problem.x), (chains, batch), generator=draw) if batch else None
            w.grad = problem.slope(w, rows)
            sampler.step()
            if rates is not None:
                rates.step()
            if k >= 0:
                z = (w - centre) @ axes / scale
                total += z
                square += z.square()
                if k + 1 in marks:
                    single.append((total / (k + 1)).square().mean().sqrt())
    mean = total.mean(0) / steps
    spread = square / steps - (2 * total / steps - mean) * mean  # about the common mean
    error = spread.std(0) / math.sqrt(chains)
    return Moments(mean, spread.mean(0), error, torch.stack(single), tuple(marks), w.detach().clone())


def quadratic(
    build: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    precision: float,
    *,
    chains: int,
    steps: int,
    noise: float = 0.0,
    seed: int = 0,
) -> tuple[float, float]:
    """Variance of chains on λθ²/2 after some steps, and its standard error; ``noise`` is V of the gradient."""
    draw = torch.Generator().manual_seed(seed)
    w = torch.nn.Parameter(torch.randn(chains, generator=draw) / math.sqrt(precision))
    sampler: Any = build([w])
    with torch.no_grad():
        for _ in range(steps):
            w.grad = precision * w
            if noise:
                w.grad += math.sqrt(noise) * torch.randn(chains, generator=draw)
            sampler.step()
    value = float(w.detach().double().var())
    return value, value * math.sqrt(2 / (chains - 1))
