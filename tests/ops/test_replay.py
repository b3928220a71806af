import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils import parametrizations, spectral_norm
from torch.testing import assert_close

from bolza.ops.replay import differentiable_kernels, frozen_statistics, same_randomness


class Counter(nn.Module):
    """A layer with buffers of its own: one it writes to, one it assigns anew, one it only reads."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("mask", torch.ones(3))

    def forward(self, x):
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean().detach()
        return x * self.mask


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(3), (8, 3)),
        (nn.BatchNorm2d(3, momentum=None), (4, 3, 2, 2)),
        (nn.InstanceNorm1d(3, track_running_stats=True), (4, 3, 6)),
        (nn.BatchNorm1d(3, track_running_stats=False), (8, 3)),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_normalisation_gives_what_it_gives_anyway_and_moves_nothing(layer, shape, training):
    net = nn.Sequential(layer).train(training)
    x = torch.randn(shape)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with frozen_statistics(net):
        replayed = net(x)
    assert_close(dict(net.state_dict()), before, rtol=0, atol=0)
    assert_close(replayed, net(x), rtol=0, atol=0)
    assert layer.training is training


def test_a_norm_in_training_mode_can_be_transformed():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    x = torch.randn(5, 3)
    with frozen_statistics(net):
        jacobians = torch.func.vmap(torch.func.jacrev(lambda a: net(a)[:, 0].sum()))(torch.stack([x, 2 * x]))
    assert jacobians.shape == (2, 5, 3)


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, spectral_norm])
def test_a_spectral_norm_in_training_mode_can_be_transformed_and_moves_nothing(wrap):
    torch.manual_seed(0)
    layer = wrap(nn.Conv2d(2, 3, 3, bias=False)).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    for _ in range(200):  # until the norm has converged
        layer(x)
    (name,) = dict(layer.named_parameters())
    w, kept = layer.get_parameter(name).detach(), [b.clone() for b in layer.buffers()]

    def objective(w):
        with frozen_statistics(layer):
            return functional_call(layer, {name: w}, (x,)).square().mean()

    at = w.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(at), at)
    direction = torch.randn_like(w)
    assert_close(grad(objective)(w), slope)
    assert_close(jvp(objective, (w,), (direction,))[1], (slope * direction).sum())
    curved, h = jvp(grad(objective), (w,), (direction,))[1], 1e-5
    ends = [grad(objective)(w + s * h * direction) for s in (1, -1)]
    assert_close(curved, (ends[0] - ends[1]) / (2 * h), rtol=1e-4, atol=1e-4 * float(curved.abs().max()))
    # away from the weights that the layer holds, and many at once, the norm is that of these weights
    far = torch.randn(2, *w.shape, dtype=w.dtype)
    exact = [
        nn.functional.conv2d(x, v / torch.linalg.matrix_norm(v.flatten(1), 2)).square().mean() for v in far
    ]
    assert_close(vmap(objective)(far), torch.stack(exact), rtol=1e-2, atol=0)
    with pytest.raises(RuntimeError, match="on purpose"), frozen_statistics(layer):
        layer(x)
        raise RuntimeError("on purpose")
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), kept, strict=True))
    assert "forward" not in vars(layer) and torch.allclose(layer(x).square().mean(), objective(w))


def test_other_buffers_are_restored_also_when_the_evaluation_fails():
    net = nn.Sequential(Counter(), nn.BatchNorm1d(3))
    mask, mean = net[0].mask, net[0].mean
    with pytest.raises(RuntimeError), frozen_statistics(net):
        net(torch.ones(2, 3))
        net(torch.ones(2, 4))
    assert float(net[0].calls) == 0 and net[0].mean is mean and net[0].mask is mask
    assert net[1].track_running_stats and int(net[1].num_batches_tracked) == 0
    assert mask._version == 0


def test_attention_can_be_differentiated_twice_and_forwards():
    q = torch.randn(2, 4, 8, dtype=torch.float64)

    def loss(a):
        return scaled_dot_product_attention(a, a, a).square().sum()

    with differentiable_kernels():
        _, forward = torch.func.jvp(torch.func.grad(loss), (q,), (q,))
        _, pull = torch.func.vjp(torch.func.grad(loss), q)
        (reverse,) = pull(q)
    assert_close(forward, reverse)  # the Hessian is symmetric


def test_an_lstm_can_be_differentiated_twice_and_forwards():
    lstm, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)

    def loss(a):
        return lstm(a)[0].square().sum()

    with differentiable_kernels(lstm):
        _, forward = torch.func.jvp(torch.func.grad(loss), (x,), (x,))
    a = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(a), a, create_graph=True)
    assert_close(forward, torch.autograd.grad(first, a, x)[0], rtol=1e-4, atol=1e-5)


def test_kernels_are_as_before_afterwards_and_only_switched_where_needed():
    before = torch.backends.mkldnn.enabled
    with differentiable_kernels(nn.Conv2d(1, 1, 1)):
        assert torch.backends.mkldnn.enabled == before
    with pytest.raises(KeyError), differentiable_kernels(nn.Sequential(nn.LSTM(1, 1))):
        assert not torch.backends.mkldnn.enabled
        raise KeyError
    assert torch.backends.mkldnn.enabled == before


def test_a_stored_state_gives_the_same_numbers_and_goes_back():
    state = torch.get_rng_state()
    first = torch.rand(3)
    after = torch.get_rng_state()
    with same_randomness(state):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_seed_gives_the_numbers_of_its_generator():
    outside = torch.get_rng_state()
    with same_randomness(5, torch.device("cpu")):
        drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(torch.get_rng_state(), outside)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_numbers_drawn_on_a_gpu_repeat_and_go_back():
    device = torch.device("cuda", 0)
    outside = torch.cuda.get_rng_state(device)
    draws = []
    for state in (5, 5, outside):
        with same_randomness(state, device):
            draws.append(torch.rand(3, device=device))
    assert torch.equal(draws[0], draws[1]) and torch.equal(torch.cuda.get_rng_state(device), outside)
    assert torch.equal(draws[2], torch.rand(3, device=device))
