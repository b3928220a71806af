"""A stack of networks trains as each would alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError
from bolza.models import mlp
from bolza.training import BatchOrder, ensemble_parameters
from bolza.training.stacked import StackedMLP, draw, quick_is_right, resolve

VARS = torch.tensor([1.0, 1.7, 3.0], dtype=torch.float64)
RATES = torch.tensor([0.1, 0.2, 0.05], dtype=torch.float64)
SEEDS = [1, 1, 2]
BIAS = torch.full((3,), 0.05, dtype=torch.float64)


def alone(activation, x, y, loss, momentum, outputs, steps):
    """The same networks one by one, the obvious way."""
    nets = []
    for w, rate, seed in zip(VARS.tolist(), RATES.tolist(), SEEDS, strict=True):

        def make():
            return mlp(4, 12, activation, 7, outputs).to(x.dtype)

        net = make()
        start = ensemble_parameters(make, [w], 0.05, seed=seed)
        net.load_state_dict({name: p[0] for name, p in start.items()})
        optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=momentum)
        order = BatchOrder(x, y, 32, 0)
        for _ in range(steps):
            batch, target = order.next()
            optimizer.zero_grad()
            loss(net(batch), target).backward()
            optimizer.step()
        nets.append(net)
    return nets


def differences(activation, dtype, loss=F.cross_entropy, momentum=0.0, quick=False, steps=20):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 7, generator=generator, dtype=dtype)
    outputs = 3
    y = (
        torch.randint(outputs, (200,), generator=generator)
        if loss is not F.mse_loss
        else torch.randn(200, outputs, generator=generator, dtype=dtype)
    )
    weights, biases = draw([7, 12, 12, 12, outputs], VARS, BIAS, SEEDS, x)
    stack = StackedMLP(
        weights, biases, "tanh" if activation is nn.Tanh else activation, RATES, momentum, loss, quick
    )
    order = BatchOrder(x, y, 32, 0)
    for _ in range(steps):
        stack.step(*order.next())
    nets = alone(activation, x, y, loss, momentum, outputs, steps)
    worst = 0.0
    for m, net in enumerate(nets):
        linear = [layer for layer in net if isinstance(layer, nn.Linear)]
        for i, layer in enumerate(linear):
            worst = max(worst, float((stack.weights[i][m].T - layer.weight.detach()).abs().max()))
            worst = max(worst, float((stack.biases[i][m, 0] - layer.bias.detach()).abs().max()))
        worst = max(worst, float((stack.outputs(x)[m] - net(x).detach()).abs().max()))
    return worst


@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid", "gelu", "hardtanh", "identity"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_each_member_equals_a_network_trained_alone_to_rounding(activation, momentum):
    assert differences(activation, torch.float64, momentum=momentum) < 1e-11


@pytest.mark.parametrize("quick", [False, True])
def test_each_member_equals_a_network_trained_alone_in_float32(quick):
    # twenty steps carry roundings of 6e-8 through four layers
    assert differences("tanh", torch.float32, momentum=0.9, quick=quick) < 1e-4
    assert differences("tanh", torch.float32, quick=quick) < 1e-5


def test_the_quick_tanh_is_right_in_double_precision_too():
    assert differences("tanh", torch.float64, quick=True) < 1e-11


@pytest.mark.parametrize("loss", [F.mse_loss, lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1)])
def test_other_losses_give_the_same_networks_as_well(loss):
    assert differences("tanh", torch.float64, loss=loss) < 1e-11


def test_the_update_is_proportional_to_the_rate_of_the_member():
    x, y = torch.randn(8, 7, dtype=torch.float64), torch.zeros(8, dtype=torch.long)
    moved = []
    for rates in (RATES, 2 * RATES):
        weights, biases = draw([7, 3], VARS, BIAS, SEEDS, x)
        before = weights[0].clone()
        StackedMLP(weights, biases, "tanh", rates).step(x, y)
        moved.append(weights[0] - before)
    torch.testing.assert_close(moved[1], 2 * moved[0])


def test_draws_are_those_of_the_ensemble():
    x = torch.zeros(1, 7)
    weights, biases = draw([7, 5, 2], torch.tensor([2.0]), torch.tensor([0.3]), [4], x)
    start = ensemble_parameters(lambda: mlp(2, 5, "tanh", 7, 2), [2.0], 0.3, seed=4)
    for i, layer in enumerate(("0", "2")):
        torch.testing.assert_close(weights[i][0].T, start[f"{layer}.weight"][0])
        torch.testing.assert_close(biases[i][0, 0], start[f"{layer}.bias"][0])


def test_a_member_that_diverges_does_not_touch_the_others():
    x, y = torch.randn(32, 7), torch.randint(3, (32,))
    results = []
    for rates in ([0.1, 1e30], [0.1, 0.1]):
        weights, biases = draw([7, 12, 12, 3], VARS[:2], torch.full((2,), 0.05), [1, 1], x)
        stack = StackedMLP(weights, biases, "relu", torch.tensor(rates))
        for _ in range(5):
            stack.step(x, y)
        results.append(stack)
    assert not results[0].outputs(x)[1].isfinite().all()
    assert torch.equal(results[0].outputs(x)[0], results[1].outputs(x)[0])


def test_activations_are_recognised_in_every_spelling():
    for spelling in ("tanh", "TANH", nn.Tanh, nn.Tanh(), torch.tanh):
        assert resolve(spelling)[0] == "tanh"
    assert resolve("gelu")[0] == "" and resolve(torch.sin)[1] is torch.sin
    with pytest.raises(ArgumentError, match="choose one of tanh"):
        resolve("tahn")
    with pytest.raises(ArgumentError, match="has parameters"):
        resolve(nn.PReLU())
    with pytest.raises(ArgumentError, match="no name, module or function"):
        resolve(3)


def test_an_activation_that_works_in_place_is_taken():
    x, y = torch.randn(8, 7), torch.randint(3, (8,))
    made = []
    for activation in (nn.ELU(inplace=True), nn.ELU()):
        weights, biases = draw([7, 6, 3], VARS, BIAS, SEEDS, x)
        StackedMLP(weights, biases, activation, RATES).step(x, y)
        made.append(weights[0])
    assert torch.equal(*made)


def test_the_quick_tanh_needs_biases():
    assert quick_is_right(torch.tensor([0.05, 0.1]))
    assert not quick_is_right(torch.tensor([0.05, 0.0]))
