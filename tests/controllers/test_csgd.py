"""CSGD: a slow reference, the noise floor, the released form, blocks, guard, and the contract."""

import copy
import warnings

import pytest
import torch
from torch import nn

from bolza.controllers import CSGD, learning_rate_law, stationary_loss
from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.testing import check_controller

F = torch.float64
SGD = torch.optim.SGD


def noisy_bowl(controller, optimizer, theta, curvature, steps, seed=0, loss=None):
    """SGD on ½aθ² with unit noise; mean of ½aθ² over the last fifth of the steps and all entries."""
    draw = torch.Generator().manual_seed(seed)
    total, last = 0.0, steps // 5
    for k in range(steps):
        noise = torch.randn(theta.shape, generator=draw, dtype=theta.dtype)
        theta.grad = curvature * theta.detach() + noise
        optimizer.step()
        if controller is not None:
            controller.step(**({} if loss is None else {"loss": loss}))
        if k >= steps - last:
            total += float((curvature * theta.detach().square()).mean()) / 2 / last
    return total


class Slow:
    """The law of one entry, line by line as it is written down."""

    def __init__(self, x, lr, low, high, z, form="denoised", stable=True):
        self.lr, self.low, self.high, self.z, self.form, self.stable = lr, low, high, z, form, stable
        self.k, self.u = 0, torch.ones_like(x)
        self.g, self.x, self.vg, self.vx, self.c = (torch.zeros_like(x) for _ in range(5))

    def see(self, g, x):
        self.k += 1
        w = torch.nan_to_num(self.g**2 / (self.g**2 + self.vg), nan=0.0) * (self.high - self.low)
        w = (w + 1 - self.high).clamp_min(1 / self.k)
        dg, dx = g - self.g, x - self.x
        self.g, self.x = self.g + w * dg, self.x + w * dx
        self.vg = (1 - w) * (self.vg + w * dg * dg)
        self.vx = (1 - w) * (self.vx + w * dx * dx)
        self.c = (1 - w) * (self.c + w * dg * dx)
        if self.k < 3:
            return
        a, n = self.c / self.vx, (2 - w) / w
        r2 = self.c**2 / (self.vg * self.vx)
        t2 = r2 * (n - 2) / (1 - r2)
        loss = (self.g**2 + (self.vg if self.form == "released" else 0)) / (2 * a)
        wanted = learning_rate_law(loss, self.vg, self.lr, a, exact=self.stable and self.form == "denoised")
        self.u = torch.where(t2 > self.z**2, self.u + w * (wanted - self.u), self.u)


@pytest.mark.parametrize(
    "options", [{}, {"stable": False, "z": 0.0}, {"form": "released"}, {"z": 2.5, "beta": (0.8, 0.999)}]
)
def test_steps_are_those_of_the_law_written_down_entry_by_entry(options):
    theta = torch.full((30,), 3.0, dtype=F, requires_grad=True)
    slow_theta = theta.detach().clone()
    optimizer = SGD([theta], lr=0.7)
    controller = CSGD(optimizer, **options)
    low, high = options.get("beta", (0.9, 0.99))
    rest = {k: v for k, v in options.items() if k in ("form", "stable")}
    slow = Slow(slow_theta, 0.7, low, high, options.get("z", 1.0), **rest)
    draw = torch.Generator().manual_seed(0)
    for _ in range(60):
        noise = torch.randn(30, generator=draw, dtype=F)
        theta.grad = 1.1 * theta.detach() + noise
        optimizer.step()
        controller.step()
        g = 1.1 * slow_theta + noise
        u = slow.u.clone()
        slow.see(g, slow_theta)
        slow_theta = slow_theta - 0.7 * u * g
    torch.testing.assert_close(theta.detach(), slow_theta, rtol=1e-9, atol=1e-11)
    assert float(slow.u.min()) < 0.9
    assert controller.log()[controller._name] == pytest.approx(float(slow.u.mean()), rel=1e-9)


def test_many_small_parameters_large_ones_and_strided_ones_all_see_the_same_law():
    def one(shapes, strided=False):
        values = torch.linspace(1, 3, 40000)
        parts, at = [], 0
        for shape in shapes:
            size = torch.Size(shape).numel()
            part = values[at : at + size].view(shape)
            at += size
            if strided and part.ndim == 4:
                part = part.to(memory_format=torch.channels_last)
            parts.append(part.clone(memory_format=torch.preserve_format).requires_grad_())
        optimizer = SGD(parts, lr=0.5)
        controller = CSGD(optimizer)
        draw = torch.Generator().manual_seed(0)
        for _ in range(12):
            noise, at = torch.randn(40000, generator=draw), 0
            for p in parts:
                p.grad = p.detach() + noise[at : at + p.numel()].view(p.shape)
                at += p.numel()
            optimizer.step()
            controller.step()
        return torch.cat([p.detach().reshape(-1) for p in parts])

    whole = one([(40000,)])
    torch.testing.assert_close(one([(30000,), (7,), (93,), (9900,)]), whole, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(one([(20, 50, 5, 5), (15000,)], strided=True), whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("granularity", ["coordinate", "layer", "global"])
@pytest.mark.parametrize("every", [1, 3])
def test_the_short_way_over_plain_sgd_takes_the_steps_of_the_long_way(granularity, every):
    runs = []
    for decay in (0.0, 1e-300):  # a weight decay too small to matter sends it the long way
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
        optimizer = SGD(net.parameters(), lr=1.5, weight_decay=decay)
        controller = CSGD(optimizer, granularity=granularity, every=every, lower_bound=None)
        assert controller._keep == bool(decay)
        x, y = torch.randn(64, 5, dtype=F), torch.randn(64, 3, dtype=F)
        for k in range(40):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(x[k : k + 8]), y[k : k + 8])
            loss.backward()
            optimizer.step()
            controller.step(loss=loss)
        runs.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
        assert controller.log()["u"] < 0.9
    torch.testing.assert_close(*runs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("granularity", "gain"), [("coordinate", 10), ("layer", 4), ("global", 4)])
def test_noise_floor_falls_to_a_fraction_of_that_of_sgd(granularity, gain):
    curvature = torch.linspace(0.2, 2, 10, dtype=F).repeat(20)
    theta = torch.full((200,), 3.0, dtype=F, requires_grad=True)
    optimizer = SGD([theta], lr=0.2)
    found = noisy_bowl(CSGD(optimizer, granularity=granularity), optimizer, theta, curvature, 1200)
    floor = float(stationary_loss(curvature, 1.0, 0.2).mean())
    assert found < floor / gain


def test_the_released_form_never_anneals_below_the_limit_and_holds_to_it_above():
    theta = torch.full((2000,), 1.0, dtype=F, requires_grad=True)
    optimizer = SGD([theta], lr=0.2)
    controller = CSGD(optimizer, form="released", z=0.0)
    found = noisy_bowl(controller, optimizer, theta, 1.0, 400)
    assert controller.log()["u (limiter only)"] > 0.99
    assert found == pytest.approx(float(stationary_loss(1.0, 1.0, 0.2)), rel=0.1)
    theta = torch.full((2000,), 1.0, dtype=F, requires_grad=True)
    optimizer = SGD([theta], lr=1.5)
    controller = CSGD(optimizer, form="released", z=0.0)
    noisy_bowl(controller, optimizer, theta, 1.0, 400)
    assert controller.log()["u (limiter only)"] == pytest.approx(1 / 1.5, rel=0.05)


def test_global_writes_the_rate_and_follows_what_others_make_of_it():
    theta = torch.full((200,), 3.0, dtype=F, requires_grad=True)
    optimizer = SGD([theta], lr=0.5)
    controller = CSGD(optimizer, granularity="global")
    noisy_bowl(controller, optimizer, theta, 1.0, 300)
    lr = optimizer.param_groups[0]["lr"]
    assert lr == pytest.approx(0.5 * controller.log()["u"])
    assert lr < 0.1
    optimizer.param_groups[0]["lr"] = lr / 10  # a scheduler of the user
    noisy_bowl(controller, optimizer, theta, 1.0, 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * controller.log()["u"])


def test_no_step_promises_more_than_the_loss():
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    before = copy.deepcopy(net.state_dict())
    optimizer = SGD(net.parameters(), lr=1000.0)
    controller = CSGD(optimizer)
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    optimizer.step()
    controller.step(loss=loss)
    promised = sum(float(((before[name] - p.detach()) * p.grad).sum()) for name, p in net.named_parameters())
    assert promised == pytest.approx(float(loss.detach()), rel=1e-4)
    assert 0 < controller.log()["guard"] < 1


def test_a_loss_below_its_bound_is_told_once_and_the_bound_left_out():
    theta = torch.ones(3, requires_grad=True)
    optimizer = SGD([theta], lr=0.1)
    controller = CSGD(optimizer)
    with pytest.warns(RuntimeWarning, match="below lower_bound=0"):
        noisy_bowl(controller, optimizer, theta, 1.0, 1, loss=-1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noisy_bowl(controller, optimizer, theta, 1.0, 5, loss=-1.0)
    assert controller.log()["guard"] == 1


@pytest.mark.parametrize("granularity", ["coordinate", "layer"])
def test_small_gradients_are_controlled_like_large_ones_and_vanishing_ones_do_no_harm(granularity):
    found = []
    for scale in (1.0, 2.0**-40, 1e-30):
        theta = torch.full((50,), 3.0, requires_grad=True)
        optimizer = SGD([theta], lr=0.5 / scale)
        controller = CSGD(optimizer, granularity=granularity)
        draw = torch.Generator().manual_seed(0)
        for _ in range(40):
            theta.grad = (theta.detach() + torch.randn(50, generator=draw)) * scale
            optimizer.step()
            controller.step()
        found.append((theta.detach(), controller.log()["u"]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert found[0][1] < 0.9
    assert bool(found[2][0].isfinite().all())
    assert 0 <= found[2][1] <= 1


def test_half_precision_parameters_keep_their_dtype_and_float32_moments():
    theta = torch.full((50,), 3.0, dtype=torch.bfloat16, requires_grad=True)
    optimizer = SGD([theta], lr=0.5)
    controller = CSGD(optimizer)
    noisy_bowl(controller, optimizer, theta, 1.0, 60)
    assert theta.dtype == torch.bfloat16
    assert [rows.dtype for rows in controller.room.rows] == [torch.float32]
    assert controller.log()["u"] < 0.9
    assert bool(theta.isfinite().all())


@pytest.mark.parametrize("granularity", ["coordinate", "global"])
def test_it_keeps_the_contract_of_a_controller(granularity):
    check_controller(lambda optimizer: CSGD(optimizer, granularity=granularity, every=4))


def test_what_makes_no_sense_is_refused():
    theta = torch.ones(3, requires_grad=True)
    optimizer = SGD([theta], lr=0.1)
    for options, words in (
        ({"granularity": "neuron"}, "granularity='neuron'"),
        ({"form": "noisy"}, "form='noisy'"),
        ({"beta": (0.9, 1.0)}, "beta="),
        ({"z": -1.0}, "z=-1.0"),
        ({"every": 0}, "every=0"),
        ({"u0": 0.0}, "u0=0.0"),
    ):
        with pytest.raises(ArgumentError, match=words):
            CSGD(optimizer, **options)
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = SGD(table.parameters(), lr=0.1)
    controller = CSGD(optimizer)
    table(torch.tensor([1])).sum().backward()
    optimizer.step()
    with pytest.raises(UnsupportedError, match="sparse"):
        controller.step()
    late = torch.ones(2, requires_grad=True)
    optimizer = SGD([theta], lr=0.1)
    controller = CSGD(optimizer)
    noisy_bowl(controller, optimizer, theta, 1.0, 1)
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(2)
    with pytest.raises(ArgumentError, match="after the controller was made"):
        noisy_bowl(controller, optimizer, theta, 1.0, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, lr=0.3, weight_decay=0.3),
        lambda p: torch.optim.AdamW(p, lr=0.3, weight_decay=0.3),
        lambda p: torch.optim.RMSprop(p, lr=0.3),
        lambda p: torch.optim.Adamax(p, lr=0.3),
    ],
    ids=["SGD with decay", "AdamW", "RMSprop", "Adamax"],
)
def test_it_anneals_below_the_floor_whatever_the_step_and_the_weight_decay(make):
    found = {}
    for worn in (False, True):
        theta = torch.full((40,), 3.0, dtype=F, requires_grad=True)
        optimizer = make([theta])
        controller = CSGD(optimizer, granularity="layer") if worn else None
        draw = torch.Generator().manual_seed(0)
        path = []
        for _ in range(300):
            theta.grad = theta.detach() - 3 + torch.randn(40, generator=draw, dtype=F)
            optimizer.step()
            if controller is not None:
                controller.step()
            path.append(theta.detach().clone())
        found[worn] = float(torch.stack(path[-60:]).var(0).mean())
    assert found[True] < 0.3 * found[False]


@pytest.mark.parametrize("granularity", ["coordinate", "layer", "global"])
def test_momentum_that_a_scheduler_sets_later_counts(granularity):
    """The same run, whether the momentum was there when the controller was made or came afterwards."""
    ends = []
    for late in (False, True):
        theta = torch.full((4,), 3.0, dtype=F, requires_grad=True)
        optimizer = SGD([theta], lr=0.1, momentum=0.0 if late else 0.9)
        controller = CSGD(optimizer, granularity=granularity)
        optimizer.param_groups[0]["momentum"] = 0.9
        draw = torch.Generator().manual_seed(0)
        for _ in range(30):
            theta.grad = theta.detach() + torch.randn(4, generator=draw, dtype=F)
            optimizer.step()
            controller.step()
        ends.append(theta.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("granularity", ["coordinate", "layer", "global"])
def test_a_group_at_rest_stays_there_and_does_not_stop_the_others(granularity):
    still, theta = (torch.full((20,), 3.0, requires_grad=True) for _ in range(2))
    optimizer = SGD([{"params": [still], "lr": 0.0}, {"params": [theta]}], lr=0.3)
    controller = CSGD(optimizer, granularity=granularity)
    draw = torch.Generator().manual_seed(0)
    for _ in range(60):
        for p in (still, theta):
            p.grad = p.detach() + torch.randn(20, generator=draw)
        optimizer.step()
        controller.step()
    assert torch.equal(still, torch.full_like(still, 3.0)) and optimizer.param_groups[0]["lr"] == 0
    assert theta.square().mean() < 0.2


def test_an_optimizer_that_maximizes_is_refused():
    with pytest.raises(ArgumentError, match="maximize"):
        CSGD(SGD([torch.ones(1, requires_grad=True)], lr=0.1, maximize=True))
