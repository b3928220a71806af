import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError
from bolza.meanfield import propagate
from bolza.meanfield.layers.conv_maps import Sliding, conv_modes
from bolza.meanfield.layers.moment_maps import Call, Step, moment_map
from bolza.meanfield.layers.moments import measure


def test_modes_of_a_window_of_equal_taps() -> None:
    """n = 8, width 3 (review §3.7): λ_α = (1 + 2 cos α)/3."""
    modes = conv_modes(3, 8, chi=0.9)
    assert modes.factors[:5].tolist() == pytest.approx([1.0, 0.8047, 0.3333, -0.1381, -0.3333], abs=5e-5)
    assert torch.allclose(modes.factors[5:], modes.factors[1:4].flip(0))
    assert float(modes.depth_scales[3]) == pytest.approx(-1 / math.log(0.9 * 0.138071), rel=1e-5)
    plane = conv_modes((3, 1), (8, 4)).factors
    assert torch.allclose(plane, conv_modes(3, 8).factors[:, None].expand(8, 4))


def test_modes_are_eigenvalues_of_what_a_circular_layer_does_to_the_covariance() -> None:
    layer = nn.Conv1d(40, 40, 3, padding=1, padding_mode="circular", bias=False)
    with torch.no_grad():
        layer.weight[:, :, 1] *= 3.0
        layer.weight[:, :, 2] = layer.weight[:, :, 0]
    value = torch.randn(1, 40, 8)
    step = moment_map(layer, Call("conv", (measure(value, 1),), (value,), {}, layer(value)))
    assert isinstance(step, Step) and step.weight_var is not None
    k, kk = measure(value, 1).kernel[0], step.out.kernel[0]
    at = torch.arange(8)
    before, after = (
        torch.fft.fft(torch.stack([m[at, (at + d) % 8] for d in range(8)]), dim=1) for m in (k, kk)
    )
    factors = conv_modes(layer, 8).factors
    assert torch.allclose(after, step.weight_var * factors * before, atol=1e-9)


@pytest.mark.parametrize("mode", ["constant", "circular", "reflect"])
@pytest.mark.parametrize("full", [True, False])
def test_gradients_go_through_the_adjoint(mode: str, full: bool) -> None:
    """⟨A K, G⟩ = ⟨K, Aᵀ G⟩ for every stride, dilation and padding."""
    window = Sliding((2, 1), (1, 2), (2, 1, 1, 0), mode, (5, 6), (2, 5))
    space = (
        torch.as_tensor(F.pad(torch.zeros(1, 1, 5, 6), (2, 1, 1, 0), mode=mode))
        .unfold(2, 3, 2)
        .unfold(3, 3, 1)
        .shape[2:4]
    )
    assert space[0] == 2
    taps = torch.rand(3, 3, dtype=torch.float64)
    k = torch.randn(1, 60, 60, dtype=torch.float64) if full else torch.randn(30, 2, 2, dtype=torch.float64)
    there = window.forward(k, taps, full)
    g = torch.randn_like(there)
    assert float((there * g).sum()) == pytest.approx(float((k * window.back(g, taps, full)).sum()))


def test_both_layouts_agree_on_pairs_at_the_same_position() -> None:
    model = nn.Sequential(nn.Conv2d(2, 30, 3, padding=1), nn.ReLU(), nn.Conv2d(30, 30, 3, stride=2))
    x = torch.randn(3, 2, 7, 7)
    m = measure(x, 1)
    y = x
    for layer in model[::2]:
        y = layer(y)
        both = [moment_map(layer, Call("c", (k,), (), {}, y)) for k in (m, m.same_positions())]
        assert isinstance(both[0], Step) and isinstance(both[1], Step)
        m = both[0].out
        assert torch.allclose(m.same_positions().kernel, both[1].out.kernel)


def test_a_convolution_of_ones_own_and_a_grouped_one_have_theory() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.conv2d(x, self.weight, self.bias, padding=1, groups=self.groups)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 256, 3, padding="same"), nn.ReLU(), Standardised(256, 256, 3, groups=2)
    )
    rows = propagate(model, torch.randn(4, 3, 5, 5)).layers
    assert [r.source for r in rows] == ["theory"] * 3
    assert rows[2].q_theory == pytest.approx(rows[2].q_measured, rel=0.15)
    assert rows[0].grad_theory == pytest.approx(rows[0].grad_measured, rel=0.2)


def test_modes_refuse_what_they_cannot_say() -> None:
    with pytest.raises(ArgumentError, match="stride 1"):
        conv_modes(nn.Conv1d(3, 3, 3, stride=2), 8)
    with pytest.raises(ArgumentError, match="space has 2 dimensions, the window 1"):
        conv_modes((3,), (8, 8))
