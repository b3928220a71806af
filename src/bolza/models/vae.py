r"""Variational autoencoders: an encoder and a decoder, and the two terms of their loss.

    z = μ(x) + σ(x) ε,    ε ~ N(0, I)
    reconstruction = E[−ln p(x | z)],    KL = ½ Σ_j (μ_j² + σ_j² − 1 − ln σ_j²)

Both are sums over the entries of a sample and means over the batch, in nats, so that reconstruction + KL is the
negative evidence bound up to a constant.

Reference: Kingma & Welling (2014), *Auto-Encoding Variational Bayes*, arXiv:1312.6114.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, DataError, ShapeError
from bolza.core.reference import Reference, cites
from bolza.models.mlp import activation_module, positive

__all__ = ["VAE", "Code", "Likelihood", "gaussian_kl", "vae"]

REFERENCE = Reference(
    "kingma2014vae",
    "Kingma, Diederik P. and Welling, Max",
    "Auto-Encoding Variational Bayes",
    2014,
    venue="International Conference on Learning Representations",
    arxiv="1312.6114",
)
Likelihood = Literal["bernoulli", "gaussian"]


class Code(NamedTuple):
    """What an autoencoder makes of a batch.

    Attributes:
        decoded: output of the decoder: logits for a Bernoulli likelihood, means for a Gaussian one.
        mean: means of the code, shape ``(batch, latent)``.
        log_variance: logarithms of its variances, same shape.

    Example:
        >>> vae(6, 2, hidden=(4,))(torch.rand(3, 6)).mean.shape
        torch.Size([3, 2])
    """

    decoded: Tensor
    mean: Tensor
    log_variance: Tensor


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    r"""KL divergence of N(μ, σ²) from N(0, 1), entry by entry, ½(μ² + σ² − 1 − ln σ²).

    Args:
        mean: μ, any shape.
        log_variance: ln σ², same shape.

    Returns:
        KL in nats, same shape, never negative.

    Example:
        >>> gaussian_kl(torch.tensor([0.0, 1.0]), torch.zeros(2))
        tensor([0.0000, 0.5000])
    """
    return 0.5 * (mean.square() + torch.expm1(log_variance) - log_variance)


@cites(REFERENCE)
class VAE(nn.Module):
    r"""Variational autoencoder of a given encoder and decoder.

    Args:
        encoder: module that gives ``(batch, 2 · latent)``: means and logarithms of variances of the code.
        decoder: module that reads ``(batch, latent)`` and gives as many entries a sample as the input has.
        likelihood: ``"bernoulli"``: inputs in [0, 1], the decoder gives logits; ``"gaussian"``: unit variance,
            reconstruction ½‖x − x̂‖² without its constant.

    Raises:
        ArgumentError: the likelihood is not known.

    Reference: Kingma & Welling (2014), arXiv:1312.6114, eq. 10.

    Example:
        >>> net = VAE(torch.nn.Linear(6, 4), torch.nn.Linear(2, 6))
        >>> reconstruction, kl = net.terms(torch.rand(5, 6))
        >>> (reconstruction + 0.5 * kl).backward()
    """

    _looked = False

    def __init__(self, encoder: nn.Module, decoder: nn.Module, likelihood: Likelihood = "bernoulli") -> None:
        super().__init__()
        if likelihood not in ("bernoulli", "gaussian"):
            raise ArgumentError(f"likelihood={likelihood!r} is unknown: choose 'bernoulli' or 'gaussian'")
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood = likelihood

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and logarithms of the variances of the code, each ``(batch, latent)``."""
        code = self.encoder(x)
        if code.ndim != 2 or code.shape[1] % 2:
            raise ShapeError(
                f"the encoder gives {tuple(code.shape)}: it must be (batch, 2 · latent), means and log variances"
            )
        mean, log_variance = code.chunk(2, 1)
        return mean, log_variance

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Code:
        """Encode, draw a code, decode.

        Args:
            x: inputs, shape ``(batch, *input)``.
            noise: standard normal draws ε, shape ``(batch, latent)``; drawn if not given.

        Returns:
            Decoded inputs and the law of the code.
        """
        mean, log_variance = self.encode(x)
        epsilon = torch.randn_like(mean) if noise is None else noise
        return Code(self.decoder(mean + (0.5 * log_variance).exp() * epsilon), mean, log_variance)

    def terms(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reconstruction and KL: what a weight β trades against each other.

        Args:
            x: inputs, shape ``(batch, *input)``.
            noise: as in :meth:`forward`.

        Returns:
            Two scalars in nats: sums over a sample, means over the batch.

        Raises:
            ShapeError: the decoder does not give as many entries a sample as the input has.
            DataError: an input of the first batch lies outside [0, 1], where a Bernoulli likelihood is none.
        """
        if self.likelihood == "bernoulli" and not self._looked:
            self._look_at(x)
        code = self(x, noise)
        if code.decoded.numel() != x.numel():
            raise ShapeError(
                f"the decoder gives {tuple(code.decoded.shape)} for inputs of shape {tuple(x.shape)}: "
                "it must give as many entries a sample"
            )
        decoded = code.decoded.reshape(x.shape)
        if self.likelihood == "bernoulli":
            total = F.binary_cross_entropy_with_logits(decoded, x, reduction="sum")
        else:
            total = 0.5 * (x - decoded).square().sum()
        return total / x.shape[0], gaussian_kl(code.mean, code.log_variance).sum(1).mean()

    def _look_at(self, x: Tensor) -> None:
        """Refuse inputs that are no probabilities; once, as the answer is waited for on a GPU."""
        if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return
        if not bool(((x >= 0) & (x <= 1)).all()):
            raise DataError(
                f"inputs lie between {float(x.min()):g} and {float(x.max()):g}: a Bernoulli likelihood needs [0, 1]; "
                "rescale them, or use likelihood='gaussian'"
            )
        self._looked = True


class _FreeVariance(nn.Module):
    """Affine means, and variances that are learned but do not depend on the input."""

    def __init__(self, in_features: int, latent: int) -> None:
        super().__init__()
        self.mean = nn.Linear(in_features, latent)
        self.log_variance = nn.Parameter(torch.zeros(latent))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean(x)
        return torch.cat([mean, self.log_variance.expand_as(mean)], -1)


@cites(REFERENCE)
def vae(
    in_features: int = 64,
    latent: int = 10,
    hidden: Sequence[int] = (128,),
    activation: str | Callable[[], nn.Module] = "relu",
    likelihood: Likelihood = "bernoulli",
) -> VAE:
    r"""A variational autoencoder of two multi-layer perceptrons, mirror images of each other.

    Args:
        in_features: length of the input vector.
        latent: length of the code.
        hidden: widths of the encoder's hidden layers; the decoder has them in reverse. Empty: the linear
            autoencoder, with variances of the code that do not depend on the input.
        activation: name or class, see :func:`activation_module`.
        likelihood: as in :class:`VAE`.

    Returns:
        The network, with PyTorch's default initialisation.

    Raises:
        ArgumentError: a size is not positive, or a name not known.

    Example:
        >>> vae(64, 10, hidden=(32,))(torch.rand(3, 64)).decoded.shape
        torch.Size([3, 64])
    """
    positive(in_features=in_features, latent=latent, **{f"hidden[{i}]": n for i, n in enumerate(hidden)})
    if not hidden:
        return VAE(_FreeVariance(in_features, latent), nn.Linear(latent, in_features), likelihood)
    encoder = _chain([in_features, *hidden, 2 * latent], activation)
    return VAE(encoder, _chain([latent, *reversed(hidden), in_features], activation), likelihood)


def _chain(sizes: Sequence[int], activation: str | Callable[[], nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (rows, columns) in enumerate(zip(sizes, sizes[1:], strict=False)):
        layers += [activation_module(activation)] if i else []
        layers.append(nn.Linear(rows, columns))
    return nn.Sequential(*layers)
