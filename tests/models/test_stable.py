"""Nets that take their input again at every block."""

import pytest
import torch

from bolza.core.errors import ArgumentError
from bolza.models import InputResidualNet, NAISBlock, NAISNet, Sine


def block(width=8, size=1.0, activation="tanh", dtype=torch.float64):
    made = NAISBlock(width, 3, activation=activation).to(dtype)
    with torch.no_grad():
        made.R.copy_(size * torch.randn(width, width, generator=torch.Generator().manual_seed(1)))
    return made


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 100.0])
def test_the_damping_matrix_has_its_eigenvalues_between_epsilon_and_one_minus_epsilon(size):
    values = torch.linalg.eigvalsh(block(size=size).damping().detach())
    assert float(values.min()) >= 0.01 - 1e-12 and float(values.max()) <= 0.99 + 1e-12


def test_a_small_weight_is_not_rescaled():
    made = block(size=1e-2)
    gram = made.R.mT @ made.R
    torch.testing.assert_close(made.damping(), gram + 0.01 * torch.eye(8, dtype=torch.float64))


def jacobians(made, count=20):
    z = 2 * torch.randn(count, 8, dtype=torch.float64)
    still = torch.zeros(3, dtype=torch.float64)
    return torch.func.vmap(torch.func.jacrev(lambda at: made(at, still)))(z).detach()


def test_the_spectral_radius_of_a_block_is_at_most_one_though_its_norm_need_not_be():
    found = jacobians(block(size=3.0))
    assert float(torch.linalg.eigvals(found).abs().max()) <= 1 + 1e-10
    assert float(torch.linalg.matrix_norm(found, 2).max()) > 1


def test_the_scale_of_the_circulating_code_breaks_the_bound():
    R = 3 * torch.randn(8, 8, dtype=torch.float64)
    gram = R.mT @ R
    scaled = gram * (0.98 / torch.linalg.matrix_norm(gram)) ** 0.5
    assert float(torch.linalg.matrix_norm(scaled, 2)) > 2  # −(A + εI) then steps past the far side of zero


def test_applied_again_and_again_a_block_settles_from_any_start():
    made, x = block(size=1.0), torch.randn(1, 3, dtype=torch.float64)
    with torch.no_grad():
        made.input.weight.mul_(0.1)
        z = 5 * torch.randn(16, 8, dtype=torch.float64)
        for _ in range(1500):
            z = made(z, x)
        torch.testing.assert_close(made(z, x), z, rtol=0, atol=1e-8)
        torch.testing.assert_close(z, z[:1].expand_as(z), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [NAISNet, InputResidualNet])
def test_a_net_of_depth_one_is_a_two_layer_net_and_keeps_dtype_and_leading_dimensions(kind):
    net = kind(4, 2, width=6, depth=1).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    assert len(net.blocks) == 0
    torch.testing.assert_close(net(x), net.last(torch.sin(net.first(x))))
    deep = kind(4, 2, width=6, depth=3, activation=Sine)
    assert deep(x.float()).shape == (2, 5, 2) and deep(x.float()).dtype == torch.float32


def test_wrong_sizes_are_named():
    with pytest.raises(ArgumentError, match="epsilon=0.5"):
        NAISBlock(4, 2, epsilon=0.5)
    with pytest.raises(ArgumentError, match="depth=0"):
        NAISNet(3, depth=0)
