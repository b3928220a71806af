import pytest
import torch
from torch import nn

from bolza.core.errors import ShapeError, UnsupportedError
from bolza.stability import contraction_rate

D = torch.float64


def test_a_triangular_map_contracts_in_a_weighted_norm_and_not_in_the_euclidean_one():
    found = contraction_rate(torch.tensor([[0.5, 4.0], [0.0, 0.5]]))
    assert found.unweighted > 4 and found.contracting
    assert found.lower == pytest.approx(0.5) and found.rate < 0.6


def test_a_non_negative_matrix_contracts_at_its_spectral_radius():
    draw = torch.Generator().manual_seed(0)
    w = torch.rand(6, 6, dtype=D, generator=draw) ** 4
    found = contraction_rate(w)
    assert found.rate == pytest.approx(float(torch.linalg.eigvals(w).abs().max()), rel=1e-3)


def test_a_symmetric_matrix_needs_no_weights():
    a = torch.randn(5, 5, dtype=D, generator=torch.Generator().manual_seed(1))
    found = contraction_rate(a + a.T)
    assert found.rate == pytest.approx(float(torch.linalg.matrix_norm(a + a.T, 2)), rel=1e-6)
    assert found.rate == pytest.approx(found.unweighted, rel=1e-6)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_states_of_a_recurrent_layer_come_closer_at_the_certified_rate(nonlinearity):
    torch.manual_seed(0)
    cell = nn.RNNCell(3, 8, nonlinearity=nonlinearity).double()
    with torch.no_grad():
        cell.weight_hh.copy_(torch.triu(0.4 * torch.randn(8, 8)) + 0.3 * torch.eye(8))
    found = contraction_rate(cell)
    layer = nn.RNN(3, 8, nonlinearity=nonlinearity).double()
    layer.weight_hh_l0 = cell.weight_hh
    assert contraction_rate(layer).rate == pytest.approx(found.rate)
    assert found.contracting and found.rate < found.unweighted
    a, b = torch.randn(200, 8, dtype=D), torch.randn(200, 8, dtype=D)
    for _ in range(10):
        u = torch.randn(200, 3, dtype=D)
        before = ((a - b) * found.weights).norm(dim=1)
        a, b = cell(u, a), cell(u, b)
        after = ((a - b) * found.weights).norm(dim=1)
        assert (after <= before * found.rate * (1 + 1e-9) + 1e-15).all()


def test_the_rate_of_a_residual_map_holds_for_pairs_of_states():
    torch.manual_seed(0)

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 9), nn.Linear(9, 4)

        def forward(self, x):
            return 0.5 * x + 0.3 * self.b(torch.tanh(self.a(x)))

    step = Step().double()
    found = contraction_rate(step, torch.zeros(1, 4))
    a, b = torch.randn(500, 4, dtype=D), torch.randn(500, 4, dtype=D)
    ratio = ((step(a) - step(b)) * found.weights).norm(dim=1) / ((a - b) * found.weights).norm(dim=1)
    assert float(ratio.detach().max()) <= found.rate <= found.unweighted
    assert found.overshoot >= 1


def test_what_has_no_rate_is_refused():
    with pytest.raises(UnsupportedError, match="lyapunov_exponents"):
        contraction_rate(nn.GRU(2, 3))
    with pytest.raises(UnsupportedError, match="each layer apart"):
        contraction_rate(nn.RNN(2, 3, num_layers=2))
    with pytest.raises(UnsupportedError, match="max_units"):
        contraction_rate(nn.Linear(4, 4), max_units=2)
    with pytest.raises(ShapeError, match="outputs of the shape of the inputs"):
        contraction_rate(nn.Linear(2, 3))
    with pytest.raises(ShapeError, match="square"):
        contraction_rate(torch.zeros(2, 3))
