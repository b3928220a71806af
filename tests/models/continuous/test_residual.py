"""Residual networks of blocks of size 1/L."""

import copy
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from bolza.core.errors import ArgumentError
from bolza.data import digits
from bolza.models import MeanFieldResNet


def test_network_is_the_residual_recursion_with_blocks_of_size_a_over_depth():
    net, x = MeanFieldResNet(5, 2, width=4, hidden=3, depth=6, scale=2.0).double(), torch.randn(7, 5).double()
    h = net.stem(x)
    for block in net.body.trajectory.cells:
        h = h + 2.0 / 6 * block(h)
    torch.testing.assert_close(net(x), net.head(h), rtol=1e-12, atol=1e-12)


def test_rate_of_the_blocks_is_multiplied_by_the_depth_and_all_parameters_are_in_a_group():
    net = MeanFieldResNet(5, 2, depth=8)
    outer, blocks = net.parameter_groups(0.1)
    assert (outer["lr"], blocks["lr"]) == (0.1, pytest.approx(0.8))
    assert len(outer["params"]) + len(blocks["params"]) == len(list(net.parameters()))


def test_a_step_moves_the_function_by_as_much_at_every_depth():
    """Blocks of the same weights at every depth: the first step of gradient descent is free of L to O(1/L)."""
    data, moves = digits(), []
    x, y = data.train_x[:64].double(), data.train_y[:64]
    for depth in (16, 64):
        torch.manual_seed(0)
        net = MeanFieldResNet(64, 10, depth=1, scale=2.0).double()
        net.refine(depth)
        optimizer = torch.optim.SGD(net.parameter_groups(0.05))
        before = net(x)
        cross_entropy(before, y).backward()
        optimizer.step()
        moves.append((net(x) - before).detach())
    assert float((moves[0] - moves[1]).norm() / moves[1].norm()) < 0.05
    assert float(moves[0].norm()) > 0.1


def test_refined_network_is_the_same_function_at_equal_steps():
    net, x = MeanFieldResNet(5, 2, depth=3), torch.randn(4, 5)
    net.permute([2, 0, 1])
    before = net(x)
    net.refine(2)
    assert net.depth == 6 and net.order == list(range(6))
    torch.testing.assert_close(net.head(net.body(net.stem(x), steps=3)), before)


def test_order_is_kept_in_the_state_dict_and_parameters_keep_their_names():
    net, x = MeanFieldResNet(5, 2, depth=4), torch.randn(4, 5)
    other = copy.deepcopy(net)
    before = net(x)
    net.permute([3, 2, 1, 0])
    assert not torch.equal(net(x), before)
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in other.named_parameters()]
    other.load_state_dict(net.state_dict())
    assert other.order == [3, 2, 1, 0] and torch.equal(other(x), net(x))


def test_swaps_move_blocks_by_one_place_and_half_of_the_pairs():
    net, draw = MeanFieldResNet(2, 2, width=2, hidden=1, depth=40), torch.Generator().manual_seed(0)
    moved = 0
    for _ in range(50):
        net.permute(range(40))
        net.swap_neighbours(draw)
        assert all(abs(block - place) <= 1 for place, block in enumerate(net.order))
        moved += sum(block > place for place, block in enumerate(net.order))
    pairs = 50 * 19.5
    assert abs(moved - pairs / 2) < 4 * math.sqrt(pairs / 4 + 50 * 0.25 / 4)


def test_bad_arguments_are_refused():
    with pytest.raises(ArgumentError, match="scale"):
        MeanFieldResNet(2, 2, scale=0.0)
    with pytest.raises(ArgumentError, match="permutation"):
        MeanFieldResNet(2, 2, depth=3).permute([0, 0, 1])
