"""Runs of one optimizer on one problem against the clock, kept cell by cell in a folder.

A cell is one run: problem × contender × rate × seed. Its clock is the CPU time of the process, and only that of the
steps: what is spent on evaluation does not count, nor does the first step, in which networks are traced and buffers
made (kept as ``setup``). Each cell is one JSON file, written at once or not at all: a run that is stopped goes on
where it was.
"""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.core.errors import DivergenceError, UnsupportedError
from bolza.data import Dataset
from bolza.report import write_atomic
from bolza.training import BatchOrder

Build = Callable[[nn.Module, float], torch.optim.Optimizer]
GRID = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)  # times the contender's middle rate


@dataclass(frozen=True)
class Problem:
    """A network, its data, and how long a run may take.

    Args:
        name: key in tables and files.
        title: what it is, for readers.
        data: makes the data set.
        model: makes the network; the seed is set before.
        batch: samples of a step.
        seconds: CPU seconds of a run.
        target: train loss that counts as arrived.
        sample: training samples on which the train loss is measured.
    """

    name: str
    title: str
    data: Callable[[], Dataset]
    model: Callable[[], nn.Module]
    batch: int
    seconds: float
    target: float
    sample: int = 512

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy, over positions too."""
        return F.cross_entropy(outputs.flatten(0, -2), y.flatten())


@dataclass(frozen=True)
class Contender:
    """An optimizer with everything set but its rate.

    Args:
        name: key in tables and files.
        build: (network, rate) → optimizer.
        rate: middle of the grid of rates; a dict for one that differs by problem.
        closure: what ``step`` is given: ``None``, ``"same"`` (evaluates this batch again) or ``"fresh"`` (takes the
            next batch at every call).
        ours: of this library, or what one would use instead.
        late: called with the optimizer when three fifths of the time are used.
        end: called with the optimizer before the last evaluation.
        network: changes the network first, for a method that needs others.
        only: problems that it runs on; all where empty.
    """

    name: str
    build: Build
    rate: float
    closure: str | None = None
    ours: bool = False
    late: Callable[[Any], object] | None = None
    end: Callable[[Any], object] | None = None
    network: Callable[[nn.Module], nn.Module] | None = None
    only: tuple[str, ...] = ()


@torch.no_grad()
def evaluate(problem: Problem, model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Loss and share of right answers, in evaluation mode."""
    mode, total, right = model.training, 0.0, 0
    model.eval()
    for i in range(0, len(x), 512):
        outputs = model(x[i : i + 512])
        total += float(problem.loss(outputs, y[i : i + 512])) * len(x[i : i + 512])
        right += int((outputs.argmax(-1) == y[i : i + 512]).sum())
    model.train(mode)
    return total / len(x), right / y.numel()


class Runner:
    """One network and one optimizer in training."""

    def __init__(self, problem: Problem, contender: Contender, rate: float, seed: int, data: Dataset) -> None:
        self.problem, self.contender = problem, contender
        torch.manual_seed(seed)
        self.model = problem.model().train()
        if contender.network is not None:
            self.model = contender.network(self.model)
        self.optimizer = contender.build(self.model, rate)
        self.order = BatchOrder(data.train_x, data.train_y, problem.batch, seed)
        self.batch = self.order.next()
        self.first = math.nan

    def gradient(self) -> Tensor:
        """Loss of the present batch, gradients in place."""
        x, y = self.batch
        self.optimizer.zero_grad()
        loss = self.problem.loss(self.model(x), y)
        loss.backward()
        return loss

    def closure(self) -> Tensor:
        """What an optimizer that evaluates by itself is given."""
        if self.contender.closure == "fresh":
            self.batch = self.order.next()
        with torch.enable_grad():
            loss = self.gradient()
        self.first = float(loss.detach())
        return loss

    def step(self) -> float:
        """One step; the loss of its (last) batch."""
        self.batch = self.order.next()
        if self.contender.closure is None:
            loss = self.gradient()
            self.optimizer.step()
            return float(loss.detach())
        self.optimizer.step(self.closure)
        return self.first


def run_cell(
    problem: Problem, contender: Contender, rate: float, seed: int, data: Dataset, seconds: float
) -> dict[str, Any]:
    """Train for some CPU seconds; the curve of the train loss and the figures at the end."""
    runner = Runner(problem, contender, rate, seed, data)
    x, y = data.train_x[: problem.sample], data.train_y[: problem.sample]
    curve: list[tuple[float, int, float]] = []
    points = [seconds * 0.8**k for k in range(22)]
    used, steps, setup, diverged, late = 0.0, 0, 0.0, False, contender.late
    while used < seconds and not diverged:
        start = time.process_time()
        try:
            diverged = not math.isfinite(runner.step())
        except (DivergenceError, torch.linalg.LinAlgError):
            diverged = True
        spent, steps = time.process_time() - start, steps + 1
        if steps == 1:
            setup = spent
            curve.append((0.0, 1, evaluate(problem, runner.model, x, y)[0]))
            continue
        used += spent
        if late is not None and used >= 0.6 * seconds:
            late(runner.optimizer)
            late = None
        if used >= points[-1]:
            while points and used >= points[-1]:
                points.pop()
            if not points and contender.end is not None:
                contender.end(runner.optimizer)
            curve.append((used, steps, evaluate(problem, runner.model, x, y)[0]))
            diverged = diverged or not math.isfinite(curve[-1][2])
    test = evaluate(problem, runner.model, data.test_x, data.test_y)
    return {
        "rate": rate,
        "seed": seed,
        "seconds": seconds,
        "setup": setup,
        "steps": steps,
        "diverged": diverged,
        "curve": [(t, n, v if math.isfinite(v) else None) for t, n, v in curve],
        "final": None if diverged else curve[-1][2],
        "test_loss": None if diverged else test[0],
        "test_accuracy": None if diverged else test[1],
    }


def arrival(cell: dict[str, Any], target: float) -> tuple[float, float]:
    """CPU seconds and steps at which the train loss first was at the target, log-linear between evaluations."""
    before = None
    for seconds, steps, loss in cell["curve"]:
        if loss is not None and loss <= target:
            if before is None or before[2] is None or before[0] == 0:
                return seconds, steps
            share = math.log(before[2] / target) / max(math.log(before[2] / max(loss, 1e-30)), 1e-30)
            return before[0] + share * (seconds - before[0]), before[1] + share * (steps - before[1])
        before = (seconds, steps, loss)
    return math.inf, math.inf


def kept(path: Path, make: Callable[[], dict[str, Any]], key: dict[str, Any]) -> dict[str, Any]:
    """The cell in a file if it is of the same settings, else a new one, written in one piece."""
    if path.exists():
        try:
            cell = json.loads(path.read_text(encoding="utf-8"))
            if cell["key"] == key:
                return cell
        except (ValueError, LookupError, TypeError):
            pass  # torn or foreign: made again
    cell = {"key": key, **make()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(cell) + "\n")
    return cell


def race(
    problem: Problem, contender: Contender, folder: Path, seeds: int, seconds: float, grid: tuple[float, ...]
) -> dict[str, Any]:
    """Tune the rate with one seed, then run the others; all cells of one contender on one problem."""
    torch.set_num_threads(1)
    data = problem.data()
    place = folder / problem.name / contender.name.replace("/", "-")

    def cell(rate: float, seed: int) -> dict[str, Any]:
        key = {
            "rate": rate,
            "seed": seed,
            "seconds": seconds,
            "target": problem.target,
            "batch": problem.batch,
        }
        make = lambda: run_cell(problem, contender, rate, seed, data, seconds)  # noqa: E731
        return kept(place / f"rate {rate:.4g} seed {seed}.json", make, key)

    try:
        trials = [cell(contender.rate * factor, 0) for factor in grid]
        best = min(trials, key=lambda c: math.inf if c["final"] is None else c["final"])
        if best["final"] is None:
            return {"trials": trials, "runs": [], "outside": "diverges at every rate of the grid"}
        runs = [cell(best["rate"], seed) for seed in range(1, seeds + 1)]
    except UnsupportedError as error:
        return {"trials": [], "runs": [], "outside": " ".join(str(error).split())}
    except Exception as error:  # one that fails must not cost the others their runs; the table says so
        return {"trials": [], "runs": [], "outside": f"{type(error).__name__}: {error}"}
    edge = len(grid) > 1 and best["rate"] in (trials[0]["rate"], trials[-1]["rate"])
    return {"trials": trials, "runs": runs, "rate": best["rate"], "edge": edge}


def cost(
    problem: Problem, contenders: list[Contender], rates: dict[str, float], rounds: int
) -> dict[str, Any]:
    """CPU seconds of a step and peak memory of each contender; steps taken in turn, so that all see one machine."""
    torch.set_num_threads(1)
    data = problem.data()
    runners, times, found = {}, {}, {}
    for contender in contenders:
        try:
            runners[contender.name] = Runner(problem, contender, rates[contender.name], 0, data)
            for _ in range(3):
                runners[contender.name].step()
            times[contender.name] = []
        except Exception as error:
            found[contender.name] = {"outside": f"{type(error).__name__}: {error}"}
            runners.pop(contender.name, None)
    for _ in range(rounds):
        for name, runner in runners.items():
            start = time.process_time()
            runner.step()
            times[name].append(time.process_time() - start)
    for contender in contenders:
        if contender.name in times:
            bare, peak = peak_bytes(problem, contender, rates[contender.name], data)
            mean = sum(times[contender.name]) / rounds  # not the median: some work only at every tenth step
            found[contender.name] = {"step": mean, "memory": bare + peak}
    return found


def peak_bytes(problem: Problem, contender: Contender, rate: float, data: Dataset) -> tuple[int, int]:
    """Bytes of the network, and the largest number of bytes allocated beside it while twelve steps are made.

    Counted are torch's own allocations on the CPU: activations, gradients, state of the optimizer and scratch.
    """
    from torch.profiler import ProfilerActivity, profile

    def steps() -> None:
        runner.optimizer = contender.build(runner.model, rate)
        for _ in range(12):
            runner.step()

    none = replace(contender, build=lambda net, _: torch.optim.SGD(net.parameters(), lr=0.0))
    runner = Runner(problem, none, 0.0, 0, data)
    runner.contender = contender
    gc.collect()  # what others left behind must not be freed, and subtracted, in between
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)  # the profiler talks
    os.dup2(sink, 2)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            steps()
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    bare = sum(p.numel() * p.element_size() for p in runner.model.parameters())
    return bare, peak
