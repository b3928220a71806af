"""Gradients of outputs: what is kept, what is trusted, and what the products cost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bolza.ops import stacks
from bolza.ops.factors import surely_alone
from bolza.ops.output_gradients import OutputGradients
from bolza.ops.persample import Dense, Lookup, Outer

DOUBLE = torch.float64


def blocks(kind: str, n: int, outputs: int, draw: torch.Generator):
    """One block an output, with what entered in common."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=DOUBLE, generator=draw)

    if kind == "vectors":
        x = normal(n, 1, 5)
        return [Outer(x, normal(n, 1, 4)) for _ in range(outputs)]
    if kind == "sequences":
        x = normal(n, 2, 5)
        return [Outer(x, normal(n, 2, 4)) for _ in range(outputs)]
    if kind == "table":
        index = torch.randint(0, 6, (n, 3), generator=draw)
        return [Lookup(index, normal(n, 3, 4), 6) for _ in range(outputs)]
    return [Dense(normal(n, 7)) for _ in range(outputs)]


@pytest.mark.parametrize("mode", ["trace", "each", "full"])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("kind", ["vectors", "sequences", "table", "explicit"])
def test_products_of_factors_are_those_of_the_gradients(kind, outputs, mode):
    draw = torch.Generator().manual_seed(0)
    a, b = blocks(kind, 6, outputs, draw), blocks(kind, 4, outputs, draw)
    left, right = (torch.stack([block.dense() for block in part], 1) for part in (a, b))
    full = torch.einsum("iad,jbd->ijab", left, right)
    each = full.diagonal(dim1=2, dim2=3)
    truth = {"full": full, "each": each, "trace": each.sum(-1)}[mode]
    first, second = stacks.stacked(a, {}), stacks.stacked(b, {})
    routes = [lambda total: stacks.add_products(total, {"p": first}, {"p": second}, mode, {"p": 2.0})]
    if isinstance(first, stacks.Factors) and isinstance(second, stacks.Factors):
        routes.append(lambda total: stacks._add_factored(total, first, second, mode, 2.0))
        formed = stacks._form(first), stacks._form(second)
        routes.append(lambda total: stacks._add_explicit(total, *formed, mode, 2.0))
    for route in routes:
        total = torch.ones_like(truth)
        route(total)
        torch.testing.assert_close(total, 1 + 2 * truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("room", [1, 40])
def test_small_room_for_temporaries_changes_nothing(room, monkeypatch):
    draw = torch.Generator().manual_seed(1)
    a, b = (stacks.stacked(blocks("sequences", n, 2, draw), {}) for n in (6, 5))
    whole, pieces = torch.zeros(6, 5, 2, dtype=DOUBLE), torch.zeros(6, 5, 2, dtype=DOUBLE)
    for total, size in ((whole, 2**24), (pieces, room)):
        monkeypatch.setattr(stacks, "_ROOM", size)
        stacks._add_factored(total, a, b, "each", 1.0)
        stacks._add_explicit(total, stacks._form(a), stacks._form(b), "each", 1.0)
    torch.testing.assert_close(whole, pieces, rtol=1e-12, atol=1e-12)


def test_weight_and_bias_share_the_product_of_their_signals(monkeypatch):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    calls = []
    weave = stacks._weave
    monkeypatch.setattr(stacks, "_weave", lambda *args: calls.append(1) or weave(*args))
    x = torch.randn(5, 3)
    OutputGradients(net, [x]).kernel(x)
    assert len(calls) == 2  # one a layer


class Grows(nn.Module):
    """The number of uses of the layer depends on the batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        x = torch.tanh(self.layer(x))
        return torch.tanh(self.layer(x)) if bool(x.sum() > 0) else x


def test_a_path_that_depends_on_the_values_is_followed_for_each_sample():
    torch.manual_seed(0)
    net, x = Grows().double(), torch.randn(12, 3, dtype=DOUBLE)
    rows = []
    for i in range(12):
        f = net(x[i : i + 1])[0]
        found = [torch.autograd.grad(v, list(net.parameters()), retain_graph=True) for v in f]
        rows.append(torch.stack([torch.cat([g.flatten() for g in gs]) for gs in found]))
    j = torch.stack(rows)
    truth = torch.einsum("iad,jad->ij", j, j)
    for chunk in (None, 5, 1):
        found = OutputGradients(net, [x], chunk=chunk).kernel(x, mode="trace")
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)


def test_only_chains_of_plain_layers_are_taken_without_comparison():
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    assert surely_alone(plain)
    assert surely_alone(nn.Sequential(nn.Unflatten(1, (1, 4, 4)), plain, nn.LayerNorm(2)))
    assert not surely_alone(nn.Sequential(nn.Unflatten(0, (2, 2)), nn.Linear(2, 2)))
    assert not surely_alone(nn.Sequential(nn.Flatten(0), nn.Linear(8, 2)))
    assert not surely_alone(nn.Sequential(nn.LayerNorm((5, 2)), nn.Linear(2, 2)))
    assert not surely_alone(nn.Sequential(nn.Linear(2, 2), nn.Softmax(0)))
    assert not surely_alone(nn.Sequential(Grows()))
    hooked = nn.Sequential(nn.Linear(2, 2))
    hooked[0].register_forward_hook(lambda layer, args, out: out.mean(0, keepdim=True).expand_as(out))
    assert not surely_alone(hooked)


def test_values_are_the_outputs_in_evaluation_mode():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2), nn.Unflatten(1, (2, 1)))
    x = torch.randn(7, 3)
    found = OutputGradients(net, [x], chunk=3).values(x)
    assert net.training
    torch.testing.assert_close(found, net.eval()(x).flatten(1))
    assert not found.requires_grad


def test_parts_beyond_the_memory_are_made_again_and_the_result_is_the_same():
    net = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 2)).double()
    x = torch.randn(30, 3, dtype=DOUBLE)
    truth = OutputGradients(net, [x]).kernel(x, mode="full")
    for memory, made in ((2**30, 6), (1000, 21)):
        gradients = OutputGradients(net, [x], chunk=5, memory=memory)
        parts, inner = [], gradients._part
        gradients._part = lambda part, parts=parts, inner=inner: parts.append(1) or inner(part)
        torch.testing.assert_close(gradients.kernel(x, mode="full"), truth, rtol=1e-12, atol=1e-12)
        assert len(parts) == made  # each once, or once more for every pair
