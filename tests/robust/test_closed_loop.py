"""Control of hidden states by the maximum principle, input by input."""

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError, DivergenceError
from bolza.robust import closed_loop_controls, control_gains
from bolza.systems import LinearSystem, as_system

D = torch.float64


def rotations(T, d=6, r=2):
    """Layers that are orthogonal and map each subspace to the next, and the projections off these."""
    draw = torch.Generator().manual_seed(3)
    maps = [torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=D)).Q for _ in range(T)]
    bases = [torch.linalg.qr(torch.randn(d, r, generator=draw, dtype=D)).Q]
    for a in maps[:-1]:
        bases.append(a @ bases[-1])
    system = LinearSystem(maps, torch.zeros(d, 1, dtype=D))
    return system, [lambda x, v=v: x - x @ v @ v.mT for v in bases], bases[0]


@pytest.mark.parametrize("c", [0.1, 1.0, 3.0])
def test_descent_along_costates_finds_the_cost_of_the_closed_form_for_orthogonal_layers(c):
    system, residuals, _ = rotations(4)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=D)
    found = closed_loop_controls(
        system, x, residuals, c, iterations=80, optimizer=lambda us: torch.optim.SGD(us, 0.5 / (2 + c), 0.5)
    )
    alpha, value = control_gains(c, 4)
    off = residuals[0](x)
    assert torch.allclose(found.cost, 0.5 * value[0] * off.square().sum(1), rtol=1e-9)
    assert torch.allclose(found.controls[0], -(1 - alpha[0]) * off, atol=1e-5)


def test_a_sample_has_the_same_controls_in_any_batch_and_its_best_is_its_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(6, 5, dtype=D) * torch.logspace(-2, 1, 6, dtype=D)[:, None]
    residuals = [lambda x: x - x.mean(1, keepdim=True), lambda x: x * 0.5]
    batch = closed_loop_controls(as_system(net, x), x, residuals, 0.1, iterations=8, lr=0.3)
    assert bool((batch.cost <= batch.start).all()) and bool((batch.cost < batch.start).any())
    for i in range(6):
        alone = closed_loop_controls(as_system(net, x), x[i : i + 1], residuals, 0.1, iterations=8, lr=0.3)
        assert torch.allclose(alone.output[0], batch.output[i], atol=1e-12)
        assert torch.allclose(alone.cost[0], batch.cost[i], atol=1e-12)
    assert all(p.grad is None for p in net.parameters())


def test_steps_that_are_too_long_never_raise_the_cost():
    system, residuals, _ = rotations(3)
    x = torch.ones(2, 6, dtype=D)
    found = closed_loop_controls(system, x, residuals, 1.0, iterations=5, lr=50.0)
    assert torch.equal(found.cost, found.start)
    assert all(float(u.abs().max()) == 0 for u in found.controls)


def test_the_controls_that_are_returned_give_the_output_and_stages_without_one_are_left_alone():
    system, residuals, _ = rotations(3)
    x = torch.ones(2, 6, dtype=D)
    found = closed_loop_controls(system, x, [None, residuals[1], None], 0.5, iterations=10, lr=0.1)
    assert found.controls[0] is None and found.controls[2] is None
    z = system.step(0, x, system.controls[0]) + found.controls[1]
    for t in (1, 2):
        z = system.step(t, z, system.controls[t])
    assert torch.allclose(z, found.output, atol=1e-14)


def test_what_makes_no_sense_is_refused():
    system, residuals, _ = rotations(2)
    x = torch.ones(1, 6, dtype=D)
    with pytest.raises(ArgumentError, match="c=0"):
        closed_loop_controls(system, x, residuals, 0.0)
    with pytest.raises(ArgumentError, match="1 residuals"):
        closed_loop_controls(system, x, residuals[:1], 1.0)
    with pytest.raises(ArgumentError, match="nothing to control"):
        closed_loop_controls(system, x, [None, None], 1.0)
    with pytest.raises(ArgumentError, match="iterations=-1"):
        closed_loop_controls(system, x, residuals, 1.0, iterations=-1)
    with pytest.raises(ArgumentError, match="start with zeros"):
        closed_loop_controls(system, x, residuals, 1.0, start=[None, torch.zeros(1, 6, dtype=D)])
    with pytest.raises(DivergenceError, match="not finite"):
        closed_loop_controls(system, x * torch.inf, residuals, 1.0)
