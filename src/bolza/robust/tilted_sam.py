r"""Tilted sharpness-aware minimisation: descent of a loss that is tilted over perturbations of the weights.

    L^t(θ) = (1/t) log E_ε exp(t L(θ + ε)),      ∇L^t = Σ_j w_j ∇L(θ + ε_j),   w = softmax(t L(θ + ε_j))

t = 0 is the perturbed loss on average, t → ∞ the largest loss near θ, which sharpness-aware minimisation descends. The
perturbations are random places, each moved by a step of ascent; or a chain of Hamiltonian dynamics draws them from
the tilted law itself.

Reference: Li, Zhou & Bilmes (2025), *Tilted Sharpness-Aware Minimization*, arXiv:2410.22656.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError, UnsupportedError
from bolza.core.reference import Reference, cites
from bolza.ops.replay import frozen_statistics, same_randomness

__all__ = ["FORET", "LI_TSAM", "TiltedSAM", "tilted_quadratic"]

LI_TSAM = Reference(
    "li2025tsam",
    "Li, Tian and Zhou, Tianyi and Bilmes, Jeffrey A.",
    "Tilted Sharpness-Aware Minimization",
    2025,
    venue="International Conference on Machine Learning",
    arxiv="2410.22656",
)
FORET = Reference(
    "foret2021sam",
    "Foret, Pierre and Kleiner, Ariel and Mobahi, Hossein and Neyshabur, Behnam",
    "Sharpness-Aware Minimization for Efficiently Improving Generalization",
    2021,
    venue="International Conference on Learning Representations",
    arxiv="2010.01412",
)
SAMPLERS = ("ascent", "gaussian", "ball", "hamiltonian")


@cites(LI_TSAM)
def tilted_quadratic(eigenvalues: Tensor, theta: Tensor, t: float, rho: float) -> tuple[Tensor, Tensor]:
    r"""The tilted objective of a quadratic under Gaussian perturbations, and its gradient, in closed form.

        L^t = −(1/2t) Σ log(1 − t ρ² λ_i) + ½ Σ λ_i θ_i² / (1 − t ρ² λ_i),      ∂_i L^t = λ_i θ_i / (1 − t ρ² λ_i)

    for L = ½ Σ λ_i θ_i² and ε ~ N(0, ρ²): tilting makes sharp directions sharper, flat ones hardly. With t < 0 it is
    the local entropy, with the opposite effect.

    Args:
        eigenvalues: λ, shape ``(…, d)``.
        theta: θ in the eigenbasis, of the same shape.
        t: the tilt.
        rho: ρ, standard deviation of each entry of ε.

    Returns:
        Value, shape ``(…)``, and gradient, ``(…, d)``.

    Raises:
        ShapeError: the two have different shapes.
        ArgumentError: t ρ² λ ≥ 1, where the objective is infinite.

    Reference: Li, Zhou & Bilmes (2025), for a quadratic.

    Example:
        >>> value, slope = tilted_quadratic(torch.tensor([4.0, 1.0]), torch.tensor([0.5, -1.0]), t=1.0, rho=0.3)
        >>> slope
        tensor([ 3.1250, -1.0989])
    """
    if eigenvalues.shape != theta.shape:
        raise ShapeError(
            f"eigenvalues have shape {tuple(eigenvalues.shape)}, theta {tuple(theta.shape)}: give one for each"
        )
    left = 1 - t * rho**2 * eigenvalues
    if not bool((left > 0).all()):
        largest = float(eigenvalues.max() if t > 0 else eigenvalues.min())
        raise ArgumentError(
            f"t={t} and rho={rho} with the eigenvalue {largest:.4g} give t ρ² λ ≥ 1, where the objective is infinite: "
            "take a smaller t or rho"
        )
    if t == 0:
        spread = 0.5 * rho**2 * eigenvalues.sum(-1)
    else:
        spread = -torch.log1p(-t * rho**2 * eigenvalues).sum(-1) / (2 * t)
    slope = eigenvalues * theta / left
    return spread + 0.5 * (theta * slope).sum(-1), slope


@cites(LI_TSAM, FORET)
class TiltedSAM(torch.optim.Optimizer):
    r"""Wrap an optimizer so that it descends the loss tilted over perturbations of the weights.

        ε_j = z_j + ρ g/‖g‖,  g = ∇L(θ + z_j),  z_j uniform on the sphere of radius r;      Σ_j w_j ∇L(θ + ε_j)

    with w the softmax of t L(θ + ε_j) goes to the wrapped optimizer as its gradient. ``samples=1, radius=0`` is
    sharpness-aware minimisation. A step costs 2s passes (``"ascent"``), s (``"gaussian"``, ``"ball"``), or 1 + s k
    (``"hamiltonian"``), and memory for two copies of the weights whatever s is.

    Samplers: ``"ascent"`` is above; ``"gaussian"`` draws each entry of ε from N(0, ρ²), ``"ball"`` ε uniformly from
    the ball of radius ρ; ``"hamiltonian"`` is a chain of s trajectories of k leapfrog steps with Metropolis' rule,
    a quarter of the period of the Gaussian each, whose law is ∝ exp(t L(θ + ε)) N(ε; 0, ρ²): its gradients have equal
    weights, and their mean is the gradient of the objective, where few weighted Gaussian draws are biased.

    Random numbers of the network (dropout) are the same in all passes of a step, which advances the generator as one
    pass does. With ``model`` given, the running statistics of normalisation see the first pass of a step only.

    Args:
        base: the optimizer; learning-rate schedulers may be given either of the two.
        tilt: t, one over the unit of the loss, for the step as a whole: ``param_groups[0]["tilt"]``; inf for the
            gradient of the worst sample alone. The losses of a few samples must differ by about 1/t to matter.
        rho: length ρ of the step of ascent; in ``"gaussian"`` and ``"hamiltonian"`` the standard deviation of each
            entry, in ``"ball"`` the radius.
        radius: r; ρ by default. Only for ``"ascent"``.
        samples: number s of perturbations.
        sampler: ``"ascent"``, ``"gaussian"``, ``"ball"`` or ``"hamiltonian"``.
        leapfrog: steps k of a trajectory, only for ``"hamiltonian"``.
        model: the network, for its running statistics; with DistributedDataParallel also for losses averaged over the
            processes, which the weights need.
        seed: of the perturbations, a function of it and of the number of the step.

    Raises:
        ArgumentError: an argument makes no sense; (in ``step``) there is no closure.
        UnsupportedError: (in ``step``) a gradient is sparse.
        DivergenceError: (in ``step``) a loss is not finite; the weights are those before the step.

    Reference: Li, Zhou & Bilmes (2025), algorithms 1 and 3; Foret et al. (2021) for one sample. Departures: z is on the
    sphere, where clipped Gaussian draws in many dimensions are too; r is ρ unless given; the Hamiltonian chain with
    more than one step.

    Example:
        >>> net, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.arange(8) % 3
        >>> optimizer = TiltedSAM(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), model=net)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = nn.functional.cross_entropy(net(x), y)
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        *,
        tilt: float = 1.0,
        rho: float = 0.05,
        radius: float | None = None,
        samples: int = 3,
        sampler: str = "ascent",
        leapfrog: int = 3,
        model: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(base, torch.optim.Optimizer):
            raise ArgumentError(
                f"base is a {type(base).__name__}: give the optimizer itself, such as torch.optim.SGD(params, lr=0.1)"
            )
        radius = rho if radius is None else radius
        for name, value in (("rho", rho), ("radius", radius)):
            if not (value >= 0 and math.isfinite(value)):
                raise ArgumentError(f"{name}={value} must be finite and not negative")
        for name, count in (("samples", samples), ("leapfrog", leapfrog)):
            if int(count) != count or count < 1:
                raise ArgumentError(f"{name}={count} must be a whole number, at least 1")
        if sampler not in SAMPLERS:
            raise ArgumentError(f"sampler={sampler!r}: choose from {', '.join(SAMPLERS)}")
        if math.isnan(tilt) or (math.isinf(tilt) and sampler == "hamiltonian"):
            raise ArgumentError(f"tilt={tilt} must be a number, and a finite one for Hamiltonian dynamics")
        own = {
            "tilt": float(tilt),
            "rho": float(rho),
            "radius": float(radius),
            "samples": int(samples),
            "sampler": sampler,
            "leapfrog": int(leapfrog),
            "perturbation_seed": int(seed),
            "tilted_steps": 0,
        }
        super().__init__(base.param_groups, {**base.defaults, **own})
        self.base, self.model, self.own = base, model, own
        self.losses: tuple[float, ...] = ()
        self._share_state()

    def _share_state(self) -> None:
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def __getstate__(self) -> dict[str, Any]:
        names = ("base", "model", "own", "losses")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in names}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, to the wrapped optimizer too."""
        if "base" not in self.__dict__:  # while the groups of the wrapped optimizer are read
            return super().add_param_group(param_group)
        self.base.add_param_group(param_group)
        for name, value in self.own.items():
            self.param_groups[-1].setdefault(name, value)

    def state_dict(self) -> dict[str, Any]:
        """The state of the wrapped optimizer, with the settings and the count of steps in its groups."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state."""
        self.base.load_state_dict(state_dict)
        self._share_state()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Evaluate the loss around θ, and make one step of the wrapped optimizer.

        Args:
            closure: computes the loss and its gradients on one batch, the same at each call, and returns the loss.

        Returns:
            What the first call of the closure returns. The losses of the perturbed weights are in ``losses``.
        """
        if closure is None:
            raise ArgumentError(
                "closure is missing: the loss is evaluated several times a step, so call step(closure) with a function "
                "that zeroes the gradients, computes the loss of the batch, calls backward() and returns the loss"
            )
        run = _Run(self, closure)
        with run.away_and_back():
            sums = _TiltedSum(0.0 if run.sampler == "hamiltonian" else run.tilt)
            for loss in run.hamiltonian() if run.sampler == "hamiltonian" else run.weighted():
                sums.add(loss, run.grads)
        for p, grad in zip(run.params, sums.mean(), strict=True):
            p.grad = grad
        self.losses = tuple(sums.losses)
        self.base.step()
        self.param_groups[0]["tilted_steps"] += 1
        return run.returned


class _TiltedSum:
    """Σ_j softmax(t L_j) g_j, one term at a time: holds one sum, whatever the number of terms."""

    def __init__(self, tilt: float) -> None:
        self.hard = math.isinf(tilt)
        self.tilt = math.copysign(1.0, tilt) if self.hard else tilt
        self.best, self.total = -math.inf, 0.0
        self.losses: list[float] = []
        self.sums: list[Tensor | None] = []

    def add(self, loss: float, grads: Sequence[Tensor | None]) -> None:
        score = self.tilt * loss
        self.losses.append(loss)
        if not self.sums:
            self.sums = [None] * len(grads)
        if score > self.best:
            shrink = 0.0 if self.hard or not self.total else math.exp(self.best - score)
            self.total *= shrink
            for held in self.sums:
                if held is not None:
                    held.mul_(shrink)
            self.best = score
        weight = float(score == self.best) if self.hard else math.exp(score - self.best)
        self.total += weight
        for i, grad in enumerate(grads):
            if grad is not None:
                held = self.sums[i]
                self.sums[i] = grad * weight if held is None else held.add_(grad, alpha=weight)

    def mean(self) -> list[Tensor | None]:
        return [None if held is None else held.div_(self.total) for held in self.sums]


class _Run:
    """One step: the passes of the closure at perturbed weights."""

    def __init__(self, optimizer: TiltedSAM, closure: Callable[[], Any]) -> None:
        first = optimizer.param_groups[0]
        self.tilt, self.rho, self.radius = float(first["tilt"]), float(first["rho"]), float(first["radius"])
        self.samples, self.leapfrog = int(first["samples"]), int(first["leapfrog"])
        self.sampler, self.seed, self.steps = (
            first["sampler"],
            first["perturbation_seed"],
            first["tilted_steps"],
        )
        self.optimizer, self.closure, self.model = optimizer, closure, optimizer.model
        self.params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if not self.params:
            raise ArgumentError("no parameter of base requires a gradient: unfreeze one")
        self.home = [p.detach().clone() for p in self.params]
        self.passes = 0
        self.returned: Any = None
        self.cpu_state = torch.get_rng_state()
        device = self.params[0].device
        self.device = device if device.type == "cuda" else None
        self.cuda_state = torch.cuda.get_rng_state(device) if self.device is not None else None

    @property
    def grads(self) -> list[Tensor | None]:
        return [p.grad for p in self.params]

    @contextmanager
    def away_and_back(self) -> Iterator[None]:
        try:
            yield
        finally:
            for p, home in zip(self.params, self.home, strict=True):
                p.copy_(home)

    def move(self, eps: Sequence[Tensor]) -> None:
        for p, home, e in zip(self.params, self.home, eps, strict=True):
            p.copy_(home).add_(e)

    def evaluate(self) -> float:
        """Loss and gradients where the weights are."""
        self.optimizer.zero_grad()
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            if self.passes:
                stack.enter_context(same_randomness(self.cpu_state))
                if self.cuda_state is not None:
                    stack.enter_context(same_randomness(self.cuda_state, self.device))
                if self.model is not None:
                    stack.enter_context(frozen_statistics(self.model))
            returned = self.closure()
        if self.passes == 0:
            self.returned = returned
        self.passes += 1
        if returned is None:
            raise ArgumentError(
                "closure returned nothing: it must return the loss, which weighs the gradients"
            )
        if any(grad is not None and grad.is_sparse for grad in self.grads):
            raise UnsupportedError(
                "a gradient is sparse, but every weight is perturbed: make the embedding with sparse=False"
            )
        loss = self._averaged(returned)
        if not math.isfinite(loss):
            raise DivergenceError(
                f"the loss at perturbed weights is {loss}: lower rho={self.rho:g} or the learning rate",
                step=self.steps,
            )
        return loss

    def _averaged(self, loss: Any) -> float:
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            total = torch.as_tensor(loss).detach().clone().to(self.params[0].device)
            torch.distributed.all_reduce(total, group=self.model.process_group)
            return float(total) / torch.distributed.get_world_size(self.model.process_group)
        return float(loss.detach() if isinstance(loss, Tensor) else loss)

    def normal(self, number: int) -> list[Tensor]:
        """Standard normal numbers of the shapes of the weights, the same in every process and after a restart."""
        drawn = []
        for index, p in enumerate(self.params):
            mixed = self.seed * 0x9E3779B97F4A7C15 + self.steps * 0xC2B2AE3D27D4EB4F
            mixed = (mixed + number * 0x165667B19E3779F9 + index * 0x27D4EB2F165667C5) % (2**63 - 1)
            generator = torch.Generator(p.device).manual_seed(mixed)
            drawn.append(torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device))
        return drawn

    def weighted(self) -> Iterator[float]:
        """Losses of independent perturbations; the gradients are in ``.grad``."""
        for j in range(self.samples):
            if self.sampler == "gaussian":
                eps = [self.rho * z for z in self.normal(j)]
            else:
                eps = self.normal(j)
                length = self.rho if self.sampler == "ball" else self.radius
                if self.sampler == "ball":
                    generator = torch.Generator().manual_seed((self.seed << 40) + (self.steps << 12) + j)
                    size = sum(p.numel() for p in self.params)
                    length *= float(torch.rand((), generator=generator, dtype=torch.float64)) ** (1 / size)
                eps = _of_length(eps, length)
            if self.sampler == "ascent":
                self.move(eps)
                self.evaluate()
                found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
                eps = [z + up for z, up in zip(eps, _of_length(found, self.rho), strict=True)]
            self.move(eps)
            yield self.evaluate()

    def hamiltonian(self) -> Iterator[float]:
        """Losses along a chain with the law exp(t L(θ + ρ q) − ½ |q|²); the gradients are in ``.grad``."""
        h = 0.5 * math.pi / self.leapfrog
        q = self.normal(0)
        loss, force = self._force(q)
        held = [None if g is None else g.clone() for g in self.grads]
        draw = torch.Generator().manual_seed((self.seed << 40) + (self.steps << 12))
        for j in range(self.samples):
            v = self.normal(j + 1)
            energy = -self.tilt * loss + 0.5 * (_square(q) + _square(v))
            place, push, level = [a.clone() for a in q], force, loss
            for _ in range(self.leapfrog):
                v = [b + 0.5 * h * f for b, f in zip(v, push, strict=True)]
                place = [a + h * b for a, b in zip(place, v, strict=True)]
                level, push = self._force(place)
                v = [b + 0.5 * h * f for b, f in zip(v, push, strict=True)]
            change = energy - (-self.tilt * level + 0.5 * (_square(place) + _square(v)))
            if math.log(1 - float(torch.rand((), generator=draw, dtype=torch.float64))) < change:
                q, loss, force = place, level, push
                held = [None if g is None else g.clone() for g in self.grads]
            else:
                for p, g in zip(self.params, held, strict=True):
                    p.grad = None if g is None else g.clone()
            yield loss

    def _force(self, q: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        self.move([self.rho * a for a in q])
        loss = self.evaluate()
        scale = self.tilt * self.rho
        return loss, [
            -a if p.grad is None else scale * p.grad - a for a, p in zip(q, self.params, strict=True)
        ]


def _square(parts: Sequence[Tensor]) -> float:
    return math.fsum(float(a.detach().float().square().sum()) for a in parts)


def _of_length(parts: Sequence[Tensor], length: float) -> list[Tensor]:
    squares = [(a.float() if a.dtype.itemsize < 4 else a).square().sum().to(parts[0].device) for a in parts]
    scale = length / (torch.stack(squares).sum().sqrt() + 1e-12)
    return [a * scale.to(a.device, a.dtype) for a in parts]
