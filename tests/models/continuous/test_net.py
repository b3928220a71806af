"""ContinuousNet: one set of weights, many depths."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.data import digits
from bolza.models import ContinuousNet, NeuralODE, continuous_cnn, continuous_mlp


def trained(method: str, epochs: int = 6) -> ContinuousNet:
    torch.manual_seed(0)
    data = digits()
    net = continuous_mlp(64, 10, cells=4, horizon=16.0, method=method)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(data)).split(128):
            optimizer.zero_grad()
            cross_entropy(net(data.train_x[rows]), data.train_y[rows]).backward()
            optimizer.step()
    return net


def test_a_net_trained_by_runge_kutta_does_not_depend_on_the_steps_and_one_trained_by_euler_does():
    data = digits()

    @torch.no_grad()
    def moved(net, **other):
        state = net[0](data.test_x)
        there, here = net[1](state, **other), net[1](state)
        right = net(data.test_x, **other).argmax(1) == data.test_y
        before = net(data.test_x).argmax(1) == data.test_y
        return float((there - here).norm() / there.norm()), float(
            before.double().mean() - right.double().mean()
        )

    fine, euler = trained("rk4"), trained("euler")
    change, drop = moved(fine, steps=64)
    assert change < 0.1 and drop <= 0.01
    assert moved(fine, method="euler", steps=16)[1] <= 0.05
    change, drop = moved(euler, steps=64)
    assert change > 0.3 and drop >= 0.05


def test_refinement_leaves_the_output_alone_and_the_copies_learn_apart():
    net, x = continuous_mlp(5, 3, cells=2, horizon=2.0, steps=8), torch.randn(6, 5)
    before = net(x)
    net.refine()
    assert torch.equal(net(x, steps=8), before) and net.blocks[0].steps == 16
    cells = net.blocks[0].trajectory.cells
    net(x).square().sum().backward()
    gradients = [cell[0].weight.grad for cell in cells]
    assert len(gradients) == 4 and not torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("gradient", ["autograd", "checkpoint", "adjoint"])
def test_convolutional_nets_have_statistics_in_every_cell_and_train(gradient):
    net, x = continuous_cnn(widths=(4, 6), cells=2, gradient=gradient), torch.randn(6, 1, 8, 8)
    net(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    norms = [cell.norm1 for block in net.blocks for cell in block.trajectory.cells]
    assert len({id(norm) for norm in norms}) == 4
    assert [int(norm.num_batches_tracked) for norm in norms] == [4] * 4  # four stages of one step a cell


def test_recalibrated_statistics_are_those_of_the_manifestation_and_modes_stay():
    net, x = continuous_cnn(widths=(4,), cells=1), torch.randn(64, 1, 8, 8)
    net.train()
    norm = net.blocks[0].trajectory.cells[0].norm1
    momentum = norm.momentum
    net.recalibrate([(x, None)], method="euler", steps=1)
    assert net.training and norm.momentum == momentum
    seen = torch.relu(net.blocks[0].trajectory.cells[0].conv1(net[2](net[1].eval()(net[0](x)))))
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_bad_networks_are_refused():
    with pytest.raises(ArgumentError, match="ContinuousBlock"):
        ContinuousNet(nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match="cells"):
        continuous_mlp(4, 2, cells=0)
    with pytest.raises(ArgumentError, match="widths"):
        continuous_cnn(widths=())
    with pytest.raises(UnsupportedError, match="cells"):
        ContinuousNet(NeuralODE(nn.Linear(2, 2))).refine()


def test_recalibration_needs_batches_and_leaves_every_mode_alone():
    net, x = continuous_cnn(widths=(4,), cells=1), torch.randn(8, 1, 8, 8)
    net(x)
    before = net[1].running_mean.clone()
    with pytest.raises(ArgumentError, match="batches is empty"):
        net.recalibrate([])
    assert torch.equal(net[1].running_mean, before)
    net[2].eval()
    modes = [m.training for m in net.modules()]
    net.recalibrate([x])
    assert [m.training for m in net.modules()] == modes
