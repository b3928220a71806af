"""Many variational autoencoders of one shape trained at once, each with its own weight of the KL."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from bolza.models import VAE, vae

__all__ = ["Stack", "courses", "pixels"]


class _Terms(nn.Module):
    def __init__(self, net: VAE) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.net.terms(x, noise)


class Stack:
    """Autoencoders in one batched product a layer, moved by Adam.

    Args:
        nets: the members, of one shape.
        lr: learning rate of all.
    """

    def __init__(self, nets: Sequence[VAE], lr: float) -> None:
        self.members = len(nets)
        with torch.no_grad():
            parameters, _ = stack_module_state([_Terms(net) for net in nets])
        self.parameters = {k: p.detach().requires_grad_() for k, p in parameters.items()}
        base = _Terms(nets[0])
        self._terms = vmap(lambda p, x, e: functional_call(base, p, (x, e)), in_dims=(0, None, 0))
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=lr)

    def step(self, x: Tensor, noise: Tensor, weigh: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """One update of every member.

        Args:
            x: a batch, the same for all.
            noise: draws, shape ``(members, batch, latent)``.
            weigh: weights β from the KLs of this batch, one a member.

        Returns:
            Reconstruction and KL of each member before the update.
        """
        reconstruction, kl = self._terms(self.parameters, x, noise)
        beta = weigh(kl.detach())
        self.optimizer.zero_grad()
        (reconstruction + beta * kl).sum().backward()
        self.optimizer.step()
        return reconstruction.detach(), kl.detach()


def pixels() -> Tensor:
    """Training digits with pixels in [0, 1], shape ``(1438, 64)``."""
    from bolza.data import digits

    x = digits().train_x
    return (x - x.min()) / (x.max() - x.min())


Law = Callable[[float], float]


def courses(
    laws: Mapping[str, Law],
    steps: int,
    seed: int,
    *,
    hidden: int,
    batch: int,
    lr: float = 1e-3,
    latent: int = 10,
) -> dict[str, dict[str, list[float]]]:
    """Train one autoencoder a law, all from the same weights on the same batches and draws.

    Args:
        laws: what gives the next β from the KL of a batch.
        steps: updates.
        seed: of weights, batches and draws.
        hidden: width of the hidden layers.
        batch: samples in a batch.
        lr: learning rate of Adam.
        latent: length of the code.

    Returns:
        KL, β and reconstruction of each, step by step.
    """
    x = pixels()
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        net = vae(x.shape[1], latent, (hidden,))
    draw = torch.Generator().manual_seed(seed)
    stack = Stack([net] * len(laws), lr)
    found: dict[str, dict[str, list[float]]] = {
        name: {"kl": [], "beta": [], "reconstruction": []} for name in laws
    }

    def weigh(kl: Tensor) -> Tensor:
        betas = [law(value) for law, value in zip(laws.values(), kl.tolist(), strict=True)]
        for course, value, beta in zip(found.values(), kl.tolist(), betas, strict=True):
            course["kl"].append(value)
            course["beta"].append(beta)
        return torch.tensor(betas)

    for _ in range(steps):
        rows = torch.randint(len(x), (batch,), generator=draw)
        noise = torch.randn(batch, latent, generator=draw).expand(len(laws), -1, -1)
        reconstruction, _ = stack.step(x[rows], noise, weigh)
        for course, value in zip(found.values(), reconstruction.tolist(), strict=True):
            course["reconstruction"].append(value)
    return found
