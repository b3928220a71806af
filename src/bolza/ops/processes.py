"""Running a function in several processes that can talk to one another."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bolza.ops.errors import ArgumentError, BolzaError

__all__ = ["end_with_parent", "run_processes"]


def run_processes(
    function: Callable[..., Any],
    processes: int,
    args: Sequence[Any] = (),
    *,
    timeout: float = 300.0,
    threads: int = 1,
) -> list[Any]:
    """Call ``function(rank, *args)`` in several processes joined by ``torch.distributed``, and collect the results.

    The processes meet through a file (no port has to be free), talk through gloo on the CPU, and are all gone
    when this returns or raises. For several machines, or GPUs, start the script with ``torchrun`` and call
    ``torch.distributed.init_process_group`` instead.

    Args:
        function: defined at the top level of a module, so that a new process can import it; in a script the
            call stands under ``if __name__ == "__main__":``.
        processes: how many.
        args: the same for every process; they are pickled.
        timeout: seconds for all, and for each message.
        threads: threads of each process for tensor operations.

    Returns:
        What the function returned, by rank.

    Raises:
        ArgumentError: there is no process.
        BolzaError: a process failed (its own traceback is in the message), or the time ran out.

    Example:
        >>> run_processes(pow, 2, (3,))  # doctest: +SKIP
        [0, 1]
    """
    if processes < 1:
        raise ArgumentError(f"processes is {processes}: there must be at least one")
    context = mp.get_context("spawn")
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="bolza-") as folder:
        workers = [
            context.Process(
                target=_work, args=(folder, rank, processes, timeout, threads, function, args), daemon=True
            )
            for rank in range(processes)
        ]
        try:
            for worker in workers:
                worker.start()
            while any(worker.is_alive() for worker in workers):
                if any(worker.exitcode for worker in workers):
                    break  # the others would wait for it
                if time.monotonic() > deadline:
                    raise BolzaError(f"{processes} processes did not finish in {timeout:g} s: raise timeout=")
                time.sleep(0.02)
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.terminate()
            for worker in workers:
                if worker.pid is not None:
                    worker.join(5.0)
                    if worker.is_alive():
                        worker.kill()
                        worker.join()
        results = []
        failures = sorted(Path(folder).glob("*.txt"), key=lambda path: path.stat().st_mtime)
        if failures:  # the first one; the others may only have lost their partner
            raise BolzaError(
                f"process {failures[0].stem} of {processes} failed:\n{failures[0].read_text(encoding='utf-8')}"
            )
        for rank, worker in enumerate(workers):
            result = Path(folder, f"{rank}.pkl")
            if not result.exists():
                raise BolzaError(f"process {rank} of {processes} ended with exit code {worker.exitcode}")
            results.append(pickle.loads(result.read_bytes()))
    return results


def _work(
    folder: str,
    rank: int,
    processes: int,
    timeout: float,
    threads: int,
    function: Callable[..., Any],
    args: Sequence[Any],
) -> None:
    end_with_parent()
    torch.set_num_threads(threads)
    try:
        store = dist.FileStore(str(Path(folder, "store")), processes)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=timeout)
        )
        result = function(rank, *args)
        dist.barrier()
        Path(folder, f"{rank}.pkl").write_bytes(pickle.dumps(result))
    except BaseException:
        # before the group is left: a partner that waits fails at once then, and must not be the first to say so
        Path(folder, f"{rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        raise SystemExit(1) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, killed before it could clean up.

    Called in a worker of ``multiprocessing``, or as ``initializer`` of a pool of them.
    """

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
