"""Multipliers moved by a PID controller of the violation."""

import io
import math

import pytest
import torch

from bolza.controllers import PIDLagrangian, critical_gain, damping
from bolza.core.errors import ArgumentError, ShapeError

A, B, D, LR, KI = 0.1, 2.0, 1.0, 0.05, 0.05


def run(kp, steps, ki=KI, x0=0.0):
    """Errors x − d of gradient descent on ½ax² − bx with the multiplier on x ≤ d."""
    x = torch.tensor(x0, dtype=torch.float64, requires_grad=True)
    lag = PIDLagrangian(D, kp=kp, ki=ki, kd=0.0, smooth=0.0, normalise=False)
    errors = [x.item() - D]
    for _ in range(steps):
        (slope,) = torch.autograd.grad(lag(A / 2 * x * x - B * x, x), x)
        with torch.no_grad():
            x -= LR * slope
        errors.append(x.item() - D)
    return torch.tensor(errors, dtype=torch.float64), lag


def test_modulus_and_critical_gain_are_those_of_the_theory():
    found = [damping(A, kp, KI, LR).modulus for kp in (0.0, 0.5, 1.0, 2.0)]
    assert found == pytest.approx([0.99750, 0.98489, 0.97211, 0.96597], abs=5e-6)
    assert critical_gain(A, KI, LR) == pytest.approx(1.85)
    assert damping(A, 1.84, KI, LR).oscillates and not damping(A, 1.86, KI, LR).oscillates
    assert damping(0.0, 0.0, KI, LR).modulus == pytest.approx(1.0, abs=1e-12)  # undamped for ever
    for kp in (0.0, 0.5, 1.0):
        assert damping(A, kp, KI, LR).modulus == pytest.approx(math.sqrt(1 - LR * (A + kp)), rel=1e-12)


@pytest.mark.parametrize("kp", [0.0, 0.5, 1.0, 2.0])
def test_a_run_dies_out_as_fast_as_the_eigenvalues_say(kp):
    """e_{t+1} = tr M e_t − det M e_{t−1}, fitted to the end of a run where the constraint is active."""
    errors, _ = run(kp, 300)
    tail = errors[200:] if kp else errors[-60:]
    past = torch.stack([tail[1:-1], tail[:-2]], 1)
    trace, minus = torch.linalg.lstsq(past, tail[2:, None]).solution[:, 0].tolist()
    roots = torch.linalg.eigvals(torch.tensor([[trace, minus], [1.0, 0.0]], dtype=torch.float64))
    assert roots.abs().max().item() == pytest.approx(damping(A, kp, KI, LR).modulus, abs=1e-6)


def test_overshoot_and_summed_violation_fall_with_the_proportional_gain():
    found = [run(kp, 600)[0].clamp_min(0) for kp in (0.5, 1.0, 2.0)]
    assert [float(e.max()) for e in found] == pytest.approx([1.282, 0.998, 0.682], abs=1e-3)
    assert [float(e.sum()) for e in found] == pytest.approx([60.3, 43.2, 38.0], abs=0.06)


def test_the_multiplier_found_is_that_of_the_problem():
    _, lag = run(2.0, 600)
    assert lag.multiplier.item() == pytest.approx(B - A * D, abs=1e-6)


def test_several_constraints_are_met_at_once_and_a_slack_one_costs_nothing():
    """min ½‖x − b‖² subject to x ≤ d: x = min(b, d) and λ = max(0, b − d)."""
    b = torch.tensor([3.0, 0.5, 2.0], dtype=torch.float64)
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    lag = PIDLagrangian([1.0, 1.0, 1.5], kp=1.0, ki=0.05, kd=0.5, delay=2, smooth=0.5)
    optimizer = torch.optim.SGD([x], lr=0.2)
    for _ in range(500):
        optimizer.zero_grad()
        lag(0.5 * (x - b).square().sum(), x).backward()
        optimizer.step()
    assert x.tolist() == pytest.approx([1.0, 0.5, 1.5], abs=1e-4)
    assert lag.multiplier.tolist() == pytest.approx([2.0, 0.0, 0.5], abs=1e-3)
    assert lag.log()["value[0]"] == pytest.approx(2.0, abs=1e-3)


def test_the_normalised_loss_is_a_mean_of_objective_and_violations():
    lag = PIDLagrangian([1.0, 0.0], kp=1.0, ki=0.0, kd=0.0, smooth=0.0)
    loss = lag(torch.tensor(5.0), [torch.tensor(3.0), torch.tensor(-1.0)])
    assert loss.item() == pytest.approx((5.0 + 2.0 * 2.0) / 3.0)
    plain = PIDLagrangian(1.0, kp=1.0, ki=0.0, kd=0.0, smooth=0.0, high=1.5, normalise=False)
    assert plain(torch.tensor(5.0), torch.tensor(3.0)).item() == pytest.approx(5.0 + 1.5 * 2.0)


def test_a_validation_loss_and_a_surrogate_cost_leave_the_multiplier_to_what_is_measured():
    lag = PIDLagrangian(1.0, kp=1.0, ki=0.1)
    lag(torch.tensor(0.0), torch.tensor(9.0), update=False)
    assert lag.multiplier.item() == 0.0
    lag(torch.tensor(0.0), torch.tensor(9.0), measured=2.0)
    assert lag.multiplier.item() == pytest.approx(1.1)


def test_the_integral_does_not_fall_below_zero_while_the_constraint_is_slack():
    lag = PIDLagrangian(1.0, kp=0.0, ki=0.1, kd=0.0, smooth=0.0)
    for _ in range(1000):
        lag(torch.tensor(0.0), torch.tensor(-50.0))
    lag(torch.tensor(0.0), torch.tensor(2.0))
    assert lag.multiplier.item() == pytest.approx(0.1)


@pytest.mark.parametrize("limit", [1.0, [1.0, 0.5]])
def test_a_resumed_run_goes_on_bit_for_bit(limit):
    costs = torch.rand(40, *torch.tensor(limit).shape, generator=torch.Generator().manual_seed(0)) * 3
    whole, first, second = (PIDLagrangian(limit, delay=4) for _ in range(3))
    f = torch.tensor(1.0)
    expected = [whole(f, c) for c in costs]
    for c in costs[:15]:
        first(f, c)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(second(f, c), e) for c, e in zip(costs[15:], expected[15:], strict=True))
    assert second.history == whole.history


def test_bad_limits_gains_and_costs_are_refused_by_name():
    with pytest.raises(ArgumentError, match="limit"):
        PIDLagrangian(math.nan)
    with pytest.raises(ArgumentError, match="ki"):
        PIDLagrangian(1.0, ki=-0.1)
    with pytest.raises(ArgumentError, match="lr"):
        critical_gain(0.1, 0.1, 0.0)
    with pytest.raises(ShapeError, match="cost"):
        PIDLagrangian([1.0, 2.0])(torch.tensor(0.0), torch.ones(3))


def test_a_limit_may_be_changed_and_is_kept_in_the_state():
    zero, lag, other = (
        torch.tensor(0.0),
        PIDLagrangian(1.0, kp=1.0, ki=0.0),
        PIDLagrangian(1.0, kp=1.0, ki=0.0),
    )
    lag.limit = 2.0
    lag(zero, torch.tensor(3.0))
    assert float(lag.multiplier) == 1.0
    other.load_state_dict(lag.state_dict())
    assert float(other.limit) == 2.0
    with pytest.raises(ShapeError, match="limit"):
        lag.limit = [1.0, 2.0]
