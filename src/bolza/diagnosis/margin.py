"""How far may inputs be moved before the answer changes: bounds from both sides, and accuracy in noise.

Radii are those of the largest entry, in units of the range of the data. Accuracy under attack is an upper bound on what
holds, the certified share a lower one.

Reference: Croce & Hein (2020), *Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks*; Gowal et al. (2018), arXiv:1810.12715, and Tsuzuku, Sato & Sugiyama (2018), arXiv:1802.04034,
for certificates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from bolza.data import Dataset
from bolza.diagnosis.record import Finding, Verdict
from bolza.ops.errors import BolzaError, DataError
from bolza.report import number, percent, plus_minus
from bolza.robust import robust_accuracy
from bolza.stability import certified_radius, lipschitz

__all__ = ["HEADLINE", "Margin", "logits_of", "margin_findings", "measure_margin"]

HEADLINE = 8 / 255  # of the range of the data: the usual radius for images
_RADII = tuple(k / 255 for k in (2, 4, 8, 16, 32, 64))
_NOISE = (0.02, 0.05, 0.1, 0.2, 0.4)  # standard deviations, of the range of the data
_HEADLINE_NOISE = 0.1
_CHUNK, _DRAWS = 256, 4
_BUDGET = (
    6.0  # seconds of one core for the independent suite, by count, so that a seed always gives one answer
)
# attacks, steps, queries, and passes of one sample forward and back that they take, for ten classes
_SUITES: tuple[tuple[tuple[str, ...], int, int, int], ...] = (
    (("apgd-ce", "apgd-t", "square"), 50, 500, 700),
    (("apgd-ce", "square"), 50, 200, 130),
)


@dataclass(frozen=True)
class Margin:
    """How far inputs may be moved.

    Args:
        samples: samples that were attacked.
        low: smallest value of the data.
        high: largest value of the data.
        eps: radius of the headline, share of the range.
        robust: accuracy left there.
        robust_error: its standard error.
        radii: zero and the radii of the curve, shares of the range.
        attacked: accuracy left at each.
        attacked_error: standard errors.
        attacks: at the headline, in order.
        half: radius at which half of the right answers are lost, interpolated; None where more than half stay.
        doubts: reasons to doubt the attack, in words.
        certified: certified radius of each sample, ascending, shares of the range; empty where there is no certificate.
        certified_share: certified accuracy at the headline.
        median_certified: median of ``certified``.
        lipschitz: certified Lipschitz constant of the logits in Euclid's norm; None where not covered.
        noise: standard deviations of Gaussian noise, shares of the range.
        noisy: accuracy with each.
        noisy_error: standard errors.
        uncertified: why there is no certificate, in words; else empty.
        uneven: median over the features of their range, as a share of the range of all; None for images.
    """

    samples: int
    low: float
    high: float
    eps: float
    robust: float
    robust_error: float
    radii: Sequence[float]
    attacked: Sequence[float]
    attacked_error: Sequence[float]
    attacks: Sequence[str]
    half: float | None
    doubts: Sequence[str]
    certified: Sequence[float]
    certified_share: float | None
    median_certified: float | None
    lipschitz: float | None
    noise: Sequence[float]
    noisy: Sequence[float]
    noisy_error: Sequence[float]
    uncertified: str = ""
    uneven: float | None = None


def measure_margin(
    data: Dataset, model: nn.Module, x: Tensor, y: Tensor, seed: int, samples: int = 128
) -> Margin:
    """Attack a classifier, certify it and add noise.

    Args:
        data: whose range is the unit of radii.
        model: the classifier, in evaluation mode.
        x: inputs, floating; the first ones are attacked and certified.
        y: labels.
        seed: of everything random.
        samples: how many to attack and certify, at most.

    Returns:
        How far its inputs may be moved.

    Raises:
        DataError: all inputs are one number.
    """
    low, high = _range(data)
    width = high - low
    if not width > 0:
        raise DataError(f"every entry of the inputs is {low:g}: there is no range to measure radii in")
    few, labels = x[:samples], y[:samples]
    suite = _affordable(model, few)
    attacked, attacks, doubts = _curve(model, few, labels, (low, high), suite, seed)
    at = 1 + _RADII.index(HEADLINE)
    radii, constant, uncertified = _certificate(model, few, labels, width)
    noisy = [_noisy(model, x, y, s * width, (low, high), seed) for s in _NOISE]
    everywhere = (0.0, *_RADII)
    return Margin(
        samples=len(few),
        low=low,
        high=high,
        eps=HEADLINE,
        robust=attacked[at],
        robust_error=_error(attacked[at], len(few)),
        radii=everywhere,
        attacked=attacked,
        attacked_error=[_error(share, len(few)) for share in attacked],
        attacks=attacks,
        half=_crossing(everywhere, attacked, attacked[0] / 2),
        doubts=doubts,
        certified=[] if radii is None else radii.sort().values.tolist(),
        certified_share=None if radii is None else float((radii > HEADLINE).double().mean()),
        median_certified=None if radii is None else float(radii.median()),
        lipschitz=constant,
        noise=_NOISE,
        noisy=noisy,
        noisy_error=[_error(share, len(x)) for share in noisy],
        uncertified=uncertified,
        uneven=_unevenness(data, width),
    )


def _range(data: Dataset) -> tuple[float, float]:
    parts = [part for part in (data.train_x, data.test_x) if part.numel()]
    return min(float(part.min()) for part in parts), max(float(part.max()) for part in parts)


def _unevenness(data: Dataset, width: float) -> float | None:
    x = data.train_x
    return float((x.amax(0) - x.amin(0)).median()) / width if x.ndim == 2 else None


def logits_of(model: nn.Module, x: Tensor) -> Any:
    """Outputs for all inputs, without a graph; for outputs that are no tensors, those for the first inputs."""
    with torch.no_grad():
        parts = [model(part) for part in x.split(_CHUNK)]
    return torch.cat(parts) if all(isinstance(part, Tensor) for part in parts) else parts[0]


def _affordable(model: nn.Module, x: Tensor) -> tuple[tuple[str, ...], int, int] | str:
    """The strongest part of the independent suite within the budget, or why there is none."""
    if find_spec("pyautoattack") is None:
        return "the independent suite is not installed: pip install 'bolza[attacks]'"
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    layers = sum(1 for part in model.modules() if next(part.children(), None) is None)
    weights = sum(p.numel() for p in model.parameters())
    once = 3 * max(counter.get_total_flops(), 2 * weights * len(x)) / 2e10 + 6e-5 * layers + 2e-3
    if x.is_cuda:
        once /= 20
    for names, steps, queries, passes in _SUITES:
        if passes * once <= _BUDGET:
            return names, steps, queries
    return "the independent suite would take too long here: bolza.robust.robust_accuracy runs it"


def _curve(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    clip: tuple[float, float],
    suite: tuple[tuple[str, ...], int, int] | str,
    seed: int,
) -> tuple[list[float], list[str], list[str]]:
    """Accuracy at zero and the radii, what broke in a smaller ball being broken; attacks; doubts."""
    left = torch.arange(len(x), device=x.device)[logits_of(model, x).argmax(1) == y]
    attacked, doubts = [len(left) / len(x)], []
    attacks = ["pgd"]
    if isinstance(suite, str):
        doubts.append(f"Gradient ascent alone, which finds less than other attacks: {suite}.")
    for radius in _RADII:
        asked: dict[str, Any] = {"attack": "pgd"}
        if radius == HEADLINE and not isinstance(suite, str):
            names, steps, queries = suite
            asked = {"attack": names, "suite_steps": steps, "queries": queries}
            attacks += names
        if len(left):
            found = robust_accuracy(
                model, x[left], y[left], radius * (clip[1] - clip[0]),
                clip=clip, steps=20, restarts=1, seed=seed, **asked,
            )  # fmt: skip
            left = left[~found.broken]
            doubts += [note for note in found.notes if note not in doubts][:1]
        attacked.append(len(left) / len(x))
    return attacked, attacks, doubts[:3]


def _certificate(
    model: nn.Module, x: Tensor, y: Tensor, width: float
) -> tuple[Tensor | None, float | None, str]:
    """Certified radii in the largest entry, shares of the range: the better of intervals and Lipschitz margin.

    With them the Lipschitz constant, or the reason why there is nothing.
    """
    found: list[Tensor] = []
    reason, constant = "", None
    try:
        wide = any(isinstance(part, nn.modules.conv._ConvNd) for part in model.modules())
        bound = lipschitz(model, x[:16], "product" if wide else "closed", samples=16)
        constant = bound.bound
        euclidean = certified_radius(model, x, y, norm="l2", bound=bound).radius
        found.append(euclidean.cpu() / math.sqrt(x[0].numel()))
    except (BolzaError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    try:
        found.append(certified_radius(model, x, y, norm="linf").radius.cpu())
    except (BolzaError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return (torch.stack(found).amax(0) / width, constant, "") if found else (None, None, reason)


def _noisy(
    model: nn.Module, x: Tensor, y: Tensor, spread: float, clip: tuple[float, float], seed: int
) -> float:
    generator = torch.Generator().manual_seed(seed)
    right = 0.0
    for _ in range(_DRAWS):
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
        right += float((logits_of(model, (x + spread * noise).clamp(*clip)).argmax(1) == y).double().mean())
    return right / _DRAWS


def _error(share: float, count: int) -> float:
    return math.sqrt(max(share * (1 - share), 0.25 / count) / count)


def _crossing(radii: Sequence[float], shares: Sequence[float], level: float) -> float | None:
    """Where a curve that does not increase reaches a level, by straight lines."""
    for i in range(1, len(radii)):
        if shares[i] <= level:
            fall = shares[i - 1] - shares[i]
            return radii[i - 1] + (radii[i] - radii[i - 1]) * (shares[i - 1] - level) / fall
    return None


def margin_findings(m: Margin, accuracy: float) -> list[Finding]:
    """What is known of how far inputs may be moved.

    Args:
        m: of `measure_margin`.
        accuracy: of all samples, undisturbed.
    """
    width, clip = m.high - m.low, f"({_code(m.low)}, {_code(m.high)})"
    clean, ball = m.attacked[0], f"{percent(m.eps)} of the range of the data"
    kept = m.robust / clean if clean > 0 else 0.0
    verdict: Verdict = "good" if kept >= 0.9 else "warn" if kept >= 0.5 else "bad"
    about = f"eps={_code(m.eps * width)}, clip={clip}"
    cure = "" if verdict == "good" else (
        f"Train on the worst inputs: bolza.robust.pgd_training(model, loss, x, y, {about}) in place of "
        "loss.backward(); yopo(…) does it with fewer passes, trades(…, beta=6) sets the price in clean accuracy. It "
        "costs some clean accuracy."
    )  # fmt: skip
    out = [
        Finding(
            "hold.robust_accuracy",
            "accuracy under attack",
            m.robust,
            m.robust_error,
            verdict,
            f"{percent(clean)} of {m.samples} samples unmoved, {percent(m.robust)} when entries may move by {ball} ("
            f"{number(m.eps * width)}). Strongest of {', '.join(m.attacks)}; an upper bound: what was not broken "
            "may still break.",
            cure,
        )
    ]
    if m.half is not None:
        out.append(
            Finding(
                "hold.half_radius",
                "radius that halves the accuracy",
                m.half,
                None,
                "info",
                f"Half of the right answers are lost when entries may move by {percent(m.half)} of the range.",
            )
        )
    out.append(_certified_finding(m))
    out.append(_noise_finding(m, accuracy))
    if m.doubts:
        out.append(
            Finding(
                "hold.doubts",
                "doubts about the attack",
                len(m.doubts),
                None,
                "warn",
                " ".join(f"{d[:1].upper()}{d[1:].rstrip('.')}." for d in m.doubts),
            )
        )
    if m.uneven is not None and m.uneven < 0.05:
        out.append(
            Finding(
                "hold.scale",
                "range of the median feature",
                m.uneven,
                None,
                "warn",
                "Most features vary far less than the widest: a radius that is small for one is large for another.",
                "Standardise the features before you read these radii.",
            )
        )
    return out


def _certified_finding(m: Margin) -> Finding:
    name = "certified radius, median"
    if m.median_certified is None:
        return Finding(
            "hold.certified_radius",
            name,
            None,
            None,
            "info",
            f"{m.uncertified[:1].upper()}{m.uncertified[1:]}.",
        )
    bound = (
        "" if m.lipschitz is None else f" The logits have a Lipschitz constant below {number(m.lipschitz)}."
    )
    text = (
        f"Share of the range within which no attack can change the class of half of the samples; "
        f"{percent(m.certified_share)} are certified at {percent(m.eps)}. A lower bound, by intervals or Lipschitz "
        f"margin, and loose for networks that were not trained for it.{bound}"
    )
    return Finding("hold.certified_radius", name, m.median_certified, None, "info", text)


def _noise_finding(m: Margin, accuracy: float) -> Finding:
    at = m.noise.index(_HEADLINE_NOISE)
    value, error = m.noisy[at], m.noisy_error[at]
    lost = accuracy - value
    verdict: Verdict = "bad" if value < accuracy / 2 else "warn" if lost > 0.05 + 2 * error else "good"
    cure = "" if verdict == "good" else (
        "Add such noise in training, or, where it may not be trained again, correct its hidden states: "
        "bolza.robust.SelfHealing(model).fit(x). That may help against noise, not against an attacker who knows of it; "
        f"its report(x, y, eps={_code(m.eps * (m.high - m.low))}) measures both."
    )  # fmt: skip
    worst = plus_minus(100 * m.noisy[-1], 100 * m.noisy_error[-1], "%")
    text = (
        f"With Gaussian noise of {percent(_HEADLINE_NOISE)} of the range on every entry; undisturbed "
        f"{percent(accuracy)}, at {percent(m.noise[-1])} of the range {worst}."
    )
    return Finding("hold.noise", "accuracy in noise", value, error, verdict, text, cure)


def _code(value: float) -> str:
    return f"{value:.3g}"
