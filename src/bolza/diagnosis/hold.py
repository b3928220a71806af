"""Will it hold? Accuracy under attack, with certificates, in noise; and whether its confidence can be trusted.

Asked of a trained classifier, in evaluation mode, on samples held out.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bolza.diagnosis.confidence import Confidence, at_chance, confidence_findings, measure_confidence
from bolza.diagnosis.margin import Margin, logits_of, margin_findings, measure_margin
from bolza.diagnosis.problem import Problem
from bolza.diagnosis.record import Finding
from bolza.ops.errors import BolzaError, DataError, DivergenceError, ShapeError, UnsupportedError
from bolza.ops.replay import differentiable_kernels
from bolza.report import percent

__all__ = ["Hold", "findings", "measure_hold"]

_JUDGED = 1000  # samples, or tokens
_ATTACKED = 128


@dataclass(frozen=True)
class Hold:
    """What holds of a trained network.

    Args:
        which: which network was asked, in words.
        samples: samples that accuracy and confidence were measured on; for language, tokens.
        held_out: whether they are the test part of the data.
        accuracy: share of right answers.
        accuracy_error: its standard error.
        chance: share of the most frequent label.
        confidence: whether its probabilities can be trusted; None at chance.
        margin: how far inputs may be moved; None at chance, and where it could not be measured.
        refused: why ``margin`` could not be measured; else empty.
    """

    which: str
    samples: int
    held_out: bool
    accuracy: float
    accuracy_error: float
    chance: float
    confidence: Confidence | None = None
    margin: Margin | None = None
    refused: str = ""


def measure_hold(
    problem: Problem, model: nn.Module | None = None, which: str = "by the network as given"
) -> Hold:
    """Attack a trained network, certify it, add noise and weigh its confidence.

    Args:
        problem: the data; its pristine model is asked where none is given.
        model: the trained network; it stays as it is.
        which: what it is, in words.

    Returns:
        What holds; where accuracy is at chance, that alone.

    Raises:
        DivergenceError: outputs are not finite.
        ShapeError: outputs are not one logit a class.
        UnsupportedError: the task is a regression.
    """
    if problem.task == "regression":
        raise UnsupportedError(
            "whether a result holds is asked of classifiers; for values there is no class to keep: see "
            "bolza.stability.lipschitz for how far outputs can move, and bolza.bayes.predict for error bars"
        )
    asked = copy.deepcopy(problem.pristine if model is None else model).to(problem.x.device).eval()
    for part in asked.modules():
        if isinstance(part, nn.RNNBase):  # cuDNN has their backward pass in training mode only
            part.dropout = 0.0
            part.train()
    x, y, held_out = _samples(problem)
    with differentiable_kernels(asked):
        out = logits_of(asked, x)
        _check_outputs(out, y)
        flat, labels = out.reshape(-1, out.shape[-1]), y.flatten()
        right = (flat.argmax(1) == labels).double()
        accuracy = float(right.mean())
        error = math.sqrt(max(accuracy * (1 - accuracy), 0.25 / len(right)) / len(right))
        chance = float(labels.bincount().max()) / len(labels)
        facts: dict[str, Any] = {
            "which": which,
            "samples": len(labels),
            "held_out": held_out,
            "accuracy": accuracy,
            "accuracy_error": error,
            "chance": chance,
        }
        if at_chance(accuracy, error, chance):
            return Hold(**facts)
        facts["confidence"] = measure_confidence(flat, labels, problem.seed)
        if problem.task == "language" or not x.is_floating_point():
            refused = (
                "The inputs are whole numbers, such as tokens, and cannot be moved a little: neither attack nor noise "
                "nor certificate applies; ask the part of the network behind the embedding."
            )
            return Hold(**facts, refused=refused)
        try:
            facts["margin"] = measure_margin(
                problem.dataset, asked, x, y, problem.seed, min(_ATTACKED, len(problem.x))
            )
        except (BolzaError, RuntimeError, NotImplementedError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            facts["refused"] = f"{first[:1].upper()}{first[1:].rstrip('.')}."
    return Hold(**facts)


def _samples(problem: Problem) -> tuple[Tensor, Tensor, bool]:
    """A random part of the samples held out, or of all samples where none are, always the same for one seed."""
    data = problem.dataset
    held_out = len(data.test_y) >= 2
    x, y = (data.test_x, data.test_y) if held_out else (data.train_x, data.train_y)
    count = max(_JUDGED // max(y[0].numel(), 1), 8)  # of sequences, fewer
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(problem.seed))[:count]
    x, y = x[chosen.to(x.device)], y[chosen.to(y.device)]  # in any order: the first ones are attacked
    return x.to(problem.x.device), y.to(problem.x.device), held_out


def _check_outputs(out: Any, y: Tensor) -> None:
    if not isinstance(out, Tensor) or tuple(out.shape[:-1]) != tuple(y.shape) or out.shape[-1] < 2:
        what = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise ShapeError(
            f"the model returns {what} for {tuple(y.shape)} labels: whether it holds is asked of one logit a class; "
            "of one logit z make two with torch.cat([-z / 2, z / 2], 1)"
        )
    if not bool(torch.isfinite(out).all()):
        raise DivergenceError("outputs of the network are not finite: there is nothing to hold")
    if int(y.max()) >= out.shape[-1]:
        raise DataError(f"there is a label {int(y.max())}, but the model has {out.shape[-1]} outputs")


def findings(facts: Hold) -> list[Finding]:
    """What the result is worth outside of the test set.

    Args:
        facts: of `measure_hold`.
    """
    where = "held-out" if facts.held_out else "given"
    lost = at_chance(facts.accuracy, facts.accuracy_error, facts.chance)
    text = f"Of {facts.samples} {where} labels, {facts.which}; the most frequent label is {percent(facts.chance)}."
    if not facts.held_out:
        text += " Whether it was trained on them is not known: held-out data gives the honest number."
    out = [
        Finding(
            "hold.accuracy",
            "accuracy, undisturbed",
            facts.accuracy,
            facts.accuracy_error,
            "bad" if lost else "info",
            f"{text[:-1]}: this is chance, and there is nothing to hold."
            if lost and facts.held_out
            else f"{text} At chance there is nothing to hold."
            if lost
            else text,
            "Ask a trained network: train=True (--train) trains this one first." if lost else "",
        )  # fmt: skip
    ]
    if lost:
        return out
    if facts.margin is not None:
        out += margin_findings(facts.margin, facts.accuracy)
    elif facts.refused:
        out.append(
            Finding("hold.robust_accuracy", "accuracy under attack", None, None, "info", facts.refused)
        )
    return out + (confidence_findings(facts.confidence) if facts.confidence is not None else [])
