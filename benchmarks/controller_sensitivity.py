"""How much does the accuracy of a run depend on the learning rate it starts with, and what do controllers change?

    python benchmarks/controller_sensitivity.py [--quick] [--task NAME ...] [--only METHOD ...] [--seeds N] [--jobs N]

Digits and 5000 images of MNIST, a perceptron and a small convolutional net on each; batch 32, five seeds, the same
number of gradients for every run. Each method runs at eleven rates over five decades: descent and the controllers
worn over it from 1e-4 to 10, Adam from 10^-5.5 to 10^-0.5 (its default in the middle), the peers at 10^-2.5 … 10^2.5
times their own default, which for most of them is to be left alone. What a controller computes beside the gradients
of the steps is counted (see `_sensitivity.py`) and its run is shorter by as much. A run that ends in numbers that
are not finite counts as chance.

Every run is a file of its own: a benchmark that was stopped goes on where it was. The table, the record and the
figure are made of all the cells that are in the folder.
"""

from __future__ import annotations

from _bench import emit, environment  # isort: skip  (sets the threads before torch loads)

import argparse
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from _plateau import Summary, summarise
from _sensitivity import HALF_DECADES, METHODS, TASKS, available, kept_cell

from bolza.ops.processes import end_with_parent
from bolza.report import Figure, role, to_png, write_atomic

BENCH = "controller_sensitivity"
BEYOND = tuple(10 ** (k / 2) for k in range(3, 7))  # where the grid ends before a controller does
FARTHER = ("SGD", "CSGD, coordinate", "StabilityLimit")
PANELS = {
    "plain": "Fixed, cosine, Adam",
    "peers": "Peers, × their default rate",
    "csgd": "Control of the noise",
    "controllers": "Other controllers",
}
LINES = [
    ("first", "-"),
    ("second", "--"),
    ("third", "-."),
    ("fourth", ":"),
    ("accent", (0, (5, 1))),
    ("ink", "-"),
]


def wanted(folder: Path, tasks: list[str], methods: list[str], seeds: int, share: float) -> Iterator[tuple]:
    """Every cell; all of a seed before the next seed, so that fewer seeds are a whole picture too."""
    for seed in range(seeds):
        for task in tasks:
            for method in methods:
                for rate in (*METHODS[method].rates, *(BEYOND if method in FARTHER else ())):
                    yield folder, task, method, rate, seed, share


def collect(folder: Path, seeds: int, share: float) -> dict[str, dict[str, Summary]]:
    """Summaries of the methods whose cells are all there: task → method → summary."""
    found: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        for name, method in METHODS.items():
            place = folder / task / name.replace(", ", "-").replace(" ", "-")
            rows = []
            for rate in method.rates:
                paths = [place / f"rate {rate:.3g} seed {seed}.json" for seed in range(seeds)]
                cells = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
                rows.append([cell for cell in cells if cell["key"]["share"] == share])
            if all(len(row) == seeds for row in rows):
                found.setdefault(task, {})[name] = rows
    results: dict[str, dict[str, Summary]] = {}
    for task, methods in found.items():
        means = [sum(c["accuracy"] for c in row) / seeds for rows in methods.values() for row in rows]
        results[task] = {name: summarise(rows, max(means)) for name, rows in methods.items()}
    return results


def table(task: str, found: dict[str, Summary]) -> str:
    """Markdown of one task: the largest area first."""
    lines = [
        f"**{TASKS[task].title}**, {TASKS[task].gradients()} gradients a run.",
        "",
        "| method | area | best | at rate | at the middle | decades (own best) | decades (best) | extra gradients |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, s in sorted(found.items(), key=lambda item: -item[1].area):
        own, of_all = (f"{'≥ ' if w_open and w else ''}{w:.1f}" for w, w_open in _widths(s))
        lines.append(
            f"| {name} | {100 * s.area:.1f} ± {100 * s.area_error:.1f} | {100 * s.best:.1f} | {s.best_rate:.2g} "
            f"| {100 * s.middle:.1f} | {own} | {of_all} | {100 * s.extra:.0f} % |"
        )
    return "\n".join([*lines, ""])


def _widths(s: Summary) -> list[tuple[float, bool]]:
    return [(s.own, s.own_open), (s.of_all, s.of_all_open)]


def overview(results: dict[str, dict[str, Summary]]) -> str:
    """Markdown of all tasks: area and decades of each method, the largest mean area first."""
    tasks = [t for t in TASKS if t in results]
    lines = [
        "| method | " + " | ".join(TASKS[t].title for t in tasks) + " | mean area |",
        "| --- |" + " --- |" * (len(tasks) + 1),
    ]
    rows = []
    for name in METHODS:
        found = [results[t].get(name) for t in tasks]
        if any(found):
            cells = [
                "–"
                if s is None
                else f"{100 * s.area:.1f} ± {100 * s.area_error:.1f} · {s.own:.1f} · {s.of_all:.1f}"
                for s in found
            ]
            mean = sum(s.area for s in found if s) / sum(1 for s in found if s)
            rows.append((mean if all(found) else -1.0, name, cells))
    for mean, name, cells in sorted(rows, reverse=True):
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {f'{100 * mean:.1f}' if mean >= 0 else '–'} |")
    return "\n".join([*lines, ""])


def beyond(folder: Path, seeds: int, share: float) -> str:
    """Markdown: accuracy at rates above the grid."""
    lines = [
        "| task | method | " + " | ".join(f"{rate:.3g}" for rate in BEYOND) + " |",
        "| --- | --- |" + " --- |" * len(BEYOND),
    ]
    for task in TASKS:
        for name in FARTHER:
            place = folder / task / name.replace(", ", "-")
            paths = [
                [place / f"rate {rate:.3g} seed {seed}.json" for seed in range(seeds)] for rate in BEYOND
            ]
            if all(path.exists() for row in paths for path in row):
                cells = [[json.loads(path.read_text(encoding="utf-8")) for path in row] for row in paths]
                means = [sum(c["accuracy"] for c in row) / seeds for row in cells]
                if all(cell["key"]["share"] == share for row in cells for cell in row):
                    emit(
                        BENCH,
                        f"{task}: {name}, beyond",
                        rates=list(BEYOND),
                        mean=[round(m, 4) for m in means],
                    )
                    shown = " | ".join(f"{100 * m:.1f}" for m in means)
                    lines.append(f"| {TASKS[task].title} | {name} | {shown} |")
    return "\n".join([*lines, ""])


def figure(results: dict[str, dict[str, Summary]]) -> Figure:
    """Accuracy over the rates, a row a task, a column a family; descent in grey behind each."""
    return Figure(
        "Accuracy and the learning rate that a run starts with",
        partial(_draw, results=results),
        caption="Mean of the seeds, with a band of one standard deviation; grey: gradient descent at fixed rate.",
        alt="Curves of test accuracy over five decades of learning rates, one row of panels for each task.",
        size=(13.5, 2.7 * max(1, len(results)) + 1.0),
        key="controller-sensitivity",
    )


def _draw(canvas: Any, results: dict[str, dict[str, Summary]]) -> None:
    tasks = [t for t in TASKS if t in results]
    grid = canvas.subplots(len(tasks), len(PANELS), squeeze=False, sharex=True, sharey=True)
    x = [k / 2 for k in HALF_DECADES]
    for row, task in zip(grid, tasks, strict=True):
        for axes, (family, title) in zip(row, PANELS.items(), strict=True):
            if "SGD" in results[task]:
                axes.plot(x, results[task]["SGD"].mean, color=role("muted"), linewidth=4, alpha=0.35)
            names = [n for n, m in METHODS.items() if m.family == family and n != "SGD"]
            for name, (colour, dash) in zip(names, LINES, strict=False):
                s = results[task].get(name)
                if s is None:
                    continue
                low, high = (
                    [m + sign * d for m, d in zip(s.mean, s.deviation, strict=True)] for sign in (-1, 1)
                )
                axes.fill_between(x, low, high, color=role(colour), alpha=0.12, linewidth=0)
                axes.plot(
                    x, s.mean, color=role(colour), linestyle=dash, marker="o", markersize=2.5, label=name
                )
            if task == tasks[0]:
                axes.set_title(title)
            axes.set_ylim(0.0, 1.02)
        row[0].set_ylabel(TASKS[task].title.replace(", ", "\n"))
    for axes in grid[-1]:
        axes.set_xlabel("decades from the middle rate")
    for column in range(len(PANELS)):
        handles = {line.get_label(): line for axes in grid[:, column] for line in axes.get_lines()}
        shown = {label: line for label, line in handles.items() if label[0] != "_"}
        if shown:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.22), "fontsize": 8.5}
            grid[-1][column].legend(shown.values(), shown.keys(), **below)


def main() -> None:
    """Run the cells that are missing, then write table, record and figure of all that are there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(available())
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--only", nargs="+", choices=names, metavar="METHOD", help="; ".join(names))
    parser.add_argument("--quick", action="store_true", help="a quarter of the gradients, two seeds")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method at each rate")
    parser.add_argument(
        "--fresh", action="store_true", help="again what another version of a controller made"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes; 0 shows what the folder has")
    parser.add_argument("--out", type=Path, default=Path("runs") / BENCH, help="folder of the cells")
    args = parser.parse_args()
    folder = args.out / ("quick" if args.quick else "whole")
    seeds, share = (2, 0.25) if args.quick else (args.seeds, 1.0)
    emit(
        BENCH,
        "environment",
        **environment("pytorch-optimizer", "mlxtend"),
        seeds=seeds,
        share_of_gradients=share,
    )
    if args.jobs:
        context = multiprocessing.get_context("spawn")
        cells = list(wanted(folder, args.task, args.only or names, seeds, share))
        with ProcessPoolExecutor(args.jobs, mp_context=context, initializer=end_with_parent) as pool:
            jobs = {pool.submit(kept_cell, *cell, args.fresh): cell for cell in cells}
            for count, job in enumerate(as_completed(jobs), 1):
                result, (_, task, method, rate, seed, _) = job.result(), jobs[job]
                if result["end"].startswith("failed"):
                    print(f"# {task}: {method}: rate {rate:.2g}, seed {seed}: {result['end']}", flush=True)
                if count % 50 == 0:
                    print(f"# {count} of {len(cells)} runs", flush=True)
    results = collect(folder, seeds, share)
    for task, found in results.items():
        for name, summary in found.items():
            emit(
                BENCH,
                f"{task}: {name}",
                rates=[float(f"{r:.3g}") for r in METHODS[name].rates],
                **summary.row(),
            )
    text = "\n".join(
        [overview(results), beyond(folder, seeds, share), *(table(t, found) for t, found in results.items())]
    )
    print(text)
    if results:
        write_atomic(folder / "tables.md", text)
        write_atomic(folder / "sensitivity.png", to_png(figure(results), dpi=110))


if __name__ == "__main__":
    main()
