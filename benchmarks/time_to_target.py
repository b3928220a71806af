"""How much CPU time does each optimizer need to a given train loss, and where is it when the time is up?

    python benchmarks/time_to_target.py [--quick] [--problem NAME ...] [--only NAME ...] [--out FOLDER]

Three problems: a perceptron on digits, a convolutional network on the larger image set, a decoder transformer on text.
Contenders are every optimizer of this library that trains these networks, and SGD with momentum, AdamW, Muon, SOAP
and KFAC. The rate of each is tuned with the same number of candidates, a factor √10 apart, by the train loss at the
end of one run; then five other seeds run with the best of them. All runs of a problem have the same CPU time; it
counts the steps alone, neither evaluation nor the first step (tracing and buffers). Weight decay is 0 throughout.
Discrete weights (BinaryMSA, TernaryMSA) need batch normalisation behind every layer: their network has it.

The cells lie in the folder as they are finished, so a run that was stopped goes on, and one with other ``--only`` adds
to the table. Two worker processes, one thread each.
"""

from __future__ import annotations

from _bench import emit, environment  # isort: skip  (sets the threads before torch loads)

import argparse
import inspect
import json
import math
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _race import GRID, Contender, Problem, arrival, cost, race
from _rivals import KFAC, muon, soap
from torch import nn

import bolza.optim
from bolza.data import digits, mnist5k, text
from bolza.data.dataset import Dataset
from bolza.models import gpt, mlp
from bolza.ops.processes import end_with_parent
from bolza.report import Figure, log_axis, role, to_png, write_atomic
from bolza.training import make_optimizer

BENCH = "time_to_target"
SEEDS = 5


# ------------------------------------------------------------------------------------ problems


def images() -> Dataset:
    """The larger image set, as images."""
    flat = mnist5k()
    return Dataset(
        flat.train_x.reshape(-1, 1, 28, 28),
        flat.train_y,
        flat.test_x.reshape(-1, 1, 28, 28),
        flat.test_y,
        "classification",
        10,
        "mnist5k",
        flat.description,
    )


def conv_net() -> nn.Module:
    """Two convolutions of stride 2 and two linear layers: 21,000 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 5, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def essay() -> Dataset:
    """Windows of 32 characters."""
    return text(length=32, stride=8)


def decoder() -> nn.Module:
    """A decoder of two blocks of width 48."""
    return gpt(vocabulary=essay().output_size, depth=2, width=48, length=32, heads=4)


PROBLEMS = {
    p.name: p
    for p in (
        Problem(
            "digits",
            "perceptron 64-64×3-10, tanh, on digits, batch 32",
            digits,
            partial(mlp, 4, 64),
            32,
            2.0,
            0.02,
        ),
        Problem("images", "convolutional net on mnist5k, batch 64", images, conv_net, 64, 5.0, 0.05),
        Problem("text", "decoder transformer on text, batch 16", essay, decoder, 16, 6.0, 2.0),
    )
}


# ---------------------------------------------------------------------------------- contenders


def _torch(name: str, **options: Any) -> Any:
    return lambda model, lr: make_optimizer(name, model, lr=lr, **options)


RIVALS = [
    Contender("SGD, momentum", _torch("sgd", momentum=0.9), 0.03),
    Contender("AdamW", _torch("adamw", weight_decay=0.0), 3e-3),
    Contender("Muon + AdamW", muon, 3e-3),
    Contender("SOAP", soap, 3e-3),
    Contender("KFAC", lambda model, lr: KFAC(model, lr), 0.1),
]


def _ours(name: str, **options: Any) -> Any:
    return lambda model, lr: getattr(bolza.optim, name)(model, lr, **options)


def _normed(model: nn.Module) -> nn.Module:
    """The same layers in a chain, each with weights followed by batch normalisation."""
    layers: list[nn.Module] = []
    for layer in model.children():
        layers.append(layer)
        if isinstance(layer, nn.Linear):
            layers.append(nn.BatchNorm1d(layer.out_features))
        elif isinstance(layer, nn.Conv2d):
            layers.append(nn.BatchNorm2d(layer.out_channels))
    return nn.Sequential(*layers)


# what is set beside the defaults; the library's own optimizers that are not listed run with their defaults
SETTINGS: dict[str, list[Contender]] = {
    "DDPNOpt": [
        Contender("DDPNOpt", _ours("DDPNOpt", momentum=0.9), 0.03),
        Contender("DDPNOpt, Kronecker", _ours("DDPNOpt", momentum=0.9, curvature="kronecker"), 0.01),
    ],
    "DGNOpt": [  # on a chain it is DDPNOpt to the last digit
        Contender("DGNOpt", _ours("DGNOpt", momentum=0.9), 0.03, only=("text",)),
        Contender(
            "DGNOpt, cooperative",
            _ours("DGNOpt", momentum=0.9, information="cooperative"),
            0.01,
            only=("text",),
        ),
    ],
    "SNOpt": [Contender("SNOpt", _ours("SNOpt", momentum=0.9), 0.01)],
    # their step length is 1/κ and 1/ρ; lr is the share of the way to the minimiser
    "MSA": [Contender("MSA", lambda model, rate: bolza.optim.MSA(model, proximal=1 / rate), 0.3)],
    "EMSA": [Contender("EMSA", lambda model, rate: bolza.optim.EMSA(model, rho=1 / rate), 1.0)],
    "EntropySGD": [Contender("EntropySGD", lambda m, lr: bolza.optim.EntropySGD(_trainable(m), lr), 0.03)],
    "PIDSGD": [Contender("PIDSGD", lambda m, lr: bolza.optim.PIDSGD(_trainable(m), lr), 0.01)],
    "LatePhase": [
        Contender(
            "LatePhase",
            _ours("LatePhase", members=3),
            0.03,
            late=lambda opt: opt.begin(),
            end=lambda opt: opt.finish(),
        )
    ],
    # the weights are discrete, so the network is another one: batch normalisation behind every layer
    "BinaryMSA": [
        Contender("BinaryMSA", _ours("BinaryMSA"), 3e-3, network=_normed, only=("digits", "images"))
    ],
    "TernaryMSA": [
        Contender("TernaryMSA", _ours("TernaryMSA"), 3e-3, network=_normed, only=("digits", "images"))
    ],
}


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def ours() -> list[Contender]:
    """Every optimizer that ``bolza.optim`` exports."""
    found = []
    for name in bolza.optim.__all__:
        thing = getattr(bolza.optim, name)
        if not (isinstance(thing, type) and issubclass(thing, torch.optim.Optimizer)):
            continue
        default = inspect.signature(thing).parameters["lr"].default
        for contender in SETTINGS.get(name, [Contender(name, _torch(name), default)]):
            found.append(replace(contender, ours=True))
    return found


# --------------------------------------------------------------------------------------- tables


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; infinite where too many are."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        return low if low == high else low + (place - math.floor(place)) * (high - low)

    return at(0.25), at(0.5), at(0.75)


def spread(values: list[float | None], form: str) -> str:
    """Median and quartiles as text."""
    low, mid, high = quartiles([math.inf if v is None else v for v in values])
    if not math.isfinite(mid):
        return "–"
    return (
        f"{mid:{form}} ({low:{form}}–{high:{form}})"
        if math.isfinite(high)
        else f"{mid:{form}} ({low:{form}}–)"
    )


def summary(problem: Problem, name: str, result: dict[str, Any], costs: dict[str, Any]) -> dict[str, Any]:
    """One row of the record."""
    if not result["runs"]:
        return {"problem": problem.name, "optimizer": name, "outside": result["outside"]}
    runs = result["runs"]
    arrivals = [arrival(cell, problem.target) for cell in runs]
    row: dict[str, Any] = {
        "problem": problem.name,
        "optimizer": name,
        "rate": result["rate"],
        "rate_at_edge": result["edge"],
    }
    row["reached"] = sum(math.isfinite(s) for s, _ in arrivals)
    row["seeds"] = len(runs)
    lists = {
        "cpu_s_to_target": [s for s, _ in arrivals],
        "steps_to_target": [n for _, n in arrivals],
        "train_loss": [c["final"] for c in runs],
        "test_loss": [c["test_loss"] for c in runs],
        "test_accuracy": [c["test_accuracy"] for c in runs],
        "steps": [c["steps"] for c in runs],
    }
    for key, values in lists.items():
        found = quartiles([math.inf if v is None else float(v) for v in values])
        row[key] = [float(f"{v:.4g}") if math.isfinite(v) else None for v in found]
    own, base = costs.get(name, {}), costs.get(RIVALS[0].name, {})
    if "step" in own and "step" in base:
        row["step_over_sgd"] = float(f"{own['step'] / base['step']:.3g}")
        row["memory_over_sgd"] = float(f"{own['memory'] / base['memory']:.3g}")
    row["setup_s"] = float(f"{statistics.median(c['setup'] for c in runs):.2g}")
    return row


def table(problem: Problem, rows: list[dict[str, Any]], share: float = 1.0) -> str:
    """Markdown: those that arrive first stand first."""

    def shown(values: list[float | None], form: str) -> str:
        low, mid, high = values
        if mid is None:
            return "–"
        return f"{mid:{form}} ({low:{form}}–{'' if high is None else format(high, form)})"

    def place(row: dict[str, Any]) -> tuple[float, float]:
        if "outside" in row:
            return math.inf, math.inf
        arrived, final = row["cpu_s_to_target"][1], row["train_loss"][1]
        return (math.inf if arrived is None else arrived), (math.inf if final is None else final)

    lines = [
        f"**{problem.title}**: train loss {problem.target:g}, {share * problem.seconds:g} CPU seconds a run.",
        "",
        "| optimizer | rate | arrived | CPU s to target | steps to target | train loss at the end | test loss "
        "| test accuracy | step / SGD | memory / SGD |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    outside = []
    for row in sorted(rows, key=place):
        if "outside" in row:
            outside.append(f"{row['optimizer']}: {row['outside']}.".replace("..", "."))
            continue
        cells = [
            row["optimizer"],
            f"{row['rate']:.2g}{' *' if row['rate_at_edge'] else ''}",
            f"{row['reached']}/{row['seeds']}",
            shown(row["cpu_s_to_target"], ".2f"),
            shown(row["steps_to_target"], ".0f"),
            shown(row["train_loss"], ".3g"),
            shown(row["test_loss"], ".3g"),
            shown(row["test_accuracy"], ".3f"),
            f"{row['step_over_sgd']:.2g}" if "step_over_sgd" in row else "–",
            f"{row['memory_over_sgd']:.2g}" if "memory_over_sgd" in row else "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *([""] if outside else []), *outside, ""])


# --------------------------------------------------------------------------------------- figure


def figure(curves: dict[str, dict[str, list[list[Any]]]]) -> Figure:
    """Train loss against CPU seconds, one panel a problem; ``curves``: problem → contender → curves of the seeds."""
    return Figure(
        "Train loss against CPU time",
        partial(_draw, curves=curves),
        caption="Median over five seeds, each optimizer at its best rate. Grey: what one would use instead.",
        alt="One panel for each problem, one line for each optimizer; the train loss falls over CPU seconds.",
        size=(12.5, 4.6),
        key="time-to-target",
    )


def median_curve(cells: list[list[Any]]) -> tuple[list[float], list[float]]:
    """Median loss of the seeds at each evaluation; a run that ended early counts as infinite from there."""
    length = max(map(len, cells))
    times, losses = [], []
    for k in range(1, length):
        values = [c[k][2] if k < len(c) and c[k][2] is not None else math.inf for c in cells]
        middle = statistics.median(values)
        if math.isfinite(middle):
            times.append(statistics.median(c[k][0] for c in cells if k < len(c)))
            losses.append(middle)
    return times, losses


def _draw(canvas: Any, curves: dict[str, dict[str, list[list[Any]]]]) -> None:
    rivals = [c.name for c in RIVALS]
    own = [n for n in dict.fromkeys(n for found in curves.values() for n in found) if n not in rivals]
    colours = [role(n) for n in ("first", "second", "third", "fourth", "accent")]
    dashes = ["-", "--", ":", "-."]
    looks = {
        n: (role("muted"), ["-", "--", ":", "-.", (0, (1, 1, 4, 1))][i % 5], 1.2)
        for i, n in enumerate(rivals)
    }
    looks |= {n: (colours[i % 5], dashes[i // 5 % 4], 1.9) for i, n in enumerate(own)}
    panels = canvas.subplots(1, len(curves), squeeze=False)[0]
    for axes, (name, found) in zip(panels, curves.items(), strict=True):
        problem = PROBLEMS[name]
        for who in (*rivals, *own):
            if who in found:
                times, losses = median_curve(found[who])
                colour, dash, width = looks[who]
                axes.plot(times, losses, linestyle=dash, color=colour, linewidth=width, label=who)
        axes.axhline(problem.target, color=role("ink"), linewidth=0.8)
        axes.set(title=problem.title.split(",")[0], xlabel="CPU seconds", ylabel="train loss")
        log_axis(axes, "x")
        log_axis(axes, "y")
    handles = {h.get_label(): h for axes in panels for h in axes.get_lines() if h.get_label()[0] != "_"}
    canvas.legend(handles.values(), handles.keys(), loc="outside right upper", handlelength=3)


# ------------------------------------------------------------------------------------------ run


def _race(
    problem: str, contender: str, folder: str, seeds: int, seconds: float, grid: tuple[float, ...]
) -> dict[str, Any]:
    chosen = next(c for c in [*RIVALS, *ours()] if c.name == contender)
    return race(PROBLEMS[problem], chosen, Path(folder), seeds, seconds, grid)


def _cost(problem: str, rates: dict[str, float], rounds: int) -> dict[str, Any]:
    return cost(PROBLEMS[problem], [c for c in [*RIVALS, *ours()] if c.name in rates], rates, rounds)


def main() -> None:
    """Run what is asked for, then write the table and the figure of all cells in the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [c.name for c in [*RIVALS, *ours()]]
    parser.add_argument("--problem", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="an eighth of the time, three rates, two seeds")
    parser.add_argument(
        "--out", type=Path, default=Path("runs") / BENCH, help="folder of the cells and of what they give"
    )
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    folder = args.out / ("quick" if args.quick else "whole")
    seeds, grid, share = (2, GRID[1:4], 1 / 8) if args.quick else (SEEDS, GRID, 1.0)
    emit(BENCH, "environment", **environment("pytorch-optimizer"), seeds=seeds, rates=len(grid))
    contenders = [c for c in [*RIVALS, *ours()] if not args.only or c.name in args.only]
    wanted = [(p, c.name) for p in args.problem for c in contenders if not c.only or p in c.only]
    results: dict[str, dict[str, Any]] = {p: {} for p in PROBLEMS}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context, initializer=end_with_parent) as pool:
        jobs = {
            pool.submit(_race, p, n, str(folder), seeds, share * PROBLEMS[p].seconds, grid): (p, n)
            for p, n in wanted
        }
        for job in as_completed(jobs):
            problem, name = jobs[job]
            result = job.result()
            write_atomic(_summary_file(folder, problem, name), json.dumps(result))
            said = result.get("outside") or f"rate {result['rate']:.2g}, train loss " + spread(
                [c["final"] for c in result["runs"]], ".3g"
            )
            print(f"# {problem}: {name}: {said}", flush=True)
        # those of earlier runs belong to the table too
        for problem in PROBLEMS:
            for name in names:
                if _summary_file(folder, problem, name).exists():
                    results[problem][name] = json.loads(_summary_file(folder, problem, name).read_text())
        costs = {}
        jobs = {}
        for problem, found in results.items():
            rates = {n: r["rate"] for n, r in found.items() if r["runs"]}
            if rates:
                jobs[pool.submit(_cost, problem, rates, 4 if args.quick else 20)] = problem
        for job in as_completed(jobs):
            costs[jobs[job]] = job.result()
    pages, curves = [], {}
    for problem, found in results.items():
        if not found:
            continue
        rows = [summary(PROBLEMS[problem], n, r, costs.get(problem, {})) for n, r in found.items()]
        for row in rows:
            emit(BENCH, f"{row['problem']}: {row['optimizer']}", **row)
        pages.append(table(PROBLEMS[problem], rows, share))
        curves[problem] = {n: [c["curve"] for c in r["runs"]] for n, r in found.items() if r["runs"]}
    write_atomic(folder / "table.md", "\n".join(pages))
    if any(curves.values()):
        write_atomic(folder / "figure.png", to_png(figure(curves)))
    print(f"# {folder / 'table.md'}, {folder / 'figure.png'}")


def _summary_file(folder: Path, problem: str, name: str) -> Path:
    path = folder / problem / f"{name.replace('/', '-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


if __name__ == "__main__":
    main()
