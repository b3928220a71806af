import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, DataError, DivergenceError, UnsupportedError
from bolza.stability import interval_bounds, lipschitz

D = torch.float64


def sampled(model, x, count=1000, spread=0.3):
    """Largest slope between random pairs of inputs: a lower bound that shares no code with the library's."""
    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(len(x), (count,), generator=draw)
    a = x[rows] + spread * torch.randn(count, *x.shape[1:], generator=draw, dtype=x.dtype)
    b = a + 1e-2 * torch.randn(a.shape, generator=draw, dtype=x.dtype)
    with torch.no_grad():
        gap = (model(a) - model(b)).flatten(1).norm(dim=1)
    return float((gap / (a - b).flatten(1).norm(dim=1)).max())


class Tied(nn.Module):
    """Residual steps that share their weights."""

    def __init__(self, act):
        super().__init__()
        self.a, self.b, self.head, self.act = nn.Linear(5, 8), nn.Linear(8, 5), nn.Linear(5, 3), act

    def forward(self, x):
        for _ in range(3):
            x = x + 0.7 * self.b(self.act(self.a(x)))
        return self.head(x)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(9, 6), nn.Linear(15, 3)

    def forward(self, x):
        x = torch.cat([x, torch.relu(self.a(x))], -1)
        x = torch.cat([x, F.gelu(self.b(x))], -1)
        first, second = self.c(x).split([1, 2], -1)
        return torch.cat([second, -2 * first], -1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(4, 6)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v))


class Gate(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x) @ torch.eye(5, dtype=x.dtype)


def conv(pool, norm=True):
    layers = [
        nn.Conv2d(1, 2, 3, stride=2, padding=1),
        nn.BatchNorm2d(2),
        nn.ReLU(inplace=True),
        nn.Conv2d(2, 3, 2),
    ]
    if not norm:
        layers.pop(1)
    else:
        layers[1].running_mean.normal_()
        layers[1].running_var.uniform_(0.5, 2)
        nn.init.normal_(layers[1].weight)
    return nn.Sequential(*layers, nn.SiLU(), pool, nn.Flatten(), nn.LazyLinear(3))


def networks():
    torch.manual_seed(0)
    flat, image = torch.randn(6, 5), torch.randn(4, 1, 7, 7)
    found = {
        "mlp": (nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 9), nn.LeakyReLU(0.2), nn.Linear(9, 3)), flat),
        "tied residual": (Tied(nn.ReLU()), flat),
        "tied residual, gelu": (Tied(nn.GELU()), flat),
        "dense connections": (Dense(), flat),
        "batch norm, average pooling": (conv(nn.AvgPool2d(3)), image),
        "max pooling": (conv(nn.MaxPool2d(2, 1)), image),
        "adaptive pooling": (conv(nn.AdaptiveAvgPool2d(1), norm=False), image),
        "softmax": (nn.Sequential(nn.Linear(5, 9), nn.SiLU(), nn.Linear(9, 3), nn.Softmax(-1)), flat),
        "layer norm": (nn.Sequential(nn.Linear(5, 9), nn.LayerNorm(9), nn.PReLU(9), nn.Linear(9, 3)), flat),
    }  # fmt: skip
    for model, x in found.values():
        model(x)
        model.train()  # certificates are of evaluation mode whatever the mode is
    return found


NETWORKS = networks()


@pytest.mark.parametrize("name", NETWORKS)
def test_bounds_are_above_sampled_slopes_and_in_order(name):
    model, x = NETWORKS[name]
    before = copy.deepcopy(model.state_dict())
    bounds = {method: lipschitz(model, x, method) for method in ("product", "closed", "recursive")}
    slope = sampled(copy.deepcopy(model).eval(), x)
    assert slope <= bounds["recursive"].bound * (1 + 1e-4)
    assert bounds["recursive"].lower <= bounds["recursive"].bound
    assert bounds["recursive"].bound <= bounds["closed"].bound * 1.0001 <= bounds["product"].bound * 1.001
    assert bounds["recursive"].checked and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", ["tied residual, gelu", "max pooling"])
def test_bounds_on_a_box_are_smaller_and_hold_there(name):
    model, x = NETWORKS[name]
    box = x[0] - 0.05, x[0] + 0.05
    local = lipschitz(model, x, box=box)
    assert local.local and local.bound <= lipschitz(model, x).bound * 1.001
    draw = torch.Generator().manual_seed(0)
    a, b = (box[0] + (box[1] - box[0]) * torch.rand(2000, *x.shape[1:], generator=draw) for _ in range(2))
    twin = copy.deepcopy(model).eval().double()
    with torch.no_grad():
        slope = (twin(a.double()) - twin(b.double())).flatten(1).norm(dim=1) / (a - b).flatten(1).norm(dim=1)
    assert float(slope.max()) <= local.bound * (1 + 1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_interval_bounds_hold_all_outputs_of_the_box(name):
    model, x = NETWORKS[name]
    bounds = interval_bounds(model, x - 0.1, x + 0.1)
    assert bounds.lower.dtype == D and (bounds.width >= 0).all()
    twin = copy.deepcopy(model).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(10):
            signs = torch.randint(2, x.shape, generator=draw) * 2 - 1
            out = twin(x + 0.1 * signs * torch.rand(1, generator=draw))
            assert (out >= bounds.lower - 1e-5).all() and (out <= bounds.upper + 1e-5).all()


def test_the_solver_agrees_on_a_tied_residual_network():
    model, x = NETWORKS["tied residual"]
    solved, found = lipschitz(model, x, "sdp"), lipschitz(model, x, tol=1e-5)
    assert found.bound == pytest.approx(solved.bound, rel=1e-5)
    assert found.parts[0].optimum == pytest.approx(solved.bound, rel=2e-5)


def test_a_linear_network_has_the_norm_of_its_matrix_even_where_its_layers_multiply_to_more():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.diag(torch.tensor([2.0, 1.0, 1.0])))
        net[1].weight.copy_(torch.diag(torch.tensor([1.0, 3.0, 1.0])))
    for method in ("product", "closed", "recursive", "sdp"):
        found = lipschitz(net, method=method)
        assert found.bound == pytest.approx(3.0, rel=1e-7) and found.lower == pytest.approx(3.0, rel=1e-3)


def test_large_layers_are_bound_by_products_and_small_ones_after_them_by_the_inequality():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(),
        nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 2)
    )  # fmt: skip
    x = torch.randn(2, 1, 6, 6)
    whole, cut = lipschitz(net, x), lipschitz(net, x, max_units=40)
    assert [p.method for p in whole.parts] == ["recursive"]
    assert "product" in {p.method for p in cut.parts} and "recursive" in {p.method for p in cut.parts}
    assert whole.lower <= whole.bound < cut.bound < lipschitz(net, x, "product").bound * 1.2


def test_two_inputs_of_the_identity_network_with_skip_and_relu_are_exact_on_a_box():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2))
        net[2].weight.copy_(torch.tensor([[3.0, 4.0]]))
    right = torch.tensor([1.0, -2.0]), torch.tensor([2.0, -1.0])  # the second unit is dead here
    assert lipschitz(net, box=right).bound == pytest.approx(3.0, rel=1e-6)
    assert lipschitz(net).bound == pytest.approx(5.0, rel=1e-3)


@pytest.mark.parametrize(
    ("model", "x", "words"),
    [
        (Attention(), torch.randn(2, 4, 6), "scaled_dot_product_attention.*interval_bounds"),
        (Gate(), torch.randn(2, 5), "multiplies two values"),
        (nn.Sequential(nn.Linear(3, 3), nn.Hardshrink()), torch.randn(2, 3), "Hardshrink"),
        (
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)),
            torch.randn(2, 3),
            "statistics",
        ),
    ],
)
def test_what_is_not_covered_is_refused_by_name(model, x, words):
    with pytest.raises(UnsupportedError, match=words):
        lipschitz(model, x)


def test_interval_bounds_cover_attention_and_gates():
    torch.manual_seed(0)
    for model, x in ((Attention(), torch.randn(3, 4, 6)), (Gate(), torch.randn(3, 5))):
        bounds = interval_bounds(model, x - 0.05, x + 0.05)
        for _ in range(20):
            out = model(x + 0.05 * (2 * torch.rand_like(x) - 1))
            assert (out >= bounds.lower - 1e-5).all() and (out <= bounds.upper + 1e-5).all()


def test_intervals_of_one_layer_are_exact():
    layer = nn.Linear(4, 3).double()
    x, r = torch.randn(1, 4, dtype=D), 0.3
    bounds = interval_bounds(layer, x - r, x + r)
    reach = r * layer.weight.abs().sum(1)
    assert torch.allclose(bounds.upper[0], layer(x)[0] + reach, atol=1e-12)
    assert torch.allclose(bounds.lower[0], layer(x)[0] - reach, atol=1e-12)


def test_wrong_arguments_are_named():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ArgumentError, match="method='fast'"):
        lipschitz(net, method="fast")
    with pytest.raises(ArgumentError, match="tol is 0"):
        lipschitz(net, tol=0)
    with pytest.raises(ArgumentError, match="example is None"):
        lipschitz(nn.Sequential(nn.Conv1d(1, 1, 2)))
    with pytest.raises(DataError, match="not finite"):
        lipschitz(net, torch.tensor([[1.0, math.nan]]))
    with pytest.raises(ArgumentError, match="lower is above"):
        interval_bounds(net, torch.ones(1, 2), torch.zeros(1, 2))
    with torch.no_grad():
        net[0].weight[0, 0] = math.inf
    with pytest.raises(DivergenceError, match="0.weight"):
        lipschitz(net)


def test_text_and_number_of_a_bound():
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(2.0)
    found = lipschitz(net)
    assert str(found) == "2 ≤ L ≤ 2 (recursive)" and float(found) == found.bound
    assert found.slack == pytest.approx(1, rel=1e-6)
