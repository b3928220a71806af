r"""Gaussian moments by sampling, for activations that no quadrature can integrate: noisy or rough ones.

    E φ(h)² ≈ 1/N Σ_i φ(√q z_i)²,     E φ(u)φ(v) ≈ 1/N Σ_i φ(√q_u z_i) φ(√q_v (c z_i + √(1-c²) z'_i))

The points (z, z') are a scrambled Sobol set pushed through the normal quantile, the same for every
variance, and the generator that a noisy activation draws from starts from the same state each time:
moments are then fixed functions of q and c, whose equations can be solved in brackets. Noise is
independent between units and between inputs, as that of dropout is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SampledForm", "differentiate", "frozen_noise", "sobol_normals"]

Elementwise = Callable[[Tensor], Tensor]
_CHUNK = 1 << 20


@contextmanager
def frozen_noise(seed: int) -> Iterator[None]:
    """Draws from torch's default generator start from ``seed`` inside, and leave no trace outside."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def differentiate(f: Elementwise, h: Tensor) -> Tensor:
    """df/dh elementwise, by reverse-mode differentiation; differentiable again if ``h`` wants a gradient."""
    again = h.requires_grad and torch.is_grad_enabled()
    with torch.enable_grad():
        x = h if again else h.detach().clone().requires_grad_(True)
        y = f(x)
        if not y.requires_grad:
            return torch.zeros_like(h)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=again, allow_unused=True)
    if slope is None:
        return torch.zeros_like(h)
    return slope if again else slope.detach()


def sobol_normals(count: int, seed: int) -> Tensor:
    """Pairs of standard normal numbers, evenly spread: a scrambled Sobol set, ``(count, 2)``."""
    uniform = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    return torch.special.ndtri(uniform.clamp(1e-15, 1 - 1e-15))


@dataclass(frozen=True)
class SampledForm:
    """Moments as means over points; it stands where a closed form would.

    Args:
        phi: the function; may draw random numbers.
        points: standard normal pairs, ``(N, 2)``.
        seed: state of the noise.
        noisy: whether ``phi`` draws random numbers.
        smooth: whether autograd's derivative is all there is (no jumps).
    """

    phi: Elementwise
    points: Tensor
    seed: int
    noisy: bool
    smooth: bool

    def mean(self, q: Tensor) -> Tensor:
        """E φ(h)."""
        return self._one(lambda h, z: self.phi(h), q)

    def second(self, q: Tensor) -> Tensor:
        """E φ(h)²."""
        return self._one(lambda h, z: self.phi(h) ** 2, q)

    def slope(self, q: Tensor) -> Tensor:
        """E φ'(h)², by autograd: the factor that a gradient meets."""
        return self._one(lambda h, z: differentiate(self.phi, h) ** 2, q)

    def second_rate(self, q: Tensor) -> Tensor:
        """d/dq E φ(h)² = E[(z² - 1) φ²]/2q, which needs no derivative."""
        q = q.clamp_min(1e-10)
        return self._one(lambda h, z: (z * z - 1) * self.phi(h) ** 2, q) / (2 * q)

    def cross(self, q_u: Tensor, q_v: Tensor, c: Tensor) -> Tensor:
        """E φ(u)φ(v)."""
        return self._two(lambda u, v, x, y, cc: self.phi(u) * self.phi(v), q_u, q_v, c)

    def cross_slope(self, q_u: Tensor, q_v: Tensor, c: Tensor) -> Tensor:
        """E φ'(u)φ'(v), by autograd."""
        return self._two(
            lambda u, v, x, y, cc: differentiate(self.phi, u) * differentiate(self.phi, v), q_u, q_v, c
        )

    def correlation_slope(self, q: Tensor, c: Tensor) -> Tensor:
        """DE φ(u)φ(v)/d(qc) at equal variances; with jumps by differentiating the density instead of φ."""
        if self.smooth:
            return self.cross_slope(q, q, c)

        def score(u: Tensor, v: Tensor, x: Tensor, y: Tensor, cc: Tensor) -> Tensor:
            rest = 1 - cc * cc
            log_slope = (cc * rest + (1 + cc * cc) * x * y - cc * (x * x + y * y)) / rest**2
            return self.phi(u) * self.phi(v) * log_slope

        return torch.where(c < 1, self._two(score, q, q, c) / q, torch.inf)

    def half_distance(self, q: Tensor, c: Tensor) -> Tensor:
        """E[(φ(u) - φ(v))²]/2 at equal variances."""
        return self._two(lambda u, v, x, y, cc: (self.phi(u) - self.phi(v)) ** 2 / 2, q, q, c)

    def curvature(self, q: Tensor) -> Tensor:
        """E φ''(h)², by autograd."""

        def slope(h: Tensor) -> Tensor:
            return torch.autograd.grad(self.phi(h).sum(), h, create_graph=True)[0]

        return self._one(lambda h, z: differentiate(slope, h) ** 2, q)

    def _one(self, g: Callable[[Tensor, Tensor], Tensor], q: Tensor) -> Tensor:
        flat = q.detach().to("cpu", torch.float64).reshape(-1)
        out, z = torch.full_like(flat, torch.nan), self.points[:, 0]
        root = flat.clamp_min(0).sqrt()
        known = torch.isfinite(flat).nonzero().squeeze(1)
        for part in known.split(1 if self.noisy else max(1, _CHUNK // len(z))):
            with frozen_noise(self.seed):
                out[part] = g(root[part, None] * z, z).double().mean(-1)
        return out.reshape(q.shape).to(q.device)

    def _two(self, g: Callable[..., Tensor], q_u: Tensor, q_v: Tensor, c: Tensor) -> Tensor:
        full = torch.broadcast_tensors(q_u, q_v, c)  # type: ignore[no-untyped-call]
        a, b, cc = (t.detach().to("cpu", torch.float64).reshape(-1) for t in full)
        out = torch.full_like(a, torch.nan)
        x, other = self.points[:, 0], self.points[:, 1]
        known = torch.isfinite(a + b + cc).nonzero().squeeze(1)
        for part in known.split(1 if self.noisy else max(1, _CHUNK // len(x))):
            k = cc[part, None]
            y = k * x + ((1 - k) * (1 + k)).clamp_min(0).sqrt() * other
            u, v = a[part, None].clamp_min(0).sqrt() * x, b[part, None].clamp_min(0).sqrt() * y
            with frozen_noise(self.seed):
                out[part] = g(u, v, x, y, k).double().mean(-1)
        return out.reshape(full[0].shape).to(q_u.device)
