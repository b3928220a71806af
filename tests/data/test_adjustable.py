"""Batches whose size changes: fair epochs, loaders with workers, resuming."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from bolza.core.errors import ArgumentError, DataError
from bolza.data import AdjustableBatchSampler
from bolza.training import load_tree, save_tree


def changing(sampler, sizes):
    """One epoch during which the size takes the given values, one after another."""
    found = []
    for batch, size in zip(sampler, [*sizes, *[sizes[-1]] * 1000], strict=False):
        found.append(batch)
        sampler.batch_size = size
    return found


def test_every_sample_is_seen_once_an_epoch_however_the_size_changes():
    sampler = AdjustableBatchSampler(103, batch_size=4, seed=1)
    for sizes in ([8, 16, 2, 50], [1, 1, 7], [200]):
        epoch = changing(sampler, sizes)
        assert sorted(i for batch in epoch for i in batch) == list(range(103))
    assert sampler.epoch == 3


def test_the_next_batch_has_the_new_size():
    sampler = AdjustableBatchSampler(100, batch_size=10)
    assert [len(b) for b in changing(sampler, [20, 30])] == [10, 20, 30, 30, 10]
    sampler.drop_last = True
    assert [len(b) for b in sampler] == [30, 30, 30]
    assert len(sampler) == 3


def test_all_of_a_small_set_is_a_batch_even_where_rests_are_dropped():
    assert [len(b) for b in AdjustableBatchSampler(5, batch_size=8, drop_last=True)] == [5]


def test_epochs_are_permutations_of_their_own_and_repeat_from_the_seed():
    one, two = (AdjustableBatchSampler(50, 10, seed=3) for _ in range(2))
    first, second = list(one), list(one)
    assert first != second
    assert first == list(two) and second == list(two)
    assert list(AdjustableBatchSampler([0] * 4, 2, shuffle=False)) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_run_that_is_resumed_within_an_epoch_sees_what_it_would_have_seen(tmp_path, drop_last):
    def run(sampler, epochs, stop=None):
        seen = []
        while sampler.epoch < epochs or sampler._resuming:
            for batch in sampler:
                seen.append(batch)
                sampler.batch_size = 3 + len(seen) % 4
                if len(seen) == stop:
                    return seen, sampler.state_dict()
        return seen, sampler.state_dict()

    def make():
        return AdjustableBatchSampler(29, 5, seed=2, drop_last=drop_last)

    whole, _ = run(make(), 3)
    for stop in range(1, len(whole)):
        start, state = run(make(), 3, stop)
        save_tree(state, tmp_path / "a.safetensors")
        resumed = make()
        resumed.load_state_dict(load_tree(tmp_path / "a.safetensors"))
        rest = []
        while resumed.epoch < 3 or resumed._resuming:
            for batch in resumed:
                rest.append(batch)
                resumed.batch_size = 3 + (stop + len(rest)) % 4
        assert start + rest == whole


def test_a_loader_with_a_worker_changes_size_and_is_saved_at_what_the_loop_has_received():
    data = TensorDataset(torch.arange(60))
    sampler = AdjustableBatchSampler(60, batch_size=5, seed=0)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=1)
    received = []
    for (batch,) in loader:
        received.append(batch)
        sampler.batch_size = 10
        if len(received) == 3:
            state = sampler.state_dict(taken=3)
            assert sampler.state_dict()["position"] > state["position"] == sum(map(len, received))
    assert torch.cat(received).sort().values.tolist() == list(range(60))
    assert max(map(len, received)) == 10
    again = AdjustableBatchSampler(60, batch_size=1)
    again.load_state_dict(state)
    assert [i for b in again for i in b] == torch.cat(received[3:]).tolist()


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ArgumentError, match="samples=0"):
        AdjustableBatchSampler(0, 1)
    sampler = AdjustableBatchSampler(4, 2)
    for size in (0, -1, 1.5, True):
        with pytest.raises(ArgumentError, match="batch_size"):
            sampler.batch_size = size
    with pytest.raises(ArgumentError, match="taken=1"):
        sampler.state_dict(taken=1)
    first, second = iter(sampler), iter(sampler)
    next(first), next(second)
    with pytest.raises(ArgumentError, match="second pass"):
        next(first)


def test_a_state_of_other_data_is_refused():
    with pytest.raises(DataError, match="100 samples"):
        AdjustableBatchSampler(50, 10).load_state_dict(AdjustableBatchSampler(100, 10).state_dict())
