r"""How flat a minimum is, by measures that do or do not survive a change of parameters.

A ReLU network computes the same function when one layer is multiplied by c and the next by 1/c, but its Hessian,
gradients and noise all change: with T = diag(c, 1/c) on the blocks, θ' = Tθ, ∇' = T⁻¹∇, H' = T⁻¹HT⁻¹, Σ' = T⁻¹ΣT⁻¹.

    moves     λ_max(H),  tr H,  tr(HΣ),  |θ| (tr H)^{1/2}
    stays     Σ_p |θ_p| (tr H_pp)^{1/2}     over parameter tensors p: PAC-Bayes with the best variance for each
              Σ_j θ_j² H_jj                 curvature per relative change of every weight
              mean (θ·g_i)²                 Fisher–Rao norm, θᵀFθ with the uncentred covariance of gradients

tr(HΣ) is how fast SGD *in these coordinates* lifts the loss out of the minimum; it changes as SGD itself does.

Reference: Dinh et al. (2017), *Sharp Minima Can Generalize For Deep Nets* (what moves); Tsuzuku, Sato & Sugiyama
(2020), *Normalized Flat Minima* (PAC-Bayes); Kwon et al. (2021), *ASAM* (relative change); Liang et al. (2019),
*Fisher-Rao Metric, Geometry, and Complexity of Neural Networks*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError
from bolza.core.reference import Reference, cites
from bolza.ops.batches import Data, Loss, batches_of, select_parameters
from bolza.ops.curvature import hessian_operator
from bolza.ops.krylov import EigenResult, Estimate, LinearOperator, top_eigenpairs
from bolza.sde.gradient_noise import GradientNoise, gradient_noise

__all__ = ["Flatness", "FlatnessMeasure", "flatness"]

DINH = Reference(
    key="dinh2017sharp",
    authors="Dinh, Laurent and Pascanu, Razvan and Bengio, Samy and Bengio, Yoshua",
    title="Sharp Minima Can Generalize For Deep Nets",
    year=2017,
    arxiv="1703.04933",
)
TSUZUKU = Reference(
    key="tsuzuku2020normalized",
    authors="Tsuzuku, Yusuke and Sato, Issei and Sugiyama, Masashi",
    title="Normalized Flat Minima: Exploring Scale Invariant Definition of Flat Minima for Neural Networks Using "
    "PAC-Bayesian Analysis",
    year=2020,
    arxiv="1901.04653",
)
LIANG = Reference(
    key="liang2019fisher",
    authors="Liang, Tengyuan and Poggio, Tomaso and Rakhlin, Alexander and Stokes, James",
    title="Fisher-Rao Metric, Geometry, and Complexity of Neural Networks",
    year=2019,
    arxiv="1711.01530",
)
KWON = Reference(
    key="kwon2021asam",
    authors="Kwon, Jungmin and Kim, Jeongseop and Park, Hyunseo and Choi, In Kwon",
    title="ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks",
    year=2021,
    arxiv="2102.11600",
)


@dataclass(frozen=True)
class FlatnessMeasure:
    """One measure.

    Attributes:
        name: what it is, in symbols.
        value: the number, with the standard error of its estimate.
        invariant: whether it stays when layers are rescaled so that the function stays.
        meaning: what it says, in words.
    """

    name: str
    value: Estimate
    invariant: bool
    meaning: str

    def __str__(self) -> str:
        kind = "invariant" if self.invariant else "depends on the parametrisation"
        return f"{self.name} = {self.value} ({kind}): {self.meaning}"


@dataclass(frozen=True)
class Flatness:
    """Measures of one minimum, small is flat.

    Attributes:
        top_eigenvalue: λ_max(H).
        trace: tr H.
        noise_trace: tr(HΣ).
        pac_bayes: |θ| (tr H / N)^{1/2}, one variance for all parameters.
        pac_bayes_layers: Σ_p |θ_p| (tr H_pp / N)^{1/2}, a variance for each parameter tensor.
        relative: Σ_j θ_j² H_jj.
        fisher_rao: mean (θ·g_i)².
    """

    top_eigenvalue: FlatnessMeasure
    trace: FlatnessMeasure
    noise_trace: FlatnessMeasure
    pac_bayes: FlatnessMeasure
    pac_bayes_layers: FlatnessMeasure
    relative: FlatnessMeasure
    fisher_rao: FlatnessMeasure

    @property
    def measures(self) -> tuple[FlatnessMeasure, ...]:
        """All of them, in the order above."""
        return tuple(vars(self).values())

    def __str__(self) -> str:
        return "\n".join(map(str, self.measures))


@cites(DINH, TSUZUKU, LIANG, KWON)
def flatness(
    model: nn.Module,
    loss: Loss,
    data: Data,
    *,
    probes: int = 30,
    hessian: EigenResult | None = None,
    noise: GradientNoise | None = None,
    generator: torch.Generator | None = None,
) -> Flatness:
    r"""Measure how flat a minimum is, each measure labelled by whether rescaling the layers changes it.

    Use the invariant ones to compare minima: the others compare parametrisations as well. Costs about 2 ``probes``
    Hessian products and one pass of per-sample gradients; the model is only read.

    Args:
        model: the network, at a minimum.
        loss: ``loss(prediction, y)``, a mean over samples.
        data: one pair ``(x, y)`` or an iterable of batches.
        probes: random signs for the diagonal of the Hessian; exact with as many as there are parameters or more.
        hessian: top eigenpairs found before; only the largest is used.
        noise: gradient noise found before at the same parameters.
        generator: of the random signs.

    Returns:
        Flatness; standard errors are over the probes, for the Fisher–Rao norm over samples.

    Raises:
        ArgumentError: fewer than two probes.
        UnsupportedError: the model has no second derivatives or per-sample gradients.

    Reference: Dinh et al. (2017); Tsuzuku, Sato & Sugiyama (2020); Kwon et al. (2021); Liang et al. (2019).
    Departures: the PAC-Bayes measures are the sum of expected rise ½σ²tr H and complexity |θ|²/(2σ²N), at the best σ²,
    without the constants of a bound; a parameter tensor takes the place of a row of weights.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> x = torch.randn(50, 2, generator=draw)
        >>> found = flatness(net, nn.functional.mse_loss, (x, x[:, :1]), generator=draw)
        >>> [measure.name for measure in found.measures if not measure.invariant]
        ['λ_max(H)', 'tr H', 'tr(HΣ)', 'PAC-Bayes, one variance']
    """
    if probes < 2:
        raise ArgumentError(f"probes is {probes}: an error bar needs at least 2")
    batches = batches_of(data)
    params = list(select_parameters(model).values())
    operator = hessian_operator(model, loss, batches)
    if noise is None:
        noise = gradient_noise(model, loss, batches)
    if hessian is None:
        hessian = top_eigenpairs(operator, 1, which="largest algebraic", generator=generator)
    theta = torch.cat([p.detach().reshape(-1) for p in params])
    sizes = [p.numel() for p in params]
    norms = torch.stack([part.double().norm() for part in theta.split(sizes)]).cpu()

    diagonal, exact = _diagonal(operator, probes, generator)  # (probes, d), or the diagonal itself
    blocks = torch.stack([part.double().sum(1) for part in diagonal.split(sizes, 1)], 1).cpu()
    relative = (diagonal.double() @ theta.double().square()).cpu()
    total = blocks.sum(1)
    n = noise.samples
    trace = _mean(total, exact)
    along = noise.gradients.dots(theta).double().square().cpu()
    per_block = [_mean(column, exact) for column in blocks.unbind(1)]
    parts = [float(norm) * _root(block, n) for norm, block in zip(norms, per_block, strict=True)]
    # the blocks share their probes: errors go through the derivative of the sum, probe by probe; √ is flat enough for
    # that only above the error of a block
    slopes = torch.tensor(
        [
            float(norm) / (2 * math.sqrt(n * max(block.value, block.error, 1e-300)))
            for norm, block in zip(norms, per_block, strict=True)
        ],
        dtype=torch.float64,
    )
    length = float(norms.norm())
    one_slope = length / (2 * math.sqrt(n * max(trace.value, trace.error, 1e-300)))
    top = int(hessian.eigenvalues.argmax())
    return Flatness(
        FlatnessMeasure(
            "λ_max(H)",
            Estimate(float(hessian.eigenvalues[top]), float(hessian.errors[top])),
            False,
            "curvature of the steepest direction, which limits the learning rate",
        ),
        FlatnessMeasure("tr H", trace, False, "sum of all curvatures"),
        FlatnessMeasure(
            "tr(HΣ)",
            noise.trace_with(operator, max(6, probes), generator),
            False,
            "how fast the noise of SGD, in these coordinates, lifts the loss out of the minimum",
        ),
        FlatnessMeasure(
            "PAC-Bayes, one variance",
            Estimate(length * _root(trace, n), one_slope * trace.error),
            False,
            "best sum of rise under random weights and their complexity, all weights equally random",
        ),
        FlatnessMeasure(
            "PAC-Bayes, a variance each tensor",
            Estimate(sum(parts), _mean(blocks @ slopes, exact).error),
            True,
            "the same, with the best randomness for every weight matrix and bias",
        ),
        FlatnessMeasure(
            "Σ θ²H",
            _mean(relative, exact),
            True,
            "rise of the loss when every weight changes by the same percentage",
        ),
        FlatnessMeasure(
            "Fisher–Rao norm",
            _mean(along, False),
            True,
            "mean squared change of a sample's loss when all weights grow by the same percentage",
        ),
    )


def _diagonal(
    operator: LinearOperator, probes: int, generator: torch.Generator | None
) -> tuple[Tensor, bool]:
    """Unbiased draws of the diagonal, z ∘ Hz with random signs; the diagonal itself where that costs no more."""
    n = operator.size
    if probes >= n:
        return operator.dense().diagonal()[None], True
    device = torch.device("cpu") if generator is None else generator.device
    signs = torch.randint(0, 2, (n, probes), device=device, generator=generator).to(
        operator.device, operator.dtype
    )
    signs = 2 * signs - 1
    return (signs * (operator @ signs)).T, False


def _mean(values: Tensor, exact: bool) -> Estimate:
    if exact:
        return Estimate(float(values.mean()))
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(len(values)))


def _root(trace: Estimate, n: int) -> float:
    """√(tr H / N), nothing where the estimate is not positive."""
    return math.sqrt(max(0.0, trace.value) / n)
