"""Asynchronous SGD as a diffusion."""

from dataclasses import replace

import pytest
import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.an2018_asynchronous import BUDGETS, Race, ages, network_rows

TINY = replace(BUDGETS["small"], runs=500, steps=150, paths=6, samples=8, width=2, time=1.0)


def test_ages_are_geometric():
    drawn = ages((200_000,), 0.8, torch.Generator().manual_seed(0)).double()
    assert float(drawn.mean()) == pytest.approx(4.0, abs=4 * (0.8**0.5 / 0.2) / 200_000**0.5)
    assert float((drawn == 0).double().mean()) == pytest.approx(0.2, abs=0.004)


def test_a_tiny_run_gives_rows_a_figure_and_facts(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told = []
    result = get("1805.08244").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    exact = [row for row in result.rows if not row.claim.startswith("network")]
    assert len(exact) == 10 and [row.claim for row in exact if not row.holds] == []
    assert len(result.rows) == 12 and "its equation" in result.facts["gaps"]
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_gaps_are_judged_by_their_errors():
    fall, small = torch.tensor([2.0, 1.5, 1.0]), torch.full((3,), 0.01)

    def rows(own, plain, ball):
        gaps = {
            "stale runs": 0.0,
            "its equation": own,
            "equation without delay": plain,
            "averaged momentum": ball,
        }
        return network_rows(
            Race(torch.arange(3), {k: fall + g for k, g in gaps.items()}, dict.fromkeys(gaps, small))
        )

    assert [row.holds for row in rows(-0.02, -0.2, -0.2)] == [True, True]
    assert [row.holds for row in rows(-0.2, -0.02, 0.2)] == [False, False]
    assert [row.holds for row in rows(0.02, -0.02, 0.0)] == [None, None]
