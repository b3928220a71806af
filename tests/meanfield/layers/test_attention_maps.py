"""Attention: cases in closed form, and wide transformers of torch."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bolza.meanfield import Call, Missing, Step, moment_map, propagate
from bolza.meanfield.layers.attention_maps import attention_step
from bolza.meanfield.layers.moments import measure

WIDTH, HEADS, LENGTH = 512, 64, 6


def sequences(samples: int = 4, units: int = 64) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(samples, LENGTH, units, generator=g) + 0.5 * torch.randn(
        samples, 1, units, generator=g
    )


def sharp(model: nn.Module, spread: float = 2.0, seed: int = 0) -> nn.Module:
    """Gaussian weights, and queries and keys large enough for attention to choose."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            nn.init.normal_(
                p, std=(spread if "in_proj" in name else 1.0) / math.sqrt(p.shape[1]), generator=g
            )
    return model


def uniform(layer: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """Queries of zero: every position is looked at alike."""
    with torch.no_grad():
        layer.in_proj_weight[: layer.embed_dim] = 0
    return layer


def strengths(layer: nn.MultiheadAttention) -> tuple[float, float]:
    """σ_v² and σ_o²."""
    values = layer.in_proj_weight[2 * layer.embed_dim :]
    return tuple(WIDTH_OF(w) for w in (values, layer.out_proj.weight))  # type: ignore[return-value]


def WIDTH_OF(w: Tensor) -> float:  # noqa: N802
    return w.shape[1] * float(w.detach().double().square().mean())


def test_blind_attention_is_the_mean_over_positions() -> None:
    layer = uniform(nn.MultiheadAttention(64, 8, batch_first=True))
    x = sequences()
    m = measure(x, 2)
    step = attention_step(layer, [m] * 3)
    assert isinstance(step, Step)
    into, out = strengths(layer)
    mean = torch.block_diag(*[torch.full((LENGTH, LENGTH), 1 / LENGTH, dtype=torch.float64)] * 4)
    assert torch.allclose(step.out.kernel[0], into * out * mean @ m.kernel[0] @ mean.T, atol=1e-9)
    g = torch.eye(4 * LENGTH, dtype=torch.float64)[None]
    queries, keys, values = step.backward(g)
    assert values is not None and keys is not None
    assert torch.allclose(values[0], into * out * mean.T @ mean, atol=1e-9)
    assert float(keys.abs().max()) == 0  # dL/dk = q dL/dlogit


def test_behind_a_causal_mask_the_first_position_sees_itself_alone() -> None:
    layer = nn.MultiheadAttention(64, 8, batch_first=True)
    m = measure(sequences(), 2)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    step = attention_step(layer, [m] * 3, mask)
    assert isinstance(step, Step)
    into, out = strengths(layer)
    first = torch.arange(0, 4 * LENGTH, LENGTH)
    assert torch.allclose(
        step.out.kernel[0][first][:, first], into * out * m.kernel[0][first][:, first], atol=1e-9
    )
    additive = torch.zeros(LENGTH, LENGTH).masked_fill(mask, -torch.inf)
    same = attention_step(layer, [m] * 3, additive)
    assert isinstance(same, Step) and torch.equal(same.out.kernel, step.out.kernel)


def test_padding_is_not_looked_at_and_a_position_that_sees_nothing_is_named() -> None:
    layer = uniform(nn.MultiheadAttention(64, 8, batch_first=True))
    m = measure(sequences(), 2)
    padding = torch.zeros(4, LENGTH, dtype=torch.bool)
    padding[:, 1:] = True
    step = attention_step(layer, [m] * 3, padding=padding)
    assert isinstance(step, Step)
    into, out = strengths(layer)
    assert torch.allclose(
        step.out.variances[0, :LENGTH], into * out * m.variances[0, 0].expand(LENGTH), atol=1e-9
    )
    missing = attention_step(layer, [m] * 3, padding=~padding | True)
    assert isinstance(missing, Missing) and "sees nothing" in missing.reason


def test_time_may_come_first() -> None:
    layer = nn.MultiheadAttention(64, 8, batch_first=True)
    turned = nn.MultiheadAttention(64, 8)
    turned.load_state_dict(layer.state_dict())
    x = sequences()
    one = attention_step(layer, [measure(x, 2)] * 3)
    two = attention_step(turned, [measure(x.transpose(0, 1), 2)] * 3)
    assert isinstance(one, Step) and isinstance(two, Step)
    at = torch.arange(4 * LENGTH).reshape(4, LENGTH).T.reshape(-1)
    assert torch.allclose(two.out.kernel[0], one.out.kernel[0][at][:, at])


class Stem(nn.Module):
    def __init__(self, body: nn.Module, call: Any) -> None:
        super().__init__()
        self.stem, self.other = nn.Linear(64, WIDTH), nn.Linear(64, WIDTH)
        self.body, self.head, self.call = body, nn.Linear(WIDTH, WIDTH), call

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self.body, self.stem(x), self.other(x.flip(1))))


def self_attention(layer: Any, x: Tensor, other: Tensor) -> Tensor:
    return layer(x, x, x, need_weights=False)[0]


def cross_attention(layer: Any, x: Tensor, other: Tensor) -> Tensor:
    return layer(x, other, other)[0]


def alone(layer: Any, x: Tensor, other: Tensor) -> Tensor:
    return layer(x)


def both(layer: Any, x: Tensor, other: Tensor) -> Tensor:
    return layer(x, other)


def encoder(first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 1024, 0.1, "gelu", batch_first=True, norm_first=first)


def decoder(first: bool) -> nn.Module:
    return nn.TransformerDecoderLayer(WIDTH, HEADS, 1024, 0.0, batch_first=True, norm_first=first)


@pytest.mark.parametrize(
    ("body", "call"),
    [
        (nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), self_attention),
        (nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), cross_attention),
        (encoder(True), alone),
        (encoder(False).eval(), alone),
        (decoder(True), both),
        (decoder(False), both),
    ],
    ids=["self", "cross", "encoder-pre", "encoder-post-eval", "decoder-pre", "decoder-post"],
)
def test_wide_attention_does_what_theory_says(body: nn.Module, call: Any) -> None:
    """Within 3 standard errors, and what the spread between 64 heads and finite width add: 1/√64 for gradients."""
    model = sharp(Stem(body, call))
    model.train(body.training)
    rows = propagate(model, sequences()).layers
    assert type(body).__name__ in {r.kind for r in rows}
    for row in rows:
        assert row.source == "theory", row
        assert abs(row.q_theory / row.q_measured - 1) < 3 * row.q_error / row.q_measured + 0.06, row
        assert abs(row.c_theory - row.c_measured) < 3 * row.c_error + 0.03, row
        gap = abs(math.log(row.grad_theory / row.grad_measured))
        assert gap < 3 * row.grad_error / row.grad_measured + 1 / math.sqrt(HEADS), row


def test_extra_keys_are_left_to_measurement() -> None:
    layer = nn.MultiheadAttention(16, 2, add_zero_attn=True, batch_first=True)
    x = sequences(2, 16)
    call = Call("a", (measure(x, 2),), (x, x, x), {}, x, entry=(0,))
    missing = moment_map(layer, call)
    assert isinstance(missing, Missing) and "extra keys" in missing.reason
