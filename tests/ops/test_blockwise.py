"""L-BFGS in blocks."""

import pytest
import torch
from pytest import approx
from torch.testing import assert_close

from bolza.ops.blockwise import blockwise_lbfgs
from bolza.ops.errors import ArgumentError, ShapeError

F64 = torch.float64


def problem(functions, sizes, calls=None):
    """Value by block and gradient of a list of functions, one a block."""

    def evaluate(x):
        if calls is not None:
            calls.append(x.clone())
        x = x.detach().requires_grad_()
        values = torch.stack([f(part) for f, part in zip(functions, x.split(sizes), strict=True)])
        return values.detach(), torch.autograd.grad(values.sum(), x)[0]

    return evaluate


def rosenbrock(scale):
    return lambda x: (1 - x[0]) ** 2 + scale * (x[1] - x[0] ** 2) ** 2


def quadratic(seed, n=4):
    g = torch.Generator().manual_seed(seed)
    half = torch.randn(n, n, generator=g, dtype=F64)
    a, b = half @ half.mT + torch.eye(n, dtype=F64), torch.randn(n, generator=g, dtype=F64)
    return (lambda x: x @ a @ x / 2 - b @ x), torch.linalg.solve(a, b)


def test_quadratics_are_solved_each_to_its_own_minimum():
    pairs = [quadratic(seed) for seed in range(3)]
    evaluate = problem([f for f, _ in pairs], [4] * 3)
    found = blockwise_lbfgs(evaluate, torch.zeros(12, dtype=F64), [4] * 3, iterations=25, history=25)
    assert_close(found, torch.cat([x for _, x in pairs]), rtol=0, atol=1e-8)


@pytest.mark.parametrize("count", [2, 3])
def test_a_block_is_minimised_as_if_it_were_alone(count):
    scales = [1.0, 10.0, 100.0][:count]
    start = torch.full((2 * count,), -0.5, dtype=F64)
    together = blockwise_lbfgs(
        problem([rosenbrock(s) for s in scales], [2] * count), start, [2] * count, iterations=9
    )
    for scale, mine in zip(scales, together.split(2), strict=True):
        alone = blockwise_lbfgs(problem([rosenbrock(scale)], [2]), start[:2], [2], iterations=9)
        assert_close(mine, alone, rtol=1e-9, atol=1e-9)


def test_all_blocks_share_the_evaluations():
    calls = []
    blockwise_lbfgs(
        problem([rosenbrock(s) for s in (1.0, 3.0, 9.0)], [2] * 3, calls), torch.zeros(6, dtype=F64), [2] * 3
    )
    assert 11 <= len(calls) <= 25


def test_it_needs_as_many_iterations_as_the_solver_of_torch_on_one_block():
    x = torch.full((2,), -0.5, dtype=F64, requires_grad=True)
    solver = torch.optim.LBFGS([x], max_iter=25, history_size=10, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        value = rosenbrock(100.0)(x)
        value.backward()
        return value

    solver.step(closure)
    ours = blockwise_lbfgs(
        problem([rosenbrock(100.0)], [2]), torch.full((2,), -0.5, dtype=F64), [2], iterations=40
    )
    assert float(rosenbrock(100.0)(ours)) <= float(rosenbrock(100.0)(x.detach())) + 1e-10


def test_no_block_gets_worse_even_where_a_function_is_not_finite_or_has_a_wrong_gradient():
    def wall(x):
        return torch.where(x[0] > 0.5, torch.full((), torch.nan, dtype=F64), -x[0])

    def wrong(x):
        return x[0] * 0 + (x[0].detach() - x[0]) * 3 + x[0].detach()  # says −3 where the slope is +1

    start = torch.zeros(2, dtype=F64)
    found = blockwise_lbfgs(problem([wall, wrong], [1, 1]), start, [1, 1])
    assert 0.2 < float(found[0]) <= 0.5 and float(found[1]) == 0.0
    assert start.tolist() == [0.0, 0.0]


def test_a_known_beginning_saves_an_evaluation():
    f, solution = quadratic(0)
    calls = []
    evaluate = problem([f], [4], calls)
    start = torch.zeros(4, dtype=F64)
    begin = evaluate(start)
    calls.clear()
    found = blockwise_lbfgs(evaluate, start, [4], iterations=20, history=20, begin=begin)
    assert not any(torch.equal(x, start) for x in calls)
    assert found.tolist() == approx(solution.tolist(), abs=1e-6)


def test_bad_arguments_are_refused():
    evaluate = problem([rosenbrock(1.0)], [2])
    with pytest.raises(ArgumentError, match="both must be positive"):
        blockwise_lbfgs(evaluate, torch.zeros(2), [2], iterations=0)
    with pytest.raises(ShapeError, match="add up"):
        blockwise_lbfgs(evaluate, torch.zeros(2), [3])
