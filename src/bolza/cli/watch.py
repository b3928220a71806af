"""``bolza watch``: train, and say what the noise of the run does."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from bolza.cli.train import carry_out, train

if TYPE_CHECKING:
    from torch import nn

    from bolza.data import Dataset
    from bolza.diagnosis import Watch
    from bolza.report import Document
    from bolza.training import Run

__all__ = ["watch"]

_PANEL = "Watching"


def watch(**options: Any) -> None:
    r"""Train a network like 'bolza train', and say when the run is stationary, unstable, heavy-tailed or in loops.

    Beside the curves it shows the sharpness and its limit, the signal and the noise of a step, the temperature, the
    drift of the weights and the tails of the noise, with what to do. Watching changes nothing in the run.

    \b
    bolza watch                                   digits, at most 10 % of the training time
    bolza watch --lr 2 --steps 1000 --every 50    a reading every 50 steps, whatever it costs
    bolza watch --model my_net:make --data my_data:load --html run.html
    """
    carry_out(
        options, _Watcher(options.pop("budget"), options.pop("every"), options["batch"], options["seed"])
    )


class _Watcher:
    """A `Watch` made when the optimizer is, and its part in the report."""

    def __init__(self, budget: float, every: int | None, batch: int, seed: int) -> None:
        self._budget, self._every, self._batch, self._seed = budget, every, batch, seed
        self._watch: Watch | None = None
        self._told = 0

    def of(self, model: nn.Module, loss: Any, data: Dataset) -> Callable[[Any, int], Watch]:
        def make(optimizer: Any, steps: int) -> Watch:
            from bolza.diagnosis import Watch

            self._watch = Watch(
                model,
                loss,
                data,
                optimizer,
                batch_size=min(self._batch, len(data)),
                budget=self._budget,
                every=self._every,
                seed=self._seed,
            )
            return self._watch

        return make

    def news(self) -> list[str]:
        events = () if self._watch is None else self._watch.events
        fresh, self._told = events[self._told :], len(events)
        return [f"step {event.step}: {event.text}" for event in fresh]

    def joined(self, run: Run, document: Document, record: dict[str, Any]) -> tuple[Document, dict[str, Any]]:
        from dataclasses import replace

        from bolza.report import Section

        assert self._watch is not None
        if run.status != "diverged":
            self._watch.measure()  # a short run leaves no room for readings
        seen = self._watch.record()
        page = seen.document()
        parts = [*page.parts, Section("Training", document.parts, document.summary)]
        joined = replace(page, summary=f"{page.summary} Training {document.summary}", parts=parts)
        return joined, {**record, "schema": "bolza.watch/1", "watch": seen.to_dict()}


def _like_train() -> None:
    """Give the verb the options of ``bolza train``, and two of its own."""
    own = {
        "budget": Annotated[
            float,
            typer.Option(help="Share of the training time that watching may take.", rich_help_panel=_PANEL),
        ],
        "every": Annotated[
            int | None,
            typer.Option(min=1, help="Steps between readings, in place of --budget.", rich_help_panel=_PANEL),
        ],
    }
    hints = {**own, **get_type_hints(train, include_extras=True)}
    hints.pop("return")
    defaults = {"budget": 0.1, "every": None}
    given = inspect.signature(train).parameters
    defaults |= {name: parameter.default for name, parameter in given.items()}
    kind = inspect.Parameter.KEYWORD_ONLY
    # a verb's options are read from its signature
    parameters = [
        inspect.Parameter(name, kind, default=defaults[name], annotation=hints[name])
        for name in [*own, *given]
    ]
    watch.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    watch.__annotations__ = hints


_like_train()
