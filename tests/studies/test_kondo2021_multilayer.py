"""The exponent field of a classifier."""

import pytest
import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.kondo2021_multilayer import BUDGETS, Budget, auroc, rank_correlation


@pytest.mark.slow
def test_every_claim_holds_at_a_smaller_size(monkeypatch):
    monkeypatch.setitem(
        BUDGETS, "small", Budget(points=300, moon_epochs=120, grid=30, digit_epochs=15, seeds=1)
    )
    result = get("kondo2021_multilayer").run("small")
    assert [(row.claim, row.measured) for row in result.rows if row.holds is not True] == []
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_auroc_and_rank_correlation_are_those_of_scikit_learn_and_scipy():
    from scipy.stats import spearmanr
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    score, label = torch.rand(60, generator=generator), torch.rand(60, generator=generator) < 0.3
    assert auroc(score, label) == pytest.approx(roc_auc_score(label, score))
    other = score + torch.rand(60, generator=generator)
    assert rank_correlation(score, other) == pytest.approx(spearmanr(score, other).statistic)
    assert auroc(torch.zeros(4), torch.tensor([True, False, True, False])) == 0.5
