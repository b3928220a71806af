r"""How large a certified Lipschitz constant is, and what it certifies.

    L² = min λ_max(C M(Λ)⁻¹ Cᵀ)   over Λ > 0 with M(Λ) ≻ 0

Digits networks trained by the recipe of the paper's published code, whose constants are known; closed forms; the order
sampled ≤ semidefinite programme ≤ recursion ≤ closed form ≤ product of norms; and certified radii against an attack.

Reference: Pauli, Gramlich & Allgöwer (2024), arXiv:2405.01125; Fazlyab, Robey, Hassani, Morari & Pappas (2019),
arXiv:1906.04893.

Departures: the networks are trained anew, so that rounding makes them differ a little from the published ones; a
convolution is written out as a matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.report import Figure, role
from bolza.stability import LipschitzBound, certified_radius, lipschitz
from bolza.stability.lipschitz import PAULI as REFERENCE
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "pauli2024_lipschitz"
TITLE = "Certified Lipschitz constants and radii"
CLAIM = "A layer-wise matrix inequality bounds the Lipschitz constant well below the product of the norms"

UNIT = 7  # the published constants are those of one logit
PUBLISHED = {  # hidden widths: seed → (product of norms, optimum of the programme)
    (32,): {0: (7.0922, 5.1097), 1: (7.4378, 5.2269)},
    (32, 32): {0: (14.6942, 9.7286)},
}
MEANS = {(32,): (7.228, 5.275), (32, 32): (14.936, 8.550)}  # over ten seeds
METHODS = ("product", "closed", "recursive")
LABELS = {"product": "product of norms", "closed": "closed form", "recursive": "optimised"}


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    epochs: int = 100
    seeds: dict[tuple[int, ...], int] | None = None
    attacked: int = 150
    radii: int = 19


BUDGETS = {
    "small": Budget(seeds={(32,): 1}),
    "full": Budget(seeds={(32,): 10, (32, 32): 10}, attacked=359, radii=24),
}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Compute the closed forms, train the digits networks, and certify them.

    Args:
        scale: ``"small"``: one network, some ten seconds; ``"full"``: twenty networks of two and three layers.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("pauli2024_lipschitz").reference.arxiv
        '2405.01125'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, text: None)
    rows = exact_rows()
    jobs = [(hidden, seed) for hidden, count in (budget.seeds or {}).items() for seed in range(count)]
    found: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    first: tuple[nn.Module, Tensor, Tensor] | None = None
    for i, (hidden, seed) in enumerate(jobs):
        report((i + 1) / (len(jobs) + 3), f"digits network of hidden widths {hidden}, seed {seed}")
        net, x, y = trained(hidden, seed, budget.epochs)
        first = first or (net, x, y)
        found.setdefault(hidden, []).append(constants(net, x))
    for hidden, results in found.items():
        rows += published_rows(hidden, results)
    report(1 - 2 / (len(jobs) + 3), "the programme by a solver")
    rows += solver_rows()
    assert first is not None
    report(1 - 1 / (len(jobs) + 3), "certified radii and an attack")
    radius_rows, curves = radii(*first, budget)
    rows += radius_rows
    notes = (
        "Trained by the published recipe (standardised digits, Adam at 1e-3, batches of 64, 100 epochs, same seeds) "
        "with other rounding: product and optimum differ by a per cent or so from those of the published weights.",
        "The certified radius is in units of the standardised pixels.",
    )
    facts = {"constants": {str(k): v for k, v in found.items()}, "curves": curves}
    report(1.0, "done")
    figure = _figure(found, curves)
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, (figure,), notes, facts)


def chain(*weights: Tensor) -> nn.Sequential:
    """ReLU network of given matrices, without biases."""
    layers: list[nn.Module] = []
    for w in weights:
        layer = nn.utils.skip_init(nn.Linear, w.shape[1], w.shape[0], bias=False)
        with torch.no_grad():
            layer.weight.copy_(w)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def exact_rows() -> list[Row]:
    """Networks whose bound is known."""
    two = torch.tensor([[1.0], [-1.0]])
    draw = torch.Generator().manual_seed(0)
    turns = [
        torch.linalg.qr(torch.randn(6, 6, generator=draw, dtype=torch.float64))[0].float() for _ in range(4)
    ]
    cases = (
        ("|x| written relu(x) + relu(−x): product 2", chain(two, torch.ones(1, 2)), 1.0),
        (
            "x written relu(x) − relu(−x): the inequality is conservative",
            chain(two, torch.tensor([[1.0, -1.0]])),
            2.0,
        ),
        (
            "diag(2, 1), then diag(3, 5): product 10",
            chain(torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([3.0, 5.0]))),
            6.0,
        ),
        ("four orthogonal layers", chain(*turns), 1.0),
    )
    rows = []
    for claim, net, expected in cases:
        value = lipschitz(net, tol=1e-6).bound
        rows.append(Row(claim, expected, value, 1e-5, abs(value - expected) < 1e-5 * expected))
    return rows


def trained(hidden: tuple[int, ...], seed: int, epochs: int = 100) -> tuple[nn.Module, Tensor, Tensor]:
    """A digits network by the published recipe, with its test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    pixels, labels = load_digits(return_X_y=True)
    a, b, c, d = train_test_split(
        pixels.astype("float32"), labels, test_size=0.2, random_state=seed, stratify=labels
    )
    scaler = StandardScaler().fit(a)
    x, test = (torch.from_numpy(scaler.transform(part).astype("float32")) for part in (a, b))
    y, test_y = torch.from_numpy(c), torch.from_numpy(d)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        widths = (64, *hidden, 10)
        layers: list[nn.Module] = []
        for n, m in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(n, m), nn.ReLU()]
        net = nn.Sequential(*layers[:-1])
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        for _ in range(epochs):
            torch.empty((), dtype=torch.int64).random_()  # a loader draws a seed for its workers first
            shuffle = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
            for batch in torch.randperm(len(x), generator=shuffle).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(x[batch]), y[batch]).backward()
                optimizer.step()
    return net, test, test_y


def one_logit(net: nn.Module, unit: int = UNIT) -> nn.Sequential:
    """The network with one of its logits as output."""
    *body, head = net.children()
    assert isinstance(head, nn.Linear)
    last = nn.utils.skip_init(nn.Linear, head.in_features, 1)
    with torch.no_grad():
        last.weight.copy_(head.weight[unit : unit + 1])
        last.bias.copy_(head.bias[unit : unit + 1])
    return nn.Sequential(*body, last)


def constants(net: nn.Module, x: Tensor) -> dict[str, float]:
    """Bounds of one logit by every method, and the sampled constant."""
    single = one_logit(net)
    found: dict[str, LipschitzBound] = {m: lipschitz(single, x, m, tol=1e-4, samples=len(x)) for m in METHODS}  # type: ignore[arg-type]
    out = {method: bound.bound for method, bound in found.items()}
    return out | {"sampled": found["recursive"].lower, "optimum": found["recursive"].parts[0].optimum}


def published_rows(hidden: tuple[int, ...], results: list[dict[str, float]]) -> list[Row]:
    """Beside the constants of the published weights."""
    name = "-".join(map(str, (64, *hidden, 1)))
    rows = []
    for seed, (product, optimum) in PUBLISHED[hidden].items():
        if seed < len(results):
            for what, key, expected in (
                ("product of norms", "product", product),
                ("optimum of the programme", "recursive", optimum),
            ):
                value = results[seed][key]
                rows.append(
                    Row(
                        f"{name}, seed {seed}: {what}",
                        expected,
                        value,
                        None,
                        abs(value / expected - 1) < 0.02,
                        "within 2 % of that of the published weights",
                    )
                )
    if len(results) == 10:
        for what, key, expected in zip(
            ("product", "optimum"), ("product", "recursive"), MEANS[hidden], strict=True
        ):
            mean, error = mean_error(r[key] for r in results)
            rows.append(
                Row(
                    f"{name}: mean {what} of ten seeds",
                    expected,
                    mean,
                    error,
                    abs(mean / expected - 1) < 0.03,
                    "3 %",
                )
            )
    order = all(r["sampled"] <= r["recursive"] <= r["closed"] <= r["product"] for r in results)
    gap = max(r["recursive"] / r["optimum"] - 1 for r in results)
    gain = max(r["recursive"] / r["product"] for r in results)
    return [
        *rows,
        Row(
            f"{name}: sampled ≤ optimised ≤ closed form ≤ product",
            "in order",
            "in order" if order else "not",
            None,
            order,
        ),
        Row(f"{name}: optimised over the optimum, minus 1 (by duality)", "≤ 0.005", gap, None, gap <= 0.005),
        Row(f"{name}: optimised over product", "< 0.85", gain, None, gain < 0.85, "15 to 40 % below"),
    ]


def solver_rows() -> list[Row]:
    """The optimiser of the recursion against a solver, on a network that is small enough for it."""
    draw = torch.Generator().manual_seed(0)
    net = chain(*(torch.randn(m, n, generator=draw) / math.sqrt(n) for n, m in ((8, 14), (14, 14), (14, 3))))
    try:
        solved = lipschitz(net, method="sdp").bound
    except Exception as error:  # noqa: BLE001  the solver is an extra
        return [Row("optimised bound over that of a solver", "≤ 1.005", None, None, None, str(error))]
    ratio = lipschitz(net).bound / solved
    return [
        Row(
            "optimised bound over that of a solver, 8-14-14-3",
            "≤ 1.005",
            ratio,
            1e-4,
            1 - 1e-4 <= ratio <= 1.005,
        )
    ]


def attack(net: nn.Module, x: Tensor, y: Tensor, eps: Tensor, steps: int = 40) -> Tensor:
    """Projected gradient ascent of the loss in ℓ₂ balls of given radii; True where the class is kept."""
    kept = torch.ones(len(x), dtype=torch.bool)
    delta = torch.zeros_like(x)
    for _ in range(steps):
        point = (x + delta).requires_grad_()
        out = net(point)
        kept &= out.argmax(1) == y
        (slope,) = torch.autograd.grad(F.cross_entropy(out, y, reduction="sum"), point)
        direction = slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-12)
        delta = delta + 2.5 * eps[:, None] / steps * direction
        delta = delta * (eps / delta.norm(dim=1).clamp_min(1e-12)).clamp(max=1)[:, None]
    with torch.no_grad():
        return kept & (net(x + delta).argmax(1) == y)


def radii(net: nn.Module, x: Tensor, y: Tensor, budget: Budget) -> tuple[list[Row], dict[str, list[float]]]:
    """Certified accuracy by every method, and the accuracy that an attack leaves."""
    x, y = x[: budget.attacked], y[: budget.attacked]
    found = {m: certified_radius(net, x, y, method=m) for m in METHODS}  # type: ignore[arg-type]
    best = found["recursive"]
    right = best.margin > 0
    kept = attack(net, x[right], y[right], best.radius[right].float())
    broken = int((~kept).sum())
    top = float(best.radius.max())
    grid = [3 * top * i / (budget.radii - 1) for i in range(budget.radii)]
    curves = {m: [r.accuracy(eps) for eps in grid] for m, r in found.items()}
    curves["attack"] = [
        float((attack(net, x, y, torch.full((len(x),), eps))).double().mean()) for eps in grid
    ]
    curves["radius"] = grid
    ratio = float(best.radius[right].mean() / found["product"].radius[right].mean())
    dominated = all(a <= b for a, b in zip(curves["recursive"], curves["attack"], strict=True))
    return [
        Row("classes that a 40-step attack changes within the certified radius", 0.0, float(broken), None, broken == 0),
        Row("certified is below attacked accuracy at all radii", "yes", "yes" if dominated else "no", None, dominated),
        Row("certified radius, optimised over product", "> 1.1", ratio, None, ratio > 1.1),
    ], curves  # fmt: skip


def _figure(found: dict[tuple[int, ...], list[dict[str, Any]]], curves: dict[str, list[float]]) -> Figure:
    return Figure(
        "What is certain of a digits network",
        partial(_draw, found=found, curves=curves),
        caption=(
            "Left: Lipschitz constants of one logit, means over seeds. Right: share of test digits that are certainly "
            "classified right whatever perturbation of a size is added, and the share that survives an attack; the "
            "truth lies between the attack and the certificates."
        ),
        alt="Bars of bounds; falling certified accuracy below the accuracy under attack.",
        size=(9.6, 3.4),
        key="certificates",
    )


def _draw(
    canvas: Any, found: dict[tuple[int, ...], list[dict[str, Any]]], curves: dict[str, list[float]]
) -> None:
    left, right = canvas.subplots(1, 2, width_ratios=[1, 1.15])
    keys = ("sampled", "recursive", "closed", "product")
    names = ("sampled, lower", "optimised", "closed form", "product of norms")
    colours = ("muted", "first", "second", "third")
    for i, results in enumerate(found.values()):
        for k, (key, name, colour) in enumerate(zip(keys, names, colours, strict=True)):
            mean, error = mean_error(r[key] for r in results)
            bar = left.bar(
                i + 0.2 * (k - 1.5), mean, 0.18, yerr=error or None, color=role(colour), ecolor=role("ink"),
                label=name if i == 0 else None,
            )  # fmt: skip
            left.bar_label(bar, fmt="%.2f", fontsize=7, padding=2)
        left.set_xlim(-0.6, len(found) - 0.4)
    left.set_xticks(range(len(found)), ["-".join(map(str, (64, *hidden, 1))) for hidden in found])
    left.set(ylabel="Lipschitz constant of a logit")
    left.margins(y=0.12)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, 1.26), ncols=2)
    left.grid(False, axis="x")
    right.plot(
        curves["radius"], curves["attack"], color=role("ink"), linestyle="--", label="under attack, 40 steps"
    )
    for key, colour in (("recursive", "first"), ("closed", "second"), ("product", "third")):
        right.plot(curves["radius"], curves[key], color=role(colour), label=f"certified, {LABELS[key]}")
    right.set(xlabel="ℓ₂ size of the perturbation", ylabel="accuracy", ylim=(0, 1.02), xlim=(0, None))
    right.legend(loc="upper right")
