import pytest
import torch
from pytest import approx
from torch.nn.functional import mse_loss
from torch.testing import assert_close

from bolza.core import (
    CallableCost,
    Cost,
    TerminalCost,
    Trajectory,
    adjoint,
    hamiltonian,
    hamiltonian_gap,
    maximum_principle_residuals,
    proximal_minimizer,
    rollout,
)
from bolza.core.errors import ArgumentError, ShapeError
from bolza.systems import LinearSystem

F64 = torch.float64


class Affine:
    """x ← tanh(x W) + b, of any number of steps."""

    def __init__(self, controls):
        self.controls, self.horizon = controls, len(controls)

    def step(self, t, x, u):
        return torch.tanh(x @ u["w"]) + u["b"]


class Tagged:
    """A state that carries integers and a mask beside the tensor."""

    horizon = 2
    controls = (torch.tensor([2.0], dtype=F64), torch.tensor([3.0], dtype=F64))

    def step(self, t, x, u):
        return {"x": x["x"] * u * x["id"], "id": x["id"], "size": x["size"]}


class Plain:
    """x ← x + u."""

    def __init__(self, horizon=2, control=0.0):
        self.horizon = horizon
        self.controls = tuple(torch.full((1,), control, dtype=F64) for _ in range(horizon))

    def step(self, t, x, u):
        return x + u


def network(depth=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Affine(
        tuple(
            {"w": torch.randn(2, 2, dtype=F64, generator=g), "b": torch.randn(2, dtype=F64, generator=g)}
            for _ in range(depth)
        )
    )


def weighted_cost():
    return CallableCost(
        terminal=lambda x: x.square().mean(),
        running=lambda t, x, u: (t + 1) * (u["w"].square().sum() * x.square().mean()),
    )


def start(seed=1):
    return torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(seed))


def total(system, cost, x0, controls):
    run = rollout(system, x0, controls)
    return cost.terminal(run.states[-1]) + sum(
        cost.running(t, run.states[t], u) for t, u in enumerate(controls)
    )


def test_costs_are_recognised_by_their_two_functions():
    assert isinstance(TerminalCost(mse_loss, 0), Cost) and isinstance(CallableCost(), Cost)
    assert not isinstance(Plain(), Cost)
    assert float(CallableCost().terminal(None)) == 0


def test_a_terminal_cost_is_the_loss_against_its_target():
    cost = TerminalCost(mse_loss, torch.zeros(2))
    assert float(cost.terminal(torch.full((2,), 3.0))) == 9 and cost.running(0, None, None) == 0


def test_costates_and_gradients_are_those_of_autograd():
    system, cost, x0 = network(), weighted_cost(), start()
    solved = adjoint(system, cost, rollout(system, x0))
    leaf = x0.clone().requires_grad_()
    controls = [{name: value.clone().requires_grad_() for name, value in u.items()} for u in system.controls]
    run = rollout(system, leaf, controls)
    value = total(system, cost, leaf, controls)
    assert_close(solved.value, value.detach(), rtol=1e-14, atol=0)
    wanted = torch.autograd.grad(value, [leaf, *(u[name] for u in controls for name in ("w", "b"))])
    assert_close(solved.costates[0], wanted[0], rtol=0, atol=1e-12)
    given = [g[name] for g in solved.gradients for name in ("w", "b")]
    assert_close(given, list(wanted[1:]), rtol=0, atol=1e-12)
    # an interior costate: the derivative of what is still to come
    middle = run.states[1].detach().requires_grad_()
    rest = Affine(system.controls[1:])
    shifted = CallableCost(cost.terminal, lambda t, x, u: cost.running(t + 1, x, u))
    (p1,) = torch.autograd.grad(total(rest, shifted, middle, rest.controls), middle)
    assert_close(solved.costates[1], p1, rtol=0, atol=1e-12)


def test_the_result_is_detached_unless_a_graph_is_asked_for():
    u = torch.ones(1, dtype=F64, requires_grad=True)
    run = rollout(Plain(1), torch.ones(1, dtype=F64), [u])
    cost = CallableCost(terminal=lambda x: x.square().sum())
    solved = adjoint(Plain(1), cost, run)
    assert not solved.value.requires_grad and not solved.costates[0].requires_grad and u.grad is None
    assert adjoint(Plain(1), cost, run, create_graph=True).gradients[0].requires_grad


def test_adjoint_works_where_gradients_are_off():
    with torch.no_grad():
        solved = adjoint(network(), weighted_cost(), rollout(network(), start()))
    assert all(torch.isfinite(p).all() for p in solved.costates)


def test_a_graph_gives_second_derivatives():
    system, cost, x0 = network(), weighted_cost(), start()
    leaves = [value.clone().requires_grad_() for u in system.controls for value in u.values()]
    controls = [dict(zip(("w", "b"), leaves[2 * t : 2 * t + 2], strict=True)) for t in range(3)]
    leaf = x0.clone().requires_grad_()

    solved = adjoint(system, cost, rollout(system, leaf, controls), create_graph=True)
    ours = [solved.costates[0], *(g[name] for g in solved.gradients for name in ("w", "b"))]
    theirs = torch.autograd.grad(total(system, cost, leaf, controls), [leaf, *leaves], create_graph=True)
    assert_close(ours, list(theirs), rtol=0, atol=1e-12)

    g = torch.Generator().manual_seed(3)
    directions = [torch.randn(a.shape, dtype=F64, generator=g) for a in ours]
    second = [torch.autograd.grad(f, [leaf, *leaves], directions, retain_graph=True) for f in (ours, theirs)]
    assert_close(list(second[0]), list(second[1]), rtol=0, atol=1e-10)
    assert max(float(a.abs().max()) for a in second[0]) > 0.1


def test_a_graph_can_be_asked_for_a_state_that_had_none():
    solved = adjoint(
        Plain(1),
        CallableCost(terminal=lambda x: (x**3).sum()),
        rollout(Plain(1), torch.ones(1, dtype=F64)),
        create_graph=True,
    )
    assert float(solved.costates[0].detach()) == 3 and solved.costates[0].requires_grad


def test_a_control_that_two_steps_share_has_partial_derivatives_in_each():
    u = torch.full((1,), 2.0, dtype=F64, requires_grad=True)

    class Product:
        horizon, controls = 3, (u, u, u)

        def step(self, t, x, u):
            return x * u

    cost = CallableCost(terminal=lambda x: x.sum())
    for create_graph in (False, True):
        run = rollout(Product(), torch.ones(1, dtype=F64))
        solved = adjoint(Product(), cost, run, create_graph=create_graph)
        assert [float(g.detach()) for g in solved.gradients] == [4, 4, 4]
    (curvature,) = torch.autograd.grad(sum(solved.gradients), u)
    assert float(curvature) == 6 * 2  # of u³


def test_leaves_without_derivative_have_no_costate():
    x0 = {"x": torch.tensor([1.0], dtype=F64), "id": torch.tensor([2]), "size": 7}
    cost = CallableCost(terminal=lambda x: x["x"].sum())
    solved = adjoint(Tagged(), cost, rollout(Tagged(), x0))
    assert [float(p["x"]) for p in solved.costates] == [24, 6, 1]
    assert all(p["id"] is None and p["size"] is None for p in solved.costates)
    residuals = maximum_principle_residuals(Tagged(), cost, solved)
    assert max(*residuals.state, *residuals.costate, residuals.terminal) == 0
    assert residuals.stationarity == (12.0, 8.0)
    assert float(hamiltonian(Tagged(), cost, 0, x0, solved.costates[1], Tagged.controls[0])) == 24


def test_a_state_of_integers_only_still_gives_the_gradient_of_the_control():
    class Embedding:
        horizon, controls = 1, (torch.ones(3, 2, dtype=F64),)

        def step(self, t, x, u):
            return u[x]

    cost = CallableCost(terminal=lambda x: x.sum())
    solved = adjoint(Embedding(), cost, rollout(Embedding(), torch.tensor([2, 2])))
    assert solved.costates[0] is None and solved.gradients[0].sum(1).tolist() == [0, 0, 4]
    assert maximum_principle_residuals(Embedding(), cost, solved).costate == (0.0,)


def test_a_state_that_the_cost_does_not_see_has_a_zero_costate():
    solved = adjoint(Plain(1), CallableCost(), rollout(Plain(1), torch.ones(1, dtype=F64)))
    assert solved.costates[0].tolist() == [0] and solved.gradients[0].tolist() == [0]


def test_a_running_cost_that_is_a_number_counts_without_gradient():
    cost = CallableCost(terminal=lambda x: x.sum(), running=lambda t, x, u: 2.5)
    solved = adjoint(Plain(2), cost, rollout(Plain(2), torch.ones(1, dtype=F64)))
    assert float(solved.value) == 6 and solved.costates[0].tolist() == [1]


def test_a_cost_that_is_not_one_number_is_refused_by_name():
    run = rollout(Plain(1), torch.ones(3, dtype=F64))
    with pytest.raises(ShapeError, match=r"terminal cost has shape \(3,\).*mean over samples"):
        adjoint(Plain(1), CallableCost(terminal=lambda x: x), run)
    with pytest.raises(ShapeError, match="terminal cost has shape float"):
        adjoint(Plain(1), CallableCost(terminal=lambda x: 1.0), run)
    for running in (lambda t, x, u: x, lambda t, x, u: x.detach()):
        with pytest.raises(ShapeError, match="running cost has shape"):
            adjoint(Plain(1), CallableCost(terminal=lambda x: x.sum(), running=running), run)


def test_a_costate_of_another_batch_is_refused():
    with pytest.raises(ShapeError, match=r"step 0 returned a state of shape \[\(4,\)\].*\[\(3,\)\]"):
        hamiltonian(Plain(), CallableCost(), 0, torch.zeros(4), torch.zeros(3), torch.zeros(1))
    short = Trajectory(states=(torch.zeros(4), torch.zeros(3)), controls=(torch.zeros(1),))
    with pytest.raises(ShapeError, match="same batch"):
        adjoint(Plain(1), CallableCost(terminal=lambda x: x.sum()), short)
    with pytest.raises(ArgumentError, match="t is 2, but the steps"):
        hamiltonian(Plain(2), CallableCost(), 2, torch.zeros(1), torch.zeros(1), torch.zeros(1))


def test_the_hamiltonian_is_the_running_cost_and_the_costate_on_the_next_state():
    cost = CallableCost(running=lambda t, x, u: (u**2).sum())
    x, p, u = (torch.tensor([value], dtype=F64, requires_grad=True) for value in (1.0, 3.0, 2.0))
    value = hamiltonian(Plain(), cost, 1, x, p, u)
    assert value.item() == 4 + 3 * (1 + 2)
    assert [float(g) for g in torch.autograd.grad(value, (x, p, u))] == [3, 3, 3 + 4]


def test_the_inner_product_of_a_complex_state_is_that_of_autograd():
    """d Re⟨p, f⟩ in x is what the chain rule of torch gives for the cotangent p."""
    x = torch.tensor([1.0 + 2.0j, -0.5j], dtype=torch.complex128, requires_grad=True)
    p = torch.tensor([0.3 - 1.0j, 2.0 + 0.5j], dtype=torch.complex128)

    class Square:
        horizon, controls = 1, ({},)

        def step(self, t, x, u):
            return x * x

    (ours,) = torch.autograd.grad(hamiltonian(Square(), CallableCost(), 0, x, p, {}), x)
    (theirs,) = torch.autograd.grad(x * x, x, p)
    assert_close(ours, theirs)


def test_the_proximal_minimiser_solves_a_quadratic_exactly():
    """min ½ a v² − v + ρ/2 (v − u)²: v = (1 + ρu)/(a + ρ)."""
    a, rho = torch.tensor([1.0, 4.0], dtype=F64), 0.5
    u = {"v": torch.tensor([2.0, -1.0], dtype=F64), "n": 3}
    better = proximal_minimizer(rho)(lambda v: (a * v["v"] ** 2 / 2 - v["v"]).sum(), u)
    # L-BFGS forgets pairs with yᵀs < 1e-10, so that the last digits come by descent
    assert_close(better["v"], (1 + rho * u["v"]) / (a + rho), rtol=0, atol=1e-8)
    assert better["n"] == 3 and u["v"].tolist() == [2.0, -1.0]


def test_the_proximal_minimiser_never_makes_it_worse():
    start = torch.zeros(1, dtype=F64)
    assert proximal_minimizer()(lambda v: v.sum() * float("nan"), start) is not None
    worse = proximal_minimizer()(lambda v: torch.where(v.sum() == 0, v.sum(), v.sum() + 1e6), start)
    assert torch.equal(worse, start)
    assert proximal_minimizer()(lambda v: torch.zeros(()), {}) == {}


@pytest.mark.parametrize("options", [{"rho": 0.0}, {"rho": -1.0}, {"iterations": 0}])
def test_the_proximal_minimiser_refuses_what_is_not_positive(options):
    with pytest.raises(ArgumentError, match="both must be positive"):
        proximal_minimizer(**options)


def test_the_gap_of_a_linear_hamiltonian_is_the_squared_gradient_over_rho():
    cost = CallableCost(terminal=lambda x: 3 * x.sum())
    run = rollout(Plain(2), torch.zeros(1, dtype=F64))
    assert hamiltonian_gap(Plain(2), cost, run) == approx([9.0, 9.0], rel=1e-6)
    gaps = hamiltonian_gap(Plain(2), cost, run, minimizer=proximal_minimizer(rho=2.0))
    assert gaps == approx([4.5, 4.5], rel=1e-6)


def test_the_gap_leaves_gradients_of_other_parameters_alone():
    weight = torch.nn.Parameter(torch.ones(1, dtype=F64))

    class Scaled(Plain):
        def step(self, t, x, u):
            return weight * (x + u)

    cost = CallableCost(terminal=lambda x: x.sum())
    with torch.no_grad():
        run = rollout(Scaled(), torch.zeros(1, dtype=F64))
    assert all(gap > 0 for gap in hamiltonian_gap(Scaled(), cost, run))
    assert weight.grad is None


def test_residuals_say_which_condition_fails():
    system, cost, x0 = network(), weighted_cost(), start()
    solved = adjoint(system, cost, rollout(system, x0))
    exact = maximum_principle_residuals(system, cost, solved)
    assert max(*exact.state, *exact.costate, exact.terminal) < 1e-13
    norms = [float(torch.cat([g.flatten() for g in u.values()]).norm()) for u in solved.gradients]
    assert list(exact.stationarity) == approx(norms, rel=1e-12)

    p = list(solved.costates)
    p[3] = p[3] + 1.0
    off = maximum_principle_residuals(system, cost, Trajectory(solved.states, solved.controls, tuple(p)))
    assert off.terminal == approx(10**0.5) and off.costate[2] > 1e-3 and off.costate[0] < 1e-13
    x = list(solved.states)
    x[1] = x[1] + 2.0
    off = maximum_principle_residuals(system, cost, Trajectory(tuple(x), solved.controls, solved.costates))
    assert off.state[0] == approx(2 * 10**0.5) and off.state[1] > 1e-3 and off.state[2] < 1e-13


def test_residuals_of_a_step_without_control_have_no_stationarity():
    class Free(Plain):
        controls = ({}, {})

        def __init__(self):
            self.horizon = 2

        def step(self, t, x, u):
            return 2 * x

    cost = CallableCost(terminal=lambda x: x.sum())
    solved = adjoint(Free(), cost, rollout(Free(), torch.ones(1, dtype=F64)))
    assert maximum_principle_residuals(Free(), cost, solved).stationarity == (0.0, 0.0)
    assert hamiltonian_gap(Free(), cost, solved) == (0.0, 0.0)


def test_residuals_need_costates():
    with pytest.raises(ArgumentError, match="call adjoint"):
        maximum_principle_residuals(Plain(), CallableCost(), rollout(Plain(), torch.ones(1)))


def test_states_and_controls_that_do_not_belong_together_are_refused() -> None:
    system = LinearSystem(torch.eye(1), torch.eye(1), horizon=3)
    run = rollout(system, torch.ones(1))
    cut = Trajectory(states=run.states, controls=run.controls[:2])
    with pytest.raises(ShapeError, match="4 states for 2 controls"):
        adjoint(system, CallableCost(terminal=lambda x: x.sum()), cut)


def test_a_rollout_in_inference_mode_has_an_adjoint() -> None:
    system = LinearSystem(2 * torch.eye(1), torch.eye(1), horizon=2)
    with torch.inference_mode():
        run = rollout(system, torch.ones(1))
    solved = adjoint(system, CallableCost(terminal=lambda x: x.sum()), run)
    assert solved.costates is not None and solved.costates[0].item() == 4.0
