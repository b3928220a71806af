import pytest
import torch
from pytest import approx
from torch.testing import assert_close

from bolza.core import Cost, System, adjoint, linearize, rollout
from bolza.core.errors import ArgumentError, ShapeError
from bolza.ops.riccati import riccati_recursion
from bolza.systems import LinearSystem, QuadraticCost

F64 = torch.float64
ONE = torch.eye(1, dtype=F64)


def matrices(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_it_is_a_system_with_a_cost():
    assert isinstance(LinearSystem(ONE, ONE, 2), System) and isinstance(QuadraticCost(ONE, ONE), Cost)


def test_without_control_the_state_is_a_power_of_a():
    A = matrices(3, 3)
    x = matrices(5, 3, seed=1)
    run = rollout(LinearSystem(A, matrices(3, 2), horizon=4), x)
    assert_close(run.states[-1], x @ torch.linalg.matrix_power(A, 4).T)
    assert [u.tolist() for u in run.controls] == [[0, 0]] * 4


def test_one_control_drives_all_samples_or_each_its_own():
    system = LinearSystem(matrices(3, 3), matrices(3, 2, seed=1), horizon=1)
    x, u = matrices(5, 3, seed=2), matrices(5, 2, seed=3)
    each = system.step(0, x, u)
    assert_close(each[4], system.step(0, x[4], u[4]))
    assert_close(system.step(0, x, u[0])[4], system.step(0, x[4], u[0]))


def test_plants_may_be_batched_like_their_states():
    A, B = matrices(5, 3, 3), matrices(5, 3, 2, seed=1)
    system = LinearSystem(A, B, horizon=2)
    x, u = matrices(5, 3, seed=2), matrices(5, 2, seed=3)
    single = LinearSystem(A[3], B[3], horizon=2)
    assert_close(system.step(0, x, u)[3], single.step(0, x[3], u[3]))
    assert [u.shape for u in system.controls] == [(2,), (2,)]
    assert_close(system.step(0, x, u[0])[3], single.step(0, x[3], u[0]))


def test_matrices_and_even_sizes_may_change_from_step_to_step():
    A, B = [matrices(2, 3), matrices(4, 2, seed=1)], [matrices(2, 1, seed=2), matrices(4, 3, seed=3)]
    system = LinearSystem(A, B)
    assert system.horizon == 2 and [u.shape for u in system.controls] == [(1,), (3,)]
    x = matrices(3, seed=4)
    run = rollout(system, x)
    assert_close(run.states[-1], A[1] @ A[0] @ x)
    a, b = linearize(system, 1, run.states[1]).matrices()
    assert_close(a, A[1])
    assert_close(b, B[1])
    mixed = LinearSystem(torch.eye(2), [torch.ones(2, 1), torch.zeros(2, 1)])
    assert mixed.horizon == 2


def test_the_scalar_problem_has_the_cost_that_riccati_gives():
    """x′ = x + u, ½Σ(x² + u²) + ½x₅²: J* = ½·1.6179775·x₀²."""
    system, cost = LinearSystem(ONE, ONE, horizon=5), QuadraticCost(ONE, ONE)
    x, controls = torch.full((1,), 3.0, dtype=F64), []
    state = x
    for K in riccati_recursion(ONE, ONE, ONE, ONE, ONE, horizon=5).K:
        controls.append(-K @ state)
        state = state + controls[-1]
    solved = adjoint(system, cost, rollout(system, x, controls))
    assert float(solved.value) == approx(4.5 * 1.6179775, abs=5e-7)


def test_the_cost_is_averaged_over_samples_and_a_shared_control_counts_once():
    Q, R = torch.diag(torch.tensor([1.0, 3.0], dtype=F64)), 2 * ONE
    x, shared, own = matrices(4, 2), matrices(1, seed=1), matrices(4, 1, seed=2)
    forms = x[:, 0] ** 2 / 2 + 3 * x[:, 1] ** 2 / 2
    mean, total = QuadraticCost(Q, R), QuadraticCost(Q, R, reduction="sum")
    assert_close(mean.terminal(x), forms.mean())
    assert_close(total.terminal(x), forms.sum())
    assert_close(mean.running(0, x, shared), forms.mean() + shared[0] ** 2)
    assert_close(mean.running(0, x, own), forms.mean() + (own**2).mean())
    assert_close(total.running(0, x, own), forms.sum() + (own**2).sum())


def test_weights_may_change_from_step_to_step():
    cost = QuadraticCost([ONE, 4 * ONE], [ONE, 9 * ONE], Q_T=2 * ONE)
    one = torch.ones(1, dtype=F64)
    assert [float(cost.running(t, one, one)) for t in (0, 1)] == [1.0, 6.5]
    assert float(cost.terminal(one)) == 1


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(ArgumentError, match="horizon is None"):
        LinearSystem(ONE, ONE)
    with pytest.raises(ArgumentError, match="horizon is 0"):
        LinearSystem(ONE, ONE, horizon=0)
    with pytest.raises(ShapeError, match="'A': 2, 'controls': 1"):
        LinearSystem([ONE] * 2, ONE, controls=[torch.zeros(1)])
    with pytest.raises(ShapeError, match=r"in step 0 A has shape \(1, 1\) and B \(2, 1\)"):
        LinearSystem(ONE, matrices(2, 1), horizon=1)
    with pytest.raises(ShapeError, match="in step 1"):
        LinearSystem([matrices(2, 3), matrices(2, 3)], matrices(2, 1))
    with pytest.raises(ArgumentError, match="reduction is 'none'"):
        QuadraticCost(ONE, ONE, reduction="none")
    with pytest.raises(ArgumentError, match="Q_T is None"):
        QuadraticCost([ONE], ONE)
