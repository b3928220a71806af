"""Networks that certificates must read as they run, or refuse by name."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from bolza.core.errors import UnsupportedError
from bolza.stability import certified_radius, interval_bounds, lipschitz
from bolza.stability.operator_norm import operator_gain


class Net(nn.Module):
    """A network from a function of a layer and the input."""

    def __init__(
        self, function: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Identity() if layer is None else layer

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer, x)


def bounds(net: nn.Module, shape: tuple[int, ...], **settings: object) -> float:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    return lipschitz(net, x, "product", **settings).bound  # type: ignore[arg-type]


def holds_outputs(net: nn.Module, shape: tuple[int, ...]) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    found = interval_bounds(net, x - 0.5, x + 0.5)
    twin = net.double().eval()
    for _ in range(30):
        y = twin(x + (torch.rand(x.shape, generator=generator, dtype=x.dtype) - 0.5).sign() / 2)
        if not bool(((found.lower <= y) & (y <= found.upper)).all()):
            return False
    return True


def test_what_an_in_place_layer_overwrites_is_overwritten_in_the_certificate() -> None:
    net = Net(_twice, nn.LeakyReLU(5.0, inplace=True))
    assert float(net(torch.full((1, 1), -1.0))) == -10  # h was overwritten: the slope is 10, not 6
    assert bounds(net, (3,)) == pytest.approx(10, rel=1e-6)
    assert holds_outputs(net, (3,))


def _twice(layer: nn.Module, x: Tensor) -> Tensor:
    h = 1 * x
    return layer(h) + h


def test_a_network_that_overwrites_its_input_is_read_on_a_copy() -> None:
    net = nn.Sequential(nn.SELU(inplace=True), nn.Linear(4, 4))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    assert lipschitz(net, x, "product").bound > 0
    assert certified_radius(net, x).radius.shape == (3,)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "function",
    [
        lambda layer, x: x - x.mean(0, keepdim=True),
        lambda layer, x: torch.softmax(x, 0),
    ],
)
def test_outputs_that_mix_samples_are_refused(function: Callable[[nn.Module, Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedError, match="other samples"):
        certified_radius(Net(function), torch.randn(1, 4, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda layer, x: torch.div(x, 2, rounding_mode="floor"), "rounds"),
        (lambda layer, x: x.to(torch.bfloat16).to(x.dtype), "rounds"),
        (lambda layer, x: F.dropout(x, 0.5), "random"),
        (lambda layer, x: F.batch_norm(x[:, :, None].expand(-1, -1, 2) * torch.arange(2), None, None, training=True),
         "statistics"),
        (lambda layer, x: F.conv_transpose1d(x[:, None], x.view(1, 1, -1)), "multiplies two values"),
        (lambda layer, x: F.softplus(x, threshold=1.0), "softplus"),
        (lambda layer, x: torch.div(torch.ones_like(x), other=x), "multiplies two values"),
    ],
)  # fmt: skip
def test_functions_that_jump_draw_or_multiply_are_refused(
    function: Callable[[nn.Module, Tensor], Tensor], match: str
) -> None:
    with pytest.raises(UnsupportedError, match=match):
        lipschitz(Net(function), torch.ones(1, 4))


def test_a_hook_that_changes_what_a_layer_gives_is_refused() -> None:
    for net in (nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU())):
        net.register_forward_hook(lambda module, args, output: 5 * output)
        with pytest.raises(UnsupportedError, match="hook"):
            interval_bounds(net, torch.zeros(1, 3), torch.ones(1, 3))


def test_computed_weights_are_those_of_the_moment_and_stay_computed_in_the_users_network() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(2, 3, 3)), nn.ReLU())
    assert holds_outputs(net, (2, 4, 4))
    assert isinstance(net[0].parametrizations, nn.ModuleDict) and net[0].weight.shape == (3, 2, 3, 3)


def test_an_instance_norm_of_negative_scale_keeps_lower_ends_below_upper_ones() -> None:
    layer = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    nn.init.constant_(layer.weight, -2.0)
    assert holds_outputs(nn.Sequential(layer), (3, 2, 2))


def test_an_adaptive_pool_that_enlarges_an_image_counts_each_copy() -> None:
    assert bounds(nn.Sequential(nn.AdaptiveMaxPool2d(7)), (2, 1, 1)) == pytest.approx(7)
    net = nn.Sequential(nn.Unflatten(1, (6000, 1, 1)), nn.AdaptiveAvgPool2d(3))  # too large for a matrix
    assert bounds(net, (6000,), samples=1) == pytest.approx(3)


@pytest.mark.parametrize(
    ("function", "least"),
    [
        (lambda layer, x: x + x, 2.0),
        (lambda layer, x: torch.add(x, x.flip(1), alpha=3), 4.0),
        (lambda layer, x: torch.cat([x, x], 1), math.sqrt(2)),
        (lambda layer, x: torch.zeros(20, dtype=x.dtype) + x[:, :, None], math.sqrt(20)),
        (lambda layer, x: x.mul(other=3.0), 3.0),
    ],
)
def test_values_too_large_for_a_matrix_count_as_often_as_they_are_used(
    function: Callable[[nn.Module, Tensor], Tensor], least: float
) -> None:
    assert bounds(Net(function), (6000,), samples=1) >= least * (1 - 1e-12)


def test_entries_that_are_taken_repeatedly_from_a_large_value_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="too large"):
        bounds(Net(lambda layer, x: x[:, [0] * 6000]), (6000,), samples=1)


def test_a_circular_kernel_longer_than_its_image_has_no_bound_by_frequencies() -> None:
    layer = nn.Conv1d(1, 1, 7, padding=3, padding_mode="circular", bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -1.0]).repeat(4)[:7])
    wave = torch.tensor([1.0, -1.0, 1.0, -1.0])[None, None]
    gain = float(
        layer(wave).detach().norm() / wave.norm()
    )  # 7, at a frequency that a grid of 7 does not have
    found = operator_gain(layer, torch.Size([1, 1, 4]))
    assert found is None or found >= gain
    assert bounds(nn.Sequential(layer), (1, 4)) >= gain * (1 - 1e-9)


def test_a_mask_of_minus_infinity_gives_numbers() -> None:
    mask = torch.tensor([0.0, 0.0, -torch.inf], dtype=torch.float64)
    net = Net(lambda layer, x: torch.softmax(x + mask, -1))
    assert holds_outputs(net, (3,))
    assert bounds(net, (3,)) <= 0.5 * (1 + 1e-6)


def test_a_kernel_without_second_derivatives_has_a_sampled_gain() -> None:
    found = lipschitz(nn.Sequential(nn.Linear(1, 1), nn.Hardsigmoid()), torch.zeros(1, 1))
    assert found.lower == pytest.approx(found.bound, rel=1e-6)


def test_the_class_numbers_of_a_radius_are_checked() -> None:
    with pytest.raises(ValueError, match="classes are 0 to 1"):
        certified_radius(nn.Linear(2, 2), torch.zeros(2, 2), torch.tensor([0, 5]))


def test_a_network_that_ignores_its_input_has_intervals_of_no_width() -> None:
    net = Net(lambda layer, x: torch.ones(1, 2, dtype=x.dtype).expand(x.shape[0], 2))
    assert not bool(interval_bounds(net, -torch.ones(3, 2), torch.ones(3, 2)).width.any())


def test_a_row_of_attention_that_is_masked_altogether_gives_zero() -> None:
    mask = torch.tensor([[True] * 3, [False] * 3, [True] * 3])
    attend = F.scaled_dot_product_attention
    assert holds_outputs(Net(lambda layer, x: attend(x, x, x.abs() + 1, attn_mask=mask)), (3, 4))
