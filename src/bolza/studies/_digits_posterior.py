"""A posterior that SGD may sample: logistic regression on handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bolza.sde import least_squares_covariance

__all__ = ["BATCH", "Problem", "at_rest", "digits_problem"]

F = torch.float64
BATCH = 10


@dataclass(frozen=True)
class Problem:
    """Logistic regression at its mode.

    Args:
        x: inputs with a constant.
        y: labels, ±1.
        prior: precision of the prior a sample.
        mode: θ*.
        hessian: A.
        noise: C.
    """

    x: Tensor
    y: Tensor
    prior: float
    mode: Tensor
    hessian: Tensor
    noise: Tensor

    @property
    def samples(self) -> int:
        return len(self.x)


def digits_problem() -> Problem:
    """Is a digit five or more? From five principal components of its pixels: classes overlap, as in the paper."""
    from sklearn.datasets import load_digits

    features, labels = load_digits(return_X_y=True)
    x = torch.tensor(features / 16, dtype=F)
    x = x - x.mean(0)
    parts = torch.linalg.svd(x, full_matrices=False)
    z = 3 * parts.U[:, :5] * parts.S[:5] / parts.S[0] * len(x) ** 0.5
    x = torch.cat([z, torch.ones(len(x), 1, dtype=F)], 1)
    y = 2 * torch.tensor(labels >= 5, dtype=F) - 1
    prior = 1 / (10 * len(x))
    theta = torch.zeros(6, dtype=F)
    for _ in range(30):  # Newton
        p = torch.sigmoid(-y * (x @ theta))
        g = -(x.T @ (y * p)) / len(x) + prior * theta
        h = x.T @ (x * (p * (1 - p))[:, None]) / len(x) + prior * torch.eye(6, dtype=F)
        theta = theta - torch.linalg.solve(h, g)
    p = torch.sigmoid(-y * (x @ theta))
    each = -(y * p)[:, None] * x
    centred = each - each.mean(0)
    return Problem(x, y, prior, theta, h, centred.T @ centred / len(x))


def at_rest(problem: Problem, move: Tensor) -> Tensor:
    """Covariance at rest by the exact second moments, with noise that grows as the Hessians of the samples say."""
    values, vectors = torch.linalg.eigh(move)
    root = (
        vectors * values.sqrt()
    ) @ vectors.T  # steps with a matrix are plain steps of rate one, seen through its root
    p = torch.sigmoid(problem.y * (problem.x @ problem.mode))
    x = problem.x @ root
    each = (p * (1 - p))[:, None, None] * x[:, :, None] * x[:, None] + problem.prior * root @ root
    s = least_squares_covariance(each, root @ problem.noise @ root, lr=1.0, batch_size=BATCH).covariance
    return root @ s @ root
