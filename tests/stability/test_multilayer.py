"""Finite-time exponents of deep networks."""

import math

import pytest
import torch
from torch import nn

from bolza import as_system
from bolza.core.errors import ArgumentError, ConvergenceWarning, DivergenceError
from bolza.stability import ftmle

F64 = torch.float64


def network(width=6, depth=4, inputs=6):
    torch.manual_seed(0)
    sizes = [inputs, *[width] * depth]
    layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(width, 2)).double()


def test_an_orthogonal_linear_stack_has_exponent_zero_everywhere():
    net = nn.Sequential(*(nn.Linear(5, 5) for _ in range(6))).double()
    for layer in net:
        nn.init.orthogonal_(layer.weight)
    found = ftmle(net, torch.randn(7, 5, dtype=F64))
    assert found.layers == 5 and found.exponents.abs().max() < 1e-12
    assert ftmle(net, torch.randn(7, 5, dtype=F64), head=True).layers == 6


def test_it_is_the_largest_singular_value_of_the_jacobian_without_the_head():
    net, x = network(), torch.randn(5, 6, dtype=F64)
    found = ftmle(net, x)
    jacobians = torch.vmap(torch.func.jacrev(net[:-1]))(x)
    sigma = torch.linalg.svdvals(jacobians)[:, 0]
    assert torch.allclose(found.sigma_max, sigma.detach(), atol=1e-12)
    assert torch.allclose(found.exponents, sigma.detach().log() / 4, atol=1e-12)
    whole = torch.linalg.svdvals(torch.vmap(torch.func.jacrev(net))(x))[:, 0].detach().log() / 5
    assert torch.allclose(ftmle(net, x, head=True).exponents, whole, atol=1e-12)


def test_large_inputs_go_by_products_and_agree():
    net, x = network(width=20, inputs=150), torch.randn(3, 150, dtype=F64)
    sigma = torch.linalg.svdvals(torch.vmap(torch.func.jacrev(net[:-1]))(x))[:, 0].detach()
    assert torch.allclose(ftmle(net, x, tolerance=1e-9).sigma_max, sigma, rtol=1e-6)
    with pytest.warns(ConvergenceWarning, match="after 1 iterations"):
        ftmle(net, x, iterations=1)


def test_widths_may_change_and_stages_may_be_chosen():
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 4))
    x = torch.randn(5, 3)
    assert ftmle(net, x).layers == 2
    part = ftmle(net, x, stages=(1, 2))
    assert part.layers == 1
    h = torch.relu(net[0](x))
    sigma = torch.linalg.svdvals(torch.vmap(torch.func.jacrev(net[2:4]))(h))[:, 0]
    assert torch.allclose(part.sigma_max.float(), sigma.detach(), atol=1e-5)


def test_images_and_batch_norm_are_taken_sample_by_sample():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 2, 3),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    x = torch.randn(6, 1, 4, 4)
    before = net[1].running_mean.clone()
    net.eval()
    whole, alone = ftmle(net, x), ftmle(net, x[2:3])
    assert torch.allclose(whole.exponents[2:3], alone.exponents, atol=1e-5)
    net.train()
    assert ftmle(net, x).exponents.isfinite().all()
    assert torch.equal(before, net[1].running_mean) and net.training


def test_a_system_is_taken_as_the_network_it_was_made_of():
    net, x = network(), torch.randn(5, 6, dtype=F64)
    assert torch.equal(ftmle(as_system(net, x), x).exponents, ftmle(net, x).exponents)


def test_dead_inputs_have_minus_infinity():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        net[0].bias.fill_(-100.0)
    assert (ftmle(net, torch.randn(4, 2)).exponents == -math.inf).all()


def test_bad_input_is_named():
    net = network()
    with pytest.raises(ArgumentError, match="nothing but a head"):
        ftmle(nn.Linear(2, 2), torch.randn(3, 2))
    with pytest.raises(ArgumentError, match="stages is"):
        ftmle(net, torch.randn(3, 6, dtype=F64), stages=(2, 9))
    with pytest.raises(ArgumentError, match="iterations is 0"):
        ftmle(net, torch.randn(3, 6, dtype=F64), iterations=0)
    with pytest.raises(DivergenceError, match="not finite"):
        ftmle(net, torch.full((1, 6), math.nan, dtype=F64))
