"""What the studies of control of hidden states share: digits in [0, 1], networks, exact rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.robust import SelfHealing, pgd_training
from bolza.studies._adversarial import pixels

__all__ = ["EPS", "NOISE", "orthogonal_layers", "tanh_network", "trained"]

EPS, NOISE = 0.1, 0.5  # radius in the largest entry, and standard deviation, of pixels in [0, 1]


def tanh_network(seed: int) -> nn.Module:
    """The MLP 64-128-128-10 with tanh, started from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10)
        )


def trained(seed: int, epochs: int, attack_steps: int = 0) -> nn.Module:
    """A network trained on digits, plainly or against an adversary, in evaluation mode."""
    x, y, _, _ = pixels("digits")
    model = tanh_network(seed)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, fused=True)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=draw).split(128 if attack_steps else 64):
            optimizer.zero_grad()
            if attack_steps:
                pgd_training(model, F.cross_entropy, x[rows], y[rows], EPS, attack_steps, generator=draw)
            else:
                F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


def orthogonal_layers(depth: int, width: int = 12, rank: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    """Orthogonal linear layers, inputs of a subspace, and a basis of the whole space that begins with it."""
    draw = torch.Generator().manual_seed(0)

    def rotation() -> Tensor:
        return torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64)).Q

    net = nn.Sequential(*(nn.Linear(width, width, bias=False).double() for _ in range(depth)))
    for layer in net:
        layer.weight.data = rotation()
    basis = rotation()
    x = torch.randn(60, rank, generator=draw, dtype=torch.float64) @ basis[:rank] + 1
    return net.requires_grad_(False), x, basis


def deviations(c: float, depth: int) -> tuple[float, float]:
    """What control leaves of a unit deviation off and in the subspace, at the output of orthogonal layers."""
    net, x, basis = orthogonal_layers(depth)
    healed = SelfHealing(net, c=c, fraction=1.0).fit(x)
    at = x[:1]
    return (
        float((healed(at + basis[-1:]) - net(at)).norm()),
        float((healed(at + basis[:1]) - net(at)).norm()),
    )
