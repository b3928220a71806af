"""The study of Gaussian processes, with a tiny budget."""

from dataclasses import replace

import pytest
import torch

from bolza.studies import get, lee2018_nngp


@pytest.fixture(scope="module")
def result():
    tiny = replace(
        lee2018_nngp.BUDGETS["small"], covariance_draws=400, trained_widths=(5, 40), steps=60, map_train=120,
        map_test=120, map_depths=(1, 90), map_weight_vars=5,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(lee2018_nngp.BUDGETS, "small", tiny)
        return get("lee2018_nngp").run()


def test_every_claim_holds_at_a_tiny_scale(result):
    assert [row.claim for row in result.rows if row.holds is not True] == []


def test_accuracy_of_the_process_is_the_known_one(result):
    assert result.facts["gp_accuracy"] == pytest.approx([536 / 540] * 3)


def test_deep_kernels_lose_accuracy_on_both_sides_of_the_critical_line(result):
    deep = torch.tensor(result.facts["map_accuracy"])[-1]
    assert deep[0] < 0.3 and deep[-1] < 0.3 and deep.max() > 0.7


def test_figures_can_be_drawn(result):
    from bolza.report import to_png

    assert all(len(to_png(figure)) > 5000 for figure in result.figures)
