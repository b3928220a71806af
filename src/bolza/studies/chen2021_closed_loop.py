r"""Closed-loop control of hidden states by the maximum principle, input by input.

    min_u Σ_t ½‖x_t + u_t − E_t(x_t + u_t)‖² + c/2 ‖u_t‖²,      x_{t+1} = f_t(x_t + u_t)

Descent along costates against the closed form where there is one; then digits under noise and under an attack, with
linear subspaces and with autoencoders, and with the feedback law in place of the search.

Reference: Chen, Li & Zhang (2021), arXiv:2102.01862.

Departures: digits and a small MLP in place of images and a residual network; each sample keeps its best controls.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.report import Figure, role
from bolza.robust import SelfHealing, closed_loop_controls, control_gains, pgd
from bolza.robust.closed_loop import CHEN_CLOSED as REFERENCE
from bolza.studies._adversarial import pixels
from bolza.studies._healing import EPS, NOISE, orthogonal_layers, trained
from bolza.studies._study import Progress, Row, Scale, StudyResult, mean_error
from bolza.systems import as_system

__all__ = ["CLAIM", "KEY", "REFERENCE", "TITLE", "run"]

KEY = "chen2021_closed_loop"
TITLE = "Closed-loop control of hidden states"
CLAIM = "States of a trained network that are steered back to where clean states live make it more robust"

RATE = 0.05
WAYS = ("none", "feedback, subspaces", "search, subspaces", "feedback, autoencoders", "search, autoencoders")


@dataclass(frozen=True)
class Budget:
    """Size of the runs."""

    seeds: int = 3
    epochs: int = 25
    autoencoder_steps: int = 250
    iterations: int = 20
    samples: int = 359


BUDGETS = {"small": Budget(), "full": Budget(seeds=10, epochs=60, autoencoder_steps=1500)}


def run(scale: Scale = "small", progress: Progress | None = None) -> StudyResult:
    """Check the search, and measure what it gives under noise and an attack.

    Args:
        scale: ``"small"``: three seeds, some ten seconds on one core; ``"full"``: ten.
        progress: called with the share done and a few words.

    Returns:
        The rows, a figure, and the numbers.

    Example:
        >>> from bolza.studies import get
        >>> get("chen2021_closed_loop").reference.arxiv
        '2102.01862'
    """
    budget = BUDGETS[scale]
    report = progress or (lambda share, words: None)
    rows, found = exact_rows(), []
    for seed in range(budget.seeds):
        report((seed + 0.5) / (budget.seeds + 0.5), f"digits, seed {seed}")
        found.append(trial(seed, budget))
    rows += digit_rows(found)
    notes = (
        "MLP 64-128-128-10 with tanh on digits, pixels in [0, 1]; subspaces carry 95 % of the variance of the states "
        f"of training samples that are right; c = 0.1; {budget.iterations} iterations of Adam. Noise has standard "
        f"deviation {NOISE}; the attack, ε = {EPS} in the largest entry, 20 steps, does not know of the control.",
        "Gains are seed by seed, errors over seeds. What an attack through the control does is in "
        "chen2024_self_healing: these numbers alone promise nothing against an adversary.",
    )
    report(1.0, "done")
    facts = {"trials": [{k: v for k, v in one.items() if k != "course"} for one in found]}
    return StudyResult(KEY, TITLE, REFERENCE, CLAIM, scale, rows, (_figure(found),), notes, facts)


def exact_rows() -> list[Row]:
    """The search against the closed form for orthogonal layers, and independence of the batch."""
    net, x, basis = orthogonal_layers(4)
    system = as_system(net, x)
    healed = SelfHealing(net, c=1.0, fraction=1.0).fit(x)
    parts = list(healed.manifolds)
    residuals = [lambda x, part=part: x - part(x) for part in parts]
    noisy = x[:8] + basis[3:11]
    alpha, value = control_gains(1.0, 4)
    found = closed_loop_controls(
        system, noisy, residuals, 1.0, iterations=90, optimizer=lambda us: torch.optim.SGD(us, 0.15, 0.5)
    )
    cost = float((found.cost / (0.5 * value[0]) - 1).abs().max())
    first = found.controls[0]
    assert first is not None
    gain = float((first.norm(dim=1) - (1 - alpha[0])).abs().max())
    alone = [
        closed_loop_controls(system, noisy[i : i + 1], residuals, 1.0, iterations=5, lr=0.1).cost
        for i in range(8)
    ]
    together = closed_loop_controls(system, noisy, residuals, 1.0, iterations=5, lr=0.1).cost
    apart = float((torch.cat(alone) - together).abs().max())
    return [
        Row("orthogonal layers: cost of the search over λ₀/2, minus 1", 0.0, cost, 1e-9, cost < 1e-9),
        Row("orthogonal layers: size of the first control against 1 − α₀", 0.0, gain, 1e-5, gain < 1e-5),
        Row("cost of a sample alone and in its batch, largest difference", 0.0, apart, 1e-12, apart < 1e-12),
    ]


def trial(seed: int, budget: Budget) -> dict[str, Any]:
    """Accuracies of every way on clean inputs, under noise and under attack; costs along the search; times."""
    x, y, clean, labels = pixels("digits")
    clean, labels = clean[: budget.samples], labels[: budget.samples]
    net = trained(seed, budget.epochs)
    draw = torch.Generator().manual_seed(seed)
    inputs = {
        "clean": clean,
        "noise": clean + NOISE * torch.randn(clean.shape, generator=draw),
        "attack": pgd(net, F.cross_entropy, clean, labels, EPS, 20, generator=draw),
    }
    linear = SelfHealing(net, c=0.1, fraction=0.95).fit(x, y)
    curved = SelfHealing(net, c=0.1, manifold="autoencoder").fit(x, y, steps=budget.autoencoder_steps)
    accuracies, seconds = {}, {"feedback": 0.0, "search": 0.0}
    for name, z in inputs.items():
        accuracies[name] = {"none": _accuracy(net, z, labels)}
        for kind, healed in (("subspaces", linear), ("autoencoders", curved)):
            start = time.process_time()
            accuracies[name][f"feedback, {kind}"] = _accuracy(healed, z, labels)
            middle = time.process_time()
            found = healed.solve(z, iterations=budget.iterations, lr=RATE)
            seconds["feedback"] += middle - start
            seconds["search"] += time.process_time() - middle
            accuracies[name][f"search, {kind}"] = float((found.output.argmax(1) == labels).double().mean())
            if name == "noise" and kind == "subspaces":
                fall = float((found.cost / found.start).mean())
                risen = int((found.cost > found.start).sum())
    course = _course(net, linear, inputs["noise"][:100], budget.iterations) if seed == 0 else {}
    return {"accuracy": accuracies, "seconds": seconds, "fall": fall, "risen": risen, "course": course}


def _accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((net(x).argmax(1) == y).double().mean())


def _course(net: nn.Module, healed: SelfHealing, x: Tensor, most: int) -> dict[str, list[float]]:
    """Mean cost after some iterations, from no control and from the feedback law, over that of no control."""
    system = as_system(net, x)
    residuals = [lambda x, part=part: x - part(x) for part in healed.manifolds]
    with torch.no_grad():
        law = healed.controls(x)
    found: dict[str, list[float]] = {"zero": [], "feedback": []}
    found["iterations"] = [k for k in (0, 1, 2, 5, 10, 20) if k <= most]
    base = None
    for k in found["iterations"]:
        for name, start in (("zero", None), ("feedback", law)):
            one = closed_loop_controls(
                system, x, residuals, healed.c, start=start, iterations=int(k), lr=RATE
            )
            base = one.start.mean() if base is None else base
            found[name].append(float(one.cost.mean() / base))
    return found


def digit_rows(found: list[dict[str, Any]]) -> list[Row]:
    """What control gives to digits."""

    def gain(inputs: str, way: str, over: str = "none") -> tuple[float, float]:
        return mean_error(one["accuracy"][inputs][way] - one["accuracy"][inputs][over] for one in found)

    rows = []
    search, curved = "search, subspaces", "search, autoencoders"
    for inputs, words, least in (("clean", "on clean inputs", -0.03), ("noise", "under noise", 0.08),
                                 ("attack", "under an attack on the bare network", 0.2)):  # fmt: skip
        for way, kind in ((search, "subspaces"), (curved, "autoencoders")):
            mean, error = gain(inputs, way)
            rows.append(
                Row(f"{kind}: gain of accuracy {words}", f"≥ {least}".replace("-", "−"), mean, error, mean >= least,
                    f"from {mean_error(one['accuracy'][inputs]['none'] for one in found)[0]:.3f}")
            )  # fmt: skip
    for inputs in ("noise", "attack"):
        mean, error = gain(inputs, curved, search)
        rows.append(
            Row(f"{inputs}: what curved manifolds add to subspaces", "> 0", mean, error,
                mean > 0 if abs(mean) > 2 * error else None, "to two errors, seed by seed")
        )  # fmt: skip
        mean, error = gain(inputs, search, "feedback, subspaces")
        rows.append(
            Row(f"{inputs}: what the search adds to the feedback law, subspaces", "within 0.03", mean, error,
                abs(mean) < 0.03, "the law is optimal for orthogonal layers only")
        )  # fmt: skip
    fall, error = mean_error(one["fall"] for one in found)
    risen = sum(one["risen"] for one in found)
    times = sorted(one["seconds"]["search"] / max(one["seconds"]["feedback"], 1e-9) for one in found)
    rows += [
        Row("cost after the search over that of the feedback law", "< 1", fall, error, fall < 1,
            "mean over samples with noise"),
        Row("samples whose cost the search raised", 0.0, float(risen), None, risen == 0),
        Row("processor time of the search over that of the feedback law", "> 10", times[len(times) // 2], None,
            times[len(times) // 2] > 10, "median over seeds"),
    ]  # fmt: skip
    return rows


def _figure(found: list[dict[str, Any]]) -> Figure:
    return Figure(
        "Steering states back, by search and by law",
        partial(_draw, found=found),
        caption=(
            "Left: accuracy on digits without control, with the feedback law and with the search of the maximum "
            "principle, one standard error. Right: cost over iterations of the search, for one network"
            " under noise, relative to no control."
        ),
        alt="Bars of accuracy for three kinds of inputs; two falling curves.",
        size=(10.0, 3.5),
        key="closed_loop",
    )


def _draw(canvas: Any, found: list[dict[str, Any]]) -> None:
    left, right = canvas.subplots(1, 2, width_ratios=[1.9, 1.0])
    looks = (
        ("muted", 0.6, ""), ("second", 0.55, ""), ("second", 1.0, "//"), ("first", 0.55, ""), ("first", 1.0, "//"),
    )  # fmt: skip
    for k, (way, (colour, alpha, hatch)) in enumerate(zip(WAYS, looks, strict=True)):
        pairs = [
            mean_error(one["accuracy"][name][way] for one in found) for name in ("clean", "noise", "attack")
        ]
        left.bar(
            [i + (k - 2) * 0.16 for i in range(3)],
            [mean for mean, _ in pairs],
            0.15,
            yerr=[error for _, error in pairs],
            color=role(colour),
            ecolor=role("ink"),
            alpha=alpha,
            hatch=hatch,
            edgecolor="white",
            label=way,
        )
    left.set_xticks(range(3), ("clean", f"noise {NOISE}", f"attack, ε = {EPS}"))
    left.set(ylabel="accuracy", ylim=(0, 1.28))
    left.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    left.grid(False, axis="x")
    left.legend(loc="upper right", ncols=3, fontsize=8)
    for name, colour, label in (
        ("zero", "second", "from no control"),
        ("feedback", "first", "from the feedback law"),
    ):
        course = found[0]["course"][name]
        right.plot(found[0]["course"]["iterations"], course, marker="o", color=role(colour), label=label)
    right.set(xlabel="iterations", ylabel="cost over that of no control", ylim=(0, 1.05))
    right.legend()
