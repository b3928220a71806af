from math import pi

import pytest
import torch
from torch import Tensor

from bolza.ops.gaussian import expectation, hermite_coefficients, mehler_sum, pair_expectation

Q = torch.logspace(-8, 4, 25, dtype=torch.float64)
C = torch.tensor([-1.0, -0.7, 0.0, 0.3, 0.95, 0.99999, 1.0], dtype=torch.float64)


def erf_cross(q_u: Tensor, q_v: Tensor, c: Tensor) -> Tensor:
    root = (1 + 2 * (q_u + q_v) + 4 * q_u * q_v * (1 - c) * (1 + c)).sqrt()
    return 2 / pi * torch.atan2(2 * c * (q_u * q_v).sqrt(), root)


def test_erf_moments_match_closed_forms_from_tiny_to_huge_variance() -> None:
    second = expectation(lambda h: torch.erf(h) ** 2, Q)
    slope = expectation(lambda h: (2 / pi**0.5 * torch.exp(-h * h)) ** 2, Q)
    one = torch.ones((), dtype=torch.float64)
    assert ((second / erf_cross(Q, Q, one) - 1).abs() < 1e-10).all()
    assert ((slope / (4 / pi / (1 + 4 * Q).sqrt()) - 1).abs() < 1e-10).all()


def test_gauss_hermite_would_fail_where_this_rule_does_not() -> None:
    """∫ sech⁴ at q = 100: 59 % off with 200 Hermite nodes; here against an independent fine sum in h."""
    q = torch.tensor(100.0, dtype=torch.float64)
    h = torch.linspace(-40, 40, 800_001, dtype=torch.float64)
    exact = torch.trapezoid(torch.cosh(h) ** -4 * torch.exp(-h * h / 200), h) / (2 * pi * 100) ** 0.5
    assert abs(expectation(lambda u: torch.cosh(u.clamp(-300, 300)) ** -4, q) / exact - 1) < 1e-12


def test_kinks_are_integrated_exactly() -> None:
    assert ((expectation(lambda h: h.relu() ** 2, Q, (0.0,)) / (Q / 2) - 1).abs() < 1e-13).all()
    a = Q.rsqrt()
    pdf = torch.exp(-a * a / 2) / (2 * pi) ** 0.5
    hard = Q * (torch.erf(a / 2**0.5) - 2 * a * pdf) + torch.erfc(a / 2**0.5)
    assert ((expectation(lambda h: h.clamp(-1, 1) ** 2, Q, (-1.0, 1.0)) / hard - 1).abs() < 1e-10).all()


def test_variances_beyond_every_grid_still_give_the_limit() -> None:
    q = torch.logspace(7, 40, 5, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    assert ((expectation(lambda h: torch.erf(h) ** 2, q) / erf_cross(q, q, one) - 1).abs() < 1e-12).all()


def test_infinite_variance_gives_nan_and_zero_variance_the_value_at_zero() -> None:
    q = torch.tensor([0.0, torch.inf, torch.nan])
    out = expectation(lambda h: torch.cos(h), q)
    assert out[0] == pytest.approx(1, abs=1e-15) and out[1:].isnan().all()


@pytest.mark.parametrize("q", [1e-8, 1e-3, 1.0, 30.0, 1e4])
def test_pairs_of_erf_match_the_arcsine(q: float) -> None:
    q_u = torch.tensor(q, dtype=torch.float64)
    c = C if q < 1e4 else C[1::2]
    mean = pair_expectation(lambda u, v: torch.erf(u) * torch.erf(v), q_u, 2 * q_u, c)
    assert ((mean - erf_cross(q_u, 2 * q_u, c)).abs() < 1e-10 * min(1, q)).all()


def test_pairs_of_relu_match_the_arc_cosine_kernel() -> None:
    q = torch.tensor([1e-8, 1.0, 1e4], dtype=torch.float64)[:, None]
    c = C[1:]
    exact = q * 2**0.5 * ((1 - c * c).sqrt() + c * (pi - torch.acos(c))) / (2 * pi)
    mean = pair_expectation(lambda u, v: u.relu() * v.relu(), q, 2 * q, c, (0.0,), (0.0,))
    assert ((mean - exact).abs() < 1e-9 * q).all()


def test_mehler_series_is_the_same_as_the_plane() -> None:
    q = torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64)
    a, b = hermite_coefficients(torch.tanh, q, 200), hermite_coefficients(torch.sigmoid, 1.5 * q, 200)
    c = torch.tensor([-0.8, 0.4, 0.9], dtype=torch.float64)
    plane = pair_expectation(lambda u, v: torch.tanh(u) * torch.sigmoid(v), q, 1.5 * q, c)
    assert ((mehler_sum(a, b, c) - plane).abs() < 1e-11).all()


def test_parseval_holds_for_a_function_with_a_kink() -> None:
    """Coefficients of ReLU: Σ a_k² → q/2 with a tail of order degree^(-3/2)."""
    q = torch.tensor([0.01, 3.0], dtype=torch.float64)
    left = [q / 2 - hermite_coefficients(torch.relu, q, d, (0.0,)).square().sum(-1) for d in (100, 400)]
    assert (left[0] > 0).all()
    assert torch.allclose(left[0] / left[1], torch.full_like(q, 8.0), rtol=0.05)


def test_shapes_and_devices_of_the_variances_are_kept() -> None:
    q = torch.ones(2, 3)
    assert expectation(torch.cos, q).shape == (2, 3)
    assert pair_expectation(lambda u, v: u * v, q, q[0], torch.tensor(0.5)).shape == (2, 3)
    assert hermite_coefficients(torch.cos, q, 4).shape == (2, 3, 5)
