"""Population descent against random search, at a tiny size."""

import pytest
import torch

from bolza.controllers import PopDescent
from bolza.report import to_png
from bolza.studies import get, pomalapally2023_population
from bolza.studies.pomalapally2023_population import (
    BROAD,
    BUDGETS,
    SEARCHES,
    Budget,
    blind_rows,
    heavy_ball,
    mlp,
    mutation,
    parts,
    ratio,
    search,
)


def test_the_study_runs_and_what_does_not_depend_on_its_size_holds(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", Budget(seeds=2, rounds=3, steps=2))
    monkeypatch.setattr(pomalapally2023_population, "ADAM_STEPS", 20)
    result = get("pomalapally2023_population").run("small")
    assert len(result.rows) == 4 and result.rows[-1].holds is True
    assert len(result.facts["schedule"]) == 3
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_searches_spend_what_the_population_spends_and_learn_select_and_tell_apart():
    budget = Budget(seeds=1, rounds=2, steps=5)
    assert {search(budget, 0, BROAD, members=n).gradients for n in (None, *SEARCHES)} == {50}
    data, (x, y) = parts(0)
    rows = torch.cat([data.train_x, x, data.test_x])
    assert len(y) == len(data.train_y) == 300 and len(rows) == 1797
    assert len(rows.unique(dim=0)) >= 1795  # two images are in the set twice


def test_a_ratio_below_one_needs_lower_losses_and_mutations_are_measured_in_octaves():
    class Run:
        def __init__(self, loss):
            self.test_loss = loss

    found = {"population": [Run(0.2), Run(0.4)]} | {
        f"search of {n}": [Run(0.4 * n), Run(0.8 * n)] for n in SEARCHES
    }
    value, error, best = ratio(found, "population", "")
    assert value == pytest.approx(0.1) and error == pytest.approx(0, abs=1e-8) and best == "search of 5"
    Run.parents, Run.hyper = [[0, 0], [0, 0], [0, 1]], {"lr": [[0.1, 1.0], [0.1, 0.8], [0.1, 0.2]]}
    assert (mutation([Run(0.0)], 0), mutation([Run(0.0)], 1)) == pytest.approx((3.0, 1.0))
    assert not blind_rows({"1": 1.0, "100": 0.5})[0].holds


def test_the_network_and_its_optimizer_are_those_of_the_notes():
    sizes = [tuple(p.shape) for p in mlp().parameters() if p.ndim > 1]
    assert sizes == [(64, 64), (10, 64)]
    assert heavy_ball(mlp().parameters()).defaults["momentum"] == 0.9
    assert PopDescent.__init__.__kwdefaults__["mutation"] == 15.0
