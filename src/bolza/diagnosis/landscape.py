"""How steep is the loss, and how fast may one go down?

Gradient descent on a quadratic with largest curvature λ is stable for lr < 2/λ; with momentum β, for
lr < 2 (1 + β)/λ. The largest eigenvalues of the Hessian and of the Gauss–Newton matrix at the untrained network
are measured by Lanczos iteration, with an error for each.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bolza.diagnosis.problem import Problem
from bolza.diagnosis.record import Finding
from bolza.ops.curvature import ggn_operator, hessian_operator
from bolza.ops.errors import ConvergenceWarning
from bolza.ops.krylov import EigenResult, LinearOperator, top_eigenpairs
from bolza.report import number, plus_minus

__all__ = ["Landscape", "findings", "measure_landscape"]

_ROWS = 1024  # samples times positions that a product goes through


@dataclass(frozen=True)
class Landscape:
    """Curvatures of the loss on one batch.

    Args:
        hessian: ``eigenvalues``, ``errors``, ``residuals`` (most positive first), ``products``, ``converged``.
        ggn: the same for the Gauss–Newton matrix.
        sharpness: the largest positive curvature of the two.
        lr_limit: 2 / sharpness, the stability limit of plain gradient descent.
        samples: samples of the batch.
    """

    hessian: Mapping[str, Any]
    ggn: Mapping[str, Any]
    sharpness: float
    lr_limit: float
    samples: int


def measure_landscape(
    problem: Problem,
    *,
    samples: int = 128,
    k: int = 3,
    max_products: int = 90,
    keep: list[EigenResult] | None = None,
) -> Landscape:
    """Find the largest curvatures of a network.

    Args:
        problem: network, batch and loss.
        samples: how many samples of the batch to use; of sequences, fewer.
        k: eigenvalues of each matrix.
        max_products: matrix-vector products, at most, for each matrix.
        keep: a list that the eigenpairs of the Hessian are put into, for who needs its eigenvectors too.

    Returns:
        The landscape.

    Raises:
        UnsupportedError: an operation of the network has no second derivative.
    """
    batch = problem.batch(max(min(samples, _ROWS // _positions(problem)), 8))
    names = problem.parameter_names
    hessian = _eigenvalues(
        hessian_operator(problem.model, problem.loss, batch, names), k, max_products, problem.seed, keep
    )
    ggn = _eigenvalues(ggn_operator(problem.model, problem.loss, batch, names), k, max_products, problem.seed)
    positive = [v for v in (*hessian["eigenvalues"], *ggn["eigenvalues"]) if v > 0]
    sharpness = max(positive, default=0.0)
    return Landscape(hessian, ggn, sharpness, 2 / sharpness if sharpness > 0 else float("inf"), len(batch[0]))


def _positions(problem: Problem) -> int:
    """Terms of the loss that one sample contributes: one, or one a token."""
    return max(problem.y[0].numel(), 1) if problem.task == "language" else 1


def _eigenvalues(
    op: LinearOperator, k: int, max_products: int, seed: int, keep: list[EigenResult] | None = None
) -> dict[str, Any]:
    with warnings.catch_warnings():  # the errors are reported beside the values
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = top_eigenpairs(
            op,
            min(k, op.size),
            tol=1e-2,
            max_products=max_products,
            which="largest algebraic",
            generator=torch.Generator().manual_seed(seed),
        )
    if keep is not None:
        keep.append(result)
    return {
        "eigenvalues": result.eigenvalues.tolist(),
        "errors": result.errors.tolist(),
        "residuals": result.residuals.tolist(),
        "products": result.products,
        "converged": result.converged,
    }


def findings(facts: Landscape) -> list[Finding]:
    """The three numbers that limit the learning rate.

    Args:
        facts: of `measure_landscape`.
    """
    out = []
    for key, name, data in (
        ("hessian_max", "Hessian λ", facts.hessian),
        ("ggn_max", "Gauss–Newton λ", facts.ggn),
    ):
        value, error = data["eigenvalues"][0], data["errors"][0]
        what = "Hessian" if key == "hessian_max" else "Gauss–Newton matrix"
        text = (
            f"Largest eigenvalue of the {what} on {facts.samples} samples, after {data['products']} products."
        )
        if not data["converged"]:
            text += " Lanczos did not settle: read it with its error."
        out.append(Finding(f"landscape.{key}", name, value, error, "info", text))
    limit = facts.lr_limit
    if limit == float("inf"):
        return [
            *out,
            Finding(
                "landscape.lr_limit",
                "stability limit 2/λ",
                None,
                None,
                "warn",
                "No positive curvature was found.",
            ),
        ]
    error = _error_of_limit(facts)
    text = (
        f"Plain gradient descent is stable here for learning rates below {plus_minus(limit, error)}; with "
        "momentum 0.9, "
        f"below {number(2 * 1.9 / facts.sharpness)}. Curvature grows once training starts, so stay well below."
    )
    return [*out, Finding("landscape.lr_limit", "stability limit 2/λ", limit, error, "info", text)]


def _error_of_limit(facts: Landscape) -> float:
    best = facts.hessian if facts.sharpness in facts.hessian["eigenvalues"] else facts.ggn
    index = best["eigenvalues"].index(facts.sharpness)
    return float(2 * best["errors"][index] / facts.sharpness**2)
