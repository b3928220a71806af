"""Laws of weights at rest, against the Gaussian of the linear-quadratic case."""

import pytest
import torch
from pytest import approx

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.solve import mean_field_langevin, neuron_field

F = torch.float64


def shift(x, a):
    return a.mean(0).expand_as(x)


def half_square(x, y):
    return (x - y).square().mean() / 2


def linear(noise, *, count=200, steps=4, iterations=600, ds=0.1, seed=0, weight=0.5, **options):
    return mean_field_langevin(
        shift,
        half_square,
        torch.zeros(1, 1, dtype=F),
        torch.full((1, 1), 2.0, dtype=F),
        torch.zeros(steps, count, 1, dtype=F),
        noise=noise,
        weight=weight,
        ds=ds,
        iterations=iterations,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


@pytest.fixture(scope="module")
def at_rest():
    return {s2: linear(s2**0.5) for s2 in (0.2, 0.1)}


def test_the_variance_at_rest_is_that_of_its_own_chain(at_rest):
    """σ²/(2c)/(1 − c ds/2): the Euler step's bias is part of it."""
    for s2, law in at_rest.items():
        exact = s2 / (2 * 0.5) / (1 - 0.5 * 0.1 / 2)
        # 800 particles over a time of 30, each new after about 1/c = 2
        assert float(law.variance.mean()) == approx(exact, rel=4 * (2 / (800 * 30 / 2)) ** 0.5)


def test_halving_the_temperature_leaves_the_mean(at_rest):
    """m = g/(c + T) = 4/3: the noise of the particles averages out of the states."""
    for s2, law in at_rest.items():
        # depths share one state: the mean moves with a variance of σ²/(2(c+T)) / (M steps), new after 1/(c+T)
        spread = (s2 / (2 * 1.5) / 800 / (30 * 1.5 / 2)) ** 0.5
        assert float(law.mean.mean()) == approx(4 / 3, abs=4 * spread)


def test_without_noise_the_particles_descend_to_the_optimal_control():
    law = linear(0.0, count=3, iterations=300)
    torch.testing.assert_close(law.particles, torch.full_like(law.particles, 4 / 3), rtol=0, atol=1e-6)
    assert bool((law.values.diff() <= 1e-12).all())


def test_one_step_is_gradient_descent_on_the_net_with_a_rate_of_particles_over_h():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, 2, generator=g, dtype=F), torch.randn(7, 2, generator=g, dtype=F)
    start = torch.randn(3, 5, 5, generator=g, dtype=F)
    law = mean_field_langevin(
        neuron_field(), half_square, x, y, start, noise=0.0, weight=0.3, time=1.5, ds=0.1, iterations=1
    )
    a = start.clone().requires_grad_()
    end = x
    for layer in a:
        w, b, v = layer[:, :2], layer[:, 2], layer[:, 3:]
        end = end + 0.5 * torch.stack([v[j] * torch.tanh(end @ w[j] + b[j])[:, None] for j in range(5)]).mean(
            0
        )
    half_square(end, y).backward()
    torch.testing.assert_close(law.particles, start - 0.1 * (a.grad * 5 / 0.5 + 0.3 * start))


def test_runs_repeat_from_their_seed_and_leave_the_start_alone():
    first, second, other = (linear(0.5, iterations=5, seed=s).particles for s in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_batches_of_samples_reach_the_same_law():
    z = torch.tensor([[1.0], [3.0]], dtype=F)
    law = mean_field_langevin(
        shift,
        half_square,
        torch.zeros(2, 1, dtype=F),
        z,
        torch.ones(2, 50, 1, dtype=F),
        noise=0.0,
        weight=0.5,
        ds=0.05,
        iterations=500,
        batch_size=1,
        generator=torch.Generator().manual_seed(0),
    )
    assert float(law.mean.mean()) == approx(4 / 3, abs=0.15)


def test_bad_arguments_are_named():
    with pytest.raises(ArgumentError, match="weight=0"):
        linear(0.1, weight=0.0)
    with pytest.raises(ArgumentError, match="batch_size=0"):
        linear(0.1, batch_size=0)
    with pytest.raises(DivergenceError, match="smaller ds"):
        linear(0.1, ds=1e6, iterations=200)
    with pytest.raises(ShapeError, match="2d"):
        neuron_field()(torch.zeros(1, 2), torch.zeros(3, 4))
    with pytest.raises(ShapeError, match="particles"):
        mean_field_langevin(
            shift, half_square, torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(3, 1), noise=1.0, weight=1.0
        )
