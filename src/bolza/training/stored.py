"""What a checkpoint of a run is checked for before the run goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from bolza.training.run import Run

__all__ = ["checked_record", "is_setting", "kind_of", "upgraded"]

_FORMS = ("foreach", "fused", "capturable")  # ways to compute one update, free to differ after a resume


def is_setting(name: str, value: object) -> bool:
    """Whether a default of an optimizer must be the same when its run goes on."""
    return name not in _FORMS and (value is None or isinstance(value, bool | int | float | str | tuple))


def kind_of(controller: object) -> str:
    """Class of a controller, with that of the policy that it wears."""
    policy = getattr(controller, "policy", None)
    return type(controller).__name__ + (f" of {type(policy).__name__}" if policy is not None else "")


def checked_record(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """The stored curves and counts, if each is of its own type."""
    for name, value in asdict(Run()).items():
        if value is not None and type(stored[name]) is not type(value):
            raise TypeError(f"its {name} is a {type(stored[name]).__name__}")
    return stored


def upgraded(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state in today's form: one from before batches could change size counted its place in batches."""
    run, order = state["run"], state["order"]
    if "samples" in run:
        return state
    size = run["batch_size"]
    run = {"samples": run["gradients"] * size, "control_steps": [], "controls": {}, **run}
    order = {**order, "position": order["position"] * size, "drawn": run["step"] * size, "batch_size": size}
    return {**state, "run": run, "order": order}
