"""What the benchmark scripts share: one thread, repeated timing, one JSON line a figure.

Import this module before torch: it sets the number of threads. On a machine that does other work compare
ratios taken in the same run, and CPU seconds (``cpu_s``) before wall seconds.
"""

from __future__ import annotations

import os

THREADS = int(os.environ.get("BENCH_THREADS", "1"))
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, str(THREADS))

import gc  # noqa: E402
import importlib.metadata  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import resource  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402


def environment(*packages: str) -> dict[str, Any]:
    """Versions, machine and commit, for the first line of a record."""
    import torch

    torch.set_num_threads(THREADS)
    versions = {}
    for package in ("bolza", "torch", "numpy", *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": THREADS,
        "device": "cpu",
        "commit": commit,
        "versions": versions,
    }


def timed(function: Callable[[], Any], *, repeat: int = 7, warmup: int = 1) -> dict[str, float]:
    """Median wall and CPU seconds of a call, and the fastest wall time."""
    for _ in range(warmup):
        function()
    gc.collect()
    walls, cpus = [], []
    for _ in range(repeat):
        cpu, wall = time.process_time(), time.perf_counter()
        function()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {"s": statistics.median(walls), "cpu_s": statistics.median(cpus), "min_s": min(walls)}


def peak_memory() -> float:
    """Largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory() -> float:
    """Resident memory of this process now, in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def emit(bench: str, name: str, **values: Any) -> None:
    """Print one JSON line; floats are rounded to six significant digits."""
    rounded = {key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in values.items()}
    print(json.dumps({"bench": bench, "name": name, **rounded}), flush=True)
