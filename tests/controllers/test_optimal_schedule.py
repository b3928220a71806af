"""The planned schedule: forgetting the initial rate, averaging noise, guards, and the shared contract."""

import pytest
import torch
from torch import nn

from bolza.controllers.optimal_schedule import OptimalSchedule
from bolza.core.errors import ArgumentError, DivergenceError, UnsupportedError
from bolza.models import GRU, resnet
from bolza.testing import check_controller

F = torch.float64


def test_the_schedule_keeps_the_contract_of_controllers():
    settings = {"steps": 12, "batch_size": 8, "samples": 8, "every": 3, "k": 2, "pieces": 1}
    check_controller(
        lambda optimizer, model, loss, data: OptimalSchedule(
            optimizer, model, loss, (data.train_x, data.train_y), **settings
        ),
        takes_model=True,
        steps=4,
    )


class Place(nn.Module):
    """θ itself as the prediction of every sample."""

    def __init__(self, d):
        super().__init__()
        self.theta = nn.Parameter(torch.full((d,), 2.0, dtype=F))

    def forward(self, y):
        return self.theta.expand(len(y), -1)


def half_square(z, y):
    return (z - y).square().sum(1).mean() / 2


def averaged(optimizer_of, steps=150, d=400, **options):
    """Loss ½|θ|²/d of d coordinates with unit curvature and noise, in batches of 4, and the schedule."""
    draw = torch.Generator().manual_seed(0)
    y = torch.randn(4096, d, generator=draw, dtype=F)
    net = Place(d)
    optimizer = optimizer_of(net.parameters())
    schedule = OptimalSchedule(optimizer, net, half_square, (y, y), steps=steps, batch_size=4, **options)
    for _ in range(steps):
        chosen = y[torch.randint(4096, (4,), generator=draw)]
        optimizer.zero_grad()
        half_square(net(chosen), chosen).backward()
        optimizer.step()
        schedule.step()
    return float((net.theta.detach() - y.mean(0)).square().sum() / 2 / d), schedule


def test_noise_about_a_minimum_is_averaged_away_from_any_initial_rate():
    # the best schedule of one mode is that of a running mean, whose loss is 1/(2·B·steps)
    best = 1 / (2 * 4 * 150)
    found = [averaged(lambda p, lr=lr: torch.optim.SGD(p, lr=lr)) for lr in (1e-4, 10.0)]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    assert best < found[0][0] < 3 * best  # at the best constant rate the floor is some ten times as high


@pytest.mark.parametrize(
    ("kind", "bound"),
    [
        (lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9), 0.02),
        (lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True), 0.02),
        (lambda p: torch.optim.Adam(p, lr=1e-5), 0.1),  # unchanged, it would move θ by 0.0015 of 2
    ],
)
def test_momentum_and_a_preconditioner_are_planned_for(kind, bound):
    loss, _ = averaged(kind, every=50, pieces=8, d=50)
    assert loss < bound  # from 2; the best schedule reaches 0.0008, one batch alone 0.125


def test_the_budget_is_kept():
    for steps, samples in ((150, 32), (600, 64)):
        net = Place(3)
        y = torch.zeros(256, 3, dtype=F)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        schedule = OptimalSchedule(
            optimizer, net, half_square, (y, y), steps=steps, batch_size=32, samples=samples
        )
        for _ in range(steps):
            schedule.step()
        assert 0 < schedule.sample_gradients <= 0.1 * 32 * steps
        assert schedule.log()["spent"] == schedule.sample_gradients / 32


def test_rates_stay_below_their_share_of_the_limit_and_rise_by_the_growth_at_most():
    net, y = Place(2), torch.zeros(64, 2, dtype=F)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)
    schedule = OptimalSchedule(
        optimizer, net, half_square, (y, y), steps=50, batch_size=8, every=1, growth=3.0
    )
    for now in (0.01, 0.02):
        optimizer.param_groups[0]["lr"] = now
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(3 * now)
    sgd = torch.optim.SGD(net.parameters(), lr=1e-6)
    schedule = OptimalSchedule(sgd, net, half_square, (y, y), steps=50, batch_size=8, safety=0.3)
    assert float(schedule.plan.rates.max()) <= 0.3 * 2 + 1e-12


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_starts_no_faster_than_plain_descent_may_and_then_grows(nesterov):
    net, y = Place(2), torch.zeros(64, 2, dtype=F)
    sgd = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9, nesterov=nesterov)
    schedule = OptimalSchedule(sgd, net, half_square, (y, y), steps=50, batch_size=8, every=1, pieces=2)
    first = sgd.param_groups[0]["lr"]
    assert 0.01 < first / (1 - 0.9) <= 0.5 * 0.5 * 2 + 1e-9  # half of safety · 2/λ
    schedule.step()
    assert sgd.param_groups[0]["lr"] > 1.5 * first


def test_a_preconditioner_is_measured_once_it_has_seen_some_gradients():
    net, y = Place(2), torch.zeros(64, 2, dtype=F)
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    schedule = OptimalSchedule(adam, net, half_square, (y, y), steps=100, batch_size=8, every=50, pieces=2)
    for step in range(1, 11):
        adam.zero_grad()
        half_square(net(y), y).backward()
        adam.step()
        schedule.step()
        assert (schedule.plan is not None) == (step == 10)
        assert (adam.param_groups[0]["lr"] == 1e-3) == (step < 10)


def test_a_rising_loss_halves_the_rate_until_the_next_measurement():
    net, y = Place(2), torch.zeros(64, 2, dtype=F)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = OptimalSchedule(optimizer, net, half_square, (y, y), steps=100, batch_size=8, every=50)
    planned = optimizer.param_groups[0]["lr"]
    for _ in range(3):
        schedule.step(loss=schedule.seen.loss)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(planned)
    for _ in range(10):
        schedule.step(loss=10 * schedule.seen.loss)
    lowest = optimizer.param_groups[0]["lr"]
    assert lowest <= planned / 4
    for _ in range(50):
        schedule.step(loss=schedule.seen.loss)
    assert optimizer.param_groups[0]["lr"] >= 2 * lowest


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (
            resnet(depth=4, width=4, out_features=3),
            torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        ),
        (GRU(5, 2, 8, 3), torch.randn(16, 10, generator=torch.Generator().manual_seed(0))),
    ],
    ids=["residual", "recurrent"],
)
def test_networks_of_other_kinds_are_planned(net, x):
    optimizer = torch.optim.SGD(net.parameters(), lr=1e3)
    y = torch.arange(16) % 3
    before = {name: value.clone() for name, value in net.state_dict().items()}
    schedule = OptimalSchedule(optimizer, net, nn.functional.cross_entropy, (x, y), steps=50, batch_size=8)
    assert 1e-3 < optimizer.param_groups[0]["lr"] < 100 and schedule.plan.steps == 50
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_settings_that_make_no_sense_are_named():
    net, y = Place(2), torch.zeros(64, 2, dtype=F)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    for change in (
        {"steps": 0},
        {"safety": 1.0},
        {"growth": 1.0},
        {"samples": 2},
        {"every": 0},
        {"budget": 0.0},
    ):
        with pytest.raises(ArgumentError):
            OptimalSchedule(sgd, net, half_square, (y, y), **({"steps": 10, "batch_size": 8} | change))
    with pytest.raises(ArgumentError, match="zero"):
        still = torch.optim.SGD(net.parameters(), lr=0.0)
        OptimalSchedule(still, net, half_square, (y, y), steps=10, batch_size=8)
    with pytest.raises(UnsupportedError, match="Rprop"):
        other = torch.optim.Rprop(net.parameters())
        half_square(net(y), y).backward()
        other.step()
        OptimalSchedule(other, net, half_square, (y, y), steps=10, batch_size=8).step()
    with torch.no_grad():
        net.theta.fill_(torch.nan)
    with pytest.raises(DivergenceError, match="step 0"):
        OptimalSchedule(sgd, net, half_square, (y, y), steps=10, batch_size=8)
