import pytest
import torch
from torch.testing import assert_close

from bolza.core import System, linearize, rollout
from bolza.core.errors import ArgumentError, ShapeError

F64 = torch.float64


class Mixed:
    """A nonlinear step on a tree with integers in it, that works in place as layers do."""

    horizon = 2

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.controls = tuple(
            {"w": torch.randn(3, 2, dtype=F64, generator=g), "b": torch.randn(2, dtype=F64, generator=g)}
            for _ in range(2)
        )
        self.x0 = {"x": torch.randn(4, 3, dtype=F64, generator=g), "id": torch.tensor([0, 1, 1, 0])}

    def step(self, t, x, u):
        x["x"].sin_()  # a layer that overwrites its input
        y = torch.tanh(x["x"] @ u["w"] + u["b"]) * (1 + x["id"].unsqueeze(1))
        return {"x": torch.cat([y, y[:, :1] ** 2], dim=1), "id": x["id"]}


class Embedding:
    """A first stage: its state has no derivative."""

    horizon = 1
    controls = (torch.arange(10.0, dtype=F64).reshape(5, 2),)

    def step(self, t, x, u):
        return u[x]


class Autonomous:
    horizon = 1
    controls = ({},)

    def step(self, t, x, u):
        return x.sin()


def test_anything_with_the_three_members_is_a_system():
    assert isinstance(Mixed(), System) and not isinstance(object(), System)


def test_a_rollout_composes_the_steps():
    class Count:
        horizon, controls = 3, (1.0, 2.0, 3.0)

        def step(self, t, x, u):
            return x * (t + 1) + u

    run = rollout(Count(), torch.zeros(1, dtype=F64))
    assert [float(x) for x in run.states] == [0, 1, 4, 15]
    assert run.controls == (1.0, 2.0, 3.0)
    assert float(rollout(Count(), torch.zeros(1), [0.0, 0.0, 1.0]).states[-1]) == 1


def test_a_rollout_stays_attached_to_its_initial_state_and_controls():
    u = torch.ones(1, requires_grad=True)

    class Product:
        horizon, controls = 2, (u, u)

        def step(self, t, x, u):
            return x * u

    (gradient,) = torch.autograd.grad(rollout(Product(), torch.full((1,), 3.0)).states[-1], u)
    assert float(gradient) == 6


def test_a_wrong_number_of_controls_is_refused():
    with pytest.raises(ArgumentError, match="controls has 1 entries, but the horizon of the system is 2"):
        rollout(Mixed(), Mixed().x0, [{}])


def dense_jacobians(system, x, u):
    def flat(x_value, w, b):
        following = system.step(0, {"x": x_value.clone(), "id": x["id"]}, {"w": w, "b": b})
        return following["x"].reshape(-1)

    blocks = torch.autograd.functional.jacobian(flat, (x["x"], u["w"], u["b"]))
    return blocks[0].flatten(1), torch.cat([blocks[2].flatten(1), blocks[1].flatten(1)], dim=1)


def test_a_linearisation_agrees_with_dense_jacobians():
    system = Mixed()
    u = {"b": system.controls[0]["b"], "w": system.controls[0]["w"]}
    a, b = dense_jacobians(system, system.x0, u)
    expansion = linearize(system, 0, system.x0, u)
    dense_a, dense_b = expansion.matrices()
    assert_close(dense_a, a, rtol=0, atol=1e-14)
    assert_close(dense_b, b, rtol=0, atol=1e-14)

    g = torch.Generator().manual_seed(1)
    dx, p = (torch.randn(4, 3, dtype=F64, generator=g) for _ in range(2))
    du = {name: torch.randn(value.shape, dtype=F64, generator=g) for name, value in u.items()}
    flat_u = torch.cat([du["b"].flatten(), du["w"].flatten()])
    tangent = expansion.jvp({"x": dx, "id": None}, du)
    assert tangent["id"] is None
    assert_close(tangent["x"].flatten(), a @ dx.flatten() + b @ flat_u, rtol=0, atol=1e-13)
    assert_close(expansion.jvp({"x": dx, "id": None})["x"].flatten(), a @ dx.flatten(), rtol=0, atol=1e-13)
    assert_close(expansion.jvp(None, du)["x"].flatten(), b @ flat_u, rtol=0, atol=1e-13)
    to_x, to_u = expansion.vjp({"x": p, "id": None})
    assert to_x["id"] is None
    assert_close(to_x["x"].flatten(), a.T @ p.flatten(), rtol=0, atol=1e-13)
    assert_close(torch.cat([to_u["b"].flatten(), to_u["w"].flatten()]), b.T @ p.flatten(), rtol=0, atol=1e-13)


def test_a_linearisation_leaves_the_state_alone_and_keeps_the_next_one():
    system = Mixed()
    before = system.x0["x"].clone()
    expansion = linearize(system, 0, system.x0)
    expansion.jvp(system.x0)
    expansion.vjp(expansion.next_state)
    expansion.matrices()
    assert torch.equal(system.x0["x"], before)
    assert torch.equal(
        expansion.next_state["x"], system.step(0, {**system.x0, "x": before.clone()}, system.controls[0])["x"]
    )


def test_a_state_without_derivative_has_an_empty_a():
    expansion = linearize(Embedding(), 0, torch.tensor([1, 1]))
    a, b = expansion.matrices()
    assert a.shape == (4, 0) and b.shape == (4, 10)
    assert torch.equal(expansion.jvp(None, torch.ones(5, 2, dtype=F64)), torch.ones(2, 2, dtype=F64))
    to_x, to_u = expansion.vjp(torch.ones(2, 2, dtype=F64))
    assert to_x is None and float(to_u[1, 0]) == 2


def test_a_step_without_control_has_an_empty_b():
    x = torch.tensor([0.1, 0.2], dtype=F64)
    expansion = linearize(Autonomous(), 0, x)
    a, b = expansion.matrices()
    assert_close(a, torch.diag(x.cos()))
    assert b.shape == (2, 0)
    assert expansion.vjp(x)[1] == {}


def test_directions_of_the_wrong_shape_are_refused_by_name():
    expansion = linearize(Autonomous(), 0, torch.zeros(2))
    with pytest.raises(ShapeError, match=r"dx has leaves of shapes \[\(3,\)\]"):
        expansion.jvp(torch.zeros(3))
    with pytest.raises(ShapeError, match="du has leaves"):
        expansion.jvp(torch.zeros(2), {"w": torch.zeros(1)})
    with pytest.raises(ShapeError, match="p has leaves"):
        expansion.vjp(torch.zeros(1))


@pytest.mark.parametrize("t", [-1, 1])
def test_a_step_that_does_not_exist_is_refused(t):
    with pytest.raises(ArgumentError, match=f"t is {t}, but the steps of this system are 0 to 0"):
        linearize(Autonomous(), t, torch.zeros(2))
