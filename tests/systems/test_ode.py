from math import log2, pi, sqrt

import pytest
import torch
from pytest import approx
from torch import nn
from torch.testing import assert_close
from torchdiffeq import odeint

from bolza.core import CallableCost, System, TerminalCost, adjoint, linearize, rollout
from bolza.core.errors import ArgumentError, ShapeError, UnsupportedError
from bolza.systems import (
    ODESystem,
    RungeKutta,
    Separable,
    Splitting,
    hamiltonian_field,
    module_field,
    sample_controls,
)
from bolza.systems.ode import METHODS

F64 = torch.float64


def end(field, x0, steps, method, time=1.0):
    return rollout(ODESystem(field, steps, time / steps, method), x0).states[-1]


def orders(error, steps=(20, 40, 80)):
    errors = [error(n) for n in steps]
    return [log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]


def cubic_error(method):
    one = torch.ones(1, dtype=F64)
    return lambda n: abs(float(end(lambda s, x, u: -(x**3), one, n, method)) - 1 / sqrt(3))


def test_it_is_a_system():
    assert isinstance(ODESystem(lambda s, x, u: x, 2, 0.1), System)


def test_forward_euler_has_its_known_errors():
    """ẋ = −x³, x₀ = 1, x(1) = 1/√3."""
    errors = [cubic_error("euler")(n) for n in (10, 20, 40, 80)]
    assert errors == approx([1.6907e-2, 8.1762e-3, 4.0246e-3, 1.9970e-3], rel=5e-5)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4), ("rk38", 4)])
def test_methods_have_their_order(method, order):
    """ẋ = sin(x + s), x₀ = ½, to time 1, against a grid eight times as fine."""

    def field(s, x, u):
        return (x + s).sin()

    half = torch.full((1,), 0.5, dtype=F64)
    exact = end(field, half, 320, "rk4")
    assert METHODS[method].order == order
    measured = orders(lambda n: abs(float(end(field, half, n, method) - exact)), (10, 20, 40))
    assert measured == approx([order] * 2, abs=0.15)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2)])
def test_methods_have_their_order_on_the_cubic_too(method, order):
    assert orders(cubic_error(method)) == approx([order] * 2, abs=0.1)


def test_another_method_is_one_line():
    heun = RungeKutta(a=((), (1.0,)), b=(0.5, 0.5), order=2)
    assert orders(cubic_error(heun)) == approx([2, 2], abs=0.1)


@pytest.mark.parametrize(("ours", "theirs"), [("euler", "euler"), ("midpoint", "midpoint"), ("rk38", "rk4")])
def test_fixed_grid_solvers_agree_with_torchdiffeq(ours, theirs):
    """What torchdiffeq calls rk4 is the 3/8 rule."""
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(5, 3, dtype=F64)

    def timed(s, x):
        return net(x) * (1 + s)

    with torch.no_grad():
        run = rollout(ODESystem(lambda s, x, u: timed(s, x), 10, 0.2, ours), x)
        wanted = odeint(timed, x, torch.linspace(0, 2, 11, dtype=F64), method=theirs)
    assert_close(torch.stack(run.states), wanted, rtol=0, atol=1e-12)


def test_the_classical_rule_agrees_with_torchdiffeq_on_a_linear_field():
    """There all methods of four stages and order 4 are the same polynomial."""
    A = torch.randn(3, 3, dtype=F64)
    x = torch.randn(5, 3, dtype=F64)
    run = rollout(ODESystem(lambda s, x, u: x @ A, 10, 0.1, "rk4"), x)
    wanted = odeint(lambda s, x: x @ A, x, torch.linspace(0, 1, 11, dtype=F64), method="rk4")
    assert_close(torch.stack(run.states), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_controls_sampled_from_a_path_keep_the_order(method, order):
    """ẋ = −u(s) x with u = cos s: x(2) = exp(−sin 2)."""

    def error(n, hold):
        def path(s):
            return torch.tensor(s, dtype=F64).cos()

        controls = sample_controls(path, n, 2 / n, method)
        if hold == "constant":
            controls = [u[0] for u in controls]
        system = ODESystem(lambda s, x, u: -u * x, n, 2 / n, method, controls, hold=hold)
        exact = torch.exp(-torch.tensor(2.0, dtype=F64).sin())
        return abs(float(rollout(system, torch.ones(1, dtype=F64)).states[-1] - exact))

    assert orders(lambda n: error(n, "nodes")) == approx([order] * 2, abs=0.15)
    assert orders(lambda n: error(n, "constant")) == approx([1, 1], abs=0.15)


def test_the_gradient_flows_through_samples_into_what_the_path_is_made_of():
    """ẋ = −(a + b s) x: ∂/∂a and ∂/∂b of x(1) are −x(1) and −x(1)/2."""
    a, b = (torch.tensor(value, dtype=F64, requires_grad=True) for value in (0.3, 0.7))
    controls = sample_controls(lambda s: {"rate": a + b * s}, 20, 0.05, "rk4")
    system = ODESystem(lambda s, x, u: -u["rate"] * x, 20, 0.05, "rk4", controls, hold="nodes")
    last = rollout(system, torch.ones(1, dtype=F64)).states[-1]
    gradient = torch.autograd.grad(last.sum(), (a, b))
    x = last.item()
    assert [g.item() for g in gradient] == approx([-x, -x / 2], rel=1e-6)
    solved = adjoint(
        system, CallableCost(terminal=lambda x: x.sum()), rollout(system, torch.ones(1, dtype=F64))
    )
    assert sum(g["rate"].item() for u in solved.gradients for g in u) == approx(-x, rel=1e-6)


def test_the_time_starts_where_it_is_said_to():
    first = ODESystem(lambda s, x, u: x * 0 + s, 4, 0.5, "midpoint")
    later = ODESystem(lambda s, x, u: x * 0 + s, 2, 0.5, "midpoint", start=1.0)
    run = rollout(first, torch.zeros(1, dtype=F64))
    assert_close(rollout(later, run.states[2]).states[-1], run.states[-1])
    assert run.states[-1].item() == approx(2.0)


# ------------------------------------------------------------------------------------ leapfrog


def pendulum():
    return Separable(velocity=lambda s, p, u: p, force=lambda s, q, u: -q.sin())


def energy(x):
    q, p = x
    return p**2 / 2 - q.cos()


START = (torch.tensor([2.0, 0.5], dtype=F64), torch.tensor([0.0, -1.0], dtype=F64))


def test_leapfrog_has_order_two():
    reference = end(pendulum(), START, 400, "rk4")[0]

    def error(n):
        return float((end(pendulum(), START, n, "leapfrog")[0] - reference).norm())

    assert orders(error, (20, 40, 80)) == approx([2, 2], abs=0.1)


def test_a_splitting_of_order_four_is_one_line():
    cut = 1 / (2 - 2 ** (1 / 3))
    yoshida = Splitting(
        kicks=(cut / 2, (1 - cut) / 2, (1 - cut) / 2, cut / 2), drifts=(cut, 1 - 2 * cut, cut, 0.0), order=4
    )
    reference = end(pendulum(), START, 400, "rk4")[0]

    def error(n):
        return float((end(pendulum(), START, n, yoshida)[0] - reference).norm())

    assert orders(error, (10, 20, 40)) == approx([4, 4], abs=0.2)


def test_the_energy_of_leapfrog_does_not_drift_and_that_of_euler_does():
    """Over thirty periods the error stays O(dt²), with no trend; Euler gains without end."""

    def deviation(method):
        run = rollout(ODESystem(pendulum(), 3000, 0.1, method), START)
        energies = torch.stack([energy(x) for x in run.states])
        return (energies - energies[0]).abs()

    leapfrog = deviation("leapfrog")
    assert leapfrog.max() < 0.1**2
    early, late = leapfrog[:1500].amax(0), leapfrog[1500:].amax(0)
    assert_close(early, late, rtol=0.01, atol=0)
    run = rollout(ODESystem(pendulum(), 400, 0.1, "euler"), START)
    assert (energy(run.states[-1]) - energy(START)).min() > 0.5


def test_leapfrog_runs_backwards_to_where_it_started():
    """A reversible network: the input comes back from the output, so that no state need be stored."""
    n, steps = 4, 60
    g = torch.Generator().manual_seed(0)
    controls = [
        {
            name: torch.randn(*shape, dtype=F64, generator=g)
            for name, shape in (("K1", (n, n)), ("b1", (n,)), ("K2", (n, n)), ("b2", (n,)))
        }
        for _ in range(steps)
    ]
    x0 = (torch.randn(3, n, dtype=F64, generator=g), torch.zeros(3, n, dtype=F64))
    there = ODESystem(hamiltonian_field(), steps, 0.1, "leapfrog", controls)
    back = ODESystem(hamiltonian_field(), steps, -0.1, "leapfrog", controls[::-1], start=steps * 0.1)
    run = rollout(there, x0)
    returned = rollout(back, run.states[-1]).states[-1]
    assert_close(returned, x0, rtol=0, atol=1e-12)
    assert float((run.states[-1][0] - x0[0]).norm()) > 1


def test_leapfrog_is_symplectic():
    """The Jacobian M of a step has MᵀΩM = Ω."""
    system = ODESystem(pendulum(), 1, 0.3, "leapfrog")
    a, _ = linearize(system, 0, START).matrices()
    eye, zero = torch.eye(2, dtype=F64), torch.zeros(2, 2, dtype=F64)
    omega = torch.cat([torch.cat([zero, eye], 1), torch.cat([-eye, zero], 1)])
    assert_close(a.T @ omega @ a, omega, rtol=0, atol=1e-14)


def test_leapfrog_sees_the_time_and_the_nodes_of_its_controls():
    """q̈ = u(s) with u = cos s, from rest: q(s) = 1 − cos s."""

    def force(s, q, u):
        assert u.item() == approx(torch.tensor(s, dtype=F64).cos().item())
        return 0 * q + u

    assert METHODS["leapfrog"].nodes == (0.0, 0.5, 1.0, 1.0)
    field = Separable(lambda s, p, u: p, force)
    steps, dt = 100, pi / 100
    controls = sample_controls(lambda s: torch.tensor(s, dtype=F64).cos(), steps, dt, "leapfrog")
    system = ODESystem(field, steps, dt, "leapfrog", controls, hold="nodes")
    zero = torch.zeros(1, dtype=F64)
    assert rollout(system, (zero, zero)).states[-1][0].item() == approx(2.0, abs=1e-3)


def test_a_separable_field_serves_the_other_methods_too():
    fine = end(pendulum(), START, 400, "leapfrog")
    assert_close(end(pendulum(), START, 50, "rk4"), fine, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------ networks


def block(width=3):
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, width)).double()


def test_a_residual_network_is_forward_euler_and_its_costates_are_back_propagation():
    blocks = nn.ModuleList(block() for _ in range(4))
    x, y = torch.randn(6, 3, dtype=F64), torch.randn(6, 3, dtype=F64)
    system = ODESystem.from_module(blocks, dt=0.5)
    solved = adjoint(system, TerminalCost(nn.functional.mse_loss, y), rollout(system, x))

    z = x
    for b in blocks:
        z = z + 0.5 * b(z)
    nn.functional.mse_loss(z, y).backward()
    assert_close(solved.states[-1], z, rtol=0, atol=1e-15)
    wanted = {name: p.grad for name, p in blocks.named_parameters()}
    assert_close(solved.gradient_by_name(), wanted, rtol=0, atol=1e-14)


def test_blocks_need_not_be_alike():
    blocks = [nn.Linear(3, 3).double(), block()]
    system = ODESystem.from_module(blocks, dt=1.0)
    x = torch.randn(2, 3, dtype=F64)
    hidden = x + blocks[0](x)
    assert_close(rollout(system, x).states[-1], hidden + blocks[1](hidden))
    assert sorted(system.controls[1]) == ["1.0.bias", "1.0.weight", "1.2.bias", "1.2.weight"]


def test_one_module_for_all_steps_shares_its_parameters():
    net = block()
    system = ODESystem.from_module(net, 5, dt=0.1, method="rk4")
    x = torch.randn(6, 3, dtype=F64)
    assert all(u["0.weight"] is net[0].weight for u in system.controls)
    solved = adjoint(system, CallableCost(terminal=lambda x: x.square().mean()), rollout(system, x))
    rollout(system, x).states[-1].square().mean().backward()
    wanted = {name: p.grad for name, p in net.named_parameters()}
    assert_close(solved.gradient_by_name(), wanted, rtol=0, atol=1e-14)


def test_a_parameter_that_two_blocks_share_has_one_name():
    blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    blocks[1].weight = blocks[0].weight
    system = ODESystem.from_module(blocks, dt=0.1)
    assert [sorted(u) for u in system.controls] == [["0.bias", "0.weight"], ["0.weight", "1.bias"]]
    x = torch.randn(2, 3)
    solved = adjoint(system, CallableCost(terminal=lambda x: x.sum()), rollout(system, x))
    assert solved.gradient_by_name().keys() == dict(blocks.named_parameters()).keys()


def test_a_module_may_take_the_time():
    class Timed(nn.Module):
        def forward(self, s, x):
            return s * torch.ones_like(x)

    system = ODESystem.from_module(Timed(), 2, dt=1.0, method="midpoint", timed=True)
    assert rollout(system, torch.zeros(1)).states[-1].tolist() == [2.0]


def test_running_statistics_do_not_move_and_dropout_repeats_from_its_seed():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    system = ODESystem.from_module([net, net], dt=0.1, seed=3)
    x = torch.randn(16, 3)
    outside = torch.get_rng_state()
    first, second = rollout(system, x), rollout(system, x)
    assert torch.equal(first.states[-1], second.states[-1])
    assert torch.equal(torch.get_rng_state(), outside)
    assert int(net[1].num_batches_tracked) == 0
    # the two steps draw different masks
    masks = [(first.states[t + 1] == first.states[t]) for t in range(2)]
    assert not torch.equal(*masks)


def test_a_field_of_a_module_takes_its_parameters_from_the_control():
    layer = nn.Linear(2, 2)
    zero = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    assert module_field(layer)(0.0, torch.ones(1, 2), zero).tolist() == [[0, 0]]


# -------------------------------------------------------------------------------------- errors


def test_senseless_arguments_are_refused_by_name():
    def field(s, x, u):
        return x

    with pytest.raises(ArgumentError, match="method is 'rk5': it must be one of euler, midpoint"):
        ODESystem(field, 1, 0.1, "rk5")
    with pytest.raises(ArgumentError, match="horizon is 0"):
        ODESystem(field, 0, 0.1)
    for dt in (0.0, float("nan")):
        with pytest.raises(ArgumentError, match="dt is"):
            ODESystem(field, 1, dt)
    with pytest.raises(ArgumentError, match="hold is 'linear'"):
        ODESystem(field, 1, 0.1, hold="linear")
    with pytest.raises(ShapeError, match="there are 2 controls, but 3 steps"):
        ODESystem(field, 3, 0.1, controls=[{}] * 2)
    with pytest.raises(ShapeError, match="there are 1 fields, but 2 steps"):
        ODESystem.from_module([block()], 2, dt=0.1)
    with pytest.raises(ArgumentError, match="horizon is None"):
        ODESystem.from_module(block(), dt=0.1)
    with pytest.raises(UnsupportedError, match="not separable"):
        ODESystem(field, 1, 0.1, "leapfrog")
    nodes = ODESystem(field, 1, 0.1, "rk4", controls=[(0.0, 0.0)], hold="nodes")
    with pytest.raises(ShapeError, match="control of step 0 has 2 entries.*4 nodes"):
        nodes.step(0, torch.zeros(1), nodes.controls[0])


def test_tables_that_are_no_method_are_refused():
    with pytest.raises(ArgumentError, match="the weights, one a row, have the sum 1"):
        RungeKutta(a=((),), b=(0.5,), order=1)
    with pytest.raises(ArgumentError, match=r"rows of lengths \[0, 2\]"):
        RungeKutta(a=((), (0.5, 0.5)), b=(0.0, 1.0), order=2)
    with pytest.raises(ArgumentError, match="each have the sum 1"):
        Splitting(kicks=(0.5, 0.5), drifts=(1.0,), order=2)
    with pytest.raises(ArgumentError, match="each have the sum 1"):
        Splitting(kicks=(0.5,), drifts=(1.0,), order=1)
