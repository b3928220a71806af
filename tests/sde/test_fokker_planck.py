"""Densities on a grid against Gibbs' law, moments that are known, and exact statements about Markov chains."""

import itertools
import math

import pytest
import torch

from bolza.core import Diffusion
from bolza.core.errors import ArgumentError, ShapeError, UnsupportedError
from bolza.sde import fokker_planck
from bolza.sde.lattice import selling, weights

F64 = torch.float64


def double_well(x):
    return (x**4 / 4 - x**2 / 2).sum(-1)


@pytest.fixture(scope="module")
def well():
    return fokker_planck(double_well, (-3, 3), 400, temperature=0.1)


def test_the_spectral_gap_of_the_double_well_is_known(well):
    assert well.gap == pytest.approx(0.0335493, abs=1e-7)
    assert abs(well.spectrum(1)[0]) < 1e-11
    # the second smallest rate of a parabola is its curvature, the next twice that
    bowl = fokker_planck(lambda x: (x**2).sum(-1), (-4, 4), 800, temperature=0.3)
    assert bowl.spectrum(3).real.tolist() == pytest.approx([0, 2, 4], abs=2e-3)


def test_mass_is_kept_the_density_positive_and_the_free_energy_falls_to_its_known_values(well):
    start = well.density(lambda x: -50 * (x[..., 0] - 1) ** 2)
    times = torch.linspace(0, 4, 41, dtype=F64)
    course = well.evolve(start, times)
    energy = [well.free_energy(rho) for rho in course]
    assert max(abs(float(rho.sum()) * well.volume - 1) for rho in course) < 1e-12
    assert float(course.min()) >= 0
    assert all(b < a for a, b in itertools.pairwise(energy))
    assert energy[0] == pytest.approx(-0.151561, abs=1e-6)
    assert energy[-1] == pytest.approx(-0.219217, abs=2e-4)  # one well is filled
    rest = well.free_energy(well.stationary())
    assert rest == pytest.approx(-0.271933, abs=1e-6)
    # F = T KL + F_∞, exactly, for any density
    kl = well.relative_entropy(course[7])
    assert energy[7] == pytest.approx(rest + 0.1 * kl, abs=1e-13)


def test_a_single_huge_step_leaves_a_positive_density_near_the_stationary_law(well):
    start = well.density(lambda x: -50 * (x[..., 0] - 1) ** 2)
    late = well.evolve(start, [1e6], dt=1e6)[0]
    assert float(late.min()) > 0 and abs(float(late.sum()) * well.volume - 1) < 1e-12
    assert float((late - well.stationary()).abs().max()) < 1e-3


def test_the_orders_in_time_are_one_and_two(well):
    start = well.density(lambda x: -20 * (x[..., 0] - 0.5) ** 2)
    exact = well.evolve(start, [0.5], dt=1 / 1024, order=2)[0]
    for order in (1, 2):
        error = [
            float((well.evolve(start, [0.5], dt=dt, order=order)[0] - exact).abs().sum())
            for dt in (1 / 32, 1 / 64)
        ]
        assert math.log2(error[0] / error[1]) == pytest.approx(order, abs=0.15)


def test_mean_and_variance_of_a_linear_equation_follow_their_closed_form():
    a, b, start, t = 1.5, 0.4, 0.8, 0.6
    linear = Diffusion(drift=lambda t, x: -a * x, factor=lambda t, x, noise: b * noise)
    grid = fokker_planck(linear, (-3, 3), 600, temperature=1.0)
    rho = grid.density(lambda x: -((x[..., 0] - start) ** 2) / (2 * 0.04))
    later = grid.evolve(rho, [t], dt=0.005, order=2)[0]
    mean = float(grid.mean(later, lambda x: x[..., 0]))
    spread = float(grid.mean(later, lambda x: x[..., 0] ** 2)) - mean**2
    assert mean == pytest.approx(start * math.exp(-a * t), abs=1e-4)
    shrink = math.exp(-2 * a * t)
    assert spread == pytest.approx(0.04 * shrink + b**2 / (2 * a) * (1 - shrink), abs=1e-4)


def test_the_stationary_law_under_state_dependent_noise_has_ito_s_term():
    grid = fokker_planck(
        lambda x: (x**2 / 2).sum(-1),
        (-8, 8),
        1600,
        temperature=0.1,
        diffusion=lambda x: 1 + x[..., 0] ** 2 / 2,
    )
    rho = grid.stationary()
    assert float(grid.mean(rho, lambda x: x[..., 0] ** 2)) == pytest.approx(0.1052632, abs=5e-6)
    assert float((grid.operator @ rho.numpy()).max()) < 1e-9
    # the same law as of the equation itself, dx = −x dt + √(2 T D) dW
    same = Diffusion(drift=lambda t, x: -x, factor=lambda t, x, noise: (0.2 * (1 + x**2 / 2)).sqrt() * noise)
    other = fokker_planck(same, (-8, 8), 1600, temperature=0.1).stationary()
    assert float(grid.mean(other, lambda x: x[..., 0] ** 2)) == pytest.approx(0.1052632, abs=5e-6)


def test_gibbs_law_is_stationary_to_rounding_in_two_dimensions():
    def bumps(x):
        return double_well(x) + 0.3 * x[..., 0] * x[..., 1]

    grid = fokker_planck(bumps, ((-2.5, 2.5), (-2.4, 2.4)), (40, 30), temperature=0.2, diffusion=1.7)
    rho = grid.stationary()
    assert torch.allclose(
        rho.log() - rho.log()[0, 0], -(bumps(grid.points) - bumps(grid.points)[0, 0]) / 0.34
    )
    assert float(torch.as_tensor(grid.operator @ rho.reshape(-1).numpy()).abs().max()) < 1e-13
    assert grid.entropy_production(rho) < 1e-25
    assert float(grid.current(rho).abs().max()) < 1e-13
    start = grid.density(lambda x: -5 * (x - 1).square().sum(-1))
    energy = [grid.free_energy(r) for r in grid.evolve(start, torch.linspace(0, 2, 6, dtype=F64), dt=0.1)]
    assert all(b < a for a, b in itertools.pairwise(energy))
    assert grid.gap == pytest.approx(float(grid.spectrum(3)[1].real)) and grid.gap > 0


def test_a_diagonal_that_varies_keeps_its_closed_form_in_two_dimensions():
    # coordinates that do not feel each other: the law is a product
    grid = fokker_planck(
        lambda x: (x**2 / 2).sum(-1),
        ((-2.2, 2.2), (-2.2, 2.2)),
        66,
        temperature=0.1,
        diffusion=lambda x: torch.stack([1 + x[..., 0] ** 2 / 2, torch.full_like(x[..., 1], 0.5)], -1),
    )
    rho = grid.stationary()
    assert float(grid.mean(rho, lambda x: x[..., 0] ** 2)) == pytest.approx(0.10526, abs=1e-3)
    assert float(grid.mean(rho, lambda x: x[..., 1] ** 2)) == pytest.approx(0.05, abs=1e-3)


def test_the_relative_entropy_falls_for_a_flow_that_is_no_gradient():
    turn = torch.tensor([[1.0, 2.0], [-2.0, 1.0]], dtype=F64)
    spiral = Diffusion(drift=lambda t, x: -x @ turn.mT, factor=lambda t, x, noise: 0.6 * noise)
    grid = fokker_planck(spiral, ((-2, 2), (-2, 2)), 24, temperature=0.18)
    rest = grid.stationary()
    start = grid.density(lambda x: -10 * ((x[..., 0] - 1) ** 2 + x[..., 1] ** 2))
    course = grid.evolve(start, torch.linspace(0, 3, 13, dtype=F64), dt=0.25)
    kl = [grid.relative_entropy(rho, rest) for rho in course]
    assert all(b < a for a, b in itertools.pairwise(kl))
    # rotation does not change this law: exp(−|x|²/2T)
    assert float(grid.mean(rest, lambda x: x[..., 0] ** 2)) == pytest.approx(0.18, rel=0.06)
    flux = grid.current(rest)
    right = (grid.points[..., 0] > 0.4) & (grid.points[..., 1].abs() < 0.2)
    assert float(flux[1][right].min()) > 0  # ẏ = 2x − y
    slowest = grid.spectrum(2)[1]  # 1 ± 2i, although 2 is smaller in modulus
    assert float(slowest.real) == pytest.approx(1, rel=0.1) and float(slowest.imag.abs()) == pytest.approx(
        2, rel=0.1
    )


def test_edges_add_up_to_any_positive_definite_matrix():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        root = torch.randn(2, 2, generator=generator, dtype=F64)
        m = root @ root.mT + 0.01 * torch.eye(2, dtype=F64)
        found = selling(m)
        assert len(found) <= 3 and min(found.values()) > 0
        total = sum(
            w * torch.outer(torch.tensor(e, dtype=F64), torch.tensor(e, dtype=F64)) for e, w in found.items()
        )
        assert torch.allclose(total, m)
    varying = torch.tensor([[1.0, -0.3], [-0.3, 0.7]], dtype=F64).expand(5, 5, 2, 2)
    edges = dict(weights(lambda x: varying, None, torch.zeros(5, 5, 2, dtype=F64), (1.0, 1.0)))
    assert {e: round(float(w[0, 0]), 6) for e, w in edges.items()} == {(1, 0): 0.7, (0, 1): 0.4, (1, -1): 0.3}


def test_what_makes_no_sense_is_refused_by_name(well):
    with pytest.raises(UnsupportedError, match="bounds has 3"):
        fokker_planck(double_well, ((-1, 1),) * 3, 5)
    with pytest.raises(ArgumentError, match="bounds is"):
        fokker_planck(double_well, (1, -1), 5)
    with pytest.raises(ArgumentError, match="cells is 2"):
        fokker_planck(double_well, (-1, 1), 2)
    with pytest.raises(ArgumentError, match="temperature is 0"):
        fokker_planck(double_well, (-1, 1), 5, temperature=0.0)
    with pytest.raises(ArgumentError, match="positive definite"):
        fokker_planck(double_well, ((-1, 1), (-1, 1)), 5, diffusion=torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(ArgumentError, match="too oblique"):
        tilted = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=F64)
        fokker_planck(
            double_well, ((-4, 4), (-1, 1)), 5, diffusion=lambda x: tilted.expand(*x.shape[:-1], 2, 2)
        )
    with pytest.raises(ShapeError, match="one value"):
        fokker_planck(lambda x: x, (-1, 1), 5)
    with pytest.raises(UnsupportedError, match="alpha is 1.5"):
        fokker_planck(Diffusion(lambda t, x: -x, lambda t, x, noise: noise, alpha=1.5), (-1, 1), 5)
    with pytest.raises(ShapeError, match="rho has shape"):
        well.evolve(torch.ones(3), [1.0])
    with pytest.raises(ArgumentError, match="must increase"):
        well.evolve(well.stationary(), [1.0, 0.5])
    with pytest.raises(ArgumentError, match="be finite"):
        well.evolve(well.stationary(), [math.nan])
    with pytest.raises(ArgumentError, match="not finite"):
        well.evolve(well.stationary() * math.nan, [1.0])
    with pytest.raises(ArgumentError, match="finite somewhere"):
        well.density(lambda x: torch.full(x.shape[:-1], -math.inf))
    with pytest.raises(ArgumentError, match="must be finite"):
        fokker_planck(double_well, (-math.inf, math.inf), 5)
    with pytest.raises(ArgumentError, match="order is 3"):
        well.evolve(well.stationary(), [1.0], order=3)


def test_one_step_longer_than_the_time_is_still_a_step(well):
    start = well.density(lambda x: -50 * (x[..., 0] - 1) ** 2)
    assert torch.equal(well.evolve(start, [2.0], dt=math.inf), well.evolve(start, [2.0], dt=2.0))


def test_what_has_no_mass_in_all_evolves_linearly(well):
    a, b = (well.density(lambda x, c=c: -50 * (x[..., 0] - c) ** 2) for c in (1.0, -0.5))
    apart = well.evolve(a - b, [1.0])[0]
    assert torch.allclose(apart, well.evolve(a, [1.0])[0] - well.evolve(b, [1.0])[0], atol=1e-12)


@pytest.mark.parametrize("sigma", [0.1, 0.01])
def test_a_cold_equation_on_coarse_cells_keeps_its_law_and_its_drift(sigma):
    T = sigma**2 / 2
    cold = fokker_planck(
        Diffusion(lambda t, x: -x, lambda t, x, noise: sigma * noise), (-3, 3), 21, temperature=T
    )
    x = cold.points[..., 0]
    log_ratio = cold.log_stationary() - cold.log_stationary().max()
    assert torch.allclose(log_ratio * T, -x.square() / 2, rtol=1e-9)
    start = cold.density(lambda x: -(x[..., 0] ** 2))
    exact = float(cold.mean(start, start.log() - cold.log_stationary()))
    assert cold.relative_entropy(start) == pytest.approx(exact) and exact < 2 / T
    # upwind: a cell next to the middle is left at the rate |drift at its face| / h = (h/2) / h
    assert float(cold.spectrum(2)[1].real) == pytest.approx(0.5, rel=1e-3)
    turning = Diffusion(
        lambda t, x: -x + x.flip(-1) * x.new_tensor([1.0, -1.0]), lambda t, x, noise: sigma * noise
    )
    plane = fokker_planck(turning, ((-3, 3), (-3, 3)), 9, temperature=T).stationary()
    assert bool((plane >= 0).all()) and int(plane.argmax()) == 40


def test_the_far_tails_of_a_law_without_a_potential_are_right_in_the_logarithm():
    cold = Diffusion(lambda t, x: -x, lambda t, x, noise: 0.1**0.5 * noise)
    found = fokker_planck(cold, ((-3, 3), (-3, 3)), 20, temperature=0.05)
    height, log_rho = found.points.square().sum(-1) / 2, found.log_stationary()
    assert float(log_rho.min()) < -150  # the drift is linear, and the chain on the cells reversible: exact
    assert torch.allclose((log_rho.max() - log_rho) * 0.05, height - height.min(), atol=1e-10)
