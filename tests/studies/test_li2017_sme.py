"""Stochastic modified equations of SGD."""

from dataclasses import replace

import pytest
import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.li2017_sme import BUDGETS, KINDS, Course, Race, network_rows

TINY = replace(BUDGETS["small"], paths=6, samples=8, width=2, time=1.6)


def made(first, second, error=0.01):
    """A race whose equations are off by so much at every time."""
    still = torch.full((3,), error / 2**0.5)
    fall = torch.tensor([2.0, 1.5, 1.0], dtype=torch.float64)
    gaps = dict(zip(KINDS, (first, second, 0.0, -0.5), strict=True))
    return Race(torch.arange(3), Course(fall, still), {k: Course(fall + g, still) for k, g in gaps.items()})


def test_a_tiny_run_gives_rows_a_figure_and_facts(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told = []
    result = get("li2017_sme").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    exact = [row for row in result.rows if not row.claim.startswith("network")]
    assert len(exact) == 14 and all(row.holds for row in exact)
    assert len(result.rows) == 15 and set(result.facts["gaps"]["0.4"]) == set(KINDS)
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_a_gap_is_judged_by_its_error():
    (row,) = network_rows({0.4: made(-0.1, 0.02)})
    assert row.measured == pytest.approx(0.08) and row.holds
    assert network_rows({0.4: made(0.02, 0.1)})[0].holds is False
    assert network_rows({0.4: made(0.02, 0.021)})[0].holds is None


def test_gaps_that_do_not_fall_with_the_rate_as_they_should_are_told():
    good = network_rows({0.8: made(0.4, 0.32), 0.4: made(0.2, 0.08)})[2:]
    assert [row.measured for row in good] == pytest.approx([0.0, 0.0], abs=1e-6) and all(
        row.holds for row in good
    )
    bad = network_rows({0.8: made(0.4, 0.32), 0.4: made(0.19, 0.14)})[2:]
    assert [row.holds for row in bad] == [True, False]
    assert network_rows({0.8: made(0.4, 0.1), 0.4: made(0.2, 0.01)})[3].holds is None
