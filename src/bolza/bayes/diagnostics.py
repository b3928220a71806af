"""Have the chains come to rest, and how many independent samples are they worth?

R̂ compares chains that began in different places, with ranks and split in halves: near 1 they cannot be told apart. The
effective sample size is the number of independent draws that would give the same error of a mean.

Reference: Vehtari, Gelman, Simpson, Carpenter & Bürkner (2021), arXiv:1903.08008. The computing is that of ArviZ.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from bolza.core.errors import DataError, ShapeError, UnsupportedError
from bolza.core.reference import Reference, cites

__all__ = ["effective_sample_size", "monte_carlo_error", "rhat"]

VEHTARI = Reference(
    "vehtari2021rhat",
    "Vehtari, Aki and Gelman, Andrew and Simpson, Daniel and Carpenter, Bob and Bürkner, Paul-Christian",
    "Rank-Normalization, Folding, and Localization: An Improved R̂ for Assessing Convergence of MCMC",
    2021,
    venue="Bayesian Analysis",
    arxiv="1903.08008",
)

_LEAST = 4  # draws a chain, halves of two


def _call(name: str, samples: Tensor, **options: Any) -> Tensor:
    """A function of ArviZ on samples ``(chains, draws, …)``; the result has the shape of one draw."""
    import numpy as np

    try:
        from arviz_stats.base import array_stats
    except ImportError as error:
        raise UnsupportedError(
            "diagnostics of chains need arviz-stats, which is not installed: pip install 'bolza[bayes]'"
        ) from error
    if samples.dim() < 2 or not samples.shape[0] or samples.shape[1] < _LEAST:
        raise ShapeError(
            f"samples has shape {tuple(samples.shape)}: give (chains, draws, …) with at least {_LEAST} draws"
        )
    if not bool(torch.isfinite(samples).all()):
        raise DataError("samples are not all finite: a chain diverged, take a smaller learning rate")
    flat = samples.detach().to("cpu", torch.float64).reshape(*samples.shape[:2], -1).numpy()
    with np.errstate(invalid="ignore", divide="ignore"):  # what never changes has nan, as promised
        found = getattr(array_stats, name)(flat, chain_axis=0, draw_axis=1, **options)
    return torch.as_tensor(found).reshape(samples.shape[2:])


@cites(VEHTARI)
def rhat(samples: Tensor) -> Tensor:
    """R̂ of each quantity: near 1 where chains that began apart can no longer be told apart.

    Above 1.01 the chains are not at rest. On a network look at predictions or log densities rather than at weights,
    whose labels permute. One chain is split in halves and compared with itself, which a chain that is stuck passes.

    Args:
        samples: shape ``(chains, draws, …)``, at least 4 draws, and 8 of a single chain.

    Returns:
        float64, shape of one draw ``…``; nan for a quantity that never changes.

    Raises:
        DataError: a sample is not finite.
        ShapeError: there are too few draws.
        UnsupportedError: arviz-stats is not installed.

    Reference: Vehtari et al. (2021), §4.

    Example:
        >>> draws = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
        >>> apart = draws + torch.tensor([0.0, 0.0, 0.0, 2.0])[:, None]
        >>> bool(rhat(draws) < 1.01), bool(rhat(apart) > 1.2)
        (True, True)
    """
    if samples.dim() >= 2 and samples.shape[0] == 1:  # ArviZ asks for two chains
        half = samples.shape[1] // 2
        samples = torch.cat([samples[:, :half], samples[:, samples.shape[1] - half :]])
    return _call("rhat", samples)


@cites(VEHTARI)
def effective_sample_size(samples: Tensor, kind: Literal["bulk", "tail", "mean"] = "bulk") -> Tensor:
    """The number of independent draws that all chains together are worth.

    Args:
        samples: shape ``(chains, draws, …)``, at least 4 draws.
        kind: ``"bulk"`` for the middle of the law, ``"tail"`` for its 5 % and 95 % quantiles, ``"mean"`` for the plain
            mean, without ranks.

    Returns:
        float64, shape of one draw.

    Raises:
        DataError: a sample is not finite.
        ShapeError: there are too few draws.
        UnsupportedError: arviz-stats is not installed.

    Reference: Vehtari et al. (2021), §3.

    Example:
        >>> draws = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
        >>> slow = draws.repeat_interleave(10, 1)                  # every draw ten times
        >>> round(float(effective_sample_size(slow)), -2)
        800.0
    """
    return _call("ess", samples, method=kind, **({"prob": (0.05, 0.95)} if kind == "tail" else {}))


@cites(VEHTARI)
def monte_carlo_error(samples: Tensor, of: Literal["mean", "sd"] = "mean") -> Tensor:
    """The standard error that a mean, or a standard deviation, over the chains still has.

    Args:
        samples: shape ``(chains, draws, …)``, at least 4 draws.
        of: what is estimated.

    Returns:
        float64, shape of one draw.

    Raises:
        DataError: a sample is not finite.
        ShapeError: there are too few draws.
        UnsupportedError: arviz-stats is not installed.

    Reference: Vehtari et al. (2021).

    Example:
        >>> draws = torch.randn(4, 2500, generator=torch.Generator().manual_seed(0))
        >>> round(float(monte_carlo_error(draws)), 3)
        0.01
    """
    return _call("mcse", samples, method=of)
