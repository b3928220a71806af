"""Kernels of infinitely wide networks against closed forms, an independent library, and wide networks."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, DataError, UnsupportedError
from bolza.meanfield import resolve_activation
from bolza.meanfield.kernels import infinite_kernels, kernel_map, nngp, ntk

RECORDED = np.load(Path(__file__).parents[1] / "data" / "infinite_kernels.npz")


@pytest.fixture(scope="module")
def images():
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images / 16)


def perceptron(act, depth, inputs=64):
    layers = [nn.Linear(inputs, 7)]
    for _ in range(depth):
        layers += [act(), nn.Linear(7, 7)]
    return nn.Sequential(*layers)


class Erf(nn.Module):
    def forward(self, x):
        return torch.erf(x)


class Residual(nn.Module):
    def __init__(self, *inner):
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x):
        return x + self.inner(x)


class GlobalPool(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def conv(size=3, stride=1, padding=1, inputs=5, **options):
    return nn.Conv2d(inputs, 5, size, stride, padding, **options)


NETWORKS = {
    "erf_4": perceptron(Erf, 4),
    "leaky_3": perceptron(lambda: nn.LeakyReLU(0.2), 3),
    "gelu_3": perceptron(nn.GELU, 3),
    "residual_relu": nn.Sequential(
        nn.Linear(64, 6), Residual(nn.ReLU(), nn.Linear(6, 6)), Residual(nn.ReLU(), nn.Linear(6, 6)),
        nn.ReLU(), nn.Linear(6, 1),
    ),
    "layer_norm_relu": nn.Sequential(
        nn.Linear(64, 6), nn.LayerNorm(6, elementwise_affine=False), nn.ReLU(), nn.Linear(6, 6),
        nn.LayerNorm(6, elementwise_affine=False), nn.ReLU(), nn.Linear(6, 1),
    ),
    "conv_flatten": nn.Sequential(
        conv(inputs=1), nn.ReLU(), conv(), nn.ReLU(), conv(), nn.ReLU(), nn.Flatten(), nn.Linear(320, 1)
    ),
    "conv_pool": nn.Sequential(
        conv(inputs=1), nn.ReLU(), conv(), nn.ReLU(), conv(), nn.ReLU(), GlobalPool(), nn.Linear(5, 1)
    ),
    "conv_strides": nn.Sequential(
        # padding is on the right alone where the other library strides over an even number of pixels
        nn.ZeroPad2d((0, 1, 0, 1)), conv(stride=2, padding=0, inputs=1), nn.ReLU(), conv(2, padding="valid"), nn.ReLU(),
        nn.Flatten(), nn.Linear(45, 1),
    ),
    "conv_circular": nn.Sequential(
        conv(inputs=1, padding_mode="circular"), Erf(), conv(padding_mode="circular"), Erf(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 1),
    ),
    "conv_average_pool": nn.Sequential(
        conv(inputs=1), nn.ReLU(), nn.AvgPool2d(2), conv(), nn.ReLU(), nn.Flatten(), nn.Linear(80, 1)
    ),
    "conv_residual_pool": nn.Sequential(
        conv(inputs=1), Residual(nn.ReLU(), conv()), Residual(nn.ReLU(), conv()), nn.ReLU(), GlobalPool(),
        nn.Linear(5, 1),
    ),
}  # fmt: skip


def relative(ours, theirs):
    return ((ours - theirs) / theirs).abs()


@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_are_those_of_an_independent_library(name, images):
    x = images[:10, None] if name.startswith("conv") else images[:20].flatten(1)
    both = infinite_kernels(NETWORKS[name], x, weight_var=2.0, bias_var=0.01)
    assert both.error < 1e-11
    for ours, kind in ((both.nngp, "nngp"), (both.ntk, "ntk")):
        gap = relative(ours, torch.from_numpy(RECORDED[f"{name}/{kind}"]))
        # the other library rounds the correlation of an input with itself: 1e-8 in its tangent kernel
        assert float(gap.max()) < 2e-8
        assert float(gap.fill_diagonal_(0).max()) < 1e-11  # 1e-12 but for patches that two images share


def test_depth_10_relu_on_1000_digits_agrees_with_an_independent_library(images):
    x = images[:1000].flatten(1)
    both = infinite_kernels(perceptron(nn.ReLU, 10), x, weight_var=2.0, bias_var=0.01)
    for ours, kind in ((both.nngp, "nngp"), (both.ntk, "ntk")):
        gap = relative(ours[::50, ::50], torch.from_numpy(RECORDED[f"digits_relu_10/{kind}"]))
        assert float(gap.max()) < 1e-7 and float(gap.fill_diagonal_(0).max()) < 1e-12
        assert (
            float(relative(ours.sum(1), torch.from_numpy(RECORDED[f"digits_relu_10/{kind}_sums"])).max())
            < 1e-9
        )
        assert torch.equal(ours, ours.T)


def test_standard_parametrization_agrees_with_an_independent_library(images):
    net = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 1))
    x = images[:20].flatten(1)
    both = infinite_kernels(net, x, weight_var=2.0, bias_var=0.01, parametrization="standard")
    assert float(relative(both.nngp, torch.from_numpy(RECORDED["standard_relu_2/nngp"])).max()) < 1e-12
    gap = relative(both.ntk, torch.from_numpy(RECORDED["standard_relu_2/ntk"])).fill_diagonal_(0)
    assert float(gap.max()) < 1e-12


# ------------------------------------------------------------------------- numbers of the papers


def pair(cosine):
    return torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]], dtype=torch.float64) * math.sqrt(2)


@pytest.mark.parametrize(
    ("c", "off_diagonal"),
    [
        (0.0, (0.0, 0.318310, 0.685709, 1.060388, 1.430390)),
        (0.5, (0.5, 0.942331, 1.351480, 1.737845, 2.107113)),
    ],
)
def test_relu_tangent_kernel_has_the_values_of_the_review(c, off_diagonal):
    x = pair(c) / math.sqrt(2)  # K = 2 x·x'/2 has unit diagonal
    for depth, expected in enumerate(off_diagonal):
        theta = ntk(perceptron(nn.ReLU, depth, 2), x, weight_var=2.0, bias_var=0.0)
        assert theta.diagonal().tolist() == pytest.approx([depth + 1.0] * 2, abs=1e-12)
        assert float(theta[0, 1]) == pytest.approx(expected, abs=5e-7)


def test_relu_kernels_at_one_radian_have_their_known_values():
    x = pair(math.cos(1.0)) / math.sqrt(2)
    for depth, k, t in (
        (1, 0.63616727, 1.00448601),
        (2, 0.70330275, 1.42601153),
        (3, 0.75255939, 1.81963263),
    ):
        both = infinite_kernels(perceptron(nn.ReLU, depth, 2), x, weight_var=2.0, bias_var=0.0)
        assert float(both.nngp[0, 1]) == pytest.approx(k, abs=5e-9)
        assert float(both.ntk[0, 1]) == pytest.approx(t, abs=5e-9)
        assert both.nngp.diagonal().tolist() == pytest.approx([1.0, 1.0], abs=1e-14)


def test_first_layer_tangent_kernel_is_that_of_du_and_others():
    # f = m^(-1/2) Σ a_r [w_r·x]_+ with only w trained: H = x·x' (π - arccos x·x')/2π
    net = nn.Sequential(nn.Linear(2, 9, bias=False), nn.ReLU(), nn.Linear(9, 1, bias=False))
    net[2].weight.requires_grad_(False)
    h = ntk(net, pair(0.5) / math.sqrt(2), weight_var=1.0) * 2  # their w has variance 1, not 1/2
    assert h.diagonal().tolist() == pytest.approx([0.5, 0.5], abs=1e-15)
    assert float(h[0, 1]) == pytest.approx(1 / 6, abs=1e-15)
    assert torch.linalg.eigvalsh(h).tolist() == pytest.approx([1 / 3, 2 / 3], abs=1e-15)


# ---------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("name", ["erf_4", "gelu_3", "layer_norm_relu", "conv_flatten", "conv_average_pool"])
def test_blocks_a_second_batch_and_the_diagonal_are_parts_of_the_whole(name, images, monkeypatch):
    x = images[:9, None] if name.startswith("conv") else images[:9].flatten(1)
    whole = infinite_kernels(NETWORKS[name], x, weight_var=1.6, bias_var=0.05)
    monkeypatch.setattr("bolza.meanfield.kernels.infinite._BYTES", 1 << 11)  # blocks of a few inputs
    for part, rows, columns in (
        (infinite_kernels(NETWORKS[name], x, weight_var=1.6, bias_var=0.05), slice(None), slice(None)),
        (
            infinite_kernels(NETWORKS[name], x[:4], x[2:], weight_var=1.6, bias_var=0.05),
            slice(0, 4),
            slice(2, None),
        ),
    ):
        assert torch.allclose(part.nngp, whole.nngp[rows, columns], rtol=1e-11)
        assert torch.allclose(
            part.ntk, whole.ntk[rows, columns], rtol=1e-7
        )  # 1e-8 where an input meets itself
    diagonal = infinite_kernels(NETWORKS[name], x, weight_var=1.6, bias_var=0.05, diagonal=True)
    assert torch.allclose(diagonal.nngp, whole.nngp.diagonal(), rtol=1e-13)
    assert torch.allclose(diagonal.ntk, whole.ntk.diagonal(), rtol=1e-13)


@pytest.mark.parametrize("act", [nn.Tanh, nn.SiLU, nn.SELU, lambda: nn.Softplus(2.0)])
def test_tabulated_activations_agree_with_accurate_moments(act):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, generator=g, dtype=torch.float64)
    x[1] = -x[0] * 1.1  # negative correlations
    x[3] = x[2] + 1e-3  # and close to 1
    both = infinite_kernels(perceptron(act, 1, 5), x, weight_var=1.5, bias_var=0.1)
    phi = resolve_activation(act())
    k = 1.5 * x @ x.T / 5 + 0.1
    q = k.diagonal()
    c = k / (q[:, None] * q).sqrt()
    expected = 1.5 * phi.cross(q[:, None], q, c) + 0.1
    assert torch.allclose(both.nngp, expected, rtol=1e-10, atol=1e-11)
    tangent = expected + 1.5 * phi.cross_slope(q[:, None], q, c) * k
    assert torch.allclose(both.ntk, tangent, rtol=1e-9, atol=1e-11)
    assert both.error < 1e-9


def test_a_table_that_is_not_good_says_so():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, generator=g, dtype=torch.float64) * torch.tensor([[0.2], [1.0], [3.0]])
    with pytest.warns(UserWarning, match="scale the inputs to similar lengths"):
        found = infinite_kernels(
            perceptron(nn.Hardtanh, 1, 5), x, weight_var=1.5, bias_var=0.1, tangent=False
        )
    assert found.error > 1e-6


def test_own_weights_give_the_variances(images):
    net = perceptron(nn.ReLU, 2).double()
    for layer in net:
        if isinstance(layer, nn.Linear):
            with torch.no_grad():
                layer.weight.copy_(layer.weight.sign() * math.sqrt(1.7 / layer.in_features))
                layer.bias.copy_(layer.bias.sign() * math.sqrt(0.3))
    x = images[:5].flatten(1)
    own, given = infinite_kernels(net, x), infinite_kernels(net, x, weight_var=1.7, bias_var=0.3)
    assert torch.allclose(own.nngp, given.nngp, rtol=1e-12) and torch.allclose(own.ntk, given.ntk, rtol=1e-12)


def test_a_delta_kernel_keeps_every_pixel_to_itself(images):
    net = nn.Sequential(conv(inputs=1), nn.ReLU(), nn.Flatten(), nn.Linear(320, 1)).double()
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].weight[:, :, 1, 1] = math.sqrt(2.0)
        net[0].bias.zero_()
    alone = nn.Sequential(conv(1, padding=0, inputs=1), nn.ReLU(), nn.Flatten(), nn.Linear(320, 1)).double()
    with torch.no_grad():
        alone[0].weight[:] = math.sqrt(2.0)
        alone[0].bias.zero_()
        alone[3].load_state_dict(net[3].state_dict())
    x = images[:4, None]
    assert torch.allclose(ntk(net, x), ntk(alone, x), rtol=1e-13)


def test_pixels_in_another_order_leave_a_pooled_kernel_of_one_by_one_convolutions_as_it_is(images):
    net = nn.Sequential(conv(1, padding=0, inputs=1), nn.Tanh(), GlobalPool(), nn.Linear(5, 1))
    x = images[:4, None]
    shuffled = x.flatten(2)[..., torch.randperm(64, generator=torch.Generator().manual_seed(0))].reshape(
        x.shape
    )
    a, b = (infinite_kernels(net, v, weight_var=1.5, bias_var=0.1) for v in (x, shuffled))
    assert torch.allclose(a.nngp, b.nngp, rtol=1e-12) and torch.allclose(a.ntk, b.ntk, rtol=1e-12)


# ------------------------------------------------------------------------- against wide networks


def empirical(net, x):
    """Tangent kernel of the first output, by the definition."""
    rows = []
    for i in range(len(x)):
        net.zero_grad()
        net(x[i : i + 1]).flatten()[0].backward()
        rows.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    j = torch.stack(rows)
    return j @ j.T


class Mixed(nn.Module):
    """Functions instead of modules, a skip from the input, a product, a concatenation, layer norm with weights."""

    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv1d(3, width, 3, padding=1, bias=False)
        self.skip = nn.Conv1d(3, width, 1)
        self.norm = nn.LayerNorm(width)
        self.gate, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(2 * width, 1)

    def forward(self, x):
        h = F.relu(self.stem(x)) * 0.8 + self.skip(x)
        h = self.norm(h.transpose(1, 2))  # (n, positions, units)
        h = torch.cat([torch.sigmoid(self.gate(h)) * self.value(h), h], -1)
        return self.head(h.mean(1))


def test_wide_networks_have_the_standard_tangent_kernel():
    torch.manual_seed(0)
    x = torch.randn(3, 3, 6)
    draws, theory = [], None
    for _ in range(12):
        net = Mixed(128)
        draws.append(empirical(net, x))
        theory = (
            ntk(net, x, parametrization="standard", weight_var=1 / 3, bias_var=0.0)
            if theory is None
            else theory
        )
    draws = torch.stack(draws)
    # PyTorch draws weights of variance 1/(3 n_in) and biases of the same, which 1/n_in makes small but not nothing.
    biased = ntk(Mixed(128), x.double(), parametrization="standard")
    error = draws.std(0) / math.sqrt(len(draws))
    assert bool(((draws.mean(0) - biased).abs() < 4 * error + 0.03 * biased).all())


def test_wide_networks_have_the_covariance():
    torch.manual_seed(0)
    x = torch.randn(3, 2, 5, 5)
    outputs = []
    for _ in range(300):
        net = nn.Sequential(
            nn.Conv2d(2, 48, 3, 2, 1), nn.Tanh(), nn.Conv2d(48, 48, 2, bias=False), nn.GELU(), nn.Flatten(),
            nn.Linear(192, 6),
        )  # fmt: skip
        outputs.append(net(x).detach())
    outputs = torch.stack(outputs, 1).flatten(1).double()  # (inputs, draws × units)
    products = outputs[:, None] * outputs[None]
    theory = nngp(net, x, dtype=torch.float64)
    error = products.std(-1) / math.sqrt(products.shape[-1])
    assert bool(((products.mean(-1) - theory).abs() < 4 * error + 0.02 * theory).all())


# ------------------------------------------------------------------------- graphs, types, errors


def test_frozen_layers_have_no_share(images):
    x = images[:4].flatten(1)
    net = perceptron(nn.ReLU, 2).requires_grad_(False)
    assert float(ntk(net, x, weight_var=2.0, bias_var=0.1).abs().max()) == 0
    net[-1].requires_grad_(True)
    both = infinite_kernels(net, x, weight_var=2.0, bias_var=0.1)
    assert torch.equal(both.ntk, both.nngp)  # a linear model on random features


def test_reshapes_slices_and_permutations_are_followed(images):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.norm, self.head = nn.Conv2d(1, 6, 4, 4), nn.LayerNorm(6), nn.Linear(6, 1)
            self.place = nn.Parameter(torch.randn(1, 4, 6))

        def forward(self, x):
            h = self.patch(x).flatten(2).transpose(1, 2) + self.place
            return self.head(torch.relu(self.norm(h))[:, 0])

    net = Tokens().double()
    x = images[:3, None]
    patch = x[:, :, :4, :4].flatten(1)
    flat = nn.Sequential(nn.Linear(16, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 1)).double()
    with torch.no_grad():
        net.place.zero_()
    net.place.requires_grad_(False)
    a, b = (infinite_kernels(m, v, weight_var=2.0, bias_var=0.1) for m, v in ((net, x), (flat, patch)))
    assert torch.allclose(a.nngp, b.nngp, rtol=1e-12) and torch.allclose(a.ntk, b.ntk, rtol=1e-12)


def test_tokens_agree_where_they_are_the_same():
    net = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(24, 1))
    tokens = torch.tensor([[0, 1, 2], [0, 1, 3], [4, 4, 4]])
    k = nngp(net, tokens, weight_var=1.0, bias_var=0.0, dtype=torch.float64)
    # Linear with equal tokens ½, ReLU at c = 0 gives 1/2π
    assert float(k[0, 1]) == pytest.approx((2 * 0.5 + 1 / (2 * math.pi)) / 3, abs=1e-14)
    assert float(k[0, 2]) == pytest.approx(1 / (2 * math.pi), abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_type_is_kept_and_the_model_is_not_changed(dtype, images):
    net = NETWORKS["conv_flatten"].train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    both = infinite_kernels(net, images[:3, None].to(dtype), weight_var=2.0, bias_var=0.01)
    assert both.nngp.dtype == both.ntk.dtype == dtype and net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    theirs = torch.from_numpy(RECORDED["conv_flatten/ntk"])[:3, :3]
    assert float(relative(both.ntk.double(), theirs).max()) < (1e-4 if dtype == torch.float32 else 1e-7)


def test_a_map_of_one_s_own_is_used_for_a_layer_that_is_no_chain_of_known_ones(images):
    class Strange(nn.Module):
        def forward(self, x):
            return x.flip(-1).cumsum(-1)

    net = nn.Sequential(nn.Linear(64, 5), Strange(), nn.Linear(5, 1))
    x = images[:2].flatten(1)
    with pytest.raises(UnsupportedError, match=r"flip.*module of its own.*kernel_map.register"):
        nngp(net, x)
    kernel_map.register(Strange, lambda layer, call: call.kernel().map(lambda t: 9 * t))
    both = infinite_kernels(net, x, weight_var=1.0, bias_var=0.0)
    assert torch.allclose(both.nngp, 9 * x @ x.T / 64) and torch.allclose(both.ntk, 18 * x @ x.T / 64)


def test_errors_name_the_layer_and_say_what_to_do(images):
    flat, square = images[:2].flatten(1), images[:2, None]
    post = nn.Sequential(nn.Linear(64, 4), Residual(nn.ReLU()), nn.Linear(4, 1))
    cases = [
        (nn.Sequential(conv(inputs=1), nn.MaxPool2d(2)), square, r"'1' is a MaxPool2d.*kernel_map.register"),
        (nn.Sequential(nn.Linear(64, 4), nn.BatchNorm1d(4)), flat, r"model.eval\(\)"),
        (nn.Sequential(nn.Linear(64, 4), nn.Dropout()), flat, r"model.eval\(\)"),
        (nn.Sequential(nn.Linear(64, 4), nn.ReLU(), nn.LayerNorm(4), nn.Tanh()), flat, "not Gaussian"),
        (post, flat, "stem from the same random layer"),
        (nn.Sequential(*[nn.Linear(64, 64)] * 2), flat, "uses the weights of"),
    ]
    for net, x, message in cases:
        with pytest.raises(UnsupportedError, match=message):
            nngp(net.train(), x, weight_var=1.0, bias_var=0.0)
    net = perceptron(nn.ReLU, 1)
    for error, message, options in (
        (ArgumentError, "weight_var=-1", {"weight_var": -1.0}),
        (ArgumentError, "choose 'ntk' or 'standard'", {"parametrization": "mean"}),
        (ArgumentError, "leave x2 out", {"diagonal": True, "x2": flat}),
        (ArgumentError, "shapes", {"x2": flat[:, :5]}),
        (DataError, "not finite", {"x2": flat * math.nan}),
    ):
        with pytest.raises(error, match=message):
            ntk(net, flat, **options)
    with pytest.raises(ArgumentError, match="no layer with weights"):
        nngp(nn.ReLU(), flat)
