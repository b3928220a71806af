"""What does a trainability map cost, beside training the same networks one by one on the same cores?

20 values of σ_w² × 10 depths of width 100 on digits. One by one is ``nn.Sequential`` and ``torch.optim.SGD`` on
tensors that are already in memory, with as many threads as there are cores, and with one thread: the faster of the
two counts. Its time is that of a few σ_w² of each depth, times how many there are (``--full``: all of them), taken
around the map. ``wall`` is what a user waits; ``cpu`` is CPU seconds, which other work on the machine disturbs less:
wall_ratio ≈ cpu_ratio × cores where the cores are free.
"""

from __future__ import annotations

from _bench import emit, environment  # isort: skip  (sets the threads before torch loads)

import argparse
import statistics
import time
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from bolza.data import digits
from bolza.models import mlp
from bolza.training import BatchOrder, ensemble_parameters, trainability_map

BENCH = "trainability"
WEIGHT_VARS = torch.linspace(1.0, 4.0, 20, dtype=torch.float64)
DEPTHS = tuple(range(10, 101, 10))
WIDTH, BIAS_VAR, LR = 100, 0.05, 3e-3


def one_by_one(data, weight_var: float, depth: int, batch: int, steps: int, momentum: float) -> float:
    """Accuracy of one network, trained as anybody would."""
    net = mlp(depth, WIDTH)
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(0, (weight_var / layer.in_features) ** 0.5)
                layer.bias.normal_(0, BIAS_VAR**0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=momentum)
    order = BatchOrder(data.train_x, data.train_y, batch, 0)
    for _ in range(steps):
        x, y = order.next()
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        return float((net(data.train_x).argmax(1) == data.train_y).double().mean())


def clock(function) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def check(data, batch: int, momentum: float) -> float:
    """Largest difference in accuracy between the map and networks trained one by one from the same start."""
    worst = 0.0
    found = trainability_map(
        data, WEIGHT_VARS[::7], [10], lr=LR, batch_size=batch, steps=30, momentum=momentum
    ).train_accuracy[0, :, 0]
    for i, w in enumerate(WEIGHT_VARS[::7].tolist()):
        net = mlp(10, WIDTH)
        start = ensemble_parameters(lambda: mlp(10, WIDTH), [w], BIAS_VAR, seed=10)
        net.load_state_dict({name: p[0] for name, p in start.items()})
        optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=momentum)
        order = BatchOrder(data.train_x, data.train_y, batch, 0)
        for _ in range(30):
            x, y = order.next()
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        accuracy = float((net(data.train_x).argmax(1) == data.train_y).double().mean())
        worst = max(worst, abs(accuracy - float(found[i])))
    return worst


def main() -> None:
    """Run the comparison for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128], help="batch sizes")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--depths", type=int, nargs="+", default=list(DEPTHS), help="fewer for a quick look")
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--jobs", type=int, default=2, help="cores")
    parser.add_argument(
        "--sample", type=int, default=1, help="networks a depth trained one by one, around the map"
    )
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        help="threads to try one by one; 1 and the number of cores by default",
    )
    parser.add_argument("--full", action="store_true", help="train all of them one by one")
    args = parser.parse_args()
    emit(BENCH, "environment", **environment(), jobs=args.jobs, steps=args.steps)
    data = digits()
    data = replace(
        data, test_x=data.test_x[:0], test_y=data.test_y[:0]
    )  # accuracy counts on the training set
    options = {
        "lr": LR,
        "momentum": args.momentum,
        "bias_vars": BIAS_VAR,
        "width": WIDTH,
        "steps": args.steps,
    }
    sample = len(WEIGHT_VARS) if args.full else args.sample
    for batch in args.batches:
        emit(BENCH, "agreement", batch=batch, largest_accuracy_difference=check(data, batch, args.momentum))
        torch.set_num_threads(args.jobs)
        trainability_map(data, WEIGHT_VARS, [2], jobs=args.jobs, batch_size=batch, **options)  # warm up
        torch.set_num_threads(1)
        one_by_one(data, 1.5, 5, batch, 5, args.momentum)
        alone: dict[int, list[tuple[float, float]]] = {n: [] for n in args.threads or (1, args.jobs)}

        def loop(threads: int, batch: int = batch, alone: dict = alone) -> None:
            torch.set_num_threads(threads)
            for depth in args.depths:
                for w in WEIGHT_VARS[:: len(WEIGHT_VARS) // sample][:sample].tolist():
                    alone[threads].append(
                        clock(lambda d=depth, w=w: one_by_one(data, w, d, batch, args.steps, args.momentum))
                    )

        for threads in alone:
            loop(threads)
        torch.set_num_threads(args.jobs)
        wall, cpu = clock(
            lambda batch=batch: trainability_map(
                data, WEIGHT_VARS, args.depths, jobs=args.jobs, batch_size=batch, **options
            )
        )
        if not args.full:
            for threads in alone:
                loop(threads)
        passes = 1 if args.full else 2
        scale = len(WEIGHT_VARS) / sample / passes
        walls = {n: scale * sum(w for w, _ in seconds) for n, seconds in alone.items()}
        cpus = {n: scale * sum(c for _, c in seconds) for n, seconds in alone.items()}
        best = min(walls, key=walls.__getitem__)
        work = len(WEIGHT_VARS) * sum(args.depths) * args.steps
        emit(
            BENCH,
            f"map of {len(WEIGHT_VARS)} × {len(args.depths)}",
            batch=batch,
            map_wall_s=wall,
            map_cpu_s=cpu,
            one_by_one_wall_s=walls[best],
            one_by_one_threads=best,
            one_by_one_cpu_s=min(cpus.values()),
            wall_ratio=walls[best] / wall,
            cpu_ratio=min(cpus.values()) / cpu,
            map_us_a_layer_step=cpu / work * 1e6,
            one_by_one_us_a_layer_step=min(cpus.values()) / work * 1e6,
            product_floor_us=floor(batch),
        )


def floor(batch: int) -> float:
    """CPU microseconds of the three products of a layer and step, in cache: what no implementation saves."""
    torch.set_num_threads(1)
    h, w = torch.randn(20, batch, WIDTH), torch.randn(20, WIDTH, WIDTH)
    out = torch.empty_like(h)
    times = []
    for _ in range(9):
        seconds = clock(lambda: [torch.bmm(h, w, out=out) for _ in range(20)])[1]
        times.append(seconds / 20 / 20 * 3 * 1e6)
    return statistics.median(times)


if __name__ == "__main__":
    main()
