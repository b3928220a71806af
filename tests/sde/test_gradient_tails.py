"""Tails of the gradients of mini-batches."""

import math

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError
from bolza.ops.noise import PerSampleGradients
from bolza.ops.persample import Dense, Lookup, Outer, Sum
from bolza.ops.stable_law import stable_noise
from bolza.sde import gradient_tails
from bolza.sde.gradient_tails import _rows, batch_noise
from networks import NETWORKS


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mean_error(prediction, y):
    """Its gradient at a sample is minus y times the input: the noise is that of the data."""
    return -(prediction * y).mean()


def test_some_elements_are_those_of_the_whole_gradient():
    x, p = torch.randn(5, 3, 4, generator=generator()), torch.randn(5, 3, 2, generator=generator(1))
    rows = torch.tensor([[0, 6, 1], [2, 2, 2], [6, 5, 4], [3, 0, 3], [1, 1, 5]])
    outer, dense, lookup = Outer(x, p), Dense(torch.randn(5, 8)), Lookup(rows, p, 7)
    for block in (outer, dense, lookup, Sum((outer, dense))):
        index = torch.tensor([0, 3, 5, block.size - 1])
        assert torch.allclose(_rows(block, index), block.dense()[:, index], atol=1e-6)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_network_gives_the_gradients_of_its_samples(name):
    model, (x, y), loss = NETWORKS[name]()
    before = [p.detach().clone() for p in model.parameters()]
    found = gradient_tails(model, loss, (x, y), 40, draws=60, coordinates=3)
    truth = PerSampleGradients(model, loss, (x, y))
    full = torch.cat([torch.cat([b.dense() for b in part.blocks.values()], 1) for part in truth.chunks()])
    # every column looked at is one of the gradients' columns
    for column in found._samples.T:
        assert float((full.T - column).norm(dim=1).min()) < 1e-5
    assert set(found.layers) | set(found.left_out) == {n.rpartition(".")[0] for n in truth.names}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("replacement", [True, False])
def test_batches_have_the_covariance_of_draws_with_or_without_replacement(replacement):
    samples = torch.randn(20, 3, generator=generator(), dtype=torch.float64)
    noise = batch_noise(samples, 5, 20_000, replacement=replacement, generator=generator(1))
    sigma = samples.T.cov(correction=0) / 5 * (1 if replacement else 15 / 19)
    assert torch.allclose(noise.T.cov(), sigma, atol=5 * float(sigma.diagonal().max()) / math.sqrt(20_000))
    assert torch.allclose(noise.mean(0), torch.zeros(3, dtype=torch.float64), atol=0.02)


def test_heavy_data_make_heavy_gradients_and_large_batches_do_not_mend_them():
    model = nn.Linear(20, 1, bias=False)
    data = stable_noise((100_000, 20), 1.3, generator=generator())
    found = gradient_tails(model, mean_error, (data, torch.ones(100_000, 1)), 4, draws=2500, chunk=2000)
    assert found.whole.heavy and found.heavy == ("",)
    assert abs(found.whole.mixture.index - 1.3) < 4 * found.whole.mixture.error
    assert found.at(64).whole.heavy and found.at(64).batch_size == 64


def test_ordinary_data_of_unequal_scales_do_not():
    model = nn.Linear(20, 1, bias=False)
    data = torch.logspace(-2, 2, 20) * torch.randn(20_000, 20, generator=generator())
    found = gradient_tails(model, mean_error, (data, torch.ones(20_000, 1)), 4, chunk=2000)
    assert found.whole.verdict == "Gaussian" and found.heavy == ()
    assert found.whole.pooled < 1.5  # what pooling would have said
    assert "batches of 4" in str(found)


def test_layers_without_noise_are_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # dead
    x = torch.randn(50, 3, generator=generator())
    found = gradient_tails(model, nn.functional.mse_loss, (x, x[:, :1]), 8, draws=400)
    assert found.left_out == ("0",) and list(found.layers) == ["2"]
    assert "no noise" in str(found)


def test_the_same_seed_gives_the_same_reading():
    model, x = nn.Linear(4, 2), torch.randn(60, 4, generator=generator())
    both = [gradient_tails(model, nn.functional.mse_loss, (x, x[:, :2]), 8, draws=400) for _ in range(2)]
    assert both[0].whole == both[0].whole and both[0].whole.index == both[1].whole.index


def test_what_makes_no_sense_is_refused():
    model, x = nn.Linear(4, 2), torch.randn(60, 4)
    for options, words in [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 61, "replacement": False}, "batch_size is 61"),
        ({"batch_size": 60, "replacement": False}, "no noise"),
        ({"draws": 0}, "draws is 0"),
        ({"coordinates": 0}, "coordinates is 0"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            gradient_tails(model, nn.functional.mse_loss, (x, x[:, :2]), **options)
