r"""Wide random networks are Gaussian processes, and the process predicts as well as networks that were trained.

With K the NNGP kernel of an architecture, a network with random weights of variance σ_w²/n has outputs of covariance
K(x, x') as its widths grow, and Gaussian-process regression with K is its exact Bayesian prediction:

    K^{l+1}(x, x') = σ_w² E φ(u)φ(v) + σ_b²,   (u, v) ~ N(0, K^l)

What is looked at: the covariance of finite networks; classification of digits as regression on one-hot targets, beside
networks trained by Adam on the same targets; whether the posterior variance tells where the prediction is bad; and how
the accuracy of deep kernels depends on σ_w², which by the depth scale ξ_c of the correlation should be best at the
critical line.

Reference: Lee, Bahri, Novak, Schoenholz, Pennington & Sohl-Dickstein (2018), arXiv:1711.00165.

Departures. Handwritten digits of 8 × 8 pixels, 70 % for training, instead of MNIST and CIFAR-10; erf instead of tanh,
which it resembles and which has a closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bolza.meanfield import critical_weight_var, fixed_point
from bolza.meanfield.kernels import gp_posterior, nngp
from bolza.meanfield.kernels.infinite import LEE
from bolza.report import Figure, role
from bolza.studies._study import Progress, Row, Scale, StudyResult

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "lee2018_nngp"
TITLE = "Deep networks as Gaussian processes"
CLAIM = (
    "Wide random networks are Gaussian processes whose regression predicts as well as trained networks, "
    "and whose depth is limited away from the critical line"
)
REFERENCE = LEE

BIAS_VAR = 0.05
ANGLE_VALUES = {
    1: 0.63616727,
    2: 0.70330275,
    3: 0.75255939,
}  # ReLU, σ_w² = 2, σ_b² = 0, unit vectors one radian apart


@dataclass(frozen=True)
class Budget:
    """Size of the experiments."""

    covariance_widths: tuple[int, ...]
    covariance_draws: int
    trained_widths: tuple[int, ...]
    seeds: int
    steps: int
    map_train: int
    map_test: int
    map_depths: tuple[int, ...]
    map_weight_vars: int


BUDGETS = {
    "small": Budget((4, 16, 64), 800, (5, 20, 100), 2, 150, 200, 200, (1, 20, 90), 11),
    "full": Budget((4, 16, 64, 256), 8000, (5, 20, 100, 400), 5, 1500, 600, 600, (1, 3, 10, 30, 60, 100), 25),
}


class Erf(nn.Module):
    """The error function as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        """erf(x)."""
        return torch.erf(x)


def network(
    depth: int, width: int = 4, outputs: int = 1, act: type[nn.Module] = nn.ReLU, inputs: int = 64
) -> nn.Module:
    """A fully connected network with ``depth`` hidden layers."""
    layers: list[nn.Module] = []
    size = inputs
    for _ in range(depth):
        layers += [nn.Linear(size, width), act()]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, outputs))


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Compare kernels, finite networks and predictions.

    Args:
        scale: ``"small"`` takes some ten seconds on one core, ``"full"`` some minutes.
        progress: called with the share done and a few words.

    Returns:
        The rows, two figures, and the numbers behind them.

    Example:
        >>> from bolza.studies import get
        >>> get("1711.00165").key
        'lee2018_nngp'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    report(0.0, "kernel values")
    rows = value_rows()
    report(0.05, "random networks")
    gaps = covariance_gaps(budget)
    rows.append(covariance_row(gaps))
    data = split_digits()
    report(0.2, "regression on digits")
    more, facts = regression(data, budget, report)
    rows += more
    report(0.6, "depth and σ_w²")
    accuracy, weight_vars = depth_map(data, budget)
    critical = float(critical_weight_var("erf", BIAS_VAR))
    rows += map_rows(accuracy, weight_vars, budget, critical)
    figures = (
        Figure(
            "Accuracy of deep kernels",
            partial(
                _draw_map,
                accuracy=accuracy,
                weight_vars=weight_vars,
                depths=budget.map_depths,
                critical=critical,
            ),
            caption=(
                f"Test accuracy of Gaussian-process regression on digits ({budget.map_train} for training), erf "
                "networks of σ_b² = 0.05. Shallow kernels work at any σ_w²; deep ones only near the critical value, "
                "where ξ_c diverges."
            ),
            alt="Curves of test accuracy over weight variance, one for each depth, with the critical value marked.",
            size=(9.2, 4.2),
            key="depth",
        ),
        Figure(
            "Where the process is unsure, it errs",
            partial(_draw_uncertainty, **facts["uncertainty"]),
            caption="Test digits in ten groups by posterior standard deviation: mean squared error of their targets.",
            alt="Squared error rising with the posterior standard deviation.",
            size=(6.4, 3.8),
            key="uncertainty",
        ),
    )
    notes = (
        "Digits of 8 × 8 pixels scaled to unit length, split 70/30 with equal shares of the classes; the paper has "
        "MNIST and CIFAR-10.",
        f"Trained networks have two hidden ReLU layers and {budget.steps} full-batch steps of Adam (lr 0.003) on "
        "squared error, without regularisation or tuning; the paper tunes them.",
        "Deep kernels are those of erf networks, which have a closed form; the paper has tanh and ReLU.",
    )
    facts = facts | {
        "covariance_gap": gaps,
        "weight_vars": weight_vars.tolist(),
        "depths": budget.map_depths,
        "map_accuracy": accuracy.tolist(),
        "critical_weight_var": critical,
    }
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, figures, notes, facts)


def value_rows() -> list[Row]:
    """The kernel of two unit vectors one radian apart."""
    x = torch.tensor([[1.0, 0.0], [math.cos(1.0), math.sin(1.0)]], dtype=torch.float64)
    rows = []
    for depth, want in ANGLE_VALUES.items():
        got = float(nngp(network(depth, inputs=2), x, weight_var=2.0, bias_var=0.0)[0, 1])
        claim = f"K of two unit vectors at 1 rad, {depth} ReLU layer{'s' if depth > 1 else ''}"
        rows.append(Row(claim, want, got, None, abs(got - want) < 5e-9))
    return rows


def covariance_gaps(budget: Budget) -> dict[int, tuple[float, float]]:
    """Non-Gaussianity of one output of random networks: excess kurtosis with its standard error, by width."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(16, generator=g, dtype=torch.float64)
    found = {}
    for width in budget.covariance_widths:
        outputs = []
        for _ in range(max(1, budget.covariance_draws // 200)):
            h = x.expand(200, 16)
            for layer, size in enumerate((width, width, 1)):
                h = h.relu() if layer else h
                w = torch.randn(200, h.shape[1], size, generator=g, dtype=torch.float64)
                h = torch.einsum("ni,nij->nj", h, w * math.sqrt(2 / h.shape[1]))
            outputs.append(h[:, 0])
        f = torch.cat(outputs)
        z = f.square() / f.square().mean()
        kurtosis = float(z.square().mean()) - 3
        blocks = torch.stack(
            [b.square().square().mean() / b.square().mean().square() for b in f.reshape(20, -1)]
        )
        found[width] = (kurtosis, float(blocks.std() / math.sqrt(20)))
    return found


def covariance_row(gaps: dict[int, tuple[float, float]]) -> Row:
    """Outputs get Gaussian as networks get wide."""
    (narrow, (first, first_error)), (wide, (last, error)) = list(gaps.items())[0], list(gaps.items())[-1]
    # Two ReLU layers: E f⁴/(E f²)² = 3 (1 + 5/n)², from E φ⁴/(E φ²)² = 6 in each layer.
    expected = 3 * (1 + 5 / wide) ** 2 - 3
    falls = first - last > 2 * math.hypot(first_error, error)
    return Row(
        f"the excess kurtosis of an output falls as 30/width: at width {wide}", expected, last, error,
        falls and abs(last - expected) < 4 * error + 0.05, f"{first:.2f} at width {narrow}; 0 is Gaussian",
    )  # fmt: skip


@dataclass(frozen=True)
class Digits:
    """Unit-length digits, 70 % for training."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def split_digits() -> Digits:
    """The split of all rows of this study."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    parts = train_test_split(data.data, data.target, test_size=0.3, random_state=0, stratify=data.target)
    x, test_x, y, test_y = map(torch.from_numpy, parts)
    x, test_x = (v / v.norm(dim=1, keepdim=True) for v in (x, test_x))
    return Digits(x, y, test_x, test_y)


def regression(data: Digits, budget: Budget, report: Progress) -> tuple[list[Row], dict[str, Any]]:
    """Accuracy of the process at three depths, of trained networks, and the use of the posterior variance."""
    targets = nn.functional.one_hot(data.y).double()
    rows, accuracies = [], []
    posterior = None
    for depth in (1, 3, 10):
        net = network(depth)
        train = nngp(net, data.x, weight_var=2.0, bias_var=0.0)
        cross = nngp(net, data.test_x, data.x, weight_var=2.0, bias_var=0.0)
        own = nngp(net, data.test_x, weight_var=2.0, bias_var=0.0, diagonal=True)
        found = gp_posterior(train, targets, cross, own, noise=1e-4)
        posterior = found if depth == 3 else posterior
        accuracies.append(float((found.mean.argmax(1) == data.test_y).double().mean()))
        rows.append(
            Row(
                f"accuracy of the process on digits, {depth} ReLU layer{'s' if depth > 1 else ''}", 0.9926,
                accuracies[-1], math.sqrt(0.0074 * 0.9926 / len(data.test_y)), accuracies[-1] >= 0.985,
                "noise 1e-4; 0.9926 is what the kernel recursion gives by hand on this split",
            )
        )  # fmt: skip
    assert posterior is not None and posterior.variance is not None
    error = (posterior.mean - nn.functional.one_hot(data.test_y)).square().mean(1)
    spread = posterior.variance.sqrt()
    ranks = torch.stack([v.argsort().argsort().double() for v in (error, spread)])
    rank = float(torch.corrcoef(ranks)[0, 1])
    rows.append(
        Row(
            "posterior variance and squared error of the target go together (rank correlation)", "> 0", rank,
            1 / math.sqrt(len(error)), rank > 4 / math.sqrt(len(error)),
        )
    )  # fmt: skip
    trained = {}
    for i, width in enumerate(budget.trained_widths):
        report(0.25 + 0.35 * i / len(budget.trained_widths), f"training networks of width {width}")
        trained[width] = [train_network(data, width, budget.steps, seed) for seed in range(budget.seeds)]
    means = {w: sum(v) / len(v) for w, v in trained.items()}
    narrow, wide = min(means), max(means)
    spread_wide = torch.tensor(trained[wide]).std().item() / math.sqrt(budget.seeds)
    rows.append(
        Row(
            f"trained networks get better with width: accuracy gained from width {narrow} to {wide}", "> 0",
            means[wide] - means[narrow], spread_wide, means[wide] > means[narrow],
        )
    )  # fmt: skip
    rows.append(
        Row(
            "the process is at least as good as the widest trained networks: accuracy above theirs", "≥ 0",
            accuracies[1] - means[wide], max(spread_wide, math.sqrt(0.0074 * 0.9926 / len(data.test_y))),
            accuracies[1] >= means[wide] - 0.004, "one test digit in 270 is one standard error",
        )
    )  # fmt: skip
    groups = spread.argsort().tensor_split(10)
    facts = {
        "gp_accuracy": accuracies,
        "trained_accuracy": trained,
        "rank_correlation": rank,
        "uncertainty": {
            "spread": [float(spread[g].mean()) for g in groups],
            "error": [float(error[g].mean()) for g in groups],
        },
    }
    return rows, facts


def train_network(data: Digits, width: int, steps: int, seed: int) -> float:
    """Test accuracy of a network trained on the one-hot targets."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = network(2, width, 10)
    x, targets = data.x.float(), nn.functional.one_hot(data.y).float()
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.Linear):
                g = torch.Generator().manual_seed(seed + layer.in_features)
                layer.weight.normal_(0, math.sqrt(2 / layer.in_features), generator=g)
                layer.bias.zero_()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x) - targets).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return float((net(data.test_x.float()).argmax(1) == data.test_y).double().mean())


def depth_map(data: Digits, budget: Budget) -> tuple[Tensor, Tensor]:
    """Test accuracy of the process, ``(depths, weight_vars)``."""
    x, y = data.x[: budget.map_train] * 8, data.y[: budget.map_train]  # mean square 1
    test_x, test_y = data.test_x[: budget.map_test] * 8, data.test_y[: budget.map_test]
    targets = nn.functional.one_hot(y, 10).double() - 0.1
    both = torch.cat([x, test_x])
    weight_vars = torch.linspace(0.6, 3.0, budget.map_weight_vars, dtype=torch.float64)
    out = torch.zeros(len(budget.map_depths), len(weight_vars), dtype=torch.float64)
    for i, depth in enumerate(budget.map_depths):
        net = network(depth, act=Erf)
        for j, weight_var in enumerate(weight_vars.tolist()):
            k = nngp(net, both, weight_var=weight_var, bias_var=BIAS_VAR)
            train, cross = k[: len(x), : len(x)], k[len(x) :, : len(x)]
            noise = 1e-6 * float(train.diagonal().mean())
            guess = gp_posterior(train, targets, cross, noise=noise).mean.argmax(1)
            out[i, j] = (guess == test_y).double().mean()
    return out, weight_vars


def map_rows(accuracy: Tensor, weight_vars: Tensor, budget: Budget, critical: float) -> list[Row]:
    """Shallow kernels do not mind σ_w²; deep ones want the critical one."""
    shallow, deep = accuracy[0], accuracy[-1]
    centre = weight_vars[deep >= deep.max() - 0.01]
    best = float(centre.mean())
    step = float(weight_vars[1] - weight_vars[0])
    return [
        Row(
            "a kernel of one layer works at any σ_w²: lowest accuracy", "≈ best",
            float(shallow.min()), None, bool(shallow.max() - shallow.min() < 0.05), f"best {float(shallow.max()):.3f}",
        ),
        Row(
            f"at depth {budget.map_depths[-1]} the best σ_w² is near the critical one", critical, best, 2 * step,
            abs(best - critical) < 0.5, "middle of the values within 0.01 of the best accuracy",
        ),
        Row(
            f"at depth {budget.map_depths[-1]} accuracy is lost on both sides of it", "> 0.05",
            float(deep.max() - torch.maximum(deep[0], deep[-1])), None,
            bool(deep.max() - torch.maximum(deep[0], deep[-1]) > 0.05),
            f"{float(deep[0]):.3f} at σ_w² = {float(weight_vars[0]):g}, {float(deep[-1]):.3f} at "
            f"{float(weight_vars[-1]):g}, best {float(deep.max()):.3f}",
        ),
    ]  # fmt: skip


def _draw_map(
    canvas: Any, accuracy: Tensor, weight_vars: Tensor, depths: tuple[int, ...], critical: float
) -> None:
    from matplotlib import colormaps

    upper, lower = canvas.subplots(1, 2, gridspec_kw={"width_ratios": [2.2, 1]})
    shades = colormaps["viridis"](torch.linspace(0.0, 0.85, len(depths)).numpy())
    for row, depth, shade in zip(accuracy, depths, shades, strict=True):
        upper.plot(
            weight_vars,
            row,
            "o-",
            markersize=3.5,
            color=shade,
            label=f"{depth} layers" if depth > 1 else "1 layer",
        )
    upper.axvline(critical, color=role("ink"), linewidth=0.9, linestyle="--")
    upper.annotate(
        f"critical {critical:.2f}", (critical, 0.0), xycoords=("data", "axes fraction"), xytext=(4, 8),
        textcoords="offset points", color=role("ink"),
    )  # fmt: skip
    upper.set(xlabel="weight variance $\\sigma_w^2$", ylabel="test accuracy", ylim=(0.05, 1.0))
    upper.legend(loc="center right", bbox_to_anchor=(1.0, 0.6))
    fine = torch.linspace(float(weight_vars[0]), float(weight_vars[-1]), 200, dtype=torch.float64)
    lower.semilogy(fine, fixed_point("erf", fine, BIAS_VAR).xi_c.clamp_max(1e3), color=role("first"))
    lower.axvline(critical, color=role("ink"), linewidth=0.9, linestyle="--")
    lower.set(xlabel="weight variance $\\sigma_w^2$", ylabel="correlation depth scale $\\xi_c$")


def _draw_uncertainty(canvas: Any, spread: list[float], error: list[float]) -> None:
    axes = canvas.subplots()
    axes.plot(spread, error, "o-", color=role("first"))
    axes.set(
        xlabel="posterior standard deviation", ylabel="mean squared error of the targets", ylim=(0, None)
    )
