"""The maximum principle at a saddle."""

import torch
from torch.nn import functional as F

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.li2018_msa import BUDGETS, DECAY, Budget, Flow, descend, minimise, problem

TINY = Budget(layers=4, sweeps=3, seeds=2, rates=(0.1, 1.0))


def test_descent_of_all_runs_at_once_is_that_of_each():
    together = descend(TINY, 5)
    for r, rate in enumerate(TINY.rates):
        for seed in range(TINY.seeds):
            net = Flow(TINY.layers, seed)
            alone = minimise(net, torch.optim.SGD(net.parameters(), rate, weight_decay=DECAY), 5)
            torch.testing.assert_close(together[r, seed], torch.tensor(alone), rtol=1e-4, atol=1e-6)


def test_the_start_is_a_saddle_whose_gradient_almost_vanishes_at_the_linear_map():
    x, y = problem()
    straight = (y * x).mean() / x.square().mean() * x
    assert abs(float(F.mse_loss(straight, y) / 2) - 0.1) < 0.01
    assert max(p.abs().max().item() for p in Flow(4, 0).parameters()) <= 0.005


def test_a_tiny_run_gives_rows_and_a_figure(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told = []
    result = get("li2018_msa").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    (row,) = (row for row in result.rows if "accept and reject" in row.claim)
    assert row.holds
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")
