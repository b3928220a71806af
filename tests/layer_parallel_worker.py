"""What a process of the layer-parallel test does; a new process imports it by name."""

import torch
from torch import nn

from bolza.core.errors import UnsupportedError
from bolza.optim import LayerParallel

F64 = torch.float64


class Block(nn.Module):
    def __init__(self, width, h):
        super().__init__()
        self.h, self.layer, self.norm = h, nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x):
        return x + self.h * torch.tanh(self.layer(self.norm(x)))


def problem(blocks=6, width=6, seed=0, h=0.3, smooth=False):
    """A residual network in float64 with stem and head, and twelve labelled samples."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(5, width), *[Block(width, h) for _ in range(blocks)], nn.Linear(width, 3)
    ).double()
    if smooth:  # weights that do not change with depth
        for block in net[2:-1]:
            block.load_state_dict(net[1].state_dict())
    return net, torch.randn(12, 5, dtype=F64), torch.randint(0, 3, (12,))


def train(method, group=None, slices=3, steps=4, **options):
    """Some steps on halves of the data in turn; parameters, losses and gradients at the end."""
    net, x, y = problem()
    parallel = LayerParallel(
        net, nn.functional.cross_entropy, slices, method=method, samples=12, group=group, **options
    ).read(x[:6])
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.2, momentum=0.9)
    losses = []
    for step in range(steps):
        rows = torch.arange(6) + 6 * (step % 2)
        optimizer.zero_grad()
        losses.append(float(parallel.backward(x[rows], y[rows], rows)))
        optimizer.step()
    own = {name for name, p in net.named_parameters() if p.grad is not None}
    parallel.synchronize()
    return {name: p.detach() for name, p in net.named_parameters()}, losses, own


def work(rank, slices):
    """Run a method of each kind in this process's share of the slices."""
    import torch.distributed as dist

    group = dist.group.WORLD
    found = {m: train(m, group, slices) for m in ("lagrangian", "mgrit")}
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    try:
        LayerParallel(tied, nn.functional.mse_loss, 2, group=group).read(torch.zeros(2, 4))
    except UnsupportedError as error:
        found["refusal"] = str(error)
    return found


def fail(rank):
    """Fail in one process while the other waits for it."""
    import torch.distributed as dist

    if rank == 1:
        raise ValueError("on purpose")
    dist.barrier()
