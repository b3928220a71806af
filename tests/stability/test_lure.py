"""Certified rates of optimizers against known rates, counterexamples, and runs."""

import builtins
import math

import numpy as np
import pytest
import torch
from pytest import approx
from torch.testing import assert_close

from bolza.core.errors import ArgumentError, ShapeError, UnsupportedError
from bolza.stability import (
    FeedbackOptimization,
    FirstOrderMethod,
    certified_rate,
    first_order_method,
    gradient_descent,
    heavy_ball,
    nesterov,
    quadratic_rate,
)

F64 = torch.float64


@pytest.mark.parametrize("lr", [2 / 11, 0.1, 0.02, 0.19])
@pytest.mark.parametrize("functions", ["sector", "convex"])
def test_gradient_descent_is_certified_at_its_exact_rate(lr, functions):
    certificate = certified_rate(gradient_descent(lr), 1, 10, functions=functions)
    exact = max(abs(1 - lr), abs(1 - 10 * lr))
    assert 0 <= certificate.rate - exact < 1e-6
    assert certificate.margin < 0 and certificate.stable


@pytest.mark.parametrize("kappa", [2, 10, 100, 1000])
def test_nesterov_s_method_is_certified_within_its_textbook_rate(kappa):
    beta = (kappa**0.5 - 1) / (kappa**0.5 + 1)
    certificate = certified_rate(nesterov(1 / kappa, beta), 1, kappa)
    assert certificate.lower < certificate.rate < math.sqrt(1 - 1 / math.sqrt(kappa))
    assert certificate.lower == approx(1 - 1 / math.sqrt(kappa), abs=1e-6)  # on quadratics


def tuned_heavy_ball(kappa):
    root = kappa**0.5
    return heavy_ball(4 / (root + 1) ** 2, ((root - 1) / (root + 1)) ** 2)


def test_the_heavy_ball_tuned_for_quadratics_is_fast_on_them_and_certified_only_for_small_condition_numbers():
    for kappa in (4, 25):
        root = kappa**0.5
        assert quadratic_rate(tuned_heavy_ball(kappa), 1, kappa) == approx((root - 1) / (root + 1), abs=1e-6)
    assert certified_rate(tuned_heavy_ball(4), 1, 4).stable
    assert not certified_rate(tuned_heavy_ball(25), 1, 25).stable


def cycling_slope(x):
    """Gradient of a 1-strongly convex function of curvature 1 and 25 on which the tuned heavy ball cycles."""
    return 25 * x if x < 1 else x + 24 if x < 2 else 25 * x - 24


def test_the_refusal_is_no_caution_there_is_a_convex_function_on_which_it_cycles():
    x = before = 3.3
    beta, lr = (4 / 6) ** 2, 4 / 36
    for _ in range(3000):
        x, before = x - lr * cycling_slope(x) + beta * (x - before), x
    assert abs(x) > 0.5 or abs(before) > 0.5  # the minimum is at 0
    x = before = 3.3
    for _ in range(300):  # and gradient descent is not troubled
        x = x - 2 / 26 * cycling_slope(x)
    assert abs(x) < 1e-8


def test_the_certificate_bounds_every_run_on_functions_of_the_class():
    """V = ξᵀPξ falls by ρ² a step for the method with the sector alone, also if the curvature jumps at each step."""
    m, L = 1.0, 10.0
    method = nesterov(0.05, 0.2)
    certificate = certified_rate(method, m, L, functions="sector")
    assert certificate.stable
    g = torch.Generator().manual_seed(0)
    state = torch.randn(2, 1, dtype=F64, generator=g)
    for _ in range(50):
        curvature = m + (L - m) * float(torch.rand((), generator=g).round())
        following = method.A @ state + method.B * curvature * (method.C @ state)
        before, after = (float(s.mT @ certificate.P @ s) for s in (state, following))
        assert after <= certificate.rate**2 * before * (1 + 1e-12)
        state = following


def test_the_matrix_inequality_of_the_record_holds_when_built_by_hand():
    """Gradient descent: (1 − ηλ)² ≤ ρ² for all λ in the sector, as a 2 × 2 matrix."""
    eta, m, L = 0.1, 1.0, 10.0
    c = certified_rate(gradient_descent(eta), m, L, functions="sector")
    P, (weight,) = float(c.P), c.multipliers
    unit = eta * L  # the gradient is in units of L
    matrix = P * np.array([[1 - c.rate**2, -unit], [-unit, unit**2]])
    matrix += weight * np.array([[-2 * m / L, 1 + m / L], [1 + m / L, -2]])
    assert np.linalg.eigvalsh(matrix).max() == approx(c.margin, abs=1e-15) and c.margin < 0


def test_a_learning_rate_beyond_the_limit_has_no_certificate():
    certificate = certified_rate(gradient_descent(0.21), 1, 10)
    assert certificate.rate == math.inf and certificate.P is None and certificate.lower == approx(1.1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.5},
        {"momentum": 0.5, "nesterov": True},
        {"momentum": 0.5, "dampening": 0.3},
        {"weight_decay": 0.1},
        {"momentum": 0.4, "weight_decay": 0.2, "nesterov": True},
    ],
)
def test_the_loop_read_from_an_optimizer_is_the_optimizer(options):
    x = torch.nn.Parameter(torch.tensor([1.0], dtype=F64))
    optimizer = torch.optim.SGD([x], lr=0.07, **options)
    method = first_order_method(optimizer)
    state = torch.zeros(len(method.A), 1, dtype=F64)
    state[0] = 1.0
    for step in range(6):
        curvature = 1.0 + 3 * (step % 2)
        x.grad = curvature * x.detach()
        optimizer.step()
        state = method.A @ state + method.B * curvature * (method.C @ state)
        if step == 0 and options.get("dampening"):
            # torch starts its buffer with the whole gradient, not with the dampened one
            state[1] = optimizer.state[x]["momentum_buffer"]
            state[0] = x.detach()
        assert_close(state[0], x.detach(), rtol=1e-12, atol=1e-14)


def test_an_optimizer_is_certified_as_the_method_that_it_is():
    sgd = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.5, nesterov=True)
    assert certified_rate(sgd, 1, 10).rate == approx(certified_rate(nesterov(0.1, 0.5), 1, 10).rate, abs=1e-6)
    with pytest.raises(UnsupportedError, match="optimizer is Adam"):
        certified_rate(torch.optim.Adam([torch.zeros(1)]), 1, 10)


def test_without_the_solver_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "clarabel":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UnsupportedError, match=r"pip install 'bolza\[certify\]'"):
        certified_rate(gradient_descent(0.1), 1, 10)


def test_feedback_optimisation_finds_the_input_without_knowing_the_disturbance():
    G = torch.tensor([[1.0, 0.5], [0.2, 2.0]], dtype=F64)
    r, d = torch.tensor([1.0, -1.0], dtype=F64), torch.tensor([0.3, 0.7], dtype=F64)

    def run(lr, steps):
        loop = FeedbackOptimization(0.9 * torch.eye(2, dtype=F64), G, lr, 0.01)
        y, u = torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64)
        for _ in range(steps):
            y, u = loop.step(y, u, r, d)
        return loop, u, loop.optimum(r, d)

    loop, u, best = run(0.04, 800)
    assert loop.rate == approx(0.958, abs=5e-4) and (u - best).abs().max() < 1e-12
    loop, u, best = run(0.3, 800)
    assert loop.rate == approx(1.016, abs=5e-4) and (u - best).abs().max() > 1e3
    # the plant at rest would allow 2/(σ² + λ): what breaks the fast loop is the plant's own dynamics
    assert 2 / (float(torch.linalg.matrix_norm(G, 2)) ** 2 + 0.01) > 0.3
    state = torch.randn(4, 1, dtype=F64)
    zero = torch.zeros(2, dtype=F64)
    stepped = torch.cat(loop.step(state[:2, 0], state[2:, 0], zero, zero))
    assert_close(loop.matrix @ state, stepped[:, None])


def test_what_makes_no_sense_is_refused_by_name():
    with pytest.raises(ArgumentError, match="m is 2 and L is 1"):
        certified_rate(gradient_descent(0.1), 2, 1)
    with pytest.raises(ArgumentError, match="functions is 'smooth'"):
        certified_rate(gradient_descent(0.1), 1, 2, functions="smooth")
    with pytest.raises(ShapeError, match="A, B and C have shapes"):
        FirstOrderMethod(torch.eye(2), torch.ones(2), torch.ones(1, 2))
    with pytest.raises(ShapeError, match="must be"):
        FeedbackOptimization(torch.eye(2), torch.ones(3, 1), 0.1)


def test_the_bisection_ends_at_the_width_of_rounding_and_refuses_none():
    assert certified_rate(nesterov(0.1, 0.5), 1, 10, tol=1e-18).rate == approx(0.752634, abs=1e-5)
    for tol in (0.0, -1.0, math.nan):
        with pytest.raises(ArgumentError, match="tol is"):
            certified_rate(gradient_descent(0.15), 1, 10, tol=tol)
