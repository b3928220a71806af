"""How many independent samples does a second of a processor buy, and are they samples of the right law?

    python benchmarks/samplers.py                  # some minutes
    python benchmarks/samplers.py --steps 500      # a quick look

A hundred chains side by side on a banana in two dimensions, x₀ ~ N(0, 1), x₁ ~ N(x₀²/2, s²) for s² = 1 and the stiff
1/4, and on Bayesian logistic regression (breast cancer, 31 weights). The peer is the package posteriors: its BAOA and
its SGHMC vectorised over chains by vmap, at the step and friction of ours. Ours takes the same potential, one point at
a time, and one that takes all chains at once.

``mean_far`` and ``variance_far``: the largest distance from the reference in standard errors of both, over coordinates;
``fit`` says whether each is within three. All are compared with a long run of Hamiltonian Monte Carlo with acceptance,
R̂ below 1.01, and that with the closed form where there is one. ``ess_per_s``: the smallest effective sample size over
coordinates, over processor seconds; medians over rounds, interleaved.
"""

from __future__ import annotations

from _bench import emit, environment  # isort: skip  (sets the threads before torch loads)

import argparse
import contextlib
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from bolza.bayes import effective_sample_size, monte_carlo_error, rhat, sample

BENCH, CHAINS, FRICTION = "samplers", 100, 1.0


def banana(s2: float) -> tuple[Callable[[Tensor], Tensor], int, tuple[Tensor, Tensor]]:
    def potential(x: Tensor) -> Tensor:
        return x[..., 0] ** 2 / 2 + (x[..., 1] - x[..., 0] ** 2 / 2) ** 2 / (2 * s2)

    mean, variance = torch.tensor([0.0, 0.5]), torch.tensor([1.0, s2 + 0.5])
    return potential, 2, (mean, variance)


def regression() -> tuple[Callable[[Tensor], Tensor], int]:
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    x, y = torch.tensor(features, dtype=torch.float32), torch.tensor(labels, dtype=torch.float32)
    x = torch.cat([(x - x.mean(0)) / x.std(0), torch.ones(len(x), 1)], 1)

    def potential(w: Tensor) -> Tensor:
        z = w @ x.T
        return (F.softplus(z) - y * z).sum(-1) + w.square().sum(-1) / 2

    return potential, x.shape[1]


def moments(samples: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means and variances with their standard errors, from independent chains."""
    x = samples.double()
    centre = x.mean((0, 1))
    square = (x - centre).square().mean(1)
    root = len(x) ** 0.5
    return centre, x.mean(1).std(0) / root, square.mean(0), square.std(0) / root


def judge(samples: Tensor, known: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, Any]:
    mean, mean_error, variance, variance_error = moments(samples)
    far = ((mean - known[0]).abs() / (mean_error**2 + known[1] ** 2).sqrt()).max()
    wide = ((variance - known[2]).abs() / (variance_error**2 + known[3] ** 2).sqrt()).max()
    return {
        "mean_far": float(far),
        "variance_far": float(wide),
        "variance_ratio": float((variance / known[2])[(variance / known[2] - 1).abs().argmax()]),
        "fit": bool(far < 3 and wide < 3),
    }


def peer(
    kind: str, potential: Callable[[Tensor], Tensor], x: Tensor, h: float, steps: int, warmup: int
) -> Tensor:
    """Chains of posteriors, its update under vmap."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import posteriors
    module = getattr(posteriors.sgmcmc, kind)
    empty = torch.tensor([])

    def log_posterior(theta: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        return -potential(theta), empty

    def one(theta: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        state = module.init(theta, m)
        state, _ = module.update(state, None, log_posterior, lr=h, alpha=FRICTION)
        return state.params, state.momenta

    step = vmap(one, randomness="different")
    m, kept = torch.randn_like(x), x.new_empty(steps, *x.shape)
    with torch.no_grad():
        for k in range(-warmup, steps):
            x, m = step(x, m)
            if k >= 0:
                kept[k] = x
    return kept.transpose(0, 1)


def race(
    name: str,
    potential: Callable[[Tensor], Tensor],
    dim: int,
    known: tuple[Tensor, Tensor, Tensor, Tensor],
    h: float,
    steps: int,
    rounds: int,
) -> None:
    kinds = {
        "hmc": "hmc, own step",
        "baoab": "baoab",
        "sghmc": "sghmc",
        "batched": "baoab, batched potential",
    }

    def own(kind: str, x: Tensor, draw: torch.Generator, steps: int) -> Tensor:
        warmup = steps // 5
        if kind == "hmc":  # fewer draws, each of a whole path
            return sample(
                potential, x, method="hmc", steps=steps // 4, warmup=warmup, batched=True, generator=draw
            ).samples
        method: Any = "baoab" if kind == "batched" else kind
        options: dict[str, Any] = {"step_size": h, "friction": FRICTION, "batched": kind == "batched"}
        return sample(
            potential, x, method=method, steps=steps, warmup=warmup, generator=draw, **options
        ).samples

    calls: dict[str, Callable[[Tensor, torch.Generator, int], Tensor]] = {
        label: lambda x, draw, steps, kind=kind: own(kind, x, draw, steps)  # type: ignore[misc]
        for kind, label in kinds.items()
    }
    for kind in ("baoa", "sghmc"):
        calls[f"posteriors {kind}, vmap"] = lambda x, draw, steps, kind=kind: peer(  # type: ignore[misc]
            kind, potential, x, h, steps, steps // 5
        )
    rates: dict[str, list[float]] = {label: [] for label in calls}
    verdicts: dict[str, dict[str, Any]] = {}
    for call in calls.values():  # what is only paid once
        with contextlib.suppress(Exception):
            call(torch.zeros(CHAINS, dim), torch.Generator().manual_seed(0), 10)
    for seed in range(rounds):
        for label in list(calls):
            torch.manual_seed(seed)
            draw = torch.Generator().manual_seed(seed)
            x = torch.randn(CHAINS, dim, generator=draw)
            start = time.process_time()
            try:
                found = calls[label](x, draw, steps)
            except Exception as error:  # noqa: BLE001  the peer is an extra
                emit(BENCH, f"{name}, {label}", skipped=f"{type(error).__name__}: {error}"[:200])
                del calls[label], rates[label]
                continue
            seconds = time.process_time() - start
            if not bool(torch.isfinite(found).all()):
                emit(BENCH, f"{name}, {label}", h=h, skipped="a chain diverged")
                del calls[label], rates[label]
                continue
            size = float(effective_sample_size(found, "mean").min())
            rates[label].append(size / seconds)
            if not seed:
                verdicts[label] = judge(found, known) | {"ess": size, "cpu_s": seconds}
    base = rates.get("posteriors baoa, vmap")
    for label, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, base, strict=True)) if base else None
        emit(
            BENCH, f"{name}, {label}", h=h if "hmc, own" not in label else None, chains=CHAINS,
            ess_per_s=statistics.median(values), over_posteriors_baoa=ratio, **verdicts[label],
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="steps of a chain after the warm-up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long", type=int, default=600, help="draws of a chain of the reference")
    options = parser.parse_args()
    emit(BENCH, "environment", **environment("posteriors", "arviz-stats"))
    for s2, h in ((1.0, 0.15), (0.25, 0.075)):
        potential, dim, (mean, variance) = banana(s2)
        x = torch.randn(CHAINS, dim, generator=torch.Generator().manual_seed(9))
        long = sample(
            potential, x, method="hmc", steps=5 * options.long, warmup=options.long, batched=True,
            generator=torch.Generator().manual_seed(10),
        )  # fmt: skip
        none = torch.zeros(dim)
        emit(
            BENCH, f"banana s2={s2:g}, long hmc against the closed form", rhat=float(rhat(long.samples).max()),
            acceptance=long.acceptance, step=long.step_size, **judge(long.samples, (mean, none, variance, none)),
        )  # fmt: skip
        race(f"banana s2={s2:g}", potential, dim, moments(long.samples), h, options.steps, options.rounds)
    potential, dim = regression()
    x = torch.randn(CHAINS, dim, generator=torch.Generator().manual_seed(9))
    long = sample(
        potential,
        x,
        method="hmc",
        steps=options.long,
        batched=True,
        generator=torch.Generator().manual_seed(10),
    )
    emit(
        BENCH, "regression, long hmc", rhat=float(rhat(long.samples).max()), acceptance=long.acceptance,
        step=long.step_size, mean_error=float(monte_carlo_error(long.samples).max()),
    )  # fmt: skip
    race("regression", potential, dim, moments(long.samples), 0.05, options.steps, options.rounds)


if __name__ == "__main__":
    main()
