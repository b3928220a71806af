"""Worker processes and the one that started them."""

import multiprocessing
import time

import pytest

from bolza.ops.processes import end_with_parent


def work(alive, started):
    end_with_parent()
    started.set()
    time.sleep(60)


def start_and_wait(context, alive, started):
    context.Process(target=work, args=(alive, started)).start()
    time.sleep(60)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_worker_ends_when_its_parent_is_killed():
    context = multiprocessing.get_context("fork")
    (seen, alive), started = context.Pipe(duplex=False), context.Event()
    parent = context.Process(target=start_and_wait, args=(context, alive, started))
    parent.start()
    alive.close()  # from here on parent and worker hold it
    assert started.wait(20)
    parent.kill()
    parent.join()
    assert seen.poll(10)  # both are gone
    with pytest.raises(EOFError):
        seen.recv()
    parent.close()
    seen.close()
