"""Signal to noise along a run, and the step at which it falls."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError
from bolza.data import Dataset
from bolza.ops.krylov import Estimate
from bolza.sde import DriftDiffusion, gradient_noise, phase_transition
from bolza.training import train


def estimates(values, errors=None):
    return [Estimate(v, e) for v, e in zip(values, errors or [0.0] * len(values), strict=True)]


def test_an_exponential_ratio_crosses_one_where_it_should():
    steps = list(range(0, 100, 10))
    ratios = estimates([math.exp(3 - 0.07 * k) for k in steps])
    found = phase_transition(steps, ratios)
    assert found.value == pytest.approx(3 / 0.07, abs=1e-9)
    assert found.error == pytest.approx(10 / math.sqrt(12))  # exact readings leave only the spacing


def test_another_threshold_moves_the_step():
    steps = list(range(0, 100, 10))
    ratios = estimates([math.exp(3 - 0.07 * k) for k in steps])
    assert phase_transition(steps, ratios, math.e).value == pytest.approx(2 / 0.07, abs=1e-9)


def test_the_error_is_that_of_resampled_readings():
    """Readings with known errors, redrawn: the spread of the step is what the formula says."""
    steps, errors = [0, 10], [0.4, 0.05]
    claimed = phase_transition(steps, estimates([2.5, 0.5], errors))
    own = math.sqrt(claimed.error**2 - 100 / 12)
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(4000):
        noise = torch.randn(2, generator=generator).tolist()
        values = [v + e * z for v, e, z in zip([2.5, 0.5], errors, noise, strict=True)]
        found = phase_transition(steps, estimates(values))
        if found is not None:
            draws.append(found.value)
    spread = float(torch.tensor(draws).std())
    assert own == pytest.approx(spread, rel=0.1)  # the formula is of first order in the errors


def test_the_last_crossing_counts_and_none_is_none():
    assert phase_transition([0, 1, 2, 3], estimates([4, 0.5, 2, 0.5])).value == pytest.approx(2.5)
    assert phase_transition([0, 1], estimates([0.5, 0.4])) is None
    assert phase_transition([0, 1], estimates([0.5, 2])) is None


def test_a_ratio_below_zero_is_taken_as_it_is():
    # an unbiased estimate of |∇f|² may be negative: the line between the readings is straight then
    assert phase_transition([0, 10], estimates([2.0, -1.0])).value == pytest.approx(10 / 3)


def test_readings_that_do_not_pair_are_refused():
    with pytest.raises(ArgumentError, match="at least two"):
        phase_transition([0], estimates([1.0]))
    with pytest.raises(ArgumentError, match="batch_size=0"):
        DriftDiffusion(nn.Linear(1, 1), F.mse_loss, torch.ones(2, 1), torch.ones(2, 1), 0)


def problem(noise):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 5, generator=generator)
    y = x.sum(1, keepdim=True) + noise * torch.randn(256, 1, generator=generator)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)), x, y


def test_a_reading_is_the_batch_size_times_the_ratio_of_the_gradient_noise():
    model, x, y = problem(0.5)
    watch = DriftDiffusion(model, F.mse_loss, x, y, batch_size=16)
    watch.note(0)
    noise = gradient_noise(model, F.mse_loss, (x, y))
    assert watch.layers == ["all layers", "0", "2"]
    assert watch.readings[0]["all layers"].value == pytest.approx(16 * noise.snr().value, rel=1e-5)
    assert watch.readings[0]["2"].error == pytest.approx(16 * noise.per_layer_snr()["2"].error, rel=1e-5)


def test_a_noisy_regression_goes_from_drift_to_diffusion_and_the_run_is_not_disturbed():
    weights = []
    for watched in (False, True):
        model, x, y = problem(1.0)
        data = Dataset(x, y, x[:0], y[:0], "regression")
        watch = DriftDiffusion(model, F.mse_loss, x, y, batch_size=16, at=[0, 1, 5, 20, 60, 150])
        if watched:
            watch(0, 150)
        train(
            model,
            data,
            loss=F.mse_loss,
            lr=0.05,
            batch_size=16,
            steps=150,
            progress=watch if watched else None,
        )
        weights.append(model[0].weight.detach().clone())
    assert torch.equal(*weights)
    assert watch.steps == [0, 1, 5, 20, 60, 150]
    ratio, error = watch.curve()
    assert float(ratio[0]) - 3 * float(error[0]) > 1 > float(ratio[-1]) + 3 * float(error[-1])
    found = watch.transition()
    assert 0 < found.value < 150 and found.error > 0
    with pytest.raises(ArgumentError, match="choose one of"):
        watch.curve("nothing")


def test_a_reading_without_noise_does_not_overflow():
    found = phase_transition([0, 1], [Estimate(math.inf, math.inf), Estimate(0.5, 0.1)])
    assert found.value == pytest.approx(1.0) and math.isfinite(found.error)


@pytest.mark.parametrize(
    ("steps", "threshold"), [([0, 0], 1.0), ([10, 0], 1.0), ([0, 1], 0.0), ([0, 1], -1.0)]
)
def test_steps_that_do_not_increase_and_thresholds_below_zero_are_refused(steps, threshold):
    with pytest.raises(ArgumentError, match="must"):
        phase_transition(steps, [Estimate(2.0, 0.1), Estimate(0.5, 0.1)], threshold)
