"""Minimisers of a Hamiltonian over one control."""

import itertools
import math

import pytest
import torch
from pytest import approx
from torch.testing import assert_close

from bolza.core import (
    CallableCost,
    adjoint,
    binary_rule,
    extended_hamiltonian,
    gibbs_minimizer,
    gradient_minimizer,
    hamiltonian,
    lbfgs_minimizer,
    proximal_minimizer,
    quadratic_minimizer,
    rollout,
    sign_minimizer,
    ternary_rule,
)
from bolza.core.errors import ArgumentError, ShapeError, UnsupportedError

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def quadratic():
    half = draw(6, 6)
    a, b = half @ half.mT + torch.eye(6, dtype=F64), draw(6, seed=1)

    def function(v):
        flat = torch.cat([v["w"].reshape(-1), v["b"]])
        return flat @ a @ flat / 2 - b @ flat

    u = {"w": draw(2, 2, seed=2), "b": draw(2, seed=3), "n": 5}
    return function, u, a, b


def test_the_minimum_of_a_quadratic_is_found_exactly_whatever_the_start():
    function, u, a, b = quadratic()
    for rho in (0.0, 0.7):
        v = quadratic_minimizer(rho)(function, u)
        start = torch.cat([u["w"].reshape(-1), u["b"]])
        solution = torch.linalg.solve(a + rho * torch.eye(6, dtype=F64), b + rho * start)
        assert_close(torch.cat([v["w"].reshape(-1), v["b"]]), solution, rtol=0, atol=1e-11)
        assert v["n"] == 5 and not v["w"].requires_grad


def test_all_minimisers_agree_on_a_quadratic():
    function, u, _, _ = quadratic()
    exact = quadratic_minimizer(0.7)(function, u)
    near = proximal_minimizer(0.7, iterations=60)(function, u)
    assert_close(near, exact, rtol=0, atol=1e-6)
    assert float(function(lbfgs_minimizer(60)(function, u))) == approx(
        float(function(quadratic_minimizer()(function, u))), abs=1e-10
    )


def test_a_gradient_step_is_one():
    function, u, a, b = quadratic()
    v = gradient_minimizer(0.1)(function, u)
    start = torch.cat([u["w"].reshape(-1), u["b"]])
    assert_close(torch.cat([v["w"].reshape(-1), v["b"]]), start - 0.1 * (a @ start - b))


def test_a_hamiltonian_without_a_minimum_is_refused_by_name():
    with pytest.raises(ArgumentError, match="has no minimum"):
        quadratic_minimizer()(lambda v: v.sum(), torch.zeros(2))
    with pytest.raises(ArgumentError, match="has no minimum"):
        quadratic_minimizer()(lambda v: v.sum() - v.square().sum(), torch.zeros(2))
    assert quadratic_minimizer(2.0)(lambda v: v.sum(), torch.zeros(2)).tolist() == [-0.5, -0.5]


@pytest.mark.parametrize(
    "minimizer",
    [
        gradient_minimizer(0.1),
        lbfgs_minimizer(),
        quadratic_minimizer(1.0),
        sign_minimizer(),
        gibbs_minimizer(1.0, 0.1),
    ],
)
def test_a_control_without_tensors_is_left_as_it_is(minimizer):
    assert minimizer(lambda v: torch.zeros(()), {"n": 3}) == {"n": 3}


def test_the_gibbs_law_of_the_chain_is_the_one_that_its_step_length_gives():
    """v' = (1 − lr λ) v + √(2 lr τ) ξ has the variance τ/(λ (1 − lr λ/2)): 20 % above τ/λ here."""
    lam, tau, lr, n = 2.0, 0.3, 1 / 6, 40_000
    sample = gibbs_minimizer(tau, lr, steps=40, generator=torch.Generator().manual_seed(0))
    v = sample(lambda v: lam * (v - 1).square().sum() / 2, torch.zeros(n, dtype=F64))
    exact = tau / (lam * (1 - lr * lam / 2))
    assert abs(float(v.var()) - exact) < 4 * exact * math.sqrt(2 / n)
    assert abs(float(v.mean()) - 1) < 4 * math.sqrt(exact / n)
    with pytest.raises(UnsupportedError, match="too long"):
        gibbs_minimizer(1.0, 1e9, steps=50)(lambda v: v.square().square().sum(), torch.ones(2))


# ------------------------------------------------------------------------------------ discrete weights


def test_eight_binary_weights_are_those_of_brute_force():
    """A weight flips where the gain 2|M| is above the price 2 ρ m of the change."""
    every = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)), dtype=F64)
    for seed in range(20):
        M, theta = draw(8, seed=seed), torch.where(draw(8, seed=100 + seed) > 0, 1.0, -1.0).to(F64)
        for rho in (0.0, 0.5):
            wrong = torch.where(M >= 0, 1.0, -1.0) != theta
            threshold = rho * float(torch.where(wrong, M.abs(), 0.0).max())
            price = -every @ M + threshold / 2 * (every - theta).square().sum(1)
            assert torch.equal(binary_rule(M, theta, rho), every[price.argmin()])


def test_eight_ternary_weights_are_those_of_brute_force():
    every = torch.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=8)), dtype=F64)
    for seed in range(20):
        M = draw(8, seed=seed)
        theta = torch.randint(-1, 2, (8,), generator=torch.Generator().manual_seed(seed)).to(F64)
        for rho, sparsity in ((0.0, 0.0), (0.25, 0.1), (1.0, 1e-7)):
            wrong = torch.where(M >= 0, 1.0, -1.0) != theta
            step = rho * float(torch.where(wrong, M.abs(), 0.0).max())
            price = -every @ M + sparsity * every.abs().sum(1) + step * (every - theta).square().sum(1)
            assert torch.equal(ternary_rule(M, theta, rho, sparsity), every[price.argmin()])


def test_a_threshold_of_one_keeps_all_binary_weights_and_zero_takes_all_signs():
    M, theta = draw(5, 7), torch.ones(5, 7, dtype=F64)
    assert torch.equal(binary_rule(M, theta, 1.0), theta)
    assert torch.equal(binary_rule(M, theta, 0.0), M.sign())
    assert binary_rule(torch.zeros(3), -torch.ones(3), 0.0).tolist() == [-1.0] * 3  # nothing to gain


def test_the_sign_rule_minimises_a_linear_hamiltonian():
    slope = draw(6)
    for weights, start in (("binary", torch.ones(6, dtype=F64)), ("ternary", torch.zeros(6, dtype=F64))):
        v = sign_minimizer(weights=weights)(lambda v: v @ slope, start)
        assert torch.equal(v, -slope.sign())
    assert (
        sign_minimizer(weights="ternary", sparsity=100.0)(
            lambda v: v @ slope, torch.ones(6, dtype=F64)
        ).norm()
        == 0
    )
    with pytest.raises(ArgumentError, match="no binary weight"):
        sign_minimizer()(lambda v: v.sum(), torch.zeros(2))


@pytest.mark.parametrize(
    "make",
    [
        lambda: gradient_minimizer(0.0),
        lambda: lbfgs_minimizer(0),
        lambda: quadratic_minimizer(-1.0),
        lambda: quadratic_minimizer(tolerance=0.0),
        lambda: sign_minimizer(-1.0),
        lambda: sign_minimizer(weights="octal"),
        lambda: gibbs_minimizer(0.0, 1.0),
        lambda: gibbs_minimizer(1.0, float("nan")),
    ],
)
def test_arguments_out_of_range_are_refused(make):
    with pytest.raises(ArgumentError):
        make()


# ------------------------------------------------------------------------------- extended Hamiltonian


class Layer:
    """x ← tanh(x W), one step."""

    horizon, controls = 2, (draw(3, 3), draw(3, 3, seed=1))

    def step(self, t, x, u):
        return torch.tanh(x @ u)


def solved():
    cost = CallableCost(terminal=lambda x: x.square().mean(), running=lambda t, x, u: 0.1 * x.square().mean())
    return cost, adjoint(Layer(), cost, rollout(Layer(), draw(4, 3, seed=2)))


def test_the_extended_hamiltonian_is_the_sum_of_its_three_terms():
    cost, run = solved()
    x, p, costate, v = run.states[1], run.costates[2], run.costates[1], draw(3, 3, seed=5)
    rho, samples = 0.7, 4
    pulled = adjoint(Layer(), cost, run).costates  # fixes the meaning of p
    assert_close(pulled[1], costate)
    held = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(hamiltonian(Layer(), cost, 1, held, p, v), held)
    expected = (
        hamiltonian(Layer(), cost, 1, x, p, v)
        + rho / 2 / samples * (run.states[2] - Layer().step(1, x, v)).square().sum()
        + rho * samples / 2 * (costate - slope).square().sum()
    )
    given = {"following": run.states[2], "costate": costate, "rho": rho, "samples": samples}
    assert_close(extended_hamiltonian(Layer(), cost, 1, x, p, v, **given), expected)
    with torch.no_grad():
        assert not extended_hamiltonian(Layer(), cost, 1, x, p, v, **given).requires_grad


def test_at_the_present_control_the_terms_and_their_gradients_vanish():
    cost, run = solved()
    u = run.controls[1].clone().requires_grad_()
    given = {"following": run.states[2], "costate": run.costates[1], "samples": 4}
    slopes = [
        torch.autograd.grad(
            extended_hamiltonian(Layer(), cost, 1, run.states[1], run.costates[2], u, rho=rho, **given), u
        )[0]
        for rho in (0.0, 5.0)
    ]
    assert_close(slopes[0], run.gradients[1])
    assert_close(slopes[1], slopes[0], rtol=0, atol=1e-12)


def test_the_extended_hamiltonian_checks_its_arguments():
    cost, run = solved()
    args = Layer(), cost, 1, run.states[1], run.costates[2], run.controls[1]
    with pytest.raises(ArgumentError, match="rho must not be negative"):
        extended_hamiltonian(*args, following=run.states[2], rho=-1.0)
    with pytest.raises(ShapeError, match="following"):
        extended_hamiltonian(*args, following=run.states[2][:2])
