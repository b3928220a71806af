"""What does a value within one percent cost in dimension 100, with the last condition built in and without?

    python benchmarks/fbsde.py [--seeds 3] [--quick]

Black–Scholes–Barenblatt, d = 100, u(0, ξ) = 77.1049. Three ways to train the same residual sine net, with the same
Adam, steps, paths and number of iterations: on raw inputs and outputs, as the papers' codes do; standardised, the
default; and with the last condition built in. Each line has the CPU seconds, the error of u(0, ξ) at the end, and the
first iteration (with its CPU seconds) from which a running mean of 20 stays within one percent. One thread, contenders
interleaved over the seeds.
"""

from __future__ import annotations

from _bench import emit, environment  # isort: skip  (sets the threads before torch loads)

import argparse
import math
import statistics
import time
from typing import Any

import torch

from bolza.models import InputResidualNet
from bolza.solve import FBSDE, solve_fbsde

BENCH = "fbsde"
EXACT = math.exp(0.05 + 0.4**2) * 62.5
WAYS: dict[str, dict[str, Any]] = {
    "raw": {"standardize": False},
    "standardised": {},
    "standardised, last condition built in": {"hard_terminal": True},
}


def problem(dim: int = 100) -> FBSDE:
    """Black–Scholes–Barenblatt."""
    return FBSDE(
        torch.tensor([1.0, 0.5] * (dim // 2)),
        1.0,
        lambda x: x.square().sum(-1, keepdim=True),
        driver=lambda t, x, y, z: 0.05 * (y - (x * z).sum(-1, keepdim=True)),
        diffusion=lambda t, x, y, w: 0.4 * x * w,
    )


def settled(values: torch.Tensor, window: int = 20) -> int | None:
    """The first iteration from which the running mean stays within one percent."""
    means = values.unfold(0, window, 1).mean(-1)
    outside = ((means / EXACT - 1).abs() > 0.01).nonzero()
    first = int(outside[-1]) + 1 if len(outside) else 0
    return first + window if first < len(means) else None


def main() -> None:
    """Train each way with each seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few iterations, one seed")
    args = parser.parse_args()
    seeds, iterations = (1, 40) if args.quick else (args.seeds, 400)
    emit(BENCH, "environment", **environment(), exact=EXACT, iterations=iterations, steps=20, paths=32)
    seen: dict[str, list[tuple[float, float, int | None]]] = {name: [] for name in WAYS}
    for seed in range(seeds):
        for name, options in WAYS.items():
            torch.manual_seed(seed)
            net = InputResidualNet(101, width=64, depth=3)
            start = time.process_time()
            found = solve_fbsde(
                problem(), net, steps=20, paths=32, iterations=iterations, lr=3e-3, seed=seed, **options
            )
            cpu = time.process_time() - start
            seen[name].append((cpu, abs(found.value / EXACT - 1), settled(found.values)))
    for name, runs in seen.items():
        cpu = statistics.median(r[0] for r in runs)
        first = [r[2] for r in runs if r[2] is not None]
        at = statistics.median(first) if len(first) == len(runs) else None
        emit(
            BENCH,
            name,
            cpu_s=cpu,
            error=statistics.median(r[1] for r in runs),
            worst_error=max(r[1] for r in runs),
            settled_at=at,
            settled_cpu_s=None if at is None else cpu * at / iterations,
        )


if __name__ == "__main__":
    main()
