"""What a process of the tests of several processes does: everything in one start; a new process imports it by name."""

import ddp_worker
import layer_parallel_worker
import snopt_worker


def work(rank):
    """The results of every worker, by its name."""
    return {
        "recorded": ddp_worker.work(rank),
        "second order": snopt_worker.work(rank),
        "slices": layer_parallel_worker.work(rank, 3),
    }
