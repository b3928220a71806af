"""The continuous-depth block: schemes, gradients, trajectories of parameters."""

import copy

import pytest
import torch
from torch import nn

import bolza
from bolza.core import TerminalCost, adjoint, rollout
from bolza.core.errors import ArgumentError, DivergenceError, ShapeError, UnsupportedError
from bolza.models import Basis, Constant, ContinuousBlock, NeuralODE, Piecewise
from bolza.systems import RungeKutta

F64 = torch.float64


def tanh_field(width: int = 3, hidden: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width)).to(F64)


TRAJECTORIES = {
    "constant": lambda: Constant(tanh_field()),
    "piecewise": lambda: Piecewise(tanh_field(), cells=4),
    "basis": lambda: nudged(Basis(tanh_field(), terms=3)),
}


def nudged(basis: Basis) -> Basis:
    with torch.no_grad():
        for c in basis.coefficients:
            c.copy_(0.3 * torch.randn_like(c))
    return basis


def gradients(trajectory, x, **options):
    """State at the end, and the gradient of |x(T)|² in the input and every parameter, as one vector."""
    x = x.clone().requires_grad_()
    out = ContinuousBlock(trajectory, **options)(x)
    found = torch.autograd.grad(out.square().sum(), [x, *trajectory.parameters()])
    return out.detach(), torch.cat([g.flatten() for g in found])


def linear_field(a):
    field = nn.Linear(len(a), len(a), bias=False, dtype=F64)
    field.weight.data.copy_(a)
    return field.requires_grad_(False)


# ------------------------------------------------------------------------------------ the scheme


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4), ("rk38", 4)])
def test_error_of_a_linear_flow_falls_with_the_order_of_the_method(method, order):
    a, x = 0.6 * torch.randn(3, 3, dtype=F64), torch.randn(5, 3, dtype=F64)
    exact = x @ torch.linalg.matrix_exp(1.5 * a).T
    layer = NeuralODE(linear_field(a), horizon=1.5, method=method)
    errors = [float((layer(x, steps=n) - exact).norm()) for n in (20, 40)]
    assert abs(torch.tensor(errors[0] / errors[1]).log2() - order) < 0.1


def test_adaptive_steps_meet_the_exponential_to_their_tolerance():
    a, x = torch.randn(3, 3, dtype=F64), torch.randn(5, 3, dtype=F64)
    layer = NeuralODE(linear_field(a), method="dopri5", rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(layer(x), x @ torch.linalg.matrix_exp(a).T, rtol=1e-6, atol=1e-7)
    few = layer.evaluations
    layer.rtol = layer.atol = 1e-3
    layer(x)
    assert 0 < layer.evaluations < few


def test_own_rk4_is_the_classical_one_of_an_independent_loop():
    field, x, h = tanh_field(), torch.randn(4, 3, dtype=F64), 0.2
    y = x
    for _ in range(5):
        k1 = field(y)
        k2 = field(y + h / 2 * k1)
        k3 = field(y + h / 2 * k2)
        k4 = field(y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    torch.testing.assert_close(NeuralODE(field, steps=5)(x), y, rtol=1e-13, atol=1e-13)


def test_euler_with_a_step_a_cell_is_a_residual_network():
    cells = [tanh_field() for _ in range(4)]
    x = y = torch.randn(2, 3, dtype=F64)
    for cell in cells:
        y = y + 0.5 * cell(y)
    assert torch.equal(ContinuousBlock(Piecewise(cells), horizon=2.0, method="euler", steps=4)(x), y)


def test_order_of_points_on_a_line_is_preserved():
    field = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).to(F64)
    x = torch.linspace(-2, 2, 101, dtype=F64)[:, None]
    assert bool((NeuralODE(field, horizon=2.0, steps=100)(x).diff(dim=0) > 0).all())


def test_time_is_passed_first_and_horizon_ends_it():
    class Clock(nn.Module):
        def forward(self, s, x):
            return s + 0 * x

    layer = NeuralODE(Clock(), horizon=3.0, steps=2, timed=True)
    torch.testing.assert_close(layer(torch.zeros(1, dtype=F64)), torch.tensor([4.5], dtype=F64))
    layer.horizon = 1.0
    torch.testing.assert_close(
        layer(torch.zeros(1, dtype=F64), method="dopri5"), torch.tensor([0.5], dtype=F64)
    )


def test_path_ends_where_the_block_ends_and_passes_through_given_times():
    layer, x = NeuralODE(tanh_field(), steps=8), torch.randn(2, 3, dtype=F64)
    path = layer.path(x)
    assert torch.equal(path[0], x) and torch.allclose(path[-1], layer(x), rtol=1e-14)
    some = layer.path(x, times=[0.25, 0.5, 1.0])
    assert torch.allclose(some, path[[2, 4, 8]], rtol=1e-14)
    velocity = layer.velocity(0.0, x)
    torch.testing.assert_close(velocity, layer.trajectory.field(x))


def test_pairs_of_tensors_are_states_too():
    class Rotation(nn.Module):
        def forward(self, x):
            return x[1], -x[0]

    q, p = torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64)
    for gradient in ("autograd", "checkpoint", "adjoint"):
        start = q.clone().requires_grad_()
        end = NeuralODE(Rotation(), horizon=1.0, steps=40, gradient=gradient)((start, p))
        torch.testing.assert_close(end[0], torch.full_like(q, torch.tensor(1.0).cos()), rtol=0, atol=1e-7)
        (g,) = torch.autograd.grad(end[1].sum(), start)
        torch.testing.assert_close(g, torch.full_like(q, -torch.tensor(1.0).sin()), rtol=0, atol=1e-7)


# ------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_checkpoints_give_the_gradient_of_the_scheme_and_the_adjoint_that_of_the_equation(name):
    trajectory, x = TRAJECTORIES[name](), torch.randn(4, 3, dtype=F64)
    errors = []
    for steps in (6, 12):
        end, direct = gradients(trajectory, x, steps=steps)
        same_end, same = gradients(trajectory, x, steps=steps, gradient="checkpoint")
        assert torch.equal(end, same_end)
        torch.testing.assert_close(same, direct, rtol=1e-12, atol=1e-12)  # sums in another order
        adjoint_end, other = gradients(trajectory, x, steps=steps, gradient="adjoint")
        assert torch.equal(end, adjoint_end)
        errors.append(float((other - direct).norm() / direct.norm()))
    assert errors[1] < 1e-4
    assert errors[0] / errors[1] > 2**3.5  # fourth order


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_adaptive_adjoint_agrees_to_its_tolerance(name):
    trajectory, x = TRAJECTORIES[name](), torch.randn(4, 3, dtype=F64)
    _, exact = gradients(trajectory, x, steps=64)
    errors = []
    for tolerance in (1e-2, 1e-5):
        _, found = gradients(
            trajectory, x, method="dopri5", gradient="adjoint", rtol=tolerance, atol=tolerance
        )
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[1] < 1e-4 and errors[1] < errors[0]


def test_adjoint_keeps_nothing_that_grows_with_the_steps():
    layer, x = NeuralODE(tanh_field()), torch.randn(16, 3, dtype=F64)

    def kept(gradient, steps):
        layer.gradient, sizes = gradient, {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
        ):
            layer(x, steps=steps)
        return sum(sizes.values())

    assert kept("adjoint", 40) == kept("adjoint", 4)
    assert kept("autograd", 40) > 5 * kept("autograd", 4)


@pytest.mark.parametrize("gradient", ["autograd", "checkpoint", "adjoint"])
def test_weights_swapped_in_for_a_call_are_those_differentiated(gradient):
    layer, x = NeuralODE(tanh_field(), steps=3, gradient=gradient), torch.randn(4, 3, dtype=F64)
    other = {k: (v + 0.1).detach().requires_grad_() for k, v in layer.named_parameters()}
    end = torch.func.functional_call(layer, other, (x,))
    found = torch.autograd.grad(end.square().sum(), list(other.values()))
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(other[name])
    expected = torch.autograd.grad(twin(x).square().sum(), list(twin.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    one = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(other)
    for name, g in zip(other, expected, strict=True):
        torch.testing.assert_close(one[name], g, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
def test_backward_pass_does_not_move_running_statistics(gradient):
    field = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).to(F64)
    layer, x = NeuralODE(field, steps=2, gradient=gradient), torch.randn(8, 3, dtype=F64)
    end = layer(x)
    before = {k: v.clone() for k, v in field[1].named_buffers()}
    assert int(before["num_batches_tracked"]) == 8
    end.square().sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in field[1].named_buffers())


def test_checkpoints_repeat_dropout_and_the_adjoint_refuses_it():
    field, x = nn.Sequential(tanh_field(), nn.Dropout(0.5)), torch.randn(6, 3, dtype=F64)
    found = []
    for gradient in ("autograd", "checkpoint"):
        torch.manual_seed(3)
        found.append(gradients(Constant(field), x, steps=3, gradient=gradient)[1])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    for method in ("rk4", "dopri5"):
        with pytest.raises(UnsupportedError, match="dropout"):
            NeuralODE(field, gradient="adjoint", method=method)(x)


def test_frozen_parameters_and_inputs_without_gradient_are_left_out():
    field, x = tanh_field(), torch.randn(4, 3, dtype=F64)
    field[0].weight.requires_grad_(False)
    layer = NeuralODE(field, steps=4, gradient="adjoint")
    layer(x).square().sum().backward()
    assert field[0].weight.grad is None and field[2].weight.grad is not None
    with torch.no_grad():
        assert not layer(x).requires_grad


# --------------------------------------------------------------------------------- trajectories


def test_a_step_never_reads_the_next_cell():
    class Level(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x):
            return torch.full_like(x, self.value)

    x = torch.zeros(1, dtype=F64)
    for method in ("euler", "midpoint", "rk4", "rk38", "dopri5"):
        block = ContinuousBlock(Piecewise([Level(1.0), Level(5.0), Level(-3.0)]), method=method, steps=3)
        torch.testing.assert_close(block(x), torch.ones(1, dtype=F64), rtol=1e-9, atol=1e-9)
        assert float(block.velocity(1 / 3, x)) == 1.0 and float(block.velocity(0.0, x)) == 1.0


def test_cells_start_with_weights_of_their_own_and_a_basis_as_a_constant():
    field, x = tanh_field(), torch.randn(4, 3, dtype=F64)
    cells = Piecewise(field, cells=2).cells
    assert not torch.equal(cells[0][0].weight, cells[1][0].weight)
    for terms in (1, 4):
        torch.testing.assert_close(ContinuousBlock(Basis(field, terms))(x), NeuralODE(field)(x))


@pytest.mark.parametrize("basis", ["cosine", "legendre"])
def test_basis_functions_are_orthogonal_to_constants_and_to_each_other(basis):
    tau = (torch.arange(4000, dtype=F64) + 0.5) / 4000
    functions = Basis(nn.Linear(1, 1), terms=5, basis=basis).basis
    values = torch.tensor([[1.0, *functions(float(t), 5)] for t in tau], dtype=F64)
    gram = values.T @ values / 4000
    assert float((gram - gram.diag().diag()).abs().max()) < 1e-6


def test_refined_block_is_the_same_function_at_equal_steps():
    block = ContinuousBlock(Piecewise(tanh_field(), cells=3), horizon=4.0, steps=12)
    x = torch.randn(4, 3, dtype=F64)
    before = block(x)
    for factor in (2, 3):
        block.refine(factor)
    assert block.steps == 72 and len(block.trajectory.cells) == 18
    assert torch.equal(block(x, steps=12), before)
    block.refine(2, noise=0.1, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(block(x, steps=12), before)


# ----------------------------------------------------------------------------- as part of a net


def test_a_network_with_a_block_is_read_as_stages_with_the_gradients_of_backward():
    net = nn.Sequential(
        nn.Linear(4, 6), NeuralODE(nn.Linear(6, 6), steps=3, gradient="adjoint"), nn.Linear(6, 3)
    )
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    system = bolza.as_system(net, x)
    assert system.horizon == 3
    run = adjoint(system, TerminalCost(nn.functional.cross_entropy, y), rollout(system, x))
    nn.functional.cross_entropy(net(x), y).backward()
    found = run.gradient_by_name()
    for name, p in net.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)


def test_horizon_is_part_of_the_state_dict():
    layer = NeuralODE(tanh_field(), horizon=2.5)
    other = NeuralODE(tanh_field())
    other.load_state_dict(layer.state_dict())
    assert other.horizon == 2.5


def test_bad_arguments_are_refused_by_name():
    field, x = tanh_field(), torch.randn(4, 3, dtype=F64)
    for options, match in [
        ({"method": "leapfrog"}, "method"),
        ({"steps": 0}, "steps"),
        ({"horizon": -1.0}, "horizon"),
        ({"gradient": "magic"}, "gradient"),
        ({"rtol": 0.0}, "rtol"),
    ]:
        with pytest.raises(ArgumentError, match=match):
            NeuralODE(field, **options)
    with pytest.raises(ArgumentError, match="ContinuousBlock"):
        NeuralODE(Constant(field))
    with pytest.raises(ArgumentError, match="cells"):
        Piecewise([field], cells=2)
    with pytest.raises(ArgumentError, match="terms"):
        Basis(field, terms=0)
    with pytest.raises(ShapeError, match="alike"):
        NeuralODE(nn.Linear(3, 1, dtype=F64))(x)
    with pytest.raises(ArgumentError, match="increase"):
        NeuralODE(field).path(x, times=[0.5, 0.2])
    with pytest.raises(UnsupportedError, match="no cells"):
        NeuralODE(field).refine()
    with pytest.raises(UnsupportedError, match="checkpoint"):
        NeuralODE(field, method="dopri5", gradient="checkpoint")(x)

    class Blank(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

    with pytest.raises(UnsupportedError, match="reset_parameters"):
        Piecewise(Blank(), cells=2)
    heun = RungeKutta(((), (1.0,)), (0.5, 0.5), order=2)
    assert NeuralODE(field, method=heun)(x).shape == x.shape


def test_a_field_too_stiff_for_its_tolerance_is_named():
    class Explosion(nn.Module):
        def forward(self, x):
            return x.square()

    layer = NeuralODE(Explosion(), horizon=2.0, method="dopri5")
    with pytest.raises(DivergenceError, match="too stiff"):
        layer(torch.ones(1))


@pytest.mark.parametrize("gradient", ["autograd", "checkpoint", "adjoint"])
def test_fields_that_would_go_wrong_in_silence_are_refused(gradient):
    x = torch.randn(4, 3, dtype=F64, requires_grad=True)
    overwriting = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3, dtype=F64))
    with pytest.raises(UnsupportedError, match="inplace=False"):
        NeuralODE(overwriting, gradient=gradient)(x * 1)
    with pytest.raises(ShapeError, match="alike"):  # broadcasting would hide it
        NeuralODE(nn.Linear(3, 1, dtype=F64), gradient=gradient)(x)

    class Swapped(nn.Module):
        def forward(self, state):
            return {"v": -state["q"], "q": state["v"]}

    with pytest.raises(ShapeError, match="same order"):
        NeuralODE(Swapped(), gradient=gradient)({"q": x, "v": x})
    with pytest.raises(ShapeError, match="embed"):
        NeuralODE(nn.Embedding(3, 3), gradient=gradient)(torch.zeros(3, dtype=torch.long))


def test_the_adjoint_refuses_noise_that_is_no_dropout_layer():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    block, x = NeuralODE(Noisy(), gradient="adjoint", steps=1), torch.randn(2, 3, 4)
    with pytest.raises(UnsupportedError, match="random numbers"):
        block(x)
    assert block.eval()(x).shape == x.shape


def test_attributes_are_checked_when_they_are_used():
    block, x = NeuralODE(tanh_field()), torch.randn(4, 3, dtype=F64)
    block.gradient = "chekpoint"
    with pytest.raises(ArgumentError, match="gradient"):
        block(x)
    for steps in (2.5, float("nan"), None, "3"):
        with pytest.raises(ArgumentError, match="steps"):
            NeuralODE(tanh_field(), steps=steps)
