"""Power schedules: exponents, exact energies, and the faces of a scheduler."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from bolza.controllers import PolicyScheduler
from bolza.controllers.schedules import (
    PowerDecay,
    SignalDecay,
    best_exponent,
    predicted_exponent,
    quadratic_mean_square,
    semicircle_quantiles,
    two_spin_energy,
    two_spin_run,
)
from bolza.core.errors import ArgumentError
from bolza.testing import check_controller, check_policy

F = torch.float64


def optimizer(lr=0.4):
    return torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=lr)


def test_a_lambda_scheduler_and_a_policy_make_the_same_rates():
    law = PowerDecay(0.7, start=3, width=2.0)
    one, two = optimizer(), optimizer()
    schedulers = (LambdaLR(one, law), PolicyScheduler(two, law))
    for _ in range(10):
        for opt, scheduler in zip((one, two), schedulers, strict=True):
            opt.step()
            scheduler.step()
        assert one.param_groups[0]["lr"] == pytest.approx(two.param_groups[0]["lr"], rel=1e-15)
    assert law(3) == 1 and law(5) == pytest.approx(2**-0.7)


def test_a_lambda_scheduler_with_the_law_is_saved_and_loaded():
    first = LambdaLR(optimizer(), PowerDecay(0.5))
    other = LambdaLR(optimizer(), PowerDecay(0.1))
    other.load_state_dict(first.state_dict())
    assert other.lr_lambdas[0] == PowerDecay(0.5)


def test_both_laws_keep_the_contracts():
    seen = [{"lr": 0.1, "loss": loss} for loss in (1.0, 0.9, 0.2, 0.1)]
    check_policy(lambda: PowerDecay(0.5, start=1), seen)
    check_policy(lambda: SignalDecay(smoothing=0.5), seen)
    check_controller(lambda o: PolicyScheduler(o, SignalDecay(drop=0.9, smoothing=0.1, width=2.0)), steps=4)


def test_the_signal_law_waits_for_the_loss_to_fall_off_its_plateau():
    law, state, rates = SignalDecay(drop=0.5, width=10.0, smoothing=0.9), None, []
    state = law.init()
    for k in range(200):
        state, action = law.update(state, {"lr": 0.1, "loss": 1.0 if k < 100 else 0.1})
        rates.append(action["lr"])
    found = next(k for k, rate in enumerate(rates) if rate < 0.1)
    assert 100 < found < 112  # a mean of some ten steps
    assert rates[-1] == pytest.approx(0.1 / (1 + (200 - found) / 10), rel=1e-9)


def test_the_best_exponent_is_where_floor_and_descent_are_equally_slow():
    for a in (0.3, 2 / 3, 1.0, 5.0):
        best = best_exponent(a)
        assert predicted_exponent(best, a) == pytest.approx(best) == pytest.approx(a * (1 - best))
        assert max(predicted_exponent(b / 200, a) for b in range(201)) <= best + 1e-12
    assert predicted_exponent(0.7, math.inf) == 0.7


def test_energy_of_the_two_spin_model_is_known():
    energy = two_spin_energy(torch.tensor([5.0, 20.0, 100.0]))
    torch.testing.assert_close(
        energy, torch.tensor([0.074012, 0.018691, 0.0037476], dtype=F), rtol=2e-5, atol=0
    )
    late = torch.tensor([1e4], dtype=F)
    torch.testing.assert_close(two_spin_energy(late), 3 / (8 * late), rtol=1e-3, atol=0)


def test_gradient_flow_on_the_quantiles_of_the_semicircle_has_that_energy():
    mu = semicircle_quantiles(20_000)
    assert float(mu.square().mean()) == pytest.approx(1.0, rel=1e-5)  # the variance of the semicircle
    for s in (1.0, 5.0):
        weight = torch.softmax(2 * mu * s, 0)
        found = (2 - (weight * mu).sum()) / 2
        assert float(found) == pytest.approx(float(two_spin_energy(torch.tensor(s))), rel=2e-4)


def test_descent_without_noise_follows_the_energy():
    draw = torch.Generator().manual_seed(0)
    times, energies = two_spin_run(
        torch.zeros(1), 250, lr=0.02, temperature=0.0, spins=60_000, generator=draw
    )
    exact = two_spin_energy(0.02 * times[-1:])
    assert float(energies[-1, 0]) == pytest.approx(float(exact), rel=0.1)


def test_mean_squares_in_a_convex_basin_are_known():
    beta = torch.tensor([0.5, 0.75, 0.9, 1.0])
    table = quadratic_mean_square(beta, 100_000, lr=1.0)
    torch.testing.assert_close(
        table, torch.tensor([3.2e-3, 1.8e-4, 3.7e-5, 2.0e-5], dtype=F), rtol=0.02, atol=0
    )
    slow = quadratic_mean_square(beta, 100_000, lr=0.2)  # below 1/(2λ): the start is not forgotten in time
    assert float(slow[1]) == pytest.approx(4.0e-5, rel=0.02) and float(slow[3]) == pytest.approx(
        9.4e-3, rel=0.02
    )
    assert int(slow.argmin()) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda: PowerDecay(-1.0),
        lambda: SignalDecay(drop=2.0),
        lambda: best_exponent(0.0),
        lambda: predicted_exponent(-0.1, 1.0),
        lambda: two_spin_energy(torch.zeros(1)),
        lambda: quadratic_mean_square(torch.ones(1), 0, lr=1.0),
        lambda: two_spin_run(torch.ones(1), 10, lr=0.0),
        lambda: SignalDecay().update(SignalDecay().init(), {"lr": 0.1}),
    ],
)
def test_settings_that_make_no_sense_are_named(call):
    with pytest.raises(ArgumentError):
        call()
