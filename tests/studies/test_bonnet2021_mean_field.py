"""Training by a mean-field maximum principle."""

import pytest
import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.bonnet2021_mean_field import BUDGETS, Budget, clusters, contraction, rate_rows

TINY = Budget(
    samples=20, steps=3, weights=(0.5, 2.0), iterations=12, sizes=(20, 160), seeds=2, population=200
)


def test_clusters_lie_within_a_fifth_of_one_and_keep_the_sign_of_their_targets():
    x, y = clusters(1000, 0)
    assert float((x - y / 2).abs().max()) <= 0.2
    assert float((x - y / 2).mean()) == pytest.approx(0, abs=0.02)
    # a normal law cut at one deviation has the variance σ²(1 − 2φ(1)/(2Φ(1) − 1)) = 0.2911 σ²
    assert float((x - y / 2).var()) == pytest.approx(0.04 * 0.2911, rel=0.1)


def test_quantiles_have_the_moments_of_the_law():
    x, y = clusters(2000, None)
    side = (x - y / 2) * y / 2
    assert float(side.mean()) == pytest.approx(0, abs=1e-12)
    assert float(side.var(correction=0)) == pytest.approx(0.04 * 0.29112, rel=1e-4)


def test_the_factor_of_a_geometric_series_is_found():
    assert contraction(tuple(0.5**k for k in range(12))) == pytest.approx(0.5)


def test_the_exponent_of_a_known_law_is_found_within_its_error():
    draw = torch.Generator().manual_seed(0)
    gaps = {n: torch.randn(60, generator=draw, dtype=torch.float64).abs() / n**0.5 for n in (20, 80, 320)}
    row = rate_rows(gaps)[0]
    assert row.holds and abs(row.measured + 0.5) < 3 * row.error < 0.3
    slow = rate_rows({n: g * n**0.4 for n, g in gaps.items()})[0]
    assert slow.holds is False


def test_a_tiny_run_gives_rows_figures_and_facts(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told = []
    result = get("2107.08707").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    assert all(row.holds for row in result.rows if "exponent" not in row.claim)
    assert len(result.facts["theta"]) == 3
    for figure in result.figures:
        assert to_png(figure, dpi=40).startswith(b"\x89PNG")
