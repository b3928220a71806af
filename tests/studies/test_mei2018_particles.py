"""Two-layer networks as particles."""

from dataclasses import replace

import pytest
import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.mei2018_particles import BUDGETS, Budget, gaps, slope, train

TINY = Budget(sizes=(20, 320), seeds=12, limit=4000, steps=40, points=16)


def test_training_is_gradient_descent_with_a_rate_of_m_a_particle():
    budget = replace(TINY, steps=3)
    course = train(7, 2, budget)
    x = torch.linspace(-2.0, 2.0, budget.points)
    for k in range(2):
        a, w, b = (part.clone().requires_grad_() for part in course.start[k])
        for step in range(4):
            f = (a * torch.tanh(x[:, None] * w + b)).mean(1)
            loss = 0.5 * (f - torch.sin(2 * x)).square().mean()
            torch.testing.assert_close(course.loss[k, step].float(), loss.detach(), rtol=1e-5, atol=1e-7)
            if step < 3:
                slopes = torch.autograd.grad(loss, (a, w, b))
                a, w, b = (
                    (p - budget.lr * 7 * g).detach().requires_grad_()
                    for p, g in zip((a, w, b), slopes, strict=True)
                )
        torch.testing.assert_close(course.end[k], torch.stack([a, w, b]).detach(), rtol=1e-4, atol=1e-5)


def test_a_network_does_not_depend_on_those_trained_beside_it():
    together, alone = train(9, 3, TINY), train(9, 1, TINY, first_seed=2)
    torch.testing.assert_close(together.end[2], alone.end[0], rtol=1e-4, atol=1e-5)


def test_the_exponent_of_a_power_law_is_found_and_its_error_covers_the_spread():
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(40, generator=draw) / m**0.5 for m in (50.0, 200.0, 800.0, 3200.0)]
    found, error = slope([50, 200, 800, 3200], values)
    assert abs(found + 0.5) < 3 * error and error < 0.1


def test_a_course_is_no_distance_from_itself():
    course = train(20, 2, TINY)
    assert float(gaps(course, course.loss[0])[0]) == 0.0


def test_a_tiny_run_gives_rows_figures_and_facts(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told = []
    result = get("1804.06561").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    assert [row.holds for row in result.rows] == [True] * 4
    assert len(result.facts["rms_sup_gap"]) == 2
    for figure in result.figures:
        assert to_png(figure, dpi=40).startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_claim_holds_at_the_small_scale():
    result = get("mei2018_particles").run("small")
    assert [(row.claim, row.measured, row.error) for row in result.rows if not row.holds] == []
    assert result.facts["rms_sup_gap"][0] / result.facts["rms_sup_gap"][-1] >= 4
