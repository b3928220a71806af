"""``bolza train``: any network on any data with any optimizer, safe to interrupt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from bolza.cli._controls import controls_figure
from bolza.cli._errors import INTERRUPTED, say, user_code
from bolza.cli._output import PATIENCE, Html, Json, Outputs
from bolza.ops.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

    from bolza.data import Dataset
    from bolza.report import Document
    from bolza.training import Run

__all__ = ["Watcher", "carry_out", "train"]

_NETWORK, _METHOD, _KEEP = "Network", "Method", "Interrupt and resume"


def _complete(room: str, name: str) -> Callable[[str], list[tuple[str, str]]]:
    def names(incomplete: str) -> list[tuple[str, str]]:
        from importlib import import_module

        found = getattr(import_module(f"bolza.{room}"), name)
        known = found() if callable(found) else found
        told = known.items() if isinstance(known, Mapping) else ((n, "") for n in known)
        return [(n, text) for n, text in told if n.startswith(incomplete)]

    return names


def train(
    model: Annotated[
        str,
        typer.Option(
            help="mlp, cnn, resnet, densenet, vit, gpt, gru; or pkg.module:factory that makes yours.",
            rich_help_panel=_NETWORK,
            autocompletion=_complete("models", "NAMES"),
        ),
    ] = "mlp",
    data: Annotated[
        str,
        typer.Option(
            help="digits, digits_images, mnist5k, diabetes, text; or pkg.module:loader that gives yours.",
            rich_help_panel=_NETWORK,
            autocompletion=_complete("data", "NAMES"),
        ),
    ] = "digits",
    depth: Annotated[
        int | None,
        typer.Option(min=1, help="Layers (or blocks) of a built-in network.", rich_help_panel=_NETWORK),
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Neurons or channels of a layer.", rich_help_panel=_NETWORK)
    ] = None,
    activation: Annotated[
        str | None, typer.Option(help="tanh, relu, gelu …, or pkg.module:class.", rich_help_panel=_NETWORK)
    ] = None,
    init: Annotated[
        str,
        typer.Option(
            metavar="default|critical",
            help="PyTorch's initialisation, or the critical one of the network's own activations.",
            rich_help_panel=_NETWORK,
        ),
    ] = "default",
    optimizer: Annotated[
        str,
        typer.Option(
            help="Name of an optimizer of torch.optim or of this library, or pkg.module:function.",
            rich_help_panel=_METHOD,
            autocompletion=_complete("training", "optimizer_names"),
        ),
    ] = "sgd",
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate; the optimizer's own default.", rich_help_panel=_METHOD),
    ] = None,
    momentum: Annotated[
        float, typer.Option(help="For optimizers that take one.", rich_help_panel=_METHOD)
    ] = 0.0,
    weight_decay: Annotated[
        float, typer.Option(help="Pull of the weights to zero.", rich_help_panel=_METHOD)
    ] = 0.0,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a step.", rich_help_panel=_METHOD)] = 64,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps in all; or use --epochs.", rich_help_panel=_METHOD)
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes through the data; 20 by default.", rich_help_panel=_METHOD)
    ] = None,
    controller: Annotated[
        str | None,
        typer.Option(
            help="What steers the hyper-parameters during the run: cosine, csgd, optimal …, all listed by "
            "'--controller help'; or pkg.module:function of (optimizer, steps).",
            rich_help_panel=_METHOD,
            autocompletion=_complete("controllers", "NAMES"),
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="pkg.module:function of (outputs, targets); cross-entropy or mean square by default.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    clip: Annotated[
        float | None, typer.Option(help="Largest norm of the gradient.", rich_help_panel=_METHOD)
    ] = None,
    seed: Annotated[int, typer.Option(help="The run repeats from it.", rich_help_panel=_METHOD)] = 0,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, …; by default that of the network.", rich_help_panel=_METHOD),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep the state of the run here, so that it can go on.",
            rich_help_panel=_KEEP,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from --checkpoint, with the same other options.", rich_help_panel=_KEEP
        ),
    ] = False,
    html: Html = None,
    json: Json = None,
) -> None:
    r"""Train a network and show its curves. Ctrl-C stops after the step in progress and loses nothing.

    \b
    bolza train --depth 30 --init critical --lr 0.05
    bolza train --model resnet --data digits_images --optimizer adamw
    bolza train --lr 1 --controller csgd
    bolza train --model my_net:make --data my_data:load --checkpoint run.ckpt
    """
    carry_out(locals())


def carry_out(options: Mapping[str, Any], watcher: Watcher | None = None) -> None:
    """Train with the options of the verb and show what came of it.

    Args:
        options: by their names in :func:`train`.
        watcher: what looks on, for ``bolza watch``.
    """
    if options["controller"] == "help":
        _list_controllers()
    html, json, checkpoint = options["html"], options["json"], options["checkpoint"]
    init, seed, resume = options["init"], options["seed"], options["resume"]
    outputs = Outputs(html=html, json=json, checkpoint=checkpoint)
    if init not in ("default", "critical"):
        from bolza.ops.errors import ArgumentError

        raise ArgumentError(f"--init {init!r} is unknown: choose default or critical.")
    from bolza import training
    from bolza.cli import _inputs as inputs

    place = inputs.device(options["device"])
    dataset = inputs.dataset(options["data"])
    inputs.seeded(seed)
    network = inputs.network(
        options["model"], dataset, options["depth"], options["width"], options["activation"]
    )
    if init == "critical" and not resume:  # a resumed run takes its weights from the file
        from bolza.meanfield import critical_init_

        critical_init_(network, example=dataset.train_x[:32])
    own_loss, own_optimizer = _own(options["loss"], "loss"), _own(options["optimizer"], "optimizer")
    run_of = {"model": network, "loss": own_loss, "data": dataset, "batch_size": options["batch"]}
    own_controller = _controller(options["controller"], run_of)
    settings = {
        "model": options["model"],
        "data": options["data"],
        "init": init,
        "controller": options["controller"] or "constant",
        "seed": seed,
    }
    callback = None if watcher is None else watcher.of(network, own_loss, dataset)
    with training.InterruptGuard(
        patience=PATIENCE
    ):  # the second Ctrl-C of a quick pair must not lose the report
        with _progress(None if watcher is None else watcher.news) as tell:
            run = training.train(
                network,
                dataset,
                loss=own_loss,
                optimizer=own_optimizer,
                lr=options["lr"],
                momentum=options["momentum"],
                weight_decay=options["weight_decay"],
                batch_size=options["batch"],
                steps=options["steps"],
                epochs=options["epochs"],
                controller=own_controller,
                callback=callback,
                checkpoint=checkpoint,
                resume=resume,
                seed=seed,
                progress=tell,
                device=place,
                clip=options["clip"],
            )
        document, record = (
            _document(run, settings),
            {"schema": "bolza.train/1", **settings, "run": run.to_dict()},
        )
        if watcher is not None:
            document, record = watcher.joined(run, document, record)
        outputs.deliver(document, record)
    _end(run, checkpoint)


class Watcher(Protocol):
    """What looks on at a run and has its own part in the report."""

    def of(self, model: nn.Module, loss: Any, data: Dataset) -> Callable[[Any, int], Any]:
        """The function (optimizer, steps) that makes the callback of the run."""

    def news(self) -> list[str]:
        """Sentences on what was found since the last call."""

    def joined(self, run: Run, document: Document, record: dict[str, Any]) -> tuple[Document, dict[str, Any]]:
        """The report with what was seen."""


def _end(run: Run, checkpoint: Path | None) -> None:
    if run.unsaved:
        raise CheckpointError(f"the run {run.status} after {run.step} steps, but {run.unsaved}")
    if run.status == "interrupted":
        kept = (
            f"the state is in {checkpoint}, go on with the same command and --resume."
            if checkpoint
            else "the curves above are kept, the network is not: name a --checkpoint to be able to go on."
        )
        say(f"{run.reason}; {kept}", label="stopped")
        raise typer.Exit(INTERRUPTED)
    run.raise_if_diverged()


def _own(spec: str | None, role: str) -> Any:
    """The user's object if the text names one, else the text itself."""
    from bolza.cli._load import is_path, load

    if spec is None or (role == "optimizer" and not is_path(spec)):
        return spec
    return load(spec, role)


def _list_controllers() -> None:
    from bolza.controllers import NAMES
    from bolza.report import Document, Table, to_terminal

    rows = [(name, text) for name, text in NAMES.items()]
    to_terminal(Document("Controllers", "", [Table("", ("--controller", "what it does"), rows)]))
    raise typer.Exit


def _controller(spec: str | None, run: Mapping[str, Any]) -> Any:
    if spec is None:
        return None
    from bolza.cli._load import is_path, load, near
    from bolza.controllers import NAMES, make
    from bolza.ops.errors import ArgumentError

    if not is_path(spec):
        if spec not in NAMES:
            raise ArgumentError(
                f"controller {spec!r} is unknown{near(spec, NAMES) or '; choose one of ' + ', '.join(NAMES) + '.'}"
            )
        return lambda optimizer, steps: make(spec, optimizer, steps, **run)
    own = load(spec, "controller")

    def build(optimizer: Any, steps: int) -> Any:
        with user_code(f"the controller {spec}"):
            return own(optimizer, steps)

    return build


@contextmanager
def _progress(
    news: Callable[[], list[str]] | None = None,
) -> Iterator[Callable[[int, int, Mapping[str, float]], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from bolza.report import number

    columns = (
        TextColumn("step"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, note="")

        def tell(step: int, steps: int, values: Mapping[str, float]) -> None:
            for sentence in news() if news is not None else ():
                bar.console.print(sentence, highlight=False, markup=False, soft_wrap=True)
            if step % max(1, steps // 200) == 0 or step == steps:
                note = "  ".join(
                    f"{name.replace('_', ' ')} {number(value)}" for name, value in values.items()
                )
                bar.update(task, total=steps, completed=step, note=note)

        yield tell


def _document(run: Run, settings: Mapping[str, Any]) -> Document:
    from bolza.report import Cell, Document, Figure, Table, Text, number, percent

    tone: Any = {"finished": "good", "interrupted": "warn", "diverged": "bad"}[run.status]
    accuracy = bool(run.train_accuracy or run.test_accuracy)
    columns = ["", "loss", *(["accuracy"] if accuracy else [])]

    def row(name: str, losses: list[float], shares: list[float]) -> list[Any]:
        cells = [name, number(losses[-1]) if losses else "–"]
        return [*cells, percent(shares[-1]) if shares else "–"] if accuracy else cells

    results = Table(
        "Result",
        columns,
        [row("training", run.train_loss, run.train_accuracy), row("test", run.test_loss, run.test_accuracy)],
        caption="Training values are means over the mini-batches since the last record.",
        align=("left", "right", "right") if accuracy else ("left", "right"),
    )
    how = Table(
        "Run",
        ("setting", "value"),
        [
            ("status", Cell(run.status, tone)),
            ("steps", f"{run.step} of {run.total_steps}"),
            ("samples seen", str(run.samples)),
            ("network", f"{settings['model']}, {settings['init']} initialisation"),
            ("data", settings["data"]),
            ("method", f"{run.optimizer}, batch {run.batch_size}, controller {settings['controller']}"),
            ("seed", str(run.seed)),
            ("time", f"{number(run.seconds)} s"),
        ],
        align=("left", "left"),
    )
    parts: list[Any] = [how, results]
    if run.reason:
        parts.append(Text(run.reason, tone=tone))
    parts.append(
        Figure(
            "Curves",
            lambda canvas: _draw(canvas, run),
            "Loss and accuracy over the steps of the run.",
            key="curves",
            sketch=_sketch(run),
        )
    )
    controls = controls_figure(run)
    if controls is not None:
        parts.append(controls)
    best = f", test accuracy {percent(run.final_test_accuracy)}" if run.test_accuracy else ""
    return Document("Training", f"{run.status} after {run.step} steps{best}.", parts)


def _sketch(run: Run) -> str:
    from bolza.report import sparkline

    curves = {"training loss": run.train_loss, "test accuracy": run.test_accuracy}
    return "\n".join(f"{name:14} {sparkline(values)}" for name, values in curves.items() if values)


def _draw(canvas: Any, run: Run) -> None:
    panels = [("loss", run.train_loss, run.test_loss), ("accuracy", run.train_accuracy, run.test_accuracy)]
    panels = [panel for panel in panels if panel[1] or panel[2]]
    for axes, (name, train, test) in zip(
        canvas.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for label, values, style in (("training", train, "-"), ("test", test, "--")):
            if values:
                axes.plot(
                    run.steps[-len(values) :],
                    values,
                    style,
                    marker="o" if len(values) < 40 else None,
                    label=label,
                )
        axes.set(xlabel="step", title=name)
        if name == "accuracy":
            axes.set_ylim(-0.02, 1.02)
        axes.legend()
