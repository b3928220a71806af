"""How noisy is the gradient, and which batch follows?

With per-sample gradients g_i of mean g and covariance Σ, a batch of B has the gradient noise Σ/B. At the critical
batch size B* = tr Σ/|g|² noise and signal have the same length: below it larger batches save steps in
proportion, above it they only cost. The noise temperature of SGD is lr/(2B).

Reference: McCandlish, Kaplan, Amodei et al. (2018), *An empirical model of large-batch training*; Mandt, Hoffman &
Blei (2017), *Stochastic gradient descent as approximate Bayesian inference* (temperature).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bolza.diagnosis.problem import Problem
from bolza.diagnosis.record import Finding
from bolza.report import number
from bolza.sde import GradientNoise, gradient_noise, temperature

__all__ = ["Noise", "findings", "measure_noise"]


@dataclass(frozen=True)
class Noise:
    """Covariance of the per-sample gradient.

    Args:
        trace: tr Σ.
        trace_error: its standard error.
        gradient_norm2: |g|², corrected for the noise that it contains.
        effective_rank: (tr Σ)² / tr Σ².
        effective_rank_error: its standard error.
        eigenvalues: the largest ones.
        layers: ``name``, ``snr`` (|g|²/tr Σ of its block) and ``snr_error`` of each layer.
        critical_batch: tr Σ/|g|².
        critical_batch_error: its standard error.
        samples: how many samples were used.
        note: what restricts it, in words.
    """

    trace: float
    trace_error: float | None
    gradient_norm2: float
    effective_rank: float
    effective_rank_error: float | None
    eigenvalues: Sequence[float]
    layers: Sequence[Mapping[str, Any]]
    critical_batch: float
    critical_batch_error: float | None
    samples: int
    note: str = ""


def measure_noise(
    problem: Problem, *, samples: int = 128, k: int = 20, keep: list[GradientNoise] | None = None
) -> Noise:
    """Estimate the covariance of the per-sample gradient.

    Args:
        problem: network, batch and loss.
        samples: how many samples of the batch to use.
        k: largest eigenvalues to compute.
        keep: a list that the gradients of the samples are put into, for who needs them too.

    Returns:
        The noise.

    Raises:
        UnsupportedError: per-sample gradients cannot be taken of this network.
    """
    x, y = problem.batch(samples)
    noise = gradient_noise(problem.model, problem.loss, (x, y), problem.parameter_names)
    if keep is not None:
        keep.append(noise)
    count = len(x)
    trace, rank, critical = noise.trace(), noise.effective_rank(), noise.noise_scale()
    largest = min(k, count - 1, sum(p.numel() for p in problem.parameters))
    variance = trace.value * count / (count - 1)
    layers = [
        {"name": name or type(problem.model).__name__, "snr": snr.value, "snr_error": snr.error}
        for name, snr in noise.per_layer_snr().items()
    ]
    return Noise(
        trace=trace.value,
        trace_error=trace.error,
        gradient_norm2=float(noise.mean.double().square().sum()) - variance / count,
        effective_rank=rank.value,
        effective_rank_error=rank.error,
        eigenvalues=noise.eigh(largest).eigenvalues.tolist(),
        layers=layers,
        critical_batch=critical.value,
        critical_batch_error=critical.error if math.isfinite(critical.error) else None,
        samples=count,
    )


def findings(facts: Noise) -> list[Finding]:
    """What the noise says.

    Args:
        facts: of `measure_noise`.
    """
    known = [row for row in facts.layers if math.isfinite(row["snr"])]
    quietest = min(known, key=lambda row: row["snr"], default=None)
    lost = facts.gradient_norm2 <= 0
    out = [
        Finding(
            "noise.trace",
            "gradient noise tr Σ",
            facts.trace,
            facts.trace_error,
            "info",
            f"Total variance of the gradient of one sample, from {facts.samples} samples"
            + (f". {facts.note}" if facts.note else "."),
        ),
        Finding(
            "noise.effective_rank",
            "effective rank of Σ",
            facts.effective_rank,
            facts.effective_rank_error,
            "info",
            f"The noise lives in about {facts.effective_rank:.0f} directions of the parameter space.",
        ),
        Finding(
            "noise.critical_batch",
            "critical batch size",
            None if lost else facts.critical_batch,
            facts.critical_batch_error,
            "warn" if lost else "info",
            "The mean gradient cannot be told from noise on this batch: measure on more samples."
            if lost
            else "Larger batches save steps up to here, and cost more than they save beyond.",
            unit="samples",
        ),
    ]
    if quietest is not None:
        hidden = quietest["snr"] <= 0
        out.append(
            Finding(
                "noise.snr_min",
                "weakest signal-to-noise of a layer",
                quietest["snr"],
                quietest["snr_error"],
                "info",
                f"Layer {quietest['name']}: "
                + (
                    "its mean gradient cannot be told from zero on this batch."
                    if hidden
                    else f"signal and noise of this layer are equal at a batch of {number(1 / quietest['snr'])}."
                ),
            )
        )
    return out


def temperature_finding(lr: float, batch_size: int, momentum: float) -> Finding:
    """Noise temperature of SGD at given settings.

    Args:
        lr: learning rate.
        batch_size: samples a step.
        momentum: momentum of SGD; it multiplies the temperature by 1/(1 − momentum).
    """
    value = temperature(lr, batch_size, momentum)
    return Finding(
        "noise.temperature",
        "noise temperature lr/2B(1−β)",
        value,
        None,
        "info",
        f"At lr {number(lr)}, batch {batch_size} and momentum {momentum:g}; doubling the batch or halving the "
        "rate halves it.",
    )
