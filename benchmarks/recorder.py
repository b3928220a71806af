"""What does recording states and costates cost in a training step of a 20-layer network?

Compares a plain SGD step of an MLP (20 linear layers, width 512, batch 128) with the same step under
a ``Recorder``, in time and in the memory that it keeps after the step, and with what a user would write
instead: forward hooks that store each layer's output and its gradient. "Kept over" is a recorder that
is not cleared by the optimizer's zero_grad, so that two trajectories are alive during a step. One thread,
processor time, medians.

    python benchmarks/recorder.py [--repeats 40] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bolza.systems import Recorder

DEPTH, WIDTH, BATCH = 20, 512, 128


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(DEPTH):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    return nn.Sequential(*layers)


class HandMade:
    """The obvious alternative: a hook on every linear layer, and one on its output."""

    def __init__(self, net: nn.Sequential) -> None:
        self.states: dict[int, torch.Tensor] = {}
        self.costates: dict[int, torch.Tensor] = {}
        for i, layer in enumerate(net):
            if isinstance(layer, nn.Tanh):
                layer.register_forward_hook(lambda _m, _a, out, i=i: self.note(i, out))

    def note(self, i: int, out: torch.Tensor) -> None:
        self.states[i] = out.detach()
        out.register_hook(lambda g: self.costates.__setitem__(i, g))


def case(
    attach: Callable[[nn.Sequential, torch.Tensor, torch.optim.Optimizer], Any],
) -> tuple[Callable[[], float], Callable[[], int]]:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    x, y = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)
    keeper = attach(net, x, optimizer)

    def step() -> float:
        start = time.process_time()  # of this process alone: other people use the machine too
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        return time.process_time() - start

    def recorded() -> int:
        if isinstance(keeper, Recorder):
            run = keeper.trajectory
            assert run.costates is not None and len(run.costates) == DEPTH + 1
            tensors = [*run.states, *(p for p in run.costates if p is not None)]
        elif isinstance(keeper, HandMade):
            tensors = [*keeper.states.values(), *keeper.costates.values()]
        else:
            tensors = []
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    return step, recorded


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--json", help="also append the line to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = {
        "plain": case(lambda net, x, opt: None),
        "hooks by hand": case(lambda net, x, opt: HandMade(net)),
        "recorder": case(lambda net, x, opt: Recorder(net, x, optimizer=opt)),
        "recorder, p_0 too": case(lambda net, x, opt: Recorder(net, x, optimizer=opt, input_costate=True)),
        "recorder, kept over": case(lambda net, x, opt: Recorder(net, x)),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for step, _ in cases.values():
        step()
        step()
    for _ in range(arguments.repeats):
        for name, (step, _) in cases.items():  # interleaved, so that a busy machine slows all alike
            times[name].append(step())
    plain = statistics.median(times["plain"])
    rows = {}
    for name, (_, recorded) in cases.items():
        ratios = sorted(a / b for a, b in zip(times[name], times["plain"], strict=True))
        rows[name] = {
            "ms": round(1e3 * statistics.median(times[name]), 3),
            "ratio": round(statistics.median(ratios), 4),
            "ratio_quartiles": [round(ratios[len(ratios) // 4], 4), round(ratios[-len(ratios) // 4], 4)],
            "extra_us_per_stage": round(1e6 * (statistics.median(times[name]) - plain) / DEPTH, 1),
            "kept_MiB_after_step": round(recorded() / 2**20, 2),
        }
    line = {
        "benchmark": "recorder",
        "network": f"MLP, {DEPTH} layers, width {WIDTH}, batch {BATCH}, float32",
        "repeats": arguments.repeats,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    print(f"{'':22}{'ms / step':>10}{'× plain':>10}{'µs / stage':>12}{'kept MiB':>10}")
    for name, row in rows.items():
        print(
            f"{name:22}{row['ms']:>10}{row['ratio']:>10}{row['extra_us_per_stage']:>12}{row['kept_MiB_after_step']:>10}"
        )
    print(json.dumps(line))
    if arguments.json:
        with open(arguments.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
