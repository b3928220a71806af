"""Runs of one method at many learning rates, counted in gradients.

A cell is one run: task × method × rate × seed, kept as one JSON file, written at once or not at all. Every run may
spend the same number of gradients: a mini-batch gradient of 32 samples counts as one, and what a controller computes
beside them (Hessian products, gradients of its own) is counted through the multiplications and additions that it makes
in matrix products and convolutions, as a multiple of those of a gradient.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import bolza.data
from bolza import controllers
from bolza.core.errors import DivergenceError
from bolza.data import Dataset
from bolza.report import write_atomic
from bolza.training import BatchOrder

BATCH = 32
HALF_DECADES = range(-5, 6)  # a grid of rates: middle × 10^(k/2), five decades
CHANCE = 0.1  # accuracy of a run that ended in numbers that are not finite


# --------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """A network, its data, and the length of a run in passes through them."""

    title: str
    data: str
    shape: tuple[int, ...]
    net: Callable[[], nn.Module]
    epochs: int

    def load(self) -> Dataset:
        """The samples in the shape that the network takes."""
        flat = _load(self.data)
        x, test_x = (part.reshape(-1, *self.shape) for part in (flat.train_x, flat.test_x))
        return Dataset(
            x, flat.train_y, test_x, flat.test_y, "classification", 10, flat.name, flat.description
        )

    def gradients(self) -> int:
        """Mini-batch gradients of a run."""
        return self.epochs * (len(_load(self.data).train_x) // BATCH)


@lru_cache(maxsize=2)
def _load(name: str) -> Dataset:
    return getattr(bolza.data, name)()


def perceptron(*sizes: int, activation: type[nn.Module]) -> nn.Module:
    """Linear layers with an activation between each two."""
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def convolutional(kernel: int, padding: int, features: int, activation: type[nn.Module]) -> nn.Module:
    """Two convolutions of stride 2 and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, kernel, stride=2, padding=padding),
        activation(),
        nn.Conv2d(8, 16, kernel, stride=2, padding=padding),
        activation(),
        nn.Flatten(),
        nn.Linear(features, 10),
    )


TASKS = {
    "digits-mlp": Task(
        "digits, perceptron (tanh)", "digits", (64,), partial(perceptron, 64, 64, 10, activation=nn.Tanh), 8
    ),
    "digits-conv": Task(
        "digits, convolutions (tanh)", "digits", (1, 8, 8), partial(convolutional, 3, 1, 64, nn.Tanh), 6
    ),
    "mnist5k-mlp": Task(
        "MNIST 5000, perceptron (ReLU)",
        "mnist5k",
        (784,),
        partial(perceptron, 784, 64, 64, 10, activation=nn.ReLU),
        4,
    ),
    "mnist5k-conv": Task(
        "MNIST 5000, convolutions (ReLU)",
        "mnist5k",
        (1, 28, 28),
        partial(convolutional, 5, 0, 256, nn.ReLU),
        3,
    ),
}


# ------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Setting:
    """What a method is built for: a network, its data, a rate and the number of steps."""

    model: nn.Module
    data: Dataset
    rate: float
    steps: int
    seed: int = 0
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    @property
    def params(self) -> list[nn.Parameter]:
        """What is trained."""
        return list(self.model.parameters())

    @property
    def samples(self) -> tuple[Tensor, Tensor]:
        """The training samples."""
        return self.data.train_x, self.data.train_y


Pair = tuple[torch.optim.Optimizer, Any]


@dataclass(frozen=True)
class Method:
    """An optimizer with what steers it.

    Args:
        family: panel of the figure: ``plain``, ``peers``, ``csgd`` or ``controllers``.
        build: setting → (optimizer, controller or None).
        middle: middle of the grid of rates; for the peers, their default, of which the grid takes multiples.
        extra: first guess at the gradients that the controller spends, as a share of those of the steps. Runs are
            planned shorter by what it spends at the middle rate. None for a controller that holds no network.
        needs: name in :mod:`bolza.controllers`; without it the method is left out.
    """

    family: str
    build: Callable[[Setting], Pair]
    middle: float = 10**-1.5
    extra: float | None = None
    needs: str = ""

    @property
    def rates(self) -> list[float]:
        """Eleven rates, half a decade apart."""
        return [self.middle * 10 ** (k / 2) for k in HALF_DECADES]


def _sgd(s: Setting, momentum: float = 0.0) -> torch.optim.SGD:
    return torch.optim.SGD(s.params, lr=s.rate, momentum=momentum)


def _adam(s: Setting) -> torch.optim.Adam:
    return torch.optim.Adam(s.params, lr=s.rate)


def _cosine(make: Callable[[Setting], torch.optim.Optimizer]) -> Callable[[Setting], Pair]:
    def build(s: Setting) -> Pair:
        optimizer = make(s)
        return optimizer, lr_scheduler.CosineAnnealingLR(optimizer, T_max=s.steps)

    return build


def _peer(name: str, **options: Any) -> Callable[[Setting], torch.optim.Optimizer]:
    def build(s: Setting) -> torch.optim.Optimizer:
        import pytorch_optimizer

        return getattr(pytorch_optimizer, name)(s.params, lr=s.rate, **options)

    return build


def _alone(make: Callable[[Setting], torch.optim.Optimizer]) -> Callable[[Setting], Pair]:
    return lambda s: (make(s), None)


def _worn(name: str, momentum: float = 0.0, **options: Any) -> Callable[[Setting], Pair]:
    """A controller that needs nothing but the optimizer."""

    def build(s: Setting) -> Pair:
        optimizer = _sgd(s, momentum)
        return optimizer, getattr(controllers, name)(optimizer, **options)

    return build


def _measuring(name: str, *wants: str, momentum: float = 0.0, **options: Any) -> Callable[[Setting], Pair]:
    """A controller that looks at the network and its data."""

    def build(s: Setting) -> Pair:
        optimizer = _sgd(s, momentum)
        given = {"steps": s.steps, "batch_size": BATCH, "seed": s.seed}
        some = {key: given[key] for key in wants} | options
        return optimizer, getattr(controllers, name)(optimizer, s.model, s.loss, s.samples, **some)

    return build


def _named(name: str) -> Callable[[Setting], Pair]:
    """A controller as ``bolza.controllers.make`` sets it for a run of this length."""

    def build(s: Setting) -> Pair:
        optimizer = _sgd(s)
        return optimizer, controllers.make(name, optimizer, s.steps)

    return build


METHODS: dict[str, Method] = {
    "SGD": Method("plain", _alone(_sgd)),
    "SGD, cosine": Method("plain", _cosine(_sgd)),
    "SGD, momentum 0.9": Method("plain", _alone(partial(_sgd, momentum=0.9))),
    "Adam": Method("plain", _alone(_adam), 1e-3),
    "Adam, cosine": Method("plain", _cosine(_adam), 1e-3),
    "ScheduleFreeSGD": Method("peers", _alone(_peer("ScheduleFreeSGD")), 1.0),
    "ScheduleFreeAdamW": Method("peers", _alone(_peer("ScheduleFreeAdamW")), 2.5e-3),
    "Prodigy, cosine": Method("peers", _cosine(_peer("Prodigy")), 1.0),
    "DAdaptSGD": Method("peers", _alone(_peer("DAdaptSGD")), 1.0),
    "DAdaptAdam": Method("peers", _alone(_peer("DAdaptAdam")), 1.0),
    "CSGD, coordinate": Method("csgd", _worn("CSGD", granularity="coordinate"), needs="CSGD"),
    "CSGD, layer": Method("csgd", _worn("CSGD", granularity="layer"), needs="CSGD"),
    "CSGD, global": Method("csgd", _worn("CSGD", granularity="global"), needs="CSGD"),
    "CSGD, released": Method("csgd", _worn("CSGD", granularity="coordinate", form="released"), needs="CSGD"),
    "CMSGD": Method("csgd", _worn("CMSGD", momentum=0.9), needs="CMSGD"),
    "OptimalSchedule": Method(
        "controllers",
        _measuring("OptimalSchedule", "steps", "batch_size"),
        extra=0.1,
        needs="OptimalSchedule",
    ),
    "StabilityLimit": Method("controllers", _measuring("StabilityLimit"), extra=0.1, needs="StabilityLimit"),
    "HyperGradient": Method("controllers", _worn("HyperGradient"), needs="HyperGradient"),
    "Stationarity": Method("controllers", _named("stationarity"), needs="StationarityAnnealing"),
    "BatchSize": Method("controllers", _worn("BatchSizeController"), needs="BatchSizeController"),
}


def available() -> dict[str, Method]:
    """Methods whose controller is there."""
    return {n: m for n, m in METHODS.items() if not m.needs or hasattr(controllers, m.needs)}


# ----------------------------------------------------------------------------------- one cell


class Work(TorchDispatchMode):
    """Counts multiplications and additions of matrix products and convolutions while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        rule = flop_registry.get(func._overloadpacket)
        if rule is not None:
            self.flops += rule(*args, **(kwargs or {}), out_val=out)
        return out


def gradient_work(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Work of the gradient of one sample."""
    with Work() as work:
        torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    return work.flops / len(x)


def run_cell(task: Task, method: Method, rate: float, seed: int, share: float = 1.0) -> dict[str, Any]:
    """Train once; accuracy on the test samples, and what the run spent."""
    return _run(
        task, method, rate, seed, share, 0.0 if method.extra is None else _spends(task, method, share)
    )


@lru_cache(maxsize=64)
def _spends(task: Task, method: Method, share: float) -> float:
    """Gradients that a controller spends for each one of the steps, found by a run at the middle rate."""
    assert method.extra is not None
    cell = _run(task, method, method.middle, 0, share, method.extra)
    return cell["extra_gradients"] / max(cell["gradients"], 1.0)


def _run(task: Task, method: Method, rate: float, seed: int, share: float, extra: float) -> dict[str, Any]:
    data = task.load()
    torch.manual_seed(seed)
    model = task.net()
    unit = BATCH * gradient_work(model, data.train_x[:BATCH], data.train_y[:BATCH])
    order = BatchOrder(data.train_x, data.train_y, BATCH, seed)
    budget = max(1, round(share * task.gradients()))
    steps = max(1, round(budget / (1 + extra)))
    started, work, spent, made = time.process_time(), Work(), 0.0, 0
    counted = nullcontext() if method.extra is None else work  # counting is slow
    end = "finished"
    try:
        with counted:
            optimizer, controller = method.build(Setting(model, data, rate, steps, seed))
        if hasattr(controller, "attach_batches"):
            controller.attach_batches(order)
        # a batch may grow: then the samples are what is equal, and the steps are fewer
        while spent + work.flops / unit < budget - 0.5 and made < steps:
            x, y = order.next()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            value = loss.item()
            if not math.isfinite(value):
                end = "diverged"
                break
            loss.backward()
            optimizer.step()
            made += 1
            spent += len(x) / BATCH
            if isinstance(controller, lr_scheduler.LRScheduler):
                controller.step()
            elif controller is not None:
                with counted:
                    controller.step(loss=value)
        if hasattr(optimizer, "eval"):  # those that average weights give the average
            optimizer.eval()
    except DivergenceError as error:
        end = f"diverged: {error}"
    except Exception as error:  # a method that fails must not cost the others their runs; the table says so
        end = f"failed: {type(error).__name__}: {error}"
    accuracy, train_loss = _judge(model, data)
    if end == "finished" and train_loss is None:
        end = "diverged"
    return {
        "accuracy": accuracy if end == "finished" else CHANCE,
        "train_loss": train_loss,
        "end": end,
        "steps": made,
        "gradients": spent,
        "extra_gradients": work.flops / unit,
        "budget": budget,
        "cpu_s": time.process_time() - started,
    }


@torch.no_grad()
def _judge(model: nn.Module, data: Dataset) -> tuple[float, float | None]:
    scores = model(data.test_x)
    loss = float(F.cross_entropy(model(data.train_x[:1024]), data.train_y[:1024]))
    right = float((scores.argmax(1) == data.test_y).double().mean())
    return right, loss if math.isfinite(loss) and bool(scores.isfinite().all()) else None


@lru_cache(maxsize=64)
def source(needs: str) -> str:
    """Fingerprint of the program of a controller: its file and those it takes names from, without their texts."""
    if not needs:
        return ""
    home = sys.modules[getattr(controllers, needs).__module__]
    modules = {getattr(thing, "__module__", "") for thing in vars(home).values()} | {home.__name__}
    code = hashlib.sha1()
    for name in sorted(str(m) for m in modules if str(m).startswith("bolza.controllers")):
        tree = ast.parse(Path(str(sys.modules[name].__file__)).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                node.body = node.body[1:]
        code.update(ast.dump(tree).encode())
    return code.hexdigest()[:12]


def kept_cell(
    folder: Path, task: str, method: str, rate: float, seed: int, share: float, fresh: bool = False
) -> dict[str, Any]:
    """The cell of the folder if there is one of the same settings, else a new one.

    With ``fresh``, a cell that another version of the controller made is made again.
    """
    version = source(METHODS[method].needs)
    key = {"rate": rate, "seed": seed, "share": share, "epochs": TASKS[task].epochs, "batch": BATCH}
    path = folder / task / method.replace(", ", "-").replace(" ", "-") / f"rate {rate:.3g} seed {seed}.json"
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
        same = cell.get("source", "") == version or not fresh
        if cell["key"] == key and same and not cell["end"].startswith("failed"):
            return cell
    except (OSError, ValueError, LookupError, TypeError):
        pass  # not there, torn or foreign
    torch.set_num_threads(1)
    with warnings.catch_warnings():  # of a rate beyond the limit: nearly every second one here is meant to be
        warnings.simplefilter("ignore")
        cell = {"key": key, "source": version, **run_cell(TASKS[task], METHODS[method], rate, seed, share)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(cell) + "\n")
    return cell
