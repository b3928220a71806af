"""Values without a closed form: the network's own functions on units drawn from its Gaussians."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.meanfield import propagate
from bolza.meanfield.propagate import LayerMoments, Propagation


class Between(nn.Module):
    """A function between two random layers."""

    def __init__(self, f: Callable[[Tensor], Tensor], width: int = 512, wide: int = 1) -> None:
        super().__init__()
        self.f, self.a = f, nn.Linear(20, wide * width)
        self.b = nn.Linear(width, width)
        for layer in (self.a, self.b):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.f(self.a(x)))


def agrees(row: LayerMoments, gradients: bool = True, sampled: float = 0.04) -> None:
    """Within 3.5 standard errors, and what the draws may err themselves."""
    assert abs(row.q_theory / row.q_measured - 1) < 3.5 * row.q_error / row.q_measured + sampled, row
    assert abs(row.c_theory - row.c_measured) < 3.5 * row.c_error + sampled / 2, row
    if gradients:
        gap = abs(math.log(row.grad_theory / row.grad_measured))
        assert gap < 3.5 * row.grad_error / row.grad_measured + 3.5 * math.sqrt(2 / 512) + sampled, row


def last_sampled(result: Propagation) -> LayerMoments:
    return [r for r in result.layers if r.note == "by sampling"][-1]


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "a value and its ReLU": (lambda x: x + x.relu(), 1),
    "a gate fed by the value itself": (lambda x: x * torch.sigmoid(x), 1),
    "a gate of its own units": (lambda x: x[:, :512] * torch.sigmoid(x[:, 512:]), 2),
    "SwiGLU": (lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], 2),
    "GLU": (lambda x: F.glu(x, -1), 2),
    "a softplus gate": (lambda x: F.softplus(x) * torch.tanh(x), 1),
    "an activation of an activation": (lambda x: torch.tanh(2 * x.relu() - 1), 1),
    "a square": (lambda x: x * x, 1),
    "a maximum of halves": (lambda x: torch.maximum(x[:, :512], x[:, 512:]), 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_has_no_closed_form_is_predicted_by_sampling(name: str) -> None:
    f, wide = FUNCTIONS[name]
    torch.manual_seed(1)
    result = propagate(Between(f, wide=wide), torch.randn(8, 20), seed=3)
    assert {r.source for r in result.layers} == {"theory"}
    # a product of a Gaussian with itself has heavy tails, whose own moments err more
    agrees(last_sampled(result), sampled=0.12 if "square" in name else 0.06)
    agrees(result.layers[0], sampled=0.12 if "square" in name else 0.06)


def test_sampled_kernels_have_the_closed_form_where_there_is_one() -> None:
    """x + relu(x) has E y² = q (1 + 2·½ + ½), and its gradient the factor E (1 + 1[x>0])² = 2.5."""
    result = propagate(Between(lambda x: x + x.relu()), torch.randn(8, 20))
    first, _, summed, _ = result.layers
    assert summed.q_theory == pytest.approx(2.5 * first.q_theory, rel=0.02)
    assert first.grad_theory == pytest.approx(2.5 * summed.grad_theory, rel=0.05)


def test_a_value_added_to_itself_is_twice_that_value() -> None:
    result = propagate(Between(lambda x: x + x), torch.randn(8, 20))
    assert result.layers[-1].q_theory == pytest.approx(4 * result.layers[0].q_theory * 2, rel=0.2)
    assert result.layers[0].grad_theory == pytest.approx(4 * result.layers[-1].grad_theory * 2, rel=0.3)


def test_chunks_of_one_layer_are_independent_and_chunks_of_equal_units_are_not() -> None:
    apart = propagate(Between(lambda x: x[:, :512] + x[:, 512:], wide=2), torch.randn(8, 20))
    same = propagate(Between(lambda x: x[:, :512] + torch.tanh(x[:, :512]), wide=2), torch.randn(8, 20))
    assert [r.note for r in apart.layers if r.kind == "add"] == [""]
    assert [r.note for r in same.layers if r.kind == "add"] == ["by sampling"]
    agrees(apart.layers[1], sampled=0.03)


class PostActivation(nn.Module):
    """x ← relu(x + W x + b): the stream is no Gaussian."""

    def __init__(self, width: int = 512, blocks: int = 5) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(20, width), nn.Linear(width, 100)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x)


def test_a_residual_network_with_activations_on_its_stream_is_predicted() -> None:
    torch.manual_seed(0)
    result = propagate(PostActivation(), torch.randn(8, 20))
    assert not result.unmapped
    wide = math.sqrt(6 / 512) + 0.03
    for row in result.layers:
        agrees(row, gradients=row.units > 200, sampled=wide)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c1, self.c2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.b1, self.b2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.b2(self.c2(self.act(self.b1(self.c1(x)))))
        out += x
        return self.act(out)


def test_a_resnet_is_theory_throughout() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        Block(64), Block(64),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    result = propagate(model, torch.randn(8, 1, 8, 8))
    assert not result.unmapped
    wide = math.sqrt(8 / 64)
    for row in result.layers:
        if row.units == 64:
            assert abs(row.q_theory / row.q_measured - 1) < 3.5 * row.q_error / row.q_measured + wide, row
            assert abs(math.log(row.grad_theory / row.grad_measured)) < wide + 0.3, row


def test_norms_over_few_units_and_max_pooling_are_predicted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 200, 3, padding=1), nn.InstanceNorm2d(200), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(200, 200, 3, padding=1), nn.GroupNorm(100, 200), nn.Tanh(), nn.Conv2d(200, 200, 2), nn.Flatten(),
        nn.Linear(200, 50),
    )  # fmt: skip
    result = propagate(model, torch.randn(6, 2, 5, 5))
    assert not result.unmapped
    for row in result.layers:
        if row.units >= 100:
            agrees(row, gradients=False, sampled=math.sqrt(4 / 200))
            assert abs(math.log(row.grad_theory / row.grad_measured)) < 0.4, row


class HandWritten(nn.Module):
    def __init__(self, dim: int = 96, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (
            s.view(b, t, self.heads, d // self.heads).transpose(1, 2) for s in self.qkv(x).split(d, -1)
        )
        weights = F.softmax(3 * q @ k.transpose(-2, -1) / math.sqrt(d // self.heads), -1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, d))


def test_attention_written_by_hand_is_predicted_with_its_finite_heads() -> None:
    torch.manual_seed(0)
    result = propagate(nn.Sequential(nn.Linear(20, 96), HandWritten()), torch.randn(8, 6, 20))
    assert not result.unmapped
    agrees(result.layers[-1], gradients=False, sampled=math.sqrt(3 / 96))


def test_the_result_is_the_same_for_the_same_seed_and_errs_by_its_draws_for_another() -> None:
    model, x = Between(lambda x: x * torch.sigmoid(x)), torch.randn(8, 20)
    one, two = (last_sampled(propagate(model, x, seed=s)) for s in (0, 1))
    assert one == last_sampled(propagate(model, x, seed=0))
    assert one.q_theory != two.q_theory and one.q_theory == pytest.approx(two.q_theory, rel=0.1)


def test_functions_of_the_input_alone_are_left_to_the_measurement() -> None:
    model = nn.Sequential(nn.Tanh(), nn.Linear(20, 100))
    result = propagate(model, torch.randn(8, 20))
    assert [r.source for r in result.layers] == ["measured", "theory"]
