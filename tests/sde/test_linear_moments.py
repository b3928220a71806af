"""Exact laws of linear equations and recursions, and the weak orders that follow from them."""

from __future__ import annotations

import math

import pytest
import torch

from bolza.core import Diffusion
from bolza.core.errors import ArgumentError, ShapeError, UnsupportedError
from bolza.sde import iterate_law, linear_law, modified_equation, stale_law, weak_errors

F = torch.float64
A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F)
C = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=F)
ONE = torch.eye(1, dtype=F)

# f = x²/2, unit noise, x₀ = 1, T = 1: η, E x² of SGD, errors of E x² and of E x by order
TABLE = [
    (0.2, 0.2065548, 1.525e-2, 1.492e-2, 4.020e-2, 5.191e-3),
    (0.1, 0.1678095, 1.076e-2, 3.565e-3, 1.920e-2, 1.259e-3),
    (0.05, 0.1508580, 6.094e-3, 8.727e-4, 9.394e-3, 3.105e-4),
    (0.025, 0.1429259, 3.218e-3, 2.160e-4, 4.647e-3, 7.713e-5),
    (0.0125, 0.1390889, 1.651e-3, 5.372e-5, 2.311e-3, 1.922e-5),
]


def bowl(x):
    return 0.5 * ((x @ A.to(x)) * x).sum(-1) if x.shape[-1] == 2 else 0.5 * x.square().sum(-1)


def test_weak_errors_on_the_line_are_those_of_the_closed_forms_to_their_digits():
    lrs, second, *errors = zip(*TABLE, strict=True)
    one, two = (weak_errors(1.0, lrs=lrs, order=order) for order in (1, 2))
    assert one.second.flatten().tolist() == pytest.approx(second, abs=6e-8)
    found = (one.second_errors, two.second_errors, one.mean_errors, two.mean_errors)
    for mine, digits in zip(found, errors, strict=True):
        assert [float(f"{e:.3e}") for e in mine.tolist()] == list(digits)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("method", ["sgd", "momentum", "nesterov"])
def test_the_weak_order_is_what_the_equation_claims(method, order):
    lrs = [0.0125, 0.00625] if method == "sgd" else [1 / n**2 for n in (80, 160)]
    for curvature, noise in ((1.0, 1.0), (A, C)):
        found = weak_errors(curvature, noise, lrs=lrs, order=order, method=method)
        assert found.mean_order == pytest.approx(order, abs=0.1)
        assert found.second_order == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("method", ["momentum", "nesterov"])
def test_the_spread_of_order_two_is_that_of_the_iterates_to_second_order_of_itself(method):
    # the covariance is itself of first order in h = √η: errors of its share are what tells noise apart from no noise
    lrs = [1 / n**2 for n in (20, 40)]
    errors = []
    for lr in lrs:
        mu, count = 1 - lr**0.5, round(2 / lr**0.5)
        kept = mu * (1 - lr) if method == "nesterov" else mu
        step, push = (
            torch.tensor([[1 - lr, lr * kept], [-1.0, kept]], dtype=F),
            torch.tensor([[lr], [1.0]], dtype=F),
        )
        exact = iterate_law(step, push @ push.mT, torch.zeros(2), count).covariance[0, 0]
        sde = modified_equation(bowl, lr=lr, order=2, momentum=mu, method=method, noise=1.0)
        law = linear_law(sde, sde.initial(torch.zeros(1)), count * lr)
        errors.append(abs(float(law.covariance[0, 0, 0, 0] / exact) - 1))
    assert errors[1] < 0.003
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.15)


def test_gradients_of_geometric_age_have_an_equation_of_weak_order_one():
    found = weak_errors(A, C, lrs=[0.05, 0.025], method="asynchronous", time=3.0, friction=1.5)
    assert found.mean_order == pytest.approx(1, abs=0.15)
    assert found.second_order == pytest.approx(1, abs=0.15)


def test_at_rest_the_second_order_is_not_the_better_one():
    far, lr = 1e3, 0.1
    exact = iterate_law(0.9 * ONE, lr**2 * ONE, torch.zeros(1), 10_000).covariance.item()
    laws = [
        linear_law(
            modified_equation(bowl, lr=lr, order=order, noise=1.0), torch.zeros(1), far
        ).covariance.item()
        for order in (1, 2)
    ]
    assert (round(exact, 7), *(round(law, 7) for law in laws)) == (0.0526316, 0.05, 0.0476190)


@pytest.mark.parametrize(("mu", "var"), [(0.5, 0.1034483), (0.9, 0.5135135)])
def test_momentum_at_rest_exactly_and_by_its_equation(mu, var):
    lr = 0.1
    M = torch.tensor([[1 - lr, lr * mu], [-1.0, mu]], dtype=F)
    push = torch.tensor([[lr], [1.0]], dtype=F)
    assert iterate_law(M, push @ push.mT, torch.zeros(2), 5000).covariance[0, 0].item() == pytest.approx(
        var, abs=5e-8
    )
    sde = modified_equation(bowl, lr=lr, momentum=mu, noise=1.0)
    law = linear_law(sde, sde.initial(torch.zeros(1)), 1e3)
    # E f = ηΣ/(4(1 − μ)), so that Var x = ηΣ/(2(1 − μ))
    assert law.covariance[0, 0, 0, 0].item() == pytest.approx(lr / (2 * (1 - mu)), rel=1e-9)


@pytest.mark.parametrize(("mu", "lr", "var"), [(0.8, 0.05, 0.03125), (0.5, 0.05, 0.0275), (0.8, 0.02, 0.011)])
def test_asynchronous_noise_is_on_the_position(mu, lr, var):
    sde = modified_equation(bowl, lr=lr, momentum=mu, method="asynchronous", noise=1.0)
    law = linear_law(sde, sde.initial(torch.zeros(1)), 1e3)
    assert law.covariance[0, 0, 0, 0].item() == pytest.approx(var, rel=1e-9)
    assert var == pytest.approx(lr / 2 + lr**2 / (2 * (1 - mu)))


def test_the_mean_of_stale_gradients_is_that_of_averaged_momentum():
    lr, mu = 0.05, 0.8
    x, m = torch.tensor([1.0, -2.0], dtype=F), None
    start = x
    for k in range(60):
        m = A @ x if m is None else mu * m + (1 - mu) * (A @ x)
        x = x - lr * m
        if k in (0, 7, 59):
            law = stale_law(A, C, start, lr=lr, momentum=mu, steps=k + 1)
            assert (law.mean - x).abs().max() < 1e-15


def test_the_table_of_stale_moments_is_that_of_simulated_stale_gradients():
    lr, mu, steps, paths = 0.3, 0.6, 12, 200_000
    generator = torch.Generator().manual_seed(0)
    history = [torch.ones(paths)]
    for k in range(steps):
        age = (torch.rand(paths, generator=generator).log() / math.log(mu)).floor().long()
        stale = torch.stack(history)[(k - age).clamp_min(0), torch.arange(paths)]
        history.append(history[-1] - lr * (stale + torch.randn(paths, generator=generator)))
    law = stale_law(ONE, ONE, torch.ones(1), lr=lr, momentum=mu, steps=steps)
    x = history[-1]
    assert abs(float(x.mean()) - law.mean.item()) < 4 * math.sqrt(law.covariance.item() / paths)
    assert float(x.var()) == pytest.approx(law.covariance.item(), rel=4 * math.sqrt(3 / paths))


def test_a_stiff_equation_with_a_force_and_a_start_in_doubt_is_followed_to_the_end():
    sde = Diffusion(lambda t, x: 3.0 - 2000 * x, lambda t, x, noise: 2.0 * noise)
    law = linear_law(sde, torch.ones(1), 0.001, covariance=0.5 * ONE)
    decay = math.exp(-2.0)
    assert law.mean.item() == pytest.approx(decay + 3 / 2000 * (1 - decay), rel=1e-12)
    assert law.covariance.item() == pytest.approx(0.5 * decay**2 + 4 / 4000 * (1 - decay**2), rel=1e-12)
    assert linear_law(sde, torch.ones(1), 50.0).covariance.item() == pytest.approx(0.001, rel=1e-9)


def test_what_is_not_linear_is_refused():
    x = torch.ones(1)
    with pytest.raises(UnsupportedError, match="drift is not linear"):
        linear_law(Diffusion(lambda t, x: -(x**3), lambda t, x, noise: noise), x, 1.0)
    with pytest.raises(UnsupportedError, match="drift is not linear"):
        linear_law(Diffusion(lambda t, x: -x / (1 + t), lambda t, x, noise: noise), x, 1.0)
    with pytest.raises(UnsupportedError, match="noise depends"):
        linear_law(Diffusion(lambda t, x: -x, lambda t, x, noise: x * noise), x, 1.0)
    with pytest.raises(UnsupportedError, match="alpha is 1.5"):
        linear_law(Diffusion(lambda t, x: -x, lambda t, x, noise: noise, alpha=1.5), x, 1.0)
    with pytest.raises(UnsupportedError, match="simulate"):
        weak_errors(1.0, lrs=[0.1], method="adam")
    with pytest.raises(ArgumentError, match="time is 0"):
        linear_law(Diffusion(lambda t, x: -x, lambda t, x, noise: noise), x, 0.0)
    with pytest.raises(ArgumentError, match="whole number"):
        weak_errors(1.0, lrs=[0.3])
    with pytest.raises(ArgumentError, match="momentum would be"):
        weak_errors(1.0, lrs=[4.0], method="momentum", time=2.0)
    with pytest.raises(ArgumentError, match="negative"):
        iterate_law(ONE, ONE, x, -1)
    with pytest.raises(ShapeError, match="do not fit"):
        iterate_law(ONE, A, x, 1)
