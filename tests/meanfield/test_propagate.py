import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, DataError, DivergenceError
from bolza.meanfield import Propagation, fixed_point, propagate


def draw(model: nn.Module, weight_var: float, bias_var: float, seed: int = 0) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d):
            fan_in = m.weight[0].numel()
            nn.init.normal_(m.weight, std=(weight_var / fan_in) ** 0.5, generator=g)
            nn.init.normal_(m.bias, std=bias_var**0.5, generator=g)
    return model


def mlp(width: int, depth: int, activation: Any = nn.Tanh, inputs: int = 20) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(inputs, width), activation()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 5))


def check(
    result: Propagation, depth: int, width: int, slack: float = 1.0, kinds: set[str] | None = None
) -> None:
    """Within 3.5 standard errors of the layer plus what width and depth allow, relative √(slack depth/width)."""
    wide = math.sqrt(slack * depth / width)
    for row in result.layers:
        if row.units < 30 or (kinds is not None and row.kind not in kinds):
            continue
        assert abs(row.q_theory / row.q_measured - 1) < 3.5 * row.q_error / row.q_measured + wide, row
        assert abs(row.c_theory - row.c_measured) < 3.5 * row.c_error + wide / 2, row
        assert (
            abs(math.log(row.grad_theory / row.grad_measured))
            < 3.5 * row.grad_error / row.grad_measured + wide
        ), row


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU, nn.ELU], ids=lambda a: a.__name__)
def test_a_wide_plain_network_does_what_theory_says(activation: Any) -> None:
    model = draw(mlp(600, 6, activation), 1.7, 0.05)
    result = propagate(model, torch.randn(8, 20), torch.randint(5, (8,)), F.cross_entropy)
    check(result, 6, 600)
    assert {r.source for r in result.layers} == {"theory"}
    assert result.phase.activation == activation.__name__.lower()


def test_the_phase_of_a_plain_network_is_its_fixed_point() -> None:
    result = propagate(draw(mlp(300, 8), 1.5, 0.05), torch.randn(8, 20))
    exact = fixed_point("tanh", 1.5, 0.05)
    phase = result.phase
    assert phase.phase == "ordered" and phase.depth == 8
    assert phase.chi_1 == pytest.approx(float(exact.chi_1), abs=4 * phase.chi_1_error)
    assert phase.trainable_depth == pytest.approx(6 * phase.xi_c)
    assert (phase.sigma_w2, phase.sigma_b2) == pytest.approx((1.5, 0.05), rel=0.1)
    assert propagate(draw(mlp(300, 8), 6.0, 0.05), torch.randn(8, 20)).phase.phase == "chaotic"


def test_default_initialisation_of_fifty_tanh_layers_is_ordered_and_gradients_do_not_underflow() -> None:
    model = mlp(100, 50)
    result = propagate(model, torch.randn(16, 20), torch.randint(5, (16,)), F.cross_entropy)
    first = result.layers[0]
    assert 1e-40 < first.grad_measured < 1e-20
    assert abs(math.log(first.grad_theory / first.grad_measured)) < 2  # 50 layers of width 100
    assert result.phase.phase == "ordered"
    assert result.phase.chi_1 == pytest.approx(1 / 3, rel=0.02)  # U(-1/√n, 1/√n) has variance 1/3n
    assert result.phase.trainable_depth < 7
    assert result.phase.chi_1_measured == pytest.approx(1 / 3, rel=0.1)


def test_nothing_of_the_model_is_changed() -> None:
    model = nn.Sequential(
        nn.Linear(6, 40), nn.BatchNorm1d(40), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(40, 3)
    )  # fmt: skip
    before = copy.deepcopy(model.state_dict())
    model[0].weight.grad = torch.ones_like(model[0].weight)
    random = torch.get_rng_state()
    one = propagate(model, torch.randn(20, 6, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (model[0].weight.grad == 1).all() and model.training
    assert one == propagate(model, torch.randn(20, 6, generator=torch.Generator().manual_seed(1)))


class Residual(nn.Module):
    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Linear(20, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def test_residual_sums_add_variances_forward_and_factors_backward() -> None:
    result = propagate(draw(Residual(500, 6), 1.0, 0.0), torch.randn(8, 20))
    check(result, 7, 500)
    sums = [r for r in result.layers if r.kind == "add"]
    assert len(sums) == 6 and all(r.source == "theory" for r in result.layers)
    assert not result.phase.plain and "block" in result.phase.reason


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_convolutions_carry_positions(mode: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 150, 3, padding=1, padding_mode=mode), nn.Tanh(), nn.Conv2d(150, 150, 3, stride=2, padding=1),
        nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(150, 150, 2), nn.Flatten(), nn.Linear(150, 60),
    )  # fmt: skip
    result = propagate(draw(model, 1.8, 0.05), torch.randn(6, 2, 8, 8))
    check(result, 5, 150, slack=1.5)
    assert {r.source for r in result.layers} == {"theory"}


def test_the_correlation_of_whole_samples_counts_all_positions_together() -> None:
    model = draw(nn.Sequential(nn.Conv2d(1, 200, 3, padding=1), nn.Tanh()), 1.5, 0.05)
    x = torch.rand(6, 1, 6, 6)
    result = propagate(model, x)
    with torch.no_grad():
        for layers, row in zip((model[:1], model), result.layers, strict=True):
            flat = F.normalize(layers(x).flatten(1), dim=1)
            direct = float(((flat @ flat.T).sum() - 6) / 30)
            assert row.c_samples == pytest.approx(direct, abs=0.05)
            assert row.c_samples > row.c_theory + 0.05  # different positions are less alike


def test_large_images_are_carried_position_by_position() -> None:
    model = nn.Sequential(nn.Conv1d(3, 100, 5, padding=2), nn.ReLU(), nn.Conv1d(100, 100, 5, stride=4), nn.Flatten(),
                          nn.Linear(100 * 49, 100))  # fmt: skip
    result = propagate(draw(model, 2.0, 0.0), torch.randn(8, 3, 200))
    check(result, 3, 100, slack=1.5)
    assert {r.source for r in result.layers} == {"theory"}


@pytest.mark.parametrize("training", [True, False])
def test_norms_and_dropout(training: bool) -> None:
    model = nn.Sequential(
        nn.Linear(20, 500), nn.BatchNorm1d(500), nn.ReLU(), nn.Linear(500, 500), nn.LayerNorm(500), nn.Tanh(),
        nn.Dropout(0.3), nn.Linear(500, 500), nn.RMSNorm(500), nn.ReLU(), nn.Linear(500, 500), nn.GroupNorm(5, 500),
        nn.Linear(500, 500),
    ).train(training)  # fmt: skip
    result = propagate(draw(model, 1.5, 0.05), torch.randn(16, 20))
    check(result, 8, 500, slack=1.5)
    assert {r.source for r in result.layers} == {"theory"}


def test_batch_norm_makes_gradients_explode_at_the_known_rate() -> None:
    """ReLU with batches of 64: 1.493 a layer (review §3.7), once the inputs' own correlation is forgotten."""
    layers: list[nn.Module] = [nn.Linear(20, 400)]
    for _ in range(6):
        layers += [nn.BatchNorm1d(400), nn.ReLU(), nn.Linear(400, 400)]
    result = propagate(draw(nn.Sequential(*layers), 2.0, 0.0), torch.randn(64, 20), max_samples=64)
    theory = [r.grad_theory for r in result.layers if r.kind == "Linear"]
    measured = [r.grad_measured for r in result.layers if r.kind == "Linear"]
    assert (theory[3] / theory[5]) ** 0.5 == pytest.approx(1.493, abs=0.02)
    assert theory[0] / theory[5] == pytest.approx(measured[0] / measured[5], rel=0.15)  # six layers of 400


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 96)
        self.place = nn.Parameter(torch.randn(10, 96) * 0.3)
        self.norm = nn.LayerNorm(96)
        self.qkv = nn.Linear(96, 3 * 96)
        self.out = nn.Linear(96, 96)
        self.mlp = nn.Sequential(nn.LayerNorm(96), nn.Linear(96, 200), nn.GELU(), nn.Linear(200, 96))
        self.head = nn.Linear(96, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, 4, d // 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        x = x + self.mlp(x)
        return self.head(x)


def test_a_language_model_is_theory_but_for_attention() -> None:
    ids = torch.randint(11, (8, 10))
    result = propagate(Attention(), ids, ids, lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten()))
    assert [r.kind for r in result.unmapped] == ["scaled_dot_product_attention"]
    rows = {r.name: r for r in result.layers}
    assert rows["embed"].c_theory == pytest.approx(rows["embed"].c_measured, abs=0.05)
    check(result, 6, 96, kinds={"Embedding", "LayerNorm", "GELU", "add"})


def test_layers_without_a_map_are_named_and_theory_goes_on_from_the_measurement() -> None:
    model = nn.Sequential(nn.Bilinear(8, 8, 60), nn.Linear(60, 50))

    class Paired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.head = model[0], model[1]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.pair(x, x))

    result = propagate(Paired(), torch.randn(12, 8))
    assert [(r.name, r.kind, r.source) for r in result.layers] == [
        ("pair", "Bilinear", "measured"), ("head", "Linear", "theory")
    ]  # fmt: skip
    assert "no moment map for Bilinear" in result.unmapped[0].note
    assert result.layers[0].q_theory == pytest.approx(result.layers[0].q_measured)


def test_layers_that_share_weights_are_measured_and_so_is_what_their_gradients_add_up_to() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Linear(20, 200), nn.Linear(200, 200), nn.Linear(200, 50)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for _ in range(4):
                x = x + self.block(x)
            return self.head(x)

    result = propagate(draw(Shared(), 1.0, 0.0), torch.randn(8, 20))
    shared = [r for r in result.layers if r.name.startswith("block")]
    assert len(shared) == 4 and all(r.source == "measured" and "another layer" in r.note for r in shared)
    check(result, 6, 200)  # independent weights would be wrong by a factor: their sums add up in amplitude


def test_an_embedding_that_is_also_the_head_is_measured() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 96), nn.Linear(96, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    result = propagate(Tied(), torch.randint(11, (8, 10)))
    assert [r.source for r in result.layers] == ["measured", "measured"]


@pytest.mark.parametrize("gathered", [True, False])
def test_running_statistics_of_these_very_weights_are_measured(gathered: bool) -> None:
    model = draw(
        nn.Sequential(nn.Linear(20, 300), nn.ReLU(), nn.Linear(300, 300), nn.BatchNorm1d(300)), 2.0, 0.1
    )
    x = torch.randn(64, 20)
    if gathered:
        for _ in range(20):
            model(x)
    else:
        model[3].running_mean.normal_()
    row = propagate(model.eval(), x[:8]).layers[3]
    assert row.source == ("measured" if gathered else "theory")
    assert row.q_theory == pytest.approx(row.q_measured, rel=0.2)


def test_a_layer_that_is_the_whole_network_has_a_row_under_its_name() -> None:
    x = torch.randn(4, 6, 64)
    for layer, args in (
        (nn.MultiheadAttention(64, 4, batch_first=True), (x, x, x)),
        (nn.Linear(64, 32), (x[0],)),
    ):
        row = propagate(layer, args).layers[0]
        assert row.name == row.kind == type(layer).__name__ and row.source == "theory"


def test_densely_connected_layers_join_kernels_by_their_widths() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(20, 100), nn.Linear(100, 300), nn.Linear(400, 80)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            return self.c(torch.cat([a, torch.tanh(self.b(a))], dim=1))

    result = propagate(draw(Dense(), 1.5, 0.05), torch.randn(8, 20))
    check(result, 3, 100)
    assert {r.source for r in result.layers} == {"theory"}


def test_a_model_that_cannot_be_traced_is_compared_layer_by_layer() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b = nn.Linear(20, 300), nn.Tanh(), nn.Linear(300, 300)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.a(x))
            return self.b(x) if float(x.sum().detach()) < 1e9 else x

    result = propagate(draw(Branching(), 1.5, 0.05), torch.randn(8, 20))
    assert "could not be traced" in result.notes[0]
    assert [r.name for r in result.layers] == ["a", "act", "b"]
    assert result.layers[2].q_theory == pytest.approx(result.layers[2].q_measured, rel=0.2)


def test_a_regressor_with_one_output_and_one_sample_works() -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 1))
    result = propagate(model, torch.randn(1, 20), torch.zeros(1, 1), F.mse_loss)
    assert math.isnan(result.layers[0].c_measured) and result.layers[0].grad_measured > 0


def test_an_exported_graph_has_theory_for_its_operators() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(20, 300), nn.Linear(300, 300), nn.Linear(300, 300)
            self.weight = nn.Parameter(torch.ones(300))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.ops.aten.tanh.default(torch.ops.aten.linear.default(x, self.a.weight, self.a.bias))
            h = torch.ops.aten.linear.default(h, self.b.weight, self.b.bias)
            h = torch.ops.aten.add.Tensor(h, torch.ops.aten.relu.default(self.c(h)))
            return torch.ops.aten.layer_norm.default(h, [300], self.weight)

    result = propagate(draw(Steps(), 1.5, 0.05), torch.randn(8, 20))
    assert {r.source for r in result.layers} == {"theory"}
    check(result, 4, 300)


def test_bad_input_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(DataError, match="1 numbers that are not finite"):
        propagate(model, torch.tensor([[1.0, float("nan"), 0.0]]))
    with pytest.raises(ArgumentError, match=r"shape \(5, 4\).*scalar"):
        propagate(model, torch.ones(5, 3), torch.ones(5, 4), lambda out, y: out - y)
    with pytest.raises(ArgumentError, match="batch of inputs"):
        propagate(model, 3)
    with pytest.raises(DataError, match="no samples"):
        propagate(model, torch.ones(0, 3))
    nn.init.constant_(model[0].weight, float("nan"))
    with pytest.raises(DivergenceError, match="layer '0'"):
        propagate(model, torch.ones(5, 3))


@pytest.mark.parametrize("weight_var", [1.25, 1.760955, 2.5])
def test_the_gradient_of_a_wide_network_changes_by_chi_1_a_layer(weight_var: float) -> None:
    width, depth = 1000, 30
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(width, width)
        nn.init.normal_(linear.weight, std=math.sqrt(weight_var / width))
        nn.init.normal_(linear.bias, std=math.sqrt(0.05))
        layers += [linear, nn.Tanh()]
    h, seen = torch.randn(8, width), []
    for layer in layers:
        h = layer(h)
        if isinstance(layer, nn.Linear):
            h.retain_grad()
            seen.append(h)
    (h * torch.randn(width)).sum().backward()
    log_variance = torch.stack([a.grad.double().square().mean().log() for a in seen[5:]])
    t = torch.arange(len(log_variance), dtype=torch.float64)
    t = t - t.mean()
    slope = -float((t * log_variance).sum() / (t * t).sum())
    # a layer adds noise of √(2/width) to the logarithm: a random walk, whose slope errs by √(6/(5n)) of that
    error = math.sqrt(2 / width) * math.sqrt(6 / (5 * len(t)))
    assert abs(slope - math.log(float(fixed_point("tanh", weight_var, 0.05).chi_1))) < 3 * error
