import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, UserCodeError
from bolza.meanfield.activations import activation_names, resolve_activation
from bolza.ops.gaussian import expectation, pair_expectation

Q = torch.tensor([1e-6, 0.3, 2.0, 50.0], dtype=torch.float64)
MODULES = [
    nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.ELU(), nn.CELU(0.5), nn.SELU(), nn.Softplus(),
    nn.Softplus(beta=2.0), nn.Hardtanh(-0.5, 2.0), nn.Mish(), nn.ReLU6(), nn.Softsign(), nn.Tanhshrink(),
    nn.Hardswish(), nn.Hardsigmoid(), nn.Softshrink(0.3), nn.LogSigmoid(), nn.LeakyReLU(0.2), nn.PReLU(init=0.1),
    nn.ReLU(inplace=True), nn.Identity(), nn.Threshold(0.5, 0.5),
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=lambda m: type(m).__name__)
def test_the_record_is_the_module_with_its_derivative_and_kinks(module: nn.Module) -> None:
    act = resolve_activation(module)
    h = torch.linspace(-4.03, 4.05, 83, dtype=torch.float64)
    assert torch.allclose(act.phi(h), module.double()(h.clone()), atol=2e-8)
    step = 1e-5
    near = (
        torch.stack([(h - k).abs() for k in act.kinks]).amin(0) < 1e-3
        if act.kinks
        else torch.zeros(83).bool()
    )
    slope = (act.phi(h + step) - act.phi(h - step)) / (2 * step)
    assert torch.allclose(act.derivative(h)[~near], slope[~near], atol=1e-7)


@pytest.mark.parametrize("module", [nn.Tanh(), nn.GELU(), nn.ELU(), nn.Hardtanh(), nn.ReLU()], ids=repr)
def test_series_closed_form_and_plane_agree(module: nn.Module) -> None:
    act = resolve_activation(module)
    q, c = Q[1:3, None], torch.tensor([-0.6, 0.5, 0.98], dtype=torch.float64)
    plane = pair_expectation(lambda u, v: act.phi(u) * act.phi(v), q, 2 * q, c, act.kinks, act.kinks)
    assert torch.allclose(act.cross(q, 2 * q, c), plane, atol=1e-10)
    slopes = pair_expectation(
        lambda u, v: act.derivative(u) * act.derivative(v), q, q, c, act.kinks, act.kinks
    )
    assert torch.allclose(act.cross_slope(q, q, c), slopes, atol=1e-9)
    gap = act.second(q) - act.cross(q, q, c)
    assert torch.allclose(act.half_distance(*torch.broadcast_tensors(q, c)), gap, atol=1e-10)


@pytest.mark.parametrize(
    "module", [nn.Tanh(), nn.SELU(), nn.Hardtanh(), nn.Sigmoid(), nn.Hardshrink()], ids=repr
)
def test_rate_of_the_variance_is_its_derivative(module: nn.Module) -> None:
    act = resolve_activation(module)
    step = 1e-4
    rate = (act.second(Q * (1 + step)) - act.second(Q * (1 - step))) / (2 * step * Q)
    assert torch.allclose(act.second_rate(Q)[1:], rate[1:], rtol=1e-5, atol=1e-8)


def test_erf_closed_forms_are_quadratures() -> None:
    act = resolve_activation("erf")
    for moment, f in (
        (act.second, lambda h: torch.erf(h) ** 2),
        (act.slope, lambda h: act.derivative(h) ** 2),
    ):
        assert torch.allclose(moment(Q), expectation(f, Q), rtol=1e-12)


def test_curvature_of_tanh_gives_the_reviews_constant() -> None:
    q = torch.tensor(0.570048, dtype=torch.float64)
    assert float(1.760955 * q * resolve_activation("tanh").curvature(q)) == pytest.approx(0.324090, abs=2e-6)
    assert torch.isinf(resolve_activation("relu").curvature(q))


def test_the_same_activation_comes_in_every_form() -> None:
    forms = ["gelu", nn.GELU, nn.GELU(), F.gelu, "torch.nn.functional:gelu"]
    values = {round(float(resolve_activation(f).second(Q[1])), 14) for f in forms}
    assert len(values) == 1
    assert resolve_activation(torch.erf).name == "erf" and resolve_activation("Tanh").name == "tanh"


def test_kinks_of_an_unknown_function_are_found() -> None:
    act = resolve_activation(lambda h: torch.where(h > math.sqrt(2), h, 0.3 * h) + (h + 3).relu())
    assert act.kinks == pytest.approx((-3, math.sqrt(2)), abs=1e-9)
    assert resolve_activation(lambda h: torch.sin(3 * h)).kinks == ()
    assert resolve_activation(torch.sign).kinks == (0.0,)


def test_every_listed_name_resolves() -> None:
    for name in activation_names():
        assert resolve_activation(name).second(Q[1]) > 0


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ArgumentError, match="'tahn' is unknown; known are .*tanh"):
        resolve_activation("tahn")


def test_what_is_not_elementwise_is_refused() -> None:
    with pytest.raises(ArgumentError, match="not elementwise"):
        resolve_activation(nn.Softmax(dim=-1))
    with pytest.raises(ArgumentError, match="activation is 3"):
        resolve_activation(3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="not finite"):
        resolve_activation(torch.log)


def test_user_code_that_raises_is_named() -> None:
    with pytest.raises(UserCodeError, match="no_such_module:f"):
        resolve_activation("no_such_module:f")

    def broken(h: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("boom")

    with pytest.raises(UserCodeError, match="'broken' raised.*boom"):
        resolve_activation(broken)


def test_the_users_module_is_not_changed() -> None:
    module = nn.PReLU()
    resolve_activation(module)
    assert module.weight.dtype == torch.float32 and module.training


NOT_ELEMENTWISE = {"GLU", "LogSoftmax", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin"}
ARGUMENTS: dict[str, tuple[float, ...]] = {"Threshold": (0.1, -0.3)}


@pytest.mark.parametrize("name", sorted(set(nn.modules.activation.__all__) - NOT_ELEMENTWISE) + ["Identity"])
def test_every_elementwise_module_of_torch_matches_monte_carlo(name: str) -> None:
    """Whatever torch calls an activation, within four standard errors; a new one shows up here."""
    module = getattr(nn, name)(*ARGUMENTS.get(name, ()))
    act = resolve_activation(module)
    draw = torch.Generator().manual_seed(7)
    z = torch.randn(2, 200_000, generator=draw, dtype=torch.float64)
    q, c = torch.tensor([0.4, 3.0], dtype=torch.float64)[:, None], 0.7
    u = q.sqrt() * z[0]
    v = (2 * q).sqrt() * (c * z[0] + (1 - c * c) ** 0.5 * z[1])
    run = module.double().train() if name == "RReLU" else module.double().eval()
    u, v = u.requires_grad_(True), v.requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        y, w = run(u * 1.0), run(v * 1.0)
    (dy,) = torch.autograd.grad(y.sum(), u, allow_unused=True)
    (dw,) = torch.autograd.grad(w.sum(), v, allow_unused=True)
    q, cc = q[:, 0], torch.tensor(c, dtype=torch.float64)
    for theory, sample in (
        (act.mean(q), y),
        (act.second(q), y * y),
        (act.slope(q), dy * dy),
        (act.cross(q, 2 * q, cc), y * w),
        (act.cross_slope(q, 2 * q, cc), dy * dw),
    ):
        sample = sample.detach()
        error = sample.std(-1) / sample.shape[-1] ** 0.5
        assert (
            (sample.mean(-1) - theory).abs() <= 4 * error + 1e-6
        ).all()  # 1e-6: beyond the kinks no sample at all


@pytest.mark.parametrize("name", sorted(NOT_ELEMENTWISE - {"MultiheadAttention"}))
def test_activations_that_mix_units_are_refused(name: str) -> None:
    options = {} if name == "Softmax2d" else {"dim": -1}
    with pytest.raises((ArgumentError, UserCodeError)):
        resolve_activation(getattr(nn, name)(**options))


@pytest.mark.parametrize("name", ["sigmoid", "softplus", "gelu", "tanh"])
def test_the_rate_at_variance_zero_is_the_limit(name: str) -> None:
    act, zero = resolve_activation(name), torch.zeros(1, dtype=torch.float64)
    limit = act.derivative(zero) ** 2 + act.phi(zero) * act.second_derivative(zero)
    assert torch.allclose(act.second_rate(zero), limit, rtol=1e-9, atol=0)


def test_a_kink_far_out_or_beside_steep_growth_is_found() -> None:
    assert resolve_activation(lambda h: h.clamp(-20, 20)).kinks == (-20.0, 20.0)
    assert resolve_activation(lambda h: h**3 + h.relu()).kinks == pytest.approx((0,), abs=1e-9)
    assert resolve_activation(lambda h: torch.exp(h / 4)).kinks == ()


@pytest.mark.parametrize("name", ["gelu", "elu", "sigmoid", "silu"])
def test_the_curvature_is_that_of_the_second_derivative(name: str) -> None:
    act, q, step = resolve_activation(name), torch.tensor(0.8, dtype=torch.float64), 1e-4
    second = lambda h: (act.derivative(h + step) - act.derivative(h - step)) / (2 * step)  # noqa: E731
    want = expectation(lambda h: second(h) ** 2, q, act.kinks)
    assert float(act.curvature(q)) == pytest.approx(float(want), rel=1e-4) and want > 1e-3
