"""Two players as a stochastic equation: closed forms of linear games, and networks against autograd."""

import math

import pytest
import torch
from torch import nn

from bolza.core import simulate
from bolza.core.errors import ArgumentError, DataError, ShapeError, UnsupportedError
from bolza.sde import (
    Game,
    game_fluctuation_dissipation,
    game_sde,
    game_stability,
    game_step,
    linear_game,
    network_game,
)
from bolza.studies.cao2020_gan import order_slopes

F64 = torch.float64
BILINEAR = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)
DAMPED = torch.tensor([[-0.5, -1.0], [1.0, -0.8]], dtype=F64)
MODES = ("simultaneous", "alternating")


def linear(matrix, split=1, noise=0.0):
    return Game(lambda z: z @ matrix.T, split, noise=noise)


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# -------------------------------------------------------------------------------------- linear games


def test_both_at_once_grow_by_one_plus_lr_squared_and_in_turns_they_circle():
    z = seeded(2)
    for eta in (0.1, 0.5, 1.5):
        at_once = game_step(linear(BILINEAR), z, eta)
        assert float(at_once.square().sum() / z.square().sum()) == pytest.approx(1 + eta**2, abs=1e-12)
        turns = linear_game(BILINEAR, 0.0, lr=eta, split=1, mode="alternating")
        assert turns.radius == pytest.approx(1.0, abs=1e-12) and turns.covariance is None
        assert float(turns.step.det()) == pytest.approx(1.0, abs=1e-12)
    assert linear_game(BILINEAR, 0.0, lr=2.1, split=1, mode="alternating").radius > 1.5


def test_the_noise_floor_of_a_damped_game_has_its_known_variances():
    found = linear_game(DAMPED, 0.09, lr=0.1, split=1)
    assert found.covariance.diagonal().tolist() == pytest.approx([0.008364, 0.007403], abs=1e-6)
    assert found.sde_covariance[1].diagonal().tolist() == pytest.approx([0.007516, 0.006552], abs=1e-6)
    assert found.sde_covariance[2].diagonal().tolist() == pytest.approx([0.007836, 0.006875], abs=1e-6)
    assert float((DAMPED @ found.sde_covariance[1]).trace()) == pytest.approx(-0.0090, abs=1e-12)
    for mode in MODES:
        work, heat = linear_game(DAMPED, 0.09, lr=0.3, split=1, mode=mode).relation
        assert work == pytest.approx(heat, abs=1e-14)


def test_one_alternating_step_is_the_flow_of_the_equation_of_order_two():
    eye = torch.eye(2, dtype=F64)
    for order, bound in ((1, 1e-2), (2, 1e-3)):
        drift = game_sde(linear(DAMPED), lr=0.1, order=order, mode="alternating").drift(0.0, eye).T
        step = linear_game(DAMPED, 0.0, lr=0.1, split=1, mode="alternating").step
        gap = float((step - torch.linalg.matrix_exp(0.1 * drift)).norm())
        assert bound / 20 < gap < bound


@pytest.mark.parametrize("mode", MODES)
def test_the_weak_orders_are_one_and_two(mode):
    slopes = order_slopes(mode)
    assert slopes[1] == pytest.approx(1, abs=0.15) and slopes[2] == pytest.approx(2, abs=0.15)


def test_the_drift_of_a_nonlinear_game_is_that_of_its_derivatives():
    def field(z):
        a, b = z[..., :2], z[..., 2:]
        return torch.cat([-torch.sin(a) * b.square(), a.sum(-1, keepdim=True) - b**3], -1)

    z, eta = seeded(5, 3), 0.2
    b = field(z)
    jacobian = torch.func.vmap(torch.func.jacrev(field))(z)
    for mode in MODES:
        wanted = b - eta / 2 * (jacobian @ b[..., None])[..., 0]
        if mode == "alternating":
            wanted[:, :2] += eta * (jacobian[:, :2, 2:] @ b[:, 2:, None])[..., 0]
        equation = game_sde(Game(field, 2, noise=0.04), lr=eta, mode=mode, order=2, batch_size=4)
        torch.testing.assert_close(equation.drift(0.0, z), wanted)
        xi = seeded(5, 3, seed=1)
        noise = math.sqrt(eta / 4) * 0.2 * xi
        if mode == "alternating":
            noise[:, :2] += eta * (jacobian[:, :2, 2:] @ noise[:, 2:, None])[..., 0]
        torch.testing.assert_close(equation.factor(0.0, z, xi), noise)


def test_simulated_steps_and_paths_have_the_variance_of_their_own_law():
    paths, eta = 4000, 0.1
    covariance = torch.tensor([[0.09, 0.02], [0.02, 0.05]], dtype=F64)
    game = linear(DAMPED, noise=covariance)
    exact = linear_game(DAMPED, covariance, lr=eta, split=1)
    root, z = torch.linalg.cholesky(covariance), torch.zeros(paths, 2, dtype=F64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        z = game_step(game, z, eta, noise=torch.randn(paths, 2, generator=generator, dtype=F64) @ root.T)
    equation = game_sde(game, lr=eta)
    path = simulate(equation, torch.zeros(paths, 2, dtype=F64), dt=eta, steps=120, generator=generator)[-1]
    for end in (z, path):  # Euler steps of length η of the equation of order 1 are the steps themselves
        error = end.square().std(0) / paths**0.5
        assert bool(((end.square().mean(0) - exact.covariance.diagonal()).abs() < 4 * error).all())


def test_the_relation_holds_at_rest_and_not_on_the_way():
    eta, game = 0.1, linear(DAMPED)
    for mode in MODES:
        generator, z = torch.Generator().manual_seed(1), [torch.full((200, 2), 2.0, dtype=F64)]
        for _ in range(400):
            noise = 0.3 * torch.randn(200, 2, generator=generator, dtype=F64)
            z.append(game_step(game, z[-1], eta, mode, noise))
        states = torch.stack(z)
        rest = game_fluctuation_dissipation(game, states[150:], lr=eta, mode=mode)
        assert abs(rest.z) < 4 and rest.heat == pytest.approx(rest.work, rel=0.1)
        centre = torch.zeros(2, dtype=F64)
        assert game_fluctuation_dissipation(game, states[:41], lr=eta, mode=mode, centre=centre).z < -3


# ------------------------------------------------------------------------------------------ stability


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("momentum", "size"), [(0.0, 6), (0.5, 6), (-0.3, 6), (0.0, 70), (0.5, 40)])
def test_the_radius_is_that_of_the_dense_jacobian(mode, momentum, size):
    matrix = seeded(size, size) / size**0.5 - torch.eye(size, dtype=F64)
    n, eta = size // 3, 0.4
    found = game_stability(
        linear(matrix, n), torch.zeros(size, dtype=F64), lr=eta, mode=mode, momentum=momentum
    )
    top, low = matrix[:n], matrix[n:]
    eye = torch.eye(size, dtype=F64)
    # z⁺ = z + η v⁺, v⁺ = μ v + M z; in turns the first player sees the second one's new z
    velocity = torch.cat([matrix, momentum * eye], 1)
    if mode == "alternating":
        moved = torch.cat([eye, torch.zeros_like(eye)], 1)
        moved[n:] += eta * torch.cat([low, momentum * eye[n:]], 1)
        velocity[:n] = top @ moved + momentum * torch.cat([torch.zeros_like(eye), eye], 1)[:n]
    state = torch.cat([torch.cat([eye, torch.zeros_like(eye)], 1) + eta * velocity, velocity])
    wanted = (
        torch.linalg.eigvals(state).abs().max()
        if momentum
        else torch.linalg.eigvals(state[:size, :size]).abs().max()
    )
    assert found.radius == pytest.approx(float(wanted), rel=1e-6)
    assert found.converged and found.residual < 1e-5 and found.velocity == 0


def test_too_few_products_are_not_called_converged():
    matrix = seeded(300, 300) / 300**0.5
    z = torch.zeros(300, dtype=F64)
    found = game_stability(linear(matrix, 100), z, lr=0.1, tol=1e-12, max_products=25)
    assert not found.converged and found.products < 60


# ------------------------------------------------------------------------------------------- networks


def players(seed=0):
    torch.manual_seed(seed)
    generator = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    critic = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    soft = nn.functional.softplus
    losses = (
        lambda G, D, s, x: soft(-D(G(s))).mean(),
        lambda G, D, s, x: (soft(D(G(s))) + soft(-D(x))).mean(),
    )
    data = seeded(12, 2), seeded(12, 3, seed=1)
    return generator, critic, losses, data


def test_the_field_of_two_networks_is_minus_their_gradients_for_any_number_of_paths():
    generator, critic, losses, data = players()
    game = network_game(generator, critic, losses, data)
    z = game.state()
    slopes = [
        *torch.autograd.grad(losses[0](generator, critic, *data), list(generator.parameters())),
        *torch.autograd.grad(losses[1](generator, critic, *data), list(critic.parameters())),
    ]
    wanted = -torch.cat([g.reshape(-1) for g in slopes])
    torch.testing.assert_close(game.field(z), wanted)
    torch.testing.assert_close(game.field(z.expand(2, 3, -1)), wanted.expand(2, 3, -1))
    assert game.split == 27 and z.numel() == 27 + 26
    game.load(z + 1)
    torch.testing.assert_close(game.state(), z + 1)


def test_the_noise_of_two_networks_has_the_covariance_of_their_samples():
    generator, critic, losses, data = players()
    game = network_game(generator, critic, losses, data)
    z = game.state()
    alone = [
        network_game(generator, critic, losses, [part[i : i + 1] for part in data]).field(z)
        for i in range(12)
    ]
    rows = torch.stack(alone)
    rows = rows - rows.mean(0)
    eye = torch.eye(12, dtype=F64)
    factor = game.noise_product(z.expand(12, -1), eye)  # one column of Σ^{1/2} a path
    torch.testing.assert_close(factor.T @ factor, rows.T @ rows / 12)
    equation = game_sde(game, lr=0.05, order=2, mode="alternating", batch_size=4)
    end = simulate(
        equation, z.expand(2, -1).clone(), dt=0.05, steps=2, generator=torch.Generator().manual_seed(0)
    )
    assert end.shape == (1, 2, z.numel()) and bool(end.isfinite().all())


def test_the_stability_of_two_networks_is_that_of_their_dense_jacobian_and_nothing_is_left_behind():
    generator, critic, losses, data = players()
    game = network_game(generator, critic, losses, data)
    z, state = game.state(), torch.get_rng_state()
    for mode in MODES:
        dense = torch.func.jacrev(lambda q, mode=mode: game_step(game, q, 0.3, mode))(z)
        found = game_stability(game, z, lr=0.3, mode=mode)
        assert found.radius == pytest.approx(float(torch.linalg.eigvals(dense).abs().max()), rel=1e-9)
    assert found.velocity > 0 and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in generator.parameters()) and torch.equal(game.state(), z)


def test_a_critic_with_spectral_norm_in_training_mode_is_a_player_like_any_other():
    generator, critic, losses, data = players()
    nn.utils.parametrizations.spectral_norm(critic[2])
    critic.train()
    before = [b.clone() for b in critic.buffers()]
    game = network_game(generator, critic, losses, data)
    z = game.state()
    found = game_stability(game, z, lr=0.3)
    assert found.converged and found.residual < 1e-9 and found.velocity > 0
    assert game.field(torch.stack([z, z + 1])).shape == (2, z.numel())
    assert all(torch.equal(a, b) for a, b in zip(critic.buffers(), before, strict=True))


def test_a_network_that_normalises_by_the_batch_has_no_noise_of_single_samples():
    generator, critic, losses, data = players()
    critic = nn.Sequential(critic[0], nn.BatchNorm1d(5).double(), *critic[1:])
    game = network_game(generator, critic, losses, data)
    z = game.state()
    assert bool(game.field(z).isfinite().all())
    with pytest.raises(UnsupportedError, match=r"BatchNorm1d .* eval\(\)"):
        game.noise_product(z, torch.ones(12, dtype=F64))
    quiet = simulate(game_sde(Game(game.field, game.split), lr=0.1), z, dt=0.1, steps=1)
    torch.testing.assert_close(quiet[-1], game_step(game, z, 0.1))
    critic.eval()
    assert bool(game.noise_product(z, torch.randn(12, dtype=F64)).any())


def test_bad_arguments_are_named():
    game = linear(DAMPED)
    with pytest.raises(ArgumentError, match="mode 'both'"):
        game_sde(game, lr=0.1, mode="both")
    with pytest.raises(ArgumentError, match="order is 3"):
        game_sde(game, lr=0.1, order=3)
    with pytest.raises(ArgumentError, match="split is 0"):
        Game(lambda z: z, 0)
    with pytest.raises(ArgumentError, match="eigenvalue"):
        Game(lambda z: z, 1, noise=-torch.eye(2))
    with pytest.raises(ArgumentError, match="noise is -1"):
        Game(lambda z: z, 1, noise=-1.0)
    with pytest.raises(ArgumentError, match="momentum 1"):
        game_stability(game, torch.zeros(2), lr=0.1, momentum=1.0)
    with pytest.raises(ShapeError, match="split is 2"):
        linear_game(DAMPED, 0.0, lr=0.1, split=2)
    with pytest.raises(ShapeError, match="steps"):
        game_fluctuation_dissipation(game, torch.zeros(10, 2), lr=0.1)
    generator, critic, losses, data = players()
    with pytest.raises(DataError, match="unequal"):
        network_game(generator, critic, losses, (data[0], data[1][:3]))
    with pytest.raises(ArgumentError, match="losses"):
        network_game(generator, critic, losses[:1], data)
