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


class Block(nn.Module):
    def __init__(self, width: int, activation: Any = nn.ReLU) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(width, width), nn.Linear(width, width), activation()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.act(self.a(x)))


def residual(depth: int, width: int, activation: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(20, width), *(Block(width, activation) for _ in range(depth // 2 - 1)), nn.Linear(width, 10)
    )


WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)


def gradient_ratio(model: nn.Module, x: Tensor) -> float:
    """Norm of the gradient at the output of the first layer over that of the last hidden one."""
    outputs: list[Tensor] = []
    layers = [m for m in model.modules() if isinstance(m, WEIGHTED)]
    handles = [m.register_forward_hook(lambda m, i, o: outputs.append(o)) for m in layers]
    y = model(x)
    for handle in handles:
        handle.remove()
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    first, last = torch.autograd.grad(y, [outputs[0], outputs[-2]], direction)
    return float(first.norm() / last.norm())


def measured_chi_1(model: nn.Sequential, x: Tensor) -> float:
    """Mean over the hidden layers of fan_in · mean(W²) · mean φ'(h)², where padding is made up for."""
    values, gain = [], math.nan
    for layer in model[:-1]:
        if isinstance(layer, WEIGHTED):
            weight: Tensor = layer.weight.detach()  # type: ignore[assignment]
            values.append(gain * float(weight[0].numel() * weight.square().mean()))
            x = layer(x)
        else:
            x = x.detach().requires_grad_()
            slope = torch.autograd.grad(layer(x).sum(), x)[0]
            gain = float(slope.square().mean())
            x = layer(x)
    return sum(values[1:]) / len(values[1:])


SCHEMES = ["gaussian", "orthogonal", "mirrored"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("activation", [nn.Tanh, Erf, nn.ReLU], ids=lambda a: a.__name__)
def test_a_hundred_layers_keep_their_gradient(activation: Any, scheme: Any) -> None:
    """Within a factor 3 in norm; the log of it fluctuates by √(5 depth/width)/2 for Gaussian ReLU: 0.7."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(16, 20, generator=g)
    width = 256 if activation is nn.ReLU and scheme != "mirrored" else 100
    model = mlp(100, width, activation)
    critical_init_(model, x, scheme=scheme, generator=g)
    assert 1 / 3 < gradient_ratio(model, x) < 3
    assert abs(measured_chi_1(model, x) - 1) < 3 / math.sqrt(width)


@pytest.mark.parametrize("scheme", [*SCHEMES, "delta_orthogonal"])
@pytest.mark.parametrize("activation", [nn.Tanh, Erf, nn.ReLU], ids=lambda a: a.__name__)
def test_a_hundred_convolutions_keep_their_gradient(activation: Any, scheme: Any) -> None:
    """ReLU without pairs fluctuates as a fully connected network does, and needs the width."""
    g = torch.Generator().manual_seed(1)
    if activation is nn.ReLU and scheme != "mirrored":
        x = torch.randn(4, 1, 6, generator=g)
        middle = [m for _ in range(98) for m in (nn.Conv1d(160, 160, 3, padding=1), nn.ReLU())]
        head = (nn.Flatten(), nn.Linear(960, 10))
        model = nn.Sequential(nn.Conv1d(1, 160, 3, padding=1), nn.ReLU(), *middle, *head)
    else:
        x = torch.randn(4, 1, 4, 4, generator=g)
        model = conv(100, 24, activation)
    critical_init_(model, x, scheme=scheme, generator=g)
    assert 1 / 3 < gradient_ratio(model, x) < 3


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("activation", [nn.Tanh, Erf, nn.ReLU], ids=lambda a: a.__name__)
def test_a_hundred_residual_layers_keep_their_gradient(activation: Any, scheme: Any) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(16, 20, generator=g)
    model = residual(100, 100, activation)
    critical_init_(model, x, scheme=scheme, generator=g)
    assert 1 / 3 < gradient_ratio(model, x) < 3


def test_propagate_calls_the_initialised_network_critical() -> None:
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(1))
    model = mlp(30, 100, nn.Tanh)
    critical_init_(model, x, generator=torch.Generator().manual_seed(1))
    phase = propagate(model, x, max_samples=4).phase
    assert phase.phase == "critical" and abs(phase.chi_1_measured - 1) < 0.3


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.SiLU, nn.Softplus, lambda: nn.LeakyReLU(0.3)])
def test_mirrored_units_make_a_network_an_isometry_at_any_width(activation: Any) -> None:
    for width in (20, 21):  # ten pairs, and one unit over
        inner = [m for _ in range(38) for m in (nn.Linear(width, width), activation())]
        model = nn.Sequential(nn.Linear(10, width), activation(), *inner, nn.Linear(width, 10)).double()
        critical_init_(model, scheme="mirrored")
        jacobian = torch.autograd.functional.jacobian(model, torch.randn(10, dtype=torch.float64))
        values = torch.linalg.svdvals(jacobian)
        assert torch.allclose(values, values[:1].expand(10), rtol=1e-9)


def test_a_narrow_deep_relu_network_is_mirrored_by_default_and_a_wide_or_tanh_one_is_not() -> None:
    for model, schemes in (
        (mlp(50, 60, nn.ReLU), {"mirrored orthogonal"}),
        (mlp(5, 60, nn.ReLU), {"orthogonal"}),
        (mlp(50, 60, nn.Tanh), {"orthogonal"}),
        (conv(20, 8, nn.ReLU), {"orthogonal"}),
    ):
        x = torch.randn(4, 1, 4, 4) if isinstance(model[0], nn.Conv2d) else torch.randn(4, 20)
        assert {r.scheme for r in critical_init_(model, x).layers} == schemes


def test_correcting_all_layers_halves_what_a_narrow_network_fluctuates() -> None:
    """Gaussian ReLU, 60 layers of 60: √(5 · 60/60) = 2.2 in the log of the squared norm, forward and backward."""
    plain, corrected = [], []
    for seed in range(5):
        for correct, found in ((True, plain), ("all", corrected)):
            g = torch.Generator().manual_seed(seed)
            x = torch.randn(16, 20, generator=g)
            model = mlp(60, 60, nn.ReLU)
            critical_init_(model, x, scheme="gaussian", correct=correct, generator=g)  # type: ignore[arg-type]
            square = float(model[:-2](x).detach().square().mean())
            found.append(abs(math.log(square)) + abs(2 * math.log(gradient_ratio(model, x))))
    assert sum(corrected) < 0.75 * sum(plain)


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
    model = nn.Sequential(nn.Linear(20, 100), *(Block(100) for _ in range(20)), nn.Linear(100, 5))
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
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    forget = model.memory.bias_ih_l0.detach().chunk(4)[1]
    assert float((forget[0] + z).sigmoid().square().mean()) == pytest.approx(1 - 1 / 7, abs=1e-3)
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
    with pytest.raises(ArgumentError, match="correct is 'some'"):
        critical_init_(model, correct="some")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="give an example"):
        critical_init_(model, correct="all")
    with pytest.raises(ArgumentError, match="lazy"):
        critical_init_(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ArgumentError, match="no layer with weights"):
        critical_init_(nn.ReLU())
    with pytest.raises(ArgumentError, match="relu is critical at bias_var = 0 only"):
        critical_init_(mlp(3, 5, nn.ReLU), bias_var=0.1)


# ------------------------------------------------------------------- layers that theory does not cover


class Own(nn.Module):
    """A layer that nobody knows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(9 * torch.randn(inputs, outputs))
        self.shift = nn.Parameter(torch.ones(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix.T, self.shift)


def test_a_custom_module_is_rescaled_to_what_its_reader_works_at_or_named() -> None:
    model = nn.Sequential(nn.Linear(20, 60), Own(60, 60), nn.Tanh(), nn.Linear(60, 3))
    x = torch.randn(64, 20)
    before = model[1].matrix.detach().clone()
    record = critical_init_(model, x, q=0.2, correct=False)
    row = next(r for r in record.layers if r.name == "1.matrix")
    assert row.scheme == "unchanged" and torch.equal(model[1].matrix, before)
    record = critical_init_(model, x, q=0.2)
    row = next(r for r in record.layers if r.name == "1.matrix")
    assert "to the measured signal" in row.reason
    product = model[0](x) @ model[1].matrix
    assert float(product.detach().square().mean()) == pytest.approx(0.2, rel=1e-4)


def test_attention_keeps_the_variance_of_what_it_reads() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.attend = nn.Linear(6, 32), nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.read(x)
            return self.attend(x, x, x, need_weights=False)[0]

    model, x = Attend(), torch.randn(8, 12, 6)
    critical_init_(model, x, correct=False)
    read = float(model.read(x).detach().square().mean())
    assert float(model(x).detach().square().mean()) < 0.6 * read  # twelve positions are averaged
    critical_init_(model, x)
    read = float(model.read(x).detach().square().mean())
    assert float(model(x).detach().square().mean()) == pytest.approx(read, rel=1e-3)


def test_pytorch_s_transformer_layers_are_initialised_inside() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True, dropout=0.0)
    model = nn.Sequential(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(16, 2))
    record = critical_init_(model, torch.randn(4, 5, 16))
    rows = {r.name: r for r in record.layers}
    assert record.blocks == 6
    assert rows["0.layers.1.linear2"].sigma_w2 == pytest.approx(2 / 6)
    assert "residual branch" in rows["0.layers.2.self_attn"].reason
    assert "relu" in rows["0.layers.0.linear2"].reason


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_every_level_of_a_recurrent_stack_reads_a_signal_of_variance_one(kind: Any) -> None:
    model = kind(6, 40, num_layers=3, bidirectional=True, batch_first=True)
    x = 5 * torch.randn(16, 9, 6)
    critical_init_(model, x)
    alone = [kind(6 if k == 0 else 80, 40, bidirectional=True, batch_first=True) for k in range(3)]
    h, gains = x, []
    for level, one in enumerate(alone):
        for name, p in one.named_parameters():
            p.data = getattr(model, name.replace("l0", f"l{level}")).detach()
        base = one.weight_ih_l0.detach()
        gains.append(float((h @ base.T).square().mean()))
        h = one(h)[0].detach()
    assert max(gains) / min(gains) == pytest.approx(1, abs=0.35)


def test_plain_recurrence_sits_on_the_critical_line_in_time() -> None:
    model, x = nn.RNN(6, 64, batch_first=True), torch.randn(8, 25, 6)
    critical_init_(model, x)
    line = critical_line("tanh", q=1 / math.sqrt(25))
    hh = model.weight_hh_l0.detach()
    assert float(64 * hh.square().mean()) == pytest.approx(float(line.weight_var), rel=1e-4)
    drive = x @ model.weight_ih_l0.detach().T
    assert float(drive.square().mean()) == pytest.approx(float(line.bias_var), rel=0.05)
    output = model(x)[0].detach()[:, -1]
    assert 0.3 < float(output.square().mean()) / 0.2 < 1.1  # E tanh² at q = 0.2 is 0.14


def test_transposed_grouped_and_depthwise_convolutions_keep_the_variance() -> None:
    circular: dict[str, Any] = {"padding": 1, "padding_mode": "circular"}
    for layer in (
        nn.ConvTranspose2d(32, 16, 2, stride=2),
        nn.Conv2d(32, 32, 3, groups=32, **circular),
        nn.Conv2d(32, 64, 3, groups=4, **circular),
    ):
        x = torch.randn(8, 32, 8, 8)
        for scheme in ("gaussian", "orthogonal", "delta_orthogonal"):
            critical_init_(layer, x, scheme=scheme, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
            assert float(layer(x).detach().square().mean()) == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize(
    "wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal]
)
def test_reparametrised_weights_get_through(wrap: Any) -> None:
    model = nn.Sequential(wrap(nn.Linear(20, 20)), nn.Tanh(), nn.Linear(20, 3))
    record = critical_init_(model, torch.randn(500, 20), q=1.0)
    weight = model[0].weight.detach()
    assert "through" in record.layers[0].reason
    if wrap is nn.utils.parametrizations.weight_norm:
        assert float(20 * weight.square().mean()) == pytest.approx(record.layers[0].sigma_w2, rel=1e-4)
    assert torch.allclose(weight @ weight.T, weight[0] @ weight[0] * torch.eye(20), atol=1e-5)


def test_a_parametrization_that_takes_no_value_is_refused_by_name() -> None:
    class Doubled(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    layer = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    with pytest.raises(ArgumentError, match="parametrization Doubled of .*Linear takes no value"):
        critical_init_(nn.Sequential(layer, nn.Tanh()))


def test_layers_that_share_a_matrix_are_drawn_once() -> None:
    a, b = nn.Linear(20, 20), nn.Linear(20, 20)
    b.weight = a.weight
    record = critical_init_(nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), nn.Linear(20, 2)))
    assert record.layers[1].scheme == "unchanged" and record.layers[1].reason == "shares its matrix with 0"
    assert torch.allclose(a.weight @ a.weight.T, a.weight[0] @ a.weight[0] * torch.eye(20), atol=1e-5)


@pytest.mark.parametrize("dims", [1, 2])
def test_delta_orthogonal_convolutions_have_unit_singular_values_at_every_frequency(dims: int) -> None:
    layer = (nn.Conv1d, nn.Conv2d)[dims - 1](12, 12, 3, padding=1, padding_mode="circular", bias=False)
    critical_init_(layer, scheme="delta_orthogonal")
    symbol = torch.fft.fftn(layer.weight.detach().double(), s=[8] * dims, dim=tuple(range(2, 2 + dims)))
    values = torch.linalg.svdvals(symbol.flatten(2).permute(2, 0, 1))
    assert float((values - 1).abs().max()) < 1e-6


def test_a_thousand_delta_orthogonal_layers_keep_the_norm() -> None:
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    h = x
    for seed in range(1000):
        layer = nn.Conv2d(6, 6, 3, padding=1, bias=False, dtype=torch.float64)
        critical_init_(layer, scheme="delta_orthogonal", generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            h = layer(h)
    assert float(h.norm() / x.norm()) == pytest.approx(1, abs=1e-12)
