"""The command line: parse, call, print. Each verb is a file; what it computes lives elsewhere.

Nothing here imports torch, matplotlib or scikit-learn before a verb runs, so ``bolza --help`` and the
completion of verbs and options answer at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from bolza.cli._errors import tolerant_streams, verb
from bolza.cli.bench import bench
from bolza.cli.cite import cite
from bolza.cli.diagnose import diagnose
from bolza.cli.methods import methods
from bolza.cli.phase import phase
from bolza.cli.reproduce import reproduce
from bolza.cli.train import train
from bolza.cli.watch import watch

__all__ = ["app", "main"]

app = typer.Typer(
    name="bolza",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

_ASK, _TRAIN, _BOOKS = "Ask", "Train", "The literature behind it"


def _version(wanted: bool) -> None:
    if wanted:
        from bolza import __version__

        typer.echo(f"bolza {__version__}")
        raise typer.Exit


_HELP = (
    "Why does this network not train, and what would make it train?\n\n"
    "A network is a controlled dynamical system. This program measures whether signal and gradient get through "
    "it, how steep its loss is, how noisy its gradient is, and what follows for the initialisation, the learning "
    "rate and the batch."
)


@app.callback(
    help=_HELP, epilog="Start here:  [bold]bolza diagnose[/bold]   (a network that does not train, and why)"
)
def _bolza(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """Options of the program itself."""


for _panel, _verbs in (
    (_ASK, (diagnose, phase)),
    (_TRAIN, (train, watch)),
    (_BOOKS, (methods, cite, reproduce, bench)),
):
    for _function in _verbs:
        app.command(rich_help_panel=_panel)(verb(_function))


def main() -> None:
    """Run the command line."""
    tolerant_streams()
    app(prog_name="bolza")
