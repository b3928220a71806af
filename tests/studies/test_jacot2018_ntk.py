"""The study of the tangent kernel, with a tiny budget, and its own small pieces."""

from dataclasses import replace

import pytest
import torch

from bolza.studies import get, jacot2018_ntk


@pytest.fixture(scope="module")
def result():
    tiny = replace(
        jacot2018_ntk.BUDGETS["small"],
        widths=(32, 256),
        draws=60,
        trained_widths=(64, 512),
        seeds=3,
        train=12,
        steps=60,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(jacot2018_ntk.BUDGETS, "small", tiny)
        return get("jacot2018_ntk").run()


def test_every_claim_holds_at_a_tiny_scale(result):
    assert [row.claim for row in result.rows if row.holds is not True] == []


def test_the_kernel_and_the_step_are_those_of_automatic_differentiation():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 3, generator=g, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    weights = [w.requires_grad_() for w in jacot2018_ntk.draw(8, 2, 3, g)]
    rows = [
        torch.autograd.grad(jacot2018_ntk.forward(weights, x[i : i + 1])[0][0], weights) for i in range(4)
    ]
    j = torch.stack([torch.cat([p.flatten() for p in row]) for row in rows])
    plain = [w.detach() for w in weights]
    assert torch.allclose(jacot2018_ntk.tangent_kernel(plain, x), j @ j.T)
    loss = (jacot2018_ntk.forward(weights, x)[0] - y).square().sum() / 2
    stepped = [w - 0.1 * g for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True)]
    for ours, theirs in zip(jacot2018_ntk.train(plain, x, y, 0.1, 1), stepped, strict=True):
        assert torch.allclose(ours, theirs)


def test_figures_can_be_drawn(result):
    from bolza.report import to_png

    assert all(len(to_png(figure)) > 5000 for figure in result.figures)
