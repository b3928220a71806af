import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bolza.core import CallableCost, adjoint, checkpointed_adjoint, rollout
from bolza.core.errors import ArgumentError, ShapeError
from bolza.systems import SGD, TrainingSystem

F64 = torch.float64


class Pendulum:
    """A state of two leaves, one of them without a derivative."""

    def __init__(self, horizon):
        g = torch.Generator().manual_seed(horizon)
        self.horizon = horizon
        self.controls = [0.1 * torch.randn(2, dtype=F64, generator=g) for _ in range(horizon)]
        self.evaluations = 0

    def step(self, t, x, u):
        self.evaluations += 1
        return {"count": x["count"] + 1, "x": x["x"] + 0.1 * torch.sin(x["x"].flip(0) + u) - 0.01 * t * u**2}


START = {"count": 0, "x": torch.tensor([0.3, -0.2], dtype=F64)}
COST = CallableCost(
    terminal=lambda x: x["x"].square().sum(),
    running=lambda t, x, u: (x["x"] * u).sum() + 0.1 * u.square().sum(),
)


@pytest.mark.parametrize("horizon", [1, 7, 16])
@pytest.mark.parametrize("every", [None, 3, 50])
def test_the_numbers_are_those_of_the_adjoint_to_the_bit(horizon, every):
    system = Pendulum(horizon)
    expected = adjoint(system, COST, rollout(system, START))
    found = checkpointed_adjoint(system, COST, START, every=every)
    assert_close(found.gradients, expected.gradients, rtol=0, atol=0)
    assert torch.equal(found.costate["x"], expected.costates[0]["x"]) and found.costate["count"] is None
    assert torch.equal(found.value, expected.value)
    assert torch.equal(found.final["x"], expected.states[-1]["x"]) and found.final["count"] == horizon


@pytest.mark.parametrize(("every", "states"), [(None, 19), (1, 100), (20, 24), (100, 100)])
def test_states_held_are_steps_over_k_and_k(every, states):
    system = Pendulum(100)
    found = checkpointed_adjoint(system, COST, START, every=every)
    assert found.most_states == states
    k = every or 10
    assert system.evaluations <= 100 + 100 + 100 * (1 - 1 / k)


def test_memory_grows_like_the_root_of_the_number_of_steps():
    held = [checkpointed_adjoint(Pendulum(n), COST, START).most_states for n in (16, 64, 256)]
    slope = math.log(held[2] / held[0]) / math.log(16)
    assert slope == pytest.approx(0.5, abs=0.06)


def test_a_visitor_sees_every_step_from_the_last_with_the_costate_after_it():
    system = Pendulum(9)
    expected = adjoint(system, COST, rollout(system, START))
    seen = []
    found = checkpointed_adjoint(
        system, COST, START, gradients=False, visit=lambda t, x, p, g: seen.append((t, x["x"], p["x"], g))
    )
    assert found.gradients == () and [t for t, *_ in seen] == list(range(8, -1, -1))
    for t, x, p, g in seen:
        assert torch.equal(x, expected.states[t]["x"]) and torch.equal(p, expected.costates[t + 1]["x"])
        assert torch.equal(g, expected.gradients[t])


def test_a_training_run_has_the_same_hyper_gradients_with_few_states():
    net = nn.Linear(3, 2, dtype=F64)
    data = [(torch.randn(4, 3, dtype=F64), torch.randn(4, 2, dtype=F64)) for _ in range(9)]
    system = TrainingSystem.from_module(net, nn.functional.mse_loss, data, SGD(0.1, momentum=0.9))
    cost = CallableCost(terminal=lambda x: x["params"]["weight"].square().sum())
    start = system.initial_state(dict(net.named_parameters()))
    expected = adjoint(system, cost, rollout(system, start)).gradients
    assert_close(checkpointed_adjoint(system, cost, start).gradients, expected, rtol=0, atol=0)


def test_senseless_arguments_are_refused_by_name():
    system = Pendulum(4)
    with pytest.raises(ArgumentError, match="every=0 must be at least 1"):
        checkpointed_adjoint(system, COST, START, every=0)
    with pytest.raises(ArgumentError, match="controls has 3 entries"):
        checkpointed_adjoint(system, COST, START, system.controls[:3])
    with pytest.raises(ShapeError, match="terminal cost has shape"):
        checkpointed_adjoint(system, CallableCost(terminal=lambda x: x["x"]), START)
