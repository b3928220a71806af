"""Successive approximation of the maximum principle, against closed forms."""

import pytest
import torch
from pytest import approx
from torch import nn
from torch.testing import assert_close

from bolza.core import (
    CallableCost,
    TerminalCost,
    adjoint,
    gradient_minimizer,
    hamiltonian,
    lbfgs_minimizer,
    quadratic_minimizer,
    rollout,
    sign_minimizer,
)
from bolza.core.errors import ArgumentError
from bolza.ops.riccati import riccati_recursion
from bolza.solve import hamiltonian_sweep, infeasibility, successive_approximation
from bolza.systems import LinearSystem, QuadraticCost, as_system

F64 = torch.float64
LAM, MEAN, SD = 0.5, 1.3, 0.7


class Shift:
    """x ← x + h θ, one θ for all samples; ``steps`` steps to the time T."""

    def __init__(self, T=1.0, steps=1, start=0.0):
        self.h, self.horizon = T / steps, steps
        self.controls = tuple(torch.full((1,), start, dtype=F64) for _ in range(steps))

    def step(self, t, x, u):
        return x + self.h * u


def scalar_problem(T=1.0, lam=LAM, samples=64, steps=1, start=0.0):
    """Mean over samples of (x_T − y)²/2 + λ/2 ∫θ²; y − x_0 has exactly the mean and deviation MEAN and SD."""
    z = torch.linspace(-1, 1, samples, dtype=F64)[:, None]
    z = MEAN + SD * (z - z.mean()) / z.std(correction=0)
    system = Shift(T, steps, start)
    cost = CallableCost(
        terminal=lambda x: (x - z).square().mean() / 2,
        running=lambda t, x, u: system.h * lam / 2 * u.square().sum(),
    )
    return system, cost, torch.zeros_like(z)


def iterates(count, rho, T=1.0, lam=LAM, steps=1, start=0.0):
    system, cost, x0 = scalar_problem(T, lam, steps=steps, start=start)
    controls, found = system.controls, []
    for _ in range(count):
        run = rollout(system, x0, controls)
        controls = hamiltonian_sweep(
            system, cost, run, quadratic_minimizer(), rho=rho / system.h, samples=len(x0)
        )
        assert len({round(float(u), 9) for u in controls}) == 1
        found.append(float(controls[0]))
    return found


def test_the_basic_method_jumps_as_the_closed_form_says():
    assert iterates(5, 0.0) == approx([2.6, -2.6, 7.8, -13.0, 28.6], abs=1e-12)


@pytest.mark.parametrize(("rho", "multiplier"), [(0, -2), (0.25, -1), (0.5, -0.5), (1, 0), (2, 0.4)])
def test_the_error_is_multiplied_by_rho_minus_T_over_lambda_plus_rho(rho, multiplier):
    best = MEAN / (LAM + 1)
    (found,) = iterates(1, rho, start=best + 1)
    assert found - best == approx(multiplier, abs=1e-12)


@pytest.mark.parametrize(
    ("T", "lam", "rho"), [(0.4, 0.5, 0.0), (2.0, 0.3, 1.1), (3.0, 0.5, 3.0), (1.0, 0.5, 0.3)]
)
def test_it_converges_if_and_only_if_rho_is_above_half_of_T_minus_lambda(T, lam, rho):
    best = MEAN / (lam + T)
    for sign, converges in ((1, True), (-1, False)):
        shifted = (T - lam) / 2 + sign * (rho - (T - lam) / 2)
        if shifted < 0:
            continue
        errors = [abs(value - best) for value in iterates(12, shifted, T, lam)]
        assert (errors[-1] < errors[0]) == converges or errors[-1] < 1e-12


def test_rho_equal_to_T_is_exact_in_one_sweep_and_the_value_is_that_of_the_bellman_equation():
    system, cost, x0 = scalar_problem()
    found = successive_approximation(
        system, cost, x0, rho=1.0, samples=len(x0), iterations=1, minimizer=quadratic_minimizer()
    )
    assert float(found.controls[0]) == approx(MEAN / 1.5, abs=1e-12)
    assert float(found.controls[0]) == approx(0.866667, abs=5e-7)
    assert found.value == approx(LAM / 1.5 * MEAN**2 / 2 + SD**2 / 2, abs=1e-12)
    assert found.value == approx(0.526667, abs=5e-7)


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_rho_over_the_step_length_is_the_rho_of_continuous_time(steps):
    best, rho = MEAN / (LAM + 1), 0.5
    (found,) = iterates(1, rho, steps=steps, start=best + 1)
    assert found - best == approx((rho - 1) / (LAM + rho), abs=1e-12)


@pytest.mark.parametrize("copies", [1, 5])
def test_the_size_of_the_batch_does_not_change_a_sweep(copies):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3, dtype=F64), torch.randn(6, 2, dtype=F64)
    found = []
    for n in (1, copies):
        xs, ys = x.repeat(n, 1), y.repeat(n, 1)
        system, cost = as_system(net, xs), TerminalCost(nn.functional.mse_loss, ys)
        with torch.no_grad():
            run = rollout(system, xs)
        found.append(hamiltonian_sweep(system, cost, run, lbfgs_minimizer(5), rho=0.5, samples=len(xs)))
    assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_adapting_finds_a_rho_under_which_the_cost_falls_monotonically():
    system, cost, x0 = scalar_problem(T=3.0)
    plain = successive_approximation(system, cost, x0, iterations=8, minimizer=quadratic_minimizer())
    assert plain.values[-1] > 100 * plain.values[0] and plain.value <= plain.values[0]
    found = successive_approximation(
        system, cost, x0, adapt=True, samples=len(x0), iterations=60, minimizer=quadratic_minimizer()
    )
    kept = [found.start, *(s.value for s in found.sweeps if s.accepted)]
    assert kept == sorted(kept, reverse=True) and not all(s.accepted for s in found.sweeps)
    assert float(found.controls[0]) == approx(MEAN / 3.5, abs=1e-7)
    assert all(s.hamiltonian_change <= 1e-12 and s.infeasibility >= 0 for s in found.sweeps)


def test_the_worked_network_of_one_unit():
    """x_1 = tanh(θ_0), x_2 = θ_1 x_1, Φ = (x_2 − 1)²/2, L = .05 θ², at θ = (.5, 2)."""

    class Unit:
        horizon = 2
        controls = (torch.tensor([0.5], dtype=F64), torch.tensor([2.0], dtype=F64))

        def step(self, t, x, u):
            return torch.tanh(u * x) if t == 0 else u * x

    cost = CallableCost(
        terminal=lambda x: (x - 1).square().sum() / 2, running=lambda t, x, u: 0.05 * u.square().sum()
    )
    run = adjoint(Unit(), cost, rollout(Unit(), torch.ones(1, dtype=F64)))
    assert [float(x) for x in run.states] == approx([1.0, 0.4621172, 0.9242343], abs=5e-8)
    # the review maximises: its costates have the other sign
    assert [float(p) for p in run.costates[1:]] == approx([-0.1515314, -0.0757657], abs=5e-8)
    assert float(run.value) == approx(0.2153702, abs=5e-8)
    assert [float(g) for g in run.gradients] == approx([-0.0691715, 0.1649874], abs=5e-8)
    for minimizer in (quadratic_minimizer(), lbfgs_minimizer()):
        found = hamiltonian_sweep(Unit(), cost, run, minimizer)
        assert float(found[1]) == approx(0.3501262, abs=5e-8)


def test_one_gradient_step_on_every_hamiltonian_is_gradient_descent():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3, dtype=F64), torch.randn(6, 2, dtype=F64)
    system, cost = as_system(net, x), TerminalCost(nn.functional.mse_loss, y)
    for rho in (0.0, 3.0):  # the feasibility terms have no gradient at the present controls
        with torch.no_grad():
            run = rollout(system, x)
        found = {
            k: v
            for u in hamiltonian_sweep(system, cost, run, gradient_minimizer(0.1), rho=rho, samples=6)
            for k, v in u.items()
        }
        net.zero_grad()
        cost.terminal(net(x)).backward()
        for name, p in net.named_parameters():
            assert_close(found[name], p.detach() - 0.1 * p.grad, rtol=1e-12, atol=1e-12)


def test_it_solves_the_linear_quadratic_problem_of_the_riccati_equation():
    A, B = torch.tensor([[1.0, 0.2], [0.0, 1.0]], dtype=F64), torch.tensor([[0.0], [0.5]], dtype=F64)
    Q, R, x0 = torch.eye(2, dtype=F64), torch.eye(1, dtype=F64), torch.tensor([1.0, -0.5], dtype=F64)
    P = riccati_recursion(A, B, Q, R, Q, horizon=6).P[0]
    found = successive_approximation(
        LinearSystem(A, B, 6), QuadraticCost(Q, R), x0, rho=8.0, adapt=True, iterations=24,
        minimizer=quadratic_minimizer(),
    )  # fmt: skip
    assert found.value == approx(float(x0 @ P @ x0) / 2, rel=1e-3)


def test_infeasibility_counts_what_the_error_bound_charges():
    """J(v) − J(u) = ΔH + Σ‖Δf‖² h-terms: for x ← x + hθ and a quadratic Φ the bound is an equality with C = T/2h."""
    system, cost, x0 = scalar_problem(steps=4, start=0.3)
    run = adjoint(system, cost, rollout(system, x0))
    v = tuple(u + 0.7 for u in system.controls)
    change = sum(
        float(hamiltonian(system, cost, t, run.states[t], run.costates[t + 1], b)
              - hamiltonian(system, cost, t, run.states[t], run.costates[t + 1], a))
        for t, (a, b) in enumerate(zip(system.controls, v, strict=True))
    )  # fmt: skip
    after = adjoint(system, cost, rollout(system, x0, v))
    cost_of_leaving = infeasibility(system, cost, run, v, samples=len(x0))
    assert cost_of_leaving == approx(4 * (0.25 * 0.7) ** 2)
    assert float(after.value - run.value) == approx(change + 4 / 2 * cost_of_leaving, abs=1e-12)


def test_the_maximum_principle_needs_affine_and_nonlinear_part_as_separate_steps():
    """Two samples through tanh(w x) move on a curve; w may be optimal where H has its maximum."""
    x = torch.tensor([[1.0], [2.0]], dtype=F64)

    class Layer:
        controls = (torch.zeros(1, dtype=F64),)
        horizon = 1

        def step(self, t, x, u):
            return torch.tanh(u * x)

    class Split(Layer):
        controls = (torch.zeros(1, dtype=F64), None)
        horizon = 2

        def step(self, t, x, u):
            return u * x if t == 0 else torch.tanh(x)

    w = 0.5
    curve = torch.tanh(w * x)
    tangent = x * (1 - curve**2)
    normal = torch.stack([-tangent[1], tangent[0]])
    target = curve - 0.3 * normal / normal.norm()  # on the side towards which the curve bends
    cost = CallableCost(terminal=lambda z: (z - target).square().sum() / 2)

    def value(v):
        return cost.terminal(torch.tanh(v * x))

    grid = torch.linspace(-3, 3, 601, dtype=F64)
    assert all(value(v) >= value(w) for v in grid)  # w is optimal

    def values(system, controls):
        run = adjoint(system, cost, rollout(system, x, controls))
        assert float(run.gradients[0].abs().max()) < 1e-12  # and stationary
        return torch.stack(
            [hamiltonian(system, cost, 0, x, run.costates[1], v) for v in (w + 0.1 * grid)[:, None]]
        ) - hamiltonian(system, cost, 0, x, run.costates[1], controls[0])

    best = torch.tensor([w], dtype=F64)
    assert values(Layer(), (best,)).max() < 1e-12  # one step: H is largest there
    assert values(Split(), (best, None)).abs().max() < 1e-12  # two steps: no control is better


def test_binary_controls_need_a_convex_hull():
    """x ← x + θ with θ = ±1 and Φ = x²: both are optimal, and neither minimises its own Hamiltonian."""
    system, cost = Shift(), CallableCost(terminal=lambda x: x.square().sum())
    run = adjoint(system, cost, rollout(system, torch.zeros(1, dtype=F64), (torch.ones(1, dtype=F64),)))
    assert hamiltonian_sweep(system, cost, run, sign_minimizer())[0].item() == -1.0


def test_a_step_that_is_not_finite_ends_the_basic_method_and_is_rejected_by_the_adaptive_one():
    class Exploding(Shift):
        def step(self, t, x, u):
            return torch.where(u.abs() > 5, x / 0, x + u)

    cost = CallableCost(terminal=lambda x: (x - 20).square().sum() / 2)
    x0 = torch.zeros(1, dtype=F64)
    greedy = successive_approximation(Exploding(), cost, x0, minimizer=gradient_minimizer(1.0))
    assert len(greedy.sweeps) == 1 and not greedy.sweeps[0].accepted and greedy.value == 200.0
    careful = successive_approximation(
        Exploding(), cost, x0, rho=1.0, adapt=True, iterations=3, minimizer=quadratic_minimizer()
    )
    assert [s.accepted for s in careful.sweeps] == [False, False, True] and careful.value == 112.5


@pytest.mark.parametrize("options", [{"rho": -1.0}, {"iterations": 0}, {"samples": 0}, {"tolerance": -1.0}])
def test_bad_options_are_refused(options):
    system, cost, x0 = scalar_problem()
    with pytest.raises(ArgumentError, match="must not be negative"):
        successive_approximation(system, cost, x0, **options)


def test_a_start_that_is_not_finite_is_refused():
    cost = CallableCost(terminal=lambda x: x.sum() / 0)
    with pytest.raises(ArgumentError, match="stays finite"):
        successive_approximation(Shift(), cost, torch.zeros(1, dtype=F64))
