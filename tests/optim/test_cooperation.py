"""Joint steps of cooperating players."""

import itertools

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError, ShapeError
from bolza.optim.cooperation import KroneckerGame, damped_blocks, fork, join, joint_step


def draw(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=draw(seed), dtype=torch.float64)


def split(matrix, sizes):
    return [list(row.split(sizes, 1)) for row in matrix.split(sizes, 0)]


def positive(n, seed):
    root = normal(n, n + 3, seed=seed)
    return root @ root.T / n


# ----------------------------------------------------------------------------- dense block elimination


@pytest.mark.parametrize("sizes", [[4], [3, 2], [2, 3, 4]])
def test_block_elimination_equals_the_joint_solve(sizes):
    matrix, right = positive(sum(sizes), 1), normal(sum(sizes), 5, seed=2)
    found = joint_step(split(matrix, sizes), list(right.split(sizes)))
    assert torch.allclose(torch.cat(found), -torch.linalg.solve(matrix, right), rtol=0, atol=1e-12)


def test_the_first_player_s_gain_is_that_of_its_schur_complement():
    matrix, right = positive(5, 3), normal(5, seed=4)
    (uu, uv), (vu, vv) = split(matrix, [3, 2])
    schur = uu - uv @ torch.linalg.solve(vv, vu)
    step = -torch.linalg.solve(schur, right[:3] - uv @ torch.linalg.solve(vv, right[3:]))
    found = joint_step([[uu, uv], [vu, vv]], [right[:3], right[3:]])[0]
    assert found.shape == (3,)
    assert torch.allclose(found, step, rtol=0, atol=1e-12)


def test_cooperation_lowers_the_joint_model_at_least_as_much_as_players_alone():
    def model(step):
        return right @ step + 0.5 * step @ matrix @ step

    for seed in range(10):
        matrix, right = positive(6, seed), normal(6, seed=seed + 100)
        blocks = split(matrix, [3, 3])
        joint = torch.cat(joint_step(blocks, list(right.split(3))))
        alone = -torch.cat([torch.linalg.solve(blocks[i][i], right.split(3)[i]) for i in (0, 1)])
        assert model(joint) < model(alone) - 1e-6
        best = float(-0.5 * right @ torch.linalg.solve(matrix, right))
        assert float(model(joint)) == pytest.approx(best, rel=1e-10)


def test_the_joint_step_does_not_depend_on_the_order_of_the_players():
    sizes, matrix, right = [2, 3, 4], positive(9, 5), normal(9, seed=6)
    blocks, rights = split(matrix, sizes), list(right.split(sizes))
    expected = joint_step(blocks, rights)
    for order in itertools.permutations(range(3)):
        found = joint_step([[blocks[i][j] for j in order] for i in order], [rights[i] for i in order])
        for i, step in zip(order, found, strict=True):
            assert torch.allclose(step, expected[i], rtol=0, atol=1e-12)


def test_a_missing_block_is_named():
    with pytest.raises(ShapeError, match="2 players"):
        joint_step([[torch.eye(1)]], [torch.ones(1), torch.ones(1)])


# ----------------------------------------------------------------------------- fork and join


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.f, self.g = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, x):
        return torch.tanh(self.f(x)) + self.g(x)


def test_values_through_forks_and_joins_are_the_gradients_of_autograd():
    torch.manual_seed(0)
    blocks = nn.ModuleList(Residual(4) for _ in range(3)).double()
    x = normal(1, 4, seed=1).requires_grad_()
    states = [x]
    for block in blocks:
        states.append(block(states[-1]))
    loss = 0.5 * states[-1].square().sum()
    gradients = torch.autograd.grad(loss, [x, *blocks.parameters()])
    value, found = states[-1].detach()[0], []
    for block, state in zip(reversed(blocks), reversed(states[:-1]), strict=True):
        slope = torch.diag((1 - torch.tanh(block.f(state)) ** 2)[0].detach())
        weight = torch.einsum("ij,k->ijk", slope, state.detach()[0]).flatten(1)
        skip = torch.einsum("ij,k->ijk", torch.eye(4).double(), state.detach()[0]).flatten(1)
        jacobians = [slope @ block.f.weight.detach(), block.g.weight.detach(), weight, slope, skip]
        (q_x, q_r, q_u, q_b, q_v), _ = join(value, None, jacobians)
        value, _ = fork([q_x, q_r])
        found = [q_u, q_b, q_v, *found]
    assert torch.allclose(value, gradients[0][0], rtol=0, atol=1e-12)
    for got, want in zip(found, gradients[1:], strict=True):
        assert torch.allclose(got, want.flatten(), rtol=0, atol=1e-12)


def test_second_order_terms_of_a_residual_block_are_those_of_the_whole_map():
    f_x, g_x, f_u, g_v = (normal(3, n, seed=n) for n in (3, 3, 4, 2))
    g_x = g_x + f_x  # not the same draw
    value, hessian = normal(3, seed=7), positive(3, 8)
    q, qq = join(value, hessian, [f_x, g_x, f_u, g_v])
    v, vv = fork(q[:2], [row[:2] for row in qq[:2]])
    whole = f_x + g_x
    assert torch.allclose(v, whole.T @ value, rtol=0, atol=1e-12)
    assert torch.allclose(vv, whole.T @ hessian @ whole, rtol=0, atol=1e-12)
    assert torch.allclose(qq[2][3], f_u.T @ hessian @ g_v, rtol=0, atol=1e-12)


def test_one_game_sweep_solves_a_linear_quadratic_residual_block():
    """x⁺ = (1 + A_1)(x + B_0 u_0) + B_1 u_1 + C v with quadratic costs: one sweep is the joint minimum."""
    n, m = 3, 2
    a0, b0, a1, b1, c = (normal(n, k, seed=s) for s, k in enumerate((n, m, n, m, m)))
    target, x0 = normal(n, seed=9), normal(n, seed=10)

    def output(u):
        h = a0 @ x0 + b0 @ u[:m]
        return a1 @ h + b1 @ u[m : 2 * m] + x0 + c @ u[2 * m :]

    def cost(u):
        return 0.5 * (output(u) - target).square().sum() + 0.05 * u.square().sum()

    u = torch.zeros(3 * m, dtype=torch.float64)
    hessian = torch.func.hessian(cost)(u)
    expected = -torch.linalg.solve(hessian, torch.func.grad(cost)(u))
    # join: players u_1 and v, state (h, x_r)
    eye = torch.eye(n, dtype=torch.float64)
    value = output(u) - target
    q, qq = join(value, eye, [a1, eye, b1, c])
    small = 0.1 * torch.eye(m, dtype=torch.float64)
    blocks = [[qq[2 + i][2 + j] + (small if i == j else 0) for j in (0, 1)] for i in (0, 1)]
    right = [torch.cat([q[2 + i][:, None], qq[2 + i][0], qq[2 + i][1]], 1) for i in (0, 1)]
    steps = joint_step(blocks, right)  # k and K for δh, δx_r
    # value at (h, x_r) and then the step of u_0
    kh = torch.cat([s[:, 1 : 1 + n] for s in steps])
    k0 = torch.cat([s[:, 0] for s in steps])
    cross = torch.cat([qq[2][0], qq[3][0]])
    v_h, v_hh = q[0] + cross.T @ k0, qq[0][0] + cross.T @ kh
    du0 = -torch.linalg.solve(b0.T @ v_hh @ b0 + small, b0.T @ v_h)
    dh = b0 @ du0
    du1, dv = (s[:, 0] + s[:, 1 : 1 + n] @ dh for s in steps)
    assert torch.allclose(torch.cat([du0, du1, dv]), expected, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------- Kronecker form


def covariances(sizes, seed, samples=50):
    x = normal(samples, sum(sizes), seed=seed)
    return split(x.T @ x / samples, sizes)


def dense(inputs, signals):
    """The joint matrix for row-major flattened weights: Q_uv = B_uv ⊗ A_uv."""
    n = range(len(inputs))
    return torch.cat([torch.cat([torch.kron(signals[u][v], inputs[u][v]) for v in n], 1) for u in n])


@pytest.mark.parametrize("players", [1, 2, 3, 4])
def test_the_kronecker_solve_equals_the_dense_joint_solve(players):
    wide, tall = [3, 2, 4, 2][:players], [2, 3, 2, 4][:players]
    blocks = damped_blocks(covariances(wide, 1), covariances(tall, 2), 1e-2)
    right = [normal(o, i, seed=o * i) for o, i in zip(tall, wide, strict=True)]
    game = KroneckerGame(*blocks, iterations=60, tolerance=1e-13)
    flat = torch.linalg.solve(dense(*blocks), torch.cat([r.flatten() for r in right]))
    found = game.solve(right)
    assert torch.allclose(torch.cat([g.flatten() for g in found]), flat, rtol=0, atol=1e-10)
    for product, r in zip(game.product(found), right, strict=True):
        assert torch.allclose(product, r, rtol=0, atol=1e-10)


def test_the_cooperative_step_of_two_linear_branches_is_newton_s_on_the_concatenated_weights():
    """½ mean |M₁ W₁ x + M₂ W₂ x − y|²: both branches read the same input, the mixing couples them."""
    x, y = normal(40, 3, seed=1), normal(40, 6, seed=2)
    mixing = [normal(6, 2, seed=3), normal(6, 3, seed=4)]
    weights = [normal(2, 3, seed=5), normal(3, 3, seed=6)]

    def loss(*w):
        out = sum(x @ a.T @ m.T for a, m in zip(w, mixing, strict=True))
        return 0.5 * (out - y).square().sum(1).mean()

    gradients = torch.func.grad(loss, argnums=(0, 1))(*weights)
    covariance = x.T @ x / len(x)
    signals = [[a.T @ b for b in mixing] for a in mixing]
    game = KroneckerGame([[covariance] * 2] * 2, signals)
    moved = [w - g for w, g in zip(weights, game.solve(gradients), strict=True)]

    def whole(vector):
        return loss(vector[:6].reshape(2, 3), vector[6:].reshape(3, 3))

    start = torch.cat([w.flatten() for w in weights])
    newton = start - torch.linalg.solve(torch.func.hessian(whole)(start), torch.func.grad(whole)(start))
    assert torch.allclose(torch.cat([w.flatten() for w in moved]), newton, rtol=0, atol=1e-10)
    assert max(float(g.abs().max()) for g in torch.func.grad(loss, argnums=(0, 1))(*moved)) < 1e-12


@pytest.mark.parametrize("schur", ["exact", "factored"])
def test_relabelling_two_players_leaves_their_steps_as_they_were(schur):
    inputs, signals = damped_blocks(covariances([3, 2], 1), covariances([2, 3], 2), 1e-2)
    right = [normal(2, 3, seed=3), normal(3, 2, seed=4)]
    one = KroneckerGame(inputs, signals, schur=schur).solve(right)
    turned = [[block[i][j] for j in (1, 0)] for block in (inputs, signals) for i in (1, 0)]
    two = KroneckerGame(turned[:2], turned[2:], schur=schur).solve(right[::-1])
    for a, b in zip(one, reversed(two), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-11)


def test_the_factored_schur_complement_blows_up_where_the_players_read_the_same_input():
    x, g = normal(60, 3, seed=1), normal(60, 4, seed=2)
    inputs = [[x.T @ x / 60] * 2] * 2
    blocks = damped_blocks(inputs, split(g.T @ g / 60, [2, 2]), 1e-6)
    right = [normal(2, 3, seed=3), normal(2, 3, seed=4)]
    size = {s: KroneckerGame(*blocks, schur=s).solve(right)[0].norm() for s in ("exact", "factored")}
    assert size["factored"] > 100 * size["exact"]


def test_without_cross_blocks_players_act_alone():
    inputs, signals = damped_blocks(covariances([3, 2], 1), covariances([2, 3], 2), 1e-2)
    for block in (inputs, signals):
        block[0][1], block[1][0] = torch.zeros_like(block[0][1]), torch.zeros_like(block[1][0])
    right = [normal(2, 3, seed=3), normal(3, 2, seed=4)]
    game = KroneckerGame(inputs, signals)
    for a, b in zip(game.solve(right), game.alone(right), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_damping_is_balanced_between_the_factors_and_multiplies_to_lambda():
    inputs, signals = [[4.0 * torch.eye(3)]], [[torch.eye(2)]]
    a, b = damped_blocks(inputs, signals, 0.01)
    added = a[0][0] - inputs[0][0], b[0][0] - signals[0][0]
    assert torch.allclose(added[0][0, 0] * added[1][0, 0], torch.tensor(0.01))
    assert torch.allclose(added[0][0, 0] / added[1][0, 0], torch.tensor(4.0))


def test_unknown_forms_are_refused():
    one = [[torch.eye(1)]]
    with pytest.raises(ArgumentError, match="schur is 'other'"):
        KroneckerGame(one, one, schur="other")
    three = [[torch.eye(1)] * 3] * 3
    with pytest.raises(ArgumentError, match="there are 3"):
        KroneckerGame(three, three, schur="factored")
