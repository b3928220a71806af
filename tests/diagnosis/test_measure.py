"""Signals and gradients by layer agree with what is computed by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bolza.diagnosis.measure import measure
from bolza.diagnosis.problem import prepare
from bolza.diagnosis.propagation import findings, measure_propagation


def by_name(model, data, **options):
    return {row.name: row for row in measure(prepare(model, data, test_fraction=0.0, **options))}


def test_q_c_and_gradient_are_those_of_the_pre_activations():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(7, 4), torch.arange(7) % 3
    h = model[0](x).detach().requires_grad_(True)
    output = model[2](model[1](h))
    losses = cross_entropy(output, y, reduction="none")
    (g,) = torch.autograd.grad(losses.sum(), h)  # row i: gradient of the loss of sample i
    unit = h / h.norm(dim=1, keepdim=True)
    pairs = (unit @ unit.T)[~torch.eye(7, dtype=torch.bool)]
    row = by_name(model, (x, y))["0"]
    assert row.q == pytest.approx(h.square().mean().item(), rel=1e-6)
    assert row.c == pytest.approx(pairs.mean().item(), rel=1e-5)
    assert row.gradient == pytest.approx(g.square().sum(1).mean().sqrt().item(), rel=1e-5)
    squares = g.square().sum(1)
    assert row.gradient_error == pytest.approx(
        (squares.std() / math.sqrt(7) / (2 * squares.mean().sqrt())).item(), rel=1e-4
    )


def test_the_error_of_q_is_the_scatter_over_random_networks():
    x, y = torch.randn(64, 50), torch.arange(64) % 3
    rows = [
        by_name(nn.Sequential(nn.Linear(50, 100), nn.Tanh(), nn.Linear(100, 3)), (x, y))["0"]
        for _ in range(60)
    ]
    scatter = torch.tensor([row.q for row in rows]).std().item()
    claimed = torch.tensor([row.q_error for row in rows]).mean().item()
    # the units share one batch but have independent weights: the claim is right to its own sampling error
    assert abs(claimed / scatter - 1) < 4 / math.sqrt(2 * 60)


def test_an_in_place_activation_does_not_hide_the_pre_activation():
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    inplace = nn.Sequential(plain[0], nn.ReLU(inplace=True), plain[2])
    data = (torch.randn(7, 4), torch.arange(7) % 3)
    a, b = by_name(plain, data), by_name(inplace, data)
    assert a["0"].q == b["0"].q and a["0"].gradient == b["0"].gradient


def test_a_gradient_below_the_square_root_of_the_smallest_number_is_still_measured():
    layers = [nn.Linear(8, 8, bias=False) for _ in range(60)]
    for layer in layers:
        nn.init.eye_(layer.weight)
        layer.weight.data *= 0.3
    model = nn.Sequential(*layers)
    rows = measure(prepare(model, (torch.randn(5, 8), torch.arange(5)), test_fraction=0.0))
    assert rows[0].gradient / rows[-1].gradient == pytest.approx(0.3**59, rel=1e-4)


def test_layers_that_are_called_twice_or_are_no_chain_are_measured_too():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.GRUCell(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            h = x.new_zeros(len(x), 5)
            for t in range(x.shape[1]):
                h = self.cell(x[:, t], h)
            return self.head(h)

    rows = by_name(Recurrent(), (torch.randn(6, 3, 3), torch.arange(6) % 2))
    assert list(rows) == ["cell", "cell#2", "cell#3", "head"]
    assert all(row.gradient > 0 for row in rows.values())


def test_a_container_with_weights_of_its_own_does_not_count_as_a_layer():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.place = nn.Parameter(torch.randn(5, 8))
            self.embed, self.head = nn.Embedding(7, 8), nn.Linear(8, 7)

        def forward(self, tokens):
            return self.head(self.embed(tokens) + self.place)

    tokens = torch.randint(7, (6, 5))
    rows = by_name(Tokens(), (tokens, tokens.roll(-1, 1)))
    assert list(rows) == ["embed", "head"]
    assert rows["head"].units == 7


def test_convolutions_have_their_channels_as_units():
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3))
    rows = by_name(model, (torch.randn(5, 1, 8, 8), torch.arange(5) % 3))
    assert rows["0"].units == 6 and rows["3"].units == 3


class Reader(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 96, batch_first=batch_first), nn.Linear(96, 2)

    def forward(self, x):
        return self.head(self.rnn(x if self.rnn.batch_first else x.movedim(1, 0))[1][0][-1])


def test_a_recurrent_module_of_which_only_the_last_state_is_read_has_its_gradient_measured_there():
    model, x = Reader(), torch.randn(6, 3, 8)
    row = by_name(model, (x, torch.arange(6) % 2))["rnn"]
    h = model.rnn(x)[1][0][-1]
    assert row.of_state
    assert row.q == pytest.approx(float(h.detach().square().mean()), rel=1e-5)
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(model.head(h), torch.arange(6) % 2) * 6, h)
    assert row.gradient == pytest.approx(float(g.square().sum(1).mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_gradient_at_each_step_of_a_recurrent_module_is_that_of_autograd(batch_first):
    model, x = Reader(batch_first=batch_first).double(), torch.randn(6, 4, 8, dtype=torch.float64)
    y = torch.arange(6) % 2
    row = by_name(model, (x, y))["rnn"]
    x.requires_grad_()
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), x)
    assert row.steps == pytest.approx(g.square().sum((0, 2)).sqrt().tolist(), rel=1e-5)


def test_calls_of_a_cell_have_the_names_that_the_theory_gives_them():
    class Looped(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.GRUCell(3, 32), nn.Linear(32, 2)

        def forward(self, x):
            h = x.new_zeros(len(x), 32)
            for t in range(3):
                h = self.cell(x[:, t], h)
            return self.head(h)

    facts = measure_propagation(prepare(Looped(), (torch.randn(6, 3, 3), torch.arange(6) % 2)))
    assert [row["source"] for row in facts.layers] == ["theory"] * 4


def test_a_recurrent_module_that_forgets_its_first_steps_is_found():
    problem = prepare(Reader(), (torch.randn(8, 60, 8), torch.arange(8) % 2))
    found = {f.key: f for f in findings(measure_propagation(problem))}["propagation.time_ratio"]
    assert found.verdict == "bad" and found.value < 1e-3
    assert "gate" in found.remedy
