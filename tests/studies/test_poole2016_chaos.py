"""Circles in random networks."""

import math

import pytest
import torch

from bolza.meanfield import fixed_point, resolve_activation
from bolza.report import to_png
from bolza.studies import get, poole2016_chaos
from bolza.studies.poole2016_chaos import BUDGETS, Budget, circle, curve_theory


def test_the_theory_of_the_curve_is_that_of_the_correlation_map() -> None:
    """Speed and curvature after one layer from numerical derivatives of q c(cos Δ) in the angle Δ."""
    weight = 6.25
    point = fixed_point("tanh", weight, 0.09)
    step, q = 0.05, point.q
    angles = step * torch.arange(-4, 5, dtype=torch.float64)
    k = weight * resolve_activation("tanh").cross(q, q, angles.cos()) + 0.09
    # fit even polynomials: K(Δ) = K0 - g Δ²/2 + a Δ⁴/24 + …
    powers = torch.stack([angles**p for p in (0, 2, 4, 6, 8)], 1)
    coefficients = torch.linalg.lstsq(powers, k[:, None]).solution[:, 0]
    g, a = -2 * float(coefficients[1]), 24 * float(coefficients[2])
    lengths = curve_theory(weight, point, 1)[1]
    assert float(lengths[0]) == pytest.approx(math.sqrt(g / float(q)), rel=1e-5)
    assert float(lengths[1]) == pytest.approx(math.sqrt(a / g), rel=1e-3)  # √(κ² g), 1 at the input


def test_one_wide_layer_stretches_and_bends_as_predicted() -> None:
    point = fixed_point("tanh", 6.25, 0.09)
    lengths, pictures = circle(6.25, point, Budget(1500, 24, 2, 1), seed=0)
    theory = curve_theory(6.25, point, 2)
    assert torch.allclose(lengths, theory, rtol=0.06)
    assert pictures.shape == (3, 24, 2)


def test_every_claim_holds_at_the_small_scale() -> None:
    result = get("poole2016_chaos").run("small")
    assert [(row.claim, row.measured) for row in result.rows if row.holds is not True] == []
    assert len(result.rows) == 20
    for figure in result.figures:
        assert to_png(figure, dpi=40).startswith(b"\x89PNG")


def test_runs_repeat_and_tell_their_progress(monkeypatch) -> None:
    monkeypatch.setitem(BUDGETS, "small", Budget(40, 16, 5, 2))
    told: list[float] = []
    first = poole2016_chaos.run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    assert first.facts["growth"] == poole2016_chaos.run("small").facts["growth"]
