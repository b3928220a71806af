"""The area that a path sweeps: closed forms, invariances, and how often chance is taken for a loop."""

import math

import pytest
import torch

from bolza.core.errors import ArgumentError, DataError, ShapeError
from bolza.sde import area_rate, linear_current

F64 = torch.float64


def linear_run(A, D, *, temperature, lr, steps, paths, seed):
    """SGD on a quadratic with Gaussian noise, ``(steps + 1, paths, d)``, from its stationary law."""
    g = torch.Generator().manual_seed(seed)
    A, D = torch.as_tensor(A, dtype=F64), torch.as_tensor(D, dtype=F64)
    root = torch.linalg.cholesky(2 * temperature * lr * D).mT
    S = linear_current(A, D, temperature=temperature, lr=lr).covariance
    x = torch.randn(paths, len(A), generator=g, dtype=F64) @ torch.linalg.cholesky(S).mT
    noise = torch.randn(steps, paths, len(A), generator=g, dtype=F64) @ root
    step, saved = (torch.eye(len(A), dtype=F64) - lr * A).mT, [x]
    for k in range(steps):
        x = x @ step + noise[k]
        saved.append(x)
    return torch.stack(saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_circle_sweeps_its_area_at_its_own_frequency(dtype):
    t = 0.05 * torch.arange(4000, dtype=dtype)
    found = area_rate(torch.stack([3 + 2 * t.cos(), 0.5 * t.sin(), 0 * t], 1), dt=0.05)
    assert found.matrix.dtype == dtype
    # twice the area of the ellipse, 2π · 2 · ½, in the time 2π, by chords
    assert float(found.matrix[0, 1]) == pytest.approx(math.sin(0.05) / 0.05, rel=1e-4)
    assert float(found.matrix[1, 0]) == -float(found.matrix[0, 1])
    assert found.frequency.value == pytest.approx(1.0, abs=2e-3)
    assert found.z > 20 and found.settled
    turned = area_rate(torch.stack([3 + 2 * t.cos(), 0.5 * t.sin(), 0 * t], 1).flip(0), dt=0.05)
    assert float(turned.matrix[0, 1]) == pytest.approx(-float(found.matrix[0, 1]), rel=1e-3)
    assert turned.frequency.value > 0


def test_the_plane_is_where_the_path_turns_anticlockwise():
    g = torch.Generator().manual_seed(0)
    t = 0.05 * torch.arange(6000, dtype=F64)
    inside = torch.stack([t.cos(), t.sin()], 1)
    basis = torch.linalg.qr(torch.randn(6, 2, generator=g, dtype=F64)).Q
    path = inside @ basis.mT + 0.1 * torch.randn(6000, 6, generator=g, dtype=F64)
    found = area_rate(path, dt=0.05)
    seen = (path - found.centre) @ found.plane
    assert torch.allclose(seen.var(0), torch.ones(2, dtype=F64), atol=0.05)
    again = area_rate(seen, dt=0.05)
    assert float(again.matrix[0, 1]) / 2 == pytest.approx(found.frequency.value, rel=1e-2)
    assert found.frequency.value == pytest.approx(1.0, rel=0.05)


def test_the_answer_does_not_depend_on_basis_units_or_order_of_time():
    path = linear_run(
        [[3.0, 0], [0, 1]], [[1, 0.6], [0.6, 0.8]], temperature=0.25, lr=0.02, steps=3000, paths=1, seed=0
    )[:, 0]
    found = area_rate(path, dt=0.02)
    mix = torch.tensor([[1e3, 2.0], [5.0, 1e-1]], dtype=F64)
    mixed = area_rate(path @ mix + 7, dt=0.02)
    assert mixed.z == pytest.approx(found.z, rel=1e-6)
    assert mixed.frequency.value == pytest.approx(found.frequency.value, rel=1e-6)
    assert torch.allclose(mixed.matrix, mix.mT @ found.matrix @ mix)
    slower = area_rate(path, dt=0.2)
    assert slower.z == pytest.approx(found.z) and slower.frequency.value == pytest.approx(
        found.frequency.value / 10
    )


def test_sgd_sweeps_the_area_of_theory_and_isotropic_noise_none():
    H = [[3.0, 0.0], [0.0, 1.0]]
    settings = {"temperature": 0.25, "lr": 0.02, "steps": 5000, "paths": 40, "seed": 1}
    loop = area_rate(linear_run(H, [[1, 0.6], [0.6, 0.8]], **settings), dt=0.02)
    expected = linear_current(
        torch.tensor(H), torch.tensor([[1, 0.6], [0.6, 0.8]]), temperature=0.25, lr=0.02
    )
    assert expected.area_rate[0, 1] == pytest.approx(0.15, abs=0.003)
    gap = float(loop.matrix[0, 1] - expected.area_rate[0, 1])
    assert abs(gap) < 4 * float(loop.error[0, 1]) < 0.03
    assert abs(loop.frequency.value - float(expected.frequencies[0])) < 4 * loop.frequency.error
    assert loop.z > 6 and loop.settled and loop.blocks == 40
    none = area_rate(linear_run(H, torch.eye(2), **settings), dt=0.02)
    assert none.z < 3.3 and abs(float(none.matrix[0, 1])) < 4 * float(none.error[0, 1])


def test_chance_is_called_a_loop_as_often_as_stated_even_when_the_run_is_short():
    # 150 reversible paths each: fast, slower than the path is long, and a random walk in six dimensions
    fast = linear_run(
        torch.diag(torch.tensor([1.0, 5.0])),
        torch.eye(2),
        temperature=0.1,
        lr=0.05,
        steps=1500,
        paths=150,
        seed=2,
    )
    slow = linear_run(
        torch.diag(torch.tensor([0.01, 0.05])),
        torch.eye(2),
        temperature=0.1,
        lr=0.05,
        steps=1500,
        paths=150,
        seed=3,
    )
    walk = torch.randn(601, 150, 6, generator=torch.Generator().manual_seed(4)).cumsum(0)
    for paths in (fast, slow, walk):
        p = torch.tensor([area_rate(paths[:, i]).p_value for i in range(150)])
        alarms = int((p < 0.05).sum())
        assert alarms <= 17  # 7.5 expected; more has probability 0.001
        assert float(p.median()) > 0.3
    # and the paths that are too short for a loop say so
    assert not any(area_rate(slow[:, i]).settled for i in range(5))
    assert all(area_rate(fast[:, i]).settled for i in range(5))


def test_a_transient_that_curves_into_a_minimum_is_no_stationary_loop():
    t = 0.01 * torch.arange(1000, dtype=F64)
    found = area_rate(torch.stack([(-t).exp(), (-3 * t).exp()], 1), dt=0.01)
    assert found.drift > 0.8 and not found.settled


def test_paths_on_a_line_and_at_rest_sweep_nothing():
    t = torch.arange(200.0)
    line = area_rate(torch.stack([t, -2 * t], 1))
    assert line.z == 0 and line.p_value == 1 and float(line.matrix.abs().max()) == 0 and not line.settled
    rest = area_rate(torch.ones(200, 3))
    assert rest.z == 0 and rest.matrix.shape == (3, 3) and rest.frequency.value == 0


def test_what_cannot_be_read_is_refused_by_name():
    path = torch.randn(100, 3)
    with pytest.raises(ShapeError, match="path has shape"):
        area_rate(path[:, :1])
    with pytest.raises(ArgumentError, match="dt is 0"):
        area_rate(path, dt=0.0)
    with pytest.raises(ArgumentError, match="at least 4 blocks"):
        area_rate(path[:20])
    with pytest.raises(ArgumentError, match="blocks is 2"):
        area_rate(path, blocks=2)
    path[5, 1] = math.nan
    with pytest.raises(DataError, match="not finite"):
        area_rate(path)


def test_a_path_of_whole_numbers_is_read_like_any_other():
    t = torch.arange(200) * 0.2
    path = (100 * torch.stack([t.cos(), t.sin()], 1)).round()
    found = area_rate(path.long())
    assert found.matrix.is_floating_point() and torch.equal(found.matrix, area_rate(path.double()).matrix)
