"""Every optimizer in two processes against itself in one. They start once for all: that is what takes the time."""

import multiprocessing

import pytest
import torch

import ddp_worker
import layer_parallel_worker
import process_worker
import snopt_worker
from bolza.core.errors import BolzaError
from bolza.ops.processes import run_processes


@pytest.fixture(scope="module")
def from_two_processes():
    before = {p.pid for p in multiprocessing.active_children()}
    found = run_processes(process_worker.work, 2, timeout=300)
    assert {p.pid for p in multiprocessing.active_children()} == before
    return found


@pytest.mark.parametrize("name", ddp_worker.MAKERS)
def test_two_processes_make_the_step_of_one(from_two_processes, name):
    alone = ddp_worker.train(name, lambda net: net, slice(None))
    for found in from_two_processes:
        parameters = found["recorded"][name]
        assert parameters.keys() == alone.keys()
        for key, value in parameters.items():
            assert (value - alone[key]).abs().max() < 1e-6, key


def test_two_processes_make_the_second_order_step_and_the_horizon_of_one(from_two_processes):
    net, x, y = snopt_worker.problem()
    expected, horizons = snopt_worker.train(net, net, x, y)
    for result in from_two_processes:
        parameters, found = result["second order"]
        for name, value in expected.items():
            torch.testing.assert_close(parameters[name], value, rtol=1e-9, atol=1e-11)
        assert found == pytest.approx(horizons, rel=1e-9) and len(found) == 3


@pytest.mark.parametrize("method", ["lagrangian", "mgrit"])
def test_slices_in_two_processes_do_what_they_do_in_one(from_two_processes, method):
    parameters, losses, own = layer_parallel_worker.train(method, slices=3)
    results = [found["slices"] for found in from_two_processes]
    for rank, found in enumerate(results):
        theirs, their_losses, their_own = found[method]
        assert losses == pytest.approx(their_losses, rel=1e-12)
        for name, value in parameters.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-12, atol=1e-14)
        assert their_own and their_own < own, rank  # gradients of its own share, no more
    first, second = (found[method][2] for found in results)
    assert not first & second and first | second == own


def test_a_parameter_that_two_processes_would_share_is_refused(from_two_processes):
    assert "is used by slices of the processes [0, 1]" in from_two_processes[0]["slices"]["refusal"]


def test_a_process_that_fails_is_named_and_the_other_does_not_wait_for_it():
    before = {p.pid for p in multiprocessing.active_children()}
    with pytest.raises(BolzaError, match="on purpose"):
        run_processes(layer_parallel_worker.fail, 2, timeout=120)
    assert {p.pid for p in multiprocessing.active_children()} == before
