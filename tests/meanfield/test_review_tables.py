"""Reference values of the theory that no other file holds, to the digits printed; and the two oracles."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bolza.meanfield import correlation_map, critical_line, fixed_point, residual_map, resolve_activation

ORACLE = json.loads((Path(__file__).parent / "data" / "tanh_depth_scales.json").read_text())


def test_depth_scales_of_tanh_match_arbitrary_precision_to_eight_digits() -> None:
    rows = ORACLE["rows"]
    assert [row["k"] for row in rows] == list(range(50))
    weight = 1 + 3 * torch.arange(50, dtype=torch.float64) / 49
    start = time.process_time()
    point = fixed_point("tanh", weight, 0.05)
    assert time.process_time() - start < 3.0  # 0.05 s on a quiet core; the bar is 0.3 s
    for name, tolerance in (("q", 1e-13), ("c", 1e-11), ("xi_c", 1e-8)):
        want = torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)
        assert ((getattr(point, name) / want - 1).abs() < tolerance).all(), name


def test_beside_the_critical_line_the_depth_scale_is_what_iterating_misses() -> None:
    """176.65 at σ_w² = 1.7347, where 300 iterations of the map stop at 124."""
    assert float(fixed_point("tanh", 1.7347, 0.05).xi_c) == pytest.approx(176.65, abs=0.01)
    q = fixed_point("tanh", 1.7347, 0.05).q
    *_, c = correlation_map("tanh", 1.7347, 0.05, q, q, 0.6, 300)
    assert 1 - float(c[-1]) > 1e-3  # still far from c* = 1


def test_erf_by_quadrature_is_erf_in_closed_form() -> None:
    """The oracle of everything that integrates: all fields, from order through the line into chaos."""
    erf = resolve_activation("erf")
    quadrature = replace(erf, name="erf by quadrature", closed=None)
    weight = torch.linspace(0.3, 6, 12, dtype=torch.float64)[:, None]
    bias = torch.tensor([0.0, 0.05, 3.0], dtype=torch.float64)
    exact, found = fixed_point(erf, weight, bias), fixed_point(quadrature, weight, bias)
    for name in ("q", "c", "chi_q", "chi_1", "chi_c"):
        assert ((getattr(found, name) - getattr(exact, name)).abs() < 1e-12).all(), name
    q = torch.logspace(-8, 6, 29, dtype=torch.float64)
    for name in ("second", "slope", "second_rate"):
        assert torch.allclose(getattr(quadrature, name)(q), getattr(erf, name)(q), rtol=1e-12, atol=0), name
    c, q = torch.tensor([-1, -0.9, 0.2, 0.99, 1.0], dtype=torch.float64), q[4:22:6, None]
    for name, size in (("cross", "second"), ("cross_slope", "slope")):
        gap = (getattr(quadrature, name)(q, q, c) - getattr(erf, name)(q, q, c)) / getattr(erf, size)(q)
        assert (gap.abs() < 1e-12).all(), name


@pytest.mark.parametrize(("bias", "weight", "q"), [(0.2, 2.2851525, 1.1644963), (0.3, 2.5051272, 1.4611695)])
def test_more_points_of_the_critical_line(bias: float, weight: float, q: float) -> None:
    line = critical_line("tanh", bias_var=bias)
    assert float(line.weight_var) == pytest.approx(weight, abs=6e-8)
    assert float(line.q) == pytest.approx(q, abs=6e-8)


def test_the_row_between_the_rows() -> None:
    point = fixed_point("tanh", 1.3, 0.05)
    for name, value in (("q", 0.315316), ("chi_1", 0.880164)):
        assert float(getattr(point, name)) == pytest.approx(value, abs=6e-7)
    assert float(point.xi_c) == pytest.approx(7.8341, abs=6e-5)
    assert float(point.xi_q) == pytest.approx(1.7852, abs=6e-5)


@pytest.mark.parametrize(("bias", "kappa"), [(0.05, "6.1711"), (0.2, "2.5872")])
def test_kappa_of_smooth_activations_on_the_line(bias: float, kappa: str) -> None:
    """κ = 2/C''(1) and C''(1) = σ_w² q* E φ''²: each layer adds 1/κ to 1/(1 - c)."""
    line = critical_line("tanh", bias_var=bias)
    second = float(line.weight_var * line.q * resolve_activation("tanh").curvature(line.q))
    assert f"{2 / second:.4f}" == kappa
    if bias == 0.05:
        assert round(second, 6) == 0.324090
    *_, c = correlation_map("tanh", line.weight_var, bias, line.q, line.q, 1 - float(kappa) / 1000, 50)
    assert 50 / float(1 / (1 - c[-1]) - 1 / (1 - c[0])) == pytest.approx(float(kappa), rel=0.01)


@pytest.mark.slow
def test_relu_on_the_line_falls_like_one_over_the_square_of_depth() -> None:
    *_, c = correlation_map("relu", 2.0, 0.0, 1.0, 1.0, 0.0, 10_000)
    assert round(float(1e8 * (1 - c[-1])), 2) == 44.25
    assert 9 * math.pi**2 / 2 == pytest.approx(44.413, abs=5e-4)


def test_relu_away_from_the_line() -> None:
    point = fixed_point(
        "relu", torch.tensor([1.5, 1.0], dtype=torch.float64), torch.tensor([0.1, 0.5]).double()
    )
    assert torch.allclose(point.chi_q, point.chi_1) and point.chi_1.tolist() == [0.75, 0.5]
    assert float(point.xi_c[0]) == pytest.approx(1 / math.log(4 / 3), rel=1e-12)
    assert round(float(point.xi_c[1]), 6) == 1.442695


@pytest.mark.parametrize(("keep", "c"), [(0.99, ".7658"), (0.95, ".5094"), (0.9, ".3564")])
def test_dropout_at_the_exact_critical_point(keep: float, c: str) -> None:
    point = fixed_point("tanh", 1.7609546, 0.05, keep_prob=keep)
    assert f"{float(point.c):.4f}"[1:] == c
    assert float(point.chi_1) < 1 < float(point.chi_1) / keep < 1.2  # angles still move, gradients grow


@pytest.mark.slow
def test_gradients_of_residual_tanh_grow_with_the_root_of_depth() -> None:
    """Σ log χ over √t at t = 4,000, by the sum over blocks; its limit is 8 σ_w / 3√(2π).

    Lengths do not know of correlations, which take half of the time: the same sum without them equals the map after
    400 blocks, and goes on to 4,000.
    """
    weight = torch.tensor([1.0, 2.0], dtype=torch.float64)
    orbit = residual_map("tanh", weight, 0.0, depth=400, c0=1.0, out_weight_var=None)
    act, p, gain = resolve_activation("tanh"), torch.ones_like(weight), torch.zeros_like(weight)
    for t in range(4000):
        if t == 400:
            torch.testing.assert_close(orbit.log_gain[-1], gain, rtol=1e-12, atol=0)
            torch.testing.assert_close(orbit.p[-1], p, rtol=1e-12, atol=0)
        gain, p = gain + torch.log1p(weight * act.slope(weight * p)), p + act.second(weight * p)
    ratio = gain / 4000**0.5
    assert [round(float(r), 3) for r in ratio] == [1.080, 1.496]
    limit = [8 / (3 * math.sqrt(2 * math.pi)) * w**0.5 for w in (1, 2)]
    assert [round(v, 4) for v in limit] == [1.0638, 1.5045]
    assert ratio.tolist() == pytest.approx(limit, rel=0.02)
    assert float(p[0]) / 4000 == pytest.approx(1, abs=0.05)


def test_a_phase_diagram_is_one_call_and_has_a_stable_correlation_everywhere() -> None:
    """benchmarks/meanfield.py times 200 × 200."""
    weight = torch.linspace(0.5, 4, 50, dtype=torch.float64)[:, None]
    diagram = fixed_point("tanh", weight, torch.linspace(0, 0.5, 50, dtype=torch.float64))
    assert torch.isfinite(diagram.q).all() and ((diagram.c >= 0) & (diagram.c <= 1)).all()
    assert (diagram.chi_c <= 1 + 1e-12).all()
