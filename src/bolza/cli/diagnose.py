"""``bolza diagnose``: why a network does not train, what would help, and whether it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bolza.cli import _inputs
from bolza.cli._errors import INTERRUPTED, say
from bolza.cli._output import PATIENCE, Html, Json, Outputs
from bolza.ops.errors import UserCodeError

if TYPE_CHECKING:
    from bolza.diagnosis import Progress
    from bolza.training import InterruptGuard

__all__ = ["diagnose"]

_NETWORK, _TRIAL, _HOW = "The embedded network", "The trial (--train)", "How to measure"


def diagnose(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[pkg.module:factory]",
            show_default=False,
            help="A function of no arguments that returns your torch.nn.Module (or the module itself), untrained; or a "
            "network of ours by name: mlp, cnn, resnet, densenet, vit, gpt, gru. Default: a deep tanh mlp.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="pkg.module:loader",
            show_default=False,
            help="A function or object that gives (inputs, targets), batches of them, or a Dataset; or one of ours: "
            "digits, digits_images, diabetes, text, mnist5k. Default: digits (text for gpt).",
        ),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Prove it: train before and after the remedy.")
    ] = False,
    hold: Annotated[
        bool,
        typer.Option(
            "--hold",
            help="Ask the trained network whether its result holds: attacks, certificates, noise, confidence. With "
            "--train that is the network of the trial.",
        ),
    ] = False,
    html: Html = None,
    json: Json = None,
    depth: Annotated[
        int | None,
        typer.Option(
            min=1, help="Layers. [default: 50 for mlp]", show_default=False, rich_help_panel=_NETWORK
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Neurons a layer. [default: 100 for mlp]",
            show_default=False,
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(
            help="tanh, relu, gelu … or pkg.module:class. [default: tanh for mlp]",
            show_default=False,
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate of the network as it is. [default: 0.01]",
            show_default=False,
            rich_help_panel=_TRIAL,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Samples a step. [default: the prescribed]",
            show_default=False,
            rich_help_panel=_TRIAL,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps of each run. [default: 300]", show_default=False, rich_help_panel=_TRIAL
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Samples to measure on.", rich_help_panel=_HOW)] = 256,
    seed: Annotated[int, typer.Option(help="Seed of everything random.", rich_help_panel=_HOW)] = 0,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, cuda:1 … [default: that of the model]", show_default=False, rich_help_panel=_HOW
        ),
    ] = None,
) -> None:
    """Say whether a network can be trained, why not, and what would help.

    Measures, before any training, how signal and gradient travel through the layers (beside what theory predicts), how
    steep the loss is and how noisy the gradient; from that follow an initialisation, a learning rate and a batch size.
    --train shows that they work, --hold whether what was learned withstands attacks and noise.

    \b
    bolza diagnose --train                        a 50-layer network on handwritten digits
    bolza diagnose --train --hold                 and whether the result holds
    bolza diagnose resnet                         a network of ours by name
    bolza diagnose my_net:make --data my_data:load --train --html report.html
    """  # noqa: D301  # \b is a real backspace: it keeps the lines of the examples
    outputs = Outputs(html=html, json=json)
    import bolza
    from bolza.training import InterruptGuard

    place = _inputs.device(device)
    dataset = _inputs.dataset(data or ("text" if model == "gpt" else "digits"))
    _inputs.seeded(seed)
    network = _inputs.network(model or "mlp", dataset, depth, width, activation)
    with InterruptGuard(patience=0) as guard:
        with _progress(guard) as progress:
            diagnosis = bolza.diagnose(
                network,
                dataset,
                train=train,
                hold=hold,
                samples=samples,
                seed=seed,
                lr=lr,
                batch_size=batch,
                steps=steps,
                device=place,
                progress=progress,
            )
        guard.patience = PATIENCE
        outputs.deliver(diagnosis.document(), diagnosis.to_dict())
    if "training.unavailable" in diagnosis:
        raise UserCodeError(diagnosis["training.unavailable"].text)
    if diagnosis.training and any(trial.status == "interrupted" for trial in diagnosis.training.values()):
        say("Ctrl-C in training: everything that was computed until then is in the report.", label="stopped")
        raise typer.Exit(INTERRUPTED)


@contextmanager
def _progress(guard: InterruptGuard) -> Iterator[Progress]:
    """A line per stage and a bar per run of the trial, on stderr; nothing of it stays where nobody watches.

    From the first step of training on, there is something to lose: then ``guard`` only takes note of Ctrl-C.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from bolza.report import number

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
            if total:
                guard.patience = PATIENCE
            if stage not in tasks:
                for other in tasks.values():
                    bars.update(other, total=1, completed=1)
                    bars.stop_task(other)
                tasks[stage] = bars.add_task(
                    f"training, {stage}" if total else stage, total=total or None, note=""
                )
            note = ", ".join(f"{key.replace('_', ' ')} {number(value)}" for key, value in numbers.items())
            bars.update(tasks[stage], completed=done, total=total or None, note=note)

        yield tell
