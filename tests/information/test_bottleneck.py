"""The Gaussian bottleneck against its closed form, its optimality and plain covariances."""

import math

import pytest
import torch

from bolza.core.errors import ArgumentError, ShapeError
from bolza.information import canonical_correlations, gaussian_bottleneck, gaussian_projection


@pytest.mark.parametrize(
    ("beta", "gain", "about_x", "about_y"),
    [(2.0, 0.777778, 0.287682, 0.164252), (5.0, 6.111111, 0.980829, 0.399254)],
)
def test_the_scalar_case_has_its_known_values(beta, gain, about_x, about_y):
    found = gaussian_bottleneck(0.8, beta)
    assert float(found.gains) == pytest.approx(gain, abs=5e-7)
    assert float(found.input) == pytest.approx(about_x, abs=5e-7)
    assert float(found.output) == pytest.approx(about_y, abs=5e-7)
    assert float(found.ceiling) == pytest.approx(0.510826, abs=5e-7)


def test_nothing_is_kept_up_to_one_over_rho_squared():
    found = gaussian_bottleneck(0.8, torch.tensor([0.0, 1.0, 1.5625, 1.5626]))
    assert float(found.input[:3].max()) < 1e-14 and float(found.input[3]) > 0
    assert float(found.critical) == pytest.approx(1.5625)


@pytest.mark.parametrize("beta", [1.7, 2.0, 5.0, 40.0])
def test_no_other_gain_does_better(beta):
    rho2 = 0.64

    def cost(gain):
        about_x = 0.5 * math.log(1 + gain)
        return about_x - beta * (about_x - 0.5 * math.log(1 + gain * (1 - rho2)))

    best = float(gaussian_bottleneck(0.8, beta).gains)
    grid = [best * f for f in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0)]
    assert all(cost(best) < cost(other) for other in grid)


def test_the_curve_has_slope_one_over_beta_and_ends_at_the_ceiling():
    beta = torch.tensor([3.0, 3.0 + 1e-4], dtype=torch.float64)
    found = gaussian_bottleneck(torch.tensor([0.9, 0.7, 0.2]), beta)
    slope = float(found.output.diff() / found.input.diff())
    assert slope == pytest.approx(1 / 3, rel=1e-4)
    assert float(gaussian_bottleneck(0.8, 1e9).output) == pytest.approx(0.510826, abs=1e-6)


def test_directions_enter_one_by_one():
    found = gaussian_bottleneck(torch.tensor([0.9, 0.5]), torch.tensor([1.0, 2.0, 5.0]))
    assert (found.gains > 0).tolist() == [[False, False], [True, False], [True, True]]


def gaussian(n=3, m=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n + m, n + m, generator=generator, dtype=torch.float64)
    joint = root @ root.T
    return joint[:n, :n], joint[:n, n:], joint[n:, n:]


def test_the_projection_holds_the_information_of_the_closed_form():
    x, xy, y = gaussian()
    beta = 6.0
    a = gaussian_projection(x, xy, y, beta)
    t = a @ x @ a.T + torch.eye(len(a))
    given_y = t - a @ xy @ torch.linalg.solve(y, xy.T) @ a.T
    found = gaussian_bottleneck(canonical_correlations(x, xy, y), beta)
    assert len(a) == int((found.gains > 0).sum()) > 0
    assert float(0.5 * torch.logdet(t)) == pytest.approx(float(found.input), abs=1e-10)
    about_y = 0.5 * (torch.logdet(t) - torch.logdet(given_y))
    assert float(about_y) == pytest.approx(float(found.output), abs=1e-10)


def test_canonical_correlations_do_not_depend_on_the_units():
    x, xy, y = gaussian()
    scale = torch.tensor([10.0, 0.1, 3.0])
    other = canonical_correlations(scale[:, None] * x * scale, scale[:, None] * xy, y)
    torch.testing.assert_close(other, canonical_correlations(x, xy, y))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: gaussian_bottleneck(1.0, 2.0), ArgumentError, "correlations"),
        (lambda: gaussian_bottleneck(0.5, -1.0), ArgumentError, "beta"),
        (
            lambda: canonical_correlations(torch.eye(2), torch.ones(3, 1), torch.eye(1)),
            ShapeError,
            r"cov_x \(2, 2\)",
        ),
        (
            lambda: canonical_correlations(torch.zeros(1, 1), torch.ones(1, 1), torch.eye(1)),
            ArgumentError,
            "positive",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_covariances_that_cannot_be_are_refused():
    one = torch.eye(2)
    with pytest.raises(ArgumentError, match="the correlation 2, above 1"):
        canonical_correlations(one, 2 * one, one)
    with pytest.raises(ArgumentError, match="cov_x holds numbers that are not finite"):
        canonical_correlations(one * math.nan, one, one)
    with pytest.raises(ShapeError):
        canonical_correlations(torch.zeros(0, 0), torch.zeros(0, 0), torch.zeros(0, 0))


@pytest.mark.parametrize("beta", [math.inf, math.nan, -1.0])
def test_a_price_that_is_no_number_is_refused(beta):
    with pytest.raises(ArgumentError, match="must be finite and not negative"):
        gaussian_bottleneck(0.5, beta)
