"""Tilted losses: closed forms, and the claims that a small budget can bear."""

import pytest

from bolza.report import to_png
from bolza.studies import get
from bolza.studies._tilted import split, with_wrong_labels
from bolza.studies.li2023_tilted import BUDGETS, Budget, fit


@pytest.mark.filterwarnings("ignore:the tilt")  # four epochs raise it too fast
def test_the_study_runs_and_the_closed_forms_hold(monkeypatch):
    small = Budget(seeds=1, epochs=4, descent=100, fits=1, fit_steps=100)
    monkeypatch.setitem(BUDGETS, "small", small)
    result = get("li2023_tilted").run("small")
    rows = {row.claim: row for row in result.rows}
    exact = [row for claim, row in rows.items() if claim.startswith(("minimisers", "R_t", "bias"))]
    assert len(exact) == 5 and all(row.holds for row in exact)
    assert rows["rare class: the largest training loss falls as t grows"].holds
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_a_tilted_fit_is_not_moved_by_outliers_that_ruin_the_squared_loss():
    errors = {name: fit(name, 0, 150) for name in ("squared", "tilted, t = −2")}
    assert errors["tilted, t = −2"] < 0.6 * errors["squared"]


def test_the_split_is_random_and_the_share_of_wrong_labels_exact():
    x, y, test_x, _ = split(0)
    assert len(x) == 1200 and len(test_x) == 597 and 0 <= float(x.min()) and float(x.max()) == 1
    assert not bool((split(1)[1] == y).all())
    assert abs(float((with_wrong_labels(y, 0.4, 0) != y).double().mean()) - 0.4) < 1e-9
