"""Residual networks in the mean-field limit."""

import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.lu2020_mean_field import BUDGETS, Budget, permutation_cost, train

TINY = Budget(depths=(2, 8), seeds=1, epochs=1, long=1, permuted=4, batch=256, orders=1)


def test_a_tiny_run_gives_rows_and_a_figure(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told = []
    result = get("2003.05508").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    assert len(result.rows) == 6
    still = result.rows[-1]
    assert still.holds and 0.5 / 8 < still.measured < 2 / 8  # a rate of 1/L moves blocks 1/L as far
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_permutation_puts_the_blocks_back():
    net = train(4, 0, 1, TINY).net
    before = net.order
    accuracy, cost = permutation_cost(net, 3)
    assert net.order == before and 0 <= accuracy - cost <= 1


def test_training_with_swaps_leaves_a_permutation():
    net = train(6, 0, 1, TINY, swap=True).net
    assert sorted(net.order) == list(range(6)) and net.order != list(range(6))
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())
