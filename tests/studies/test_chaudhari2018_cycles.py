"""Loops of SGD: the study at a tiny size, and its pieces."""

from dataclasses import replace

import pytest
import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies._cycles import data, sgd_paths
from bolza.studies.chaudhari2018_cycles import BUDGETS, bottom, two_valleys


def test_a_tiny_run_already_shows_the_loops_and_the_claims_that_do_not_hold(monkeypatch):
    tiny = replace(
        BUDGETS["small"], runs=16, steps=700, settle=100, directions=24, linear_steps=1500, cells=50
    )
    monkeypatch.setitem(BUDGETS, "small", tiny)
    result = get("chaudhari2018_cycles").run("small")
    failed = {row.claim.split(":")[0] for row in result.rows if row.holds is False}
    assert failed == {
        "increments without correlation in time tell a run without loops from one with loops",
        "the current runs along level lines of Φ",
        "a trajectory closes a loop before it forgets where it was",
    }
    measured = {row.claim: row for row in result.rows}
    ratio = measured["measured over predicted area rates, all planes of the top directions"]
    assert ratio.measured == pytest.approx(1, abs=0.1) and 0 < ratio.error < 0.05
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_the_lowest_point_of_a_parabola_is_found_between_the_centres():
    axes = (torch.linspace(-1, 1, 21, dtype=torch.float64), torch.linspace(-2, 2, 31, dtype=torch.float64))
    x, y = torch.meshgrid(*axes, indexing="ij")
    values = (x - 0.123) ** 2 + 0.5 * (x - 0.123) * (y + 0.3) + 2 * (y + 0.3) ** 2
    assert bottom(values, axes).tolist() == pytest.approx([0.123, -0.3])


def test_isotropic_noise_leaves_no_current_in_the_valleys():
    grid = two_valleys(30, torch.eye(2, dtype=torch.float64))
    assert grid.entropy_production(grid.stationary()) < 1e-20


def test_runs_side_by_side_are_those_of_the_optimizer():
    x, y = data()
    net = torch.nn.Sequential(torch.nn.Linear(64, 12), torch.nn.Tanh(), torch.nn.Linear(12, 10))
    before = [p.detach().clone() for p in net.parameters()]
    directions = torch.eye(910)[:, :5]
    budget = replace(BUDGETS["small"], runs=1, steps=3)
    path, _ = sgd_paths(net, x, y, directions, budget)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    draw = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(3):
        rows = torch.randint(0, len(x), (1, 4), generator=draw)[0]
        optimizer.zero_grad()
        ((net(x[rows]) - y[rows]).square().sum(-1).mean() / 2).backward()
        optimizer.step()
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(net.parameters(), before, strict=True)])
    assert torch.allclose(path[-1, 0], moved @ directions, atol=1e-6)
