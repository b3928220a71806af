"""The contract accepts a right system and rejects each of a row of broken ones."""

import pytest
import torch

from bolza.core import CallableCost
from bolza.testing import ContractError, check_system


class Pendulum:
    """Right: two states, one control, an explicit Euler step."""

    horizon = 5

    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        self.controls = [torch.randn(1, generator=draw, dtype=torch.float64) for _ in range(5)]

    def step(self, t, x, u):
        angle, speed = x["angle"], x["speed"]
        return {"angle": angle + 0.1 * speed, "speed": speed + 0.1 * (u - torch.sin(angle))}


class Forgetful:
    horizon = 5
    controls = ()


class WrongHorizon(Pendulum):
    horizon = 4


class Random(Pendulum):
    def step(self, t, x, u):
        out = super().step(t, x, u)
        return {**out, "speed": out["speed"] + 1e-3 * torch.randn(1, dtype=torch.float64)}


class ChangesState(Pendulum):
    def step(self, t, x, u):
        out = super().step(t, x, u)
        x["angle"].mul_(0.5)
        return out


class ChangesControl(Pendulum):
    def step(self, t, x, u):
        out = super().step(t, x, u)
        with torch.no_grad():
            u.mul_(0.5)
        return out


class Detaches(Pendulum):
    def step(self, t, x, u):
        out = super().step(t, x, u)
        return {**out, "angle": out["angle"].detach()}


class WrongDerivative(Pendulum):
    """Adjoint and autograd agree with each other, but not with the function."""

    def step(self, t, x, u):
        out = super().step(t, x, u)
        value = out["speed"].detach()
        return {**out, "speed": value + 2 * (out["speed"] - value)}


X0 = {"angle": torch.tensor([0.4], dtype=torch.float64), "speed": torch.tensor([0.0], dtype=torch.float64)}
COST = CallableCost(terminal=lambda x: (x["angle"] ** 2).sum(), running=lambda t, x, u: 0.1 * (u**2).sum())


def test_a_right_system_passes():
    check_system(Pendulum(), X0, COST)


def test_a_right_system_passes_in_single_precision():
    single = {name: value.float() for name, value in X0.items()}
    check_system(Pendulum(), single, COST, [u.float() for u in Pendulum().controls])


@pytest.mark.parametrize(
    ("system", "clause"),
    [
        (Forgetful, "has_the_form"),
        (WrongHorizon, "has_the_form"),
        (Random, "steps_are_pure"),
        (ChangesState, "steps_are_pure"),
        (ChangesControl, "steps_are_pure"),
        (Detaches, "gradient_equals_differences"),
        (WrongDerivative, "gradient_equals_differences"),
    ],
)
def test_a_broken_system_fails_on_the_clause_it_breaks(system, clause):
    with pytest.raises(ContractError) as caught:
        check_system(system(), X0, COST)
    assert caught.value.clause == clause
