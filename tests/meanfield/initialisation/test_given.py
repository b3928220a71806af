"""What is given to critical initialisation: networks and examples that are odd, or no good."""

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError
from bolza.meanfield import critical_init_


def test_what_is_no_network_of_real_numbers_is_named():
    x = torch.randn(4, 8)
    with pytest.raises(ArgumentError, match="model is a str"):
        critical_init_("net", x)
    with pytest.raises(ArgumentError, match="0.weight is complex"):
        critical_init_(nn.Sequential(nn.Linear(8, 8, dtype=torch.complex64)))
    with pytest.raises(ArgumentError, match="0.weight is on the meta device"):
        critical_init_(nn.Sequential(nn.Linear(8, 8, device="meta")), x)
    with pytest.raises(ArgumentError, match="at least one sample"):
        critical_init_(nn.Sequential(nn.Linear(8, 8)), x[:0])
    with pytest.raises(ArgumentError, match="q is 0"):
        critical_init_(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)), x, q=0.0)


def test_a_compiled_network_is_initialised_as_what_it_wraps():
    def made(compiled):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
        wrapped = torch.compile(net, backend="eager") if compiled else net
        record = critical_init_(wrapped, torch.ones(4, 8), generator=torch.Generator().manual_seed(1))
        return net[0].weight, [row.name for row in record.layers]

    (plain, names), (wrapped, same) = made(False), made(True)
    assert torch.equal(plain, wrapped) and names == same == ["0", "2"]


def test_a_signal_that_is_not_finite_corrects_nothing_and_is_told():
    class Broken(nn.Module):
        """The logarithm of negative numbers."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.b((self.a(x) - 100).log())

    record = critical_init_(Broken(), torch.randn(4, 8), correct="all")
    rows = {row.name: row for row in record.layers}
    assert "not corrected" in rows["b"].reason and rows["b"].sigma_w2 == pytest.approx(1.0)
