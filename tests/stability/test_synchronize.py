"""Synchronisation of driven systems."""

import math

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError, DataError, DivergenceError, ShapeError
from bolza.stability import (
    conditional_exponent,
    drive,
    lyapunov_exponents,
    mutual_false_neighbours,
    synchronisation_error,
)

F64 = torch.float64


def reservoir(rho, n=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, n, generator=generator, dtype=F64)
    w *= rho / torch.linalg.eigvals(w).abs().max()
    w_in = 0.1 * (2 * torch.rand(n, 1, generator=generator, dtype=F64) - 1)
    return lambda r, u: torch.tanh(r @ w.T + u @ w_in.T)


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_a_linear_response_has_the_exponent_of_its_spectral_radius():
    w = torch.diag(torch.tensor([0.9, 0.3], dtype=F64))
    found = conditional_exponent(
        lambda r, u: r @ w + u, noise(200, 1), torch.zeros(1, 2, dtype=F64), warmup=60
    )
    assert found.value == pytest.approx(math.log(0.9), abs=1e-9)


def test_a_contracting_reservoir_forgets_its_first_state_and_an_expanding_one_does_not():
    inputs, start = noise(600, 1), noise(3, 60, seed=2)
    errors = [float(synchronisation_error(reservoir(rho), inputs[:, None], start)) for rho in (0.6, 2.0)]
    exponents = [
        conditional_exponent(reservoir(rho), inputs[:, None], start, warmup=100).value for rho in (0.6, 2.0)
    ]
    assert errors[0] < 1e-12 and errors[1] > 0.1
    assert exponents[0] < -0.3 and exponents[1] > 0.05


def test_the_decay_of_the_synchronisation_error_is_the_conditional_exponent():
    inputs, start = noise(120, 1), noise(1, 60, seed=2)
    two = torch.cat([start, start + 1e-6 * noise(1, 60, seed=3)])
    step = reservoir(0.8)
    early, late = (synchronisation_error(step, inputs[:n, None], two, window=1) for n in (20, 70))
    rate = conditional_exponent(step, inputs[:70, None], start, warmup=20)
    assert float((late / early).log()) / 50 == pytest.approx(rate.value, abs=0.03)  # other first directions


def test_a_recurrent_module_is_driven_in_its_own_form():
    torch.manual_seed(0)
    module, inputs = nn.GRU(2, 7, batch_first=True).double(), noise(3, 30, 2)
    states = drive(module, inputs)
    assert torch.allclose(states[:, :, :].transpose(0, 1), module(inputs)[0].detach(), atol=1e-12)
    assert drive(module, inputs, warmup=10).shape == (20, 3, 7)
    whole = lyapunov_exponents(module, inputs=inputs, k=1)
    assert conditional_exponent(module, inputs).value == float(whole.exponents)
    h = noise(1, 2, 7)
    assert float(synchronisation_error(module, inputs[:1].repeat(1, 4, 1), h, window=5)) < 1e-6


# ------------------------------------------------------------------------- mutual false neighbours


def test_an_identical_response_has_the_index_one_at_every_point():
    x = noise(300, 3)
    found = mutual_false_neighbours(x, x)
    assert (found.values == 1).all() and found.median == found.mean == 1.0
    assert mutual_false_neighbours(x, -2 * x).median == pytest.approx(1.0, abs=1e-12)


def test_an_invertible_function_stays_near_one_and_a_random_response_does_not():
    x = noise(800, 2)
    y = torch.cat([x + 0.2 * x.sin(), x.prod(1, keepdim=True)], 1)
    assert mutual_false_neighbours(x, y).median < 1.5
    assert mutual_false_neighbours(x, noise(800, 2, seed=9)).median > 10


def test_it_is_the_formula_written_out():
    x, y = noise(40, 2), noise(40, 3, seed=5)
    wanted = []
    for n in range(40):
        others = [m for m in range(40) if abs(m - n) > 2]
        a = min(others, key=lambda m: float((x[m] - x[n]).norm()))
        b = min(others, key=lambda m: float((y[m] - y[n]).norm()))
        top = (y[n] - y[a]).norm() * (x[n] - x[b]).norm()
        wanted.append(float(top / ((x[n] - x[a]).norm() * (y[n] - y[b]).norm())))
    assert mutual_false_neighbours(x, y, theiler=2).values.tolist() == pytest.approx(wanted)


def test_a_subsample_of_points_still_seeks_neighbours_among_all():
    x, y = noise(200, 2), noise(200, 2, seed=5)
    whole = mutual_false_neighbours(x, y).values
    some = mutual_false_neighbours(x, y, max_points=50).values
    assert some.numel() == 50 and torch.isin(some, whole).all()


def test_coinciding_points_do_not_count():
    x = noise(20, 2).repeat(2, 1)[:30]
    found = mutual_false_neighbours(x, x)
    assert found.values.isnan().sum() == 20 and found.median == 1.0
    with pytest.raises(DataError, match="must vary"):
        mutual_false_neighbours(torch.zeros(9, 2), torch.zeros(9, 2))


def test_bad_input_is_named():
    step, x = reservoir(0.5), noise(10, 1)
    with pytest.raises(ArgumentError, match="inputs is None"):
        conditional_exponent(step, None, noise(1, 60))
    with pytest.raises(ArgumentError, match="x0 is None"):
        drive(step, x)
    with pytest.raises(ArgumentError, match="warmup is 10"):
        drive(step, x, noise(1, 60), warmup=10)
    with pytest.raises(ArgumentError, match="1 copies"):
        synchronisation_error(step, x, noise(1, 60))
    with pytest.raises(DivergenceError, match="not finite"):
        drive(lambda r, u: r**3 * 1e30, noise(20, 1), 10 * noise(1, 2))
    with pytest.raises(ShapeError, match=r"\(steps, p\)"):
        mutual_false_neighbours(noise(5, 2), noise(6, 2))
    with pytest.raises(ArgumentError, match="theiler is -1"):
        mutual_false_neighbours(noise(5, 2), noise(5, 2), theiler=-1)
    with pytest.raises(DataError, match="at least 9"):
        mutual_false_neighbours(noise(8, 2), noise(8, 2), theiler=3)
