import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError
from bolza.meanfield import critical_init_, critical_line, propagate


class Erf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(x)


def mlp(depth: int, width: int, activation: Any) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(20, width), activation()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def conv(depth: int, width: int, activation: Any) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), activation()]
    for _ in range(depth - 2):
        layers += [nn.Conv2d(width, width, 3, padding=1), activation()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 16, 10))


def gradient_ratio(model: nn.Module, x: Tensor) -> float:
    """Norm of the gradient at the first hidden layer over that at the last one."""
    rows = [r for r in propagate(model, x, max_samples=4).layers if not math.isnan(r.sigma_w2)]
    return math.sqrt(rows[0].grad_measured / rows[-2].grad_measured)


@pytest.mark.parametrize("scheme", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("activation", [nn.Tanh, Erf, nn.ReLU], ids=lambda a: a.__name__)
def test_a_hundred_layers_keep_their_gradient(activation: Any, scheme: Any) -> None:
    """Within a factor 3 in norm; the log of it fluctuates by √(5 depth/width)/2 for Gaussian ReLU: 0.65."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(16, 20, generator=g)
    width = 300 if activation is nn.ReLU else 100
    model = mlp(100, width, activation)
    critical_init_(model, x, scheme=scheme, generator=g)
    result = propagate(model, x, max_samples=4)
    assert 1 / 3 < gradient_ratio(model, x) < 3
    assert abs(result.phase.chi_1_measured - 1) < 3 / math.sqrt(width)
    assert result.phase.phase == "critical"


@pytest.mark.parametrize("scheme", ["gaussian", "orthogonal", "delta_orthogonal"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU], ids=lambda a: a.__name__)
def test_deep_convolutions_keep_their_gradient(activation: Any, scheme: Any) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(8, 1, 4, 4, generator=g)
    model = conv(30, 40, activation)
    critical_init_(model, x, scheme=scheme, generator=g)
    assert 1 / 3 < gradient_ratio(model, x) < 3


def test_the_drawn_weights_have_the_recorded_variances() -> None:
    model = mlp(6, 300, nn.Tanh)
    record = critical_init_(model, scheme="gaussian", bias_var=0.05)
    line = critical_line("tanh", bias_var=0.05)
    for row in record.layers[1:-1]:
        layer = model.get_submodule(row.name)
        assert row.sigma_w2 == pytest.approx(float(line.weight_var)) and row.sigma_b2 == pytest.approx(0.05)
        measured = float(300 * layer.weight.detach().square().mean())  # type: ignore[operator, union-attr]
        assert measured == pytest.approx(row.sigma_w2, rel=4 * math.sqrt(2 / 300**2))
    assert record.found_by == "the order of its modules" and "1.76" in str(record)


def test_orthogonal_weights_have_equal_singular_values_in_any_shape() -> None:
    model = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 10))
    critical_init_(model)
    for layer, (_, columns) in zip(model[::2], ((50, 20), (50, 50), (10, 50)), strict=True):
        values = torch.linalg.svdvals(layer.weight.detach())  # type: ignore[arg-type]
        assert torch.allclose(values, values[0].expand_as(values), rtol=1e-5)
        assert columns * float(layer.weight.detach().square().mean()) == pytest.approx(
            1 if columns == 20 else 2
        )  # type: ignore[operator, union-attr]


def test_delta_orthogonal_kernels_act_at_their_centre_only() -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv1d(8, 8, 5, padding=2, groups=2), nn.Tanh(),
                          nn.Conv1d(8, 8, 2, stride=2))  # fmt: skip
    critical_init_(model, torch.randn(3, 4, 8), scheme="delta_orthogonal")
    assert (model[0].weight[..., [0, 2]] == 0).all() and (model[2].weight[..., [0, 1, 3, 4]] == 0).all()  # type: ignore[index]
    assert (model[4].weight != 0).all()  # strided: all taps


def test_the_first_layer_takes_the_scale_of_the_data() -> None:
    x = 30 * torch.randn(200, 20)
    model = mlp(10, 100, nn.Tanh)
    critical_init_(model, x, q=0.3)
    assert float(model[0](x).detach().square().mean()) == pytest.approx(0.3, rel=0.02)


def test_residual_branches_share_one_unit_of_gradient() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(100, 100), nn.Linear(100, 100)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(F.relu(self.a(x)))

    model = nn.Sequential(nn.Linear(20, 100), *(Block() for _ in range(20)), nn.Linear(100, 5))
    x = torch.randn(16, 20)
    record = critical_init_(model, x)
    rows = {r.name: r for r in record.layers}
    assert record.blocks == 20 and rows["1.b"].sigma_w2 == pytest.approx(2 / 20)
    sums = [r for r in propagate(model, x).layers if r.kind == "add"]
    assert sums[-1].q_measured / sums[0].q_measured < 4  # (1 + 1/20)^20 → e
    assert sums[0].grad_measured / sums[-1].grad_measured < 4


def test_a_norm_at_the_end_of_a_branch_takes_the_scale() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.norm(self.conv(x)))

    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *(Block() for _ in range(4)))
    record = critical_init_(model, torch.randn(4, 1, 6, 6))
    assert torch.allclose(model[3].norm.weight, torch.tensor(0.5)) and (model[1].weight == 1).all()  # type: ignore[union-attr]
    assert any("γ = 1/√4" in r.scheme for r in record.layers)
    assert int(model[1].num_batches_tracked) == 0  # type: ignore[arg-type]


class Language(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 64)
        self.attend = nn.MultiheadAttention(64, 4, batch_first=True)
        self.norm = nn.LayerNorm(64)
        self.memory = nn.LSTM(64, 64, batch_first=True)
        self.head = nn.Linear(64, 30, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.head(self.memory(self.norm(x))[0])


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_attention_and_recurrence_get_their_usual_values(tied: bool) -> None:
    model = Language(tied)
    record = critical_init_(model, torch.randint(30, (4, 7)))
    assert {r.kind for r in record.layers} == {
        "LayerNorm",
        "Embedding",
        "MultiheadAttention",
        "LSTM",
        "Linear",
    }
    assert float(model.embed.weight.square().mean().detach()) == pytest.approx(1 / 64 if tied else 1, rel=0.1)
    forget = model.memory.bias_ih_l0.detach().chunk(4)[1]
    assert (forget == 1).all()
    eye = model.memory.weight_hh_l0.detach()[:64]
    assert torch.allclose(eye @ eye.T, torch.eye(64), atol=1e-5)
    assert torch.isfinite(model(torch.randint(30, (4, 7)))).all()


def test_an_unknown_layer_before_weights_is_corrected_from_the_data() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(20, 80), nn.Linear(80, 80), nn.Linear(80, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.c(torch.tanh(self.b(7 * h * torch.sigmoid(h))))

    model, x = Odd(), torch.randn(64, 20)
    record = critical_init_(model, x, q=0.2)
    row = next(r for r in record.layers if r.name == "b")
    assert "to the measured signal" in row.reason
    h = model.a(x)
    assert float(model.b(7 * h * torch.sigmoid(h)).detach().square().mean()) == pytest.approx(0.2, rel=0.02)


@pytest.mark.parametrize("name", ["GELU", "SiLU", "Mish", "ELU", "SELU", "Sigmoid", "Softplus", "Hardtanh"])
def test_every_activation_gets_finite_weights_and_a_reason(name: str) -> None:
    model = mlp(10, 50, getattr(nn, name))
    record = critical_init_(model)
    assert all(math.isfinite(r.sigma_w2) and r.sigma_w2 > 0 and r.reason for r in record.layers)


def test_random_state_mode_and_dtype_are_kept_and_a_generator_repeats() -> None:
    state = torch.get_rng_state()
    weights = []
    for _ in range(2):
        model = mlp(4, 30, nn.Tanh).double().eval()
        torch.set_rng_state(state)
        critical_init_(model, torch.randn(5, 20, generator=torch.Generator().manual_seed(0)).double(),
                       generator=torch.Generator().manual_seed(7))  # fmt: skip
        assert torch.equal(torch.get_rng_state(), state)
        assert model[0].weight.dtype == torch.float64 and not model.training  # type: ignore[union-attr]
        weights.append(model[2].weight.detach().clone())  # type: ignore[operator, union-attr]
    assert torch.equal(*weights)


def test_bad_arguments_are_named() -> None:
    model = mlp(3, 5, nn.Tanh)
    with pytest.raises(ArgumentError, match="scheme is 'xavier'"):
        critical_init_(model, scheme="xavier")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="not both"):
        critical_init_(model, q=0.1, bias_var=0.1)
    with pytest.raises(ArgumentError, match="q is -1"):
        critical_init_(model, q=-1.0)
    with pytest.raises(ArgumentError, match="no layer with weights"):
        critical_init_(nn.ReLU())
    with pytest.raises(ArgumentError, match="relu is critical at bias_var = 0 only"):
        critical_init_(mlp(3, 5, nn.ReLU), bias_var=0.1)
