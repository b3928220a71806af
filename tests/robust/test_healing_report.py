"""What control gives, and where it gives nothing."""

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError
from bolza.robust import SelfHealing
from bolza.robust.healing_report import _Inside, right_answers


def case():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(20, 3)).Q
    x = torch.randn(200, 3) @ basis.mT
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3))
    return net, x, net(x).argmax(1), basis


def test_noise_and_attacks_off_the_subspace_are_healed_and_those_inside_are_not():
    net, x, y, _ = case()
    healed = SelfHealing(net, c=1e-6, fraction=0.999, layers="input").fit(x, y)
    report = healed.report(x, y, eps=0.2, noise=0.5, clip=None, steps=5)
    assert [row.name for row in report.rows] == ["clean", "noise", "oblivious", "adaptive", "restricted"]
    assert report["clean"].base == report["clean"].healed == 1
    assert report["noise"].gain > 0.05 and report["oblivious"].gain > 0.1
    assert report["adaptive"].healed <= report["oblivious"].healed
    assert abs(report["restricted"].gain) < 0.01 and report["restricted"].base < 0.95
    assert report["adaptive"].base == report["oblivious"].base
    text = str(report)
    assert text.index("oblivious") < text.index("adaptive") and "by design" in text and "to count on" in text
    with pytest.raises(ArgumentError, match="no row 'worst'"):
        report["worst"]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_restricted_perturbation_lies_in_the_subspace_and_in_the_ball(norm):
    net, x, _, basis = case()
    inside = _Inside(net, x[:10], lambda d: d @ basis @ basis.mT, 0.1, norm)
    moved = inside.put(x[:10] + torch.randn(10, 20, generator=torch.Generator().manual_seed(1))) - x[:10]
    size = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
    assert torch.allclose(moved, moved @ basis @ basis.mT, atol=1e-6)
    assert torch.allclose(size, torch.full((10,), 0.1), atol=1e-6)
    assert torch.equal(inside.put(x[:10]), x[:10])


def test_a_report_in_small_batches_is_that_of_one_where_nothing_is_drawn():
    net, x, y, _ = case()
    healed = SelfHealing(net, fraction=0.5).fit(x, y)
    assert healed.report(x, y).rows == healed.report(x, y, batch_size=33).rows
    with pytest.raises(ArgumentError, match="noise=-1"):
        healed.report(x, y, noise=-1)


def test_harm_is_said_in_words():
    net, x, y, _ = case()
    report = SelfHealing(net, c=1e-6, fraction=0.2).fit(x).report(x, y)
    assert report["clean"].gain < -0.05 and any("clean accuracy falls" in note for note in report.notes)


def test_right_answers_are_found_for_classes_sequences_and_pixels():
    out = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    assert right_answers(out, out.argmax(-1)).all()
    assert right_answers(out, out.argmax(1)).all()
    assert not right_answers(out[:, 0], (out[:, 0].argmax(1) + 1) % 6).any()
