"""Moments of gradient and position: plain averages at first, and the test of a slope."""

import numpy as np
import pytest
import torch
from scipy.stats import linregress

from bolza.controllers.entry_moments import observe_, slope

F = torch.float64


def seen(gradients, positions, beta):
    rows, scratch = torch.zeros(5, gradients.shape[1], dtype=F), torch.empty(7, gradients.shape[1], dtype=F)
    for k, (g, x) in enumerate(zip(gradients, positions, strict=True), 1):
        w = observe_(rows, g, x, k, beta, scratch[:4])
    return rows, w, scratch[4:]


def test_first_moments_are_plain_averages_and_the_slope_is_tested_like_a_regression():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(12, 40, generator=draw, dtype=F)
    g = 0.5 * x + torch.randn(12, 40, generator=draw, dtype=F)
    rows, w, scratch = seen(g, x, (0.999, 0.999))  # a memory far longer than the run: w = 1/k
    np.testing.assert_allclose(rows[0], g.mean(0))
    np.testing.assert_allclose(rows[2], g.var(0, correction=0))
    fits = [linregress(x[:, i], g[:, i]) for i in range(40)]
    for z in (0.0, 1.0, 2.5):
        # n = 2/w − 1 counts an average over k as 2k − 1: what an exponential memory of weight w is worth
        n = 2 * 12 - 1
        told = [abs(f.rvalue) * ((n - 2) / (1 - f.rvalue**2)) ** 0.5 > z for f in fits]
        curvature, sure = slope(rows, w, z, scratch)
        np.testing.assert_allclose(curvature, [f.slope for f in fits])
        assert sure.tolist() == [float(t) for t in told]
        assert 0 < sum(told) <= 40


@pytest.mark.parametrize(("g", "x"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_what_never_moves_or_has_no_gradient_has_no_significant_curvature(g, x):
    rows, w, scratch = seen(torch.full((6, 3), g, dtype=F), torch.full((6, 3), x, dtype=F), (0.9, 0.99))
    _, sure = slope(rows, w, 0.0, scratch)
    assert sure.tolist() == [0.0] * 3
    assert bool(w.isfinite().all())
