"""``bolza phase``: order, chaos and the line between them."""

from __future__ import annotations

from typing import Annotated

import typer

from bolza.cli._output import Html, Json, Outputs, Png

__all__ = ["phase"]


def _activations(incomplete: str) -> list[str]:
    from bolza.meanfield import activation_names

    return [name for name in activation_names() if name.startswith(incomplete)]


def phase(
    activation: Annotated[
        str,
        typer.Option(
            help="Name of an activation, or pkg.module:function for your own elementwise function.",
            autocompletion=_activations,
        ),
    ] = "tanh",
    bias_var: Annotated[float, typer.Option(help="Bias variance σ_b² of the table.")] = 0.05,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="W,B",
            help="Place a network in the diagram: its σ_w² and σ_b², such as 1.5,0.05.",
            show_default=False,
        ),
    ] = None,
    weight_var_range: Annotated[
        tuple[float, float], typer.Option(metavar="LOW HIGH", help="Weight variances σ_w² to show.")
    ] = (0.5, 4.0),
    bias_var_range: Annotated[
        tuple[float, float], typer.Option(metavar="LOW HIGH", help="Bias variances σ_b² of the diagram.")
    ] = (0.0, 0.25),
    html: Html = None,
    json: Json = None,
    png: Png = None,
) -> None:
    r"""Show where random networks are ordered, chaotic or critical, and how deep they can be.

    Weights have variance σ_w²/fan-in, biases σ_b². ξ_c is the number of layers after which the trace of an
    input has faded by a factor e; a network a few times deeper than that does not train.

    \b
    bolza phase
    bolza phase --activation gelu --html phase.html
    bolza phase --at 0.33,0.003 --png phase.png
    """
    outputs = Outputs(html=html, json=json, png=png)
    here = None if at is None else _point(at)
    from bolza.cli._load import is_path, load, near
    from bolza.meanfield import activation_names
    from bolza.ops.errors import ArgumentError
    from bolza.studies._phase import phase_document

    function = load(activation, "activation") if is_path(activation) else activation
    if function == activation and activation.strip().lower() not in (names := activation_names()):
        hint = near(activation, names) or f"; known are {', '.join(names)}."
        raise ArgumentError(
            f"activation {activation!r} is unknown{hint} Your own is named as pkg.module:function."
        )
    document, record = phase_document(function, bias_var, weight_var_range, bias_var_range, here)
    outputs.deliver(document, record)


def _point(text: str) -> tuple[float, float]:
    from bolza.ops.errors import ArgumentError

    try:
        weight, bias = (float(part) for part in text.split(","))
    except ValueError:
        raise ArgumentError(
            f"--at {text!r} is not two numbers: give σ_w² and σ_b² with a comma between, such as --at 1.5,0.05."
        ) from None
    return weight, bias
