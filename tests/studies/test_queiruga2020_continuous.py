"""Train at one depth, run at any."""

import pytest

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.queiruga2020_continuous import BUDGETS, Budget


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", Budget(seeds=1, epochs=3, batch=128, finest=8))


def test_a_tiny_run_tells_euler_from_runge_kutta(tiny):
    told = []
    result = get("2008.02389").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    drop = {row.claim.split(":")[0]: row.measured for row in result.rows}
    change = result.facts["change"]
    assert change["rk4"][0][8] < 0.2 * change["euler"][0][8]
    assert drop["trained by RK4"] <= 0.02
    exact = next(row for row in result.rows if row.claim.startswith("refinement changes"))
    assert exact.measured == 0.0 and exact.holds
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")
