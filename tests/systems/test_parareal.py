"""Parallel iterations against the serial run, whose states and costates they must reach."""

import math

import pytest
import torch
from torch import nn

from bolza.core import CallableCost, TerminalCost, adjoint, rollout
from bolza.core.errors import ArgumentError, ShapeError, UnsupportedError
from bolza.ops.trees import tree_to_vector
from bolza.systems import LinearSystem, ODESystem, QuadraticCost, as_system
from bolza.systems.parareal import coarse_jump, mgrit, parallel_adjoint, parareal, slice_boundaries

F64 = torch.float64
K, DEPTH, WIDTH = 8, 32, 8


def residual_net(time, smooth, seed=0, method="euler"):
    """A tanh field of 32 steps; its weights either turn slowly with depth or are drawn anew at each step."""
    draw = torch.Generator().manual_seed(seed)
    a, b, w = (torch.randn(DEPTH, WIDTH, WIDTH, generator=draw, dtype=F64) / WIDTH**0.5 for _ in range(3))
    s = torch.linspace(0, math.pi, DEPTH, dtype=F64)[:, None, None]
    weights = (a[:1] * s.cos() + b[:1] * s.sin()) if smooth else w
    field = lambda t, x, u: torch.tanh(x @ u["w"].T)  # noqa: E731
    return ODESystem(field, DEPTH, time / DEPTH, method, controls=[{"w": w} for w in weights])


def start(seed=1, batch=5):
    return torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=F64)


def state_error(run, serial):
    norms = [
        float((a - b).norm() / b.norm()) for a, b in zip(run.trajectory.states, serial.states, strict=True)
    ]
    return max(norms)


def cosine(one, two):
    a, b = tree_to_vector(list(one)), tree_to_vector(list(two))
    return float(a @ b / a.norm() / b.norm())


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize(
    "run", [lambda s, x: parareal(s, x, K, iterations=K), lambda s, x: mgrit(s, x, K, iterations=K // 2)]
)
def test_as_many_iterations_as_slices_or_half_with_fcf_give_the_serial_states(run, smooth):
    system, x0 = residual_net(4.0, smooth), start()
    serial = rollout(system, x0)
    found = run(system, x0)
    assert state_error(found, serial) < 1e-12
    assert found.residuals[0] > 1e-3  # the sweep of jumps alone was not exact


def test_one_iteration_less_is_not_exact():
    system, x0 = residual_net(4.0, smooth=False), start()
    serial = rollout(system, x0)
    assert state_error(parareal(system, x0, K, iterations=K - 1), serial) > 1e-9
    assert state_error(mgrit(system, x0, K, iterations=K // 2 - 1), serial) > 1e-9


def test_after_k_iterations_the_first_k_slices_are_exact():
    system, x0 = residual_net(4.0, smooth=False), start()
    serial = rollout(system, x0)
    found = parareal(system, x0, K, iterations=3)
    gaps = [float((a - b).norm()) for a, b in zip(found.trajectory.states, serial.states, strict=True)]
    assert max(gaps[: 3 * DEPTH // K + 1]) < 1e-13 and gaps[-1] > 1e-6


def test_two_level_mgrit_with_f_relaxation_is_parareal_as_it_is_written_down():
    system, x0 = residual_net(4.0, smooth=True), start()
    m = DEPTH // K
    fine = lambda k, x: rollout_slice(system, k * m, (k + 1) * m, x)  # noqa: E731
    coarse = lambda k, x: x + m * (system.step(k * m, x, system.controls[k * m]) - x)  # noqa: E731
    u = [x0]
    for k in range(K):
        u.append(coarse(k, u[k]))
    for _ in range(2):
        new = [x0]
        for k in range(K):
            new.append(coarse(k, new[k]) + fine(k, u[k]) - coarse(k, u[k]))
        u = new
    found = parareal(system, x0, K, iterations=2)
    for k in range(K + 1):
        torch.testing.assert_close(found.trajectory.states[k * m], u[k], rtol=1e-13, atol=1e-13)


def rollout_slice(system, first, last, x):
    for t in range(first, last):
        x = system.step(t, x, system.controls[t])
    return x


@pytest.mark.parametrize("levels", [3, 4])
def test_more_levels_converge_to_the_same_states(levels):
    system, x0 = residual_net(1.0, smooth=True), start()
    serial = rollout(system, x0)
    errors = [state_error(mgrit(system, x0, 16, iterations=k, levels=levels), serial) for k in (0, 2, 4, 12)]
    assert errors[3] < 1e-10 < errors[2] < errors[1] / 10 and errors[1] < errors[0] / 10


def test_smooth_weights_and_small_steps_are_what_makes_few_iterations_enough():
    x0 = start()
    error = {}
    for time, smooth in ((1.0, True), (4.0, True), (4.0, False)):
        system = residual_net(time, smooth)
        serial = rollout(system, x0)
        error[time, smooth] = [state_error(parareal(system, x0, K, iterations=k), serial) for k in (0, 1, 2)]
    for time in (1.0, 4.0):
        e0, e1, e2 = error[time, True]
        assert e1 < e0 / 3 and e2 < e1 / 3
    assert error[1.0, True][2] < 1e-3 and error[4.0, True][2] < 0.05
    assert error[4.0, False][2] > 5 * error[4.0, True][2]


def test_two_state_and_two_adjoint_iterations_give_the_gradient_where_weights_are_smooth():
    x0 = start()
    cost = CallableCost(terminal=lambda x: (x - 1).square().sum(-1).mean() / 2)
    for time in (1.0, 4.0):
        system = residual_net(time, smooth=True)
        exact = adjoint(system, cost, rollout(system, x0))
        run = parareal(system, x0, K, iterations=2)
        found = parallel_adjoint(system, cost, run, iterations=2).trajectory
        assert cosine(found.gradients, exact.gradients) > 0.999
    rough = residual_net(4.0, smooth=False)
    exact = adjoint(rough, cost, rollout(rough, x0))
    found = parallel_adjoint(rough, cost, parareal(rough, x0, K, iterations=2), iterations=2).trajectory
    assert cosine(found.gradients, exact.gradients) < 0.999


def test_exact_states_and_adjoint_iterations_give_costates_gradients_and_cost_of_the_serial_adjoint():
    system, x0 = residual_net(4.0, smooth=False), start()
    cost = CallableCost(
        terminal=lambda x: x.square().sum(),
        running=lambda t, x, u: 0.1 * x.square().sum() + u["w"].square().sum(),
    )
    exact = adjoint(system, cost, rollout(system, x0))
    for relaxation, iterations in (("F", K), ("FCF", K // 2)):
        found = parallel_adjoint(
            system, cost, rollout(system, x0), K, iterations=iterations, relaxation=relaxation
        ).trajectory
        for a, b in zip(found.costates, exact.costates, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
        for a, b in zip(found.gradients, exact.gradients, strict=True):
            torch.testing.assert_close(a["w"], b["w"], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(found.value, exact.value)


def test_the_coarse_error_has_the_order_of_the_method():
    """With RK4 jumps the first sweep errs as the fourth power of the slice, with Euler as the first."""
    for method, order in (("euler", 1), ("rk4", 4)):
        system = ODESystem(lambda s, x, u: x.sin(), 64, 1 / 64, method)
        serial = rollout(system, torch.ones(1, dtype=F64)).states[-1]
        errors = [
            float(
                (
                    parareal(system, torch.ones(1, dtype=F64), k, iterations=0).trajectory.states[-1] - serial
                ).norm()
            )
            for k in (4, 8)
        ]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


def test_a_warm_start_from_the_serial_states_is_already_exact():
    system, x0 = residual_net(1.0, smooth=True), start()
    serial = rollout(system, x0)
    guess = serial.states[:: DEPTH // K]
    run = parareal(system, x0, K, iterations=0, initial=guess)
    assert state_error(run, serial) < 1e-14
    assert run.critical_path == DEPTH // K - 1
    stopped = mgrit(system, x0, K, iterations=9, initial=guess, tolerance=1e-12)
    assert len(stopped.residuals) == 1


def test_the_linear_plant_is_reached_exactly_at_any_number_of_slices():
    A = torch.eye(3, dtype=F64) + 0.05 * torch.randn(3, 3, dtype=F64)
    system = LinearSystem(A, torch.eye(3, dtype=F64), horizon=7, controls=[torch.ones(3, dtype=F64)] * 7)
    cost = QuadraticCost(torch.eye(3, dtype=F64), torch.eye(3, dtype=F64))
    exact = adjoint(system, cost, rollout(system, torch.ones(3, dtype=F64)))
    for slices in (1, 2, 3, 7, (0, 1, 5, 7)):
        bounds = slice_boundaries(7, slices)
        run = parareal(system, torch.ones(3, dtype=F64), bounds, iterations=len(bounds) - 1)
        torch.testing.assert_close(run.trajectory.states[-1], exact.states[-1], rtol=1e-12, atol=0)
        back = parallel_adjoint(system, cost, run, iterations=len(bounds) - 1).trajectory
        torch.testing.assert_close(back.costates[0], exact.costates[0], rtol=1e-12, atol=0)


class Residual(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.h, self.layer = h, nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.h * torch.relu(self.layer(x))


def test_a_residual_conv_net_with_stem_and_head_is_sliced_around_them():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), *[Residual(0.2) for _ in range(8)], nn.Flatten(), nn.Linear(4 * 25, 3)
    ).double()
    x, y = torch.randn(6, 1, 5, 5, dtype=F64), torch.randint(0, 3, (6,))
    system = as_system(net, x)
    assert system.horizon == 10
    bounds = (0, 3, 6, 10)  # stem and head, and the last block, which ends in Flatten, are run as they are
    cost = TerminalCost(nn.functional.cross_entropy, y)
    exact = adjoint(system, cost, rollout(system, x))
    run = parareal(system, x, bounds, iterations=3)
    back = parallel_adjoint(system, cost, run, iterations=3).trajectory
    torch.testing.assert_close(run.trajectory.states[-1], exact.states[-1], rtol=1e-12, atol=1e-12)
    for a, b in zip(back.gradients, exact.gradients, strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-12)
    one = parareal(system, x, bounds, iterations=1).trajectory.states[-1]
    none = parareal(system, x, bounds, iterations=0).trajectory.states[-1]
    assert (one - exact.states[-1]).norm() < 0.5 * (none - exact.states[-1]).norm()


def test_a_plant_whose_state_changes_shape_within_a_slice_is_refused():
    matrices = [torch.ones(2, 2), torch.ones(3, 2), torch.ones(3, 3)]
    plant = LinearSystem(matrices, [torch.ones(len(a), 1) for a in matrices])
    with pytest.raises(ShapeError, match="a slice of its own"):
        parareal(plant, torch.ones(2), (0, 1, 3))
    assert parareal(plant, torch.ones(2), (0, 1, 2, 3)).trajectory.states[-1].shape == (3,)


def test_the_critical_path_is_that_of_the_model_and_bounds_the_speed_up():
    system, x0 = residual_net(1.0, smooth=True), start()
    for iterations in (0, 1, 2):
        run = parareal(system, x0, K, iterations=iterations)
        m = DEPTH // K
        assert run.critical_path == K + m - 1 + iterations * (K + m)
        assert run.speedup_bound == DEPTH / run.critical_path


def test_float32_and_pairs_as_states_stay_what_they_are():
    def spin(s, x, u):
        q, p = x
        return p, -q

    system = ODESystem(spin, 8, 0.1)
    run = parareal(system, (torch.ones(2), torch.zeros(2)), 4, iterations=4)
    serial = rollout(system, (torch.ones(2), torch.zeros(2)))
    for a, b in zip(run.trajectory.states[-1], serial.states[-1], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b)


def test_what_makes_no_sense_is_refused_by_name():
    system, x0 = residual_net(1.0, smooth=True), start()
    for bad, words in (
        ({"slices": 33}, "slices is 33"),
        ({"slices": (0, 5, 3, 32)}, "must ascend"),
        ({"slices": 8, "iterations": -1}, "iterations is -1"),
        ({"slices": 8, "levels": 1}, "levels is 1"),
        ({"slices": 2, "levels": 4}, "nothing to coarsen"),
        ({"slices": 8, "relaxation": "C"}, "relaxation is 'C'"),
        ({"slices": 8, "initial": [x0]}, "initial has 1"),
        ({"slices": 8, "controls": [{}]}, "controls has 1"),
    ):
        with pytest.raises((ArgumentError, ShapeError), match=words):
            mgrit(system, x0, **bad)
    with pytest.raises(ArgumentError, match="slices is None"):
        parallel_adjoint(system, CallableCost(), rollout(system, x0))
    tokens = LinearSystem(torch.eye(1), torch.eye(1), horizon=1)
    run = rollout(tokens, torch.zeros(1))
    mixed = type(run)(states=((run.states[0], torch.zeros(1).long()), run.states[1]), controls=run.controls)
    with pytest.raises(UnsupportedError, match="without a derivative"):
        parallel_adjoint(tokens, CallableCost(), mixed, 1)
    assert coarse_jump(tokens)(0, 1, torch.ones(1)) == 1
