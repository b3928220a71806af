"""Recurrent modules as maps of their whole state."""

import math

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError, ShapeError, UnsupportedError
from bolza.stability import lyapunov_exponents
from bolza.stability.recurrent import as_driven_map

F64 = torch.float64
MODULES = {
    "rnn": lambda: nn.RNN(3, 5, num_layers=2),
    "relu": lambda: nn.RNN(3, 5, nonlinearity="relu", batch_first=True),
    "gru": lambda: nn.GRU(3, 5, num_layers=2, batch_first=True),
    "lstm": lambda: nn.LSTM(3, 5, num_layers=2),
    "no bias": lambda: nn.LSTM(3, 5, bias=False),
    "projected": lambda: nn.LSTM(3, 5, num_layers=2, proj_size=2),
    "rnn cell": lambda: nn.RNNCell(3, 5, nonlinearity="relu"),
    "gru cell": lambda: nn.GRUCell(3, 5),
    "lstm cell": lambda: nn.LSTMCell(3, 5),
}


def made(name):
    torch.manual_seed(0)
    return MODULES[name]().double()


@pytest.mark.parametrize("name", MODULES)
def test_the_map_is_the_module(name):
    module = made(name)
    inputs = torch.randn(7, 2, 3, dtype=F64)
    if isinstance(module, nn.RNNCellBase):
        state = None
        for u in inputs:
            state = module(u, state)
        given = inputs
    else:
        given = inputs.transpose(0, 1) if module.batch_first else inputs
        state = module(given)[1]
    driven = as_driven_map(module, None, given)
    moved = driven.state
    for t in range(7):
        moved = driven.step(t, moved, driven.input(t))
    for got, wanted in zip(
        torch.utils._pytree.tree_leaves(driven.module_form(moved)),
        torch.utils._pytree.tree_leaves(state),
        strict=True,
    ):
        assert torch.allclose(got, wanted.detach(), atol=1e-12)


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm", "lstm cell", "gru cell"])
def test_the_sum_of_the_exponents_is_the_mean_log_determinant(name):
    module = made(name)
    inputs = torch.randn(40, 1, 3, dtype=F64)
    given = inputs.transpose(0, 1) if getattr(module, "batch_first", False) else inputs
    driven = as_driven_map(module, None, given)
    state, shapes = driven.state, [part.shape for part in driven.state]
    flat = torch.cat([part.flatten() for part in state])
    logs = []
    for t in range(40):

        def whole(v, t=t):
            parts = [p.reshape(s) for p, s in zip(v.split([s.numel() for s in shapes]), shapes, strict=True)]
            return torch.cat([p.flatten() for p in driven.step(t, tuple(parts), driven.input(t))])

        logs.append(torch.linalg.slogdet(torch.func.jacrev(whole)(flat))[1])
        flat = whole(flat)
    found = lyapunov_exponents(module, inputs=given)
    expected = float(torch.stack(logs).mean())
    assert found.sum.value == pytest.approx(expected, abs=1e-6)


def test_the_derivative_of_the_hidden_state_alone_would_fail_the_sum_rule_and_the_largest_exponent():
    torch.manual_seed(0)
    cell = nn.LSTMCell(3, 12).double()
    with torch.no_grad():
        cell.bias_ih[12:24] = 2.0  # a long memory in the cell state
    inputs = torch.randn(100, 1, 3, dtype=F64)
    truth = lyapunov_exponents(cell, inputs=inputs, warmup=20)

    c = torch.zeros(1, 12, dtype=F64)
    h = torch.zeros(1, 12, dtype=F64)
    frame, sums = torch.eye(12, dtype=F64), torch.zeros(12, dtype=F64)
    for t, u in enumerate(inputs):
        jacobian = torch.func.jacrev(lambda v, u=u, c=c: cell(u, (v, c))[0])(h)[0, :, 0]
        frame, r = torch.linalg.qr(jacobian.detach() @ frame)
        sums += r.diagonal().abs().log() * (t >= 20)
        h, c = (part.detach() for part in cell(u, (h, c)))
    wrong = (sums / 80).sort(descending=True).values
    assert abs(float(wrong[0] - truth.exponents[0])) > 0.3
    assert abs(float(wrong.sum()) - truth.sum.value) > 1.0


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_zero_weight_lstm_remembers_by_its_forget_gate_alone(dtype):
    module = nn.LSTM(3, 16).to(dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        module.bias_ih_l0[16:32] = 1.0
    found = lyapunov_exponents(module, steps=50, warmup=2)
    assert torch.allclose(found.exponents[:16], torch.full((16,), -0.313262, dtype=F64), atol=1e-6)
    assert (found.exponents[16:] == -math.inf).all()
    assert found.lost == 16 * 50 and found.sum.value == -math.inf


def test_dead_units_give_minus_infinity_and_not_nan():
    module = nn.RNN(2, 6, nonlinearity="relu").double()
    with torch.no_grad():
        module.bias_ih_l0[:3] = -50.0  # three units that never fire
        module.bias_ih_l0[3:] = 50.0
        module.weight_hh_l0[3:, 3:] = 0.2 * torch.linalg.qr(torch.randn(3, 3, dtype=F64))[0]
    found = lyapunov_exponents(module, inputs=torch.randn(30, 4, 2, dtype=F64), warmup=3)
    assert torch.allclose(found.exponents[:3], torch.full((3,), math.log(0.2), dtype=F64), atol=1e-9)
    assert (found.exponents[3:] == -math.inf).all()
    assert not found.per_sample.isnan().any()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_largest_exponent_is_the_growth_rate_of_two_nearby_trajectories(kind):
    torch.manual_seed(1)
    module = kind(4, 24).double()
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "weight_hh" in name:
                p.mul_(2.0)
    inputs = torch.randn(500, 1, 4, dtype=F64)
    found = lyapunov_exponents(module, inputs=inputs, k=1, warmup=50)
    width = 48 if kind is nn.LSTM else 24
    delta = torch.randn(width, dtype=F64, generator=torch.Generator().manual_seed(3))
    delta *= 1e-7 / delta.norm()
    driven = as_driven_map(module, None, inputs)
    near = far = driven.state
    growth = 0.0
    for t in range(500):
        pieces = delta.split(24)
        far = tuple(a + d for a, d in zip(near, pieces, strict=True))
        near = driven.step(t, near, driven.input(t))
        far = driven.step(t, far, driven.input(t))
        delta = torch.cat([(b - a).flatten() for a, b in zip(near, far, strict=True)])
        if t >= 50:
            growth += float((delta.norm() / 1e-7).log())
        delta *= 1e-7 / delta.norm()
    assert float(found.exponents) == pytest.approx(growth / 450, abs=0.01)


def test_states_are_taken_and_given_in_the_form_of_the_module():
    lstm = made("lstm")
    inputs = torch.randn(6, 4, 3, dtype=F64)
    h, c = torch.randn(2, 4, 5, dtype=F64), torch.randn(2, 4, 5, dtype=F64)
    found = lyapunov_exponents(lstm, (h, c), inputs=inputs, k=2)
    wanted = lstm(inputs, (h, c))[1]
    assert torch.allclose(found.final_state[0], wanted[0].detach())
    assert torch.allclose(found.final_state[1], wanted[1].detach())
    cell = made("gru cell")
    one = lyapunov_exponents(cell, torch.randn(5, dtype=F64), inputs=inputs[:, 0], k=1)
    assert one.final_state.shape == (1, 5)


def test_dropout_between_layers_is_off():
    torch.manual_seed(0)
    module = nn.GRU(3, 5, num_layers=2, dropout=0.9).double()
    inputs = torch.randn(10, 1, 3, dtype=F64)
    a, b = (lyapunov_exponents(module, inputs=inputs).exponents for _ in range(2))
    assert torch.equal(a, b) and module.training


def test_what_does_not_fit_a_module_is_named():
    with pytest.raises(UnsupportedError, match="bidirectional"):
        lyapunov_exponents(nn.GRU(3, 4, bidirectional=True), inputs=torch.randn(5, 1, 3))
    with pytest.raises(ShapeError, match="sequences of 3"):
        lyapunov_exponents(nn.GRU(3, 4), inputs=torch.randn(5, 1, 2))
    with pytest.raises(ShapeError, match="2 parts|1 parts"):
        lyapunov_exponents(nn.LSTM(3, 4), torch.zeros(1, 1, 4), inputs=torch.randn(5, 1, 3))
    with pytest.raises(ShapeError, match="h of x0"):
        lyapunov_exponents(nn.GRU(3, 4), torch.zeros(2, 1, 4), inputs=torch.randn(5, 1, 3))
    with pytest.raises(ArgumentError, match="steps is None"):
        lyapunov_exponents(nn.GRU(3, 4))


def test_a_subclass_of_a_cell_is_read_as_that_cell():
    class Own(nn.LSTMCell):
        """Nothing new."""

    torch.manual_seed(0)
    cell, inputs = Own(3, 4), torch.randn(8, 2, 3)
    plain = nn.LSTMCell(3, 4)
    plain.load_state_dict(cell.state_dict())
    found = [lyapunov_exponents(one, inputs=inputs).exponents for one in (cell, plain)]
    assert torch.equal(*found) and len(found[0]) == 8


def test_inputs_of_another_dtype_are_named():
    with pytest.raises(ArgumentError, match="inputs is torch.float32, but GRU has weights of torch.float64"):
        lyapunov_exponents(nn.GRU(3, 4).double(), inputs=torch.randn(5, 3))
