"""The temperature of SGD: identities between settings, and the exact moments they lead to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError
from bolza.sde import (
    equivalent_settings,
    gradient_noise,
    grow_batch,
    noise_scale,
    stationary_covariance,
    temperature,
)

ONE = torch.ones(1, 1, dtype=torch.float64)


def excess(lr, batch, momentum=0.0, curvature=1.0, samples=None):
    return float(
        stationary_covariance(
            curvature * ONE, ONE, lr=lr, batch_size=batch, momentum=momentum, samples=samples
        ).excess_loss
    )


def test_the_temperature_is_that_of_the_noise_of_a_network():
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    for replacement in (True, False):
        noise = gradient_noise(
            nn.Linear(2, 1), nn.functional.mse_loss, (x, x[:, :1]), replacement=replacement
        )
        own = temperature(0.3, 4, 0.5, None if replacement else 20)
        assert own == pytest.approx(noise.temperature(0.3, 4, 0.5))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_excess_loss_of_flat_modes_is_half_the_temperature(momentum):
    lr = 1e-4
    assert excess(lr, 3, momentum) == pytest.approx(temperature(lr, 3, momentum) / 2, rel=1e-4)
    assert excess(lr, 3, momentum, samples=10) == pytest.approx(
        temperature(lr, 3, momentum, 10) / 2, rel=1e-4
    )


def test_the_noise_scale_counts_the_samples():
    assert noise_scale(0.1, 10, 1000, 0.5) == pytest.approx(0.1 * (1000 / 10 - 1) / 0.5)
    assert noise_scale(0.1, 1000, 1000) == 0
    # twice the temperature times N − 1, as defined without replacement
    assert noise_scale(0.1, 10, 1000, 0.5) == pytest.approx(2 * 999 * temperature(0.1, 10, 0.5, 1000))


@pytest.mark.parametrize(
    "change",
    [
        {"new_batch_size": 64},
        {"new_lr": 0.4},
        {"new_momentum": 0.9},
        {"new_batch_size": 2, "new_momentum": 0.5},
    ],
)
@pytest.mark.parametrize("samples", [None, 1000])
def test_any_change_keeps_the_temperature(change, samples):
    old = temperature(0.1, 16, 0.0, samples)
    new = equivalent_settings(0.1, 16, **change, samples=samples)
    assert new.temperature == pytest.approx(old, rel=0.01)  # B is a whole number
    if "new_lr" not in change:
        assert new.temperature == pytest.approx(old, rel=1e-12)


def test_the_linear_scaling_rule_and_what_momentum_does():
    assert equivalent_settings(0.1, 32, new_batch_size=128).lr == pytest.approx(0.4)
    heavy = equivalent_settings(0.1, 32, new_momentum=0.9)
    assert heavy.lr == pytest.approx(0.01) and heavy.speed == pytest.approx(1)


@pytest.mark.parametrize(("momentum", "new_momentum"), [(0.0, 0.0), (0.0, 0.9), (0.5, 0.0)])
def test_the_distortion_is_the_ratio_of_the_exact_excess_losses(momentum, new_momentum):
    curvature = 1.5
    new = equivalent_settings(
        0.1, 8, momentum, new_batch_size=40, new_momentum=new_momentum, curvature=curvature
    )
    ratio = excess(new.lr, 40, new_momentum, curvature) / excess(0.1, 8, momentum, curvature)
    assert new.distortion == pytest.approx(ratio, rel=1e-10)
    assert math.isinf(equivalent_settings(0.5, 8, new_batch_size=80, curvature=1.0).distortion)
    assert math.isnan(equivalent_settings(0.5, 8, new_batch_size=80).share)


def test_a_growing_batch_has_the_temperatures_of_a_falling_rate():
    rates = [0.4, 0.2, 0.1, 0.01]
    stages = grow_batch(rates, 8, samples=2000)
    for rate, (lr, size) in zip(rates, stages, strict=True):
        assert temperature(lr, size, samples=2000) == pytest.approx(
            temperature(rate, 8, samples=2000), rel=0.02
        )
    assert [size for _, size in stages][:2] == [8, 16] and all(lr == 0.4 for lr, _ in stages[:3])
    capped = grow_batch(rates, 8, largest=20)
    assert [size for _, size in capped] == [8, 16, 20, 20]
    for rate, (lr, size) in zip(rates, capped, strict=True):
        assert lr / size == pytest.approx(rate / 8)


def test_a_schedule_never_asks_for_a_batch_without_noise_or_below_one_sample():
    falling, growing = [1.0, 0.1, 1e-4], [0.1, 10.0]
    for rates, size, options in (
        (falling, 10, {"samples": 100}),
        (falling, 10, {"samples": 100, "largest": 1000}),
        (growing, 32, {}),
    ):
        samples = options.get("samples")
        for rate, (lr, b) in zip(rates, grow_batch(rates, size, **options), strict=True):
            old = temperature(rate, size, samples=samples)
            assert temperature(lr, b, samples=samples) == pytest.approx(old, rel=0.02), (rate, lr, b)
    assert equivalent_settings(1e-4, 10, new_lr=1.0, samples=100).temperature > 0
    assert math.isnan(equivalent_settings(2.0, 8, new_lr=0.2, curvature=2.0).distortion)


def test_settings_that_make_no_sense_are_named():
    with pytest.raises(ArgumentError, match="both given"):
        equivalent_settings(0.1, 8, new_lr=0.2, new_batch_size=16)
    with pytest.raises(ArgumentError, match="whole data set"):
        equivalent_settings(0.1, 8, new_batch_size=100, samples=100)
    with pytest.raises(ArgumentError, match="whole data set"):
        equivalent_settings(0.1, 100, new_lr=0.3, samples=100)
    with pytest.raises(ArgumentError, match="curvature is -1"):
        equivalent_settings(0.1, 8, new_lr=0.2, curvature=-1.0)
    with pytest.raises(ArgumentError, match="rates is empty"):
        grow_batch([], 8)
    with pytest.raises(ArgumentError, match="largest is 4"):
        grow_batch([0.1], 8, largest=4)
    with pytest.raises(ArgumentError, match="batch_size is 0"):
        temperature(0.1, 0)
