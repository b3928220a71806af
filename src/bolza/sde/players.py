r"""Two networks as the players of a game: their joint field, and the noise of their gradients.

    b(z) = (−∂_θ mean_i ℓ_G(G_θ, D_ω, s_i), −∂_ω mean_i ℓ_D(G_θ, D_ω, s_i)),     Σ^{1/2} ξ = N^{−1/2} Σ_i (ξ_i − ξ̄) b_i

The noise is the field of a weighted loss: a draw costs one backward pass of each player, and no gradient of a single
sample is formed.

Reference: Cao & Guo (2020), *SDE approximations of GANs training and its long-run behavior*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from bolza.core.errors import ArgumentError, DataError, UnsupportedError
from bolza.core.reference import cites
from bolza.ops.batches import apply, checked_loss, select_parameters, unflatten
from bolza.ops.replay import differentiable_kernels, frozen_statistics, same_randomness
from bolza.sde.games import CAO, Game

__all__ = ["NetworkGame", "network_game"]

_BatchNorm = nn.modules.batchnorm._BatchNorm
PlayerLoss: TypeAlias = Callable[..., Tensor]


@dataclass(frozen=True)
class NetworkGame(Game):
    """Game of two networks.

    Attributes:
        generator: the first player.
        discriminator: the second.
    """

    generator: nn.Module = None  # type: ignore[assignment]
    discriminator: nn.Module = None  # type: ignore[assignment]

    def state(self) -> Tensor:
        """Present parameters of both, flat ``(d,)``."""
        return torch.cat([p.detach().reshape(-1) for player in self._players() for p in player])

    @torch.no_grad()
    def load(self, z: Tensor) -> None:
        """Put the parameters z into the networks."""
        params = [p for player in self._players() for p in player]
        for p, value in zip(params, unflatten(z, params), strict=True):
            p.copy_(value)

    def _players(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        return (
            list(select_parameters(self.generator).values()),
            list(select_parameters(self.discriminator).values()),
        )


@cites(CAO)
def network_game(
    generator: nn.Module,
    discriminator: nn.Module,
    losses: tuple[PlayerLoss, PlayerLoss],
    data: Sequence[Tensor],
    *,
    seed: int = 0,
) -> NetworkGame:
    r"""Read two networks and their losses as a game.

    Both losses are ``loss(G, D, *samples)`` → scalar, a mean over samples; G and D are called like the networks. Each
    player minimises its own. Batch normalisation in training mode uses the samples of the whole set for the field, and
    cannot be split into samples for the noise, which is refused: evaluate it, or leave the noise out.

    Args:
        generator: first player, parameters θ.
        discriminator: second player, parameters ω.
        losses: of the generator and of the discriminator.
        data: tensors with samples first, such as ``(latents, images)``: sample i is the i-th of each.
        seed: of random layers, the same at every evaluation.

    Returns:
        NetworkGame; z is flat, θ first. Its noise is that of single samples, with ξ of N entries.

    Raises:
        ArgumentError: not two losses, or a player without parameters to train.
        DataError: no samples, or tensors of unequal length.

    Reference: Cao & Guo (2020).

    Example:
        >>> G, D = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> score = lambda G, D, s, x: D(x).mean() - D(G(s)).mean()
        >>> losses = (score, lambda G, D, s, x: -score(G, D, s, x))
        >>> game = network_game(G, D, losses, (torch.ones(4, 1), 2 * torch.ones(4, 1)))
        >>> game.field(torch.tensor([1.0, 0.5]))                       # (ω, 2 − θ)
        tensor([0.5000, 1.0000])
    """
    if len(losses) != 2 or not all(callable(one) for one in losses):
        raise ArgumentError(f"losses is {losses!r}: give the generator's and the discriminator's")
    count = {len(part) for part in data if isinstance(part, Tensor) and part.ndim}
    if len(count) != 1 or not (samples := count.pop()):
        raise DataError(
            "data has no samples, or tensors of unequal length: give (latents, reals), samples first"
        )
    first, second = select_parameters(generator), select_parameters(discriminator)
    split = sum(p.numel() for p in first.values())
    device = next(iter(first.values())).device
    data = [part.to(device) for part in data]

    def named(part: Tensor, params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        return dict(zip(params, unflatten(part, params.values()), strict=True))

    def value(which: int, theta: Tensor, omega: Tensor, batch: Sequence[Tensor]) -> Tensor:
        def player(module: nn.Module, params: dict[str, Tensor]) -> Callable[..., Any]:
            return lambda *x: apply(lambda *a, **b: functional_call(module, params, a, b), x)

        found = losses[which](
            player(generator, named(theta, first)), player(discriminator, named(omega, second)), *batch
        )
        return (
            found.reshape(())
            if torch._C._functorch.is_functorch_wrapped_tensor(found)
            else checked_loss(found)
        )

    def both(z: Tensor, objective: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
        theta, omega = z[:split], z[split:]
        one = grad(lambda a: objective(0, a, omega))(theta)
        two = grad(lambda a: objective(1, theta, a))(omega)
        return -torch.cat([one, two])

    def quietly(function: Callable[..., Tensor], z: Tensor, *rest: Tensor) -> Tensor:
        with ExitStack() as stack:
            for module in (generator, discriminator):
                stack.enter_context(frozen_statistics(module))
                stack.enter_context(differentiable_kernels(module))
            stack.enter_context(same_randomness(seed, device))
            if z.ndim == 1:
                return function(z, *rest)
            flat = [part.reshape(-1, part.shape[-1]) for part in (z, *rest)]
            return vmap(function, randomness="same")(*flat).reshape(z.shape)

    def field(z: Tensor) -> Tensor:
        return quietly(lambda a: both(a, lambda i, theta, omega: value(i, theta, omega, data)), z)

    def noise(z: Tensor, xi: Tensor) -> Tensor:
        for layer in (*generator.modules(), *discriminator.modules()):
            if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
                raise UnsupportedError(
                    f"{type(layer).__name__} normalises by the whole batch, so that single samples have no gradients: "
                    "call eval() on that network, or leave the noise out with Game(game.field, game.split)"
                )
        weights = (xi - xi.mean(-1, keepdim=True)) / math.sqrt(samples)

        def draw(a: Tensor, w: Tensor) -> Tensor:
            def weighted(i: int, theta: Tensor, omega: Tensor) -> Tensor:
                def alone(*sample: Tensor) -> Tensor:
                    return value(i, theta, omega, [part[None] for part in sample])

                return (w * vmap(alone, randomness="same")(*data)).sum()

            return both(a, weighted)

        return quietly(draw, z, weights)

    return NetworkGame(
        field,
        split,
        noise,
        lambda z: (*z.shape[:-1], samples),
        generator=generator,
        discriminator=discriminator,
    )
