"""Training with and without the steep directions."""

import copy

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError, ShapeError, UnsupportedError
from bolza.stability import ProjectOut, Sharpness
from bolza.stability.project_out import project
from bolza.testing import check_optimizer

F64 = torch.float64


class Fixed:
    """A subspace that does not move."""

    def __init__(self, params, k=3):
        self.params = [
            p for entry in params for p in (entry["params"] if isinstance(entry, dict) else [entry])
        ]
        self.k = k
        self.asked = 0

    def subspace(self):
        self.asked += 1
        size = sum(p.numel() for p in self.params)
        generator = torch.Generator().manual_seed(self.asked)
        return torch.linalg.qr(torch.randn(size, self.k, generator=generator, dtype=F64))[0].to(
            self.params[0].dtype
        )


@pytest.mark.parametrize(
    "base", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=0.01)]
)
def test_it_stands_wherever_an_optimizer_stands(base):
    def make(params):
        params = list(params)
        return ProjectOut(base(params), Fixed(params), every=50)

    check_optimizer(make)


def test_both_parts_add_up_and_lie_where_they_should():
    g = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=F64)
    v = torch.linalg.qr(torch.randn(20, 4, generator=torch.Generator().manual_seed(1), dtype=F64))[0]
    bulk, top = project(g, v), project(g, v, "top")
    torch.testing.assert_close(bulk + top, g)
    assert float((v.T @ bulk).abs().max()) < 1e-14 and float((top - v @ (v.T @ top)).abs().max()) < 1e-14


@pytest.mark.parametrize("keep", ["bulk", "top"])
def test_a_step_is_the_optimizer_s_on_the_projected_gradient(keep):
    p, q = nn.Parameter(torch.ones(4, dtype=F64)), nn.Parameter(torch.ones(2, 3, dtype=F64))
    subspace = Fixed([q, p])  # another order than the optimizer's
    optimizer = ProjectOut(torch.optim.SGD([p, q], lr=0.5), subspace, every=2, keep=keep)
    for turn in range(4):
        before = torch.cat([q.detach().reshape(-1), p.detach()])
        q.grad, p.grad = torch.randn_like(q), torch.randn_like(p)
        g = torch.cat([q.grad.reshape(-1), p.grad])
        optimizer.step()
        v = Fixed([q, p])
        v.asked = turn // 2
        wanted = before - 0.5 * project(g, v.subspace(), keep)
        torch.testing.assert_close(torch.cat([q.detach().reshape(-1), p.detach()]), wanted)
        torch.testing.assert_close(torch.cat([q.grad.reshape(-1), p.grad]), g, rtol=0, atol=0)
    assert subspace.asked == 2


def test_on_a_quadratic_the_steep_direction_rests_and_the_others_descend():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.ones(3, dtype=F64))

        def forward(self, x):
            return (torch.tensor([9.0, 1.0, 1.0], dtype=F64) * self.theta.square()).sum() / 2 + 0 * x.sum()

    net, data = Net(), (torch.zeros(1, 1), torch.zeros(1))
    sharp = Sharpness(net, lambda z, y: z, data, tol=1e-10)
    optimizer = ProjectOut(torch.optim.SGD(net.parameters(), lr=0.3), sharp, every=10)
    for _ in range(30):  # 0.3 is above the limit 2/9 of the whole gradient
        optimizer.zero_grad()
        net(data[0]).backward()
        optimizer.step()
    assert net.theta.tolist() == pytest.approx([1.0, 0.7**30, 0.7**30], abs=1e-9)
    assert optimizer.share == pytest.approx(1.0) and len(sharp.history) == 3


def test_parameters_that_the_subspace_does_not_know_count_as_bulk():
    p, q = nn.Parameter(torch.ones(2, dtype=F64)), nn.Parameter(torch.ones(1, dtype=F64))
    for keep, wanted in (("bulk", [0.5]), ("top", [1.0])):
        with torch.no_grad():
            q.fill_(1.0)
        optimizer = ProjectOut(torch.optim.SGD([p, q], lr=0.5), Fixed([p], k=1), keep=keep)
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
        assert q.tolist() == wanted


def test_a_copy_of_network_and_optimizer_goes_on_alone():
    torch.manual_seed(0)
    net, x, y = nn.Linear(3, 2).double(), torch.randn(8, 3, dtype=F64), torch.randn(8, 2, dtype=F64)
    loss = nn.functional.mse_loss
    adam = torch.optim.Adam(net.parameters(), lr=0.1)
    optimizer = ProjectOut(adam, Sharpness(net, loss, (x, y)), every=2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)  # wraps the step of the first one

    def go_on(net, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            loss(net(x), y).backward()
            optimizer.step()
        return net.weight.detach().clone()

    go_on(net, optimizer)
    scheduler.step()
    assert optimizer.state is adam.state and len(optimizer.state) == 2
    other = copy.deepcopy((net, optimizer))
    before = net.weight.detach().clone()
    moved = go_on(*other)
    assert torch.equal(net.weight, before) and not torch.equal(moved, before)
    assert torch.equal(go_on(net, optimizer), moved)
    assert other[1].subspace.params[0] is other[0].weight


def test_a_parameter_that_was_frozen_meanwhile_is_named():
    net, x, y = nn.Linear(2, 1), torch.ones(4, 2), torch.ones(4, 1)
    sharp = Sharpness(net, nn.functional.mse_loss, (x, y))
    net.bias.requires_grad_(False)
    with pytest.raises(ArgumentError, match="'bias' was frozen"):
        sharp.measure()


def test_bad_arguments_are_named():
    p = nn.Parameter(torch.ones(4))
    sgd = torch.optim.SGD([p], lr=0.1)
    with pytest.raises(ArgumentError, match="every is 0"):
        ProjectOut(sgd, Fixed([p]), every=0)
    with pytest.raises(ArgumentError, match="none of the optimizer's"):
        ProjectOut(sgd, Fixed([nn.Parameter(torch.ones(4))]))
    with pytest.raises(UnsupportedError, match="LBFGS"):
        ProjectOut(torch.optim.LBFGS([p]), Fixed([p]))
    wrong = Fixed([p])
    wrong.subspace = lambda: torch.ones(3, 1)
    p.grad = torch.ones(4)
    with pytest.raises(ShapeError, match=r"\(4, k\)"):
        ProjectOut(sgd, wrong).step()
