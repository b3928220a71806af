"""The smoothed loss: closed forms, the equation it solves, samples against quadrature."""

import math

import pytest
import torch

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError, UnsupportedError
from bolza.optim import EntropySGD
from bolza.sde import hamilton_jacobi_residual, local_entropy, sampled_local_entropy

F64 = torch.float64


def double_well(y):
    return (y**4 / 4 - y**2 / 2).sum(-1)


def column(*values):
    return torch.tensor(values, dtype=F64)[:, None]


@pytest.mark.parametrize(
    ("a", "temperature", "t", "x", "expected"),
    [(2, 0.3, 0.7, 0.9, 0.4688203), (2, 1 / 3, 0.4, 0.7, 0.3701867)],
)
def test_the_parabola_has_its_closed_form(a, temperature, t, x, expected):
    found = local_entropy(lambda y: a * y.square().sum(-1) / 2, column(x), t=t, temperature=temperature)
    exact = a * x**2 / (2 * (1 + a * t)) + temperature / 2 * math.log(1 + a * t)
    assert float(found.value) == pytest.approx(expected, abs=5e-8)
    assert abs(float(found.value) - exact) < 1e-14
    assert float(found.gradient) == pytest.approx(a * x / (1 + a * t), abs=1e-13)
    assert float(found.spread) == pytest.approx(temperature * t / (1 + a * t), abs=1e-13)


def test_the_smoothed_gradient_has_the_coefficient_of_the_harmonic_mean():
    x = torch.tensor([[1.0, -2.0], [0.3, 0.1]], dtype=F64)
    found = local_entropy(lambda y: y.square().sum(-1), x, t=2.0, temperature=0.2)
    assert torch.allclose(found.gradient, 0.4 * x, atol=1e-12)  # aγ/(a + γ) for a = 2, γ = ½


@pytest.mark.parametrize("temperature", [0.5, 0.05, 1e-4])
def test_the_gradient_is_the_slope_of_the_value_and_the_equation_holds(temperature):
    x, t, h = torch.linspace(-1.7, 1.7, 8, dtype=F64)[:, None], 0.4, 1e-3

    def u(x, t=t):
        return local_entropy(double_well, x, t=t, temperature=temperature).value

    found = local_entropy(double_well, x, t=t, temperature=temperature)
    assert float(found.error.max()) < 1e-12
    four = [u(x + k * h) for k in (-2, -1, 1, 2)]
    slope = (four[0] - 8 * four[1] + 8 * four[2] - four[3]) / (12 * h)
    assert torch.allclose(slope, found.gradient[:, 0], atol=1e-7, rtol=1e-6)
    times = [u(x, t + k * h) for k in (-2, -1, 1, 2)]
    rate = (times[0] - 8 * times[1] + 8 * times[2] - times[3]) / (12 * h)
    laplacian = (1 - found.spread / (t * temperature)) / t
    residual = rate + slope**2 / 2 - temperature / 2 * laplacian
    assert float(residual.abs().max()) < 1e-6


def test_the_limit_of_zero_temperature_is_the_proximal_point():
    x = column(2.0, -0.3, 0.0, 1.1)
    soft = local_entropy(lambda y: y.abs().sum(-1), x, t=0.7, temperature=0.0)
    assert torch.allclose(soft.mean, x.sign() * (x.abs() - 0.7).clamp(min=0), atol=1e-7)
    huber = torch.where(x.abs() > 0.7, x.abs() - 0.35, x**2 / 1.4)[:, 0]
    assert torch.allclose(soft.value, huber, atol=1e-12)
    # order of convergence in T: u − u₀ = O(T)
    limit = local_entropy(double_well, column(0.9), t=0.5, temperature=0.0)
    gaps = [
        abs(float(local_entropy(double_well, column(0.9), t=0.5, temperature=T).value - limit.value))
        for T in (1e-3, 5e-4)
    ]
    assert math.log2(gaps[0] / gaps[1]) == pytest.approx(1, abs=0.05)
    bowl = local_entropy(lambda y: y.square().sum(-1), torch.tensor([[1.0, 3.0]]), t=0.5, temperature=0.0)
    assert torch.allclose(bowl.mean, torch.tensor([[0.5, 1.5]])) and bowl.value.dtype == torch.float32


def test_a_deep_valley_out_of_sight_of_the_kernel_is_found():
    def narrow(y):
        return 0.02 * y[..., 0] ** 2 - 1.2 * (-(((y[..., 0] + 1.5) / 0.12) ** 2) / 2).exp()

    x = torch.linspace(-3, 0, 61, dtype=F64)[:, None]
    for temperature in (0.0, 1e-3):
        u = local_entropy(narrow, x, t=0.5, temperature=temperature).value
        every = torch.linspace(-6, 6, 12001, dtype=F64)
        if temperature:
            logs = -(narrow(every[:, None]) + (every - x) ** 2) / temperature
            exact = -temperature * (
                logs.logsumexp(1) + math.log(12 / 12000 / math.sqrt(math.pi * temperature))
            )
        else:
            exact = (narrow(every[:, None]) + (every - x) ** 2).amin(1)
        assert float((u - exact).abs().max()) < 2e-5  # the reference has 1000 nodes a unit


def test_two_coordinates_that_do_not_feel_each_other_add_up():
    x = torch.tensor([[0.4, -1.2]], dtype=F64)
    both = local_entropy(double_well, x, t=0.6, temperature=0.2)
    apart = local_entropy(double_well, x.mT, t=0.6, temperature=0.2)
    assert float(both.value) == pytest.approx(float(apart.value.sum()), abs=1e-12)
    assert torch.allclose(both.gradient[0], apart.gradient[:, 0], atol=1e-12)


def test_samples_agree_with_quadrature_within_their_errors():
    x = column(-2.0, 0.2, 1.5)
    exact = local_entropy(double_well, x, t=0.8, temperature=0.3)
    found = sampled_local_entropy(
        double_well,
        x,
        t=0.8,
        temperature=0.3,
        chains=64,
        steps=300,
        generator=torch.Generator().manual_seed(0),
    )
    assert float(((found.value - exact.value) / found.error).abs().max()) < 4
    assert float(((found.gradient - exact.gradient) / found.gradient_error).abs().max()) < 4
    assert float(found.error.max()) < 0.02 and float(found.gradient_error.max()) < 0.05
    assert torch.allclose(found.spread, exact.spread, rtol=0.15)


def test_samples_in_fifty_dimensions_meet_the_closed_form():
    a = torch.linspace(0.5, 20, 50, dtype=F64)
    x = torch.ones(50, dtype=F64)
    found = sampled_local_entropy(
        lambda y: (a * y.square()).sum(-1) / 2, x, t=0.5, temperature=0.1, chains=32, steps=200,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    z = (found.gradient - a / (1 + a * 0.5)) / found.gradient_error
    assert float(z.square().mean()) < 2
    exact = (a / (2 * (1 + a * 0.5)) + 0.05 * (1 + a * 0.5).log()).sum()
    assert abs(float(found.value - exact)) < 5 * float(found.error) + 1e-3
    assert found.value.shape == () and found.gradient.shape == (50,)


def test_the_chain_of_entropy_sgd_samples_the_same_mean():
    gamma, temperature, centre = 2.0, 0.25, 0.6
    exact = local_entropy(double_well, column(centre), t=1 / gamma, temperature=temperature)
    w = torch.nn.Parameter(torch.full((4000,), centre, dtype=F64))  # 4000 chains at once
    optimizer = EntropySGD(
        [w], lr=0.02, inner_steps=100_000, gamma=gamma, scoping=0.0, momentum=0.0, noise=temperature**0.5
    )
    total = torch.zeros_like(w)
    for step in range(400):
        w.grad = w.detach() ** 3 - w.detach()
        optimizer.step()
        if step >= 100:
            total += w.detach()
    mean = total / 300
    error = float(mean.std()) / 4000**0.5
    # the bias of a step of 0.02 is of the order of the step
    assert abs(float(mean.mean() - exact.mean)) < 4 * error + 0.004
    assert error < 0.003 and abs(centre - float(exact.mean)) > 20 * error


def test_a_formula_that_does_not_solve_the_equation_leaves_a_residual():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=F64)

    def u(x, t, power=1.0):
        return x.square().sum(1) / (1 + 2 * t) + 0.15 * power * (1 + 2 * t).log()

    assert float(hamilton_jacobi_residual(u, x, 0.4, temperature=0.1).abs().max()) < 1e-13
    wrong = hamilton_jacobi_residual(lambda x, t: u(x, t, 2.0), x, 0.4, temperature=0.1)
    assert float(wrong.abs().min()) > 0.1


def test_what_makes_no_sense_is_refused_by_name():
    x = column(0.0)
    with pytest.raises(ArgumentError, match="t is 0"):
        local_entropy(double_well, x, t=0.0, temperature=0.1)
    with pytest.raises(ArgumentError, match="temperature is -1"):
        local_entropy(double_well, x, t=1.0, temperature=-1.0)
    with pytest.raises(ArgumentError, match="nodes is 3"):
        local_entropy(double_well, x, t=1.0, temperature=0.1, nodes=3)
    with pytest.raises(UnsupportedError, match="3 coordinates"):
        local_entropy(double_well, torch.zeros(1, 3), t=1.0, temperature=0.1)
    with pytest.raises(ShapeError, match="one number a point"):
        local_entropy(lambda y: y, x, t=1.0, temperature=0.1)
    with pytest.raises(ShapeError, match="points"):
        local_entropy(double_well, torch.tensor(1.0), t=1.0, temperature=0.1)
    with pytest.raises(DivergenceError, match="smaller t"):
        local_entropy(lambda y: -y.square().sum(-1), x, t=1.0, temperature=0.1)
    with pytest.raises(ArgumentError, match="temperature is 0"):
        sampled_local_entropy(double_well, x, t=1.0, temperature=0.0)
    with pytest.raises(ArgumentError, match="chains=1"):
        sampled_local_entropy(double_well, x, t=1.0, temperature=0.1, chains=1)
    with pytest.raises(DivergenceError, match="not finite"):
        sampled_local_entropy(lambda y: double_well(y) + math.nan, x, t=1.0, temperature=0.1, steps=4)


@pytest.mark.parametrize("dim", [1, 30])
def test_the_value_of_a_stiff_valley_is_within_its_error(dim):
    k, x = 5e3, torch.ones(dim, dtype=F64)
    found = sampled_local_entropy(
        lambda y: k * y.square().sum(-1) / 2, x, t=1.0, temperature=0.3, chains=32, steps=200,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    exact = dim * (0.5 * k / (k + 1) + 0.15 * math.log(k + 1))
    assert abs(float(found.value) - exact) < 4 * float(found.error) < 0.2 * exact


def test_chains_that_are_still_on_their_way_say_so():
    a = torch.logspace(-2, 4, 50, dtype=F64)
    found = sampled_local_entropy(
        lambda y: (a * y.square()).sum(-1) / 2, torch.ones(50, dtype=F64), t=1.0, temperature=0.1, chains=16,
        steps=100, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    exact = float((a / (2 * (1 + a)) + 0.05 * (1 + a).log()).sum())
    assert abs(float(found.value) - exact) < 6 * float(found.error)


def test_no_points_and_formulas_that_do_not_bend_are_no_special_case():
    assert local_entropy(double_well, torch.zeros(0, 1), t=1.0, temperature=0.1).gradient.shape == (0, 1)
    x = torch.ones(3, 2, dtype=F64)
    # u of the potential Σy, which is linear in x
    left = hamilton_jacobi_residual(lambda x, t: x.sum(1) - t, x, 0.5, temperature=0.1)
    assert float(left.abs().max()) == 0
    assert hamilton_jacobi_residual(lambda x, t: x.sum(1), x, 0.5, temperature=0.1).tolist() == [1, 1, 1]
