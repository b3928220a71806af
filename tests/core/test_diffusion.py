from math import exp, log2, sqrt

import pytest
import torch
from pytest import approx

from bolza.core import Diffusion, simulate
from bolza.core.errors import ArgumentError, DivergenceError

F64 = torch.float64


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_paths_have_the_moments_of_their_own_chain():
    """x ← (1 − a dt) x + s √dt ξ: mean rᵏx₀ and variance s² dt (1 − r²ᵏ)/(1 − r²), at every saved step."""
    a, s, dt, steps, paths = 1.3, 0.7, 0.3, 12, 20_000
    ornstein = Diffusion(drift=lambda t, x: -a * x, factor=lambda t, x, noise: s * noise)
    start = torch.full((paths, 2), 1.5, dtype=F64)
    saved = simulate(ornstein, start, dt=dt, steps=steps, save_every=4, generator=generator(0))
    assert saved.shape == (4, paths, 2) and torch.equal(saved[0], start)
    r = 1 - a * dt
    for k, x in zip((4, 8, 12), saved[1:], strict=True):
        mean, variance = r**k * 1.5, s**2 * dt * (1 - r ** (2 * k)) / (1 - r**2)
        count = x.numel()
        assert abs(float(x.mean()) - mean) < 4 * sqrt(variance / count)
        assert abs(float(x.var()) - variance) < 4 * variance * sqrt(2 / count)


def test_the_weak_order_is_one():
    """Over the exact moments of the chain, which the paths were shown to have."""
    a, s, time = 1.3, 0.7, 2.0

    def error(n):
        r, dt = 1 - a * time / n, time / n
        return abs(s**2 * dt * (1 - r ** (2 * n)) / (1 - r**2) - s**2 * (1 - exp(-2 * a * time)) / (2 * a))

    assert log2(error(160) / error(320)) == approx(1, abs=0.02)


def strong_error(n, increments):
    """Mean |X_1 − exact| of geometric Brownian motion on shared increments, shape (fine, paths)."""
    mu, sigma, fine = 0.5, 1.0, len(increments)
    coarse = increments.reshape(n, fine // n, -1).sum(1) / sqrt(1 / n)
    motion = Diffusion(
        drift=lambda t, x: mu * x,
        factor=lambda t, x, noise: sigma * x * coarse[round(t * n)],
    )
    last = simulate(motion, torch.ones(increments.shape[1], dtype=F64), dt=1 / n, steps=n)[0]
    exact = torch.exp((mu - sigma**2 / 2) + sigma * increments.sum(0))
    return float((last - exact).abs().mean())


def test_the_strong_order_is_one_half():
    increments = torch.randn(512, 2000, dtype=F64, generator=generator(0)) / sqrt(512)
    errors = [strong_error(n, increments) for n in (8, 32, 128, 512)]
    slope = log2(errors[0] / errors[-1]) / 6
    assert slope == approx(0.5, abs=0.05)  # over seeds it is .490 ± .008


def test_noise_may_have_another_shape_than_the_state():
    g = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]], dtype=F64)
    diffusion = Diffusion(
        drift=lambda t, x: 0 * x,
        factor=lambda t, x, noise: noise @ g.T,
        noise_shape=lambda x: (len(x), 3),
    )
    x = simulate(diffusion, torch.zeros(50_000, 2, dtype=F64), dt=0.5, steps=2, generator=generator(1))[0]
    exact = g @ g.T
    assert x.T.cov().sub(exact).abs().max() < 4 * exact.max() * sqrt(2 / 50_000)


def test_runs_repeat_from_their_seed_and_keep_the_dtype():
    plain = Diffusion(drift=lambda t, x: -x, factor=lambda t, x, noise: noise)
    a, b = (simulate(plain, torch.ones(5), dt=0.1, steps=3, generator=generator(2)) for _ in range(2))
    assert torch.equal(a, b) and a.dtype == torch.float32 and a.shape == (1, 5)


def test_the_drift_sees_the_time():
    clock = Diffusion(drift=lambda t, x: x * 0 + t, factor=lambda t, x, noise: 0 * noise)
    assert float(simulate(clock, torch.zeros(1, dtype=F64), dt=0.5, steps=4)) == approx(
        0.5 * (0 + 0.5 + 1 + 1.5)
    )


@pytest.mark.parametrize(
    "options", [{"dt": 0.0, "steps": 3}, {"dt": 0.1, "steps": 0}, {"dt": 0.1, "steps": 3, "save_every": 0}]
)
def test_senseless_steps_are_refused(options):
    with pytest.raises(ArgumentError, match="positive"):
        simulate(Diffusion(lambda t, x: x, lambda t, x, noise: noise), torch.zeros(1), **options)


@pytest.mark.parametrize(("steps", "seen"), [(20, 20), (1000, 100)])
def test_a_path_that_explodes_is_an_error_soon_after_and_not_a_result(steps, seen):
    cubic = Diffusion(drift=lambda t, x: x**3, factor=lambda t, x, noise: 0 * noise)
    with pytest.raises(
        DivergenceError, match=f"by step {seen} of {steps} with dt = 1.0.*smaller dt"
    ) as caught:
        simulate(cubic, torch.full((3,), 10.0), dt=1.0, steps=steps)
    assert caught.value.step == seen
