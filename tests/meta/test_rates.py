"""The two rates of MAML: the bound, and what is measured."""

import math

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError
from bolza.meta import MAML, MetaSGD, Reptile, check_rates, meta_gradient, meta_rate_bound

D = torch.float64
SPECTRUM = torch.tensor([0.5, 1.0, 2.0], dtype=D)
TABLE = {0.0: 1.0, 0.1: 1.5625, 0.2: 2.7778, 0.3: 4.0816, 0.4: 5.5556}


def quadratic(w, data):
    return (SPECTRUM * (w - data).square()).sum() / 2


def end(lr, rate, steps=3000, inner=1, mode="reverse"):
    """Distance from the minimum after outer descent on tasks of one Hessian, from the meta-gradients of a basis."""
    nothing = torch.zeros(1, 3, dtype=D)
    slope = torch.stack(
        [
            meta_gradient(quadratic, e, nothing, nothing, lr, inner, mode=mode).gradient
            for e in torch.eye(3, dtype=D)
        ],
        1,
    )
    step = torch.eye(3, dtype=D) - rate * slope
    return float(torch.linalg.matrix_power(step, steps).norm())


@pytest.mark.parametrize(("lr", "bound"), TABLE.items())
def test_the_bound_is_where_outer_descent_turns_from_convergence_to_divergence(lr, bound):
    assert abs(meta_rate_bound(SPECTRUM, lr) - bound) < 5e-5
    exact = meta_rate_bound(SPECTRUM, lr)
    assert end(lr, 0.98 * exact) < 1e-50 and end(lr, 1.02 * exact) > 1e50


def test_more_inner_steps_and_first_order_gradients_have_bounds_of_their_own():
    for inner, mode in ((3, "reverse"), (2, "first_order")):
        bound = meta_rate_bound(SPECTRUM, 0.2, inner, first_order=mode == "first_order")
        assert end(0.2, 0.98 * bound, inner=inner, mode=mode) < 1e-10
        assert end(0.2, 1.02 * bound, inner=inner, mode=mode) > 1e10
    assert meta_rate_bound(SPECTRUM, 0.6, first_order=True) == 0.0
    assert meta_rate_bound([-1.0, 0.0], 0.1) == math.inf
    assert meta_rate_bound(SPECTRUM, 0.1, momentum=0.5) == 1.5 * meta_rate_bound(SPECTRUM, 0.1)
    with pytest.raises(ArgumentError, match="lr=-1"):
        meta_rate_bound(SPECTRUM, -1)


class Quadratic(nn.Module):
    """√λ w, so that the square of its distance to √λ c is a task."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=D))

    def forward(self, x):
        return self.w * x


def half_square(out, y):
    return (out - y).square().sum() / 2


def test_measured_limits_are_those_of_the_spectrum():
    torch.manual_seed(0)
    tasks = SPECTRUM.sqrt().expand(4, 1, 3), torch.randn(4, 1, 3, dtype=D)
    for make in (MAML, MetaSGD):
        report = check_rates(make(Quadratic(), lr=0.2, steps=1, loss=half_square), tasks, tasks, tol=1e-6)
        assert report.inner_limit == pytest.approx(1.0) and report.useful_lr == pytest.approx(0.5)
        assert report.outer_limit == pytest.approx(meta_rate_bound(SPECTRUM, 0.2), rel=1e-5)
        assert report.holds
    # whatever the spectrum below 2: λ(1 − 0.2λ)² is largest at 1/(3 · 0.2)
    report = check_rates(MAML(Quadratic(), lr=0.2, steps=1, loss=half_square), tasks, tasks, tol=1e-6)
    assert report.shared_limit == pytest.approx(2 / (5 / 3 * (2 / 3) ** 2), rel=1e-6)
    assert report.shared_limit <= report.outer_limit


def test_rates_beyond_their_limits_are_warned_of_with_what_to_do():
    tasks = SPECTRUM.sqrt().expand(2, 1, 3), torch.zeros(2, 1, 3, dtype=D)
    with pytest.warns(UserWarning, match="raise the inner lr"):
        report = check_rates(MAML(Quadratic(), lr=0.1, steps=1, loss=half_square), tasks, tasks, outer_lr=1.6)
    assert not report.holds and len(report.warnings) == 1
    with pytest.warns(UserWarning, match="inner steps diverge"):
        check_rates(MAML(Quadratic(), lr=1.1, steps=1, loss=half_square), tasks, tasks)
    first = check_rates(
        MAML(Quadratic(), lr=0.1, first_order=True, loss=half_square), tasks, tasks, outer_lr=9.0
    )
    assert first.outer_limit is None and first.shared_limit is not None
    with pytest.raises(ArgumentError, match="Reptile"):
        check_rates(Reptile(Quadratic()), tasks, tasks)


def test_the_outer_limit_of_a_network_is_the_top_of_the_hessian_through_the_inner_steps():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).to(D)
    tasks = [(torch.randn(3, 5, 1, dtype=D), torch.randn(3, 5, 1, dtype=D)) for _ in range(2)]
    maml = MAML(net, lr=0.1, steps=2)
    report = check_rates(maml, *tasks, tol=1e-8)
    shapes = [p.shape for p in net.parameters()]
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])

    def gradient(v):
        with torch.no_grad():
            for p, part in zip(net.parameters(), v.split([s.numel() for s in shapes]), strict=True):
                p.copy_(part.reshape(p.shape))
        return torch.cat([g.flatten() for g in torch.autograd.grad(maml(*tasks), list(net.parameters()))])

    h = 1e-5
    hessian = torch.stack(
        [(gradient(flat + h * e) - gradient(flat - h * e)) / (2 * h) for e in torch.eye(10, dtype=D)]
    )
    top = float(torch.linalg.eigvalsh((hessian + hessian.T) / 2)[-1])
    assert report.outer_sharpness == pytest.approx(top, rel=1e-5)
