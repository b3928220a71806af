"""Implicit potentials and currents: matrices that are known, identities, and a grid against the matrices."""

import math

import pytest
import torch

from bolza.core import Diffusion
from bolza.core.errors import ArgumentError, DivergenceError
from bolza.sde import fokker_planck, linear_current, network_current, network_moments, stationary_current

F64 = torch.float64
A = torch.diag(torch.tensor([1.0, 3.0], dtype=F64))
D = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=F64)


def close(a, b, atol=1e-6):
    return torch.allclose(torch.as_tensor(a, dtype=F64), torch.as_tensor(b, dtype=F64), atol=atol, rtol=0)


def test_the_linear_case_has_its_known_matrices():
    found = linear_current(A, D, temperature=0.05)
    assert close(found.covariance, [[0.05, 0.02], [0.02, 0.0166667]])
    assert close(found.potential, [[1.923077, -2.307692], [-2.307692, 5.769231]])
    assert close(found.Q, [[0, -0.4], [0.4, 0]])
    assert close(found.current, [[-0.923077, 2.307692], [-0.769231, 0.923077]])
    assert found.frequencies.tolist() == pytest.approx([0.960769], abs=1e-6)
    assert found.period == pytest.approx(6.54, abs=5e-3)
    assert found.entropy_production == pytest.approx(1.777778, abs=1e-6)


def test_the_area_rate_of_the_second_known_case():
    H, noise = torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([[1.0, 0.6], [0.6, 0.8]])
    found = linear_current(H, noise, temperature=0.25)
    assert close(found.covariance, [[0.083333, 0.075], [0.075, 0.2]])
    assert close(found.area_rate, [[0, 0.15], [-0.15, 0]])
    assert close(found.area_rate / 2, H.double() @ found.covariance - 0.25 * noise.double())
    assert close(found.potential, [[4.5283, -1.6981], [-1.6981, 1.8868]], 5e-5)


@pytest.mark.parametrize("noise", [torch.eye(2), torch.diag(torch.tensor([1.0, 5.0]))])
def test_noise_that_commutes_with_the_curvature_makes_no_current(noise):
    for lr in (None, 0.2):
        found = linear_current(A, noise, temperature=0.05, lr=lr)
        assert float(found.current.abs().max()) < 1e-13
        assert found.entropy_production < 1e-20
        assert found.period > 1e10
    isotropic = linear_current(A, torch.eye(2), temperature=0.05)
    assert close(isotropic.potential, A, 1e-12)  # Φ = f


def test_force_splits_into_the_slope_of_the_potential_and_a_current_along_its_level_lines():
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(5, 5, generator=generator, dtype=F64)
    H = root @ root.mT / 5 + torch.eye(5, dtype=F64)
    noise = torch.diag(torch.rand(5, generator=generator, dtype=F64) + 0.1)
    found = linear_current(H, noise, temperature=0.3)
    assert close(found.current, noise @ found.potential - H, 1e-12)
    assert close(found.Q, -found.Q.mT, 1e-12)
    assert close(H, (noise + found.Q) @ found.potential, 1e-12)
    # j is perpendicular to ∇Φ, and free of divergence
    product = found.potential @ found.current
    assert close(product, -product.mT, 1e-12)
    assert abs(float(found.current.trace())) < 1e-12


def test_a_rotating_drift_dissipates_what_is_known():
    # dx = −(k + ωR) x dt + √2T dW: j turns with ω, and the entropy production is 2 ω² / k
    k, omega = 1.3, 0.7
    drift = torch.tensor([[k, -omega], [omega, k]])
    found = linear_current(drift, torch.eye(2), temperature=0.2)
    assert found.frequencies.tolist() == pytest.approx([omega], rel=1e-6)
    assert found.entropy_production == pytest.approx(2 * omega**2 / k, rel=1e-6)


def test_noise_that_misses_the_current_dissipates_without_bound():
    drift = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    found = linear_current(drift, torch.diag(torch.tensor([1.0, 0.0])), temperature=0.2)
    assert found.entropy_production == math.inf


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_the_steps_of_sgd_have_the_area_of_their_own_covariances(momentum):
    lr, T = 0.1, 0.05
    found = linear_current(A, D, temperature=T, lr=lr, momentum=momentum)
    eye = torch.eye(2, dtype=F64)
    step = torch.cat([torch.cat([eye - lr * A, momentum * eye], 1), torch.cat([-lr * A, momentum * eye], 1)])
    both, noise = torch.zeros(4, 4, dtype=F64), (2 * T * lr * D).repeat(2, 2)
    for _ in range(3000):  # from rest to the stationary covariance
        both = step @ both @ step.mT + noise
    later = step @ both
    assert close(found.covariance, both[:2, :2], 1e-12)
    assert close(found.area_rate, (later.mT - later)[:2, :2] / lr, 1e-11)
    small = linear_current(A, D, temperature=T, lr=1e-5)
    assert close(small.area_rate, linear_current(A, D, temperature=T).area_rate, 1e-5)


def test_a_grid_finds_the_potential_the_current_and_the_entropy_of_the_linear_case():
    exact = linear_current(A, D, temperature=0.05)
    box = ((-1.3, 1.3), (-0.8, 0.8))
    produced = []
    for cells in (40, 80):
        grid = fokker_planck(
            lambda x: (x**2 @ A.diagonal().to(x)) / 2, box, cells, temperature=0.05, diffusion=D
        )
        found = stationary_current(grid)
        produced.append(found.entropy_production)
    first, second = (abs(p - 1.777778) for p in produced)
    assert math.log2(first / second) == pytest.approx(2, abs=0.15)
    assert (4 * produced[1] - produced[0]) / 3 == pytest.approx(1.777778, abs=1e-3)
    middle = found.density > 0.05 * found.density.max()
    j = torch.einsum("ij,xyj->ixy", exact.current, grid.points)
    assert float((found.velocity - j)[:, middle].abs().max()) < 0.03 * float(j[:, middle].abs().max())
    phi = torch.einsum("xyi,ij,xyj->xy", grid.points, exact.potential, grid.points) / 2
    shift = (found.potential - phi)[middle]
    assert float(shift.std()) < 1e-3
    assert found.likeliest.abs().max() < 0.03


def test_the_likeliest_place_is_not_the_minimum_of_the_loss_where_noise_varies():
    # f = x²/2, D = 1 + (x − 1)²/2: Φ′ = (f′ + T D′)/D = 0 at x (1 + T) = T
    T = 0.2
    equation = Diffusion(lambda t, x: -x, lambda t, x, noise: (2 * T * (1 + (x - 1) ** 2 / 2)).sqrt() * noise)
    found = stationary_current(fokker_planck(equation, (-4, 4), 800, temperature=T))
    assert float(found.likeliest) == pytest.approx(T / (1 + T), abs=0.01)
    assert found.entropy_production < 1e-18  # there are no loops on a line


def test_the_loops_of_a_network_are_those_of_its_top_directions():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator, dtype=F64)
    y = x.sum(1, keepdim=True) + 0.5 * x[:, :1] ** 2
    net = torch.nn.Linear(3, 1, dtype=F64)
    with torch.no_grad():
        best = torch.linalg.lstsq(torch.cat([x, torch.ones(60, 1, dtype=F64)], 1), y).solution
        net.weight.copy_(best[:3].mT)
        net.bias.copy_(best[3])

    def loss(z, target):
        return (z - target).square().mean() / 2

    settings = {"lr": 0.1, "batch_size": 4, "k": 4}
    found = network_current(net, loss, (x, y), **settings, generator=generator)
    # dense: features with a constant, per-sample gradients −residual · features
    features = torch.cat([x, torch.ones(60, 1, dtype=F64)], 1)
    H = features.mT @ features / 60
    g = (net(x) - y).detach() * features
    noise = g.mT @ g / 60
    dense = linear_current(H, noise, temperature=0.1 / 8, lr=0.1)
    V = found.directions
    assert close(V.mT @ dense.area_rate @ V, found.area_rate, 1e-6)
    assert found.frequencies.tolist() == pytest.approx(dense.frequencies.tolist(), rel=1e-3)
    moments = network_moments(net, loss, (x, y), lr=0.1, batch_size=4, k=4, generator=generator)
    again = network_current(net, loss, (x, y), **settings, moments=moments)
    assert again.entropy_production == pytest.approx(dense.entropy_production, rel=1e-3)


def test_what_has_no_stationary_state_is_refused():
    with pytest.raises(DivergenceError, match="real part"):
        linear_current(-A, D, temperature=0.1)
    with pytest.raises(DivergenceError, match="lower the step size"):
        linear_current(A, D, temperature=0.1, lr=1.0)
    with pytest.raises(ArgumentError, match="temperature is 0"):
        linear_current(A, D, temperature=0.0)
    with pytest.raises(ArgumentError, match="without a learning rate"):
        linear_current(A, D, temperature=0.1, momentum=0.9)
    net, x = torch.nn.Linear(3, 1), torch.randn(20, 3)
    with pytest.raises(DivergenceError, match="directions are at rest"):
        network_current(net, torch.nn.functional.mse_loss, (x, x[:, :1]), lr=50.0, batch_size=4, k=3)


def test_what_is_no_covariance_is_refused_by_name():
    for wrong in ([[1.0, 2.0], [2.0, 1.0]], [[1.0, 0.8], [0.0, 1.0]]):
        with pytest.raises(ArgumentError, match="covariance"):
            linear_current(A, torch.tensor(wrong), temperature=0.05)
    for still in (torch.zeros(2, 2), torch.diag(torch.tensor([1.0, 0.0]))):
        with pytest.raises(ArgumentError, match="nothing moves"):
            linear_current(A, still, temperature=0.05)
