"""Predicted training against training itself, and against the closed forms of small kernels."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, ShapeError
from bolza.meanfield.kernels import empirical_ntk, linearized, two_layer_gram

LOSSES = {
    "mean": F.mse_loss,
    "sum": lambda f, y: F.mse_loss(f, y, reduction="sum"),
    "half": lambda f, y: 0.5 * (f - y).square().sum(),
}


def features(width: int = 30, outputs: int = 2, seed: int = 0) -> nn.Sequential:
    """Linear in the parameters that train, so that the theory is exact."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, outputs)).double()
    net[0].requires_grad_(False)
    return net


def problem(n: int = 8, outputs: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x, x_new = (torch.randn(k, 3, dtype=torch.float64, generator=draw) for k in (n, 4))
    return x, torch.randn(n, outputs, dtype=torch.float64, generator=draw), x_new


def train(model, x, y, loss, lr, steps, momentum=0.0):
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=momentum)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("outputs", ["full", "mean"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("reduction", LOSSES)
def test_descent_on_a_model_linear_in_its_parameters_is_predicted_exactly(reduction, momentum, outputs):
    model, (x, y, x_new) = features(), problem()
    theory = linearized(model, x, y, reduction=reduction, outputs=outputs)
    lr = 0.7 * theory.max_learning_rate(momentum)
    for steps in (0, 1, 7, 60):
        trained = train(model, x, y, LOSSES[reduction], lr, steps, momentum)
        for inputs in (None, x_new):
            found = theory.descent(steps, lr, inputs, momentum=momentum)
            torch.testing.assert_close(found, trained(x if inputs is None else inputs), rtol=1e-9, atol=1e-9)
        value = theory.loss(theory.descent(steps, lr, momentum=momentum))
        torch.testing.assert_close(value, LOSSES[reduction](trained(x), y), rtol=1e-8, atol=1e-12)


def test_scales_are_the_learning_rates_of_parameter_groups():
    model, (x, y, x_new) = features(), problem()
    scales = {"2.weight": 0.3, "2.bias": 4.0}
    theory = linearized(model, x, y, scales=scales)
    lr = 0.5 * theory.max_learning_rate()
    trained = copy.deepcopy(model)
    groups = [{"params": [trained.get_parameter(name)], "lr": lr * scale} for name, scale in scales.items()]
    optimizer = torch.optim.SGD(groups)
    for _ in range(20):
        optimizer.zero_grad()
        F.mse_loss(trained(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(theory.descent(20, lr, x_new), trained(x_new), rtol=1e-9, atol=1e-9)


def test_small_steps_follow_the_flow_at_first_order():
    model, (x, y, x_new) = features(), problem()
    theory = linearized(model, x, y)
    time = 5.0
    flow = theory.flow(time, x_new)
    errors = [
        float((theory.descent(steps, time / steps, x_new) - flow).abs().max()) for steps in (400, 800, 1600)
    ]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(1.0, abs=0.05)


def test_flow_of_two_samples_is_the_exponential_of_the_kernel():
    net = nn.Linear(2, 1).double()
    x = torch.tensor([[1.0, 0.0], [0.5, 1.0]], dtype=torch.float64)
    y = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    theory = linearized(net, x, y, reduction="half")
    theta, start = x @ x.T + 1, net(x).detach()
    for time in (0.0, 0.3, 4.0):
        expected = y + torch.linalg.matrix_exp(-time * theta) @ (start - y)
        torch.testing.assert_close(theory.flow(time), expected, rtol=1e-12, atol=1e-13)


def test_several_times_are_stacked_in_front():
    model, (x, y, x_new) = features(), problem()
    theory = linearized(model, x, y)
    many = theory.flow([0.0, 1.0, 2.0], x_new)
    assert many.shape == (3, 4, 2)
    torch.testing.assert_close(many[2], theory.flow(2.0, x_new))
    torch.testing.assert_close(many[0], model(x_new))
    assert theory.descent(torch.tensor([3, 4]), 0.1).shape == (2, 8, 2)
    assert theory.loss(theory.flow([0.0, 1.0])).shape == (2,)


def test_training_ends_where_the_limit_says():
    model, (x, y, x_new) = features(), problem()
    theory = linearized(model, x, y)
    torch.testing.assert_close(theory.limit(), y, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(theory.flow(math.inf, x_new), theory.limit(x_new), rtol=1e-6, atol=1e-6)
    weights = model[2]  # least squares from where training starts: the smallest change of weights and bias
    phi = torch.cat([model[:2](x), torch.ones(len(x), 1, dtype=x.dtype)], 1)
    change = torch.linalg.pinv(phi) @ (y - model(x))
    new = torch.cat([model[:2](x_new), torch.ones(len(x_new), 1, dtype=x.dtype)], 1) @ change
    torch.testing.assert_close(theory.limit(x_new), weights(model[:2](x_new)) + new, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_stability_limit_is_sharp(momentum):
    """On both sides of the limit by a hundredth, in the prediction and in training."""
    model, (x, y, _) = features(), problem()
    theory = linearized(model, x, y)
    limit = theory.max_learning_rate(momentum)
    start = float(theory.loss(theory.descent(0, limit)))
    for factor, stable in ((0.99, True), (1.01, False)):
        lr = factor * limit
        predicted = float(theory.loss(theory.descent(300, lr, momentum=momentum)))
        assert (predicted < start) is stable
        trained = train(model, x, y, F.mse_loss, lr, 300, momentum)
        assert (float(F.mse_loss(trained(x), y).detach()) < start) is stable


def test_a_mode_that_cannot_be_learnt_stays_where_it_is():
    x = torch.tensor([[1.0], [1.0]], dtype=torch.float64)  # one input, two targets
    y = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    theory = linearized(nn.Linear(1, 1).double(), x, y)
    half = torch.full((2, 1), 0.5, dtype=torch.float64)
    torch.testing.assert_close(theory.limit(), half)
    torch.testing.assert_close(theory.flow(math.inf), half)
    torch.testing.assert_close(theory.limit(x[:1]), half[:1])


def test_training_the_model_afterwards_changes_no_prediction():
    model, (x, y, x_new) = features(), problem()
    theory = linearized(model, x, y)
    before = theory.flow(1.0, x_new)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert torch.equal(theory.flow(1.0, x_new), before)


def test_outputs_keep_their_shape_and_precision():
    net, x = (
        nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6), nn.Unflatten(1, (2, 3))),
        torch.randn(5, 3),
    )
    theory = linearized(net, x, torch.zeros(5, 2, 3))
    out = theory.flow([1.0, 2.0], x[:2])
    assert out.shape == (2, 2, 2, 3) and out.dtype == torch.float32
    single = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    assert linearized(single, x, torch.zeros(5)).flow(1.0).shape == (5,)


def test_the_gap_to_a_trained_network_falls_with_its_width():
    """One hidden layer, descent at half the limit: the gap at width 4096 is well below that at 64."""
    x, y, _ = problem(6, 1)
    gaps = []
    for width in (64, 4096):
        rows = []
        for seed in range(4):
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1)).double()
            nn.init.normal_(net[0].weight), nn.init.normal_(net[2].weight, std=width**-0.5)
            theory = linearized(net, x, y)
            lr = 0.5 * theory.max_learning_rate()
            trained = train(net, x, y, F.mse_loss, lr, 60)(x).detach()
            rows.append(float((trained - theory.descent(60, lr)).square().mean()))
        gaps.append((sum(rows) / len(rows)) ** 0.5)
    assert gaps[1] < 0.3 * gaps[0]  # width to the power −1/2 would give 0.125


class TestTwoLayerGram:
    def test_its_eigenvalues_at_inner_product_one_half_are_a_third_and_two_thirds(self):
        x = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)
        gram = two_layer_gram(x)
        expected = torch.tensor([[1 / 2, 1 / 6], [1 / 6, 1 / 2]], dtype=torch.float64)
        torch.testing.assert_close(gram, expected, rtol=1e-14, atol=1e-14)
        values = torch.linalg.eigvalsh(gram)
        torch.testing.assert_close(
            values, torch.tensor([1 / 3, 2 / 3], dtype=torch.float64), rtol=0, atol=1e-14
        )

    def test_it_is_the_mean_of_the_kernel_of_finite_networks(self):
        x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        width, found = 4000, []
        for seed in range(8):
            torch.manual_seed(seed)
            net = nn.Sequential(
                nn.Linear(3, width, bias=False), nn.ReLU(), nn.Linear(width, 1, bias=False)
            ).double()
            nn.init.normal_(net[0].weight)
            with torch.no_grad():
                net[2].weight.copy_(torch.randn(1, width).sign() / width**0.5)
            found.append(empirical_ntk(net, x, params=["0"]))
        stack = torch.stack(found)
        z = (stack.mean(0) - two_layer_gram(x)) / (stack.std(0) / len(found) ** 0.5).clamp_min(1e-12)
        assert float(z.abs().max()) < 5

    def test_two_sets_and_inputs_of_any_length(self):
        x, z = torch.randn(3, 5), torch.randn(2, 5)
        both = two_layer_gram(torch.cat([x, z]))
        torch.testing.assert_close(two_layer_gram(x, z), both[:3, 3:])
        torch.testing.assert_close(two_layer_gram(2 * x, z), 2 * both[:3, 3:])
        assert float(two_layer_gram(torch.zeros(1, 5), x).abs().max()) == 0
        with pytest.raises(ShapeError, match="one length"):
            two_layer_gram(x, z[:, :2])


class TestBadInput:
    net, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)

    def test_labels(self):
        with pytest.raises(ArgumentError, match="one_hot"):
            linearized(self.net, self.x, torch.tensor([0, 1, 1, 0]))

    def test_shapes(self):
        with pytest.raises(ShapeError, match="2 outputs each"):
            linearized(self.net, self.x, self.y[:, :1])

    def test_options(self):
        with pytest.raises(ArgumentError, match="'all'"):
            linearized(self.net, self.x, self.y, outputs="all")
        with pytest.raises(ArgumentError, match="'none'"):
            linearized(self.net, self.x, self.y, reduction="none")

    def test_a_kernel_that_is_too_large(self):
        x = torch.zeros(5000, 3)
        with pytest.raises(ArgumentError, match="outputs='mean'"):
            linearized(self.net, x, torch.zeros(5000, 2))

    def test_times_steps_and_momentum_out_of_range(self):
        theory = linearized(self.net, self.x, self.y)
        with pytest.raises(ArgumentError, match="time is -1"):
            theory.flow(-1.0)
        with pytest.raises(ArgumentError, match="steps is 1.5"):
            theory.descent(1.5, 0.1)
        with pytest.raises(ArgumentError, match="lr is nan"):
            theory.descent(1, math.nan)
        with pytest.raises(ArgumentError, match="momentum is 1"):
            theory.max_learning_rate(1.0)
