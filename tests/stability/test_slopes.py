import pytest
import torch
from torch import nn

from bolza.stability.slopes import function_slopes, layer_slopes

D = torch.float64

LAYERS = [
    nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.LeakyReLU(-0.3), nn.Tanh(), nn.Sigmoid(), nn.GELU(),
    nn.GELU(approximate="tanh"), nn.SiLU(), nn.Mish(), nn.Softplus(1.5), nn.ELU(1.5), nn.CELU(0.7), nn.SELU(),
    nn.Hardtanh(-0.5, 2.0), nn.Hardswish(), nn.Hardsigmoid(), nn.Softsign(), nn.LogSigmoid(), nn.Tanhshrink(),
]  # fmt: skip


def quotients(slopes, lower, upper, points=401):
    share = torch.linspace(0, 1, points, dtype=D)[:, None]
    x = lower + (upper - lower) * share
    f = slopes.function(x)
    return (f[1:] - f[:-1]) / (x[1:] - x[:-1]), f


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: str(layer).lower())
def test_slopes_and_values_on_an_interval_hold_all_difference_quotients_and_values(layer):
    draw = torch.Generator().manual_seed(0)
    centre = 3 * torch.randn(100, dtype=D, generator=draw)
    radius = 3 * torch.rand(100, dtype=D, generator=draw)
    slopes = layer_slopes(layer, centre)
    found, values = quotients(slopes, centre - radius, centre + radius)
    least, largest = slopes.between(centre - radius, centre + radius)
    assert (found >= least - 1e-9).all() and (found <= largest + 1e-9).all()
    low, high = slopes.values(centre - radius, centre + radius)
    assert (values >= low - 1e-12).all() and (values <= high + 1e-12).all()
    assert torch.allclose(slopes.function(centre), layer(centre), atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "least", "largest"),
    [
        (nn.Tanh(), 0.0, 1.0),
        (nn.Sigmoid(), 0.0, 0.25),
        (nn.GELU(), -0.12890414518515483, 1.128904145185155),
        (nn.SiLU(), -0.09983932012886691, 1.099839320128867),
        (nn.LeakyReLU(0.1), 0.1, 1.0),
    ],
)
def test_slopes_everywhere_are_known(layer, least, largest):
    a, b = layer_slopes(layer, torch.zeros(1, dtype=D)).everywhere(torch.zeros(1, dtype=D))
    assert float(a) == pytest.approx(least, abs=2e-9) and float(b) == pytest.approx(largest, abs=2e-9)
    assert float(a) <= least and float(b) >= largest


def test_slopes_of_a_rectifier_are_exact_where_its_sign_is_known():
    relu = function_slopes("relu", (), {})
    low, high = torch.tensor([-2.0, 1.0, -1.0], dtype=D), torch.tensor([-1.0, 2.0, 1.0], dtype=D)
    a, b = relu.between(low, high)
    assert a.tolist() == [0, 1, 0] and b.tolist() == [0, 1, 1]


def test_prelu_has_a_slope_for_each_channel():
    layer = nn.PReLU(2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, -0.25]))
    like = torch.zeros(1, 2, 3, dtype=D)
    a, b = layer_slopes(layer, like).everywhere(like)
    assert a[0, :, 0].tolist() == [0.5, -0.25] and (b == 1).all()


def test_what_jumps_is_no_activation():
    assert layer_slopes(nn.Hardshrink(), torch.zeros(1)) is None
    assert function_slopes("sign", (), {}) is None
