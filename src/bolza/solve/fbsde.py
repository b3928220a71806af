r"""Semilinear parabolic equations in many dimensions, by a network along forward–backward stochastic paths.

    dX = μ dt + σ dW,   X_0 = ξ            u_t + μᵀ∇u + ½ Tr(σσᵀ∇²u) = φ(t, x, u, ∇u)
    dY = φ dt + Zᵀσ dW,   Y_T = g(X_T)     Y = u(t, X),   Z = ∇u(t, X)

One network stands for u at all times, its gradient for Z, and it is trained so that the Euler step of Y from every
point of a path hits the network's value at the next:

    loss = E[Σ_n (Y_{n+1} − Y_n − φ_n Δt − Z_nᵀσ_n ΔW_n)² + (Y_N − g)² + |Z_N − ∇g|²]

References: Raissi (2018), arXiv:1804.07010; Güler, Laignelet & Parpas (2019), arXiv:1910.11623.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError
from bolza.core.reference import Reference, cites

__all__ = ["FBSDE", "FBSDESolution", "cole_hopf_value", "solve_fbsde"]

GULER = Reference(
    "guler2019fbsde",
    "Güler, Batuhan and Laignelet, Alexis and Parpas, Panos",
    "Towards Robust and Stable Deep Learning Algorithms for Forward Backward Stochastic Differential Equations",
    2019,
    arxiv="1910.11623",
)
RAISSI = Reference(
    "raissi2018fbsde",
    "Raissi, Maziar",
    "Forward-Backward Stochastic Neural Networks: Deep Learning of High-dimensional Partial Differential Equations",
    2018,
    arxiv="1804.07010",
)


def _no_drift(t: Tensor, x: Tensor, y: Tensor | None, z: Tensor | None) -> Tensor:
    return torch.zeros_like(x)


@dataclass(frozen=True)
class FBSDE:
    r"""The equations dX = μ dt + σ dW, dY = φ dt + Zᵀσ dW with X_0 = ξ and Y_T = g(X_T).

    All functions take points with leading dimensions: t and y of shape ``(*batch, 1)``, x, z and w of shape
    ``(*batch, d)``.

    Args:
        x0: ξ, shape ``(d,)``.
        time: T.
        terminal: g, x → ``(*batch, 1)``.
        driver: φ, (t, x, y, z) → ``(*batch, 1)``.
        diffusion: (t, x, y, w) → σ w, ``(*batch, d)``; the matrix σ is never formed.
        drift: μ, (t, x, y, z) → ``(*batch, d)``; zero by default.
        coupled: whether drift or diffusion use y or z. If not, these are ``None`` when they are called, and all
            points of all paths go through the network at once.

    Example:
        >>> heat = FBSDE(torch.zeros(2), 1.0, lambda x: x.square().sum(-1, keepdim=True),
        ...              driver=lambda t, x, y, z: torch.zeros_like(y), diffusion=lambda t, x, y, w: w)
        >>> heat.terminal(torch.ones(1, 2))
        tensor([[2.]])
    """

    x0: Tensor
    time: float
    terminal: Callable[[Tensor], Tensor]
    driver: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    diffusion: Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]
    drift: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor] = _no_drift
    coupled: bool = False

    def __post_init__(self) -> None:
        """Check the shapes.

        Raises:
            ArgumentError: the time is not positive.
            ShapeError: x0 is no vector.
        """
        if not (self.time > 0 and math.isfinite(self.time)):
            raise ArgumentError(f"time is {self.time}: it must be positive and finite")
        if self.x0.ndim != 1 or not self.x0.is_floating_point():
            raise ShapeError(
                f"x0 has shape {tuple(self.x0.shape)} and dtype {self.x0.dtype}: give one vector of floats"
            )


class _Solution(nn.Module):
    """u(t, x) from a network of standardised inputs and output."""

    def __init__(self, network: nn.Module, problem: FBSDE, scales: tuple[Tensor, ...], hard: bool) -> None:
        super().__init__()
        self.network, self.problem, self.hard = network, problem, hard
        self.scales = scales

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        centre, spread, offset, size = self.scales
        remaining = 1 - t / self.problem.time
        out = self.network(torch.cat([remaining.expand(*x.shape[:-1], 1), (x - centre) / spread], -1))
        if out.shape != (*x.shape[:-1], 1):
            raise ShapeError(
                f"the network returned shape {tuple(out.shape)} for {tuple(x.shape[:-1])} points: it must map "
                f"{x.shape[-1] + 1} features (time left, x) to one"
            )
        if not self.hard:
            return offset + size * out
        lift = offset - self.problem.terminal(self.problem.x0)  # so that u(0, ξ) starts at E g(X_T) here too
        return self.problem.terminal(x) + remaining * (lift + size * out)


@dataclass(frozen=True)
class FBSDESolution:
    """What training found.

    Attributes:
        value: u(0, ξ).
        losses: loss of every iteration, in units of the variance of g(X_T); shape ``(iterations,)``.
        values: u(0, ξ) at every iteration, shape ``(iterations,)``.
        module: (t, x) → u, an ``nn.Module`` around the trained network.
    """

    value: float
    losses: Tensor
    values: Tensor
    module: nn.Module

    def u(self, t: float | Tensor, x: Tensor) -> Tensor:
        """Value of the solution, shape ``(*batch, 1)``, for t a number or ``(*batch, 1)`` and x ``(*batch, d)``."""
        with torch.no_grad():
            return self.module(torch.as_tensor(t, dtype=x.dtype, device=x.device), x)

    def gradient(self, t: float | Tensor, x: Tensor) -> Tensor:
        """Gradient ∇u(t, x), shape ``(*batch, d)``: by it the optimal feedback of a control problem is known."""
        at = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        return _value_and_gradient(self.module, at, x, False)[1]


def _value_and_gradient(
    u: Callable[[Tensor, Tensor], Tensor], t: Tensor, x: Tensor, create_graph: bool
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        y = u(t, x)
        (z,) = torch.autograd.grad(y.sum(), x, create_graph=create_graph, materialize_grads=True)
    return y, z


def _times(problem: FBSDE, steps: int) -> Tensor:
    x0 = problem.x0
    return torch.linspace(0, problem.time, steps + 1, dtype=x0.dtype, device=x0.device)[:, None, None]


def _noise(problem: FBSDE, steps: int, paths: int, generator: torch.Generator) -> Tensor:
    x0 = problem.x0
    shape = (steps, paths, x0.shape[0])
    draws = torch.randn(shape, generator=generator, dtype=x0.dtype, device=x0.device)
    return draws * (problem.time / steps) ** 0.5


@torch.no_grad()
def _free_paths(problem: FBSDE, dW: Tensor) -> tuple[Tensor, Tensor]:
    """Points (steps + 1, paths, d) of paths that do not depend on u, and the noise part σ dW of each step."""
    t, dt = _times(problem, len(dW)), problem.time / len(dW)
    x = problem.x0.expand(dW.shape[1], -1)
    points, kicks = [x], []
    for n, w in enumerate(dW):
        now = t[n].expand(dW.shape[1], 1)
        kick = problem.diffusion(now, x, None, w)
        x = x + problem.drift(now, x, None, None) * dt + kick
        points.append(x)
        kicks.append(kick)
    return torch.stack(points), torch.stack(kicks)


def _path_loss(problem: FBSDE, u: Callable[[Tensor, Tensor], Tensor], dW: Tensor) -> tuple[Tensor, Tensor]:
    """(Loss, u(0, ξ)): squared misses of the Euler steps of Y, and of value and gradient at the end."""
    steps, paths = dW.shape[:2]
    t, dt = _times(problem, steps).expand(steps + 1, paths, 1), problem.time / steps
    if problem.coupled:
        x = problem.x0.expand(paths, -1)
        y, z = _value_and_gradient(u, t[0], x, True)
        first, misses = y[0, 0], torch.zeros((), dtype=x.dtype, device=x.device)
        for n in range(steps):
            kick = problem.diffusion(t[n], x, y, dW[n])
            reached = y + problem.driver(t[n], x, y, z) * dt + (z * kick).sum(-1, keepdim=True)
            x = x + problem.drift(t[n], x, y, z) * dt + kick
            y, z = _value_and_gradient(u, t[n + 1], x, True)
            misses = misses + (y - reached).square().mean()
    else:
        points, kicks = _free_paths(problem, dW)
        ys, zs = _value_and_gradient(u, t, points, True)
        head = t[:-1], points[:-1], ys[:-1], zs[:-1]
        reached = ys[:-1] + problem.driver(*head) * dt + (zs[:-1] * kicks).sum(-1, keepdim=True)
        misses = (ys[1:] - reached).square().mean(1).sum()
        first, x, y, z = ys[0, 0, 0], points[-1], ys[-1], zs[-1]
    g, slope = _value_and_gradient(lambda _, at: problem.terminal(at), t[-1], x, True)
    return misses + (y - g).square().mean() + (z - slope).square().sum(-1).mean(), first


def _scales(problem: FBSDE, steps: int, generator: torch.Generator, standardize: bool) -> tuple[Tensor, ...]:
    """(centre, spread) of x and (offset, size) of u, from paths of the reference process."""
    x0 = problem.x0
    if not standardize:
        zero, one = torch.zeros_like(x0[:1]), torch.ones_like(x0[:1])
        return zero, one, zero, one
    if problem.coupled:  # its law depends on the unknown u: take the noise at rest for its size
        kick = problem.diffusion(
            x0.new_zeros(256, 1),
            x0.expand(256, -1),
            problem.terminal(x0.expand(256, -1)),
            _noise(problem, 1, 256, generator)[0],
        )
        end = x0 + kick
    else:
        end = _free_paths(problem, _noise(problem, steps, 256, generator))[0][-1]
    floor = torch.finfo(x0.dtype).tiny ** 0.5
    centre, spread = end.mean(0), end.std(0)
    g = problem.terminal(end)
    ones = torch.ones_like
    return (
        centre,
        torch.where(spread > floor, spread, ones(spread)),
        g.mean(0),
        torch.where(g.std(0) > floor, g.std(0), ones(g.std(0))),
    )


@cites(GULER, RAISSI)
def solve_fbsde(
    problem: FBSDE,
    network: nn.Module,
    *,
    steps: int = 50,
    paths: int = 100,
    iterations: int = 1000,
    lr: float = 1e-3,
    decay: tuple[float, ...] = (0.6, 0.85),
    standardize: bool = True,
    hard_terminal: bool = False,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
) -> FBSDESolution:
    r"""Solve a semilinear parabolic equation in many dimensions with a network trained along random paths.

    Minimises E[Σ_n (Y_{n+1} − Y_n − φ_n Δt − Z_nᵀσ_n ΔW_n)² + (Y_N − g)² + |Z_N − ∇g|²] by Adam, with fresh paths
    at every iteration. Nothing is learnt away from where the paths go.

    Args:
        problem: the equations; its ``x0`` sets dtype and device.
        network: maps ``(*batch, d + 1)`` features (share of the time left, x) to ``(*batch, 1)``; smooth
            activations (sine, tanh) serve, as the loss holds its gradient. Trained in place.
        steps: N, Euler steps; the value has an error of order 1/N from them.
        paths: M, paths an iteration.
        iterations: of Adam.
        lr: its learning rate.
        decay: shares of the iterations after which the rate falls to a fifth.
        standardize: feed the network (x − mean)/deviation of X_T, and scale its output to the mean and deviation of
            g(X_T) over 256 paths. Nets of unit scale then fit whatever the units of the problem.
        hard_terminal: write u = g(x) + (1 − t/T)(E g(X_T) − g(ξ) + network), which meets the last condition by itself:
            far quicker where g has the shape of the solution, slower where g is sharper than it.
        seed: of the paths; the network's own initialisation is the caller's.
        progress: called with the share done and a few words.

    Returns:
        FBSDESolution.

    Raises:
        ArgumentError: a size is not positive.
        DivergenceError: the loss is not finite.
        ShapeError: the network's output has not one entry a point.

    Reference: Güler, Laignelet & Parpas (2019), arXiv:1910.11623, §2, after Raissi (2018). Departures: inputs and
    output are standardised, the loss is a mean over paths in units of the variance of g(X_T), and the rate decays.

    Example:
        >>> heat = FBSDE(torch.zeros(2), 1.0, lambda x: x.square().sum(-1, keepdim=True),
        ...              driver=lambda t, x, y, z: torch.zeros_like(y), diffusion=lambda t, x, y, w: w)
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))
        >>> found = solve_fbsde(heat, net, steps=4, paths=32, iterations=30, lr=0.02, hard_terminal=True)
        >>> abs(found.value - 2.0) < 0.3               # u(0, 0) = E|W_1|² = 2
        True
    """
    if min(steps, paths, iterations) < 1 or not lr > 0:
        raise ArgumentError(
            f"steps={steps}, paths={paths}, iterations={iterations} and lr={lr} must all be positive"
        )
    report = progress or (lambda share, text: None)
    generator = torch.Generator(problem.x0.device).manual_seed(seed)
    u = _Solution(network, problem, _scales(problem, steps, generator, standardize), hard_terminal)
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, sorted({max(1, int(share * iterations)) for share in decay}), gamma=0.2
    )
    unit = float(u.scales[3]) ** 2
    losses, values = [], []
    for k in range(iterations):
        loss, value = _path_loss(problem, u, _noise(problem, steps, paths, generator))
        grads = torch.autograd.grad(loss / unit, parameters, allow_unused=True)
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad
        optimizer.step()
        schedule.step()
        losses.append(loss.detach() / unit)
        values.append(value.detach())
        if (k + 1) % 50 == 0 or k + 1 == iterations:
            if not math.isfinite(float(losses[-1])):
                raise DivergenceError(
                    f"the loss is not finite by iteration {k + 1}: take a smaller lr than {lr}, or more steps",
                    step=k + 1,
                )
            report((k + 1) / iterations, f"u(0, ξ) = {float(values[-1]):.4f}")
    for p in parameters:
        p.grad = None
    with torch.no_grad():
        final = u(problem.x0.new_zeros(1), problem.x0)
    return FBSDESolution(float(final), torch.stack(losses), torch.stack(values), u)


def cole_hopf_value(
    terminal: Callable[[Tensor], Tensor],
    x: Tensor,
    time: float,
    *,
    samples: int = 100_000,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Exact value of u_t + Δu = |∇u|² with its standard error: −log E[exp(−g(x + √(2T) ξ))].

    The transform v = e^{−u} makes the equation the heat equation v_t + Δv = 0, so that a mean over normal draws solves
    it in any dimension. It is the value of steering dX = 2a dt + √2 dW at the cost |a|² dt.

    Args:
        terminal: g, ``(samples, d)`` → ``(samples, 1)``.
        x: point, shape ``(d,)``.
        time: T − t, time that is left.
        samples: draws.
        generator: source of randomness on the device of x.

    Returns:
        (value, standard error), scalars.

    Raises:
        ArgumentError: ``time`` is negative or there are fewer than two samples.

    Example:
        >>> flat = cole_hopf_value(lambda x: torch.ones(len(x), 1), torch.zeros(3), 1.0, samples=10)
        >>> round(float(flat[0]), 6), round(float(flat[1]), 6)
        (1.0, 0.0)
    """
    if time < 0 or samples < 2:
        raise ArgumentError(f"time is {time} and samples is {samples}: they must be ≥ 0 and ≥ 2")
    noise = torch.randn(samples, *x.shape, dtype=x.dtype, device=x.device, generator=generator)
    g = terminal(x + (2 * time) ** 0.5 * noise).squeeze(-1)
    shift = g.min()
    weights = torch.exp(shift - g)
    mean = weights.mean()
    return shift - mean.log(), weights.std() / samples**0.5 / mean
