"""Whether gradient noise is heavy-tailed, with controls."""

from dataclasses import replace

import pytest
import torch

from bolza.report import to_png
from bolza.studies import simsekli2019_tails as study
from bolza.studies.simsekli2019_tails import BUDGETS, TRAPS, estimator_rows, index_curve, network


def test_stable_draws_give_their_index_and_the_traps_are_not_called_heavy(monkeypatch):
    tiny = replace(
        BUDGETS["small"],
        draws=100_000,
        trap_draws=900,
        networks=("MLP",),
        steps=150,
        batches=(4, 64, 256),
        batch_draws=900,
        coordinates=16,
    )
    monkeypatch.setitem(BUDGETS, "small", tiny)
    result = study.run("small")
    held = {row.claim: row.holds for row in result.rows}
    known = list(held)[:8]
    assert [claim for claim in known if held[claim] is not True] == []
    # the model's reading fails for a network at its start, and the study says so
    assert held["MLP at its start, batch 64: each coordinate by itself"] is False
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_the_estimator_is_judged_against_the_index_of_the_draws():
    assert [row.expected for row in estimator_rows(40_000)] == [2.0, 1.5, 1.0]


def test_the_local_index_of_gaussian_draws_is_two_at_every_length():
    x = torch.randn(4000, 10, generator=torch.Generator().manual_seed(0))
    sizes, values, errors = index_curve(x)
    assert sizes == [1, 2, 4, 8, 16]
    assert all(abs(v - 2) < 4 * e for v, e in zip(values, errors, strict=True))


@pytest.mark.parametrize("name", sorted(TRAPS))
def test_the_expected_readings_rest_on_the_moments_of_the_traps(name):
    law, log_mean, log_deviation = TRAPS[name]
    x = law((4000, 50), torch.Generator().manual_seed(0))
    normal = -0.6351814227307392  # E log|ξ|
    assert abs(float(x.abs().log().mean()) - normal - log_mean) < 0.02
    assert abs(float(x.square().mean().log()) / 2 - log_deviation) < 0.1


def test_networks_take_their_data():
    for name in ("MLP", "convolutional"):
        model, data = network(name, 0)
        assert model(data.train_x[:3]).shape == (3, 10)
