"""What is done with scores: projection, normalisation, a choice with noise, a linear scorer."""

import pytest
import torch

from bolza.controllers import LinearScorer, keep_best, normalise_scores, project_simplex
from bolza.core.errors import ArgumentError, DataError, ShapeError

D = torch.float64


def test_the_projection_meets_the_conditions_of_the_nearest_point():
    for total in (1.0, 3.0):
        v = torch.randn(50, dtype=D)
        gamma = project_simplex(v, total)
        assert float(gamma.sum()) == pytest.approx(total, rel=1e-12) and float(gamma.min()) >= 0
        shift = (v - gamma)[gamma > 0]
        assert float(shift.max() - shift.min()) < 1e-12  # one multiplier for the sum
        assert bool((v[gamma == 0] <= shift[0] + 1e-12).all())  # and no gain from what is left out
        torch.testing.assert_close(project_simplex(gamma, total), gamma, rtol=0, atol=1e-12)
    with pytest.raises(ArgumentError, match="total=0"):
        project_simplex(v, 0.0)


def test_normalised_scores_have_mean_zero_and_variance_one_unless_cut():
    z = normalise_scores(5 + 1e3 * torch.randn(200, dtype=D), clip=100.0)
    assert abs(float(z.mean())) < 1e-12 and float(z.std()) == pytest.approx(1)
    assert float(normalise_scores(torch.tensor([0.0] * 99 + [1e6])).max()) == 3
    assert float(normalise_scores(torch.full((5,), 0.1)).abs().max()) == 0
    assert float(normalise_scores(torch.ones(1))) == 0


def test_without_noise_the_best_are_kept_and_with_noise_one_is_drawn_from_a_softmax():
    scores = torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=D)
    assert keep_best(scores, 0.5).tolist() == [0, 2]
    assert keep_best(scores, 0.01).tolist() == [0]
    assert keep_best(scores, 1.0).tolist() == [0, 1, 2, 3]
    draw, n = torch.Generator().manual_seed(0), 4000
    taken = [int(keep_best(scores, 0.25, temperature=0.2, generator=draw)) for _ in range(n)]
    seen = torch.tensor(taken).bincount(minlength=4) / n
    p = (scores / 0.2).softmax(0)
    assert float(((seen - p) / (p * (1 - p) / n).sqrt()).abs().max()) < 4
    for wrong, match in (
        ({"ratio": 0.0}, "ratio=0"),
        ({"ratio": 0.5, "temperature": -1.0}, "temperature=-1"),
    ):
        with pytest.raises(ArgumentError, match=match):
            keep_best(scores, **wrong)


def test_a_linear_scorer_finds_a_linear_law_in_features_of_any_scale_and_offset():
    draw = torch.Generator().manual_seed(1)
    phi = 7 + 100 * torch.randn(300, 8, generator=draw, dtype=D)
    w = torch.randn(8, generator=draw, dtype=D)
    noise = torch.randn(300, generator=draw, dtype=D) * 10
    scorer = LinearScorer(phi[:200], phi[:200] @ w + noise[:200])
    found = torch.corrcoef(torch.stack([scorer(phi[200:]), phi[200:] @ w]))[0, 1]
    assert float(found) > 0.999
    assert scorer(phi.float()[:3].double()).shape == (3,)
    s = normalise_scores(phi[:200] @ w + noise[:200])
    assert float((scorer(phi[:200]) - s).mean()) == pytest.approx(0, abs=1e-8)


def test_more_features_than_examples_are_fitted_with_a_penalty():
    phi = torch.randn(20, 100, dtype=D)
    small, large = (LinearScorer(phi, phi[:, 0], penalties=[p]) for p in (1e-6, 1e3))
    assert float(large.weight.norm()) < float(small.weight.norm())
    assert (small.penalty, large.penalty) == (1e-6, 1e3)


def test_wrong_features_are_refused():
    with pytest.raises(ShapeError, match="features has shape"):
        LinearScorer(torch.ones(3), torch.ones(3))
    with pytest.raises(DataError, match="not finite"):
        LinearScorer(torch.ones(3, 1), torch.tensor([0.0, torch.nan, 1.0]))
