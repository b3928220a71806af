"""Anisotropic noise: the plane, the rise, the network, at a small size."""

import torch

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.zhu2019_anisotropic import (
    BUDGETS,
    SHAPES,
    Budget,
    escapes,
    hessian_shapes,
    hessians,
    out,
    root,
    shaped,
    shifts,
    slopes,
)

F = torch.float64


def test_the_study_runs_and_its_claims_hold_at_a_smaller_size(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", Budget(runs=40, paths=2000, network_steps=60, repeats=6))
    result = get("zhu2019_anisotropic").run("small")
    assert [(row.claim, row.measured) for row in result.rows if row.holds is not True] == []
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_gradient_and_hessian_of_the_plane_are_those_of_its_loss():
    moved = shifts(2, torch.Generator().manual_seed(0))

    def loss(place, shift):
        at = place - shift
        a = (at[0] - at[1]) / 2**0.5
        b = (at[0] + at[1] - 2) / 2**0.5
        return torch.minimum(10 * a**2 + 100 * b**2, ((at + 1) ** 2).sum())

    for place in (torch.tensor([0.9, 1.2], dtype=F), torch.tensor([-0.4, -0.3], dtype=F)):
        gradients, share = slopes(place.expand(2, 2), moved)
        exact = torch.func.vmap(torch.func.grad(loss), (None, 0))(place, moved[1])
        torch.testing.assert_close(gradients[1], exact)
        mean = torch.func.vmap(torch.func.hessian(loss), (None, 0))(place, moved[1]).mean(0)
        torch.testing.assert_close(hessians(share)[1], mean)


def test_the_noise_is_as_strong_in_every_shape_and_descent_alone_stays():
    g = torch.randn(5, 100, 2, dtype=F, generator=torch.Generator().manual_seed(0))
    share = torch.tensor([1.0, 1.0, 0.5, 0.0, 0.2], dtype=F)
    for shape in SHAPES:
        c = shaped(shape, g - g.mean(1, keepdim=True), share, hessian_shapes())
        torch.testing.assert_close(c.diagonal(dim1=-2, dim2=-1).sum(-1), torch.ones(5, dtype=F))
        torch.testing.assert_close(root(c) @ root(c), c)
    assert not bool(out(escapes(5, 0, steps=100, names=("none",))["none"])[-1].any())
