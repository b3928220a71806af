"""What the benchmark scripts share: one thread, repeated timing, one JSON line a figure, one record a run.

Import this module before torch: it sets the number of threads. On a machine that does other work compare
ratios taken in the same run, and CPU seconds (``cpu_s``) before wall seconds.

With ``BENCH_RECORDS=FOLDER`` in the environment (``bolza bench --record`` sets it to benchmarks/records) a
script that ends without an error writes FOLDER/<bench>.json: what it emitted, with versions, kind of
processor, threads and commit.
"""

from __future__ import annotations

import os

THREADS = int(os.environ.get("BENCH_THREADS", "1"))
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, str(THREADS))

import atexit  # noqa: E402
import datetime  # noqa: E402
import gc  # noqa: E402
import importlib.metadata  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import re  # noqa: E402
import resource  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
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
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": THREADS,
        "device": "cpu",
        "commit": commit,
        "versions": versions,
    }


def processor() -> str:
    """The kind of processor, without trade marks and clock rate."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    except OSError:
        name = None
    words = name[1] if name else platform.processor() or platform.machine()
    return re.sub(r"\s+", " ", re.sub(r"\((?:R|TM)\)|@.*|\bCPU\b", "", words)).strip()


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
    """Print one JSON line, and keep it for the record; floats are rounded to six significant digits."""
    row = {key: _round(value) for key, value in values.items()}
    _EMITTED.setdefault(bench, []).append({"name": name, **row})
    print(json.dumps({"bench": bench, "name": name, **row}), flush=True)


def _round(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


_EMITTED: dict[str, list[dict[str, Any]]] = {}
_FAILED: list[bool] = []


def write_records(folder: Path) -> list[Path]:
    """Write what was emitted so far, one file a benchmark."""
    written = []
    for bench, rows in _EMITTED.items():
        about = [
            {k: v for k, v in row.items() if k != "name"} for row in rows if row["name"] == "environment"
        ]
        record = {
            "schema": "bolza.bench/1",
            "bench": bench,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "environment": environment() | (about[0] if about else {}),
            "rows": [row for row in rows if row["name"] != "environment"],
        }
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{bench}.json"
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        written.append(path)
    return written


def _on_error(*what: Any) -> None:
    _FAILED.append(True)
    sys.__excepthook__(*what)


if "BENCH_RECORDS" in os.environ:  # what ends in an error leaves no record
    sys.excepthook = _on_error
    atexit.register(lambda: None if _FAILED else write_records(Path(os.environ["BENCH_RECORDS"])))
