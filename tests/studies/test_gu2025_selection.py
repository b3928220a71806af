"""Data selection: exactness, pools and the claims that a small budget can bear."""

import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.gu2025_selection import BUDGETS, TASKS, Budget, pools


def test_the_study_runs_and_the_scores_win_where_most_of_the_pool_belongs_to_another_task(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", Budget(seeds=1, pool=250, steps=30, training=40, rounds=1))
    result = get("gu2025_selection").run("small")
    rows = {row.claim: row for row in result.rows}
    exact = [row for claim, row in rows.items() if claim.startswith(("scores against autograd", "one step"))]
    assert len(exact) == 2 and all(row.holds for row in exact)
    assert rows["another task: scores against low loss, gain in area"].measured > 0.3
    assert rows["another task: test accuracy of what the scores keep"].measured > 0.7
    assert rows["another task: test accuracy of everything"].measured < 0.5
    assert len(result.facts["another task"]) == 1
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_pools_are_as_they_are_said_to_be_and_the_target_is_none_of_them():
    for task, share in zip(TASKS, (0.36, 0.6), strict=True):
        pool, target, good = pools(task, 0, 1000)
        assert abs(float((~good).double().mean()) - share) < 0.08
        assert len(target[0]) == 100 and len(pool[0]) == 1000
        assert not bool((torch.cdist(target[0], pool[0]) < 1e-5).any())
