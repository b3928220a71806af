"""The horizon of a continuous-depth block as a control."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, DivergenceError, UnsupportedError
from bolza.models.continuous import NeuralODE
from bolza.optim import HorizonController, SNOpt, horizon_step

D = torch.float64


class Drift(nn.Module):
    """ẋ = v from x(0) = 0."""

    def __init__(self, v=1.0, horizon=1.7):
        super().__init__()
        self.v, self.horizon = nn.Parameter(torch.tensor([v], dtype=D)), horizon

    def velocity(self, t, x):
        return self.v.expand_as(x)

    def forward(self, x):
        return x + self.horizon * self.v


def train(block, control, optimizer, steps, target=1.0, half=0.5):
    for _ in range(steps):
        optimizer.zero_grad()
        (half * (block(torch.zeros(3, 1, dtype=D)) - target) ** 2).mean().backward()
        optimizer.step()
        control.step()


def test_the_horizon_finds_the_optimum_that_is_known():
    """½ (T − 1)² + ½ c T² is least at 1/(1 + c)."""
    block, c = Drift(), 0.2
    optimizer = torch.optim.SGD(block.parameters(), lr=0.0)
    control = HorizonController(block, optimizer, lr=0.05, c=c, every=1, decay=0.5)
    train(block, control, optimizer, 150)
    assert block.horizon == pytest.approx(1 / (1 + c), rel=1e-6)
    assert control.derivative == pytest.approx(-c * block.horizon, rel=1e-5)  # s = −c T there


def test_a_gradient_step_and_a_second_order_step_have_the_same_optimum():
    block, c = Drift(), 0.2
    optimizer = torch.optim.SGD(block.parameters(), lr=0.0)
    control = HorizonController(block, optimizer, lr=0.3, c=c, every=1, decay=0.0, curvature=False)
    train(block, control, optimizer, 60)
    assert block.horizon == pytest.approx(1 / (1 + c), rel=1e-6)


def test_with_hardly_any_cost_the_limit_of_the_step_keeps_the_horizon_near():
    block = Drift()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.0)
    control = HorizonController(block, optimizer, lr=0.5, c=1e-4, every=1, decay=0.0, max_change=0.05)
    train(block, control, optimizer, 100)
    free = Drift()
    control = HorizonController(free, optimizer, lr=0.5, c=1e-4, every=1, decay=0.0, max_change=math.inf)
    train(free, control, optimizer, 100)
    assert abs(block.horizon - 1) < 0.06
    assert abs(free.horizon - 1) > 0.3  # what the limit is for


def test_the_derivative_is_that_of_the_loss_in_the_horizon():
    """s against a central difference, through a solver of order 4."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3))
    block = NeuralODE(inner, steps=20).to(D)
    net = nn.Sequential(block, nn.Linear(3, 2).to(D))
    x, y = torch.randn(7, 3, dtype=D), torch.arange(7) % 2
    optimizer = SNOpt(net)
    control = HorizonController(block, optimizer)
    F.cross_entropy(net(x), y).backward()
    control.step()
    values = []
    for T in (1 - 1e-4, 1 + 1e-4):
        block.horizon = T
        with torch.no_grad():
            values.append(float(F.cross_entropy(net(x), y)))
    assert control.derivative == pytest.approx((values[1] - values[0]) / 2e-4, rel=1e-5)


def test_feedback_answers_the_change_of_the_weights():
    """T moves by η s ⟨∇θ, Δθ⟩ / (c + s²) more, with Δθ = −lr ∇θ."""
    moved = {}
    for feedback in (False, True):
        block = Drift(v=0.5, horizon=1.0)
        optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
        control = HorizonController(block, optimizer, lr=0.05, c=0.1, every=1, feedback=feedback)
        train(block, control, optimizer, 1)
        moved[feedback] = block.horizon
    slope = (1.0 * 0.5 - 1) * 1.0  # dJ/dv
    s = (1.0 * 0.5 - 1) * 0.5
    extra = -0.05 * s * slope * (-0.1 * slope) / (0.1 + s**2)
    assert moved[True] - moved[False] == pytest.approx(extra, rel=1e-10)


def test_it_moves_only_every_so_many_steps_and_within_its_limits():
    block = Drift(horizon=3.0)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.0)
    control = HorizonController(block, optimizer, lr=0.1, c=0.1, every=5, low=2.5)
    train(block, control, optimizer, 4)
    assert block.horizon == 3.0
    train(block, control, optimizer, 1)
    assert 2.5 <= block.horizon < 3.0 and control.history == [3.0, block.horizon]
    train(block, control, optimizer, 60)
    assert block.horizon == 2.5


def test_passes_of_one_step_add_up_and_a_step_without_passes_does_nothing():
    whole, parts = Drift(), Drift()
    for block, pieces in ((whole, 1), (parts, 2)):
        optimizer = torch.optim.SGD(block.parameters(), lr=0.0)
        control = HorizonController(block, optimizer, every=1)
        for _ in range(pieces):
            (((block(torch.zeros(3, 1, dtype=D)) - 1) ** 2).mean() / pieces).backward()
        with torch.no_grad():
            block(torch.zeros(3, 1, dtype=D))
        copy.deepcopy(block)(torch.zeros(3, 1, dtype=D)).sum().backward()
        optimizer.step()
        control.step()
        control.step()
        assert len(control.history) == 2
    assert whole.horizon == pytest.approx(parts.horizon, rel=1e-12)


def test_it_resumes():
    def make():
        block = Drift()
        optimizer = torch.optim.SGD(block.parameters(), lr=0.01)
        return block, optimizer, HorizonController(block, optimizer, every=2, c=0.1)

    block, optimizer, control = make()
    train(block, control, optimizer, 3)
    again, other, resumed = make()
    again.load_state_dict(block.state_dict())
    resumed.load_state_dict(control.state_dict())
    train(block, control, optimizer, 4)
    train(again, resumed, other, 4)
    assert block.horizon == again.horizon and control.state_dict() == resumed.state_dict()
    control.close()
    assert not block._forward_hooks


def test_statistics_of_norms_in_the_field_move_once_a_pass():
    found = []
    for controlled in (False, True):
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        block = NeuralODE(inner, steps=2, method="euler")
        if controlled:
            HorizonController(block, torch.optim.SGD(block.parameters(), lr=0.1))
        block(torch.randn(5, 3, generator=torch.Generator().manual_seed(0))).sum().backward()
        found.append(inner[1].running_mean.clone())
    assert torch.equal(*found)


def test_what_makes_no_sense_is_refused():
    block = Drift()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    with pytest.raises(UnsupportedError, match="without a number `horizon`"):
        HorizonController(nn.Linear(2, 2), optimizer)
    with pytest.raises(ArgumentError, match="optimizer is a Linear"):
        HorizonController(block, nn.Linear(2, 2))
    for name, value in {"c": 1e-6, "lr": -1.0, "every": 0, "high": 0.01, "max_change": 0.0}.items():
        with pytest.raises(ArgumentError, match=name):
            HorizonController(block, optimizer, **{name: value})
    bare = Drift()
    bare.velocity = None
    with pytest.raises(UnsupportedError, match="no method velocity"):
        HorizonController(bare, optimizer)
    control = HorizonController(block, optimizer, every=1)
    with torch.no_grad():
        block.v.fill_(math.nan)
    with pytest.raises(DivergenceError, match="not finite at step 1"):
        train(block, control, optimizer, 1)


def test_the_step_is_the_formula():
    assert horizon_step(1.0, 0.3, 0.25, lr=0.1, c=0.05, feedback=-0.2) == pytest.approx(
        1 - 0.1 * (0.05 + 0.3 - 0.06) / 0.3
    )
    assert horizon_step(1.0, 0.3, 0.25, lr=0.1, c=0.05, curvature=False) == pytest.approx(1 - 0.1 * 0.35)


def test_a_scaled_loss_moves_the_horizon_as_much_and_overflows_are_left_out():
    horizons = []
    for scale in (None, 2.0**10):
        block = Drift()
        optimizer = torch.optim.SGD(block.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        control = HorizonController(block, optimizer, every=1, scaler=scaler)
        for target in (1.0, math.inf, 1.0) if scale else (1.0, 1.0):
            optimizer.zero_grad()
            scaler.scale(((block(torch.zeros(3, 1, dtype=D)) - target) ** 2).mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            control.step()
        horizons.append(control.history)
    assert horizons[1] == pytest.approx(horizons[0], rel=1e-12)


def test_a_controlled_block_can_be_pickled():
    block = NeuralODE(nn.Linear(2, 2))
    control = HorizonController(block, torch.optim.SGD(block.parameters(), lr=0.1))
    twin = pickle.loads(pickle.dumps(block))
    twin(torch.ones(1, 2)).sum().backward()
    control.step()
    assert twin.horizon == block.horizon and control.derivative == 0.0
