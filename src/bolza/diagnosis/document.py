"""A diagnosis as a document: the answer first, then the four questions with their numbers and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bolza.diagnosis import figures
from bolza.diagnosis.hold_figure import hold as hold_figure
from bolza.diagnosis.record import Diagnosis, Finding
from bolza.diagnosis.trial import did_not_help
from bolza.report import (
    Cell,
    Document,
    Figure,
    Part,
    Section,
    Table,
    Tile,
    Tiles,
    number,
    percent,
    plus_minus,
)

__all__ = ["document"]

_TITLES = {
    "structure": "What stands out in the network",
    "propagation": "Can signal and gradient get through?",
    "landscape": "How steep is the loss?",
    "noise": "How noisy is the gradient?",
    "dynamics": "What will the noise do?",
    "prescription": "What to change",
    "training": "Does it work?",
    "hold": "Will it hold?",
}


def document(d: Diagnosis) -> Document:
    """Build the document.

    Args:
        d: the diagnosis.

    Returns:
        A document for terminal and page.
    """
    facts, treated = d.facts, d.treated
    pictures: dict[str, list[Figure | None]] = {
        "propagation": [
            figures.signal(_part(facts), _part(treated)),
            figures.gradient(_part(facts), _part(treated)),
            figures.phase(_with_diagram(facts), _part(treated)),
        ],
        "landscape": [figures.spectra(facts, treated)],
        "noise": [figures.noise(facts.get("noise") or {}, treated.get("noise"))],
        "training": [figures.training(d.training), figures.course(d.training)] if d.training else [],
        "hold": [hold_figure(facts["hold"])] if facts.get("hold") else [],
    }
    parts: list[Part] = [Tiles(_tiles(d))]
    for question, title in _TITLES.items():
        found = [f for f in d.findings if f.question == question]
        shown: list[Part] = [_table(question, found)] if found else []
        shown += [picture for picture in pictures.get(question, []) if picture is not None]
        if question == "propagation" and (layers := _layers(_part(facts))) is not None:
            shown.append(layers)
        if shown:
            parts.append(Section(title, shown, _lead(question, d)))
    subject = d.subject
    versions = subject["versions"]
    footer = (
        f"{subject['samples']} of {subject['training_samples']} training samples, seed {subject['seed']}, "
        f"{subject['dtype']} on {subject['device']}; ± is one standard error or, for eigenvalues, the error of "
        "the iteration.\n"
        f"bolza {versions['bolza']}, torch {versions['torch']}, Python {versions['python']}; "
        f"signs: ✓ good, ! attention, ✗ problem, · note."
    )
    depth = len(_part(facts).get("layers") or [])
    size = f" ({depth} layers)" if depth else ""
    return Document(f"Diagnosis of {subject['model']}{size} on {subject['data']}", summary(d), parts, footer)


def summary(d: Diagnosis) -> str:
    """The diagnosis in two or three sentences."""
    bad = [f for f in d.findings if f.verdict == "bad" and f.question == "propagation"]
    out = []
    if bad:
        ratio = next((f for f in bad if f.key == "propagation.gradient_ratio"), None)
        merged = next((f for f in bad if f.key == "propagation.correlation"), None)
        phase = next((f for f in d.findings if f.key == "propagation.phase"), None)
        where = f" It starts in the {phase.value} phase." if phase and phase.value != "critical" else ""
        lead = ratio or merged or bad[0]
        out.append(f"This network will not train as it is: {_lower(lead.text)}{where}")
    elif "propagation.unavailable" in d:
        out.append("How signal and gradient travel could not be measured.")
    elif any(f.verdict == "warn" for f in d.findings if f.question == "propagation"):
        out.append("Signal and gradient get through, with losses.")
    else:
        out.append("Signal and gradient get through this network.")
    p = d.prescription
    if p is not None:
        steps = []
        if p.initialisation.value is not None:
            steps.append("a critical initialisation")
        if p.learning_rate.value is not None:
            steps.append(f"learning rate {number(p.learning_rate.value, 2)} with momentum {p.momentum:g}")
        steps.append(f"batches of {p.batch_size.value}")
        out.append(f"Prescribed: {_join(steps)}.")
    t = d.training
    if t and "before" in t and "after" in t:
        a, b = t["before"].metrics, t["after"].metrics
        if a.get("test_accuracy") is not None and b.get("test_accuracy") is not None:
            out.append(
                f"In {t['after'].steps} steps test accuracy is {percent(a['test_accuracy'])} before and "
                f"{percent(b['test_accuracy'])} after."
            )
        elif a.get("test_r2") is not None and b.get("test_r2") is not None:
            out.append(f"R² on test data is {number(a['test_r2'])} before and {number(b['test_r2'])} after.")
        else:
            out.append(
                f"Test loss is {number(a.get('test_loss'))} before and {number(b.get('test_loss'))} after."
            )
        if did_not_help(t):
            out.append("The prescription did not help here: keep your own setting.")
    elif t:
        out.append("The trial was interrupted; what was computed is below.")
    if "hold.accuracy" in d and d["hold.accuracy"].verdict == "bad":
        out.append("Whether it holds cannot be said: it is at chance.")
    elif "hold.robust_accuracy" in d and d["hold.robust_accuracy"].value is not None:
        margin = d.facts["hold"]["margin"]
        words = {"good": "It holds", "warn": "It holds in part"}.get(
            d["hold.robust_accuracy"].verdict, "It does not hold"
        )
        out.append(
            f"{words}: when inputs may move by {percent(margin['eps'])} of their range, accuracy goes from "
            f"{percent(margin['attacked'][0])} to {percent(margin['robust'])}."
        )
    return " ".join(out)


def _tiles(d: Diagnosis) -> Sequence[Tile]:
    tiles = []
    depth = len(_part(d.facts).get("layers") or [])
    if "propagation.phase" in d:
        f, chi = d["propagation.phase"], d["propagation.chi_1"]
        tiles.append(Tile("Phase", str(f.value), f"χ₁ = {number(_float(chi.value))} per layer", f.verdict))
    if "propagation.trainable_depth" in d:
        f = d["propagation.trainable_depth"]
        tiles.append(
            Tile(
                "Trainable depth",
                f"{number(_float(f.value), 2)} layers",
                f"this network has {depth}",
                f.verdict,
            )
        )
    elif "propagation.gradient_ratio" in d:
        f = d["propagation.gradient_ratio"]
        tiles.append(
            Tile("Gradient, first / last layer", number(_float(f.value)), f"over {depth} layers", f.verdict)
        )
    if d.prescription is not None and d.prescription.learning_rate.value is not None:
        p = d.prescription
        tiles.append(
            Tile(
                "Learning rate",
                number(p.learning_rate.value, 2),
                f"SGD, momentum {p.momentum:g}, batch {p.batch_size.value}",
            )
        )
    for key, label in (("before", "Test accuracy before"), ("after", "Test accuracy after")):
        trial = (d.training or {}).get(key)
        if trial is None:
            continue
        tone = d[f"training.{key}"].verdict if f"training.{key}" in d else "info"
        if trial.metrics.get("test_accuracy") is not None:
            tiles.append(
                Tile(
                    label,
                    percent(trial.metrics["test_accuracy"]),
                    f"{trial.steps} steps",
                    "" if tone == "info" else tone,
                )
            )
        elif trial.metrics.get("test_r2") is not None:
            tiles.append(
                Tile(
                    label.replace("Test accuracy", "Test R²"),
                    number(trial.metrics["test_r2"]),
                    f"{trial.steps} steps",
                )
            )
        else:
            tiles.append(
                Tile(
                    label.replace("accuracy", "loss"),
                    number(trial.metrics.get("test_loss")),
                    f"{trial.steps} steps",
                )
            )
    if "hold.robust_accuracy" in d and isinstance(value := d["hold.robust_accuracy"].value, float):
        f, margin = d["hold.robust_accuracy"], d.facts["hold"]["margin"]
        tiles.append(
            Tile(
                "Accuracy under attack",
                percent(value),
                f"within {percent(margin['eps'])} of the range",
                f.verdict,
            )
        )
    return tiles


def _lead(question: str, d: Diagnosis) -> str:
    if question == "propagation":
        return (
            "Each layer is measured on the batch, by a forward and a backward pass, and compared with what "
            "mean-field theory "
            "predicts for random weights of the same variance."
        )
    if question == "landscape":
        return "The largest curvature of the loss limits the learning rate."
    if question == "noise":
        return "The gradient of a batch is the true one plus noise; their ratio says how large a batch pays."
    if question == "dynamics":
        return (
            "Predicted from curvature and noise of the network that is to be trained, at the prescribed settings: what "
            "SGD would do in a valley like this one. 'bolza watch' measures it along the run."
        )
    if question == "hold" and d.facts.get("hold"):
        return (
            "Asked of one trained network: how far its inputs may be moved by an adversary and by noise, in units of "
            "the range of the data, and whether its probabilities are true."
        )
    if question == "training" and d.training:
        first = next(iter(d.training.values()))
        return (
            f"All runs: {first.steps} steps, batches of {first.batch_size}, the same order of the data, SGD "
            "with momentum, "
            "learning rate falling linearly to zero."
        )
    return ""


def _table(question: str, found: Sequence[Finding]) -> Table:
    if question == "prescription":
        rows = [[f.name, f.display, Cell(f.text, note=f.remedy)] for f in found]
        return Table("", ["setting", "value", "why"], rows, align=["left", "left", "left"])
    rows = [
        [Cell("", f.verdict), f.name, f.display, Cell(f.text, note=f"→ {f.remedy}" if f.remedy else "")]
        for f in found
    ]
    return Table("", ["", "finding", "value", "what it says"], rows, align=["left", "left", "left", "left"])


def _layers(facts: Mapping[str, Any]) -> Table | None:
    rows = facts.get("layers")
    if not rows:
        return None
    return Table(
        "Layer by layer",
        ["layer", "kind", "variance q", "theory", "correlation c", "theory", "gradient norm", "theory"],
        [
            [
                row["name"],
                row["kind"],
                plus_minus(row["q"], row["q_error"]),
                _predicted(row, "q"),
                plus_minus(row["c"], row["c_error"]),
                _predicted(row, "c"),
                plus_minus(row["gradient"], row["gradient_error"]),
                _predicted(row, "gradient"),
            ]
            for row in rows
        ],
        align=["left", "left", "right", "right", "right", "right", "right", "right"],
        fold=0,
    )


def _predicted(row: Mapping[str, Any], name: str) -> str:
    return "measured only" if row["source"] == "measured" else number(row[f"{name}_theory"])


def _part(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    return facts.get("propagation") or {}


def _with_diagram(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**_part(facts), "phase_diagram": facts.get("phase_diagram")}


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else float("inf") if value is None else None


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
