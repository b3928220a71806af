"""Fourier modes, delta-orthogonal kernels, and a deep plain network that trains."""

import math

import pytest
import torch

from bolza.report import to_png
from bolza.studies import xiao2018_cnn
from bolza.studies.xiao2018_cnn import MODES, Budget, mode_decay, symbol

TINY = Budget(150, 2, 40, 12, 6, 25, 1, (1e-2,))


def test_every_mode_takes_its_factor_and_delta_orthogonal_kernels_keep_all():
    decay = mode_decay(TINY)
    for alpha, want in enumerate(MODES):
        assert (1 + 2 * math.cos(2 * math.pi * alpha / 8)) / 3 == pytest.approx(want, abs=1e-4)
        assert float(decay["gaussian"][1, alpha]) == pytest.approx(want, abs=0.1)
    assert torch.allclose(decay["delta_orthogonal"], torch.ones((), dtype=torch.float64), atol=1e-10)


def test_the_symbol_has_the_singular_values_of_the_circular_matrix():
    layer = torch.nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular", bias=False).double()
    basis = torch.eye(2 * 16, dtype=torch.float64).reshape(32, 2, 4, 4)
    dense = torch.linalg.svdvals(layer(basis).detach().flatten(1))
    assert torch.allclose(symbol(layer.weight.detach(), 4).flatten().sort().values, dense.sort().values)


def test_the_study_runs_and_its_exact_claims_hold(monkeypatch):
    monkeypatch.setitem(xiao2018_cnn.BUDGETS, "small", TINY)
    result = xiao2018_cnn.run()
    exact = [
        r for r in result.rows if "singular" in r.claim or "norm" in r.claim or "change a mode" in r.claim
    ]
    assert len(exact) == 3 and all(r.holds for r in exact)
    assert len(result.rows) == 11
    assert all(to_png(figure, dpi=40)[1:4] == b"PNG" for figure in result.figures)
