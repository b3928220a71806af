"""Robust accuracy: exact for linear scores, the suite on any shape and range, and reasons to doubt it."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, DataError, DivergenceError, ShapeError, UnsupportedError
from bolza.robust import robust_accuracy, robustness_curve
from bolza.robust.balls import Ball
from bolza.robust.suite import STANDARD, _Picture

SHORT = {"suite_steps": 10, "queries": 20, "steps": 10, "restarts": 1}


def linear(n=60, d=7, classes=2):
    """A linear classifier whose margins are known, and inputs on both sides."""
    g = torch.Generator().manual_seed(0)
    net = nn.Linear(d, classes)
    with torch.no_grad():
        net.weight.copy_(torch.randn(classes, d, generator=g))
        net.bias.zero_()
    x = torch.rand(n, d, generator=g)
    return net.eval(), x, net(x).argmax(1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ["pgd", "auto"])
def test_accuracy_of_a_linear_score_under_attack_is_the_share_of_large_margins(norm, attack):
    net, x, y = linear()
    y[:5] = 1 - y[:5]
    w = net.weight[0] - net.weight[1]
    dual = w.abs().sum() if norm == "linf" else w.norm()
    distance = ((x @ w).abs() / dual).detach()
    eps = float(distance.sort().values[30:32].mean())  # between two of them
    found = robust_accuracy(
        net, x, y, eps, norm=norm, attack=attack, clip=(-5.0, 6.0), **SHORT | {"steps": 60, "restarts": 2}
    )
    exact = float(((distance > eps) & (torch.arange(60) >= 5)).double().mean())
    assert found.robust == pytest.approx(exact, abs=1e-12) and found.clean == pytest.approx(55 / 60)
    assert found.error == pytest.approx((exact * (1 - exact) / 60) ** 0.5)
    moved = (found.inputs - x).abs().amax(1) if norm == "linf" else (found.inputs - x).norm(dim=1)
    assert bool((moved <= eps * 1.0001).all()) and not found.notes
    with torch.no_grad():
        assert torch.equal(net(found.inputs).argmax(1) != y, found.broken)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_each_attack_goes_on_with_what_is_left_and_the_random_state_stays():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)).double()
    x = 3 * torch.rand(20, 1, 4, 5, dtype=torch.float64) - 1
    y = net(x).argmax(1)
    state = torch.get_rng_state()
    # a function around the network: its parameters are not in sight, and still keep their gradients
    found = robust_accuracy(lambda x: net(x), x, y, 0.02, clip=(-1.0, 2.0), **SHORT | {"suite_steps": 4})
    again = robust_accuracy(lambda x: net(x), x, y, 0.02, clip=(-1.0, 2.0), **SHORT | {"suite_steps": 4})
    assert list(found.after) == ["pgd", *STANDARD] and torch.equal(state, torch.get_rng_state())
    left = list(found.after.values())
    assert left == sorted(left, reverse=True) and left[-1] == pytest.approx(found.robust)
    assert torch.equal(found.inputs, again.inputs) and found.inputs.dtype == torch.float64
    assert all(p.grad is None for p in net.parameters())


def test_inputs_of_any_shape_come_back_from_the_square_picture():
    for shape, clip in (((7,), None), ((30,), (-3.0, 2.0)), ((2, 3, 8), (-3.0, 2.0)), ((3, 4), None)):
        x = (5 * torch.rand(6, *shape) - 3).double()
        picture = _Picture(x, 0.1, clip)
        z = picture.out(x)
        assert z.ndim == 4 and z.shape[2] == z.shape[3] >= 5 and bool(((z >= 0) & (z <= 1)).all())
        torch.testing.assert_close(picture.back(z), x, rtol=0, atol=1e-6)


def test_probabilities_flat_losses_and_training_mode_are_named():
    net, x, y = linear(classes=3)
    found = robust_accuracy(nn.Sequential(net, nn.Softmax(1)), x, y, 0.01, attack="pgd", **SHORT)
    assert any("probabilities" in note for note in found.notes)
    sharp = robust_accuracy(lambda x: 1e4 * net(x), x, y, 0.01, attack="pgd", **SHORT)
    assert any("flat" in note for note in sharp.notes)
    training = robust_accuracy(nn.Sequential(nn.Dropout(0.5), net).train(), x, y, 0.01, attack="pgd", **SHORT)
    assert any("training mode" in note for note in training.notes)


def test_a_staircase_misleads_gradients_and_outputs_alone_show_it():
    net, x, y = linear(d=9)

    def stairs(x):  # rounded, with a slope in the wrong direction
        wrong = -1e-3 * x
        return net((x * 4).round() / 4 + wrong - wrong.detach())

    y = stairs(x).argmax(1)
    found = robust_accuracy(stairs, x, y, 0.3, attack=["square"], **SHORT | {"queries": 100})
    assert any("mislead" in note for note in found.notes) and found.robust < found.after["pgd"]


def test_the_curve_does_not_rise_and_starts_at_the_clean_accuracy():
    net, x, y = linear(classes=3)
    y[:6] = (y[:6] + 1) % 3
    curve = robustness_curve(net, x, y, [0.1, 0.0, 0.02, 0.5], steps=5)
    assert curve.eps == (0.0, 0.02, 0.1, 0.5) and curve.robust[0] == curve.clean == pytest.approx(0.9)
    assert list(curve.robust) == sorted(curve.robust, reverse=True) and curve.robust[-1] < 0.2


def test_attacks_end_where_nothing_is_left_and_a_ball_of_one_point_is_not_called_flat():
    net, x, y = linear()
    found = robust_accuracy(net, x, y, 0.9, attack="pgd", **SHORT | {"restarts": 3})
    assert found.robust == 0 and bool(found.broken.all())
    assert robust_accuracy(net, x, 1 - y, 0.1, **SHORT).after == {
        "pgd": 0,
        "apgd-ce": 0,
        "fab-t": 0,
        "square": 0,
    }
    still = robust_accuracy(net, x, y.int(), 0.0, attack="pgd", **SHORT)
    assert still.robust == still.clean == 1 and not still.notes


def test_a_radius_for_each_sample_goes_with_gradient_ascent_only():
    net, x, y = linear()
    eps = torch.linspace(0, 0.2, 60)
    found = robust_accuracy(net, x, y, eps, attack="pgd", **SHORT)
    assert bool(((found.inputs - x).abs().amax(1) <= eps + 1e-6).all())
    with pytest.raises(ArgumentError, match="one number"):
        robust_accuracy(net, x, y, eps)


def test_what_cannot_be_judged_is_refused(monkeypatch):
    net, x, y = linear()
    with pytest.raises(ArgumentError, match="unknown"):
        robust_accuracy(net, x, y, 0.1, attack="best")
    with pytest.raises(ArgumentError, match="no attack"):
        robust_accuracy(net, x, y, 0.1, attack=["fgsm"], **SHORT)
    with pytest.raises(DataError, match="classes as integers"):
        robust_accuracy(net, x, F.one_hot(y).float(), 0.1)
    with pytest.raises(DataError, match="has the label"):
        robust_accuracy(net, x, y + 7 - y.min(), 0.1)
    with pytest.raises(DataError, match="has the label"):
        robust_accuracy(net, x, torch.where(torch.arange(60) == 3, -100, y), 0.1)
    for call in (robust_accuracy, lambda *about: robustness_curve(*about[:3], [0.1])):
        with pytest.raises(ShapeError, match="logits"):
            call(lambda x: net(x)[:, 0], x, y, 0.1)
        with pytest.raises(DivergenceError, match="not a number"):
            call(lambda x: net(x) * torch.nan, x, y, 0.1)
        with pytest.raises(DataError, match="dict"):
            call(net, {"x": x}, y, 0.1)
    with pytest.raises(ArgumentError, match="queries=0"):
        robust_accuracy(net, x, y, 0.1, queries=0)
    with pytest.raises(ArgumentError, match="four classes"):
        robust_accuracy(net, x, y, 0.1, attack=["apgd-t"], **SHORT)
    with pytest.raises(ArgumentError, match="clip differs"):
        robust_accuracy(net, x, y, 0.1, clip=(torch.zeros(7), torch.ones(7)), **SHORT)
    with torch.inference_mode(), pytest.raises(ArgumentError, match="inference_mode"):
        robust_accuracy(net, x, y, 0.1, **SHORT)
    with pytest.raises(ArgumentError, match="empty"):
        robustness_curve(net, x, y, [])
    with pytest.raises(ArgumentError, match="batch_size"):
        robust_accuracy(net, x, y, 0.1, batch_size=0)
    for name in [name for name in sys.modules if name.startswith("pyautoattack")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'bolza\[attacks\]'"):
        robust_accuracy(net, x, y, 0.1, **SHORT)


def test_random_points_lie_in_the_ball_and_fill_it():
    x = torch.full((4000, 3), 0.5)
    for norm, size in (("linf", lambda d: d.abs().amax(1)), ("l2", lambda d: d.norm(dim=1))):
        reached = size(Ball(x, 0.2, norm, (0.0, 1.0)).random(torch.Generator().manual_seed(0)) - x) / 0.2
        # uniform in the volume: the cube of the relative radius is uniform, with mean 1/2 and deviation 1/√12
        assert (
            abs(float((reached**3).mean()) - 0.5) < 4 * (1 / 12 / 4000) ** 0.5
            and float(reached.max()) <= 1.0001
        )
