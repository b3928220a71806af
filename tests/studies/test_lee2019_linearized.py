"""Wide networks beside their linearisation."""

import pytest
import torch

from bolza.report import to_png
from bolza.studies import get, lee2019_linearized
from bolza.studies.lee2019_linearized import BUDGETS, Budget, exponent, measure, network, parity, train

TINY = Budget(widths=(32, 128, 512), seeds=3, points=16, tests=8, steps=30)


def test_the_exponent_is_that_of_a_power_law_and_its_error_that_of_the_seeds():
    slope, error = exponent([10, 100, 1000], [[w**-0.5] * 4 for w in (10, 100, 1000)])
    assert slope == pytest.approx(-0.5) and error == pytest.approx(0.0, abs=1e-12)
    noisy, spread = exponent([10, 100], [[1.0, 1.5], [0.1, 0.2]])
    assert -1 < noisy < -0.8 and spread > 0.05


def test_the_learning_rates_of_layers_make_the_other_parametrisation():
    """One step in ω, where the weights are σ ω/√fan_in, is one step in the weights with scaled rates."""
    x, y, _ = parity(TINY)
    net, scales = network(20, 0)
    stepped, _ = train(net, scales, x, y, 1e-2, 1)
    omega = {name: (p / scales[name] ** 0.5).detach().requires_grad_() for name, p in net.named_parameters()}
    weights = {name: omega[name] * scales[name] ** 0.5 for name in omega}
    loss = 0.5 * (torch.func.functional_call(net, weights, (x,)) - y).square().sum()
    for name, slope in zip(omega, torch.autograd.grad(loss, list(omega.values())), strict=True):
        moved = (omega[name] - 1e-2 * slope) * scales[name] ** 0.5
        torch.testing.assert_close(stepped.get_parameter(name), moved)


def test_descent_diverges_where_the_theory_says():
    found = measure(512, TINY, parity(TINY))
    assert found.onset and all(abs(value - 1) < 0.03 for value in found.onset)


def test_a_tiny_run_gives_rows_figures_and_facts(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told = []
    result = get("lee2019_linearized").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    rows = {row.claim: row for row in result.rows}
    assert len(rows) == 8
    for words in ("smaller eigenvalue", "larger eigenvalue", "begins to diverge", "change of the kernel"):
        (row,) = (row for claim, row in rows.items() if words in claim)
        assert row.holds, row
    gaps = [sum(result.facts[str(width)]["test_gap"]) for width in TINY.widths]
    assert gaps[2] < gaps[0]
    for figure in result.figures:
        assert to_png(figure, dpi=40).startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_claim_holds_at_the_small_scale():
    result = lee2019_linearized.run("small")
    assert [(row.claim, row.measured, row.error) for row in result.rows if not row.holds] == []
