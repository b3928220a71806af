import pytest
import torch

from bolza.core.errors import ArgumentError
from bolza.meanfield.critical import critical_line, critical_weight_var
from bolza.meanfield.fixed_point import fixed_point


def test_tanh_line_by_variance_to_every_printed_digit() -> None:
    q = torch.tensor([0.0, 0.05, 0.10, 0.25, 0.50, 1.00, 2.00], dtype=torch.float64)
    line = critical_line("tanh", q=q)
    weights = [1, 1.093627, 1.177569, 1.393962, 1.687975, 2.153303, 2.861162]
    biases = [0, 1.28297e-4, 8.32280e-4, 8.12515e-3, 3.80412e-2, 0.150965, 0.512265]
    assert line.weight_var.tolist() == pytest.approx(weights, abs=5e-7)
    assert line.bias_var.tolist() == pytest.approx(biases, rel=5e-6, abs=1e-15)


def test_tanh_line_by_bias_to_every_printed_digit() -> None:
    bias = torch.tensor([1e-4, 0.01, 0.05, 0.10, 0.20, 0.25], dtype=torch.float64)
    line = critical_line("tanh", bias_var=bias)
    assert line.weight_var.tolist() == pytest.approx(
        [1.086026, 1.424205, 1.760955, 1.986073, 2.285152, 2.401489], abs=5e-7
    )
    assert line.q.tolist() == pytest.approx(
        [0.045709, 0.273301, 0.570048, 0.805799, 1.164496, 1.317939], abs=5e-7
    )


def test_the_published_cnn_setting_is_on_the_line() -> None:
    line = critical_line("tanh", bias_var=2.01e-5)
    assert float(line.weight_var) == pytest.approx(1.05, abs=5e-6)
    assert float(line.q) == pytest.approx(0.025919, abs=5e-7)


def test_erf_line_in_closed_form() -> None:
    line = critical_line("erf", q=torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert line.weight_var.tolist() == pytest.approx([torch.pi / 4, 1.360350, 1.756204], abs=5e-7)
    assert line.bias_var.tolist() == pytest.approx([0, 0.0465502, 0.184140], abs=5e-7)


@pytest.mark.parametrize("name", ["tanh", "erf", "hardtanh", "softsign", "elu", "selu"])
def test_on_the_line_the_slope_is_one_at_the_networks_own_fixed_point(name: str) -> None:
    weight = critical_weight_var(name, 0.03)
    assert float(fixed_point(name, weight, 0.03).chi_1) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "weight"), [("relu", 2.0), ("linear", 1.0), ("leakyrelu", 2 / 1.0001), ("tanh", 1.0)]
)
def test_without_bias_the_critical_variance_is_the_known_one(name: str, weight: float) -> None:
    assert float(critical_weight_var(name)) == pytest.approx(weight, rel=1e-12)


def test_no_critical_point_is_said_so() -> None:
    with pytest.raises(ArgumentError, match="relu has no critical point with bias_var = 0.05"):
        critical_weight_var("relu", 0.05)
    with pytest.raises(ArgumentError, match="gelu has no critical point"):
        critical_weight_var("gelu", 0.0)
    with pytest.raises(ArgumentError, match="either q or bias_var"):
        critical_line("tanh")
    with pytest.raises(ArgumentError, match="bias_var is"):
        critical_weight_var("tanh", -0.1)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("selu", 2 / (1.0507009873554805**2 * (1 + 1.6732632423543772**2))),
        ("relu6", 2.0),
        (torch.abs, 1.0),
        (lambda x: x.clamp(min=0), 2.0),
        (lambda x: torch.where(x > 0, x, 0.2 * x), 2 / 1.04),
        (lambda x: torch.relu(x) + 0.1 * torch.tanh(x), 2 / (1.1**2 + 0.1**2)),
    ],
)
def test_a_kink_at_zero_counts_with_both_its_sides(activation, expected) -> None:
    # without bias q* = 0, where E φ'² → (φ'(0−)² + φ'(0+)²)/2, whatever autograd says at 0
    weight = critical_weight_var(activation, 0.0)
    assert float(weight) == pytest.approx(expected, rel=1e-7)
    assert fixed_point(activation, 0.99 * weight, 0.0).regime == "ordered"
    assert fixed_point(activation, 1.01 * weight, 0.0).regime == "chaotic"
