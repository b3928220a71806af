import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, ShapeError
from bolza.data import digits
from bolza.stability import certified_radius, lipschitz

D = torch.float64


def test_the_radius_of_a_linear_classifier_of_orthonormal_rows_is_the_distance_to_the_border():
    net = nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.eye(2, 3))
    x = torch.tensor([[2.0, 0.5, 7.0], [0.0, 3.0, 1.0]], dtype=D)
    found = certified_radius(net, x)
    assert found.radius.tolist() == pytest.approx([1.5 / 2**0.5, 3 / 2**0.5])
    assert found.accuracy(1.2) == 0.5 and found.accuracy(0.0) == 1.0


def test_the_radius_of_a_linear_classifier_in_the_maximum_norm_is_half_the_margin():
    net = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.eye(2))
    found = certified_radius(net, torch.tensor([[2.0, 0.5], [0.0, 3.0]], dtype=D), norm="linf")
    assert found.radius.tolist() == pytest.approx([0.75, 1.5], rel=1e-5)


def attack(net, x, y, eps, norm, steps=40):
    """Projected gradient ascent within eps, sample by sample; whether the class was kept all the way."""
    delta, kept = torch.zeros_like(x), torch.ones(len(x), dtype=torch.bool)
    for _ in range(steps):
        point = (x + delta).requires_grad_()
        out = net(point)
        kept &= out.argmax(1) == y
        (g,) = torch.autograd.grad(F.cross_entropy(out, y, reduction="sum"), point)
        if norm == "l2":
            delta = delta + 2.5 / steps * eps[:, None] * g / g.norm(dim=1, keepdim=True).clamp_min(1e-12)
            delta = delta * (eps / delta.norm(dim=1).clamp_min(1e-12)).clamp(max=1)[:, None]
        else:
            delta = (delta + 2.5 / steps * eps[:, None] * g.sign()).clamp(-eps[:, None], eps[:, None])
    return kept & (net(x + delta).argmax(1) == y)


def test_no_attack_of_forty_steps_reaches_the_certified_radius_on_digits():
    data = digits()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(data.train_x), data.train_y).backward()
        optimizer.step()
    x, y = data.test_x, data.test_y
    before = [p.clone() for p in net.parameters()]
    for norm in ("l2", "linf"):
        found = certified_radius(net, x, y, norm=norm)
        right = found.margin > 0
        assert (
            right.double().mean() > 0.85
            and (found.radius[right] > 0).all()
            and (found.radius[~right] == 0).all()
        )
        eps = found.radius[right].float() * 0.9999
        assert attack(net, x[right], y[right], eps, norm).all()
        assert not attack(net, x[right], y[right], 12 * eps, norm).all()  # the attack does work
    assert all(
        torch.equal(p, q) and p.grad is not None for p, q in zip(net.parameters(), before, strict=True)
    )


def test_a_bound_that_is_known_is_used():
    net, x = nn.Linear(2, 3), torch.randn(4, 2)
    bound = lipschitz(net, x)
    a, b = certified_radius(net, x, bound=bound), certified_radius(net, x, bound=2 * bound.bound)
    assert a.bound is bound and torch.allclose(a.radius, 2 * b.radius)


def test_wrong_arguments_are_named():
    net, x = nn.Linear(2, 3), torch.randn(4, 2)
    with pytest.raises(ArgumentError, match="norm='l1'"):
        certified_radius(net, x, norm="l1")
    with pytest.raises(ShapeError, match="one class number a sample"):
        certified_radius(net, x, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ShapeError, match="two classes or more"):
        certified_radius(nn.Linear(2, 1), x)
    with pytest.raises(ArgumentError, match="bound is"):
        certified_radius(net, x, bound=float("inf"))
