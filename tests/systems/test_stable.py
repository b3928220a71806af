from math import sqrt

import pytest
import torch
from pytest import approx
from torch.testing import assert_close

from bolza.core import rollout
from bolza.core.errors import ArgumentError
from bolza.systems import (
    AntisymmetricField,
    ODESystem,
    Separable,
    antisymmetric,
    euler_step_limit,
    field_stability,
    hamiltonian_field,
    sample_controls,
)

F64 = torch.float64


def linear_field(matrix):
    return lambda s, x, u: x @ matrix.mT


def test_the_step_limit_has_its_known_value():
    assert float(euler_step_limit(0.5, 1.0)) == approx(0.8)
    gamma, omega = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    assert_close(euler_step_limit(gamma, omega), torch.tensor([2.0, 0.8], dtype=F64))


def test_without_damping_no_step_is_short_enough():
    assert euler_step_limit(torch.tensor([0.0, -1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0])).tolist() == [
        0,
        0,
        0,
    ]


@pytest.mark.parametrize(("dt", "contracts"), [(0.79, True), (0.81, False)])
def test_forward_euler_contracts_below_the_limit_and_amplifies_above(dt, contracts):
    """γ = .5, ω = 1: the limit is .8."""
    spiral = antisymmetric(torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=F64), gamma=0.5)
    system = ODESystem(linear_field(spiral), 2000, dt)
    x = rollout(system, torch.ones(1, 2, dtype=F64)).states[-1].norm()
    assert (float(x) < 1e-3) if contracts else (float(x) > 1e3)


def test_an_undamped_rotation_grows_by_its_known_factor():
    """√(1 + h²ω²) a step under Euler; leapfrog keeps it."""
    omega, h = 1.5, 0.2
    turn = antisymmetric(torch.tensor([[0.0, omega], [0.0, 0.0]], dtype=F64))
    x = torch.ones(1, 2, dtype=F64)
    report = field_stability(ODESystem(linear_field(turn), 1, h), 0, x)
    assert report.growth.item() == approx(sqrt(1 + (h * omega) ** 2), rel=1e-12)
    assert report.step_limit.item() == 0 and report.max_real.item() == approx(0, abs=1e-15)
    oscillator = Separable(lambda s, p, u: omega * p, lambda s, q, u: -omega * q)
    pair = (x[:, :1], x[:, 1:])
    kept = field_stability(ODESystem(oscillator, 1, h, "leapfrog"), 0, pair)
    assert kept.growth.item() == approx(1, rel=1e-12)
    assert kept.eigenvalues.imag.abs().squeeze().tolist() == approx([omega, omega])


def test_a_report_is_that_of_the_dense_jacobian_of_each_sample():
    matrix = torch.randn(4, 4, dtype=F64)

    def field(s, x, u):
        return torch.tanh(x @ matrix.mT) * u

    system = ODESystem(field, 2, 0.1, controls=[torch.ones(()), torch.full((), 2.0)])
    x = torch.randn(3, 4, dtype=F64)
    report = field_stability(system, 1, x)
    for i in range(3):
        slope = 1 - torch.tanh(matrix @ x[i]) ** 2
        wanted = torch.linalg.eigvals(2 * slope.unsqueeze(1) * matrix)
        assert report.max_real[i].item() == approx(wanted.real.max().item(), rel=1e-10)
        limits = euler_step_limit(-wanted.real, wanted.imag)
        assert report.step_limit[i].item() == approx(limits.min().item(), rel=1e-10)
        assert report.growth[i].item() == approx((1 + 0.1 * wanted).abs().max().item(), rel=1e-10)
    other = field_stability(system, 1, x, torch.zeros(()))
    assert other.max_real.abs().max() == 0 and other.growth.tolist() == approx([1, 1, 1])


def test_a_step_below_the_reported_limit_contracts_and_one_above_does_not():
    field = AntisymmetricField(6, gamma=0.7).double()
    x = torch.zeros(1, 6, dtype=F64)
    limit = field_stability(ODESystem.from_module([field], dt=0.1), 0, x).step_limit.item()
    assert limit > 0
    below, above = (ODESystem.from_module([field], dt=c * limit) for c in (0.99, 1.01))
    assert field_stability(below, 0, x).growth.item() < 1 < field_stability(above, 0, x).growth.item()


def test_an_antisymmetric_field_is_stable_at_every_state():
    field = AntisymmetricField(8, gamma=0.01).double()
    report = field_stability(ODESystem.from_module([field], dt=0.1), 0, 3 * torch.randn(10, 8, dtype=F64))
    assert report.max_real.max() < 0
    weight = antisymmetric(torch.randn(2, 5, 5))
    assert_close(weight, -weight.mT)


def test_time_and_controls_at_the_nodes_are_those_of_the_start_of_the_step():
    controls = sample_controls(lambda s: torch.tensor(s, dtype=F64), 2, 0.1, "midpoint", start=1.0)
    system = ODESystem(lambda s, x, u: (s + u) * x, 2, 0.1, "midpoint", controls, hold="nodes", start=1.0)
    report = field_stability(system, 1, torch.ones(1, 1, dtype=F64))
    assert report.max_real.item() == approx(2.2)
    assert report.growth.item() == approx(1 + 0.1 * 2.3 * (1 + 0.05 * 2.2))


def test_images_are_flattened_sample_by_sample():
    conv = torch.nn.Conv2d(2, 2, 3, padding=1, bias=False).double()
    report = field_stability(ODESystem.from_module(conv, 1, dt=0.1), 0, torch.randn(3, 2, 4, 4, dtype=F64))
    assert report.eigenvalues.shape == (3, 32)
    assert_close(report.max_real[0], report.max_real[2])  # a linear field has one Jacobian


def test_the_hamiltonian_field_is_the_gradient_of_an_energy():
    """H(q, p) = Σ log cosh(K₁p + b₁) + Σ log cosh(K₂q + b₂): q̇ = ∂H/∂p, ṗ = −∂H/∂q."""
    u = {
        name: torch.randn(*s, dtype=F64)
        for name, s in (("K1", (5, 3)), ("b1", (5,)), ("K2", (4, 3)), ("b2", (4,)))
    }
    q, p = (torch.randn(2, 3, dtype=F64) for _ in range(2))

    def energy(q, p):
        return (p @ u["K1"].T + u["b1"]).cosh().log().sum() + (q @ u["K2"].T + u["b2"]).cosh().log().sum()

    to_q, to_p = torch.func.grad(energy, argnums=(0, 1))(q, p)
    velocity, force = hamiltonian_field()(0.0, (q, p), u)
    assert_close(velocity, to_p)
    assert_close(force, -to_q)


def test_what_cannot_be_reported_is_refused():
    system = ODESystem(lambda s, x, u: x, 1, 0.1)
    with pytest.raises(ArgumentError, match="x has 5000 features"):
        field_stability(system, 0, torch.zeros(1, 5000))
    with pytest.raises(ArgumentError, match="t is 1"):
        field_stability(system, 1, torch.zeros(1, 2))
