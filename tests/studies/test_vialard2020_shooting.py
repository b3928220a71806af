"""Weights of all depths, shot from particles."""

import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.vialard2020_shooting import BUDGETS, Budget, StaticNet, fit_circles, make

TINY = Budget(inflation=4, particles=3, seeds=2, iterations=4, steps=2, circles=0)


def test_a_tiny_run_gives_rows_and_a_figure(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told = []
    result = get("2006.10330").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    assert [row.holds for row in result.rows[:3]] == [True] * 3
    assert all(mse > 0 for found in result.facts["test_mse"].values() for mse in found)
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_circles_are_scored_by_new_points():
    assert 0.2 < fit_circles("particles", 0, Budget(steps=1, circles=1)) < 0.99


def test_static_network_has_the_field_of_the_shooting_network():
    static, shot = make("static", 1, 0, TINY), make("particles", 1, 0, TINY)
    assert isinstance(static, StaticNet)
    theta = shot.flow.weights()
    with torch.no_grad():
        static.body.trajectory.field.down.weight.copy_(theta.theta1)
        static.body.trajectory.field.down.bias.copy_(theta.b1)
        static.body.trajectory.field.up.weight.copy_(theta.theta2)
        static.body.trajectory.field.up.bias.copy_(theta.b2)
    q = torch.randn(5, 1), torch.randn(5, 4)
    state = shot.flow.start(q)
    here = static.body.velocity(0.0, q)
    there = shot.body.velocity(0.0, state)[0][:5]
    torch.testing.assert_close(torch.cat(here, 1), there)
    torch.testing.assert_close(static.energy(), shot.energy())
