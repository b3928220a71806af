"""A weight that keeps a measured quantity at its set-point."""

import io
import math

import pytest
import torch
from scipy.optimize import brentq

from bolza.controllers import PID, ControlVAE, DynamicVAE, SetPoint, ramp
from bolza.core.errors import ArgumentError, ShapeError


def entropy(temperature, energies):
    return torch.distributions.Categorical(logits=-energies / temperature).entropy()


def test_the_temperature_found_is_the_one_whose_entropy_is_the_set_point():
    energies = torch.tensor([0.0, 0.3, 1.0, 4.0], dtype=torch.float64)
    exact = brentq(lambda t: float(entropy(t, energies)) - 0.9, 1e-2, 1e2, xtol=1e-14)
    for start in (0.05, 20.0):
        control = SetPoint(0.9, PID(ki=0.3), raises=True, exponential=True, initial=start)
        for _ in range(400):
            control.step(entropy(control.value, energies))
        assert control.value == pytest.approx(exact, rel=1e-9)


def test_several_temperatures_are_steered_at_once():
    energies = torch.tensor([[0.0, 1.0], [0.0, 10.0], [0.0, 0.1]], dtype=torch.float64)
    control = SetPoint(torch.tensor([0.5, 0.5, 0.6]), PID(ki=0.3), raises=True, exponential=True, initial=1.0)
    value = torch.ones(3, dtype=torch.float64)
    for _ in range(300):
        value = control.step(entropy(value[:, None], energies))
    # the unit of energy is the unit of temperature
    assert value[1] / value[0] == pytest.approx(10.0, rel=1e-9)
    assert entropy(value[:, None], energies).tolist() == pytest.approx([0.5, 0.5, 0.6], rel=1e-5)
    assert control.log()["value[2]"] == float(value[2])


def test_the_gradient_penalty_of_a_critic_finds_the_weight_of_unit_slope():
    """A critic kx between N(δ, 1) and N(0, 1) has E f − E f − w E|f'|² largest at k = δ/2w: unit slope at w = δ/2."""
    torch.manual_seed(0)
    delta = 3.0
    critic = torch.nn.Linear(1, 1, bias=False).double()
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    control = SetPoint(1.0, PID(kp=0.5, ki=0.1, low=0.01), initial=5.0)
    real, fake = torch.randn(2, 64, 1, dtype=torch.float64)
    real, fake = real - real.mean() + delta, (fake - fake.mean()).requires_grad_()
    for _ in range(120):
        out = critic(fake)
        (slope,) = torch.autograd.grad(out.sum(), fake, create_graph=True)
        penalty = slope.square().mean()
        weight = control.step(penalty)
        optimizer.zero_grad()
        (out.mean() - critic(real).mean() + weight * penalty).backward()
        optimizer.step()
    assert control.value == pytest.approx(delta / 2, rel=1e-3)


def test_the_weight_of_a_sparsity_penalty_leaves_as_many_coefficients_as_are_wanted():
    """For an orthogonal design |θ| shrinks by w, so that w settles between two order statistics."""
    c = torch.randn(200, generator=torch.Generator().manual_seed(0)).abs().sort(descending=True).values
    control = SetPoint(0.25, PID(ki=0.05, low=0.0))
    for _ in range(300):
        control.step(float((c > control.value).double().mean()))
    assert c[50] <= control.value < c[49]


def plant(control, steps, memory=0.8, gain=10.0):
    """First-order lag: y → gain·(1 − w)."""
    y, found = 0.0, []
    for _ in range(steps):
        y = memory * y + (1 - memory) * gain * (1 - control.value)
        control.step(y)
        found.append(y)
    return found


def test_where_it_rests_does_not_depend_on_the_gains_and_a_relative_error_not_on_the_unit():
    for kp, ki in ((0.0, 0.01), (0.05, 0.02), (0.1, 0.005)):
        assert plant(SetPoint(4.0, PID(kp, ki, low=0.0)), 1500)[-1] == pytest.approx(4.0, abs=1e-3)
    small = plant(SetPoint(4.0, PID(0.1, 0.05, low=0.0), relative=True), 40)
    large = plant(SetPoint(4000.0, PID(0.1, 0.05, low=0.0), relative=True), 40, gain=1e4)
    assert large == pytest.approx([1000 * y for y in small], rel=1e-9)


def test_a_set_point_may_be_a_function_of_the_step_or_be_changed():
    control = SetPoint(lambda step: ramp(step, 1.0, 4.0, 0.5, every=100), PID(0.05, 0.02, low=0.0))
    found = plant(control, 1200)
    assert found[99] == pytest.approx(1.0, abs=0.05) and found[-1] == pytest.approx(4.0, abs=1e-3)
    control.target = 6.0
    assert plant(control, 500)[-1] == pytest.approx(6.0, abs=1e-3)
    assert control.set_point == 6.0


def test_retuning_and_resuming_do_not_move_the_weight():
    control = SetPoint(4.0, PID(0.05, 0.02, kd=0.1, low=0.0))
    plant(control, 30)
    before = control.value
    control.retune(kp=0.5, ki=0.0)
    assert control.step(control.log()["measurement"]) == pytest.approx(before)
    control.resume(0.77)
    assert control.value == pytest.approx(0.77)
    assert control.step(control.log()["measurement"]) == pytest.approx(0.77)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_measurement_that_is_not_finite_counts_as_the_last_one(bad):
    control, other = (SetPoint(4.0, PID(0.05, 0.02, kd=1.0)) for _ in range(2))
    assert control.step(bad) == 0.0  # nothing seen yet
    for y, z in ((5.0, 5.0), (bad, 5.0), (torch.tensor(bad), 5.0), (6.0, 6.0)):
        assert control.step(y) == other.step(z)
    several = SetPoint(4.0, PID(0.05, 0.02))
    several.step(torch.tensor([5.0, 5.0]))
    value = several.step(torch.tensor([bad, 6.0]))
    assert value.isfinite().all() and value[1] > value[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: SetPoint(4.0, PID(0.1, 0.02, 0.3, smooth_p=0.5, smooth_d=0.5, delay=3), average=2),
        lambda: ControlVAE(5.0),
        lambda: DynamicVAE(lambda step: ramp(step, 0.5, 5.0, 0.1)),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_a_resumed_run_goes_on_bit_for_bit(make, several):
    y = torch.rand(60, 3, generator=torch.Generator().manual_seed(0)) * 10
    readings = list(y) if several else y[:, 0].tolist()
    whole, first, second = make(), make(), make()
    expected = [whole.step(r) for r in readings]
    for r in readings[:25]:
        first.step(r)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for r, value in zip(readings[25:], expected[25:], strict=True):
        assert torch.equal(torch.as_tensor(second.step(r)), torch.as_tensor(value))
    assert second.history == whole.history


def test_the_state_taken_is_a_copy():
    control = ControlVAE(5.0)
    control.step(torch.tensor([1.0, 2.0]))
    kept = control.state_dict()
    control.step(torch.tensor([9.0, 9.0]))
    assert kept["count"] == 1 and kept["seen"][0].tolist() == [1.0, 2.0]


def test_the_weight_carries_no_gradient_and_keeps_the_dtype():
    y = torch.rand(2, dtype=torch.float64, requires_grad=True)
    value = ControlVAE(0.1).step(y)
    assert value.dtype == torch.float64 and not value.requires_grad
    assert isinstance(ControlVAE(0.1).step(y.sum()), float)


def test_bad_settings_are_refused_by_name():
    with pytest.raises(ArgumentError, match="pid"):
        SetPoint(1.0, 0.1)
    with pytest.raises(ArgumentError, match="average"):
        SetPoint(1.0, PID(), average=0)
    with pytest.raises(ArgumentError, match="initial"):
        SetPoint(1.0, PID(), exponential=True, initial=0.0)
    with pytest.raises(ArgumentError, match="target"):
        SetPoint(math.nan, PID())
    with pytest.raises(ArgumentError, match="relative"):
        SetPoint(0.0, PID(), relative=True).step(1.0)
    control = SetPoint(1.0, PID())
    control.step(torch.ones(2))
    with pytest.raises(ShapeError, match="measurement"):
        control.step(torch.ones(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make", [lambda: ControlVAE(torch.tensor([5.0, 2.0])), lambda: DynamicVAE(5.0)])
def test_measurements_of_a_gpu_give_weights_there_also_after_loading_from_the_host(make):
    here, there = make(), make()
    y = torch.rand(20, 2, generator=torch.Generator().manual_seed(0)) * 10
    for r in y[:10]:
        here.step(r)
    there.load_state_dict(here.state_dict())
    for r in y[10:]:
        value = there.step(r.cuda())
        assert value.is_cuda and value.tolist() == pytest.approx(here.step(r).tolist(), rel=1e-6)


def test_a_logarithm_out_of_reach_does_not_overflow():
    control = SetPoint(5.0, PID(ki=10.0), raises=True, exponential=True)
    for _ in range(100):
        control.step(0.0)
    assert control.value == pytest.approx(math.exp(50))
    control.retune(high=3.0)
    assert control.step(0.0) == pytest.approx(math.exp(3))


def test_half_precision_is_integrated_in_single():
    control = SetPoint(0.0, PID(ki=1e-4))
    for _ in range(600):
        value = control.step(torch.ones(2, dtype=torch.bfloat16))
    assert value.dtype == torch.float32 and value.tolist() == pytest.approx([0.06, 0.06], rel=1e-4)


def test_narrower_limits_leave_nothing_to_unwind():
    weight = SetPoint(1.0, PID(ki=0.1, high=5.0), initial=4.0)
    weight.step(1.0)
    weight.retune(high=1.0)
    assert weight.step(0.0) == pytest.approx(0.9)


def test_settings_changed_before_the_first_step_do_not_move_the_weight():
    for settings in ({"bias": 5.0}, {"form": "incremental"}):
        weight = SetPoint(1.0, PID(ki=0.1, bias=1.0))
        weight.retune(**settings)
        assert weight.step(1.0) == 1.0


def test_a_set_point_that_is_not_finite_is_refused_before_it_is_integrated():
    weight = SetPoint(lambda step: math.nan if step == 1 else 1.0, PID(ki=1.0))
    weight.step(2.0)
    with pytest.raises(ArgumentError, match="target=nan at step 2"):
        weight.step(2.0)
    assert weight.step(2.0) == 2.0


@pytest.mark.parametrize(("first", "second"), [(torch.ones(3), 1.0), (1.0, torch.ones(3))])
def test_other_loops_than_before_are_refused(first, second):
    weight = SetPoint(1.0, PID(ki=1.0))
    weight.step(first)
    with pytest.raises(ShapeError, match="measurement"):
        weight.step(second)
