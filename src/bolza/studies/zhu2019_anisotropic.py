r"""Noise of equal strength and different shape: which one leaves a sharp minimum?

    θ ← θ − η(∇f + ξ),   tr Cov ξ the same;    E f(θ_t) − f(0) ≈ ½ ηt tr(HC) at first

A plane with a sharp, oblong basin at (1, 1) and a broad, round one at (−1, −1): descent starts in the sharp one, with
isotropic noise, the diagonal of the gradient covariance, the covariance itself, the Hessian, or its top direction. Then
the same shapes in a network on digits, trained to a minimum.

Reference: Zhu, Wu, Yu, Wu & Ma (2019), arXiv:1803.00195.

Departures: 500 digits and a small MLP in place of Fashion-MNIST and CIFAR-10; hundreds of runs in the plane at once.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bolza.core import Diffusion, simulate
from bolza.ops.curvature import hessian_operator
from bolza.ops.krylov import top_eigenpairs, trace
from bolza.report import Figure, role
from bolza.sde import equal_trace_covariance, equal_trace_noise, expected_rise, gradient_noise
from bolza.sde.anisotropic import ZHU as REFERENCE
from bolza.sde.anisotropic import NoiseShape
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "zhu2019_anisotropic"
TITLE = "Anisotropic noise escapes from sharp minima"
CLAIM = "Noise along the steep directions, like that of SGD, leaves sharp minima where isotropic noise stays"

F = torch.float64
SHAPES: tuple[NoiseShape, ...] = ("isotropic", "diagonal", "covariance", "hessian", "top")
SHIFTS = 100  # samples, each a shifted copy of the landscape
RATE, STEPS, VARIANCE = 0.005, 500, 0.01  # of the plane; VARIANCE = η² tr C, that of a displacement
QUARTER = math.cos(math.pi / 4)
RISE_RATE = 0.05


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    runs: int
    paths: int
    network_steps: int
    repeats: int


BUDGETS = {
    "small": Budget(runs=200, paths=20_000, network_steps=500, repeats=6),
    "full": Budget(runs=2000, paths=400_000, network_steps=6000, repeats=24),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Count escapes in the plane, check the rise of the loss, and look at a network.

    Args:
        scale: ``"small"``: some ten seconds on one core; ``"full"``: ten times as many runs.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("zhu2019_anisotropic").reference.year
        2019
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "two basins")
    paths = escapes(budget.runs, seed=0)
    rows = escape_rows(paths)
    report(0.5, "the rise of the loss")
    times, measured = rise(budget.paths)
    rows += rise_rows(times, measured, budget.paths)
    report(0.7, "a network")
    network = network_rise(budget)
    rows += network_rows(network)
    notes = (
        f"Plane: {SHIFTS} samples shift the landscape, η = {RATE}, {STEPS} steps from (1, 1); the noise moves a "
        f"step by {VARIANCE**0.5:g} whatever its shape; out is where both coordinates are below −0.5 at the end. "
        "Covariance and Hessian are those of the present place.",
        "Expected shares of escape are those of one hundred earlier runs of ours, not of the paper, which draws paths.",
        "Network: MLP 64-16-10 with tanh on 500 digits; the Hessian's shape is made of its 20 top directions.",
    )
    facts = {
        "escaped": {name: float(out(path)[-1].double().mean()) for name, path in paths.items()},
        "rise": {"time": times.tolist(), "measured": measured[0].tolist()},
        "network": {key: value for key, value in network.items()},
    }
    report(1.0, "done")
    return StudyResult(
        KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(paths, times, measured),), notes, facts
    )


# ----------------------------------------------------------------------------------------- the plane


def shifts(runs: int, generator: torch.Generator) -> Tensor:
    """Where each sample moves the landscape to, ``(runs, samples, 2)``: an oblong cloud along the diagonal."""
    cloud = torch.randn(runs, SHIFTS, 2, dtype=F, generator=generator) * torch.tensor([10**0.5, 1.0], dtype=F)
    return 0.01 * cloud @ torch.tensor([[QUARTER, -QUARTER], [QUARTER, QUARTER]], dtype=F)


def slopes(place: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of every sample's loss, ``(runs, samples, 2)``, and the share of samples that see the sharp basin.

    The loss is the lower of 10 a² + 100 b² around (1, 1), a and b along the diagonals, and a circle around (−1, −1).
    """
    at = place[:, None] - moved
    sharp, broad = at - 1, at + 1
    a = QUARTER * (sharp[..., 0] - sharp[..., 1])
    b = QUARTER * (sharp[..., 0] + sharp[..., 1])
    inside = 10 * a.square() + 100 * b.square() < broad.square().sum(-1)
    steep = 2 * QUARTER * torch.stack([10 * a + 100 * b, -10 * a + 100 * b], -1)
    return torch.where(inside[..., None], steep, 2 * broad), inside.double().mean(1)


def hessians(share: Tensor) -> Tensor:
    """Mean Hessian where a share of the samples sees the sharp basin, ``(runs, 2, 2)``."""
    axes = QUARTER * torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=F)
    steep = axes @ torch.diag(torch.tensor([20.0, 200.0], dtype=F)) @ axes.T
    return share[:, None, None] * steep + (1 - share)[:, None, None] * 2 * torch.eye(2, dtype=F)


def shaped(shape: Any, centred: Tensor, share: Tensor, table: dict[str, Tensor]) -> Tensor:
    """Covariance of trace one and the given shape at every place, ``(runs, 2, 2)``."""
    if shape in table:
        return table[shape][(SHIFTS * share).round().long()]
    sigma = centred.mT @ centred
    return equal_trace_covariance(shape, sigma / sigma.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None])


def hessian_shapes() -> dict[str, Tensor]:
    """The shapes made of the Hessian, for every number of samples that may see the sharp basin."""
    h = hessians(torch.arange(SHIFTS + 1, dtype=F) / SHIFTS)
    half = torch.eye(2, dtype=F).expand_as(h) / 2
    return {
        "none": torch.zeros_like(h),
        "hessian": equal_trace_covariance("hessian", half, h),
        "top": equal_trace_covariance("top", half, h),
    }


def root(matrix: Tensor) -> Tensor:
    """Square root of positive 2 × 2 matrices: (M + √det) / √(trace + 2 √det)."""
    size = torch.linalg.det(matrix).clamp_min(0).sqrt()[:, None, None]
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    return (matrix + size * torch.eye(2, dtype=F)) / (trace + 2 * size).sqrt().clamp_min(1e-300)


def escapes(
    runs: int, seed: int, steps: int = STEPS, names: tuple[str, ...] = ("none", *SHAPES)
) -> dict[str, Tensor]:
    """Positions of all runs at every step, ``(steps + 1, runs, 2)`` for each shape; ``"none"`` is gradient descent.

    All shapes share the landscapes and the random numbers, and move side by side.
    """
    generator = torch.Generator().manual_seed(seed)
    landscapes = shifts(runs, generator)
    moved = landscapes.repeat(len(names), 1, 1)
    place = torch.ones(len(names) * runs, 2, dtype=F)
    seen, table = [place], hessian_shapes()
    for _ in range(steps):
        gradients, share = slopes(place, moved)
        mean = gradients.mean(1)
        drawn = torch.randn(runs, 2, 1, dtype=F, generator=generator)
        parts = zip(names, (gradients - mean[:, None]).split(runs), share.split(runs), strict=True)
        covariance = [shaped(name, centred, part, table) for name, centred, part in parts]
        noise = root(torch.cat(covariance)) @ drawn.repeat(len(names), 1, 1)
        place = place - RATE * mean + VARIANCE**0.5 * noise[..., 0]
        seen.append(place)
    return dict(zip(names, torch.stack(seen).split(runs, 1), strict=True))


def out(path: Tensor) -> Tensor:
    """Which runs are in the broad basin, at every step: ``(steps + 1, runs)``."""
    return (path < -0.5).all(-1)


EARLIER = {"none": 0.0, "isotropic": 0.05, "diagonal": 0.05, "covariance": 0.35, "top": 0.44}
NAMES = {
    "none": "gradient descent",
    "isotropic": "isotropic noise",
    "diagonal": "diagonal noise",
    "covariance": "noise of the gradient's covariance",
    "hessian": "noise of the Hessian's shape",
    "top": "noise along the top direction",
}


def escape_rows(paths: dict[str, Tensor]) -> list[Row]:
    """Share of escapes of each shape, and the comparison that the paper makes."""
    rows, shares = [], {}
    for name, path in paths.items():
        ended = out(path)[-1].double()
        share = float(ended.mean())
        error = math.sqrt(max(share * (1 - share), 0.25 / len(ended)) / len(ended))
        shares[name] = (share, error)
        if name in EARLIER:
            spread = math.hypot(error, math.sqrt(max(EARLIER[name] * (1 - EARLIER[name]), 0.01) / 100))
            rows.append(
                Row(
                    f"{NAMES[name]}: share of runs that escape",
                    EARLIER[name],
                    share,
                    error,
                    abs(share - EARLIER[name]) <= 3 * spread,
                    "within three errors of both",
                )
            )
    for name in ("covariance", "hessian", "top"):
        gain = shares[name][0] - shares["isotropic"][0]
        error = math.hypot(shares[name][1], shares["isotropic"][1])
        rows.append(
            Row(
                f"{NAMES[name]} against isotropic: gain in the share",
                "> 0.2",
                gain,
                error,
                gain > 0.2,
                "at least 20 points",
            )
        )
    return rows


# ----------------------------------------------------------------------------- the rise of the loss


def rise(paths: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Mean loss on a quadratic along simulated paths from its minimum, with standard errors."""
    h, sigma = (torch.tensor(values, dtype=F) for values in ((2.0, 0.5), (1.0, 0.2)))
    equation = Diffusion(
        drift=lambda t, x: -h * x, factor=lambda t, x, noise: (RISE_RATE * sigma).sqrt() * noise
    )
    dt = 0.005
    seen = simulate(
        equation,
        torch.zeros(paths, 2, dtype=F),
        dt=dt,
        steps=400,
        save_every=20,
        generator=torch.Generator().manual_seed(0),
    )
    loss = (h * seen.square()).sum(-1) / 2
    return dt * 20 * torch.arange(21, dtype=F), (loss.mean(1), loss.std(1) / paths**0.5)


def rise_rows(times: Tensor, measured: tuple[Tensor, Tensor], paths: int) -> list[Row]:
    """The closed form beside the simulation, and its digits."""
    h, sigma = torch.diag(torch.tensor([2.0, 0.5], dtype=F)), torch.diag(torch.tensor([1.0, 0.2], dtype=F))
    known = {0.1: 0.00435891, 1.0: 0.0138514, 10.0: 0.0149999}
    found = {t: float(expected_rise(h, sigma, lr=RISE_RATE, time=t)) for t in known}
    worst = max(abs(found[t] / known[t] - 1) for t in known)
    at = int((times - 1.0).abs().argmin())
    mean, error = float(measured[0][at]), float(measured[1][at])
    exact = found[1.0]
    return [
        Row(
            "rise of the loss at t = 0.1, 1, 10 in closed form",
            0.0,
            worst,
            1e-5,
            worst < 1e-5,
            "largest error",
        ),
        Row(
            "rise at t = 1, simulated",
            exact,
            mean,
            error,
            abs(mean - exact) <= 3 * error + 0.01 * exact,
            f"{paths} paths; within three errors and the 1 % that the time step makes",
        ),
    ]


# ------------------------------------------------------------------------------------- the network


def digits_at_a_minimum(steps: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """An MLP on 500 digits, trained by full-batch descent with momentum."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels[:500] / 16, dtype=F)
    y = torch.tensor(labels[:500], dtype=torch.long)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net, (x, y)


def network_rise(budget: Budget, lr: float = 0.02, steps: int = 5) -> dict[str, Any]:
    """Rise of a network's loss in a few noisy steps, by shape, beside ½ η² k tr(HC)."""
    net, (x, y) = digits_at_a_minimum(budget.network_steps)
    loss = nn.functional.cross_entropy
    noise = gradient_noise(net, loss, (x, y))
    operator = hessian_operator(net, loss, (x, y))
    generator = torch.Generator().manual_seed(0)
    eigen = top_eigenpairs(operator, 20, tol=1e-3, which="largest algebraic", generator=generator)
    total, size = noise.trace().value, noise.size
    aligned = noise.trace_with(operator, 60, generator)
    round_ = trace(operator, 60, generator=generator).value * total / size
    found: dict[str, Any] = {"alignment": aligned.value / round_, "alignment_error": aligned.error / round_}
    boost = 0.02 * found_scale(float(loss(net(x), y).detach()), lr, steps, aligned.value)
    quiet = noisy_steps(net, (x, y), lr, noise.mean.new_zeros(noise.size, steps))
    for shape in SHAPES:
        rises = []
        for _ in range(budget.repeats):
            drawn = boost**0.5 * equal_trace_noise(
                noise, shape, hessian=eigen, count=steps, generator=generator
            )
            # both signs of a draw: what is odd in the noise cancels
            both = noisy_steps(net, (x, y), lr, drawn) + noisy_steps(net, (x, y), lr, -drawn)
            rises.append(both / 2 - quiet)
        found[shape] = mean_error(rises)
    return found


def found_scale(loss: float, lr: float, steps: int, aligned: float) -> float:
    """Factor on the noise with which SGD's shape would raise the loss by itself: the same for every shape."""
    return loss / (lr**2 * steps / 2 * aligned)


def noisy_steps(net: nn.Module, data: tuple[Tensor, Tensor], lr: float, drawn: Tensor) -> float:
    """Loss after descent with the given noise added to the gradient, one column a step."""
    moved = copy.deepcopy(net)
    params = list(moved.parameters())
    for column in drawn.unbind(1):
        value = nn.functional.cross_entropy(moved(data[0]), data[1])
        gradients = torch.autograd.grad(value, params)
        at = 0
        with torch.no_grad():
            for p, g in zip(params, gradients, strict=True):
                p.sub_(lr * (g + column[at : at + p.numel()].reshape(p.shape)))
                at += p.numel()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(moved(data[0]), data[1]))


def network_rows(found: dict[str, Any]) -> list[Row]:
    """Alignment of noise and curvature, and what it does."""
    rows = [
        Row(
            "a network on digits: tr(HΣ) over that of isotropic noise of the same trace",
            "≫ 1",
            found["alignment"],
            found["alignment_error"],
            found["alignment"] > 10,
            "more than 10",
        )
    ]
    iso, iso_error = found["isotropic"]
    for shape in ("covariance", "top"):
        mean, error = found[shape]
        margin = mean - 2 * math.hypot(error, iso_error) - iso
        rows.append(
            Row(
                f"the network, {NAMES[shape]}: rise of the loss over that of isotropic noise",
                "> 1",
                mean / iso if iso > 0 else math.inf,
                None if iso <= 0 else abs(mean / iso) * math.hypot(error / mean, iso_error / iso),
                margin > 0,
                "larger by more than two errors",
            )
        )
    return rows


# ------------------------------------------------------------------------------------- the figure


def _figure(paths: dict[str, Tensor], times: Tensor, measured: tuple[Tensor, Tensor]) -> Figure:
    return Figure(
        "Three kinds of noise in a sharp basin",
        partial(_draw, paths=paths, times=times, measured=measured),
        caption=(
            "Left: paths from the sharp basin (top right) for noise of one strength. Middle: share of runs in the "
            "broad basin. Right: rise of the mean loss out of a quadratic minimum, simulated (points) and in closed "
            "form, and what isotropic noise of the same trace would do."
        ),
        alt="Contours with paths; share of escapes over steps; loss over time.",
        size=(9.6, 3.2),
        key="escape",
    )


def _draw(canvas: Any, paths: dict[str, Tensor], times: Tensor, measured: tuple[Tensor, Tensor]) -> None:
    left, middle, right = canvas.subplots(1, 3)
    colours = {"isotropic": "third", "covariance": "first", "top": "second"}
    axis = torch.linspace(-2.0, 2.0, 120, dtype=F)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    a, b = QUARTER * (grid[..., 0] - grid[..., 1]), QUARTER * (grid.sum(-1) - 2)
    height = torch.minimum(10 * a.square() + 100 * b.square(), (grid + 1).square().sum(-1))
    left.contour(
        axis, axis, height.numpy(), levels=[0.2, 0.8, 1.8, 3.2, 5.0], colors=role("muted"), linewidths=0.6
    )
    for name, colour in colours.items():
        ended = out(paths[name])[-1]
        chosen = int(ended.double().argmax()) if name != "isotropic" else int((~ended).double().argmax())
        place = paths[name][:, chosen]
        left.plot(place[:, 0], place[:, 1], color=role(colour), linewidth=0.7, alpha=0.9, label=name)
    left.set(xlabel="θ₁", ylabel="θ₂", xlim=(-2, 2), ylim=(-2, 2), aspect="equal")
    for name, path in paths.items():
        if name == "none":
            continue
        middle.plot(
            out(path).double().mean(1),
            color=role(colours.get(name, "muted")),
            linestyle={"diagonal": "--", "hessian": ":"}.get(name, "-"),
            label={"top": "top direction", "hessian": "Hessian"}.get(name, name),
        )
    middle.set(xlabel="step", ylabel="share in the broad basin", ylim=(0, None))
    middle.legend(loc="upper left")
    h, sigma = torch.diag(torch.tensor([2.0, 0.5], dtype=F)), torch.diag(torch.tensor([1.0, 0.2], dtype=F))
    fine = torch.linspace(0, float(times[-1]), 80, dtype=F)
    for c, colour, label in (
        (sigma, "first", "aligned with H"),
        (0.6 * torch.eye(2, dtype=F), "third", "isotropic"),
    ):
        curve = [float(expected_rise(h, c, lr=RISE_RATE, time=float(t))) for t in fine]
        right.plot(fine, curve, color=role(colour), label=label)
    right.errorbar(times, measured[0], 2 * measured[1], fmt="o", markersize=3, color=role("first"))
    right.set(xlabel="time kη", ylabel="rise of the loss", ylim=(0, None))
    right.legend(loc="lower right")
