"""Dynamic programming on a grid, against closed forms."""

import math

import pytest
import torch
from pytest import approx

from bolza.core import CallableCost
from bolza.core.errors import ArgumentError, ShapeError
from bolza.ops.riccati import riccati_recursion
from bolza.solve import grid_hjb
from bolza.solve.hjb import interpolate
from bolza.systems import LinearSystem, ODESystem, QuadraticCost

F = torch.float64
I = torch.eye(1, dtype=F)  # noqa: E741
BOX = torch.linspace(-4, 4, 5, dtype=F)[:, None]


def line(n, reach=4.0):
    return torch.linspace(-reach, reach, n, dtype=F)


def lq(n, **options):
    return grid_hjb(LinearSystem(I, I, horizon=5), QuadraticCost(I, I), [line(n)], BOX, refine=14, **options)


def test_interpolation_is_exact_for_a_multilinear_function_and_constant_outside():
    axes = [torch.tensor([0.0, 1.0, 3.0], dtype=F), torch.tensor([-1.0, 0.5], dtype=F)]
    mesh = torch.meshgrid(*axes, indexing="ij")
    x = torch.rand(50, 2, dtype=F) * torch.tensor([3.0, 1.5], dtype=F) + torch.tensor([0.0, -1.0], dtype=F)
    found = interpolate(1 + 2 * mesh[0] - mesh[1] + 3 * mesh[0] * mesh[1], axes, x)
    torch.testing.assert_close(found, 1 + 2 * x[:, 0] - x[:, 1] + 3 * x[:, 0] * x[:, 1])
    torch.testing.assert_close(
        interpolate(mesh[0] + mesh[1], axes, torch.tensor([9.0, -9.0], dtype=F)),
        torch.tensor(2.0, dtype=F),
    )


def test_value_and_feedback_of_the_scalar_regulator_converge_with_order_two_in_the_grid():
    P = riccati_recursion(I, I, I, I, I, 5).P[0, 0, 0]
    x = torch.linspace(-2, 2, 41, dtype=F)[:, None]
    errors, policies = [], []
    for n in (41, 81, 161):
        found = lq(n)
        errors.append(float((found.value(0, x) - P / 2 * x[:, 0] ** 2).abs().max()))
        policies.append(float((found.policy(0, x) + 0.6179775 * x).abs().max()))
        assert float(found.outside.max()) == 0
    assert math.log2(errors[0] / errors[2]) / 2 == approx(2, abs=0.25)
    assert errors[2] < 2e-3 and policies[2] < 0.03 and policies[2] < policies[0] / 2


def test_a_noise_of_known_variance_adds_half_the_trace_of_the_value_matrices():
    s, n = 0.3, 161
    P = riccati_recursion(I, I, I, I, I, 5).P[:, 0, 0]
    noisy, still = lq(n, noise=torch.tensor([[s]], dtype=F)), lq(n)
    x = torch.zeros(1, dtype=F)
    # V = ½P x² + ½ s² Σ P_{t+1}: exact for a quadratic V, to the grid's own error
    assert float(noisy.value(0, x) - still.value(0, x)) == approx(float(P[1:].sum()) * s**2 / 2, rel=0.01)


def test_the_semi_lagrangian_scheme_has_order_one_in_the_time_step():
    """ẋ = u, ∫½(x² + u²): V = ½ tanh(T − t) x²."""
    errors = []
    for steps in (4, 8, 16):
        h = 1.0 / steps
        system = ODESystem(lambda s, x, u: u, horizon=steps, dt=h)
        cost = CallableCost(running=lambda t, x, u, h=h: h / 2 * (x.square().sum() + u.square().sum()))
        found = grid_hjb(system, cost, [line(401, 2.0)], BOX, refine=12)
        at = torch.tensor([[1.0], [-0.6]], dtype=F)
        errors.append(float((found.value(0, at) - math.tanh(1) / 2 * at[:, 0] ** 2).abs().max()))
    assert math.log2(errors[0] / errors[1]) == approx(1, abs=0.15)
    assert math.log2(errors[1] / errors[2]) == approx(1, abs=0.15)


def eikonal(n):
    """Run towards the origin for a time T at speed at most 1: V(t, x) = max(|x| − (T − t), 0)."""
    angles = torch.arange(24, dtype=F) * 2 * math.pi / 24
    ring = torch.stack([angles.cos(), angles.sin()], -1)
    axes, steps = [line(n, 2.0)] * 2, (n - 1) // 4
    system = ODESystem(lambda s, x, u: u, horizon=steps, dt=1 / steps)
    cost = CallableCost(terminal=lambda x: (x.square().sum() + 1e-30).sqrt())
    found = grid_hjb(system, cost, axes, torch.cat([torch.zeros(1, 2, dtype=F), ring]))
    r = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).norm(dim=-1)
    return (found.V[0] - (r - 1).clamp_min(0))[r < 1.9].abs().mean()


def test_the_eikonal_equation_is_solved_across_its_kink():
    coarse, fine = eikonal(21), eikonal(41)
    assert float(fine) < 0.015 and math.log2(coarse / fine) > 0.5  # a kinked solution: between ½ and 1


def test_on_a_line_the_eikonal_value_is_exact():
    system = ODESystem(lambda s, x, u: u, horizon=10, dt=0.1)
    found = grid_hjb(
        system,
        CallableCost(terminal=lambda x: x.abs().sum()),
        [line(41, 2.0)],
        torch.tensor([[-1.0], [0.0], [1.0]], dtype=F),
    )
    torch.testing.assert_close(found.V[0], (line(41, 2.0).abs() - 1).clamp_min(0), rtol=0, atol=1e-12)


def test_the_scheme_is_monotone():
    system = LinearSystem(0.9 * I, I, horizon=3)
    low, high = (
        grid_hjb(
            system, CallableCost(lambda x, a=a: torch.sin(3 * x).sum() + a * x.abs().sum()), [line(33)], BOX
        )
        for a in (0.0, 0.2)
    )
    assert bool((high.V >= low.V).all())


def test_refining_controls_never_raises_the_value_and_pieces_do_not_matter():
    system, cost = LinearSystem(I, I, horizon=1), QuadraticCost(I, I)
    values = [grid_hjb(system, cost, [line(21)], BOX, refine=r).V[0] for r in (0, 3, 9)]
    assert bool((values[1] <= values[0] + 1e-12).all() and (values[2] <= values[1] + 1e-12).all())
    pieces = grid_hjb(system, cost, [line(21)], BOX, refine=9, chunk=7).V[0]
    torch.testing.assert_close(pieces, values[2])


def test_three_variables_work_and_four_are_refused():
    A, B = torch.eye(3, dtype=F), torch.eye(3, dtype=F)
    box = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0], dtype=F)] * 3)
    found = grid_hjb(LinearSystem(A, B, horizon=2), QuadraticCost(A, B), [line(5, 1.0)] * 3, box, refine=2)
    assert found.V.shape == (3, 5, 5, 5) and found.policy(0, torch.zeros(2, 3, dtype=F)).shape == (2, 3)
    assert float(found.V[0, 2, 2, 2]) == 0
    with pytest.raises(ShapeError, match="4 axes"):
        grid_hjb(LinearSystem(A, B, horizon=2), QuadraticCost(A, B), [line(5)] * 4, box)


def test_controls_that_leave_the_grid_are_counted_and_bad_grids_named():
    system, cost = LinearSystem(2 * I, I, horizon=1), QuadraticCost(I, I)
    found = grid_hjb(system, cost, [line(9)], torch.zeros(1, 1, dtype=F))
    assert float(found.outside[0]) == approx(4 / 9)
    with pytest.raises(ArgumentError, match="ascending"):
        grid_hjb(system, cost, [line(9).flip(0)], BOX)
    with pytest.raises(ArgumentError, match="candidates"):
        grid_hjb(system, cost, [line(9)], BOX[:, 0])
    with pytest.raises(ArgumentError, match="horizon is 3"):
        grid_hjb(system, cost, [line(9)], BOX, horizon=3)
    with pytest.raises(ShapeError, match="noise"):
        grid_hjb(system, cost, [line(9)], BOX, noise=torch.eye(2))


def test_an_infinite_cost_forbids_states_and_leaves_the_others_alone():
    """A wall at x > ½ with steps of at most one grid line: nothing below it is spoilt, nothing above has a value."""
    system = LinearSystem(I, I, horizon=2)
    x = torch.linspace(-1, 1, 9, dtype=F)
    cost = CallableCost(lambda x: x[0].abs(), lambda t, x, u: torch.where(x[0] > 0.5, math.inf, 0.0))
    found = grid_hjb(system, cost, [x], torch.tensor([[-0.25], [0.0], [0.25]], dtype=F))
    assert found.V[0][:7].tolist() == [0.5, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert bool(found.V[0][7:].isinf().all())


def test_costs_that_are_no_number_or_several_and_steps_that_are_none_are_refused():
    system, axes, still = LinearSystem(I, I, horizon=2), [line(5)], torch.zeros(1, 1, dtype=F)
    with pytest.raises(ArgumentError, match="not a number at 2 of 5"):
        grid_hjb(system, CallableCost(lambda x: x.log().sum()), axes, still)
    with pytest.raises(ShapeError, match="running cost has shape"):
        grid_hjb(system, CallableCost(lambda x: x.sum(), lambda t, x, u: torch.cat([x, u])), axes, still)
    one = grid_hjb(system, CallableCost(lambda x: x**2, lambda t, x, u: u**2), axes, still)
    assert one.V.shape == (3, 5)
    for t in (-1, 2):
        with pytest.raises(ArgumentError, match=f"t is {t}"):
            one.policy(t, torch.zeros(1, dtype=F))
