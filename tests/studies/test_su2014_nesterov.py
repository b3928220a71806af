"""Nesterov's method as a differential equation."""

from dataclasses import replace

import pytest
import torch

from bolza.report import to_png
from bolza.sde import accelerated_quadratic
from bolza.studies import get
from bolza.studies.su2014_nesterov import BUDGETS, descent, direct_euler, minimum, regression

TINY = replace(BUDGETS["small"], times=12, end=2.0, samples=40, steps=25, long=60)


def test_a_tiny_run_gives_rows_a_figure_and_facts(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told = []
    result = get("1503.01243").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    # sixty iterations are too few for order 3 to leave all bounds
    assert [row.claim for row in result.rows if row.holds is not True] == [
        "order 3, direct discretisation: largest |x| from x₀ = 1"
    ]
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_the_direct_discretisation_is_stable_where_it_should_be_and_not_where_not():
    # order 2 at t = 5: the flow, and what is left of a step of 0.01
    assert float(direct_euler(1.0, 1e-4, 2, 500)[-1]) == pytest.approx(
        float(accelerated_quadratic(5.0, 1.0)), abs=0.01
    )
    assert float(direct_euler(1.0, 0.02, 4, 200).abs().max()) > 1e12


def test_the_minimiser_of_the_regression_has_no_slope_and_the_step_is_within_its_bound():
    loss, start, lipschitz = regression(30)
    best = minimum(loss, start).requires_grad_()
    assert torch.autograd.grad(loss(best), best)[0].norm() < 1e-10
    values = descent(loss, start, 1.0 / lipschitz, 20)
    assert bool((values.diff() < 0).all()) and float(values[-1]) > float(loss(best).detach())
