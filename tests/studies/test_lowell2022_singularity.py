"""Edge of stability, and the top subspace."""

from dataclasses import replace

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.lowell2022_singularity import BUDGETS, size_row


def test_the_edge_and_the_subspace_are_found_at_a_smaller_size(monkeypatch):
    tiny = replace(
        BUDGETS["small"],
        seeds=1,
        steps=400,
        settled=400,
        every=200,
        branch=15,
        optimizers=("Adam",),
        optimizer_steps=40,
        sizes=(50, 100),
        size_steps=25,
    )
    monkeypatch.setitem(BUDGETS, "small", tiny)
    result = get("lowell2022_singularity").run("small")
    rows = {row.claim.split(",")[0].split(" (")[0]: row for row in result.rows}
    assert rows["λ₁ η/2 stays in [0.98"].holds and rows["share of the gradient in the top 10 of 2"].holds
    assert rows["with them alone the loss rises"].holds
    # runs this short have not brought Adam to its edge, nor shown the largest gradient
    assert rows["Adam: preconditioned sharpness over its limit"].measured > 0
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_a_gradient_that_grows_with_the_samples_would_be_seen():
    assert size_row({50: [1.0, 1.1], 500: [3.0, 3.3], 5000: [10.0, 9.0]}).holds
    assert size_row({50: [1.4, 1.5], 500: [1.3, 1.4], 5000: [1.5, 1.2]}).holds is False
