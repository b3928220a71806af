r"""Shooting: weights for all depths from the initial states and costates of a few particles.

The cost ½ w ∫ |θ(s)|² ds on the weights makes optimal ones obey Hamilton's equations, so that a whole trajectory of
weights follows from its start. The state is a pair q = (q₁, q₂); P particles carry states and momenta (q, p), and

    q̇₁ = θ₁ σ(q₂) + b₁            q̇₂ = θ₂ q₁ + b₂
    ṗ₁ = −θ₂ᵀ p₂                  ṗ₂ = −σ'(q₂) ∘ θ₁ᵀ p₁
    θ₁ = (1/Pw) Σ p₁ σ(q₂)ᵀ       b₁ = (1/Pw) Σ p₁
    θ₂ = (1/Pw) Σ p₂ q₁ᵀ          b₂ = (1/Pw) Σ p₂

Data follow the first line with the same weights. ½|θ|² is constant along the flow.

Sign: the momentum points along the motion, as in mechanics; it is minus the costate ∂J/∂q of the rest of this library.

Reference: Vialard, Kwitt, Wei & Niethammer (2020), *A Shooting Formulation of Deep Learning*, arXiv:2006.10330, §3 to
§4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, ShapeError
from bolza.core.reference import Reference, cites
from bolza.models.continuous.block import ContinuousBlock
from bolza.models.continuous.trajectories import Trajectory
from bolza.models.mlp import activation_module, positive
from bolza.systems.ode import RungeKutta

__all__ = ["ParticleFlow", "ShootingNet"]

VIALARD = Reference(
    "vialard2020shooting",
    "Vialard, François-Xavier and Kwitt, Roland and Wei, Susan and Niethammer, Marc",
    "A Shooting Formulation of Deep Learning",
    2020,
    venue="Advances in Neural Information Processing Systems",
    arxiv="2006.10330",
)


class Weights(NamedTuple):
    """θ₁ (d, αd), b₁ (d), θ₂ (αd, d), b₂ (αd)."""

    theta1: Tensor
    b1: Tensor
    theta2: Tensor
    b2: Tensor


def weights_of(
    q1: Tensor, q2: Tensor, p1: Tensor, p2: Tensor, sigma: Callable[[Tensor], Tensor], w: float
) -> Weights:
    r"""The weights that maximise (1/P) Σ ⟨p, q̇⟩ − ½ w |θ|² for particles of shapes (P, d) and (P, αd)."""
    n = w * q1.shape[0]
    return Weights(p1.T @ sigma(q2) / n, p1.sum(0) / n, p2.T @ q1 / n, p2.sum(0) / n)


def data_velocity(
    theta: Weights, q1: Tensor, q2: Tensor, sigma: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """q̇ for states (batch, d) and (batch, αd)."""
    return torch.addmm(theta.b1, sigma(q2), theta.theta1.T), torch.addmm(theta.b2, q1, theta.theta2.T)


class ParticleFlow(Trajectory):
    r"""Weights that flow with particles: the UpDown model.

    Data are pairs (q₁, q₂). The parameters are the states ``q`` and momenta ``p`` of the particles at time 0, each a
    row of (1 + α) d numbers.

    Args:
        width: d, the length of q₁.
        inflation: α; q₂ has the length αd.
        particles: P.
        activation: name or class; a kink (ReLU) breaks the conservation of energy where a particle passes it.
        weight: w, the price of the weights.
        magnitude: standard deviation of the particles' first states and momenta.

    Raises:
        ArgumentError: a size, the weight or the magnitude is not positive.

    Reference: Vialard, Kwitt, Wei & Niethammer (2020), arXiv:2006.10330, §4.

    Example:
        >>> flow = ParticleFlow(width=1, inflation=8, particles=5)
        >>> q = torch.zeros(3, 1), torch.zeros(3, 8)
        >>> ContinuousBlock(flow)(q)[0].shape
        torch.Size([3, 1])
    """

    def __init__(
        self,
        width: int,
        inflation: int = 16,
        particles: int = 15,
        activation: str | Callable[[], nn.Module] = "tanh",
        weight: float = 1.0,
        magnitude: float = 0.5,
    ) -> None:
        super().__init__()
        positive(width=width, inflation=inflation, particles=particles)
        if not (weight > 0 and magnitude >= 0):
            raise ArgumentError(
                f"weight={weight} and magnitude={magnitude}: give weight > 0 and magnitude >= 0"
            )
        self.sigma, self.weight, self.width = activation_module(activation), weight, width
        size = width * (1 + inflation)
        self.q = nn.Parameter(magnitude * torch.randn(particles, size))
        self.p = nn.Parameter(magnitude * torch.randn(particles, size))

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, : self.width], x[:, self.width :]

    def weights(self, q: Tensor | None = None, p: Tensor | None = None) -> Weights:
        """The weights that particles make; by default those at time 0.

        Args:
            q: states of the particles, (P, (1 + α) d): q₁, then q₂.
            p: their momenta, of the same shape.
        """
        q, p = self.q if q is None else q, self.p if p is None else p
        return weights_of(*self._parts(q), *self._parts(p), self.sigma, self.weight)

    def energy(self) -> Tensor:
        """½|θ|² at time 0, and so at every depth: the price of the weights over one unit of time."""
        return torch.stack([part.square().sum() for part in self.weights()]).sum() / 2

    def start(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """States of the data and, below them, of the particles; momenta of the particles."""
        return torch.cat([torch.cat(x, 1), self.q]), self.p

    def finish(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The data."""
        return self._parts(state[0][: -self.p.shape[0]])

    def forward(self, s: float, x: tuple[Tensor, Tensor], u: None = None) -> tuple[Tensor, Tensor]:
        """Velocities of the states of data and particles, and of the momenta."""
        q, p = x
        theta = self.weights(q[-len(p) :], p)
        # data and particles obey the same equation: one product for both
        velocity = data_velocity(theta, *self._parts(q), self.sigma)
        p1, p2 = self._parts(p)
        pull, q2 = p1 @ theta.theta1, q[-len(p) :, self.width :]
        if isinstance(self.sigma, nn.Tanh):
            force = pull * (torch.tanh(q2).square() - 1)
        else:
            force = -_slope(self.sigma, q2, pull)
        return torch.cat(velocity, 1), torch.cat([-p2 @ theta.theta2, force], 1)


def _slope(sigma: nn.Module, x: Tensor, cotangent: Tensor) -> Tensor:
    """σ'(x) ∘ cotangent, differentiable."""
    return torch.func.jvp(sigma, (x,), (cotangent,))[1]


@cites(VIALARD)
class ShootingNet(nn.Module):
    r"""A network whose weights at all depths are shot from the initial conditions of a few particles.

    q₁(0) = x, or a linear map of x where ``width`` differs from its length; q₂(0) = 0, or a trained linear map of x.
    The output is q₁(T), or a linear map of it. Add :meth:`energy` to the loss; the defaults of the paper are
    100 · MSE + energy, RK4 with steps of 0.1, and Adam at 0.01.

    Args:
        in_features: length of the input.
        out_features: length of the output.
        width: length of q₁; ``in_features`` by default.
        inflation: α; q₂ has the length α · width.
        particles: number of particles P.
        activation: name or class; smooth ones conserve energy.
        weight: w, the price of the weights.
        magnitude: standard deviation of the particles at the start.
        lift: whether q₂(0) is a linear map of x rather than 0.
        horizon: time T.
        method: integrator.
        steps: number of steps.
        gradient: as for :class:`ContinuousBlock`.

    Raises:
        ArgumentError: a size, the weight or the magnitude is not positive.
        ShapeError: (in use) the input does not have ``in_features`` entries.

    Reference: Vialard, Kwitt, Wei & Niethammer (2020), arXiv:2006.10330, §4 (the UpDown model).

    Example:
        >>> net = ShootingNet(1, 1, inflation=16, particles=10)
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> loss = 100 * (net(x) - x**3).square().mean() + net.energy()
        >>> loss.backward()
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        width: int | None = None,
        inflation: int = 16,
        particles: int = 15,
        activation: str | Callable[[], nn.Module] = "tanh",
        weight: float = 1.0,
        magnitude: float = 0.5,
        lift: bool = True,
        horizon: float = 1.0,
        method: str | RungeKutta = "rk4",
        steps: int = 10,
        gradient: str = "autograd",
    ) -> None:
        super().__init__()
        width = in_features if width is None else width
        positive(in_features=in_features, out_features=out_features, width=width)
        self.in_features, self.size2 = in_features, width * inflation
        self.stem = nn.Identity() if width == in_features else nn.Linear(in_features, width)
        self.lift = nn.Linear(in_features, self.size2) if lift else None
        flow = ParticleFlow(width, inflation, particles, activation, weight, magnitude)
        self.body = ContinuousBlock(flow, horizon=horizon, method=method, steps=steps, gradient=gradient)
        self.head = nn.Identity() if width == out_features else nn.Linear(width, out_features)

    @property
    def flow(self) -> ParticleFlow:
        """The particles and their equations."""
        flow = self.body.trajectory
        assert isinstance(flow, ParticleFlow)
        return flow

    def energy(self) -> Tensor:
        """½|θ|², which the flow conserves: what the paper adds to the loss."""
        return self.flow.energy()

    def _pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise ShapeError(
                f"x has shape {tuple(x.shape)}, but the network reads (batch, {self.in_features})"
            )
        second = x.new_zeros(x.shape[0], self.size2) if self.lift is None else self.lift(x)
        return self.stem(x), second

    def forward(self, x: Tensor) -> Tensor:
        """Batch of inputs to batch of outputs."""
        return self.head(self.body(self._pair(x))[0])

    def weights_along(self, steps: int | None = None) -> list[Weights]:
        """The weights at the edges of the steps, from depth 0 to the last.

        Args:
            steps: number of steps; the block's own by default.
        """
        count = self.body.steps if steps is None else steps
        alone = ContinuousBlock(_Alone(self.flow), horizon=self.body.horizon, method=self.body.method)
        q, p = alone.path((self.flow.q, self.flow.p), steps=count)
        return [self.flow.weights(q[t], p[t]) for t in range(count + 1)]


class _Alone(Trajectory):
    """The particles without data."""

    def __init__(self, flow: ParticleFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, s: float, x: tuple[Tensor, Tensor], u: None = None) -> tuple[Tensor, Tensor]:
        return self.flow(s, x)
