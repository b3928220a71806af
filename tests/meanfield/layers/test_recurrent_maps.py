"""Recurrent layers over their steps: two routes that must agree, and wide networks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bolza.meanfield import Call, Missing, Propagation, moment_map, propagate, resolve_activation
from bolza.meanfield.layers.moments import measure
from bolza.meanfield.layers.recurrent_path import Gate, GatedPath, PlainPath, cell_of
from bolza.models import MinimalRNN, gru

WIDTH, STEPS = 512, 6


class Net(nn.Module):
    """A layer between two linear ones; reads one entry of the tuple that it returns."""

    def __init__(self, layer: nn.Module, out: int, *place: int, time_first: bool = False) -> None:
        super().__init__()
        self.stem, self.layer, self.place = nn.Linear(64, WIDTH), layer, place
        self.head, self.time_first = nn.Linear(out, WIDTH), time_first

    def forward(self, x: Tensor) -> Tensor:
        y: Any = self.stem(x.transpose(0, 1) if self.time_first else x)
        y = self.layer(y)
        for i in self.place:
            y = y[i]
        return self.head(y)


def draw(
    model: nn.Module, recurrent: float = 2.0, into: float = 1.0, bias: float = 0.05, seed: int = 0
) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        variance = bias if p.ndim == 1 else (recurrent if "hh" in name else into) / p.shape[1]
        nn.init.normal_(p, std=math.sqrt(variance), generator=g)
    return model


def sequences(samples: int = 6, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(samples, STEPS, 64, generator=g) + 0.5 * torch.randn(samples, 1, 64, generator=g)


def check(result: Propagation, depth: int = STEPS, sources: set[str] | None = None) -> None:
    """Within 3 standard errors of each layer, plus what finite width has added up: √(depth/width)/2, relative."""
    wide = 0.5 * math.sqrt(depth / WIDTH)
    for row in result.layers:
        assert row.source == "theory", row
        assert abs(row.q_theory / row.q_measured - 1) < 3 * row.q_error / row.q_measured + wide, row
        assert abs(row.c_theory - row.c_measured) < 3 * row.c_error + wide, row
        gap = abs(math.log(row.grad_theory / row.grad_measured))
        assert gap < 3 * row.grad_error / row.grad_measured + 2 * wide, row


@pytest.mark.parametrize(
    ("layer", "out", "place"),
    [
        (nn.RNN(WIDTH, WIDTH, 2, batch_first=True), WIDTH, (0,)),
        (nn.RNN(WIDTH, WIDTH, nonlinearity="relu", batch_first=True), WIDTH, (0,)),
        (nn.GRU(WIDTH, WIDTH, batch_first=True), WIDTH, (0,)),
        (nn.GRU(WIDTH, WIDTH // 2, bidirectional=True, batch_first=True), WIDTH, (0,)),
        (nn.LSTM(WIDTH, WIDTH, batch_first=True), WIDTH, (0,)),
        (nn.LSTM(WIDTH, WIDTH, batch_first=True), WIDTH, (1, 0, 0)),
        (nn.LSTM(WIDTH, WIDTH, 2, batch_first=True), WIDTH, (1, 1, -1)),
        (MinimalRNN(WIDTH, WIDTH, batch_first=True), WIDTH, (0,)),
        (MinimalRNN(WIDTH, WIDTH, batch_first=True), WIDTH, (1,)),
    ],
    ids=["rnn", "rnn-relu", "gru", "gru-both-ways", "lstm", "lstm-h", "lstm-c", "minimal", "minimal-last"],
)
def test_a_wide_recurrent_layer_does_what_theory_says(
    layer: nn.Module, out: int, place: tuple[int, ...]
) -> None:
    result = propagate(draw(Net(layer, out, *place), 1.2 if isinstance(layer, nn.RNN) else 2.0), sequences())
    assert type(layer).__name__ in {row.kind for row in result.layers}
    check(result)


def test_time_may_come_first() -> None:
    net = draw(Net(nn.GRU(WIDTH, WIDTH), WIDTH, 1, -1, time_first=True))
    check(propagate(net, sequences(6)))


class Unrolled(nn.Module):
    def __init__(self, cell: nn.Module, whole: bool = False) -> None:
        super().__init__()
        self.cell, self.head, self.whole = cell, nn.Linear(WIDTH, WIDTH), whole

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.cell, nn.LSTMCell) and self.whole:
            state = self.cell(x[:, 0])
            for t in range(1, STEPS):
                state = self.cell(x[:, t], state)
            return self.head(state[0])
        if isinstance(self.cell, nn.LSTMCell):
            h, c = self.cell(x[:, 0])
            for t in range(1, STEPS):
                h, c = self.cell(x[:, t], (h, c))
            return self.head(h)
        h = self.cell(x[:, 0])
        for t in range(1, STEPS):
            h = self.cell(x[:, t], h)
        return self.head(h)


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell], ids=lambda c: c.__name__)
def test_a_cell_called_step_by_step_keeps_its_weights(cell: Any) -> None:
    net = draw(Unrolled(cell(64, WIDTH)), 1.2 if cell is nn.RNNCell else 2.0)
    rows = propagate(net, sequences(8)).layers
    # torch's cell state has the gradient by way of h too, or not, depending on the device
    memory = [r for r in rows if "no theory of its gradient" in r.note]
    assert len(memory) == (STEPS - 1 if cell is nn.LSTMCell else 0)
    assert all(math.isnan(r.grad_theory) and abs(r.q_theory / r.q_measured - 1) < 0.15 for r in memory)
    rows = tuple(r for r in rows if r not in memory)
    assert [r.kind for r in rows].count(cell.__name__) == STEPS
    check(Propagation(rows, None, 8))  # type: ignore[arg-type]


def test_a_state_that_is_handed_on_as_a_tuple_is_measured() -> None:
    rows = propagate(draw(Unrolled(nn.LSTMCell(64, WIDTH), whole=True)), sequences(8)).layers
    assert [(r.kind, r.source) for r in rows] == [("LSTMCell", "measured"), ("Linear", "theory")]
    assert "as one tuple" in rows[0].note
    assert rows[0].q_theory == pytest.approx(rows[0].q_measured)


@pytest.mark.parametrize("layer", [nn.RNN(20, 64), nn.GRU(20, 64, bidirectional=True), nn.LSTM(20, 64, 2),
                                   MinimalRNN(20, 64)], ids=lambda m: type(m).__name__)  # fmt: skip
def test_a_layer_that_is_the_whole_network_has_rows(layer: nn.Module) -> None:
    rows = propagate(layer, torch.randn(5, 4, 20)).layers
    kind = type(layer).__name__
    entries = 3 if kind == "LSTM" else 2
    assert [(r.name, r.kind, r.source) for r in rows][0] == (kind, kind, "theory")
    assert [r.kind for r in rows] == [kind] * entries


def test_the_state_and_the_memory_of_an_lstm_depend_on_each_other() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(20, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            h, c = self.cell(x)
            return h + c

    rows = propagate(Both(), torch.randn(6, 20)).layers
    assert rows[-1].source == "measured" and "several results" in rows[-1].note
    assert rows[-1].q_theory > 1.3 * (rows[0].q_theory + rows[1].q_theory)  # the product counts


def test_theory_goes_through_a_cell_of_which_only_the_memory_is_used() -> None:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.cell, self.head = (
                nn.Linear(20, WIDTH),
                nn.LSTMCell(WIDTH, WIDTH),
                nn.Linear(WIDTH, 50),
            )

        def forward(self, x: Tensor) -> Tensor:
            h, c = self.cell(self.first(x))
            return self.head(c)

    rows = propagate(Memory(), torch.randn(6, 20)).layers
    assert rows[0].grad_theory == pytest.approx(rows[0].grad_measured, rel=0.2)


def test_the_recurrent_network_of_the_zoo_is_covered_by_theory() -> None:
    rows = propagate(gru(4, 16, 128), torch.randn(8, 64)).layers
    assert [r.kind for r in rows] == ["GRUCell"] * 4 + ["Linear"] and {r.source for r in rows} == {"theory"}


def test_kernels_and_virtual_units_give_a_plain_layer_the_same_moments() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(12, 30, generator=g, dtype=torch.float64)
    x = (a @ a.T / 30).reshape(4, 3, 4, 3)
    gate, act = Gate(1.5, 0.7, 0.1), resolve_activation("tanh")
    plain = PlainPath(gate, act, x)
    drawn = GatedPath(cell_of("rnn", (gate,), act), 3, units=1 << 15).run(x)
    assert torch.allclose(plain.h, drawn.kernel, atol=0.01)
    assert torch.allclose(plain.mean, drawn.mean, atol=1e-9)
    grad = torch.eye(12, dtype=torch.float64).reshape(4, 3, 4, 3)
    for one, other in zip(plain.backward(grad), drawn.backward(grad), strict=True):
        assert torch.allclose(one, other, atol=0.03, rtol=0.05)


def test_a_cell_and_a_layer_with_the_same_weights_give_the_same_theory() -> None:
    layer = draw(nn.LSTM(64, 96, batch_first=True))
    cell = nn.LSTMCell(64, 96)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = sequences(3).double()

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, x: Tensor) -> Tensor:
            h, c = self.cell(x[:, 0])
            for t in range(1, STEPS):
                h, c = self.cell(x[:, t], (h, c))
            return h

    rows = [r for r in propagate(Steps(), x).layers if r.kind == "LSTMCell"]
    step = moment_map(layer, Call("lstm", (measure(x, 2),), (x,), {}, layer.double()(x)[1][0], entry=(1, 0)))
    assert not isinstance(step, Missing)
    last = [r for r in rows if r.q_theory == pytest.approx(step.out.q, rel=0.03)]
    assert last and step.out.c == pytest.approx(last[-1].c_theory, abs=0.03)


def test_the_bias_of_the_forget_gate_lengthens_memory_in_theory_as_in_the_network() -> None:
    net = Net(nn.LSTM(WIDTH, WIDTH, batch_first=True), WIDTH, 1, 0, 0)
    draw(net, 1.0)
    short = propagate(net, sequences()).layers[0].grad_theory
    with torch.no_grad():
        net.layer.bias_ih_l0[WIDTH : 2 * WIDTH] += 3.0
    result = propagate(net, sequences())
    check(result)
    assert result.layers[0].grad_theory > 1.4 * short


def test_a_first_state_counts() -> None:
    class Started(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.GRU(64, WIDTH, batch_first=True), nn.Linear(WIDTH, WIDTH)
            self.first = nn.Parameter(torch.randn(1, 6, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x, self.first)[0])

    net = Started()
    draw(net.layer)
    check(propagate(net, sequences()))


def test_what_no_map_covers_is_said() -> None:
    x = torch.randn(2, 3, 8)
    projected = nn.LSTM(8, 16, proj_size=4, batch_first=True)
    missing = moment_map(
        projected, Call("lstm", (measure(x, 2),), (x,), {}, torch.zeros(2, 3, 4), entry=(0,))
    )
    assert isinstance(missing, Missing) and "projection" in missing.reason


def test_minimal_layer_takes_time_first_a_first_state_and_one_sequence_alone() -> None:
    layer = MinimalRNN(5, 7, gate_bias=2.0)
    x = torch.randn(4, 3, 5)
    out, last = layer(x)
    assert out.shape == (4, 3, 7) and torch.equal(out[-1], last)
    turned = MinimalRNN(5, 7, batch_first=True)
    turned.load_state_dict(layer.state_dict())
    assert torch.allclose(turned(x.transpose(0, 1))[0], out.transpose(0, 1))
    alone, _ = layer(x[:, 0])
    assert torch.allclose(alone, out[:, 0], atol=1e-6)
    again, _ = layer(x[2:], out[1])
    assert torch.allclose(again[-1], last, atol=1e-6)
    assert layer.bias_hh.mean().item() == 2.0  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM, MinimalRNN], ids=lambda c: c.__name__)
def test_over_many_networks_theory_is_not_biased(layer: Any) -> None:
    """Mean ratio of theory to measurement over 6 networks, within 4 of its standard errors and 1 %."""
    ratios = []
    for seed in range(6):
        weight = 1.2 if layer is nn.RNN else 2.0
        net = draw(Net(layer(WIDTH, WIDTH, batch_first=True), WIDTH, 0), weight, seed=seed)
        rows = propagate(net, sequences(seed=100 + seed), seed=seed).layers
        ratios.append([(r.q_theory / r.q_measured, r.grad_theory / r.grad_measured) for r in rows[:2]])
    found = torch.tensor(ratios)
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - 1).abs() < 4 * error + 0.01).all(), (found.mean(0), error)
