"""The linear-quadratic game: closed forms, the saddle, and the gain that it promises."""

import numpy as np
import pytest
import torch

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.ops.riccati import stationary_riccati
from bolza.robust import critical_price, linear_game

D = torch.float64
ONE = torch.eye(1, dtype=D)
INF = float("inf")


def plant():
    g = torch.Generator().manual_seed(0)
    A = torch.randn(4, 4, generator=g, dtype=D) / 2
    B, C = torch.randn(4, 2, generator=g, dtype=D), torch.randn(4, 4, generator=g, dtype=D)
    return (
        A,
        B,
        torch.randn(4, 3, generator=g, dtype=D),
        C @ C.T,
        torch.diag(torch.tensor([1.0, 0.3], dtype=D)),
    )


@pytest.mark.parametrize(("price", "value"), [(1.5, 1.9317821), (2.0, 1.7583057), (INF, 1.6180340)])
def test_scalar_values_are_known(price, value):
    game = linear_game(ONE, ONE, ONE, ONE, ONE, price)
    assert float(game.P) == pytest.approx(value, abs=5e-8)
    P, c = float(game.P), 1 - price**-2
    assert P == pytest.approx(1 + P / (1 + c * P), abs=1e-12)


def test_the_smallest_scalar_price_is_the_root_of_two_where_the_value_is_two():
    price = critical_price(ONE, ONE, ONE, ONE, ONE)
    assert price == pytest.approx(2**0.5, abs=1e-10)
    assert float(linear_game(ONE, ONE, ONE, ONE, ONE, price * (1 + 1e-9)).P) == pytest.approx(2, abs=1e-7)
    with pytest.raises(DivergenceError, match="critical_price"):
        linear_game(ONE, ONE, ONE, ONE, ONE, 1.41)


def test_without_a_disturbance_it_is_the_regulator():
    A, B, W, Q, R = plant()
    game, regulator = linear_game(A, B, W, Q, R, INF), stationary_riccati(A, B, Q, R)
    torch.testing.assert_close(game.P, regulator.P)
    torch.testing.assert_close(game.K, regulator.K)
    dear = linear_game(A, B, W, Q, R, 1e6)
    torch.testing.assert_close(dear.P, regulator.P, rtol=1e-8, atol=1e-8)


def test_neither_player_gains_by_leaving_the_saddle():
    A, B, W, Q, R = plant()
    price = 1.3 * critical_price(A, B, W, Q, R)
    game = linear_game(A, B, W, Q, R, price)
    g = torch.Generator().manual_seed(1)
    x0 = torch.randn(4, generator=g, dtype=D)

    def cost(du, dw, steps=100):
        x, total = x0.expand(64, 4), torch.zeros(64, dtype=D)
        for t in range(steps):
            u = -x @ game.K.T + (du[t] if t < len(du) else 0)
            w = x @ game.L.T + (dw[t] if t < len(dw) else 0)
            total = total + ((x @ Q) * x).sum(1) + ((u @ R) * u).sum(1) - price**2 * (w * w).sum(1)
            x = x @ A.T + u @ B.T + w @ W.T
        return total

    still = cost([], [])
    torch.testing.assert_close(still, (x0 @ game.P @ x0).expand(64), rtol=1e-10, atol=0)
    noise_u = 0.3 * torch.randn(10, 64, 2, generator=g, dtype=D)
    noise_w = 0.3 * torch.randn(10, 64, 3, generator=g, dtype=D)
    assert bool((cost(noise_u, []) > still).all()) and bool((cost([], noise_w) < still).all())


def test_the_controller_keeps_the_gain_from_disturbance_to_cost_below_the_price_and_no_less_can_be_had():
    A, B, W, Q, R = plant()
    smallest = critical_price(A, B, W, Q, R)
    for factor in (1.0001, 1.5):
        game = linear_game(A, B, W, Q, R, factor * smallest)
        loop = (A - B @ game.K).numpy()
        cost = np.vstack([np.linalg.cholesky(Q.numpy()).T, np.linalg.cholesky(R.numpy()).T @ game.K.numpy()])
        z = np.exp(1j * np.linspace(0, np.pi, 400))[:, None, None]
        gains = np.linalg.norm(cost @ np.linalg.inv(z * np.eye(4) - loop) @ W.numpy(), 2, axis=(1, 2))
        assert gains.max() < factor * smallest
        assert gains.max() > 0.99 * smallest
    assert game.margin > 0


def test_what_cannot_be_a_game_is_refused():
    with pytest.raises(ArgumentError, match="price"):
        linear_game(ONE, ONE, ONE, ONE, ONE, 0.0)
    with pytest.raises(ArgumentError, match="R is not"):
        critical_price(ONE, ONE, ONE, ONE, -ONE)
    with pytest.raises(ShapeError, match="D has shape"):
        linear_game(ONE, ONE, torch.ones(2, 1, dtype=D), ONE, ONE, 2.0)
    for call in (critical_price, lambda *plant: linear_game(*plant, 5.0)):
        with pytest.raises(DivergenceError, match="infinite horizon"):
            call(2 * ONE, 0 * ONE, ONE, ONE, ONE)
    with pytest.raises(ArgumentError, match="Q has the eigenvalue -1"):
        linear_game(ONE, ONE, ONE, -ONE, ONE, 2.0)
    with pytest.raises(ArgumentError, match="A has entries"):
        linear_game(ONE * torch.nan, ONE, ONE, ONE, ONE, 2.0)
    assert linear_game(*(M.float() for M in (ONE, ONE, ONE, ONE, ONE)), 2.0).P.dtype == torch.float32


def test_only_the_symmetric_part_of_a_weight_counts_and_whole_numbers_are_not_rounded():
    A, B, W, Q, R = plant()
    tilt = torch.triu(torch.ones(4, 4, dtype=D), 1)
    game, tilted = (linear_game(A, B, W, q, R, 50.0) for q in (Q, Q + tilt - tilt.T))
    torch.testing.assert_close(tilted.P, game.P)
    assert critical_price(A, B, W, Q + tilt - tilt.T, R) == pytest.approx(
        critical_price(A, B, W, Q, R), rel=1e-9
    )
    whole = linear_game(*(M.long() for M in (ONE, ONE, ONE, ONE, ONE)), 2.0)
    assert float(whole.K) == pytest.approx(0.7583057, abs=1e-6)
