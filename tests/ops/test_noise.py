"""Per-sample gradients against one ``backward`` a sample."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.ops.errors import ArgumentError, DataError, DivergenceError, UnsupportedError
from bolza.ops.noise import PerSampleGradients, batch_statistics, each_sample_alone
from bolza.ops.replay import differentiable_kernels
from networks import NETWORKS, in_double


def one_at_a_time(model: nn.Module, loss, data) -> Tensor:
    """Independent and slow: a backward pass for every sample, (N, d)."""
    x, y = data
    params = list(model.parameters())
    statistics = batch_statistics(model, [data], params[0].device)
    rows = []
    with each_sample_alone(model, statistics), differentiable_kernels(model):
        for i in range(len(x)):
            grads = torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]), params, allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        torch.zeros_like(p).flatten() if g is None else g.flatten()
                        for p, g in zip(params, grads, strict=True)
                    ]
                )
            )
    return torch.stack(rows)


VMAPPED = {
    "tied weights": {"encoder.weight"},
    "LSTM": {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0"},
    "TransformerEncoderLayer": {f"0.self_attn.{p}" for p in ("in_proj_weight", "in_proj_bias")}
    | {"0.self_attn.out_proj.weight", "0.self_attn.out_proj.bias"},
    "causal attention": {"position.weight"},
}


@pytest.mark.parametrize("memory", [2**30, 0], ids=["stored", "streamed"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_product_equals_that_of_the_stacked_gradients(name, memory):
    model, data, loss = in_double(NETWORKS[name]())
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    g = one_at_a_time(model, loss, data)
    samples = PerSampleGradients(model, loss, data, chunk=4, memory=memory)
    assert samples.stored == (memory > 0) and samples.samples == len(g)
    assert set(samples.names) - set(samples.factored) == VMAPPED.get(name, set())
    close = {"rtol": 1e-10, "atol": 1e-12}
    v, c = torch.randn(g.shape[1], 2, dtype=g.dtype), torch.randn(g.shape[0], 2, dtype=g.dtype)
    torch.testing.assert_close(samples.mean, g.mean(0), **close)
    torch.testing.assert_close(samples.dots(v), g @ v, **close)
    torch.testing.assert_close(samples.dots(v[:, 0]), g @ v[:, 0], **close)
    torch.testing.assert_close(samples.combine(c), g.T @ c, **close)
    u = g - g.mean(0)
    torch.testing.assert_close(samples.covariance_product(v), u.T @ (u @ v) / len(g), **close)
    torch.testing.assert_close(samples.gram(), u @ u.T, **close)
    squares, overlaps = samples.squares_and_overlaps()
    torch.testing.assert_close(squares.sum(1), g.square().sum(1), **close)
    torch.testing.assert_close(overlaps.sum(1), g @ g.mean(0), **close)
    # nothing in the model has moved
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


LAYERS = {
    "conv1d, dilated": (lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2, stride=2), (4, 9)),
    "conv1d, grouped, same": (lambda: nn.Conv1d(4, 6, 3, padding="same", groups=2), (4, 9)),
    "conv2d, circular": (lambda: nn.Conv2d(2, 3, (3, 2), padding=(1, 0), padding_mode="circular"), (2, 5, 6)),
    "conv2d, large map": (lambda: nn.Conv2d(8, 8, 3), (8, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2), (2, 3, 3, 3)),
    "transposed conv": (lambda: nn.ConvTranspose2d(2, 3, 2), (2, 3, 3)),
    "linear on a sequence": (lambda: nn.Linear(5, 7), (3, 5)),
    "linear on a long sequence": (lambda: nn.Linear(2, 2), (9, 2)),
    "layer norm": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
    "rms norm": (lambda: nn.RMSNorm(4), (3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 3)),
    "instance norm": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 5)),
    "batch norm of vectors": (lambda: nn.BatchNorm1d(4), (4,)),
    "batch norm without averages": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (3, 4, 2)),
    "prelu": (lambda: nn.PReLU(4), (4, 3)),
    "bilinear": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (4,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_gives_the_gradients_of_samples_taken_alone(name):
    make, shape = LAYERS[name]
    layer = make()
    for p in layer.parameters():
        nn.init.normal_(p)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten()).double()
    x = torch.randn(5, *shape, dtype=torch.float64)
    y = torch.randn_like(model(x).detach())
    samples = PerSampleGradients(model, F.mse_loss, (x, y), chunk=2)
    g = one_at_a_time(model, F.mse_loss, (x, y))
    v = torch.randn(g.shape[1], dtype=g.dtype)
    torch.testing.assert_close(samples.dots(v), g @ v, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(samples.gram(), (g - g.mean(0)) @ (g - g.mean(0)).T, rtol=1e-10, atol=1e-11)


def test_a_table_larger_than_the_sequence_is_kept_as_lookups():
    model = nn.Sequential(nn.Embedding(30, 3, padding_idx=0), nn.Flatten(), nn.Linear(12, 2)).double()
    tokens = torch.randint(0, 4, (5, 4))
    data = (tokens, torch.randn(5, 2, dtype=torch.float64))
    samples = PerSampleGradients(model, F.mse_loss, data)
    g = one_at_a_time(model, F.mse_loss, data)
    assert samples.factored == samples.names
    torch.testing.assert_close(samples.combine(torch.eye(5, dtype=g.dtype)).T, g, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        samples.squares_and_overlaps()[0].sum(1), g.square().sum(1), rtol=1e-10, atol=1e-12
    )


def test_the_gradients_are_those_at_the_time_of_the_call():
    for memory in (0, 2**30):
        model, data, loss = in_double(NETWORKS["causal attention"]())
        g = one_at_a_time(model, loss, data)
        samples = PerSampleGradients(model, loss, data, memory=memory)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        torch.testing.assert_close(samples.dots(g[0]), g @ g[0], rtol=1e-10, atol=1e-12)


def test_a_batch_norm_in_training_mode_is_held_at_the_statistics_of_the_data():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    x, y = torch.randn(20, 2, dtype=torch.float64) * 3 + 1, torch.randn(20, 1, dtype=torch.float64)
    ((mean, var),) = batch_statistics(
        model, [(x[:10], y[:10]), (x[10:], y[10:])], torch.device("cpu")
    ).values()
    h = model[0](x).detach()
    torch.testing.assert_close(mean, h.mean(0))
    torch.testing.assert_close(var, (h[:10].var(0, unbiased=False) + h[10:].var(0, unbiased=False)) / 2)
    samples = PerSampleGradients(model, F.mse_loss, (x, y))
    # the last layer sees no derivative of the statistics: its mean gradient is that of training mode
    slope = torch.autograd.grad(F.mse_loss(model(x), y), model[2].weight)[0]
    torch.testing.assert_close(samples.mean[-4:-1], slope[0], rtol=1e-10, atol=1e-12)


def test_dropout_adds_nothing():
    model = nn.Sequential(nn.Linear(3, 40), nn.Dropout(0.5), nn.Linear(40, 1))
    data = (torch.randn(6, 3), torch.randn(6, 1))
    with_dropout = PerSampleGradients(model, F.mse_loss, data).mean
    assert torch.equal(with_dropout, PerSampleGradients(model.eval(), F.mse_loss, data).mean)


def test_inputs_may_be_tuples_and_batches_may_come_from_a_loader():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(3, 2)

        def forward(self, u, v):
            return torch.tanh(self.a(u)) * self.b(v)

    u, v, y = (torch.randn(7, k) for k in (2, 3, 2))
    whole = PerSampleGradients(Two().double(), F.mse_loss, ((u.double(), v.double()), y.double()))
    assert whole.samples == 7
    net = nn.Linear(2, 2).double()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(u.double(), y.double()), batch_size=3)
    by_loader = PerSampleGradients(net, F.mse_loss, loader, chunk=2)
    at_once = PerSampleGradients(net, F.mse_loss, (u.double(), y.double()))
    torch.testing.assert_close(by_loader.gram(), at_once.gram(), rtol=1e-12, atol=1e-14)


class TestBadInput:
    net = nn.Linear(2, 1)
    data = (torch.randn(4, 2), torch.randn(4, 1))

    def test_a_loss_that_is_a_sum(self):
        with pytest.raises(ArgumentError, match="their sum"):
            PerSampleGradients(self.net, lambda z, y: F.mse_loss(z, y, reduction="sum"), self.data)

    def test_one_sample(self):
        with pytest.raises(DataError, match="one sample"):
            PerSampleGradients(self.net, F.mse_loss, (self.data[0][:1], self.data[1][:1]))

    def test_lengths_that_differ(self):
        with pytest.raises(DataError, match="samples first"):
            PerSampleGradients(self.net, F.mse_loss, (self.data[0], self.data[1][:2]))

    def test_a_gradient_that_is_not_finite(self):
        net = nn.Linear(2, 1)
        with torch.no_grad():
            net.weight.fill_(torch.inf)
        with pytest.raises(DivergenceError):
            PerSampleGradients(net, F.mse_loss, self.data)

    def test_a_model_that_vmap_cannot_take(self):
        class Branches(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.ones(2, 1))

            def forward(self, x):
                return x @ self.w if x.sum().item() > 0 else x @ self.w * 2

        with pytest.raises(UnsupportedError, match=r"'w'.*vmap"):
            PerSampleGradients(Branches(), F.mse_loss, (torch.ones(4, 2), self.data[1]))
