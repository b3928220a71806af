r"""Gradient noise: the covariance of the gradients of single samples, and what follows from it.

    Σ(θ) = (1/N) Σ_i (∇ℓ_i − ∇f)(∇ℓ_i − ∇f)ᵀ,      ∇f = (1/N) Σ_i ∇ℓ_i
    Cov g_B = Σ / B                        a mini-batch of B drawn with replacement
            = Σ / B · (N − B) / (N − 1)    drawn without

Σ is never formed. Products with it come from per-sample gradients that stay factored into layer inputs and
costates (:mod:`bolza.ops.noise`), and so do samples of the noise, Σ^{1/2} ξ = N^{−1/2} Σ_i ξ_i (∇ℓ_i − ∇f).

Two kinds of error bar: the N samples are a draw from the population of all data, so numbers about the
population carry a jackknife standard error over samples; numbers about these N samples are exact, or say by
how much their own estimate may be off.

Reference: McCandlish et al. (2018), *An Empirical Model of Large-Batch Training*, eq. 2.8–2.9 and appendix A;
Smith & Le (2018) and Jastrzębski et al. (2017) for the temperature.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, ShapeError
from bolza.core.reference import Reference, cites
from bolza.ops.batches import Data, Loss
from bolza.ops.krylov import EigenResult, Estimate, LinearOperator, top_eigenpairs, trace
from bolza.ops.noise import PerSampleGradients

__all__ = ["GradientNoise", "gradient_noise"]

_REFERENCE = Reference(
    key="mccandlish2018empirical",
    authors="McCandlish, Sam and Kaplan, Jared and Amodei, Dario and {OpenAI Dota Team}",
    title="An Empirical Model of Large-Batch Training",
    year=2018,
    arxiv="1812.06162",
)

_DENSE = 512  # parameters up to which Σ itself is the cheapest thing to work with
_GRAM = 4096  # samples up to which their inner products are
_EIGH = 256  # samples up to which all eigenvalues of that matrix are cheaper than a few


def _jackknife(value: float, without: Tensor) -> Estimate:
    """A statistic, with the standard error that follows from its values without each sample."""
    n = without.numel()
    spread = (without - without.mean()).square().sum() * (n - 1) / n
    return Estimate(value, float(spread.sqrt()))


@dataclass(frozen=True)
class _Moments:
    """tr Σ, |∇f|² and their values without each sample, for one group of parameters; float64."""

    deviations: Tensor  # |g_i − ḡ|², (N,)
    along: Tensor  # (g_i − ḡ) · ḡ, (N,)
    mean_square: float  # |ḡ|²

    @property
    def count(self) -> int:
        return self.deviations.numel()

    @property
    def trace(self) -> float:
        return float(self.deviations.mean())

    def traces_without(self) -> Tensor:
        n = self.count
        return (n * self.trace - n / (n - 1) * self.deviations) / (n - 1)

    def mean_squares_without(self) -> Tensor:
        n = self.count
        return self.mean_square - 2 * self.along / (n - 1) + self.deviations / (n - 1) ** 2

    def population(self) -> tuple[float, float]:
        """Unbiased tr Σ and |∇f|² of the population."""
        variance = self.trace * self.count / (self.count - 1)
        return variance, self.mean_square - variance / self.count

    def population_without(self) -> tuple[Tensor, Tensor]:
        n = self.count - 1
        variance = self.traces_without() * (n / (n - 1) if n > 1 else math.nan)
        return variance, self.mean_squares_without() - variance / n


def _ratio(top: float, bottom: float, tops: Tensor, bottoms: Tensor) -> Estimate:
    """Ratio top / bottom with its jackknife error; infinite when the bottom is not positive."""
    if bottom <= 0:
        return Estimate(math.inf, math.inf)
    return _jackknife(top / bottom, tops / bottoms)


@dataclass(frozen=True)
class GradientNoise:
    """Covariance Σ of per-sample gradients at fixed parameters, as an operator on flat vectors.

    Made by :func:`gradient_noise`. Vectors are in the order of ``model.parameters()``.

    Attributes:
        gradients: the per-sample gradients.
        replacement: whether mini-batches are drawn with replacement.
    """

    gradients: PerSampleGradients
    replacement: bool = True

    @property
    def samples(self) -> int:
        """Number N of samples."""
        return self.gradients.samples

    @property
    def size(self) -> int:
        """Number d of parameters."""
        return self.gradients.size

    @property
    def mean(self) -> Tensor:
        """The full gradient ∇f, ``(d,)``."""
        return self.gradients.mean

    @property
    def covariance(self) -> LinearOperator:
        """Σ of single samples."""
        g = self.gradients
        return LinearOperator(g.covariance_product, g.size, g.dtype, g.device, blocks=True)

    def scale(self, batch_size: int) -> float:
        """Factor from Σ to the covariance of a mini-batch: 1/B, or (N − B) / (B (N − 1)).

        Args:
            batch_size: B; at most N without replacement.

        Raises:
            ArgumentError: B is out of range.
        """
        n = self.samples
        if batch_size < 1 or (not self.replacement and batch_size > n):
            raise ArgumentError(f"batch_size is {batch_size}: it must be between 1 and the {n} samples")
        return 1 / batch_size if self.replacement else (n - batch_size) / (batch_size * (n - 1))

    def minibatch(self, batch_size: int) -> LinearOperator:
        """Covariance of the gradient of a mini-batch, as an operator.

        Args:
            batch_size: B.
        """
        g, factor = self.gradients, self.scale(batch_size)
        return LinearOperator(
            lambda v: g.covariance_product(v) * factor, g.size, g.dtype, g.device, blocks=True
        )

    def matvec(self, v: Tensor) -> Tensor:
        """Return Σ v.

        Args:
            v: ``(d,)``, or several columns ``(d, k)``.
        """
        return self.covariance @ v

    def sample(
        self, generator: torch.Generator | None = None, batch_size: int = 1, count: int | None = None
    ) -> Tensor:
        """Draw Gaussian noise with the covariance of a mini-batch gradient, Σ^{1/2} ξ scaled.

        Args:
            generator: source of ξ.
            batch_size: B; 1 with replacement is Σ itself.
            count: number of draws; one without it.

        Returns:
            ``(d,)``, or ``(d, count)``.
        """
        n = self.samples
        device = torch.device("cpu") if generator is None else generator.device
        xi = torch.randn(n, count or 1, dtype=self.mean.dtype, device=device, generator=generator)
        xi = xi.to(self.mean.device)
        noise = self.gradients.combine(xi - xi.mean(0)) * math.sqrt(self.scale(batch_size) / n)
        return noise if count is not None else noise[:, 0]

    def trace(self) -> Estimate:
        """Tr Σ of these samples (exact), with its standard error as an estimate for the population."""
        moments = self._moments
        return _jackknife(moments.trace, moments.traces_without())

    def trace_with(
        self, matrix: LinearOperator | Tensor, products: int = 60, generator: torch.Generator | None = None
    ) -> Estimate:
        """Tr(H Σ), for example with the Hessian: the rate at which noise lifts the loss.

        Args:
            matrix: symmetric H of size d: an operator, or a dense matrix.
            products: budget of products with H; with N or more the result is exact.
            generator: of the random signs of Hutch++.

        Returns:
            Estimate; its error is that of the stochastic trace, over nothing but signs.

        Raises:
            DataError: the factors are not stored, and the data come in another order at every pass.
            ShapeError: H is not of size d.
        """
        h = LinearOperator.from_matrix(matrix) if isinstance(matrix, Tensor) else matrix
        if h.size != self.size:
            raise ShapeError(f"matrix has size {h.size}, but there are {self.size} parameters")
        g, n = self.gradients, self.samples
        g.check_order()

        # tr(H Σ) = tr(C H Cᵀ) / N on the side of the samples, C the centred gradients: small, and low in rank
        def product(c: Tensor) -> Tensor:
            bent = h @ g.combine(c - c.mean(0))
            return (g.dots(bent) - (g.mean @ bent)) / n

        return trace(
            LinearOperator(product, n, g.dtype, g.device, blocks=True), products, generator=generator
        )

    def eigh(
        self, k: int = 10, *, tol: float = 1e-4, generator: torch.Generator | None = None
    ) -> EigenResult:
        """Top eigenpairs of Σ.

        Args:
            k: how many; at most N − 1 can be positive.
            tol: relative accuracy of the eigenvalues where they are found by iteration with Σ itself (more than
                4096 samples, or factors that are not stored); otherwise they are exact to rounding.
            generator: of the start of the iteration.

        Returns:
            EigenResult.

        Raises:
            ArgumentError: k out of range.
        """
        if not 1 <= k <= min(self.size, self.samples - 1):
            raise ArgumentError(
                f"k is {k}: {self.samples} samples of {self.size} gradients have at most "
                f"{min(self.size, self.samples - 1)} eigenvalues that are not zero"
            )
        g = self.gradients
        if self.size <= min(_DENSE, self.samples):
            values, vectors = torch.linalg.eigh(self._dense)
            return self._exact(values[-k:].flip(0), vectors[:, -k:].flip(1).to(g.dtype))
        if self._uses_gram:
            gram = self._gram / self.samples
            if self.samples <= _EIGH:
                values, weights = torch.linalg.eigh(gram)
                values, weights = values[-k:].flip(0), weights[:, -k:].flip(1)
            else:
                small = LinearOperator.from_matrix(gram)
                found = top_eigenpairs(small, k, tol=1e-8, max_products=4 * self.samples, generator=generator)
                values, weights = found.eigenvalues.to(gram), found.eigenvectors
            vectors = g.combine((weights - weights.mean(0)).to(g.dtype))
            return self._exact(values, vectors / vectors.norm(dim=0).clamp_min(torch.finfo(g.dtype).tiny))
        return top_eigenpairs(self.covariance, k, tol=tol, block=1 if g.stored else 4, generator=generator)

    def effective_rank(self, products: int = 60, generator: torch.Generator | None = None) -> Estimate:
        """Participation ratio (tr Σ)² / tr Σ²: the number of directions the noise has.

        Exact for these samples when d or N is small enough for a dense matrix (d ≤ 512 or N ≤ 4096), and then
        the error is the jackknife over samples. Otherwise tr Σ² comes from Hutch++, whose error it is. The
        value is below that of the population, and never above N − 1.

        Args:
            products: budget of products with Σ where it is estimated.
            generator: of the random signs.
        """
        total = self._moments.trace
        if total <= 10 * torch.finfo(self.mean.dtype).eps * self._moments.mean_square:
            return Estimate(0.0)  # the samples agree to rounding
        n, u = self.samples, self._moments.deviations
        if self.size <= min(_DENSE, n):
            square = float(self._dense.square().sum())
            centred = self.gradients.dots(torch.eye(self.size).to(self.mean)).double() - self.mean.double()
            quadratic = ((centred @ self._dense) * centred).sum(1)
        elif self._uses_gram:
            square = float(self._gram.square().sum()) / n**2
            quadratic = self._gram.square().sum(1) / n
        else:
            estimate = self._trace_of_square(products, generator)
            value = total**2 / estimate.value
            return Estimate(value, value * estimate.error / estimate.value)
        # (N−1) Σ without i = N Σ − N/(N−1) u_i u_iᵀ
        squares = (n**2 * square - 2 * n**2 / (n - 1) * quadratic + (n / (n - 1)) ** 2 * u**2) / (n - 1) ** 2
        without = self._moments.traces_without() ** 2 / squares
        return _jackknife(total**2 / square, without)

    def snr(self) -> Estimate:
        """Signal-to-noise ratio |∇f|² / tr Σ of a single sample; of a mini-batch B it is B times this."""
        return self._snr(self._moments)

    def per_layer_snr(self) -> dict[str, Estimate]:
        """Signal-to-noise ratio of each layer, by module name, unbiased, with jackknife errors.

        The gradient of a layer stands out of the noise of a mini-batch when B times this exceeds 1. Zero
        within its error means that these N samples do not show the gradient at all. A layer without any
        gradient has nan.
        """
        layers: dict[str, list[int]] = {}
        for i, name in enumerate(self.gradients.names):
            layers.setdefault(name.rpartition(".")[0], []).append(i)
        return {layer: self._snr(self._moments_of(columns)) for layer, columns in layers.items()}

    def squared_gradient(self) -> Estimate:
        """|∇f|² of the population, without bias: |ḡ|² less tr Σ / N; it may come out below zero."""
        _, square = self._moments.population()
        return _jackknife(square, self._moments.population_without()[1])

    def noise_scale(self) -> Estimate:
        """Simple noise scale tr Σ / |∇f|²: the batch at which noise and signal are equal.

        Both are unbiased estimates for the population. Infinite when |∇f|² is not distinguishable from zero.
        """
        moments = self._moments
        return _ratio(*moments.population(), *moments.population_without())

    def critical_batch_size(
        self,
        hessian: LinearOperator | None = None,
        products: int = 60,
        generator: torch.Generator | None = None,
    ) -> Estimate:
        """Batch size beyond which larger batches bring little: tr Σ / |∇f|², or tr(HΣ) / ∇fᵀH∇f with a Hessian.

        At this B a step with the best learning rate makes half the progress of one with the full gradient. The
        first form takes the Hessian as a multiple of the identity.

        Args:
            hessian: the Hessian at the same parameters.
            products: budget of products with it.
            generator: of the random signs.

        Returns:
            Estimate; infinite when the gradient drowns in the noise of all N samples. With a Hessian its error
            holds that of tr(HΣ) only.
        """
        if hessian is None:
            return self.noise_scale()
        n = self.samples
        along = float(self.mean @ (hessian @ self.mean))
        spread = self.trace_with(hessian, products, generator)
        top = spread.value * n / (n - 1)
        bottom = along - top / n
        if bottom <= 0 or top <= 0:
            return Estimate(math.inf, math.inf)
        return Estimate(top / bottom, spread.error * n / (n - 1) * along / bottom**2)

    def temperature(self, lr: float, batch_size: int, momentum: float = 0.0) -> float:
        """Temperature β⁻¹ of SGD: dθ = −∇f dt + (2 β⁻¹ Σ)^{1/2} dW with β⁻¹ = lr / (2 B (1 − μ)).

        Args:
            lr: learning rate; a unit of time is 1/lr steps (1/lr · (1 − μ) with momentum).
            batch_size: B.
            momentum: heavy-ball μ.

        Raises:
            ArgumentError: momentum is not in [0, 1).
        """
        if not 0 <= momentum < 1:
            raise ArgumentError(f"momentum is {momentum}: it must be at least 0 and below 1")
        return lr * self.scale(batch_size) / (2 * (1 - momentum))

    @cached_property
    def _overlaps(self) -> tuple[Tensor, Tensor, Tensor]:
        """|g_i − ḡ|² and (g_i − ḡ)·ḡ by parameter, and |ḡ|² by parameter."""
        squares, along = self.gradients.squares_and_overlaps()
        parts = self.mean.double().split(list(self.gradients.sizes))
        mean_squares = torch.stack([part.square().sum() for part in parts])
        return (squares - 2 * along + mean_squares).clamp_min(0), along - mean_squares, mean_squares

    def _moments_of(self, columns: list[int]) -> _Moments:
        deviations, along, mean_squares = self._overlaps
        return _Moments(
            deviations[:, columns].sum(1), along[:, columns].sum(1), float(mean_squares[columns].sum())
        )

    @cached_property
    def _moments(self) -> _Moments:
        return self._moments_of(list(range(len(self.gradients.names))))

    @staticmethod
    def _snr(moments: _Moments) -> Estimate:
        variance, square = moments.population()
        if variance <= 0:
            return Estimate(math.inf if square > 0 else math.nan, math.nan)
        variances, squares = moments.population_without()
        return _jackknife(square / variance, squares / variances)

    @property
    def _uses_gram(self) -> bool:
        return self.gradients.stored and self.samples <= _GRAM

    @cached_property
    def _gram(self) -> Tensor:
        return self.gradients.gram()

    @cached_property
    def _dense(self) -> Tensor:
        eye = torch.eye(self.size, dtype=self.mean.dtype, device=self.mean.device)
        dense = self.gradients.covariance_product(eye).double()
        return (dense + dense.T) / 2

    def _exact(self, values: Tensor, vectors: Tensor) -> EigenResult:
        residuals = (self.matvec(vectors).double() - vectors.double() * values).norm(dim=0).cpu()
        values = values.double().cpu()
        return EigenResult(values, vectors, residuals, residuals, 0, 0, True)

    def _trace_of_square(self, products: int, generator: torch.Generator | None) -> Estimate:
        g = self.gradients
        squared = LinearOperator(
            lambda v: g.covariance_product(g.covariance_product(v)), g.size, g.dtype, g.device, blocks=True
        )
        return trace(squared, max(6, products // 2), generator=generator)


@cites(_REFERENCE)
def gradient_noise(
    model: nn.Module,
    loss: Loss,
    data: Data,
    params: Iterable[str] | None = None,
    *,
    replacement: bool = True,
    chunk: int = 256,
    memory: int = 2**30,
    seed: int = 0,
) -> GradientNoise:
    r"""Covariance Σ of the gradients of single samples, and of the mini-batch gradient, by products.

        Σ = (1/N) Σ_i (∇ℓ_i − ∇f)(∇ℓ_i − ∇f)ᵀ,    Cov g_B = Σ/B, times (N − B)/(N − 1) without replacement

    Costs one forward and backward pass over ``data`` where the layers of the model treat samples apart, and
    holds what enters and comes back to each layer; parameters of other layers go through
    ``torch.func.vmap``. Everything refers to the parameters at the time of the call.

    A sample must have a gradient of its own: the model is evaluated in evaluation mode (no dropout), and a
    batch norm in training mode normalises by the mean and variance of ``data``, held fixed. What batch norm
    adds by coupling the samples of a batch is therefore not in Σ.

    Args:
        model: the network.
        loss: ``loss(prediction, y)``, a mean over samples. A sample is one entry of the first dimension: with
            a mean over tokens, a sequence.
        data: one pair ``(x, y)``, or an iterable of batches that gives the same batches every time.
        params: names of parameters or modules; all that have ``requires_grad`` by default.
        replacement: whether mini-batches are drawn with replacement.
        chunk: samples in one pass, which bounds the memory of a pass.
        memory: bytes that layer inputs and costates may take in all; beyond it they are computed again at
            every product.
        seed: of the random numbers the model draws even in evaluation mode.

    Returns:
        GradientNoise.

    Raises:
        ArgumentError: the loss is not a mean over samples, or there is nothing to differentiate.
        DataError: fewer than two samples, or lengths that differ.
        DivergenceError: a gradient is not finite.
        UnsupportedError: the gradients of single samples cannot be had.

    Reference: McCandlish et al. (2018). Departure: Σ has 1/N, as the covariance of a draw from these N
    samples; numbers about the population (``noise_scale``, signal-to-noise) use N − 1 and unbiased |∇f|².

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net, x = nn.Linear(3, 1), torch.randn(50, 3)
        >>> y = x.sum(1, keepdim=True) + torch.randn(50, 1)
        >>> noise = gradient_noise(net, nn.functional.mse_loss, (x, y), replacement=False)
        >>> noise.samples, noise.matvec(torch.ones(4)).shape
        (50, torch.Size([4]))
        >>> bool(torch.isclose(noise.covariance.dense().trace(), torch.tensor(noise.trace().value)))
        True
        >>> noise.scale(50)                                       # a batch of all samples has no noise
        0.0
    """
    return GradientNoise(
        PerSampleGradients(model, loss, data, params, chunk=chunk, memory=memory, seed=seed), replacement
    )
