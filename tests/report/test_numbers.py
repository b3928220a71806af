"""Numbers as people read them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bolza.report import number, plus_minus, sparkline


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1.00"),
        (0.0629, "0.0629"),
        (1234.5, "1230"),
        (99999.0, "1.00×10⁵"),
        (-2.5e-7, "−2.50×10⁻⁷"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "not a number"),
        (None, "–"),
        (1438, "1438"),
    ],
)
def test_a_number_has_three_figures_and_no_letter_e(value, text):
    assert number(value) == text


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_a_number_read_back_is_right_to_half_a_unit_of_its_last_figure(value):
    text = number(value).replace("−", "-")
    if "×10" in text:
        mantissa, exponent = text.split("×10")
        back = float(f"{mantissa}e{exponent.translate(str.maketrans('⁻⁰¹²³⁴⁵⁶⁷⁸⁹', '-0123456789'))}")
    else:
        back = float(text)
    assert abs(back - value) <= 0.00501 * abs(value)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.23456, 0.0123, "1.235 ± 0.012"),
        (2500.0, 130.0, "2500 ± 130"),
        (1.2345e-9, 3e-11, "(1.234 ± 0.030)×10⁻⁹"),
        (5.0, 0.0, "5.00"),
        (5.0, math.nan, "5.00"),
        (None, 0.1, "–"),
        (50, None, "50"),
    ],
)
def test_an_error_keeps_two_figures_and_sets_those_of_the_value(value, error, text):
    assert plus_minus(value, error) == text


def test_a_sparkline_shows_gaps_and_keeps_its_width():
    assert sparkline([1.0, None, 3.0]) == "▁ █"
    assert len(sparkline(list(range(1000)), width=40)) == 40
    assert sparkline([]) == ""
    assert sparkline([2.0, 2.0]) == "▄▄"
