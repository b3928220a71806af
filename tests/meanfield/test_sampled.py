"""Activations without a quadrature: noise, jumps, surrogates, functions too fast or too rough."""

import math

import pytest
import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError
from bolza.meanfield import critical_weight_var, fixed_point, resolve_activation, sampled_activation
from bolza.meanfield.activations import activation_names

ONE = torch.ones((), dtype=torch.float64)
FIELDS = ("q", "c", "chi_q", "chi_1", "chi_c", "xi_q", "xi_c", "xi_grad")


def noisy_tanh(h: Tensor) -> Tensor:
    return torch.tanh(h) + 0.1 * torch.randn_like(h)


def test_a_sampled_tanh_has_the_fixed_point_of_tanh_within_its_error_bars() -> None:
    exact, found = (
        fixed_point("tanh", 2.5, 0.05),
        fixed_point(sampled_activation(torch.tanh, 1 << 14), 2.5, 0.05),
    )
    assert exact.error == {} and set(found.error) == set(FIELDS)
    for name in FIELDS:
        gap, error = abs(float(getattr(found, name) - getattr(exact, name))), float(found.error[name])
        assert gap < 4.5 * error + 1e-12, name
        assert error < 0.05, name
    assert found.regime == "chaotic"


def test_noise_adds_its_variance_and_keeps_inputs_apart() -> None:
    """φ = tanh + 0.1 ξ: q gains σ_w² 0.01 and the product of two inputs gains nothing."""
    point = fixed_point(sampled_activation(noisy_tanh, 1 << 13), 1.5, 0.05)
    shifted = fixed_point("tanh", 1.5, 0.05 + 1.5 * 0.01)  # the same q, with the noise taken for a bias
    assert abs(float(point.q - shifted.q)) < 5 * float(point.error["q"]) < 0.05
    tanh = resolve_activation("tanh")
    q, c = shifted.q, point.c
    again = (1.5 * tanh.cross(q, q, c) + 0.05) / q
    assert float(c) < 0.95
    assert abs(float(again - c)) < 5 * float(point.error["c"])


def test_tanh_then_dropout_is_dropout() -> None:
    rate = 0.05
    layer = sampled_activation(nn.Sequential(nn.Tanh(), nn.Dropout(rate)), 1 << 13)
    sampled = fixed_point(layer, 1.760955, 0.05)
    theory = fixed_point("tanh", 1.760955, 0.05, keep_prob=1 - rate)
    for name in ("q", "c", "chi_1", "chi_c"):
        assert abs(float(getattr(sampled, name) - getattr(theory, name))) < 5 * float(sampled.error[name]), (
            name
        )
    assert fixed_point(nn.Sequential(nn.Tanh(), nn.Dropout(rate)).eval(), 1.760955, 0.05).error == {}


def test_sampling_repeats_itself_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = resolve_activation(noisy_tanh).second(ONE)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(resolve_activation(noisy_tanh).second(ONE), first)


def test_a_rare_noise_is_noticed() -> None:
    assert resolve_activation(nn.Sequential(nn.ReLU(), nn.Dropout(0.01))).noisy
    assert not resolve_activation(nn.Sequential(nn.ReLU(), nn.Dropout(0.0))).noisy


def test_rrelu_in_training_is_random_and_in_evaluation_is_not() -> None:
    q, low, high = torch.tensor(1.7, dtype=torch.float64), 1 / 8, 1 / 3
    act = resolve_activation(nn.RReLU())
    assert act.noisy and not resolve_activation(nn.RReLU().eval()).noisy
    assert not resolve_activation("rrelu").noisy
    square = (low * low + low * high + high * high) / 3
    assert float(act.second(q)) == pytest.approx((1 + square) * 1.7 / 2)
    sampled = sampled_activation(nn.RReLU())
    for c in (0.3, 1.0):
        cc = torch.tensor(c, dtype=torch.float64)
        for name, tol in (("cross", 0.02), ("cross_slope", 0.02)):
            pair = getattr(act, name)(q, q, cc), getattr(sampled, name)(q, q, cc)
            assert float(pair[0]) == pytest.approx(float(pair[1]), abs=tol)
    assert float(act.cross(q, q, ONE)) < float(act.second(q)) - 1e-3
    point = fixed_point(act, 1.5, 0.1)
    assert point.c < 1 and point.regime == "ordered"
    assert float(critical_weight_var(act)) == pytest.approx(2 / (1 + square))


def test_prelu_with_a_slope_per_channel_averages_squares() -> None:
    layer = nn.PReLU(4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.0, 0.2, 0.5, -1.0]))
    act = resolve_activation(layer)
    each = [resolve_activation(nn.LeakyReLU(a)) for a in (0.0, 0.2, 0.5, -1.0)]
    q, c = torch.tensor([0.5, 2.0], dtype=torch.float64), torch.tensor([-0.4, 0.8], dtype=torch.float64)
    for name, args in (("second", (q,)), ("slope", (q,)), ("mean", (q,)), ("cross", (q, 2 * q, c))):
        want = torch.stack([getattr(a, name)(*args) for a in each]).mean(0)
        assert torch.allclose(getattr(act, name)(*args), want, rtol=1e-6), name
    assert torch.allclose(act.cross(q, q, ONE.expand(2)), act.second(q))


def test_a_sign_separates_inputs_however_close() -> None:
    """C(c) = (σ_w² 2/π arcsin c + σ_b²)/q has infinite slope at 1."""
    point = fixed_point(torch.sign, 1.0, 0.5)
    c = float(point.c)
    assert float(point.q) == pytest.approx(1.5) and torch.isinf(point.chi_1) and point.regime == "chaotic"
    assert (2 / math.pi * math.asin(c) + 0.5) / 1.5 == pytest.approx(c, abs=1e-9)
    assert float(point.chi_c) == pytest.approx(2 / math.pi / math.sqrt(1 - c * c) / 1.5, rel=1e-6)
    with pytest.raises(ArgumentError, match="no critical point: where it jumps"):
        critical_weight_var(torch.sign, 0.05)


@pytest.mark.parametrize("layer", [nn.Hardshrink(0.4), nn.Threshold(0.3, -0.5)], ids=repr)
def test_the_slope_of_the_correlation_counts_jumps(layer: nn.Module) -> None:
    act = resolve_activation(layer)
    q, c, step = 1.3 * ONE, torch.tensor([-0.5, 0.2, 0.8], dtype=torch.float64), 1e-3
    numbers = act.cross(q, q, c + step) - act.cross(q, q, c - step)
    assert torch.allclose(act.correlation_slope(q, c), numbers / (2 * step * q), rtol=1e-4)
    assert torch.isinf(act.correlation_slope(q, ONE))


class Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):  # type: ignore[no-untyped-def, override]
        return torch.sign(h)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def, override]
        return g


def test_a_surrogate_gradient_is_the_gradient_and_not_the_slope_of_the_map() -> None:
    point = fixed_point(lambda h: Surrogate.apply(h), 1.0, 0.5)
    assert float(point.c) == pytest.approx(float(fixed_point(torch.sign, 1.0, 0.5).c), rel=1e-9)
    assert torch.isinf(point.xi_grad)  # σ_w² E 1² = 1: what backpropagation sees
    detached = resolve_activation(lambda h: h * torch.sigmoid(h).detach())
    silu = resolve_activation("silu")
    q, c = torch.tensor(1.2, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    assert float(detached.correlation_slope(q, c)) == pytest.approx(
        float(silu.cross_slope(q, q, c)), abs=1e-9
    )
    assert abs(float(detached.slope(q) - silu.slope(q))) > 0.05


def test_fast_functions_get_finer_nodes_and_rough_ones_are_sampled() -> None:
    fast = resolve_activation(lambda h: torch.sin(40 * h))
    assert fast.width < 1 and fast.replicas == ()
    q = torch.tensor([1e-3, 0.7], dtype=torch.float64)
    assert torch.allclose(fast.second(q), (1 - torch.exp(-2 * 1600 * q)) / 2, atol=1e-12)
    stairs = resolve_activation(lambda h: (30 * h).round() / 30)
    assert len(stairs.replicas) == 16 and stairs.jumps and not stairs.noisy
    assert float(stairs.second(ONE)) == pytest.approx(1 + 1 / 10_800, abs=1e-4)


def test_arguments_are_checked() -> None:
    with pytest.raises(ArgumentError, match="samples is 10"):
        sampled_activation(torch.tanh, 10)
    with pytest.raises(ArgumentError, match="not elementwise"):
        sampled_activation(lambda h: h - h.mean() + torch.randn_like(h))
    assert "rrelu" in activation_names()
