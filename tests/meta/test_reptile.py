"""Reptile: the gradient is the way back from where the tasks lead."""

import torch
from torch import nn

from bolza.meta import Reptile

D = torch.float64


def test_a_step_of_unit_rate_goes_to_the_mean_of_the_adapted_networks():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).to(D)
    support = torch.randn(3, 5, 2, dtype=D), torch.randn(3, 5, 1, dtype=D)
    learner = Reptile(net, lr=0.1, steps=6)
    adapted = learner.adapt_tasks(support)
    value = learner(support)
    value.backward()
    torch.optim.SGD(net.parameters(), lr=1.0).step()
    for name, p in net.named_parameters():
        assert torch.allclose(p, adapted[name].mean(0), atol=1e-14)
    inner = nn.functional.mse_loss(
        learner.adapt(support[0][0], support[1][0], steps=1)(support[0][0]), support[1][0]
    )
    assert inner.item() > 0 and value.item() > 0


def test_with_one_inner_step_it_is_joint_training_and_its_fixed_point_is_known():
    centres = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=D)
    curvature = torch.tensor([[1.0, 2.0], [3.0, 0.5]], dtype=D)

    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, dtype=D))

        def forward(self, x):
            return self.w.expand(x.shape[0], 2) * x

    scale = curvature.sqrt()[:, None]
    tasks = scale, centres[:, None] * scale  # mean square of √a (w − c) over two entries: ½ Σ a (w − c)²
    net = Point()
    learner = Reptile(net, lr=0.1, steps=1)
    outer = torch.optim.SGD(net.parameters(), lr=8.0)
    for _ in range(40):
        outer.zero_grad()
        learner(tasks).backward()
        outer.step()
    assert torch.allclose(net.w, torch.tensor([0.25, 0.4], dtype=D), atol=1e-9)


def test_the_value_is_that_of_the_query_where_one_is_given():
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    support = torch.randn(3, 5, 2), torch.randn(3, 5, 1)
    learner = Reptile(net, lr=0.1, steps=2)
    assert torch.allclose(learner(support), learner(support, support))
