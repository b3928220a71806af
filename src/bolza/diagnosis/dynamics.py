"""What will the noise of training do at the prescribed learning rate and batch?

Predicted from the curvature and the gradient noise measured at the untrained network, without further passes of
Lanczos or of single samples: the excess loss that SGD keeps at rest, how far it spreads along the steepest direction,
how close learning rate and batch are to the limit of stability in mean square, and the tails of the noise.

Reference: Mandt, Hoffman & Blei (2017), *Stochastic gradient descent as approximate Bayesian inference*; Wu, Ma & E
(2018), *How SGD selects the global minima in over-parameterized learning*; Şimşekli, Sagun & Gürbüzbalaban (2019), *A
tail-index analysis of stochastic gradient noise in deep neural networks*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bolza.diagnosis.problem import Problem
from bolza.diagnosis.record import Finding
from bolza.ops.krylov import EigenResult
from bolza.report import number
from bolza.sde import GradientNoise, network_moments, tail_report

__all__ = ["Dynamics", "findings", "measure_dynamics"]

_DRAWS = 400  # batches drawn from the gradients of single samples
_DIRECTIONS = 4  # random directions along which their tails are read


@dataclass(frozen=True)
class Dynamics:
    """What SGD would do near the present parameters, at given settings.

    Args:
        lr: learning rate.
        batch_size: samples a step.
        momentum: of the heavy ball.
        temperature: lr/(2B(1 − momentum)), that of dθ = −∇f dt + (2TΣ)^{1/2} dW.
        excess_loss: how far the mean loss would lie above the bottom of the valley.
        excess_loss_error: its error.
        blur: standard deviation of the weights along the steepest direction; None where nothing is at rest there.
        offset: distance from here to the bottom in that direction.
        stability: lr over its limit in mean square, with the noise of such batches.
        lr_limit: that limit.
        tail_index: tail index of the noise of a batch, along random directions.
        tail_index_error: its error.
        tails: ``"Gaussian"``, ``"finite variance"``, ``"heavy-tailed"`` or ``"dependent"``.
    """

    lr: float
    batch_size: int
    momentum: float
    temperature: float
    excess_loss: float
    excess_loss_error: float
    blur: float | None
    offset: float | None
    stability: float
    lr_limit: float
    tail_index: float
    tail_index_error: float
    tails: str


def measure_dynamics(
    problem: Problem, hessian: EigenResult, noise: GradientNoise, lr: float, batch_size: int, momentum: float
) -> Dynamics:
    """Predict what SGD does near the present parameters.

    Args:
        problem: network, batch and loss.
        hessian: largest eigenpairs of the Hessian on the batch.
        noise: gradients of single samples of the batch.
        lr: learning rate.
        batch_size: samples a step.
        momentum: of the heavy ball.

    Returns:
        The prediction.

    Raises:
        UnsupportedError: the network has no derivatives along directions.
    """
    found = network_moments(
        problem.model,
        problem.loss,
        problem.batch(noise.samples),
        lr=lr,
        batch_size=batch_size,
        momentum=momentum,
        hessian=hessian,
        noise=noise,
    )
    generator = torch.Generator().manual_seed(problem.seed)
    directions = torch.randn(noise.size, min(_DIRECTIONS, noise.size), generator=generator).to(noise.mean)
    along = noise.gradients.dots(directions).cpu()
    drawn = torch.randint(noise.samples, (_DRAWS, min(batch_size, 4 * noise.samples)), generator=generator)
    tails = tail_report(along[drawn].mean(1), 0)
    blur, offset = float(found.blur[0]), float(found.offset[0])
    excess = found.excess_loss
    return Dynamics(
        lr,
        batch_size,
        momentum,
        found.temperature,
        excess.value,
        excess.error,
        blur if math.isfinite(blur) else None,
        offset if math.isfinite(offset) else None,
        found.stability,
        found.mean_square_limit,
        tails.index,
        tails.error,
        tails.verdict,
    )


def findings(facts: Dynamics) -> list[Finding]:
    """What the noise will do, in words.

    Args:
        facts: of `measure_dynamics`.
    """
    at = f"At learning rate {number(facts.lr)}, batch {facts.batch_size} and momentum {facts.momentum:g}"
    unstable = facts.stability >= 1
    out = [
        Finding(
            "dynamics.stability",
            "learning rate over its limit with noise",
            facts.stability,
            None,
            "bad" if unstable else "good" if facts.stability < 0.5 else "warn",
            f"{at}; SGD with such batches is unstable in mean square from a rate of {number(facts.lr_limit)} on.",
            "Lower the learning rate or take larger batches." if unstable else "",
        ),
        Finding(
            "dynamics.excess_loss",
            "excess loss of the noise at rest",
            facts.excess_loss if math.isfinite(facts.excess_loss) else None,
            facts.excess_loss_error,
            "info",
            "What the noise would add to the loss in a valley with this curvature and this noise, once everything has "
            "come to rest; halving the rate or doubling the batch halves it.",
        ),
    ]
    if facts.blur is not None:
        out.append(
            Finding(
                "dynamics.blur",
                "blur along the steepest direction",
                facts.blur,
                None,
                "info",
                "How far SGD would spread there at rest, in the units of the weights"
                + (
                    f"; the bottom is {number(abs(facts.offset))} away from here."
                    if facts.offset is not None
                    else "."
                ),
            )
        )
    if math.isfinite(facts.tail_index):
        heavy = facts.tails == "heavy-tailed"
        words = {
            "heavy-tailed": "Sums of many batches grow faster than any law of finite variance explains: rare samples "
            "dominate.",
            "finite variance": "Not Gaussian, but of finite variance.",
            "Gaussian": "The noise of a batch cannot be told from Gaussian: the picture of a temperature applies.",
            "dependent": "The draws are not independent: nothing can be said.",
        }
        out.append(
            Finding(
                "dynamics.tail_index",
                "tail index of the noise of a batch",
                facts.tail_index,
                facts.tail_index_error,
                "warn" if heavy else "info",
                words[facts.tails],
                "Clip the gradient, and look at the samples with the largest losses." if heavy else "",
            )
        )
    return out
