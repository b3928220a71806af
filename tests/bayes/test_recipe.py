"""The recipe: its law rests for any matrices, and a law that does not rest is seen."""

import pytest
import torch

from bolza.bayes import complete_recipe, named_recipe, stationarity_residual, stationary_variance
from bolza.core import simulate
from bolza.core.errors import ArgumentError, ShapeError

F = torch.float64


def energy(z):
    return torch.sin(z).sum() + z.square().sum() / 2 + z[0] * z[-1] ** 2 / 4


def D(z):
    root = torch.stack([torch.stack([1 + z[1] ** 2, z[0] / 2]), torch.stack([z[0] * z[1], z[1].cos()])])
    return root @ root.T


def Q(z):
    turn = torch.stack([torch.stack([0 * z[0], torch.sin(z[0] + z[1])]), torch.stack([0 * z[0], 0 * z[0]])])
    return turn - turn.T


def test_any_two_matrices_leave_the_law_at_rest_and_without_the_correction_it_is_not():
    z = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=F)
    recipe = complete_recipe(energy, D, Q)
    assert stationarity_residual(recipe.drift, D, energy, z).abs().max() < 1e-10

    def careless(at):
        return recipe.drift(at) - recipe.correction(at)

    assert stationarity_residual(careless, D, energy, z).abs().max() > 0.1


@pytest.mark.parametrize("name", ["sgld", "riemannian", "hmc", "sghmc", "sgnht"])
def test_the_known_samplers_are_instances(name):
    dim = 2
    recipe = named_recipe(name, energy, dim, friction=0.7, metric=D)
    n = {"sgld": 2, "riemannian": 2, "hmc": 4, "sghmc": 4, "sgnht": 5}[name]
    z = torch.randn(10, n, generator=torch.Generator().manual_seed(1), dtype=F)
    assert stationarity_residual(recipe.drift, recipe.D, recipe.energy, z).abs().max() < 1e-10
    force = -torch.func.grad(energy)(z[0, :2])
    drift = recipe.drift(z[0])
    if name == "sgld":
        assert torch.allclose(drift, force)
    if n > 2:
        m = z[0, 2:4]
        rub = {"hmc": 0.0, "sghmc": 0.7}.get(name, z[0, -1])
        assert torch.allclose(drift[:2], m) and torch.allclose(drift[2:4], force - rub * m)
    if name == "sgnht":
        assert torch.allclose(drift[-1], m.square().mean() - 1)


def test_momentum_with_noisy_gradients_and_no_friction_does_not_rest():
    """The naive scheme of Chen et al. (2014, Corollary 3.1): noise without friction heats for ever."""
    hmc = named_recipe("hmc", energy, 2)
    z = torch.randn(10, 4, generator=torch.Generator().manual_seed(1), dtype=F)
    noisy = torch.block_diag(torch.zeros(2, 2), torch.eye(2)).to(F)
    assert stationarity_residual(hmc.drift, noisy, hmc.energy, z).abs().max() > 0.5


def test_a_recipe_runs_as_a_diffusion_and_reaches_its_variance():
    """Curl and a metric that depends on the place, on a Gaussian law: the variance stays 1."""
    recipe = complete_recipe(
        lambda z: z.square().sum() / 2,
        lambda z: torch.diag(1 + 0.5 * torch.tanh(z.flip(0))),
        torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F),
    )
    draw = torch.Generator().manual_seed(0)
    x0 = torch.randn(2000, 2, generator=draw, dtype=F)
    x = simulate(recipe.diffusion(), x0, dt=0.02, steps=60, generator=draw)[-1]
    assert torch.allclose(x.var(0), torch.ones(2, dtype=F), atol=0.12)


def test_the_published_biases_are_the_exact_ones():
    assert stationary_variance("sgld", 4.0, h=0.05) == pytest.approx(0.2777778, abs=1e-7)  # ε = 2h = 0.1
    assert stationary_variance("sgld", 3.0, h=0.2, gradient_noise=4.0) == pytest.approx(2 / 3, abs=1e-12)
    assert stationary_variance("sgld", 3.0, h=0.2, gradient_noise=4.0, corrected=True) == pytest.approx(
        1 / (3 * 0.7)
    )
    table = {"sghmc-explicit": (0.3929, 0.4799, 0.8602), "sghmc": (0.3340, 0.3360, 0.3448)}
    for method, row in table.items():
        found = [stationary_variance(method, 3.0, h=h) for h in (0.05, 0.1, 0.2)]
        assert found == pytest.approx(row, abs=6e-5)
    for h in (0.05, 0.2, 1.0):
        assert stationary_variance("baoab", 3.0, h=h, friction=0.7) == pytest.approx(1 / 3, rel=1e-12)
    assert stationary_variance("baoab", 3.0, h=1.2) == float("inf")  # beyond 2/√3
    assert stationary_variance("sgld", 3.0, h=0.7) == float("inf")
    bias = [stationary_variance("sghmc", 3.0, h=h) - 1 / 3 for h in (0.04, 0.02)]
    assert bias[0] / bias[1] == pytest.approx(4, rel=0.1)  # second order in h
    assert stationary_variance("baoab", 3.0, h=0.2, gradient_noise=1.0, corrected=True) == pytest.approx(
        1 / 3, rel=0.05
    )


def test_matrices_that_are_none_of_these_are_refused():
    with pytest.raises(ArgumentError, match="D is not symmetric"):
        complete_recipe(energy, torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    with pytest.raises(ArgumentError, match="Q is not antisymmetric"):
        complete_recipe(energy, torch.eye(2), torch.eye(2))
    with pytest.raises(ShapeError, match="D has shape"):
        complete_recipe(energy, torch.zeros(2, 3))
    with pytest.raises(ArgumentError, match="choose 'sgld'"):
        named_recipe("nuts", energy, 2)
    with pytest.raises(ArgumentError, match="metric"):
        named_recipe("riemannian", energy, 2)
    with pytest.raises(ShapeError, match="points"):
        stationarity_residual(lambda z: z, torch.eye(2), energy, torch.zeros(2))
    with pytest.raises(ArgumentError, match="choose 'sgld'"):
        stationary_variance("nuts", 1.0, h=0.1)
    with pytest.raises(ArgumentError, match="h=0"):
        stationary_variance("sgld", 1.0, h=0.0)
