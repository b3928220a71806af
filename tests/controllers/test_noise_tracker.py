"""The noise of mini-batch gradients from their own averages."""

import math

import pytest
import torch

from bolza.controllers import NoiseTracker
from bolza.core.errors import ArgumentError


def gradients(sizes, generator, runs=1, mean=0.5):
    """Batch means of noise around a fixed gradient of 40 entries, two tensors a step: tr Σ = 90."""
    scales = torch.cat([torch.full((20,), 1.0), torch.full((20,), 3.5**0.5)]).double()
    for size in sizes:
        noise = torch.randn(runs, 40, generator=generator, dtype=torch.float64) * scales / size**0.5
        yield size, (mean + noise).split(20, 1)


def test_both_numbers_are_without_bias_while_the_batch_size_changes():
    sizes = [1, 4, 16, 2, 8, 32, 1, 1, 64, 3] * 2
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(200):
        tracker = NoiseTracker(beta=0.8)
        for size, (a, b) in gradients(sizes, generator):
            tracker.update([a, b], size)
        found.append((tracker.noise, tracker.signal))
    noise, signal = torch.tensor(found, dtype=torch.float64).T
    for values, exact in ((noise, 90.0), (signal, 10.0)):
        z = (values.mean() - exact) / (values.std() / 200**0.5)
        assert abs(z) < 4
        assert values.std() / 200**0.5 < 0.07 * exact


def test_equal_gradients_have_no_noise_and_a_gradient_that_is_not_there_counts_as_zero():
    tracker = NoiseTracker()
    assert math.isnan(tracker.noise)
    g = torch.tensor([3.0, 4.0])
    for _ in range(5):
        assert tracker.update([None, g], 8)
    assert tracker.noise == pytest.approx(0, abs=1e-4) and tracker.signal == pytest.approx(25)
    tracker.update([torch.ones(3), None], 8)
    assert tracker.noise > 1


def test_a_gradient_that_is_not_finite_is_left_out():
    tracker = NoiseTracker()
    for value in (1.0, 2.0, math.nan, math.inf, 3.0):
        tracker.update([torch.tensor([value])], 4)
    assert tracker.count == 3 and math.isfinite(tracker.noise)


def test_half_precision_is_averaged_in_single():
    tracker = NoiseTracker(beta=0.999)
    for _ in range(3):
        tracker.update([torch.full((4,), 2.0, dtype=torch.bfloat16)], 4)
    assert tracker.signal == pytest.approx(16, rel=1e-5)


def test_it_goes_on_where_its_state_was_taken():
    generator = torch.Generator().manual_seed(0)
    one, two = NoiseTracker(), NoiseTracker()
    stream = list(gradients([4] * 9, generator))
    for i, (size, parts) in enumerate(stream):
        one.update(parts, size)
        if i == 4:
            two.load_state_dict(one.state_dict())
        elif i > 4:
            two.update(parts, size)
    assert (one.noise, one.signal) == (two.noise, two.signal)
    with pytest.raises(ArgumentError, match="beta=1"):
        NoiseTracker(1.0)
