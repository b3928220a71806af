"""The kernel of a finite network against full Jacobians, a backward pass for every output of every sample."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from bolza.core.errors import ArgumentError, DataError, DivergenceError, ShapeError, UnsupportedError
from bolza.meanfield.kernels import empirical_ntk, ntk
from bolza.ops.noise import batch_statistics, each_sample_alone
from bolza.ops.output_gradients import OutputGradients
from networks import NETWORKS, in_double

EXACT = {torch.float64: 1e-12, torch.float32: 1e-6}  # relative to the largest entry


def jacobian(model: nn.Module, x, statistics, params=None, pick=lambda f: f) -> Tensor:
    """Slow and obvious, (n, outputs, d)."""
    params = list(model.parameters()) if params is None else params
    n = len(x) if isinstance(x, Tensor) else len(next(iter(x.values() if isinstance(x, dict) else x)))
    rows = []
    with each_sample_alone(model, statistics):
        for i in range(n):
            if isinstance(x, dict):
                f = model(**{k: v[i : i + 1] for k, v in x.items()})
            elif isinstance(x, tuple):
                f = model(*(v[i : i + 1] for v in x))
            else:
                f = model(x[i : i + 1])
            outs = []
            for value in pick(f).reshape(-1):
                grads = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
                outs.append(
                    torch.cat(
                        [
                            (torch.zeros_like(p) if g is None else g).flatten()
                            for p, g in zip(params, grads, strict=True)
                        ]
                    )
                )
            rows.append(torch.stack(outs))
    return torch.stack(rows)


def full_kernel(model, x1, x2=None, **options) -> Tensor:
    both = [x1] if x2 is None else [x1, x2]
    statistics = batch_statistics(model, [(x, None) for x in both], torch.device("cpu"))
    j1 = jacobian(model, x1, statistics, **options)
    j2 = j1 if x2 is None else jacobian(model, x2, statistics, **options)
    return torch.einsum("iad,jbd->ijab", j1.double(), j2.double())


def assert_equals(found: Tensor, truth: Tensor, tol: float | None = None) -> None:
    assert found.shape == truth.shape
    error = float((found.double() - truth.double()).abs().max() / truth.abs().max())
    assert error <= (EXACT[found.dtype] if tol is None else tol), error


@pytest.mark.parametrize("precision", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_kernel_of_every_network_is_the_contraction_of_its_jacobians(name, precision):
    case = NETWORKS[name]()
    model, (x, _), _ = in_double(case) if precision == torch.float64 else case
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    truth = full_kernel(model, x[:4], x[3:])
    assert_equals(empirical_ntk(model, x[:4], x[3:], outputs="full"), truth)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("name", ["MLP", "CNN with batch norm, evaluation", "tied weights", "LSTM"])
def test_in_blocks_or_whole_every_reduction_is_one_of_the_full_kernel(name, chunk):
    model, (x, _), _ = in_double(NETWORKS[name]())
    full = full_kernel(model, x)
    assert_equals(empirical_ntk(model, x, outputs="full", chunk=chunk), full)
    each = full.diagonal(dim1=2, dim2=3)
    assert_equals(empirical_ntk(model, x, outputs="each", chunk=chunk), each)
    assert_equals(empirical_ntk(model, x, outputs="trace", chunk=chunk), each.sum(-1))
    assert_equals(empirical_ntk(model, x, chunk=chunk), each.mean(-1))


LAYERS = {
    "conv1d, grouped, same": (lambda: nn.Conv1d(4, 6, 3, padding="same", groups=2), (4, 9)),
    "conv2d, circular": (lambda: nn.Conv2d(2, 3, (3, 2), padding=(1, 0), padding_mode="circular"), (2, 5, 6)),
    "conv2d, one position": (lambda: nn.Conv2d(2, 5, 4), (2, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2), (2, 3, 3, 3)),
    "transposed conv": (lambda: nn.ConvTranspose2d(2, 3, 2), (2, 3, 3)),
    "linear on a sequence": (lambda: nn.Linear(9, 8), (2, 9)),
    "linear on a long sequence": (lambda: nn.Linear(3, 2), (9, 3)),
    "layer norm": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
    "rms norm": (lambda: nn.RMSNorm(4), (3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 3)),
    "batch norm": (lambda: nn.BatchNorm2d(4), (4, 3, 3)),
    "prelu": (lambda: nn.PReLU(4), (4, 3)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (4,)),
    "no bias": (lambda: nn.Linear(4, 3, bias=False), (4,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_gives_the_contraction_of_its_jacobians(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    for p in layer.parameters():
        nn.init.normal_(p)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)).double()
    x1, x2 = torch.randn(5, *shape, dtype=torch.float64), torch.randn(3, *shape, dtype=torch.float64)
    model(x1)
    model.eval()
    for mode, reduce in (("full", lambda k: k), ("mean", lambda k: k.diagonal(dim1=2, dim2=3).mean(-1))):
        assert_equals(empirical_ntk(model, x1, x2, outputs=mode), reduce(full_kernel(model, x1, x2)))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Cells(nn.Module):
    """A loop over a cell of linear layers: one weight, many uses."""

    def __init__(self):
        super().__init__()
        self.w, self.u = nn.Linear(3, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        h = x.new_zeros(len(x), 4)
        for t in range(x.shape[1]):
            h = torch.tanh(self.w(x[:, t]) + self.u(h))
        return h


class TimeFirst(nn.Module):
    """Layers that see time first, with as many steps as a few samples."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x.transpose(0, 1))).mean(0))


class Branches(nn.Module):
    """Python control flow on the values: neither hooks on parameters nor vmap can take it."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 2))

    def forward(self, x):
        x = x.flatten(1)
        return x @ self.w if x.sum().item() > 0 else torch.tanh(x @ self.w)


class Scalar(nn.Module):
    """Bare parameters, an in-place activation, and one number a sample."""

    def __init__(self):
        super().__init__()
        self.layer, self.gain = nn.Linear(12, 5), nn.Parameter(torch.randn(5))

    def forward(self, x):
        return nn.functional.relu_(self.layer(x.flatten(1))) @ self.gain


OTHERS = {
    "vanilla RNN": lambda: Recurrent(nn.RNN),
    "GRU": lambda: Recurrent(nn.GRU),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "cells in a loop": Cells,
    "time first": TimeFirst,
    "branches": Branches,
    "scalar": Scalar,
}


@pytest.mark.parametrize("name", OTHERS)
def test_networks_without_factors_fall_back_on_explicit_gradients(name):
    torch.manual_seed(1)
    model = OTHERS[name]().double()
    x1, x2 = torch.randn(7, 4, 3, dtype=torch.float64), torch.randn(4, 4, 3, dtype=torch.float64)
    assert_equals(empirical_ntk(model, x1, x2, outputs="full"), full_kernel(model, x1, x2))
    assert_equals(empirical_ntk(model, x1, chunk=3), full_kernel(model, x1).diagonal(dim1=2, dim2=3).mean(-1))


def test_inputs_may_be_tuples_and_dicts_and_outputs_may_be_picked():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 3), nn.Linear(4, 3)

        def forward(self, u, v):
            return {"logits": torch.tanh(self.a(u)) * self.b(v), "other": 1}

    model = Two().double()
    u, v = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    truth = full_kernel(model, (u, v), pick=lambda f: f["logits"][:, :2])
    for x in ((u, v), {"u": u, "v": v}):
        found = empirical_ntk(model, x, outputs="full", output=lambda f: f["logits"][:, :2])
        assert_equals(found, truth)
    with pytest.raises(ArgumentError, match="output="):
        empirical_ntk(model, (u, v))
    with pytest.raises(DataError, match="samples first"):
        empirical_ntk(model, (u, v[:3]), output=lambda f: f["logits"])


def test_frozen_and_unselected_parameters_do_not_count():
    model, (x, _), _ = in_double(NETWORKS["MLP"]())
    model[0].weight.requires_grad_(False)
    rest = [p for p in model.parameters() if p.requires_grad]
    assert_equals(empirical_ntk(model, x, outputs="full"), full_kernel(model, x, params=rest))
    assert_equals(
        empirical_ntk(model, x, outputs="full", params=["2"]),
        full_kernel(model, x, params=list(model[2].parameters())),
    )


def test_scales_weigh_parameters_by_name_or_by_the_nearest_module():
    model, (x, _), _ = in_double(NETWORKS["residual MLP"]())
    scales = {"": 0.5, "blocks": 2.0, "blocks.1": 3.0, "blocks.1.bias": 0.0, "head.weight": 7.0}
    truth = 0.0
    for name, p in model.named_parameters():
        nearest = max((s for s in scales if s in ("", name) or name.startswith(s + ".")), key=len)
        truth = truth + scales[nearest] * full_kernel(model, x, params=[p])
    for chunk in (None, 2):
        assert_equals(empirical_ntk(model, x, outputs="full", scales=scales, chunk=chunk), truth)


def test_a_large_symmetric_kernel_is_the_same_as_one_of_two_sets():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x = torch.randn(1100, 6, dtype=torch.float64)
    for mode in ("mean", "each"):
        whole = empirical_ntk(model, x, outputs=mode)
        assert_equals(whole, empirical_ntk(model, x, x.clone(), outputs=mode))
        assert (
            torch.equal(whole, whole.transpose(0, 1))
            or float((whole - whole.transpose(0, 1)).abs().max()) < 1e-12
        )


def test_memory_bounds_the_chunks():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2)).double()
    x = torch.randn(40, 1, 8, 8, dtype=torch.float64)
    gradients = OutputGradients(model, [x], memory=2**19)
    sizes = []
    inner = gradients._part
    gradients._part = lambda part: sizes.append(len(part)) or inner(part)
    found = gradients.kernel(x)
    # a sample takes 2 × (8 × 9 + 8 + 288 + 1) numbers of 8 bytes and its activations, a chunk a quarter of the memory
    assert max(sizes) <= 8 and len(sizes) > 5
    assert_equals(found, empirical_ntk(model, x))


def test_a_batch_norm_in_training_mode_uses_both_sets_and_in_evaluation_mode_its_averages():
    model, (x, _), _ = in_double(NETWORKS["CNN with batch norm, training"]())
    assert_equals(empirical_ntk(model, x[:4], x[4:]), empirical_ntk(model, x[4:], x[:4]).T)
    in_training = empirical_ntk(model, x)
    assert not torch.allclose(in_training, empirical_ntk(model.eval(), x))


def test_dropout_adds_nothing():
    model = nn.Sequential(nn.Linear(3, 40), nn.Dropout(0.5), nn.Linear(40, 1))
    x = torch.randn(6, 3)
    assert torch.equal(empirical_ntk(model, x), empirical_ntk(copy.deepcopy(model).eval(), x))


def test_a_wide_relu_network_has_the_kernel_of_the_infinite_one():
    """Two unit vectors at 1 rad, two hidden layers, σ_w² = 2: 1.42601 off and 3 on the diagonal."""
    width, draws = 512, 12
    x = torch.tensor([[1.0, 0.0], [math.cos(1.0), math.sin(1.0)]], dtype=torch.float64) * 2**0.5
    found = []
    for seed in range(draws):
        torch.manual_seed(seed)
        sizes = [(2, width), (width, width), (width, 1)]
        layers = [nn.Linear(a, b, bias=False, dtype=torch.float64) for a, b in sizes]
        scales = {}
        for k, layer in enumerate(layers):
            gain = 1.0 if k == 0 else 2.0  # unit vectors in: the first layer only draws
            nn.init.normal_(layer.weight, std=math.sqrt(gain / layer.in_features))
            scales[f"{2 * k}.weight"] = gain / layer.in_features
        model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        found.append(empirical_ntk(model, x, scales=scales))
    stack = torch.stack(found)
    for (i, j), theory in (((0, 0), 3.0), ((0, 1), 1.42601153)):
        values = stack[:, i, j]
        assert abs(float(values.mean()) - theory) < 4 * float(values.std()) / draws**0.5
        assert float(values.std()) < 0.5


def test_a_wide_network_as_pytorch_makes_it_is_near_its_infinite_kernel():
    """The spread over seeds at width 1024 is about 6 % an entry, that of a mean over four 3 %."""
    x = torch.randn(4, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ratios = []
    for seed in range(4):
        torch.manual_seed(seed)
        layers = [nn.Linear(20, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 3)]
        net = nn.Sequential(*layers).double()
        ratios.append(empirical_ntk(net, x) / ntk(net, x, parametrization="standard"))
    assert float((torch.stack(ratios).mean(0) - 1).abs().max()) < 0.15


class TestBadInput:
    net, x = nn.Linear(2, 1), torch.ones(3, 2)

    def test_unknown_reduction(self):
        with pytest.raises(ArgumentError, match="'all'.*'full'"):
            empirical_ntk(self.net, self.x, outputs="all")

    def test_scales_that_fit_nothing(self):
        with pytest.raises(ArgumentError, match="'bais'"):
            empirical_ntk(self.net, self.x, scales={"bais": 1.0})
        with pytest.raises(ArgumentError, match="at least 0"):
            empirical_ntk(self.net, self.x, scales={"bias": -1.0})

    def test_chunk_and_memory_must_be_positive(self):
        with pytest.raises(ArgumentError, match="chunk is 0"):
            empirical_ntk(self.net, self.x, chunk=0)
        with pytest.raises(ArgumentError, match="memory is 0"):
            empirical_ntk(self.net, self.x, memory=0)

    def test_outputs_without_samples_first(self):
        with pytest.raises(ShapeError, match="samples first"):
            empirical_ntk(self.net, self.x, output=lambda f: f.T)

    def test_a_detached_model(self):
        class Detached(nn.Linear):
            def forward(self, x):
                return super().forward(x).detach()

        with pytest.raises(ArgumentError, match="detached"):
            empirical_ntk(Detached(2, 1), self.x)

    def test_not_finite(self):
        with pytest.raises(DivergenceError, match="nan and inf"):
            empirical_ntk(self.net, self.x * torch.inf)

    def test_half_precision(self):
        with pytest.raises(UnsupportedError, match="half precision"):
            empirical_ntk(nn.Linear(2, 1).half(), self.x)

    def test_no_samples(self):
        with pytest.raises(DataError, match="no samples"):
            empirical_ntk(self.net, self.x[:0])
