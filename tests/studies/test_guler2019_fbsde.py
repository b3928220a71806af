"""Parabolic equations in a hundred dimensions."""

import math

import pytest

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.guler2019_fbsde import (
    BUDGETS,
    Budget,
    Training,
    barenblatt,
    gain_row,
    radial_allen_cahn,
    value_row,
)

SHORT = Training(dim=4, steps=4, paths=8, iterations=4, width=8, depth=2)
TINY = Budget(
    barenblatt=SHORT, control=SHORT, allen_cahn=SHORT, nets=SHORT, free=SHORT, samples=2000, net_seeds=2
)


def test_the_exact_value_in_dimension_100_is_the_known_one():
    assert barenblatt(100)[1] == pytest.approx(77.1049, abs=5e-5)


def test_the_radial_reference_does_not_depend_on_its_grid():
    coarse, fine = (
        radial_allen_cahn(20, 0.3, points=121, steps=20),
        radial_allen_cahn(20, 0.3, points=241, steps=40),
    )
    assert coarse == pytest.approx(fine, rel=2e-3)
    assert 0.25 < fine < 0.5


def test_without_diffusion_the_radial_reference_is_the_reaction_alone():
    """A state constant in space follows u' = u − u³ from ½."""
    assert radial_allen_cahn(1, 1e-9, points=41, steps=1) == pytest.approx(0.5, abs=1e-6)
    late = 0.5 / math.sqrt(0.25 + 0.75 * math.exp(-0.6))
    assert radial_allen_cahn(1, 0.3, points=81, radius=400.0) == pytest.approx(late, rel=0.02)


def test_a_value_off_by_two_percent_does_not_hold():
    assert value_row("", 1.0, 0.0, [1.0, 1.02]).holds is False
    assert value_row("", 1.0, 0.0, [1.0, 0.995]).holds is True


def test_a_gain_is_judged_to_a_quarter_and_open_where_the_seeds_scatter_by_more():
    assert gain_row(4.6, 4.59, [4.591, 4.5905]).holds is True
    assert gain_row(4.6, 4.59, [4.6, 4.6]).holds is False
    assert gain_row(4.6, 4.59, [4.58, 4.612]).holds is None


def test_a_tiny_run_gives_rows_figures_and_facts(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told = []
    result = get("1910.11623").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    assert len(result.rows) == 8 and len(result.facts["nets"]) == 3
    for figure in result.figures:
        assert to_png(figure, dpi=40).startswith(b"\x89PNG")
