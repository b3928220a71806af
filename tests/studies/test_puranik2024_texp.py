"""Filters that compete: the posterior, the reward alone, and the claims that a small budget can bear."""

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.puranik2024_texp import BUDGETS, Budget, network


def test_the_study_runs_and_what_needs_no_long_training_holds(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", Budget(seeds=1, epochs=1))
    result = get("puranik2024_texp").run("small")
    assert all(row.holds for row in result.rows[:7])
    rows = {row.claim: row for row in result.rows}
    assert rows["tilted, t = 1: accuracy at noise 0"].measured > 0.5
    assert rows["tilted, t = 1 less batch norm, accuracy at noise 0.2"].holds is None
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_the_networks_differ_in_their_first_layer_only():
    count = {
        name: sum(p.numel() for p in network(name, 0)[-7:].parameters())
        for name in ("batch norm", "layer norm", "tilted, t = 3")
    }
    assert len(set(count.values())) == 1
    assert network("tilted, t = 3", 0)[0].tilt == 3 and network("tilted, no reward", 0)[0].tilt == 1
