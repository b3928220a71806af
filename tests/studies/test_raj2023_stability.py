"""Stability of heavy-tailed SGD on least squares."""

from dataclasses import replace

import pytest
import torch

from bolza.report import to_png
from bolza.sde import regression_tails
from bolza.studies import raj2023_stability as study
from bolza.studies.raj2023_stability import BUDGETS, _gap, regression_chain


def test_every_row_holds_at_a_smaller_size(monkeypatch):
    tiny = replace(BUDGETS["small"], draws=40_000, paths=2000, repeats=12, chains=10_000, chain_steps=60)
    monkeypatch.setitem(BUDGETS, "small", tiny)
    result = study.run("small")
    assert [(row.claim, row.measured) for row in result.rows if row.holds is not True] == []
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_chains_are_sgd_on_fresh_data():
    lr, b, d = 0.2, 2, 3
    (x,) = regression_chain(lr, b, d, 1, 1, seed=0)
    generator = torch.Generator().manual_seed(0)
    a, y = torch.randn(1, b, d, generator=generator), torch.randn(1, b, generator=generator)
    theta = torch.zeros(d, requires_grad=True)
    ((a[0] @ theta - y[0]).square().mean() / 2).backward()
    assert float(x) == pytest.approx(float(-lr * theta.grad[0]), rel=1e-5)
    # exact stationary variance in one dimension, unit inputs and noise
    x = regression_chain(0.3, 4, 1, 20_000, 60, seed=1)
    exact = 0.3 / (4 * (2 - 0.3 * (1 + 2 / 4)))
    assert float(x.square().mean()) == pytest.approx(exact, rel=0.05)
    assert regression_tails(0.3, batch_size=4).index > 4  # so that the variance of the square is finite


def test_networks_with_stable_noise_are_measured():
    from bolza.data import digits

    data = digits()
    assert -1 < _gap(data, 2.0, 1e-4, 0, steps=30) < 3
