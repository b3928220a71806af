"""Krylov methods against dense eigendecompositions of matrices with a prescribed spectrum."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bolza.ops.errors import ArgumentError, ConvergenceWarning, DivergenceError, ShapeError
from bolza.ops.krylov import Estimate, LinearOperator, spectral_density, top_eigenpairs, trace


def with_spectrum(values, seed=0):
    """A dense symmetric matrix with the given eigenvalues and random eigenvectors."""
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator)).Q
    return (q * values) @ q.T


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("which", ["largest magnitude", "largest algebraic", "smallest algebraic"])
def test_top_eigenpairs_equal_the_dense_ones(which, block):
    matrix = with_spectrum(torch.cat([torch.linspace(-9, 1, 60), torch.tensor([5.0, 7.0])]))
    values = torch.linalg.eigvalsh(matrix)
    key = {"largest magnitude": -values.abs(), "largest algebraic": -values, "smallest algebraic": values}[
        which
    ]
    expected = values[key.argsort()][:4]
    result = top_eigenpairs(
        LinearOperator.from_matrix(matrix), 4, tol=1e-12, which=which, block=block, generator=seeded()
    )
    assert result.converged
    torch.testing.assert_close(result.eigenvalues, expected, rtol=1e-11, atol=0)
    u = result.eigenvectors
    torch.testing.assert_close(u.T @ u, torch.eye(4, dtype=u.dtype), rtol=0, atol=1e-10)
    true_residuals = (matrix @ u - u * result.eigenvalues).norm(dim=0)
    torch.testing.assert_close(result.residuals, true_residuals, rtol=1e-3, atol=1e-12)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 3), st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_any_shape_and_block_gives_the_dense_answer(n, k, block, seed):
    k = min(n, k)
    matrix = with_spectrum(torch.randn(n, generator=seeded(seed)), seed)
    result = top_eigenpairs(
        LinearOperator.from_matrix(matrix),
        k,
        tol=1e-10,
        block=block,
        which="largest algebraic",
        generator=seeded(seed),
    )
    expected = torch.linalg.eigvalsh(matrix).flip(0)[:k]
    assert result.converged
    torch.testing.assert_close(result.eigenvalues, expected, rtol=1e-8, atol=1e-10)


def test_restarts_keep_the_answer_in_a_small_basis():
    matrix = with_spectrum(torch.linspace(0, 1, 300) ** 4)
    op = LinearOperator.from_matrix(matrix)
    result = top_eigenpairs(op, 3, tol=1e-11, max_basis=12, max_products=2000, generator=seeded())
    free = top_eigenpairs(op, 3, tol=1e-11, max_products=2000, generator=seeded())
    assert result.converged and result.products > 3 * 12 and free.products < result.products
    torch.testing.assert_close(
        result.eigenvalues, torch.linalg.eigvalsh(matrix).flip(0)[:3], rtol=1e-10, atol=0
    )


def test_a_repeated_eigenvalue_needs_a_block_of_its_multiplicity():
    matrix = with_spectrum([5.0, 5.0, 5.0, *torch.linspace(0, 1, 40).tolist()])
    result = top_eigenpairs(LinearOperator.from_matrix(matrix), 3, block=3, tol=1e-10, generator=seeded())
    torch.testing.assert_close(
        result.eigenvalues, torch.full((3,), 5.0, dtype=torch.float64), rtol=1e-9, atol=0
    )


def test_an_exhausted_krylov_space_goes_on_with_a_fresh_direction():
    identity = LinearOperator(lambda v: v, 5, torch.float64)
    result = top_eigenpairs(identity, 3, generator=seeded())
    assert result.converged
    torch.testing.assert_close(result.eigenvalues, torch.ones(3, dtype=torch.float64))
    zero = top_eigenpairs(LinearOperator(torch.zeros_like, 4, torch.float64), 4, generator=seeded())
    assert zero.converged and zero.eigenvalues.abs().max() == 0


def test_errors_bound_the_distance_to_the_spectrum_and_fewer_products_mean_larger_ones():
    matrix = with_spectrum([6.1, 3.0, 2.5, *torch.randn(400, generator=seeded()).mul(0.3).tolist()])
    op = LinearOperator.from_matrix(matrix)
    for products in (3, 5, 8):
        with pytest.warns(ConvergenceWarning, match=f"after {products} products"):
            result = top_eigenpairs(op, 1, tol=1e-15, max_products=products, generator=seeded())
        assert not result.converged and result.products == products
        distance = float((torch.linalg.eigvalsh(matrix) - result.eigenvalues[0]).abs().min())
        assert distance <= float(result.residuals[0]) + 1e-12
        if products >= 5:
            assert distance <= float(result.errors[0]) + 1e-12


def test_too_few_products_are_not_called_converged():
    """The case in which a peer returned 2.60 for 6.13: a flat spectrum with a hidden top."""
    matrix = with_spectrum([6.13, *torch.linspace(-2, 2.6, 800).tolist()])
    with pytest.warns(ConvergenceWarning, match="raise max_products=4"):
        result = top_eigenpairs(LinearOperator.from_matrix(matrix), 1, max_products=4, generator=seeded())
    assert not result.converged
    assert top_eigenpairs(LinearOperator.from_matrix(matrix), 1, generator=seeded()).eigenvalues[
        0
    ] == pytest.approx(6.13, rel=1e-3)


def test_a_space_that_is_used_up_is_not_asked_for_more_products():
    matrix = with_spectrum([1.0, 0.5, 0.1, 1e-5]).float()
    with pytest.warns(ConvergenceWarning, match="after 4 products .* rounding in torch.float32"):
        found = top_eigenpairs(LinearOperator.from_matrix(matrix), 4, generator=seeded())
    assert not found.converged


def test_a_good_start_saves_products():
    matrix = with_spectrum(torch.linspace(0, 1, 200) ** 3)
    op = LinearOperator.from_matrix(matrix)
    cold = top_eigenpairs(op, 1, tol=1e-8, generator=seeded())
    warm = top_eigenpairs(op, 1, tol=1e-8, start=cold.eigenvectors[:, 0])
    assert warm.products < cold.products / 2


def test_float32_operators_reach_float32_accuracy():
    matrix = with_spectrum([4.0, 2.0, *torch.rand(100, generator=seeded()).tolist()])
    result = top_eigenpairs(LinearOperator.from_matrix(matrix.float()), 2, tol=1e-5, generator=seeded())
    assert result.converged and result.eigenvectors.dtype == torch.float32
    torch.testing.assert_close(
        result.eigenvalues, torch.tensor([4.0, 2.0], dtype=torch.float64), rtol=2e-6, atol=0
    )


def test_a_full_lanczos_run_reproduces_every_moment_of_its_probe():
    values = torch.randn(12, generator=seeded()).double()
    matrix = with_spectrum(values)
    density = spectral_density(LinearOperator.from_matrix(matrix), steps=12, probes=1, generator=seeded(3))
    v = torch.randn(12, 1, dtype=torch.float64, generator=seeded(3))[:, 0]
    v = v / v.norm()
    for power in range(8):
        exact = float(v @ torch.linalg.matrix_power(matrix, power) @ v)
        assert density.moment(power).value == pytest.approx(exact, abs=1e-11)
    assert math.isnan(density.moment(1).error)


def test_quadrature_is_exact_up_to_twice_the_steps():
    matrix = with_spectrum(torch.linspace(-1, 2, 50))
    short = spectral_density(LinearOperator.from_matrix(matrix), steps=4, probes=3, generator=seeded())
    full = spectral_density(LinearOperator.from_matrix(matrix), steps=50, probes=3, generator=seeded())
    assert short.products == 12
    for power in range(8):
        assert short.moment(power).value == pytest.approx(full.moment(power).value, rel=1e-10)
    assert short.moment(8).value != pytest.approx(full.moment(8).value, rel=1e-6)


def test_moments_of_the_density_lie_within_their_errors_of_the_truth():
    values = torch.linspace(-1, 2, 200) ** 3
    density = spectral_density(LinearOperator.from_matrix(with_spectrum(values)), 20, 40, generator=seeded())
    for power in (1, 2, 3, 4):
        estimate, exact = density.moment(power), float((values.double() ** power).mean())
        assert abs(estimate.value - exact) < 4 * estimate.error
    torch.testing.assert_close(density.weights.sum(1), torch.ones(40, dtype=torch.float64))


def test_the_density_integrates_to_one_and_shows_both_clusters():
    values = torch.cat([torch.zeros(90), torch.full((10,), 5.0)])
    density = spectral_density(LinearOperator.from_matrix(with_spectrum(values)), 10, 50, generator=seeded())
    grid = torch.linspace(-2, 7, 1801)
    height, error = density.density(grid, width=0.2)
    assert float(torch.trapezoid(height, grid)) == pytest.approx(1, abs=1e-6)
    upper = torch.trapezoid(height[grid > 2.5], grid[grid > 2.5])
    assert float(upper) == pytest.approx(0.1, abs=4 * math.sqrt(2 * 0.1 * 0.9 / 100 / 50))
    assert bool((error >= 0).all()) and float(error.max()) < float(height.max())
    assert density.products == 100  # two eigenvalues: each probe ends after two steps


def test_hutch_plus_plus_is_exact_for_low_rank_and_honest_otherwise():
    low = with_spectrum([5.0, 3.0, *[0.0] * 60])
    assert trace(LinearOperator.from_matrix(low), 9, generator=seeded()).value == pytest.approx(8, abs=1e-9)
    values = torch.linspace(1, 3, 300)
    op = LinearOperator.from_matrix(with_spectrum(values))
    estimates = [trace(op, 30, generator=seeded(s)) for s in range(100)]
    z = torch.tensor([(e.value - float(values.double().sum())) / e.error for e in estimates])
    assert abs(float(z.mean())) < 4 / math.sqrt(100) * float(z.std())
    assert 0.8 < float(z.std()) < 1.6  # a t distribution of nine degrees of freedom has 1.13
    assert trace(op, 300).error == 0 and trace(op, 300).value == pytest.approx(float(values.sum()), rel=1e-6)


def test_operators_speak_scipy():
    from scipy.sparse.linalg import eigsh

    matrix = with_spectrum(torch.linspace(-1, 4, 40))
    op = LinearOperator(lambda v: matrix @ v, 40, torch.float64)  # one vector at a time
    assert float(eigsh(op.to_scipy(), k=1, return_eigenvectors=False)[0]) == pytest.approx(4, rel=1e-9)
    np.testing.assert_allclose(op.to_scipy() @ np.eye(40), matrix.numpy(), atol=1e-12)
    torch.testing.assert_close(op.dense(), matrix)


def test_bad_arguments_are_named():
    op = LinearOperator.from_matrix(torch.eye(3))
    with pytest.raises(ArgumentError, match="k is 4"):
        top_eigenpairs(op, 4)
    with pytest.raises(ArgumentError, match="which is 'best'"):
        top_eigenpairs(op, which="best")
    with pytest.raises(ArgumentError, match="tol 0"):
        top_eigenpairs(op, tol=0)
    with pytest.raises(ArgumentError, match="probes 0"):
        spectral_density(op, probes=0)
    with pytest.raises(ArgumentError, match="products is 3"):
        trace(op, 3)
    with pytest.raises(ShapeError, match="length 3"):
        op @ torch.ones(2)
    with pytest.raises(DivergenceError, match="finite"):
        LinearOperator(lambda v: v / 0, 3) @ torch.zeros(3)


def test_an_estimate_prints_its_error():
    assert str(Estimate(6.1314, 0.02)) == "6.131 ± 0.02" and str(Estimate(3.0)) == "3"
    assert float(Estimate(2.5, 1)) == 2.5


@pytest.mark.parametrize("scale", [1e30, 1.0, 1e-30])
def test_float32_beyond_the_range_of_its_squares_is_no_trap(scale):
    matrix = (with_spectrum(torch.linspace(0.1, 1.0, 40)) * scale).float()
    result = top_eigenpairs(
        LinearOperator.from_matrix(matrix), tol=1e-3, generator=torch.Generator().manual_seed(0)
    )
    assert result.converged
    assert float(result.eigenvalues[0]) / scale == pytest.approx(1.0, rel=1e-3)
    assert 0 < float(result.residuals[0]) < 0.1 * scale


def test_float32_does_not_claim_what_rounding_forbids():
    op = LinearOperator.from_matrix(with_spectrum(torch.arange(1.0, 31.0)).float())
    with pytest.warns(ConvergenceWarning):
        result = top_eigenpairs(op, 2, tol=1e-10, generator=torch.Generator().manual_seed(0))
    assert not result.converged and bool((result.errors > 1e-7).all())
    assert bool(((result.eigenvalues - torch.tensor([30.0, 29.0])).abs() <= result.errors * 3).all())


def test_zero_eigenvalues_are_found_to_rounding_without_a_false_alarm():
    op = LinearOperator.from_matrix(with_spectrum([3.0] + [0.0] * 39))
    result = top_eigenpairs(op, 4, generator=torch.Generator().manual_seed(0))
    assert result.converged and result.products < 10
    assert result.eigenvalues.tolist() == pytest.approx([3.0, 0.0, 0.0, 0.0], abs=1e-13)
