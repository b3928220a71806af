"""Control theory and deep learning say the same thing: the identities, and the numbers known in closed form."""

import pytest
import torch
from pytest import approx
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from bolza.core import (
    CallableCost,
    TerminalCost,
    adjoint,
    hamiltonian,
    hamiltonian_gap,
    maximum_principle_residuals,
    rollout,
)
from bolza.ops.riccati import riccati_recursion
from bolza.systems import LinearSystem, QuadraticCost

F64 = torch.float64


def scalars(*values):
    return [torch.tensor([value], dtype=F64) for value in values]


class TwoLayers:
    """x₁ = tanh(θ₀x₀), x₂ = θ₁x₁."""

    horizon = 2
    controls = tuple(scalars(0.5, 2.0))

    def step(self, t, x, u):
        return torch.tanh(u * x) if t == 0 else u * x


TWO_LAYERS_COST = CallableCost(
    terminal=lambda x: (x - 1).square().sum() / 2,
    running=lambda t, x, u: 0.1 / 2 * u.square().sum(),
)


def test_the_worked_example_has_its_known_numbers():
    """Two scalar layers by hand: x₁ = tanh ½, p₂ = x₂ − 1, p₁ = θ₁p₂."""
    system = TwoLayers()
    solved = adjoint(system, TWO_LAYERS_COST, rollout(system, torch.ones(1, dtype=F64)))
    near = 0.5e-7 + 1e-9
    assert [float(x) for x in solved.states] == approx([1, 0.4621172, 0.9242343], abs=near)
    p0, p1, p2 = (float(p) for p in solved.costates)
    assert (p1, p2) == (approx(-0.1515314, abs=near), approx(-0.0757657, abs=near))  # p = ∂J/∂x
    assert float(solved.value) == approx(0.2153702, abs=near)
    assert [float(g) for g in solved.gradients] == approx([-0.0691715, 0.1649874], abs=near)


def test_the_hamiltonian_of_the_worked_example_is_minimised_where_it_is_known_to_be():
    """One exact stage of successive approximation: θ₁ = −p₂x₁/.1, for H = .05θ² + p₂θx₁."""
    system = TwoLayers()
    solved = adjoint(system, TWO_LAYERS_COST, rollout(system, torch.ones(1, dtype=F64)))

    def stage(u):
        return hamiltonian(system, TWO_LAYERS_COST, 1, solved.states[1], solved.costates[2], u)

    zero = torch.zeros(1, dtype=F64)
    slope, curvature = torch.func.grad(stage)(zero), torch.func.hessian(stage)(zero)
    best = float(-slope / curvature)
    assert best == approx(0.3501262, abs=0.5e-7 + 1e-9)
    gaps = hamiltonian_gap(
        system, TWO_LAYERS_COST, solved, minimizer=lambda h, u: torch.full_like(u, best) if u > 1 else u
    )
    assert gaps == approx([0.0, 0.05 * (2 - best) ** 2], abs=1e-12)


def plant(seed=0, n=3, m=2, horizon=6):
    g = torch.Generator().manual_seed(seed)
    A = [torch.randn(n, n, dtype=F64, generator=g) / 2 for _ in range(horizon)]
    B = [torch.randn(n, m, dtype=F64, generator=g) for _ in range(horizon)]
    root, end = (torch.randn(n, n, dtype=F64, generator=g) for _ in range(2))
    Q, R, Q_T = root @ root.T, torch.diag(torch.tensor([0.5, 2.0], dtype=F64)), end @ end.T
    solution = riccati_recursion(A, B, Q, R, Q_T)
    x0 = torch.randn(n, dtype=F64, generator=g)
    return LinearSystem(A, B), QuadraticCost(Q, R, Q_T), solution, x0


def optimal_controls(system, solution, x):
    controls = []
    for t, K in enumerate(solution.K):
        controls.append(-K @ x)
        x = system.step(t, x, controls[-1])
    return controls


def test_the_costate_of_a_linear_quadratic_problem_is_riccati_times_the_state():
    system, cost, solution, x0 = plant()
    solved = adjoint(system, cost, rollout(system, x0, optimal_controls(system, solution, x0)))
    for P, x, p in zip(solution.P, solved.states, solved.costates, strict=True):
        assert_close(p, P @ x, rtol=0, atol=1e-10)
    assert float(solved.value) == approx(float(x0 @ solution.P[0] @ x0) / 2, rel=1e-12)


def test_at_the_linear_quadratic_optimum_every_condition_of_pontryagin_holds():
    system, cost, solution, x0 = plant()
    solved = adjoint(system, cost, rollout(system, x0, optimal_controls(system, solution, x0)))
    residuals = maximum_principle_residuals(system, cost, solved)
    assert max(*residuals.state, *residuals.costate, *residuals.stationarity, residuals.terminal) < 1e-12
    assert max(map(abs, hamiltonian_gap(system, cost, solved))) < 1e-12


def test_off_the_optimum_every_hamiltonian_gap_is_positive():
    system, cost, solution, x0 = plant()
    g = torch.Generator().manual_seed(1)
    controls = [
        u + torch.randn(2, dtype=F64, generator=g) / 10 for u in optimal_controls(system, solution, x0)
    ]
    run = rollout(system, x0, controls)
    gaps = hamiltonian_gap(system, cost, run)
    assert min(gaps) > 1e-4
    assert min(maximum_principle_residuals(system, cost, adjoint(system, cost, run)).stationarity) > 1e-2


class Digits(nn.Module):
    """A small network, and the same network as a system written by hand."""

    horizon = 3

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)]).double()

    def forward(self, x):
        for t in range(self.horizon):
            x = self.step(t, x, self.controls[t])
        return x

    @property
    def controls(self):
        return tuple(dict(layer.named_parameters()) for layer in self.layers)

    def step(self, t, x, u):
        y = nn.functional.linear(x, u["weight"], u["bias"])
        return y if t == 2 else torch.tanh(y) + (x if t == 1 else 0)


def test_one_gradient_step_on_every_hamiltonian_is_one_step_of_sgd():
    net, lr = Digits(), 0.3
    x, y = torch.randn(16, 5, dtype=F64), torch.randint(3, (16,))
    solved = adjoint(net, TerminalCost(cross_entropy, y), rollout(net, x))

    stepped = []
    for t, u in enumerate(net.controls):
        u = {name: value.detach().clone().requires_grad_() for name, value in u.items()}
        value = hamiltonian(
            net, TerminalCost(cross_entropy, y), t, solved.states[t].detach(), solved.costates[t + 1], u
        )
        slopes = torch.autograd.grad(value, list(u.values()))
        stepped += [p.detach() - lr * g for p, g in zip(u.values(), slopes, strict=True)]

    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    cross_entropy(net(x), y).backward()
    optimizer.step()
    assert_close(stepped, [p.detach() for p in net.parameters()], rtol=0, atol=1e-12)


def test_the_costate_carries_the_mean_over_samples_once():
    """The batch's costates are those of each sample by itself, divided by the batch."""
    net = Digits()
    x, y = torch.randn(4, 5, dtype=F64), torch.randint(3, (4,))
    whole = adjoint(net, TerminalCost(cross_entropy, y), rollout(net, x))
    for i in range(4):
        one = adjoint(net, TerminalCost(cross_entropy, y[i : i + 1]), rollout(net, x[i : i + 1]))
        for p, q in zip(whole.costates, one.costates, strict=True):
            assert_close(p[i : i + 1], q / 4, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("lam", "best"), [(0.5, 0.866667), (2.0, 1.3 / 3)])
def test_the_mean_field_optimum_satisfies_the_conditions(lam, best):
    """ẋ = θ over T = 1 with Φ = ½(x − y)², L = ½λθ²: θ* = z̄/(λ + T), shared by all samples."""
    horizon = 10
    z = torch.tensor([[0.6], [2.0]], dtype=F64)  # mean 1.3, sd .7
    eye = torch.eye(1, dtype=F64)
    system = LinearSystem(eye, eye / horizon, horizon=horizon)
    cost = CallableCost(
        terminal=lambda x: (x - z).square().mean() / 2,
        running=lambda t, x, u: lam / 2 * u.square().sum() / horizon,
    )
    run = rollout(
        system, torch.zeros(2, 1, dtype=F64), [torch.full((1,), 1.3 / (lam + 1), dtype=F64)] * horizon
    )
    solved = adjoint(system, cost, run)
    assert 1.3 / (lam + 1) == approx(best, abs=1e-6)
    assert max(maximum_principle_residuals(system, cost, solved).stationarity) < 1e-15
    assert float(solved.value) == approx(0.5 * lam / (lam + 1) * 1.3**2 + 0.5 * 0.49, rel=1e-12)
