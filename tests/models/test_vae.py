"""Variational autoencoders."""

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence

from bolza.core.errors import ArgumentError, DataError, ShapeError
from bolza.models import VAE, gaussian_kl, vae


def test_the_divergence_is_that_of_the_distributions():
    g = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 5, 3, dtype=torch.float64, generator=g)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(gaussian_kl(mean, log_variance), expected, rtol=1e-12, atol=1e-14)


def test_the_divergence_is_exact_where_the_variance_is_almost_one():
    log_variance = torch.tensor(1e-7, dtype=torch.float64)
    assert gaussian_kl(torch.zeros_like(log_variance), log_variance).item() == pytest.approx(2.5e-15, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hidden", [(), (12,), (12, 7)])
def test_the_terms_are_log_likelihoods_summed_over_a_sample_and_averaged_over_the_batch(hidden, dtype):
    torch.manual_seed(0)
    x, noise = torch.rand(9, 6, dtype=dtype), torch.randn(9, 4, dtype=dtype)
    for likelihood in ("bernoulli", "gaussian"):
        net = vae(6, 4, hidden, likelihood=likelihood).to(dtype)
        reconstruction, kl = net.terms(x, noise)
        code = net(x, noise)
        if likelihood == "bernoulli":
            law = Bernoulli(logits=code.decoded, validate_args=False)
            expected = -law.log_prob(x).sum(1).mean()
        else:
            expected = 0.5 * (x - code.decoded).square().sum(1).mean()
        torch.testing.assert_close(reconstruction, expected)
        torch.testing.assert_close(kl, gaussian_kl(code.mean, code.log_variance).sum() / 9)
        assert kl.dtype == dtype
        (reconstruction + kl).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_the_linear_autoencoder_has_variances_that_do_not_depend_on_the_input():
    net = vae(6, 2, hidden=())
    _, log_variance = net.encode(torch.randn(5, 6))
    assert torch.equal(log_variance, torch.zeros(5, 2))
    assert not any(isinstance(m, nn.ReLU) for m in net.modules())


def test_images_may_be_encoded_by_convolutions():
    encoder = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(64, 6)
    )
    decoder = nn.Sequential(
        nn.Linear(3, 64), nn.Tanh(), nn.Unflatten(1, (4, 4, 4)), nn.ConvTranspose2d(4, 1, 2, 2)
    )
    reconstruction, kl = VAE(encoder, decoder).terms(torch.rand(3, 1, 8, 8))
    assert reconstruction.ndim == kl.ndim == 0


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(ArgumentError, match="likelihood"):
        vae(likelihood="poisson")
    with pytest.raises(ArgumentError, match=r"hidden\[1\]"):
        vae(hidden=(3, 0))
    with pytest.raises(DataError, match="between -1 and 2"):
        vae(3, 1).terms(torch.tensor([[-1.0, 0.5, 2.0]]))
    with pytest.raises(ShapeError, match="encoder"):
        VAE(nn.Linear(6, 3), nn.Linear(1, 6)).terms(torch.rand(2, 6))
    with pytest.raises(ShapeError, match="decoder"):
        VAE(nn.Linear(6, 4), nn.Linear(2, 5)).terms(torch.rand(2, 6))
