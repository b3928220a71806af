"""What a process of the second-order test does; a new process imports it by name."""

import torch
from torch import nn
from torch.nn import functional as F

from bolza.models.continuous import NeuralODE
from bolza.optim import HorizonController, SNOpt

D = torch.float64


def problem():
    """A continuous-depth network in float64, and twelve labelled samples."""
    torch.manual_seed(0)
    field = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    block = NeuralODE(field, method="euler", steps=4, gradient="adjoint")
    net = nn.Sequential(nn.Linear(4, 3), block, nn.LayerNorm(3), nn.Linear(3, 2)).to(D)
    return net, torch.randn(12, 4, dtype=D), torch.arange(12) % 2


def train(net, wrapped, x, y, steps=4):
    """Some steps with a horizon that moves; parameters and horizons."""
    optimizer = SNOpt(wrapped, lr=0.1, momentum=0.5, refresh=3)
    control = HorizonController(net[1], optimizer, every=2, c=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
        control.step()
    return {name: p.detach() for name, p in net.named_parameters()}, control.history


def work(rank):
    """Train on this process's half of the samples."""
    net, x, y = problem()
    half = slice(6 * rank, 6 * rank + 6)
    return train(net, nn.parallel.DistributedDataParallel(net), x[half], y[half])
