r"""Where the states of a network live on clean inputs: linear subspaces and autoencoders.

    linear:       E(x) = m + V Vᵀ(x − m)
    autoencoder:  E(x) = m + s · decode(encode((x − m)/s))

What control takes away is the residual x − E(x). Means are those of the training states, so that what happens to one
sample never depends on the others of its batch.

Reference: Chen, Li & Zhang (2021), section 4; Chen, Wang, Yang, Li & Zhang (2024), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, DataError, DivergenceError

__all__ = ["Autoencoder", "Subspace", "principal_directions"]

_NEGLIGIBLE = 1e-10  # variance relative to the largest, below which a direction is rounding


def principal_directions(rows: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Mean (d,) and the fewest principal directions (d, r) that carry a fraction of the variance, in float64.

    Through the smaller of the two Gram matrices, n×n or d×d.
    """
    rows = rows.double()
    mean = rows.mean(0)
    centred = rows - mean
    n, d = centred.shape
    if n > d:
        variance, directions = torch.linalg.eigh(centred.mT @ centred)
    else:
        variance, left = torch.linalg.eigh(centred @ centred.mT)
        directions = centred.mT @ left
    variance, directions = variance.flip(0).clamp_min(0), directions.flip(1)
    total = variance.sum()
    if not bool(torch.isfinite(total)):
        raise DataError("states are not finite: check the inputs and the network for nan and inf")
    kept = int((variance > _NEGLIGIBLE * variance[0]).sum()) if float(total) > 0 else 0
    if fraction < 1 and kept:
        share = variance.cumsum(0) / total
        kept = min(kept, int((share < fraction * (1 - 1e-12)).sum()) + 1)
    return mean, torch.linalg.qr(directions[:, :kept]).Q if kept else directions[:, :0]


class Subspace(nn.Module):
    r"""Affine subspace of a space of states: E(x) = m + V Vᵀ(x − m).

    Args:
        mean: m, shape ``(d,)``.
        basis: V with orthonormal columns, shape ``(d, r)``.

    Example:
        >>> line = Subspace.fit(torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]))
        >>> line(torch.tensor([[5.0, 7.0]]))
        tensor([[5., 1.]])
    """

    mean: Tensor
    basis: Tensor

    def __init__(self, mean: Tensor, basis: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis)

    @classmethod
    def fit(cls, rows: Tensor, fraction: float = 0.95) -> Subspace:
        """The principal directions of states that carry a fraction of their variance.

        Args:
            rows: states, shape ``(n, d)``.
            fraction: of the variance, above 0, at most 1.

        Returns:
            Subspace in the dtype and on the device of ``rows``.

        Raises:
            ArgumentError: the fraction makes no sense.
            DataError: fewer than two states, or one that is not finite.
        """
        if not 0 < fraction <= 1:
            raise ArgumentError(f"fraction={fraction} of the variance must lie above 0 and not above 1")
        if rows.ndim != 2 or len(rows) < 2:
            raise DataError(f"states have shape {tuple(rows.shape)}: at least two are needed, (n, d)")
        mean, basis = principal_directions(rows, fraction)
        return cls(mean.to(rows.dtype), basis.to(rows.dtype).contiguous())

    @classmethod
    def average(cls, subspaces: Sequence[Subspace]) -> Subspace:
        """One map whose residual is the average of the residuals of several about the mean of the first.

        1/k Σ V_i V_iᵀ is factored again, so that the map costs what one of at most full rank does.
        """
        if len(subspaces) == 1:
            return subspaces[0]
        joint = torch.cat([part.basis for part in subspaces], 1).double() / len(subspaces) ** 0.5
        left, size, _ = torch.linalg.svd(joint, full_matrices=False)
        kept = size > 1e-7
        return cls(subspaces[0].mean, (left[:, kept] * size[kept]).to(subspaces[0].basis.dtype).contiguous())

    @property
    def rank(self) -> int:
        """Number of directions that are left alone."""
        return self.basis.shape[1]

    def along(self, direction: Tensor) -> Tensor:
        """The part V Vᵀ d of directions ``(..., d)`` that lies in the subspace."""
        basis = self.basis.to(direction.dtype)
        return direction @ basis @ basis.mT

    def forward(self, x: Tensor) -> Tensor:
        """The nearest point of the subspace, for states ``(..., d)``."""
        mean = self.mean.to(x.dtype)
        return mean + self.along(x - mean)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.rank} of {self.basis.shape[0]} directions"


class Autoencoder(nn.Module):
    r"""Curved manifold of states, learned: E(x) = m + s · decode(encode((x − m)/s)).

    Args:
        net: maps standardised states ``(n, d)`` to states of the same shape; by convention through a bottleneck.
        mean: m, shape ``(d,)``.
        scale: s, a number: one scale for all entries keeps distances as they are.

    Example:
        >>> circle = torch.linspace(0, 6.28, 200)
        >>> rows = torch.stack([circle.cos(), circle.sin()], 1)
        >>> curve = Autoencoder.fit(rows, code=1, hidden=16, steps=50)
        >>> curve(torch.tensor([[2.0, 0.0]])).shape
        torch.Size([1, 2])
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, net: nn.Module, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    @classmethod
    def fit(
        cls,
        rows: Tensor,
        code: int | None = None,
        *,
        hidden: int | None = None,
        net: nn.Module | None = None,
        steps: int = 500,
        lr: float = 3e-3,
        batch: int = 128,
        noise: float = 0.3,
        seed: int = 0,
    ) -> Autoencoder:
        r"""Train a denoising autoencoder on states: min E ‖E(x + σξ) − x‖².

        Args:
            rows: states, shape ``(n, d)``.
            code: width of the bottleneck; that of the subspace with 95 % of the variance by default.
            hidden: width of the two layers around it; ``max(32, 2 · code)`` by default.
            net: an autoencoder of your own ``(n, d) → (n, d)``, trained here, in place of the default one.
            steps: steps of Adam.
            lr: its rate; falls to zero along a cosine.
            batch: states a step.
            noise: σ in units of the scale of the states, so that E learns to come back from beside the manifold.
            seed: of the start, the batches and the noise.

        Returns:
            Autoencoder with frozen parameters, in the dtype and on the device of ``rows``.

        Raises:
            ArgumentError: steps below 1 or a code below 1.
            DataError: fewer than two states, or one that is not finite.
            DivergenceError: the loss is not finite.
        """
        if rows.ndim != 2 or len(rows) < 2:
            raise DataError(f"states have shape {tuple(rows.shape)}: at least two are needed, (n, d)")
        if steps < 1 or (code is not None and code < 1):
            raise ArgumentError(f"steps={steps} and code={code} must both be at least 1")
        rows = rows.detach().float() if rows.dtype in (torch.half, torch.bfloat16) else rows.detach()
        mean, basis = principal_directions(rows, 0.95)
        scale = (rows - mean.to(rows.dtype)).square().mean().sqrt().clamp_min(torch.finfo(rows.dtype).tiny)
        draw = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            net = net or cls.network(rows.shape[1], code or max(1, basis.shape[1]), hidden)
        self = cls(net.to(rows.device, rows.dtype), mean.to(rows.dtype), scale)
        data = (rows - self.mean) / scale
        with torch.enable_grad():
            optimizer = torch.optim.Adam(net.parameters(), lr, fused=rows.device.type in ("cpu", "cuda"))
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            for _ in range(steps):
                x = data[torch.randint(len(data), (min(batch, len(data)),), generator=draw).to(rows.device)]
                moved = x + noise * torch.randn(x.shape, generator=draw, dtype=x.dtype).to(x.device)
                loss = (net(moved) - x).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        if not bool(torch.isfinite(loss)):
            raise DivergenceError(f"the loss of the autoencoder is {float(loss)}: lower lr={lr:g}")
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Autoencoder:
        """Stays in evaluation mode: it is part of a trained network, and samples are to stay apart."""
        return super().train(False)

    @staticmethod
    def network(d: int, code: int, hidden: int | None = None) -> nn.Sequential:
        """The default: d → hidden → code → hidden → d, with a smooth activation."""
        width = hidden or max(32, 2 * code)
        sizes: list[nn.Module] = [nn.Linear(d, width), nn.GELU(), nn.Linear(width, code)]
        return nn.Sequential(*sizes, nn.Linear(code, width), nn.GELU(), nn.Linear(width, d))

    def forward(self, x: Tensor) -> Tensor:
        """The state that the autoencoder makes of states ``(..., d)``."""
        out: Tensor = self.net((x.to(self.mean.dtype) - self.mean) / self.scale)
        return (self.mean + self.scale * out).to(x.dtype)


Manifold = Subspace | Autoencoder
MakeNetwork = Callable[[int], nn.Module]
