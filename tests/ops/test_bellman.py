"""The linear-quadratic sweep against the one large least-squares problem that it solves."""

import pytest
import torch
from pytest import approx
from torch.testing import assert_close

from bolza.ops.bellman import bellman_step, bellman_sweep, closed_loop
from bolza.ops.errors import ArgumentError, ShapeError
from bolza.ops.riccati import riccati_recursion

F64 = torch.float64


def random_problem(seed, sizes, inputs, columns=1, batch=()):
    """A convex problem with every term, whose state changes size from step to step."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*batch, *shape, dtype=F64, generator=g)

    parts = {name: [] for name in "A B Q R S q r c".split()}
    for n, following, m in zip(sizes, sizes[1:], inputs, strict=False):
        root = draw(n + m, n + m)
        joint = root @ root.mT + 0.1 * torch.eye(n + m, dtype=F64)
        blocks = joint[..., :n, :n], joint[..., n:, n:], joint[..., n:, :n]
        values = draw(following, n), draw(following, m), *blocks
        for name, value in zip("A B Q R S".split(), values, strict=True):
            parts[name].append(value)
        for name, size in (("q", n), ("r", m), ("c", following)):
            parts[name].append(draw(size, columns))
    root = draw(sizes[-1], sizes[-1])
    return parts, root @ root.mT, draw(sizes[-1], columns)


def total_cost(parts, P, p, x, controls, column=0):
    cost = torch.zeros((), dtype=F64)
    for t, u in enumerate(controls):
        A, B, Q, R, S = (parts[name][t] for name in "A B Q R S".split())
        q, r, c = (parts[name][t][:, column] for name in "q r c".split())
        cost = cost + x @ Q @ x / 2 + u @ S @ x + u @ R @ u / 2 + q @ x + r @ u
        x = A @ x + B @ u + c
    return cost + x @ P @ x / 2 + p[:, column] @ x


def joint_newton(parts, P, p, x0, inputs, column=0):
    """All controls at once: one Newton step on the whole quadratic."""

    def total(flat):
        return total_cost(parts, P, p, x0, torch.split(flat, inputs), column)

    zero = torch.zeros(sum(inputs), dtype=F64)
    return -torch.linalg.solve(torch.func.hessian(total)(zero), torch.func.grad(total)(zero))


def test_one_sweep_solves_a_chain_of_six_steps_to_rounding():
    sizes, inputs = [4] * 7, [3] * 6
    parts, P, p = random_problem(0, sizes, inputs)
    x0 = torch.randn(4, 1, dtype=F64)
    sweep = bellman_sweep(**parts, terminal=P, terminal_gradient=p)
    _, controls = closed_loop(parts["A"], parts["B"], sweep.K, sweep.k, x0, c=parts["c"])
    best = joint_newton(parts, P, p, x0[:, 0], inputs)
    # rounding of the dense solve itself is 1e-13 here
    assert_close(torch.cat(controls)[:, 0], best, rtol=0, atol=1e-12)


def test_sizes_may_change_from_step_to_step_and_columns_are_separate_problems():
    sizes, inputs = [2, 5, 3, 4], [1, 2, 3]
    parts, P, p = random_problem(1, sizes, inputs, columns=3)
    x0 = torch.randn(2, 3, dtype=F64)
    sweep = bellman_sweep(**parts, terminal=P, terminal_gradient=p)
    states, controls = closed_loop(parts["A"], parts["B"], sweep.K, sweep.k, x0, c=parts["c"])
    assert [tuple(x.shape) for x in states] == [(2, 3), (5, 3), (3, 3), (4, 3)]
    for column in range(3):
        best = joint_newton(parts, P, p, x0[:, column], inputs, column)
        assert_close(torch.cat(controls)[:, column], best, rtol=1e-9, atol=1e-10)


def test_the_value_it_returns_is_the_derivative_of_the_optimal_cost():
    sizes, inputs = [3] * 4, [2] * 3
    parts, P, p = random_problem(2, sizes, inputs)
    sweep = bellman_sweep(**parts, terminal=P, terminal_gradient=p)

    def optimal(x0):
        _, controls = closed_loop(parts["A"], parts["B"], sweep.K, sweep.k, x0[:, None], c=parts["c"])
        return total_cost(parts, P, p, x0, [u[:, 0] for u in controls])

    x0 = torch.randn(3, dtype=F64)
    assert_close(torch.func.grad(optimal)(x0), sweep.P[0] @ x0 + sweep.p[0][:, 0], rtol=1e-9, atol=1e-9)
    assert_close(torch.func.hessian(optimal)(x0), sweep.P[0], rtol=1e-9, atol=1e-9)


def test_without_linear_terms_it_is_the_riccati_recursion_with_the_other_sign():
    parts, P, _ = random_problem(3, [4] * 6, [2] * 5)
    A, B, Q, R = (parts[name] for name in "A B Q R".split())
    riccati, sweep = riccati_recursion(A, B, Q, R, P), bellman_sweep(A, B, Q, R, P)
    assert_close(torch.stack(sweep.K), -riccati.K, rtol=1e-12, atol=1e-12)
    assert_close(torch.stack(sweep.P), riccati.P, rtol=1e-12, atol=1e-12)
    assert not any(k.any() for k in sweep.k)


def test_the_predicted_change_is_the_change_along_a_step_of_any_length():
    parts, P, p = random_problem(4, [3] * 4, [2] * 3)
    del parts["c"]
    sweep = bellman_sweep(**parts, terminal=P, terminal_gradient=p)
    parts["c"] = [torch.zeros(3, 1, dtype=F64)] * 3
    nothing = total_cost(parts, P, p, torch.zeros(3, dtype=F64), [torch.zeros(2, dtype=F64)] * 3)
    for alpha in (1.0, 0.5, 0.1):
        k = [alpha * term for term in sweep.k]
        _, controls = closed_loop(parts["A"], parts["B"], sweep.K, k, torch.zeros(3, 1, dtype=F64))
        cost = total_cost(parts, P, p, torch.zeros(3, dtype=F64), [u[:, 0] for u in controls])
        expected = alpha * sweep.first + alpha**2 / 2 * sweep.second
        assert float(cost - nothing) == approx(float(expected), rel=1e-9)
    assert_close(sweep.second, -sweep.first)  # without regularisation, the step is Newton's


def test_with_a_regularisation_the_value_is_still_that_of_its_policy():
    parts, P, p = random_problem(5, [3] * 4, [2] * 3)
    sweep = bellman_sweep(**parts, terminal=P, terminal_gradient=p, regularization=0.7)

    def cost(x0):
        _, controls = closed_loop(parts["A"], parts["B"], sweep.K, sweep.k, x0[:, None], c=parts["c"])
        return total_cost(parts, P, p, x0, [u[:, 0] for u in controls])

    x0 = torch.randn(3, dtype=F64)
    assert_close(torch.func.grad(cost)(x0), sweep.P[0] @ x0 + sweep.p[0][:, 0], rtol=1e-9, atol=1e-9)
    plain = bellman_sweep(**parts, terminal=P, terminal_gradient=p)
    assert float(sweep.first) > float(plain.first)  # shorter steps promise less


def test_batches_are_solved_as_their_members_are_and_regularised_one_by_one():
    parts, P, p = random_problem(6, [3] * 4, [2] * 3, columns=2, batch=(4,))
    mu = torch.tensor([0.0, 0.1, 1.0, 10.0], dtype=F64)
    sweep = bellman_sweep(**parts, terminal=P, terminal_gradient=p, regularization=mu)
    assert sweep.first.shape == (4, 2) and sweep.definite.shape == (4,)
    for i in range(4):
        one = {name: [M[i] for M in stack] for name, stack in parts.items()}
        alone = bellman_sweep(**one, terminal=P[i], terminal_gradient=p[i], regularization=float(mu[i]))
        for t in range(3):
            assert_close(sweep.K[t][i], alone.K[t], rtol=1e-9, atol=1e-10)
            assert_close(sweep.k[t][i], alone.k[t], rtol=1e-9, atol=1e-10)


def test_members_that_are_not_definite_are_marked_and_leave_the_others_alone():
    one = torch.eye(1, dtype=F64)
    R = torch.stack([one, -3 * one])
    sweep = bellman_sweep(one, one, one, R, one, horizon=2, strict=False)
    assert sweep.definite.tolist() == [True, False]
    assert float(sweep.K[0][0]) == approx(-0.6) and not sweep.K[0][1].any()
    assert all(torch.isfinite(P).all() for P in sweep.P)
    with pytest.raises(ArgumentError, match="step 1 is not positive definite"):
        bellman_sweep(one, one, one, R, one, horizon=2)


def test_without_curvature_of_the_value_the_step_is_gradient_descent():
    """Q_ux = 0 and Q_uu = I/η: k = −η ∂J/∂u with p the costate, and no feedback."""
    A, B, p = torch.randn(3, 3, dtype=F64), torch.randn(3, 2, dtype=F64), torch.randn(3, 1, dtype=F64)
    zero, eye = torch.zeros(3, 3, dtype=F64), torch.eye(2, dtype=F64)
    step = bellman_step(A, B, zero, eye / 0.3, zero, p)
    assert_close(step.k, -0.3 * B.mT @ p)
    assert_close(step.p, A.mT @ p)  # the adjoint recursion
    assert not step.K.any()


def test_the_sweep_is_differentiable():
    parts, P, p = random_problem(7, [2] * 3, [1] * 2)

    def gains(A, r):
        sweep = bellman_sweep(**{**parts, "A": A, "r": [r, r]}, terminal=P, terminal_gradient=p)
        return sweep.K[0], sweep.k[0], sweep.P[0]

    A = parts["A"][0].clone().requires_grad_()
    assert torch.autograd.gradcheck(gains, (A, parts["r"][0].clone().requires_grad_()))


def test_single_precision_comes_back_and_one_step_is_the_sweep_of_one():
    one = torch.eye(2)
    sweep = bellman_sweep(one, one, one, one, one, horizon=1)
    assert sweep.P[0].dtype == sweep.k[0].dtype == torch.float32
    assert_close(bellman_step(one, one, one, one, one, torch.zeros(2, 1)).K.float(), sweep.K[0])


def test_what_does_not_fit_is_refused_by_name():
    one = torch.eye(2)
    with pytest.raises(ShapeError, match=r"S has shape \(2, 3\)"):
        bellman_sweep(one, one, one, one, one, S=torch.zeros(2, 3), horizon=1)
    with pytest.raises(ShapeError, match=r"r has shape \(2, 3\)"):
        bellman_sweep(one, one, one, one, one, q=torch.zeros(2, 1), r=torch.zeros(2, 3), horizon=1)
    with pytest.raises(ArgumentError, match="horizon is None"):
        bellman_sweep(one, one, one, one, one)
    with pytest.raises(ShapeError, match="'A': 2, 'horizon': 3"):
        bellman_sweep([one] * 2, one, one, one, one, horizon=3)
