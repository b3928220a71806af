"""The tables of the review, and the facts about ReLU, erf and dropout beside them."""

import time
from functools import cache

import numpy as np
import pytest
import torch

from bolza.core.errors import ArgumentError
from bolza.meanfield.critical import critical_weight_var
from bolza.meanfield.fixed_point import correlation_map, fixed_point, length_map

# σ_w², q*, χ_q, ξ_q, χ_1, c*, χ_c, ξ_c, 1/|log χ_1| at σ_b² = 0.05, as printed
TANH = """
1.00 0.193593 0.564280 1.7476 0.759032 1        0.759032 3.6270  3.6270
1.25 0.292054 0.573827 1.8004 0.863240 1        0.863240 6.7998  6.7998
1.50 0.418037 0.551983 1.6828 0.938636 1        0.938636 15.7910 15.7910
1.70 0.533076 0.526374 1.5583 0.986741 1        0.986741 74.918  74.918
1.80 0.594132 0.512934 1.4979 1.008223 0.950411 0.992081 125.78  122.11
2.00 0.721762 0.486522 1.3880 1.047666 0.744082 0.961115 25.2134 21.4754
2.25 0.889425 0.455864 1.2730 1.092338 0.567225 0.935990 15.1171 11.3224
2.50 1.063958 0.428464 1.1799 1.133516 0.446804 0.918717 11.7956 7.9793
3.00 1.428008 0.382820 1.0415 1.208934 0.299318 0.895405 9.0515  5.2704
4.00 2.195494 0.318195 0.8733 1.342402 0.165065 0.866528 6.9803  3.3960
"""


def printed(text: str) -> tuple[float, float]:
    """A number and half a unit of its last printed digit."""
    digits = len(text.partition(".")[2])
    return float(text), 0.5001 * 10.0**-digits


@pytest.mark.parametrize("row", TANH.split("\n")[1:-1])
def test_tanh_table_to_every_printed_digit(row: str) -> None:
    weight, *columns = row.split()
    point = fixed_point("tanh", float(weight), 0.05)
    fields = ("q", "chi_q", "xi_q", "chi_1", "c", "chi_c", "xi_c", "xi_grad")
    for name, text in zip(fields, columns, strict=True):
        value, half_unit = printed(text)
        assert abs(float(getattr(point, name)) - value) <= (half_unit if text != "1" else 0), name
    assert point.regime == ("ordered" if float(weight) < 1.76 else "chaotic")


@pytest.mark.parametrize(
    ("weight", "bias", "expected"),
    [
        (1.69, 0.09, {"q": "0.607047", "chi_1": "0.939807", "xi_c": "16.1082"}),
        (6.25, 0.09, {"q": "4.079124", "c": "0.122104", "chi_1": "1.585225", "xi_c": "5.1089"}),
        (16, 0.09, {"q": "12.604149", "c": "0.029696", "chi_1": "2.367261", "xi_c": "3.6394"}),
        (4, 0, {"q": "2.121474", "c": "0.0000000000", "chi_1": "1.362673", "xi_c": "7.9796"}),
    ],
)
def test_other_tanh_points(weight: float, bias: float, expected: dict[str, str]) -> None:
    point = fixed_point("tanh", weight, bias)
    for name, text in expected.items():
        value, half_unit = printed(text)
        assert abs(float(getattr(point, name)) - value) <= half_unit, name


def test_depth_scale_diverges_with_the_reviews_constant_on_both_sides() -> None:
    critical = float(critical_weight_var("tanh", 0.05))
    for distance in (1e-4, 1e-6, 1e-8):
        for side in (-1, 1):
            xi = float(fixed_point("tanh", critical + side * distance, 0.05).xi_c)
            assert xi * distance == pytest.approx(4.6908, abs=2e-3)


def test_exactly_on_the_line_correlations_close_and_the_scale_is_infinite() -> None:
    point = fixed_point("tanh", 1.0, 0.0)
    assert (point.q, point.c, point.regime) == (0, 1, "critical")
    assert torch.isinf(point.xi_c)
    assert fixed_point("tanh", 1.760955, 0.05).regime == "critical"  # to the digits that are printed


@pytest.mark.parametrize(("t", "value"), [(500, 6.3017), pytest.param(2000, 6.2193, marks=pytest.mark.slow)])
def test_smooth_activations_approach_criticality_like_one_over_t(t: int, value: float) -> None:
    assert float(t * (1 - critical_course()[t])) == pytest.approx(value, abs=6e-5)


@cache
def critical_course() -> torch.Tensor:
    """Correlation over 2,000 layers of tanh on the critical line, from 0."""
    weight = float(critical_weight_var("tanh", 0.05))
    q = float(fixed_point("tanh", weight, 0.05).q)
    *_, c = correlation_map("tanh", weight, 0.05, q, q, 0.0, 2000)
    return c


def test_relu_approaches_criticality_like_one_over_t_squared() -> None:
    *_, c = correlation_map("relu", 2.0, 0.0, 1.0, 1.0, 0.0, 1000)
    assert [round(float(c[t]), 6) for t in (1, 2, 3, 5, 10)] == [
        0.318310,
        0.493731,
        0.604826,
        0.735946,
        0.871536,
    ]
    assert float(1e6 * (1 - c[1000])) == pytest.approx(43.13, abs=0.005)


def test_relu_facts() -> None:
    he = fixed_point("relu", 2.0, 0.0, q0=torch.tensor([0.25, 7.0]))
    assert he.q.tolist() == [0.25, 7.0] and (he.chi_1 == 1).all() and (he.regime == "critical").all()
    point = fixed_point("relu", torch.tensor([1.5, 1.0]), torch.tensor([0.1, 0.5]))
    assert point.q.tolist() == pytest.approx([0.4, 1.0], abs=1e-7)  # the inputs are float32
    assert point.xi_c.tolist() == pytest.approx([3.47606, 1.442695], abs=1e-5)
    assert (point.c == 1).all()
    grown = fixed_point("relu", 2.5, 0.1)
    assert torch.isinf(grown.q) and grown.regime == "chaotic" and grown.c == 1 and torch.isinf(grown.xi_c)


def test_erf_and_linear_facts() -> None:
    point = fixed_point("erf", 1.5, 0.0)
    assert abs(point.q - 0.5) < 1e-14 and abs(point.chi_1 - 1.102658) < 5e-7
    assert fixed_point("linear", 0.7, 0.3).chi_1 == pytest.approx(0.7)
    assert float(fixed_point("linear", 0.7, 0.3).q) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("keep", "xi", "c"),
    [(0.99, "14.48", "0.765783"), (0.95, "6.775", "0.509403"), (0.9, "4.667", "0.356414")],
)
def test_dropout_destroys_the_critical_point(keep: float, xi: str, c: str) -> None:
    point = fixed_point("tanh", 1.760955, 0.05, keep_prob=keep)
    for value, text in ((point.xi_c, xi), (point.c, c)):
        number, half_unit = printed(text)
        assert abs(float(value) - number) <= half_unit
    assert point.q == pytest.approx({0.99: 0.580982}.get(keep, float(point.q)), abs=6e-7)


def test_length_map_runs_into_the_fixed_point() -> None:
    q = length_map("tanh", torch.tensor([1.0, 4.0]), 0.05, 0.8, 60)
    assert q.shape == (61, 2)
    assert torch.allclose(q[-1], fixed_point("tanh", torch.tensor([1.0, 4.0]), 0.05).q, rtol=1e-12)


def test_correlation_map_runs_into_the_stable_fixed_point_from_both_sides() -> None:
    *_, c = correlation_map("tanh", 3.0, 0.05, 1.4, 1.4, torch.tensor([0.0, 0.99]), 150)
    assert torch.allclose(c[-1], fixed_point("tanh", 3.0, 0.05).c.expand(2), atol=1e-6)


def test_correlations_of_the_review_layer_by_layer() -> None:
    *_, c = correlation_map("tanh", 1.5, 0.05, 0.8, 0.8, 0.6, 17)
    assert [round(float(c[t]), 4) for t in (1, 5, 9, 13, 17)] == [0.6129, 0.7156, 0.7978, 0.8536, 0.8922]


@pytest.mark.parametrize("name", ["gelu", "silu", "elu", "hardtanh", "softsign", "sigmoid"])
def test_any_activation_solves_both_equations(name: str) -> None:
    weight = torch.tensor([0.5, 1.5, 3.0])
    point = fixed_point(name, weight, 0.1)
    ok = torch.isfinite(point.q)
    q, c, w = point.q[ok], point.c[ok], weight.double()[ok]
    *_, after = correlation_map(name, w, torch.tensor(0.1), q, q, c, 1)
    assert torch.allclose(length_map(name, w, torch.tensor(0.1), q, 1)[-1], q, rtol=1e-11)
    assert torch.allclose(after[-1], c, atol=1e-7)


def test_which_fixed_point_of_two_is_found_depends_on_the_start() -> None:
    """GELU between σ_w² = 2 and 4: signals below an unstable point die, those above explode."""
    point = fixed_point("gelu", 3.0, 0.0, q0=torch.tensor([1e-3, 10.0]))
    assert point.q[0] == 0 and torch.isinf(point.q[1])


def test_a_phase_diagram_is_one_fast_call() -> None:
    weight, bias = torch.linspace(0.5, 3, 50)[:, None], torch.linspace(0, 0.25, 50)
    start = time.process_time()
    diagram = fixed_point("tanh", weight, bias)
    assert time.process_time() - start < 2.5  # 0.25 s on a quiet machine
    assert diagram.q.shape == diagram.regime.shape == (50, 50)
    assert set(np.unique(diagram.regime)) == {"ordered", "chaotic"}
    line = critical_weight_var("tanh", bias)
    assert ((weight > line) == torch.from_numpy(diagram.regime == "chaotic")).all()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match="weight_var is -1"):
        fixed_point("tanh", -1.0)
    with pytest.raises(ArgumentError, match="bias_var is nan"):
        fixed_point("tanh", 1.0, float("nan"))
    with pytest.raises(ArgumentError, match="keep_prob"):
        fixed_point("tanh", 1.0, keep_prob=0.0)
    with pytest.raises(ArgumentError, match="do not broadcast"):
        fixed_point("tanh", torch.ones(2), torch.ones(3))
    with pytest.raises(ArgumentError, match="c is 1.5"):
        correlation_map("tanh", 1.0, 0.0, 1.0, 1.0, 1.5, 3)
