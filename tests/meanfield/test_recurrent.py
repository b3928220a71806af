"""Fixed points of recurrent networks: closed forms, known values, and simulated wide networks."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bolza.core.errors import ArgumentError
from bolza.meanfield import fixed_point, recurrent_fixed_point


def simulated(cell: str, weight: float, into: float, keep: float, power: float, width: int = 300) -> float:
    """Growth of the variance of a small difference per step in one network, with the same weights at each step."""
    g = torch.Generator().manual_seed(1)
    count = {"minimal": 1, "gru": 3, "lstm": 4}[cell]

    def draw(variance: float) -> Tensor:
        w = torch.randn(count * width, width, generator=g, dtype=torch.float64)
        return w * math.sqrt(variance / width)

    w, v = draw(weight), draw(into)

    def step(s: Tensor, x: Tensor) -> Tensor:
        h = s[:, :width]
        a, b = h @ w.T, x @ v.T
        if cell == "minimal":
            u = torch.sigmoid(a + b + keep)
            return u * h + (1 - u) * x
        if cell == "gru":
            r, z = torch.sigmoid(a + b)[:, :width], torch.sigmoid((a + b)[:, width : 2 * width] + keep)
            return z * h + (1 - z) * torch.tanh(b[:, 2 * width :] + r * a[:, 2 * width :])
        i, f, n, o = (a + b).chunk(4, 1)
        c = torch.sigmoid(f + keep) * s[:, width:] + torch.sigmoid(i) * n.tanh()
        return torch.cat([torch.sigmoid(o) * c.tanh(), c], 1)

    s = torch.zeros(2, width * (2 if cell == "lstm" else 1), dtype=torch.float64)
    d, logs = torch.randn(s.shape, generator=g, dtype=torch.float64), []
    for t in range(60):
        x = torch.randn(2, width, generator=g, dtype=torch.float64) * math.sqrt(power)
        map_x: Callable[[Tensor], Tensor] = lambda state, x=x: step(state, x)  # type: ignore[misc]  # noqa: E731
        s, d = torch.func.jvp(map_x, (s,), (d,))
        size = d.square().sum(1)
        d = d / size.sqrt()[:, None]
        if t >= 20:
            logs.append(size.log())
    return math.exp(float(torch.stack(logs).mean()))


@pytest.mark.parametrize(
    ("point", "chi"),
    [((1, 1, 0, 1), 0.3645), ((4, 1, 2, 1), 0.798), ((6, 0.1, 4, 1), 0.964), ((20, 1, 0, 1), 0.966)],
)
def test_the_minimal_cell_has_the_known_rates_and_wide_networks_have_them_within_five_percent(
    point: tuple[float, float, float, float], chi: float
) -> None:
    weight, into, keep, power = point
    found = float(recurrent_fixed_point("minimal", weight, into, 0.0, keep, power).chi)
    assert found == pytest.approx(chi, abs=6e-4)
    assert found == pytest.approx(simulated("minimal", weight, into, keep, power), rel=0.05)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("point", [(1, 1, 0, 1), (4, 1, 2, 1)])
def test_gated_cells_decay_as_wide_networks_do(cell: str, point: tuple[float, float, float, float]) -> None:
    weight, into, keep, power = point
    if cell == "lstm":
        keep = keep / 2  # at 2 the LSTM is chaotic
    found = float(recurrent_fixed_point(cell, weight, into, 0.0, keep, power).chi)
    assert found == pytest.approx(simulated(cell, weight, into, keep, power), rel=0.08)


def test_a_cell_without_recurrent_weights_forgets_by_its_gate_alone() -> None:
    """Then χ = E u² of the gate that keeps the state."""
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    keep = float((torch.sigmoid(1 + math.sqrt(0.7) * z) ** 2 * density).sum())
    for cell in ("minimal", "gru", "lstm"):
        point = recurrent_fixed_point(cell, 0.0, 0.5, 0.2, gate_bias=1.0)
        assert float(point.chi) == pytest.approx(keep, rel=1e-8), cell
    assert float(recurrent_fixed_point("rnn", 0.0, 0.5).chi) == 0.0


def test_a_silent_gru_grows_with_the_spectral_radius_of_its_linear_part() -> None:
    """Without input h' = z h + (1-z)/2 W h: eigenvalues fill a disk around z."""
    keep = 1 / (1 + math.exp(-1.5))
    chi = float(recurrent_fixed_point("gru", 1.3, 0.0, gate_bias=1.5, input_q=0.0).chi)
    assert chi == pytest.approx((keep + (1 - keep) / 2 * math.sqrt(1.3)) ** 2, rel=1e-6)
    w = torch.randn(500, 500, generator=torch.Generator().manual_seed(0)) * math.sqrt(1.3 / 500)
    radius = float(torch.linalg.eigvals(keep * torch.eye(500) + (1 - keep) / 2 * w).abs().max())
    assert chi == pytest.approx(radius**2, rel=0.02)


def test_a_plain_cell_is_a_deep_network_whose_biases_are_its_inputs() -> None:
    weight = torch.tensor([0.8, 1.5, 3.0])
    point, deep = (
        recurrent_fixed_point("rnn", weight, 0.5, 0.01, input_q=0.2),
        fixed_point("tanh", weight, 0.11),
    )
    assert torch.equal(point.chi, deep.chi_1) and torch.equal(point.variance, deep.q)
    assert point.regime.tolist() == ["ordered", "ordered", "chaotic"]
    expected = (deep.q - 0.11) / weight
    assert torch.allclose(point.q, expected.double(), rtol=1e-9)


def test_a_biased_gate_makes_criticality_a_region_where_a_plain_cell_has_a_line() -> None:
    weight = torch.linspace(0.1, 6, 40)
    gated = recurrent_fixed_point("minimal", weight, 0.1, gate_bias=5.0).chi
    plain = recurrent_fixed_point("rnn", weight, 0.1).chi
    assert ((gated > 0.95) & (gated < 1.05)).all()
    assert ((plain > 0.95) & (plain < 1.05)).sum() < 5


def test_one_call_is_a_phase_diagram() -> None:
    weight, bias = torch.linspace(0.5, 9, 3)[:, None], torch.tensor([-1.0, 3.0])
    for cell in ("minimal", "gru", "lstm"):
        point = recurrent_fixed_point(cell, weight, gate_bias=bias)
        assert point.chi.shape == point.q.shape == point.regime.shape == (3, 2)
        assert torch.isfinite(point.chi).all() and (point.q > 0).all()
        one = recurrent_fixed_point(cell, 0.5, gate_bias=-1.0)
        assert float(point.chi[0, 0]) == pytest.approx(float(one.chi), rel=1e-9)
        assert isinstance(one.regime, str)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match="cell='tree'"):
        recurrent_fixed_point("tree", 1.0)
    with pytest.raises(ArgumentError, match="weight_var is -1"):
        recurrent_fixed_point("gru", -1.0)
    with pytest.raises(ArgumentError, match="do not broadcast"):
        recurrent_fixed_point("gru", torch.ones(2), torch.ones(3))
