"""The PID law."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.signal import lfilter

from bolza.ops.errors import ArgumentError
from bolza.ops.pid import PID, ramp
from bolza.optim.pid import pid_step

ERRORS = np.random.default_rng(0).normal(size=60).tolist()


def outputs(pid, errors, state=None):
    state, found = state or pid.init(), []
    for error in errors:
        state, output = pid.update(state, error)
        found.append(output)
    return found


def test_the_law_is_its_transfer_function():
    """u/e = K_p + K_i/(1 − ℓz⁻¹) + K_d (1 − s)(1 − z⁻¹)/(1 − s z⁻¹), the filter at rest at the first error."""
    pid = PID(kp=0.7, ki=0.3, kd=1.9, leak=0.9, smooth_d=0.6)
    e = np.array(ERRORS)
    integral = lfilter([0.3], [1, -0.9], e)
    derivative = lfilter([0.4, -0.4], [1, -0.6], e - e[0])
    assert outputs(pid, ERRORS) == pytest.approx(0.7 * e + integral + 1.9 * derivative, rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"smooth_p": 0.5, "smooth_d": 0.8, "delay": 3, "squash": True}])
def test_both_forms_are_one_law_where_nothing_saturates(options):
    positional = PID(kp=0.7, ki=0.3, kd=1.9, bias=0.2, **options)
    incremental = replace(positional, form="incremental")
    one, two = outputs(positional, ERRORS), outputs(incremental, ERRORS)
    offset = one[0] - two[0]  # what the proportional term gives at once: an increment has no first change
    assert two == pytest.approx([u - offset for u in one], rel=1e-12, abs=1e-12)


def test_the_pid_optimizer_is_this_law_of_the_gradient():
    torch.manual_seed(0)
    gradients = torch.randn(40, 7, dtype=torch.float64)
    pid = PID(kp=1.0, ki=3.0, kd=20.0, leak=0.9, smooth_d=0.9)
    theta, state = torch.zeros(7, dtype=torch.float64), pid.init()
    other = [torch.zeros(7, dtype=torch.float64)]
    V, D, before = ([torch.zeros(7, dtype=torch.float64)] for _ in range(3))
    before[0].copy_(gradients[0])
    for g in gradients:
        state, u = pid.update(state, g)
        theta = theta - 0.01 * u
        pid_step(other, [g], V, D, before, lr=0.01, alpha=0.9, K_i=3.0, K_d=20.0)
        assert torch.allclose(theta, other[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", ["positional", "incremental"])
@pytest.mark.parametrize("anti_windup", ["both", "conditional", "clamp", "none"])
def test_a_tensor_of_errors_is_as_many_loops(form, anti_windup):
    pid = PID(0.7, 0.3, 1.9, form, low=-0.5, high=1.0, smooth_d=0.3, one_sided=True, anti_windup=anti_windup)
    errors = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = torch.stack(outputs(pid, errors))
    for i in range(4):
        assert together[:, i].tolist() == pytest.approx(outputs(pid, errors[:, i].tolist()), rel=1e-12)


def test_gains_and_limits_may_differ_from_loop_to_loop():
    pid = PID(kp=torch.tensor([1.0, 2.0]), ki=0.1, low=torch.tensor([0.0, -9.0]), high=9.0)
    _, u = pid.update(pid.init(), torch.tensor([-1.0, -1.0]))
    assert u.tolist() == pytest.approx([0.0, -2.1])


def test_dtype_is_kept_and_no_gradient_flows():
    for dtype in (torch.float32, torch.float64):
        error = torch.ones(2, dtype=dtype, requires_grad=True)
        pid = PID(kp=1.0, ki=1.0, high=1.5, squash=True)
        state, u = pid.update(pid.init(), error)
        assert u.dtype == dtype and not u.requires_grad and not state["integral"].requires_grad


def recovery(**options):
    """Steps to leave the upper limit after 1000 steps of a large error."""
    pid = PID(kp=1.0, ki=0.1, low=0.0, high=1.0, **options)
    state = pid.init()
    for _ in range(1000):
        state, _ = pid.update(state, 5.0)
    for step in range(10_000):
        state, u = pid.update(state, -0.5)
        if u < 1.0:
            return step
    return math.inf


@pytest.mark.parametrize("form", ["positional", "incremental"])
@pytest.mark.parametrize("anti_windup", ["both", "conditional", "clamp"])
def test_a_saturated_controller_comes_back_at_once(form, anti_windup):
    assert recovery(form=form, anti_windup=anti_windup) <= 20
    assert recovery(form=form, anti_windup="none") > 5000


def test_a_latching_controller_never_leaves_its_floor():
    errors = [-10.0] * 100 + [10.0] * 100
    pid = PID(ki=0.1, low=0.1, bias=1.0, form="incremental")
    assert outputs(pid, errors)[-1] > 50
    assert outputs(replace(pid, anti_windup="latching"), errors)[-1] == 0.1


def test_the_integral_may_be_unwound_while_the_output_is_at_its_limit():
    pid = PID(kp=100.0, ki=0.1, high=1.0, low=-1.0)
    state = pid.init(0.8)
    state, u = pid.update(state, 0.1)  # outside, and further out: left
    assert u == 1.0 and state["integral"] == pytest.approx(0.8)
    state, u = pid.update(state, -0.5)  # outside below
    assert u == -1.0 and state["integral"] == pytest.approx(0.8)


@pytest.mark.parametrize("form", ["positional", "incremental"])
def test_retuning_and_resuming_do_not_jump(form):
    old = PID(kp=1.0, ki=0.1, kd=3.0, low=0.0, high=5.0, form=form)
    state = old.init()
    for error in (1.0, 2.0, 1.5):
        state, u = old.update(state, error)
    new = replace(old, kp=40.0, ki=0.02, kd=1.0)  # far outside its limits with the old integral
    state = new.resume(state, u, 1.5)
    state, after = new.update(state, 1.5)
    assert after == pytest.approx(u + 0.02 * 1.5)
    assert new.update(state, 1.4)[1] < after


def test_the_squashed_term_cannot_overflow():
    pid = PID(kp=0.01, squash=True)
    for error, expected in ((1e6, 0.01), (-1e6, 0.0), (0.0, 0.005), (math.log(3), 0.0075)):
        assert pid.update(pid.init(), error)[1] == pytest.approx(expected)
        assert float(pid.update(pid.init(), torch.tensor(error))[1]) == pytest.approx(expected, rel=1e-6)


def test_a_jump_of_the_set_point_does_not_kick_a_derivative_of_the_measurement():
    pid = PID(kd=10.0)
    state, _ = pid.update(pid.init(), 1.0, signal=3.0)
    assert pid.update(state, 99.0, signal=3.0)[1] == 0.0
    assert pid.update(state, 99.0)[1] > 0


def test_a_one_sided_derivative_acts_only_where_the_signal_rises():
    assert outputs(PID(kd=1.0, one_sided=True), [0.0, 2.0, 1.0, 1.5]) == [0.0, 2.0, 0.0, 0.5]
    assert outputs(PID(kd=1.0, delay=2), [0.0, 2.0, 1.0, 1.5]) == [0.0, 2.0, 1.0, -0.5]


def test_the_error_is_divided_by_its_scale():
    assert outputs(PID(1.0, 0.2, 3.0, scale=10.0), ERRORS) == pytest.approx(
        outputs(PID(0.1, 0.02, 0.3), ERRORS), rel=1e-12
    )


def test_a_set_point_may_climb_or_fall_in_stairs():
    assert [ramp(step, 2.0, 1.0, 0.4, every=2) for step in range(7)] == pytest.approx(
        [2, 2, 1.6, 1.6, 1.2, 1.2, 1.0]
    )
    with pytest.raises(ArgumentError, match="rise"):
        ramp(0, 0.0, 1.0, -0.1)


@pytest.mark.parametrize(
    "bad",
    [
        {"kp": math.nan},
        {"low": 1.0, "high": 0.0},
        {"leak": 0.0},
        {"leak": 0.5, "form": "incremental"},
        {"smooth_p": 1.0},
        {"delay": 0},
        {"scale": 0.0},
        {"form": "velocity"},
        {"anti_windup": "magic"},
        {"anti_windup": "latching"},
    ],
)
def test_settings_out_of_range_are_refused_by_name(bad):
    with pytest.raises(ArgumentError, match=next(iter(bad))):
        PID(**bad)


@pytest.mark.parametrize("form", ["positional", "incremental"])
@pytest.mark.parametrize("anti_windup", ["both", "conditional"])
def test_an_output_that_is_pushed_out_ends_at_its_limit_not_before_it(form, anti_windup):
    pid = PID(ki=0.4, low=0.1, high=1.0, bias=0.5, form=form, anti_windup=anti_windup)
    assert outputs(pid, [-0.6, -0.6, -0.6, 1.0]) == pytest.approx([0.26, 0.1, 0.1, 0.5])


@pytest.mark.parametrize("form", ["positional", "incremental"])
def test_what_lies_beyond_the_limits_at_the_start_or_on_resuming_is_not_unwound(form):
    pid = PID(ki=0.1, low=1.0, high=2.0, form=form)
    assert pid.init()["output"] == 1.0
    for state in (pid.init(7.0), pid.resume(pid.init(), 7.0, 0.5)):
        assert state["output"] == 2.0
        assert pid.update(state, -1.0)[1] == pytest.approx(1.9)
