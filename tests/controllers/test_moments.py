"""Closed forms of a controlled quadratic: digits, the Hamilton–Jacobi–Bellman equation, the discrete chain."""

import math

import pytest
import torch

from bolza.controllers import (
    ControlledQuadratic,
    critical_momentum,
    learning_rate_law,
    momentum_law,
    stationary_loss,
)
from bolza.core.errors import ArgumentError
from bolza.sde import stationary_covariance

F = torch.float64
BOWL = ControlledQuadratic(curvature=1.0, noise=1.0, lr=0.2, initial_loss=1.0)


def test_the_switch_the_last_loss_and_the_best_constant_rate_have_their_digits():
    assert BOWL.switch_time == pytest.approx(1.4722195, abs=5e-8)
    assert float(BOWL.loss(BOWL.switch_time)) == pytest.approx(0.1, abs=1e-12)
    assert float(BOWL.loss(5.0)) == pytest.approx(0.0220859, abs=5e-8)
    assert float(BOWL.constant_loss(1.0, 5.0)) == pytest.approx(0.0500431, abs=5e-8)
    u, loss = BOWL.best_constant(5.0)
    assert u == pytest.approx(0.52767, abs=5e-6)
    assert loss == pytest.approx(0.0313580, abs=5e-8)
    other = ControlledQuadratic(2.0, 1.0, 0.1, 2.0)
    assert other.loss(torch.tensor([10.0, 20.0], dtype=F)).tolist() == pytest.approx(
        [0.0026574, 0.0012881], abs=1e-7
    )


def test_the_value_solves_the_hamilton_jacobi_bellman_equation_on_both_sides_of_the_switch():
    m = torch.tensor([2.0, 0.5, 0.12, 0.08, 0.01], dtype=F)[:, None].expand(5, 4).clone().requires_grad_()
    left = torch.tensor([0.1, 0.7, 2.0, 6.0], dtype=F).expand(5, 4).clone().requires_grad_()
    v_m, v_left = torch.autograd.grad(BOWL.value(m, left).sum(), (m, left))
    u = torch.linspace(0, 1, 4001, dtype=F)[:, None, None]
    a, eta, noise = BOWL.curvature, BOWL.lr, BOWL.noise
    best = (v_m * (-2 * a * u * m + a * eta * noise * u**2 / 2)).amin(0)
    # the grid of u misses the minimum by at most ½ aηΣ V_m (δu/2)² < 2e-9
    torch.testing.assert_close(-v_left + best, torch.zeros(5, 4, dtype=F), atol=1e-8, rtol=0)
    assert torch.equal(BOWL.value(m, torch.zeros(())).detach(), m.detach())


def test_following_the_rate_of_the_moment_is_the_optimum_and_any_other_rate_is_worse():
    time = torch.linspace(0, 5, 200001, dtype=F)
    h = float(time[1])

    def last(rates):
        m = torch.tensor(1.0, dtype=F)
        decay = torch.exp(-2 * h * rates)
        rest = BOWL.lr * BOWL.noise * rates / 4
        for r, d in zip(rest.tolist(), decay.tolist(), strict=True):
            m = r + (float(m) - r) * d
        return m

    middle = (time[1:] + time[:-1])[::100] / 2
    h *= 100
    best = BOWL.rate(middle)
    assert last(best) == pytest.approx(float(BOWL.loss(5.0)), rel=1e-5)
    for other in (best * 0.9, (best * 1.1).clamp(max=1), best**2, torch.full_like(best, 0.52767)):
        assert last(other) > float(BOWL.loss(5.0)) * (1 + 1e-5)


def test_annealed_iterates_lose_one_over_k_whatever_the_rate():
    a, noise, m0 = 2.0, 1.5, 0.05
    k = torch.arange(201, dtype=F)
    for lr in (0.2, 5.0, 50.0):
        rates, losses = ControlledQuadratic(a, noise, lr, m0).iterates(200)
        torch.testing.assert_close(losses, 1 / (1 / m0 + 2 * a * k / noise), rtol=1e-12, atol=0)
        assert bool((rates * lr * a <= 1).all())
        assert bool((rates <= 1).all())


def test_the_law_of_the_step_minimises_the_next_loss_and_tends_to_that_of_the_diffusion():
    m, noise, lr, a = torch.tensor([0.01, 0.3, 4.0], dtype=F), 0.7, 0.9, 1.3
    u = torch.linspace(0, 1, 100001, dtype=F)[:, None]
    after = (1 - u * lr * a) ** 2 * m + a * (u * lr) ** 2 * noise / 2
    torch.testing.assert_close(learning_rate_law(m, noise, lr, a), u[after.argmin(0), 0], atol=6e-6, rtol=0)
    small = torch.tensor(1e-6, dtype=F)
    ratio = learning_rate_law(small, noise, lr, a) / learning_rate_law(small, noise, lr, a, exact=False)
    assert float(ratio) == pytest.approx(1, abs=1e-5)
    assert learning_rate_law(1.0, 1.0, 1.0, -1.0) == 1


def test_critical_momentum_is_a_double_root():
    assert float(critical_momentum(1.0, 0.1)) == pytest.approx(0.367544, abs=5e-7)
    assert float(critical_momentum(1.0, 0.01)) == pytest.approx(0.8, abs=1e-12)
    mu = float(critical_momentum(0.7, 0.3, exact=True))
    assert (1 + mu - 0.21) ** 2 == pytest.approx(4 * mu, rel=1e-12)
    assert critical_momentum(1.0, 1.2, exact=True) == 0
    assert critical_momentum(-1.0, 0.1) == 1


def test_the_momentum_law_takes_the_lower_of_damping_and_noise():
    assert float(momentum_law(0.1, 1.0, 0.1, 0.01)) == pytest.approx(0.75, abs=1e-12)
    assert float(momentum_law(100.0, 1.0, 0.1, 1.0)) == pytest.approx(0.367544, abs=5e-7)
    assert momentum_law(0.0, 1.0, 0.1, 1.0) == 0
    assert momentum_law(0.1, 1.0, 0.1, -1.0) == 1


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
def test_the_noise_floor_is_that_of_the_lyapunov_equation(mu):
    one = torch.ones(1, 1, dtype=F)
    for exact in (True, False):
        found = stationary_loss(0.8, 1.7, 0.1, momentum=mu, exact=exact)
        at_rest = stationary_covariance(0.8 * one, 1.7 * one, lr=0.1, momentum=mu, exact=exact)
        assert float(found) == pytest.approx(float(at_rest.excess_loss), rel=1e-9)
    assert math.isinf(stationary_loss(1.0, 1.0, 5.0, momentum=mu))


def test_a_bowl_without_curvature_noise_rate_or_loss_is_refused():
    with pytest.raises(ArgumentError, match="curvature=0.0 must be positive"):
        ControlledQuadratic(0.0, 1.0, 1.0, 1.0)
