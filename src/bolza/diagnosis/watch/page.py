"""A watched run as a document: what happened in words, four strips of the run, the readings, and the cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bolza.diagnosis.watch.figure import strips
from bolza.diagnosis.watch.record import Event, WatchRecord
from bolza.report import Cell, Document, Part, Section, Table, Text, Tile, Tiles, number, percent, plus_minus

__all__ = ["document", "summary"]

_NAMES = {
    "unstable": "unstable",
    "edge": "at the edge of stability",
    "plateau": "level in its loss",
    "stationary": "stationary",
    "heavy-tailed": "heavy-tailed",
    "loops": "moving in loops",
}


def summary(record: WatchRecord) -> str:
    """The run in a few sentences.

    Args:
        record: of the run.
    """
    if not record.events:
        return f"In {record.steps} steps nothing called for action."
    lasting = [e for e in record.events if e.lasts]
    past = [e for e in record.events if not e.lasts]
    out = []
    if lasting:
        out.append(f"After {record.steps} steps the run is {_joined([_since(e) for e in lasting])}.")
    if past:
        told = _joined([f"{_NAMES[e.kind]} from step {e.step} to {e.until}" for e in past[-3:]])
        more = f" (and {len(past) - 3} times before)" if len(past) > 3 else ""
        out.append(f"It was {told}{more}.")
    return " ".join(out)


def document(record: WatchRecord) -> Document:
    """Build the document.

    Args:
        record: of the run.

    Returns:
        A document for terminal and page.
    """
    parts: list[Part] = []
    tiles = _tiles(record)
    if tiles:
        parts.append(Tiles(tiles))
    if record.events:
        rows = [
            [
                str(e.step) if e.lasts else f"{e.step} – {e.until}",
                Cell(_NAMES[e.kind], e.verdict),
                Cell(e.text, note=f"→ {e.remedy}" if e.remedy else ""),
            ]
            for e in record.events
        ]
        parts.append(
            Section("What happened", [Table("", ["step", "the run is", "why, and what to do"], rows)])
        )
    picture = strips(record)
    if picture is not None:
        parts.append(Section("The run", [picture]))
    if any(record.readings.values()):
        parts.append(Section("Last readings", [_readings(record)]))
    if record.unavailable:
        said = "\n\n".join(f"{name}: {why}" for name, why in record.unavailable.items())
        parts.append(Text(said, title="Not told", tone="info"))
    parts.append(Section("What it cost", [_costs(record)], _cost_in_words(record)))
    settings = record.settings
    footer = ""
    if settings:
        footer = (
            f"{settings['optimizer']}, {settings['parameters']} parameters, {settings['samples']} samples a probe, "
            f"seed {settings['seed']}; ± is one standard error. A false alarm of each kind has probability "
            f"{settings['level']:g} in the whole run; a stationary run is called so in 95 % of the looks."
        )
    return Document("A run, watched", summary(record), parts, footer)


def _since(e: Event) -> str:
    return f"{_NAMES[e.kind]} (since step {e.step})"


def _joined(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _last(record: WatchRecord, name: str) -> Mapping[str, Any] | None:
    rows = record.readings.get(name) or []
    return rows[-1] if rows else None


def _tiles(record: WatchRecord) -> list[Tile]:
    tiles = []
    bad = next((e for e in record.events if e.kind == "unstable"), None)
    rest = record.lasting("stationary")
    if bad is not None:
        tiles.append(Tile("Stability", "unstable", f"from step {bad.step}", "bad"))
    elif rest is not None:
        tiles.append(Tile("State", "stationary", f"since step {rest.step}", "good"))
    sharp = _last(record, "sharpness")
    if sharp is not None and sharp["fraction"] is not None:
        tone: Any = "bad" if sharp["fraction"] > 1.1 else "warn" if sharp["fraction"] > 0.9 else "good"
        tiles.append(Tile("Sharpness / limit", number(sharp["fraction"], 2), "stable below 1", tone))
    noise = _last(record, "noise")
    if noise is not None and noise.get("batch_snr") is not None:
        value = noise["batch_snr"]
        side = "drift leads" if value > 1 else "noise leads"
        tiles.append(Tile("Signal / noise of a step", number(value, 2), side))
    tiles.append(Tile("Cost of watching", percent(record.costs.get("share")), _allowed(record)))
    return tiles


def _allowed(record: WatchRecord) -> str:
    budget = record.costs.get("budget")
    return "at fixed steps" if budget is None else f"budget {percent(budget)}"


def _readings(record: WatchRecord) -> Table:
    rows: list[list[Any]] = []
    sharp = _last(record, "sharpness")
    if sharp is not None:
        bound = sharp["bound"]
        rows.append(
            [
                sharp["step"],
                "sharpness λ",
                plus_minus(sharp["value"], sharp["error"]),
                "largest curvature of the loss"
                + ("" if bound is None else f"; stable below {number(bound)}"),
            ]
        )
    noise = _last(record, "noise")
    if noise is not None:
        at = noise["step"]
        rows.append(
            [at, "gradient noise tr Σ", plus_minus(noise["trace"], noise["trace_error"]), "of one sample"]
        )
        scale, error = noise["scale"], noise["scale_error"]
        known = scale is not None and error is not None and math.isfinite(scale) and error < scale
        rows.append(
            [
                at,
                "noise scale",
                plus_minus(noise["scale"], noise["scale_error"], "samples") if known else "not known",
                "batches below it average noise, batches above it waste samples"
                if known
                else "the gradient cannot be told from noise on these samples",
            ]
        )
        if noise.get("temperature") is not None:
            rows.append(
                [
                    at,
                    "temperature lr/2B(1−μ)",
                    number(noise["temperature"]),
                    "lower rate or larger batch: colder",
                ]
            )
            rows.append(
                [
                    at,
                    "excess loss of the noise",
                    number(noise["excess_loss"]),
                    "what the noise adds to the loss at rest: the most that a rate of zero can gain",
                ]
            )
    tails = _last(record, "tails")
    if tails is not None:
        rows.append(
            [
                tails["step"],
                "tail index",
                plus_minus(tails["index"], tails["error"]),
                f"{tails['verdict']}; Gaussian noise of this covariance reads {number(tails['surrogate'])}",
            ]
        )
    drift = _last(record, "drift")
    if drift is not None:
        of_loss = "" if drift["z_loss"] is None else f", of the loss {number(drift['z_loss'], 2)}"
        rows.append(
            [
                drift["step"],
                "drift of ‖θ‖²",
                f"{number(drift['z_norm'], 2)} σ",
                f"since step {drift['since']}{of_loss}; at rest within ±{number(drift['limit'], 2)}",
            ]
        )
        sides = drift.get("balance")
        if sides is not None:
            value = plus_minus(sides["gain"], sides["gain_error"])
            noise_side = plus_minus(sides["noise"], sides["noise_error"])
            rows.append([drift["step"], "θ·∇f", value, f"(lr/2)(1+μ)‖v‖² = {noise_side}; equal at rest"])
    loops = _last(record, "loops")
    if loops is not None:
        rows.append(
            [loops["step"], "area swept", f"{number(loops['z'], 2)} σ", f"p = {number(loops['p_value'], 2)}"]
        )
    return Table(
        "", ["step", "reading", "value", "what it says"], rows, align=["right", "left", "left", "left"]
    )


def _costs(record: WatchRecord) -> Table:
    costs = record.costs
    trained = costs["training"]
    rows = [
        [
            name,
            costs.get("runs", {}).get(name, 0),
            number(seconds),
            percent(seconds / trained if trained else None),
        ]
        for name, seconds in costs.get("spent", {}).items()
    ]
    rows += [
        [f"{name}, asked for", 1, number(s), "not counted"] for name, s in costs.get("beyond", {}).items()
    ]
    return Table(
        "", ["work", "times", "seconds", "of training"], rows, align=["left", "right", "right", "right"]
    )


def _cost_in_words(record: WatchRecord) -> str:
    costs = record.costs
    lead = f"Watching took {percent(costs['share'])} of {number(costs['training'])} s of training"
    budget = costs.get("budget")
    if budget is None:
        return f"{lead}, at fixed steps."
    over = " (a first reading cost more than could be known)" if costs["share"] > budget else ""
    stride = costs.get("stride", 1)
    often = "every step was noted" if stride == 1 else f"one step in {stride} was noted"
    kept = (
        "30 % of that are kept for what cannot be timed from inside, such as caches that are cold afterwards"
    )
    return f"{lead}, of {percent(budget)} allowed{over}; {kept}. {often[0].upper()}{often[1:]}."
