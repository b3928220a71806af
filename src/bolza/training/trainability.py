r"""Which depths train from which initialisation: accuracy over (σ_w², σ_b²) × depth, many networks at a time.

    W ~ N(0, σ_w²/fan_in),  b ~ N(0, σ_b²);    θ ← θ − η ∇f_B(θ), a fixed number of steps;    accuracy

All points and seeds of one depth are one stack of networks (:mod:`bolza.training.stacked`), and depths share
the cores through joblib.

Reference: Schoenholz, Gilmer, Ganguli & Sohl-Dickstein (2017), *Deep Information Propagation*, §5 and fig. 5.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, CheckpointError
from bolza.core.reference import Reference, cites
from bolza.training.checkpoint import discard_partial, load_tree, save_tree
from bolza.training.checks import at_least_one, check_seed
from bolza.training.interrupt import InterruptGuard
from bolza.training.optimizers import default_loss
from bolza.training.order import BatchOrder
from bolza.training.stacked import Elementwise, StackedMLP, draw, quick_is_right, resolve
from bolza.training.trained_map import TrainabilityMap

if TYPE_CHECKING:
    from bolza.data import Dataset

__all__ = ["TrainabilityMap", "trainability_map"]

Numbers = float | Sequence[float] | Tensor

REFERENCE = Reference(
    key="schoenholz2017deep",
    authors="Schoenholz, Samuel S. and Gilmer, Justin and Ganguli, Surya and Sohl-Dickstein, Jascha",
    title="Deep Information Propagation",
    year=2017,
    venue="ICLR",
    arxiv="1611.01232",
)

_ROOM = 2**25  # bytes of parameters and states that are trained together unless chunk= says otherwise
_FIELDS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "diverged")


@cites(REFERENCE)
def trainability_map(
    data: Dataset,
    weight_vars: Sequence[float] | Tensor,
    depths: Sequence[int],
    *,
    bias_vars: Numbers = 0.05,
    width: int = 100,
    activation: str | nn.Module | type[nn.Module] | Elementwise = "tanh",
    lr: Numbers = 3e-3,
    momentum: float = 0.0,
    batch_size: int = 64,
    steps: int = 200,
    seeds: int = 1,
    seed: int = 0,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    folder: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    chunk: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> TrainabilityMap:
    r"""Train multi-layer perceptrons over (σ_w², σ_b²) × depth for a fixed budget, and say which learn.

        W ~ N(0, σ_w²/fan_in),  b ~ N(0, σ_b²),     v ← μ v + ∇f_B(θ),  θ ← θ − η v,     ``steps`` times

    Each network trains as if it were alone: it equals ``nn.Sequential`` under ``torch.optim.SGD`` on the same
    mini-batches, up to rounding. Networks of one depth share their mini-batches, and networks of one seed and
    depth their standard normals, so that a row of the map shows the effect of the variances.

    Args:
        data: classification or regression; inputs are flattened. Its dtype and device are those of the run.
        weight_vars: σ_w² of each point, ``(points,)``.
        depths: linear layers, the last one included; any order.
        bias_vars: σ_b², one number or one a point. A grid is ``torch.cartesian_prod`` of the two axes.
        width: neurons in each hidden layer.
        activation: name, module without parameters, or any function of a tensor, element by element. ``tanh``,
            ``relu`` and ``sigmoid`` have a derivative by hand, others go through autograd.
        lr: η, one number or one a point.
        momentum: μ.
        batch_size: samples a step.
        steps: SGD steps of each network.
        seeds: networks a point and depth.
        seed: of everything: draws and mini-batches; parameters of seed s and depth d are those of
            ``ensemble_parameters(..., seed=seed + 1000 * s + d)``.
        loss: (outputs, targets) → scalar, a mean over samples; that of the task where not given.
        folder: one file a depth is written there as soon as the depth is done, and files of the same map that
            are there already are read instead of trained again: the way to resume.
        jobs: depths trained at the same time, each with its share of the cores; -1 for as many as there are
            cores. 1 on a GPU.
        chunk: networks in one stack; as many as take 32 MiB by default.
        progress: called with (done, total) in units of one step of one layer of one network.

    Returns:
        :class:`TrainabilityMap`. After Ctrl-C it holds the depths that were done and ``status`` says so.

    Raises:
        ArgumentError: a setting cannot be used, by name.
        CheckpointError: the folder holds files of another map, or cannot be written.
        DataError: the labels do not fit.

    Reference: Schoenholz et al. (2017), §5; Liu & Theodorou (2019), fig. 2. Departure: weights are scaled by the
    fan-in in every layer, and any data set and optimizer setting may be used.

    Example:
        >>> from bolza.data import digits
        >>> found = trainability_map(digits(), [1.0, 1.76], [2, 30], width=20, lr=0.05, steps=60)
        >>> found.train_accuracy.shape
        torch.Size([1, 2, 2])
        >>> bool(found.train_accuracy[0, 1, 0] > 0.5)
        True
    """
    job = _Job.of(
        data,
        weight_vars,
        depths,
        bias_vars,
        width,
        activation,
        lr,
        momentum,
        batch_size,
        steps,
        seeds,
        seed,
        loss,
    )
    at_least_one("chunk", chunk if chunk is not None else 1)
    workers = _workers(jobs, job)
    files = None if folder is None else _Files(Path(folder), job)
    results: dict[int, dict[str, Any]] = {}
    meter = _Meter(job.steps * job.seeds * job.points * sum(job.depths), progress)
    for depth in job.depths:
        known = None if files is None else files.read(depth)
        if known is not None:
            results[depth] = known
            meter.add(job.work(depth))
    todo = sorted(set(job.depths) - set(results), reverse=True)  # the longest first, so that all end together
    with InterruptGuard() as guard:
        try:
            for depth, result in _all(job, todo, workers, chunk, meter, guard):
                if result is not None:
                    results[depth] = result
                    if files is not None:
                        files.write(depth, result)
        except KeyboardInterrupt:
            guard.requested = True
        guard.patience = sys.maxsize
    return job.collect(results)


@dataclass(frozen=True)
class _Job:
    """A map to be made: everything that decides its numbers."""

    data: Dataset
    weight_vars: Tensor
    bias_vars: Tensor
    rates: Tensor
    depths: tuple[int, ...]
    width: int
    activation: Any
    momentum: float
    batch_size: int
    steps: int
    seeds: int
    seed: int
    loss: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def of(
        cls,
        data: Dataset,
        weight_vars: Sequence[float] | Tensor,
        depths: Sequence[int],
        bias_vars: Numbers,
        width: int,
        activation: Any,
        lr: Numbers,
        momentum: float,
        batch_size: int,
        steps: int,
        seeds: int,
        seed: int,
        loss: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> _Job:
        if not hasattr(data, "train_x"):
            raise ArgumentError(f"data is a {type(data).__name__}: give bolza.data.load(...) of it")
        if data.task == "language" or not data.train_x.is_floating_point():
            raise ArgumentError("data must have floating inputs and one target a sample, not tokens")
        weights = torch.as_tensor(weight_vars, dtype=torch.float64).flatten().cpu()
        points = len(weights)
        if not points or not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ArgumentError(
                f"weight_vars={weight_vars} must hold variances, at least one and none negative"
            )
        biases, rates = _per_point("bias_vars", bias_vars, points), _per_point("lr", lr, points)
        if isinstance(depths, Tensor):
            depths = depths.flatten().tolist()
        if isinstance(depths, int | float) or not len(depths):
            raise ArgumentError(f"depths={depths} must be a list of numbers of layers")
        if any(isinstance(d, bool) or d != int(d) or d < 1 for d in depths):
            raise ArgumentError(f"depths={depths} must hold numbers of layers, each at least 1")
        if len(set(depths)) < len(depths):
            raise ArgumentError(f"depths={depths} names a depth twice")
        if not 0 <= momentum < 1:
            raise ArgumentError(f"momentum={momentum} must be at least 0 and below 1")
        for name, value in (("width", width), ("batch_size", batch_size), ("steps", steps), ("seeds", seeds)):
            at_least_one(name, value)
        check_seed(seed)
        resolve(activation)
        flat = data.train_x.flatten(1), data.test_x.flatten(1)
        data = type(data)(flat[0], data.train_y, flat[1], data.test_y, data.task, data.num_classes, data.name)
        if data.task == "regression" and data.train_y.ndim == 1:
            raise ArgumentError("regression targets need shape (samples, values): give y[:, None]")
        return cls(
            data, weights, biases, rates, tuple(int(d) for d in depths), width, activation, momentum, batch_size,
            steps, seeds, seed, loss or default_loss(data.task),
        )  # fmt: skip

    @property
    def points(self) -> int:
        return len(self.weight_vars)

    def sizes(self, depth: int) -> list[int]:
        return [self.data.input_shape[0], *[self.width] * (depth - 1), self.data.output_size]

    def work(self, depth: int) -> int:
        return self.steps * self.seeds * self.points * depth

    def stack(self, depth: int) -> int:
        """Members of one stack that stay within the room for it."""
        sizes = self.sizes(depth)
        one = sum(a * b + b * (1 + self.batch_size) for a, b in zip(sizes, sizes[1:], strict=False))
        return max(1, int(_ROOM / (one * self.data.train_x.element_size() * (2 if self.momentum else 1))))

    def settings(self) -> dict[str, Any]:
        """What a file must agree with to be a part of this map."""
        grid = torch.linspace(-4, 4, 64, dtype=torch.float64).to(self.data.train_x)
        some = self.data.train_y[:8]
        out = grid.new_tensor([math.sin(i) for i in range(len(some) * self.data.output_size)])
        own = not isinstance(self.activation, str)
        name = _name(resolve(self.activation)[1], grid) if own else self.activation
        loss = (
            ""
            if self.loss is default_loss(self.data.task)
            else _name(self.loss, out.reshape(len(some), -1), some)
        )
        return {
            "weight_vars": self.weight_vars.tolist(), "bias_vars": self.bias_vars.tolist(), "lr": self.rates.tolist(),
            "width": self.width, "activation": name, "momentum": self.momentum, "batch_size": self.batch_size,
            "steps": self.steps, "seeds": self.seeds, "seed": self.seed, "loss": loss,
            "data": f"{self.data.name}:{_fingerprint(self.data)}",
        }  # fmt: skip

    def train(
        self, depth: int, chunk: int | None, tell: Callable[[int], None], stop: Callable[[], bool]
    ) -> dict[str, Any] | None:
        """Train every network of one depth; None if it was stopped."""
        started = time.perf_counter()
        members = [(s, p) for s in range(self.seeds) for p in range(self.points)]
        size = chunk or self.stack(depth)
        size = math.ceil(len(members) / math.ceil(len(members) / size))  # stacks of about the same size
        parts = []
        for at in range(0, len(members), size):
            part = members[at : at + size]
            columns = torch.tensor([p for _, p in part])
            weights, biases = draw(
                self.sizes(depth),
                self.weight_vars[columns],
                self.bias_vars[columns],
                [self.seed + 1000 * s + depth for s, _ in part],
                self.data.train_x,
            )
            net = StackedMLP(
                weights, biases, self.activation, self.rates[columns], self.momentum, self.loss,
                quick_is_right(self.bias_vars[columns]),
            )  # fmt: skip
            order = BatchOrder(self.data.train_x, self.data.train_y, self.batch_size, self.seed)
            for _ in range(self.steps):
                if stop():
                    return None
                net.step(*order.next())
                tell(len(part) * depth)
            parts.append(_scores(net, self.data, self.loss))
        shape = (self.seeds, self.points)
        joined = {name: torch.cat([part[name] for part in parts]).reshape(shape) for name in _FIELDS}
        return joined | {"seconds": time.perf_counter() - started}

    def collect(self, results: dict[int, dict[str, Any]]) -> TrainabilityMap:
        shape = (self.seeds, self.points)
        missing = {name: torch.full(shape, math.nan, dtype=torch.float64) for name in _FIELDS}
        missing["diverged"] = torch.zeros(shape, dtype=torch.bool)
        found = [results.get(d, missing | {"seconds": math.nan}) for d in self.depths]
        stacked = {name: torch.stack([part[name] for part in found], -1) for name in _FIELDS}
        return TrainabilityMap(
            self.weight_vars,
            self.bias_vars,
            self.depths,
            **stacked,
            status="finished" if len(results) == len(self.depths) else "interrupted",
            settings=self.settings(),
            seconds=torch.tensor([float(part["seconds"]) for part in found], dtype=torch.float64),
        )


class _Files:
    """One file a depth in a folder."""

    def __init__(self, folder: Path, job: _Job) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"the folder {str(folder)!r} cannot be made: {error.strerror}") from error
        self.folder, self.settings = folder, job.settings()

    def place(self, depth: int) -> Path:
        return self.folder / f"depth-{depth:05d}.safetensors"

    def read(self, depth: int) -> dict[str, Any] | None:
        path = self.place(depth)
        discard_partial(path)
        if not path.exists():
            return None
        tree = load_tree(path)
        other = tree.get("settings", {}) if isinstance(tree, dict) else {}
        wrong = [name for name, value in self.settings.items() if other.get(name) != value]
        if wrong:
            raise CheckpointError(
                f"{str(path)!r} belongs to another map: it differs in {', '.join(wrong)}; name another folder"
            )
        result = tree.get("result")
        if tree.get("depth") != depth or not isinstance(result, dict) or {*_FIELDS, "seconds"} - set(result):
            raise CheckpointError(
                f"{str(path)!r} does not hold the results of depth {depth}: delete it to start anew"
            )
        return dict(result)

    def write(self, depth: int, result: dict[str, Any]) -> None:
        save_tree({"settings": self.settings, "depth": depth, "result": result}, self.place(depth))


class _Meter:
    """Work done so far, by several threads."""

    def __init__(self, total: int, progress: Callable[[int, int], object] | None) -> None:
        self.total, self.progress, self.done = total, progress, 0
        self._lock = threading.Lock()

    def add(self, amount: int) -> None:
        with self._lock:
            self.done += amount
            if self.progress is not None:
                self.progress(self.done, self.total)


def _all(
    job: _Job, depths: list[int], workers: int, chunk: int | None, meter: _Meter, guard: InterruptGuard
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The depths one after another, or several at a time in threads: products hold no lock."""
    stopped = threading.Event()

    def stop() -> bool:
        return guard.requested or stopped.is_set()

    if workers == 1 or len(depths) < 2:
        for depth in depths:
            yield depth, job.train(depth, chunk, meter.add, stop)
        return
    from joblib import Parallel, delayed

    threads = torch.get_num_threads()
    share = max(1, threads // workers)

    def one(depth: int) -> tuple[int, dict[str, Any] | None]:
        torch.set_num_threads(share)  # of this thread
        return depth, job.train(depth, chunk, meter.add, stop)

    try:
        run = Parallel(n_jobs=workers, require="sharedmem", return_as="generator_unordered")
        yield from run(delayed(one)(depth) for depth in depths)
    finally:
        stopped.set()
        torch.set_num_threads(threads)


def _workers(jobs: int, job: _Job) -> int:
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs == 0 or jobs < -1:
        raise ArgumentError(
            f"jobs={jobs!r} must be a number of workers, or -1 for as many as there are cores"
        )
    if job.data.train_x.is_cuda:
        return 1
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
               len(job.depths)) if jobs == -1 else jobs  # fmt: skip


@torch.no_grad()
def _scores(net: StackedMLP, data: Dataset, loss: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    finite = torch.stack([p.flatten(1).isfinite().all(1) for p in (*net.weights, *net.biases)]).all(0)
    found = {"diverged": (~finite).cpu()}
    for split, x, y in (("train", data.train_x, data.train_y), ("test", data.test_x, data.test_y)):
        if not len(x):
            nothing = torch.full((net.members,), math.nan, dtype=torch.float64)
            found |= {f"{split}_loss": nothing, f"{split}_accuracy": nothing}
            continue
        outputs = net.outputs(x)
        losses = torch.stack([loss(one, y) for one in outputs]).double().nan_to_num(nan=math.inf)
        found[f"{split}_loss"] = torch.where(finite, losses, math.inf).cpu()
        right = (
            (outputs.argmax(-1) == y).double()
            if data.task == "classification"
            else outputs[..., 0] * math.nan
        )
        found[f"{split}_accuracy"] = right.double().mean(1).cpu()
    return found


def _per_point(name: str, values: Numbers, points: int) -> Tensor:
    tensor = torch.as_tensor(values, dtype=torch.float64).flatten().cpu()
    if len(tensor) not in (1, points):
        raise ArgumentError(
            f"{name} holds {len(tensor)} values for {points} points: give one, or one a point"
        )
    if not bool((tensor.isfinite() & (tensor >= 0)).all()):
        raise ArgumentError(f"{name}={values} must be finite and not negative")
    return tensor.expand(points)


def _name(thing: Any, *at: Tensor) -> str:
    """Name of a function, with a checksum of what it makes of numbers: two lambdas have one name."""
    name = thing.__qualname__ if hasattr(thing, "__qualname__") else repr(thing)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = thing(*at).detach().cpu().double().contiguous().flatten()
    return f"{name}:{zlib.crc32(made.view(torch.uint8).numpy().data):08x}"


def _fingerprint(data: Dataset) -> str:
    """CRC-32 of the data, so that a folder is not taken for that of other data."""
    value = 0
    for tensor in (data.train_x, data.train_y, data.test_x, data.test_y):
        value = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
