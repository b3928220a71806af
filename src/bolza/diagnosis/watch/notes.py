"""The few numbers that are noted at a step, from one pass over parameters and gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["HOST", "Notes", "common_momentum"]

HOST = ("loss", "lr")
_SCALARS = (*HOST, "parameter_norm2", "gradient_norm2")
_BALANCE = ("theta_gradient", "velocity_gradient", "velocity_norm2")


class Notes:
    """Norms, a few coordinates of the gradient and a few projections of the parameters.

    Args:
        params: the parameters that are trained, in a fixed order.
        coordinates: how many coordinates of the gradient.
        directions: how many projections of the parameters.
        seed: chooses coordinates and the first directions.

    Attributes:
        columns: names of the numbers of a row; the first two, loss and rate, come from the loop.
        directions: rows, of unit length.

    Example:
        >>> w = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> w.grad = torch.ones(2)
        >>> notes = Notes([w], coordinates=1, directions=0, seed=0)
        >>> dict(zip(notes.columns[2:], notes.take().tolist()))["parameter_norm2"]
        25.0
    """

    def __init__(self, params: Sequence[nn.Parameter], coordinates: int, directions: int, seed: int) -> None:
        self.params = list(params)
        self.size = sum(p.numel() * (2 if p.is_complex() else 1) for p in self.params)
        generator = torch.Generator().manual_seed(seed)
        place = self.params[0].device
        self.coordinates = min(coordinates, self.size)
        chosen = torch.randperm(self.size, generator=generator) if self.size < 2**20 else None
        if chosen is None:  # of many, a few are hardly ever the same
            chosen = torch.randint(self.size, (self.coordinates,), generator=generator)
        self._chosen = chosen[: self.coordinates].sort().values.to(place)
        first = torch.randn(min(directions, self.size), self.size, generator=generator)
        self.directions = self._unit(first)
        self.columns = [
            *_SCALARS,
            *_BALANCE,
            *(f"x{i}" for i in range(len(self.directions))),
            *(f"g{i}" for i in range(self.coordinates)),
        ]

    def aim(self, directions: Tensor) -> None:
        """Replace the first rows of the directions."""
        self.directions[: len(directions)] = self._unit(directions.to(self.directions))

    @torch.no_grad()
    def take(self, optimizer: torch.optim.Optimizer | None = None) -> Tensor:
        """The numbers after the first two, on the device of the parameters; of gradients that are not there, nan.

        Args:
            optimizer: gives the velocity v; θ·g, v·g and ‖v‖² are nan without one whose identity is known.
        """
        theta = _flat(self.params)
        blank = math.nan if all(p.grad is None for p in self.params) else 0.0
        grad = _flat([torch.full_like(p, blank) if p.grad is None else p.grad for p in self.params])
        norms = theta.dot(theta).view(1), grad.dot(grad).view(1)
        v = None if optimizer is None else self._velocity(optimizer, grad)
        balance = (
            theta.new_full((3,), math.nan)
            if v is None
            else torch.stack([theta.dot(grad), v.dot(grad), v.dot(v)])
        )
        return torch.cat([*norms, balance, self.directions.mv(theta), grad.take(self._chosen)])

    def _velocity(self, optimizer: torch.optim.Optimizer, grad: Tensor) -> Tensor | None:
        """Of the last step, if the optimizer is SGD or heavy ball and all it adds to θ is −lr·v."""
        mu = common_momentum(optimizer)
        if not mu:
            return None if mu is None else grad
        buffers = [optimizer.state.get(p, {}).get("momentum_buffer") for p in self.params]
        known = [b for b in buffers if b is not None]
        return _flat(known) if len(known) == len(buffers) else None

    def _unit(self, rows: Tensor) -> Tensor:
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
        kind = torch.float64 if self.params[0].dtype == torch.float64 else torch.float32
        return rows.to(self.params[0].device, kind)


def common_momentum(optimizer: torch.optim.Optimizer) -> float | None:
    """μ of SGD or heavy ball with one rate for all and nothing else; None for every other optimizer.

    Example:
        >>> common_momentum(torch.optim.SGD([torch.ones(1)], lr=0.1, momentum=0.9))
        0.9
    """
    if type(optimizer) is not torch.optim.SGD:
        return None
    groups = optimizer.param_groups
    odd = any(g[name] for g in groups for name in ("nesterov", "dampening", "weight_decay", "maximize"))
    settings = {(float(g["lr"]), float(g["momentum"])) for g in groups}
    return None if odd or len(settings) > 1 else next(iter(settings))[1]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """One real vector, in single precision at least."""
    flat: Tensor = torch._C._nn.flatten_dense_tensors([_plain(t) for t in tensors])
    return flat if flat.dtype in (torch.float32, torch.float64) else flat.float()


def _plain(t: Tensor) -> Tensor:
    if t.layout is not torch.strided:  # the gradient of an embedding
        t = t.to_dense()
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
