import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from bolza.controllers import HyperGradient, hypergradients, shortened
from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.systems import SGD, Adam
from bolza.testing import check_controller

F64 = torch.float64


def problem(steps=6):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    data = [(torch.randn(8, 3, dtype=F64), torch.randint(2, (8,))) for _ in range(steps + 1)]
    return net, data[:steps], data[steps]


def test_a_window_of_one_is_the_published_rule_step_by_step():
    """log α ← log α + κ cos(g_t, g_{t−1}), and the new α makes the step."""
    net, data, _ = problem()
    theta = [p.detach().clone() for p in net.parameters()]
    alpha, previous, rates = 0.3, None, []
    for x, y in data:
        leaves = [p.requires_grad_() for p in theta]
        named = dict(zip(dict(net.named_parameters()), leaves, strict=True))
        loss = cross_entropy(torch.func.functional_call(net, named, x), y)
        g = torch.autograd.grad(loss, leaves)
        flat = torch.cat([part.reshape(-1) for part in g])
        if previous is not None:
            alpha *= math.exp(0.2 * float(flat @ previous / flat.norm() / previous.norm()))
        previous = flat
        theta = [p.detach() - alpha * part for p, part in zip(theta, g, strict=True)]
        rates.append(alpha)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    controller = HyperGradient(optimizer, meta_lr=0.2, tolerance=None)
    for x, y in data:
        optimizer.zero_grad()
        loss = cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        controller.step(loss=loss)
    assert_close(controller.history.values["lr"], rates, rtol=1e-12, atol=0)
    assert_close(list(net.parameters()), [nn.Parameter(p) for p in theta], rtol=0, atol=1e-12)


CASES = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01), SGD(0.1, weight_decay=0.01)),
    "momentum": (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, weight_decay=0.01),
        SGD(0.1, momentum=0.8, weight_decay=0.01),
    ),
    "nesterov": (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, weight_decay=0.01, nesterov=True),
        SGD(0.1, momentum=0.8, weight_decay=0.01, nesterov=True),
    ),
    "adam": (
        lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.01),
        Adam(0.02, weight_decay=0.01),
    ),
    "adamw": (
        lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.01),
        Adam(0.02, weight_decay=0.01, decoupled=True),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_tangents_without_end_are_those_of_the_whole_run(name):
    make, rule = CASES[name]
    net, data, held_out = problem()
    hyper = ["lr", "weight_decay"] + (["momentum"] if name in ("momentum", "nesterov") else [])
    expected = hypergradients(net, cross_entropy, data, held_out, rule, hyper=hyper).total
    optimizer = make(net.parameters())
    controller = HyperGradient(
        optimizer,
        net,
        cross_entropy,
        data,
        hyper=hyper,
        window=math.inf,
        meta_lr=1e-14,
        tolerance=None,
        stabilize=False,
    )
    for x, y in data:
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
        controller.step(batch=(x, y))
    slope = torch.autograd.grad(cross_entropy(net(held_out[0]), held_out[1]), list(net.parameters()))
    group = optimizer.param_groups[0]
    scale = {
        n: group[n] * ((1 - group[n]) if n == "momentum" else 1) for n in hyper
    }  # from h to its coordinate
    for tangent in controller._tangents:
        found = sum((g * z).sum() for g, z in zip(slope, tangent.theta, strict=True))
        assert_close(found, expected[tangent.name] * scale[tangent.name], rtol=1e-9, atol=1e-12)


def quadratic(lr, controller_of, steps=60, curvature=1.0):
    w = torch.full((4,), 3.0, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=lr)
    controller = controller_of(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = curvature * w.square().sum() / 2
        loss.backward()
        optimizer.step()
        controller.step(loss=loss)
    return float(curvature * w.detach().square().sum() / 2), controller


@pytest.mark.parametrize("lr", [1e-3, 0.1, 1.0, 30.0, 1e4])
def test_any_start_reaches_the_minimum_of_a_quadratic(lr):
    loss, _ = quadratic(lr, lambda o: HyperGradient(o, meta_lr=0.3))
    assert loss < 1e-4


def test_a_rate_far_too_large_is_taken_back_with_its_step():
    w = torch.tensor([1.0], requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=11.0)
    controller = HyperGradient(optimizer, tolerance=0.25)
    places = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = w.square().sum() / 2
        loss.backward()
        optimizer.step()
        controller.step(loss=loss)
        places.append(w.item())
    # w: 1 → −10; then g·d = −10 · −11 = 110 against a loss of ½: s = 0.125/110 of the step is kept
    assert places == pytest.approx([-10.0, 1 - 11 * 0.125 / 110])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0125) and controller.retracted == 1


def test_shortening_starts_at_the_tolerance_and_keeps_at_most_half():
    assert shortened(0.25, 1.0, 0.25) == 1 and shortened(0.26, 1.0, 0.25) == 0.5
    assert shortened(25.0, 1.0, 0.25) == 0.01 and shortened(1.0, -1.0, 0.25) == 1


def test_beyond_the_stability_limit_tangents_stay_bounded():
    """Curvature 3, η 1: θ̇ grows by |1 − 3| a step unless its curvature is damped."""
    found = {}
    for stabilize in (True, False):
        w = torch.full((1,), 1e-6, requires_grad=True)
        net = nn.ParameterList([w])

        class Net(nn.Module):
            def __init__(self, w=w):
                super().__init__()
                self.w = nn.Parameter(w.detach().clone())

            def forward(self, x):
                return self.w * x

        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        data = (torch.ones(1), torch.zeros(1))

        def loss(a, y):
            return 1.5 * (a - y).square().sum()

        controller = HyperGradient(
            optimizer, net, loss, data, window=math.inf, meta_lr=1e-9, tolerance=None, stabilize=stabilize
        )
        ratios = []
        for _ in range(12):
            optimizer.zero_grad()
            loss(net(data[0]), data[1]).backward()
            before = float(net.w.detach())
            optimizer.step()
            controller.step()
            ratios.append(abs(float(controller._tangents[0].theta[0]) / before))
        found[stabilize] = ratios[-1]
        assert (controller.log()["damping"] < 0.7) is stabilize
    assert found[True] < found[False] / 2  # 12 steps of growth at twice the rate of w itself


def test_momentum_and_decay_move_in_their_own_coordinates_and_stay_inside():
    net, data, held_out = problem(40)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.5, weight_decay=1e-3)
    controller = HyperGradient(
        optimizer,
        net,
        cross_entropy,
        data,
        hyper=("lr", "momentum", "weight_decay"),
        window=10,
        validation=held_out,
        limits={"momentum": (0.1, 0.6)},
    )
    for x, y in data:
        optimizer.zero_grad()
        loss = cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        controller.step(loss=loss)
    group = optimizer.param_groups[0]
    assert 0.1 <= group["momentum"] <= 0.6 and group["momentum"] != 0.5 and group["weight_decay"] != 1e-3
    values = controller.history.values
    moves = [
        abs(math.log(b / a)) for a, b in zip(values["weight_decay"], values["weight_decay"][1:], strict=False)
    ]
    assert 0 < max(moves) <= 0.1 + 1e-12
    assert {
        "cosine_lr",
        "cosine_momentum",
        "cosine_weight_decay",
        "retracted",
        "damping",
    } <= controller.log().keys()


def test_groups_may_have_rates_of_their_own():
    w, v = (torch.full((2,), 1.0, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [w]}, {"params": [v]}], lr=0.01)
    controller = HyperGradient(optimizer, per_group=True)
    for _ in range(30):
        optimizer.zero_grad()
        loss = (30 * w.square().sum() + 0.01 * v.square().sum()) / 2
        loss.backward()
        optimizer.step()
        controller.step(loss=loss)
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert second == pytest.approx(0.01 * math.exp(2.9), rel=1e-3) and first < second


def test_slack_adds_to_minus_the_cosine():
    _, plain = quadratic(1e-6, lambda o: HyperGradient(o), steps=11)  # ten cosines of minus one
    _, slack = quadratic(1e-6, lambda o: HyperGradient(o, slack=0.3), steps=11)
    rates = [c.optimizer.param_groups[0]["lr"] for c in (plain, slack)]
    assert rates == pytest.approx([1e-6 * math.exp(1.0), 1e-6 * math.exp(1.3)], rel=1e-4)


def test_it_keeps_the_contract_of_controllers():
    check_controller(lambda optimizer: HyperGradient(optimizer))


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_a_resumed_run_with_tangents_is_the_run_in_one_piece(rule):
    def start():
        net, data, held_out = problem(8)
        optimizer = CASES[rule][0](net.parameters())
        return (
            net,
            data,
            optimizer,
            HyperGradient(optimizer, net, cross_entropy, data, window=4, validation=held_out),
        )

    def go(net, optimizer, controller, data):
        for x, y in data:
            optimizer.zero_grad()
            loss = cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            controller.step(loss=loss)

    net, data, optimizer, controller = start()
    go(net, optimizer, controller, data)
    part, data, first, half = start()
    go(part, first, half, data[:4])
    again, data, second, rest = start()
    again.load_state_dict(part.state_dict())
    second.load_state_dict(first.state_dict())
    rest.load_state_dict(half.state_dict())
    go(again, second, rest, data[4:])
    assert_close(dict(again.named_parameters()), dict(net.named_parameters()), rtol=0, atol=0)
    assert rest.history == controller.history


def test_senseless_arguments_are_refused_by_name():
    net, data, _ = problem()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    for word, options in {
        "hyper has 'eps'": {"hyper": ["eps"]},
        "need derivatives": {"hyper": ["momentum"]},
        "window=0": {"window": 0},
        "meta_lr=0": {"meta_lr": 0},
        "tolerance=0": {"tolerance": 0},
        "slack=1": {"slack": 1},
        "without loss or data": {"model": net, "window": 3},
        "weight_decay starts at 0": {
            "model": net,
            "loss": cross_entropy,
            "data": data,
            "hyper": ["weight_decay"],
        },
    }.items():
        if "momentum" in options.get("hyper", ()):
            sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        with pytest.raises(ArgumentError, match=word):
            HyperGradient(sgd, **options)
    with pytest.raises(ArgumentError, match="does not have: pass"):
        HyperGradient(torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1), net, cross_entropy, data)
    with pytest.raises(UnsupportedError, match="RMSprop has no tangent"):
        HyperGradient(torch.optim.RMSprop(net.parameters()), net, cross_entropy, data, window=3)
