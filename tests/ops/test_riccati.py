from math import sqrt

import pytest
import torch
from pytest import approx
from scipy.linalg import solve_discrete_are
from torch.testing import assert_close

from bolza.ops.errors import ArgumentError, DivergenceError, ShapeError
from bolza.ops.riccati import riccati_recursion, stationary_riccati

F64 = torch.float64
ONE = torch.eye(1, dtype=F64)


def random_plant(seed, batch=(), n=4, m=2):
    g = torch.Generator().manual_seed(seed)
    A, root = (torch.randn(*batch, n, n, dtype=F64, generator=g) for _ in range(2))
    B, weight = (torch.randn(*batch, n, m, dtype=F64, generator=g) for _ in range(2))
    return A, B, root @ root.mT, weight.mT @ weight + 0.1 * torch.eye(m, dtype=F64)


def test_the_scalar_problem_has_its_known_gains():
    """x′ = x + u with unit weights over five steps: gains are ratios of Fibonacci numbers."""
    solution = riccati_recursion(ONE, ONE, ONE, ONE, ONE, horizon=5)
    assert solution.K.flatten().tolist() == approx([55 / 89, 21 / 34, 8 / 13, 3 / 5, 1 / 2], rel=1e-14)
    assert solution.K.flatten().tolist() == approx([0.6179775, 0.6176471, 0.6153846, 0.6, 0.5], abs=0.51e-7)
    assert float(solution.P[0]) == approx(1.6179775, abs=0.51e-7) and float(solution.P[-1]) == 1


def test_the_scalar_problem_of_infinite_horizon_is_the_golden_ratio():
    solution = stationary_riccati(ONE, ONE, ONE, ONE)
    assert float(solution.P) == approx((1 + sqrt(5)) / 2, rel=1e-15)
    assert float(solution.K) == approx((sqrt(5) - 1) / 2, rel=1e-15)


def test_the_finite_problem_is_one_large_least_squares():
    """The obvious way: stack all controls, minimise the quadratic, compare the cost and the first control."""
    A, B, Q, R = random_plant(0)
    steps, n, m = 5, 4, 2
    x0 = torch.randn(n, dtype=F64)

    def total(flat):
        x, cost = x0, torch.zeros((), dtype=F64)
        for u in flat.reshape(steps, m):
            cost = cost + (x @ Q @ x + u @ R @ u) / 2
            x = A @ x + B @ u
        return cost + x @ Q @ x

    zero = torch.zeros(steps * m, dtype=F64)
    best = -torch.linalg.solve(torch.func.hessian(total)(zero), torch.func.grad(total)(zero))
    solution = riccati_recursion(A, B, Q, R, 2 * Q, horizon=steps)
    assert_close(-solution.K[0] @ x0, best[:m], rtol=1e-9, atol=1e-9)
    assert float(x0 @ solution.P[0] @ x0 / 2) == approx(float(total(best)), rel=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_the_stationary_value_is_that_of_scipy(seed):
    plant = random_plant(seed)
    solution = stationary_riccati(*plant)
    assert_close(
        solution.P, torch.from_numpy(solve_discrete_are(*(M.numpy() for M in plant))), rtol=1e-9, atol=1e-9
    )
    assert torch.linalg.eigvals(plant[0] - plant[1] @ solution.K).abs().max() < 1


def test_the_finite_recursion_tends_to_the_stationary_one():
    A, B, Q, R = random_plant(1)
    finite, stationary = riccati_recursion(A, B, Q, R, Q, horizon=60), stationary_riccati(A, B, Q, R)
    assert_close(finite.P[0], stationary.P, rtol=1e-10, atol=1e-10)
    assert_close(finite.K[0], stationary.K, rtol=1e-10, atol=1e-10)


def test_doubling_also_settles_near_the_limit_of_stability():
    """a = 1, b² = ε: P² ε = P ε + 1, though the loop settles in 1/√ε steps."""
    eps = 1e-10
    solution = stationary_riccati(ONE, sqrt(eps) * ONE, ONE, ONE)
    assert float(solution.P) == approx((1 + sqrt(1 + 4 / eps)) / 2, rel=1e-10)


def test_batches_are_solved_as_their_members_are():
    A, B, Q, R = random_plant(2, batch=(3, 2))
    finite, stationary = riccati_recursion(A, B, Q, R, Q, horizon=4), stationary_riccati(A, B, Q, R)
    assert finite.P.shape == (5, 3, 2, 4, 4) and finite.K.shape == (4, 3, 2, 2, 4)
    member = A[1, 0], B[1, 0], Q[1, 0], R[1, 0]
    assert_close(finite.P[:, 1, 0], riccati_recursion(*member, Q[1, 0], horizon=4).P, rtol=1e-10, atol=1e-10)
    assert_close(stationary.P[1, 0], stationary_riccati(*member).P, rtol=1e-9, atol=1e-9)


def test_a_batch_of_plants_shares_its_weights_by_broadcasting():
    A, B, _, _ = random_plant(3, batch=(3,))
    Q, R = torch.eye(4, dtype=F64), torch.eye(2, dtype=F64)
    finite, stationary = riccati_recursion(A, B[0], Q, R, Q, horizon=2), stationary_riccati(A, B[0], Q, R)
    assert finite.P.shape == (3, 3, 4, 4) and stationary.P.shape == (3, 4, 4)
    assert_close(finite.P[0, 2], riccati_recursion(A[2], B[0], Q, R, Q, horizon=2).P[0])
    assert_close(stationary.K[2], stationary_riccati(A[2], B[0], Q, R).K)


def test_matrices_may_change_from_step_to_step():
    A, B, Q, R = random_plant(4)
    scales = [1.0, 0.5, 2.0]
    varying = riccati_recursion([s * A for s in scales], B, [s * Q for s in scales], R, Q)
    last = riccati_recursion(2 * A, B, 2 * Q, R, Q, horizon=1)
    middle = riccati_recursion(0.5 * A, B, 0.5 * Q, R, last.P[0], horizon=1)
    assert_close(varying.P[1:3], torch.stack([middle.P[0], last.P[0]]))


def test_the_recursion_is_differentiable():
    a = torch.tensor([[1.1]], dtype=F64, requires_grad=True)

    def value(a):
        return riccati_recursion(a, ONE, ONE, ONE, ONE, horizon=3).P[0].sum()

    assert torch.autograd.gradcheck(value, a)


def test_single_precision_is_solved_in_double_and_given_back():
    A, B, Q, R = random_plant(5)
    single = [M.float() for M in (A, B, Q, R)]
    solution = stationary_riccati(*single)
    assert solution.P.dtype == solution.K.dtype == torch.float32
    exact = stationary_riccati(*(M.double() for M in single)).P
    assert torch.equal(solution.P, exact.float())
    assert riccati_recursion(*single, single[2], horizon=1).P.dtype == torch.float32


def test_what_cannot_be_stabilised_is_an_error():
    with pytest.raises(DivergenceError, match="add an input"):
        stationary_riccati(2 * ONE, 0 * ONE, ONE, ONE)
    with pytest.raises(DivergenceError, match="not finite"):
        stationary_riccati(ONE, 0 * ONE, ONE, ONE, max_doublings=5)


def test_a_free_control_is_refused():
    with pytest.raises(ArgumentError, match="R is not positive definite"):
        stationary_riccati(ONE, ONE, ONE, 0 * ONE)
    with pytest.raises(ArgumentError, match="at step 1 is not positive definite"):
        riccati_recursion(ONE, ONE, ONE, -2 * ONE, ONE, horizon=2)


def test_shapes_and_lengths_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ArgumentError, match="horizon is None"):
        riccati_recursion(ONE, ONE, ONE, ONE, ONE)
    with pytest.raises(ArgumentError, match="horizon is 0"):
        riccati_recursion(ONE, ONE, ONE, ONE, ONE, horizon=0)
    with pytest.raises(ShapeError, match="'A': 2, 'horizon': 3"):
        riccati_recursion([ONE] * 2, ONE, ONE, ONE, ONE, horizon=3)
    with pytest.raises(ShapeError, match=r"Q has shape \(2, 2\)"):
        stationary_riccati(ONE, ONE, torch.eye(2), ONE)


def test_whole_numbers_are_solved_in_fractions_and_a_cost_counts_by_its_symmetric_part():
    one = torch.ones(1, 1, dtype=torch.long)
    assert riccati_recursion(one, one, one, one, one, horizon=2).K.flatten().tolist() == approx([0.6, 0.5])
    assert stationary_riccati(one, one, one, one).P.item() == approx(1.618034)
    A, I = torch.tensor([[1.0, 0.2], [0.0, 0.9]]).double(), torch.eye(2).double()  # noqa: E741
    skew = torch.tensor([[0.0, 0.5], [-0.5, 0.0]]).double()
    assert_close(stationary_riccati(A, I, I + skew, I + skew).P, stationary_riccati(A, I, I, I).P)
    found, wanted = (riccati_recursion(A, I, I, I, last, horizon=2).P[0] for last in (I + skew, I))
    assert_close(found, wanted)


def test_vectors_in_place_of_matrices_are_refused_by_name():
    one = torch.eye(1)
    with pytest.raises(ShapeError, match="must be matrices"):
        riccati_recursion(one[0], one, one, one, one, horizon=2)
