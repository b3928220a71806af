"""What a process of the test of several processes does; a new process imports it by name."""

import torch
from torch import nn
from torch.nn import functional as F

from bolza.optim import EMSA, MSA, BinaryMSA, DDPNOpt, DGNOpt

MAKERS = {
    "identity": lambda model: DDPNOpt(model, lr=0.3),
    "momentum": lambda model: DDPNOpt(model, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "rmsprop": lambda model: DDPNOpt(model, lr=0.01, curvature="rmsprop"),
    "kronecker": lambda model: DDPNOpt(model, lr=0.1, curvature="kronecker", momentum=0.5, refresh=2),
    "game": lambda model: DGNOpt(model, lr=0.1),
    "proximal": lambda model: MSA(model),
    "extended": lambda model: EMSA(model),
    "binary": lambda model: BinaryMSA(model, lr=1e-2, alpha=0.9),
}


def train(name, wrap, rows):
    """Five steps on some of twelve samples; the parameters."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 6), nn.Tanh(), nn.Linear(6, 3)
    )
    net.double()
    x, y = torch.randn(12, 2, 8, dtype=torch.float64), torch.arange(12) % 3
    model = wrap(net)
    optimizer = MAKERS[name](model)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return {key: value.detach() for key, value in net.named_parameters()}


def work(rank):
    """Train on this process's half of the samples, with every optimizer."""
    half = slice(6 * rank, 6 * rank + 6)
    return {name: train(name, nn.parallel.DistributedDataParallel, half) for name in MAKERS}
