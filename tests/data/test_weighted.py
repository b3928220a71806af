"""Weighted batches: counts of systematic draws, epochs, resuming, and the objective they follow."""

import io

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from bolza.core.errors import ArgumentError, DataError, ShapeError
from bolza.data import WeightedBatches, WeightedBatchSampler, digits, systematic_counts


def test_counts_are_the_shares_rounded_up_or_down_and_right_on_average():
    weights = torch.tensor([0.0, 1.0, 2.5, 0.3, 0.0, 6.2])
    share = 7 * weights.double() / weights.double().sum()
    draw, n = torch.Generator().manual_seed(0), 1000
    counts = torch.stack([systematic_counts(weights, 7, draw) for _ in range(n)])
    assert bool((counts.sum(1) == 7).all())
    assert bool(((counts >= share.floor()) & (counts <= share.ceil())).all())
    fraction = share - share.floor()
    error = (fraction * (1 - fraction) / n).sqrt().clamp_min(1e-12)
    assert float(((counts.double().mean(0) - share) / error).abs().max()) < 4


def test_equal_weights_take_every_example_once_and_zero_weights_never():
    for n in (1, 7, 1000):
        for scale in (1.0, 1 / 3, 1e-9, 1e9):
            assert systematic_counts(torch.full((n,), scale), n).tolist() == [1] * n
    weights = (torch.arange(100) % 3 == 0).float() * 0.1
    counts = systematic_counts(weights, 34)
    assert torch.equal(counts, weights.gt(0).long())


def test_a_loader_draws_batches_of_the_sampler():
    sampler = WeightedBatchSampler(torch.tensor([1.0, 0.0, 3.0]), batch_size=4, draws=10, seed=3)
    data = TensorDataset(torch.arange(3))
    sizes = [len(batch) for (batch,) in DataLoader(data, batch_sampler=sampler)]
    assert sizes == [4, 4, 2] and len(sampler) == 3
    whole = WeightedBatchSampler(torch.ones(3), batch_size=2, drop_last=True)
    assert len(list(whole)) == len(whole) == 1
    assert [*sampler] != [*sampler]  # epochs differ
    again = WeightedBatchSampler(torch.tensor([1.0, 0.0, 3.0]), batch_size=4, draws=10, seed=3)
    next(iter(again))
    assert len(list(again)) == 3  # an epoch that was left is not gone on with


@pytest.mark.parametrize("how", ["draw", "weigh"])
def test_a_saved_state_goes_on_within_an_epoch_and_keeps_its_weights(how):
    pair = (torch.arange(9.0), torch.arange(9))

    def make(seed=5):
        return WeightedBatches(pair, torch.linspace(0, 1, 9), 2, how=how, seed=seed)

    def course(batches, epochs):
        return [[tuple(t.tolist() for t in b) for b in batches] for _ in range(epochs)]

    plain = course(make(), 3)
    first = make()
    assert course(first, 1) == plain[:1]
    walk = iter(first)
    begun = [tuple(t.tolist() for t in next(walk)) for _ in range(2)]
    first.weights = torch.ones(9)  # of the epoch after this one
    stream = io.BytesIO()
    torch.save(first.state_dict(), stream)
    stream.seek(0)
    second = make(seed=0)
    second.load_state_dict(torch.load(stream, weights_only=True))
    rest = [tuple(t.tolist() for t in b) for b in second]
    assert begun + rest == plain[1]
    after = course(second, 1)[0]
    assert sorted(v for b in after for v in b[0]) == list(range(9))


def test_both_ways_follow_the_weighted_objective():
    data = digits()
    weights = torch.rand(len(data), generator=torch.Generator().manual_seed(0)) ** 3
    weights[::3] = 0
    losses = data.train_x.square().sum(1)
    exact = float((weights * losses).sum() / weights.sum())
    weigh = WeightedBatches(data, weights, 64, how="weigh")
    total = sum(float((w * x.square().sum(1)).sum()) for x, _, w in weigh)
    count = int((weights > 0).sum())
    assert total / count == pytest.approx(exact, rel=1e-4)
    assert len(weigh) == -(-count // 64) == len(list(weigh))
    draw = WeightedBatches(data, weights, 64)
    means = [float(torch.cat([x for x, _ in draw]).square().sum(1).mean()) for _ in range(60)]
    spread = torch.tensor(means).std() / 60**0.5
    assert abs(sum(means) / 60 - exact) < 4 * float(spread)
    assert len(draw) == 23
    draw.batch_size = 100
    assert len(draw) == len(list(draw)) == 15 and draw.batch_size == 100


def test_wrong_weights_and_sizes_are_refused_by_name():
    pair = (torch.ones(3), torch.ones(3))
    for weights, error, match in (
        (torch.tensor([1.0, -1.0, 1.0]), DataError, r"weights\[1\] is -1"),
        (torch.tensor([1.0, torch.nan, 1.0]), DataError, r"weights\[1\]"),
        (torch.zeros(3), DataError, "all weights are zero"),
        (torch.ones(2), ShapeError, "2 weights"),
        (torch.ones(3, 1), ShapeError, r"\(3, 1\)"),
    ):
        with pytest.raises(error, match=match):
            WeightedBatches(pair, weights, 2)
    batches = WeightedBatches(pair, torch.ones(3), 2)
    with pytest.raises(ShapeError, match="4 entries"):
        batches.weights = torch.ones(4)
    with pytest.raises(ArgumentError, match="batch_size=0"):
        batches.batch_size = 0
    with pytest.raises(ArgumentError, match="batch_size=4"):
        WeightedBatches(pair, torch.ones(3), 4)
    with pytest.raises(ArgumentError, match="'both'"):
        WeightedBatches(pair, torch.ones(3), 2, how="both")
    with pytest.raises(ArgumentError, match="draws=0"):
        systematic_counts(torch.ones(3), 0)
    with pytest.raises(ShapeError, match="2 entries"):
        WeightedBatchSampler(torch.ones(3), 2).weights = torch.ones(2)


def test_a_second_pass_within_the_first_is_refused_and_not_mixed_up_with_it():
    sampler = WeightedBatchSampler(torch.ones(8), 2)
    with pytest.raises(ArgumentError, match="second pass"):
        list(zip(sampler, sampler, strict=True))


def test_what_becomes_of_the_tensor_of_weights_does_not_change_an_epoch_that_is_resumed():
    x, given = torch.arange(8.0), torch.ones(8)
    batches = WeightedBatches((x, x), given, 4, how="weigh")
    next(iter(batches))
    given[0] = 100.0
    after = WeightedBatches((x, x), torch.ones(8), 4, how="weigh")
    after.load_state_dict(batches.state_dict())
    assert [w.tolist() for _, _, w in after] == [[1.0] * 4]


def test_a_state_of_other_data_and_a_size_that_is_none_are_refused():
    sampler = WeightedBatchSampler(torch.ones(8), 2)
    with pytest.raises(ShapeError, match="8 examples"):
        WeightedBatchSampler(torch.ones(6), 2).load_state_dict(sampler.state_dict())
    for size in (0, 2.5):
        with pytest.raises(ArgumentError, match="batch_size"):
            sampler.batch_size = size
