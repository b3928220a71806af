"""The batch size as a control: the laws worn over optimizers, samplers and a real run."""

import math

import pytest
import torch
from torch import nn

from bolza.controllers import BatchSizeController, csgd_batch_size
from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.data import AdjustableBatchSampler, digits
from bolza.sde import gradient_noise
from bolza.testing import check_controller


class Size:
    def __init__(self, batch_size, samples=None):
        self.batch_size, self.samples = batch_size, samples


class Fixed:
    """Noise that is known: tr Σ and |∇f|²."""

    def __init__(self, noise, signal):
        self.both = noise, signal

    def trace(self):
        return type("E", (), {"value": self.both[0]})

    def squared_gradient(self):
        return type("E", (), {"value": self.both[1]})


def worn(lr=0.1, optimizer=torch.optim.SGD, batch=4, noise=None, samples=None, options=(), **settings):
    weight = torch.ones(3, requires_grad=True)
    made = optimizer([weight], lr=lr, **dict(options))
    size = Size(batch, samples)
    settings = {"every": 1, "growth": 1e9} | settings
    known = noise or Fixed(8.0, 2.0)
    return made, size, BatchSizeController(made, size, noise=lambda: known, **settings)


def steps(made, controller, count=2, loss=0.01):
    for _ in range(count):
        for group in made.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        made.step()
        action = controller.step(loss=loss)
    return action


def test_each_law_sets_the_batch_of_its_formula():
    made, size, controller = worn()
    assert steps(made, controller) == {"batch_size": 40}  # 0.1 · 8 / (2 · 0.01)
    assert size.batch_size == 40 == csgd_batch_size(0.1, 8.0, 0.01)
    made, size, controller = worn(options={"momentum": 0.5})
    steps(made, controller)
    assert size.batch_size == 80
    made, size, controller = worn(floor=0.005)
    steps(made, controller)
    assert size.batch_size == 80
    made, size, controller = worn(law="noise_scale", noise=Fixed(100.0, 2.0))
    steps(made, controller)
    assert size.batch_size == 50
    made, size, controller = worn(law="curvature", curvature=lambda: 50.0)
    steps(made, controller)
    assert size.batch_size == 20  # 0.1 · 50 · 8/2
    made, size, controller = worn(law="price", curvature=2.0, price=1e-6, steps=2)
    steps(made, controller)
    assert size.batch_size == round(0.1 * math.sqrt(2 * 8 / 2e-6))


def test_decisions_are_bounded_in_factor_in_size_and_by_the_number_of_samples():
    made, size, controller = worn(growth=1.5, batch=8)
    seen = [steps(made, controller, 1) and size.batch_size for _ in range(5)]
    assert seen[1:] == [12, 18, 27, 40]  # the first gradient alone shows no noise
    made, size, controller = worn(largest=32, samples=20, lower_lr=False)
    steps(made, controller)
    assert size.batch_size == 20
    made, size, controller = worn(batch=64, smallest=16, noise=Fixed(1e-3, 1.0))
    steps(made, controller)
    assert size.batch_size == 16
    made, size, controller = worn(batch=64, noise=Fixed(1e-3, 1.0))
    steps(made, controller)
    assert size.batch_size == 64  # c-SGD does not go above its rate


def test_what_draws_the_batches_may_have_bounds_of_its_own():
    class Bounded(Size):
        @property
        def batch_size(self):
            return self.value

        @batch_size.setter
        def batch_size(self, value):
            self.value = min(value, 10)

    made, _, controller = worn()
    controller.attach_batches(Bounded(4))
    steps(made, controller, 5)
    assert controller.batches.batch_size == 10 and made.param_groups[0]["lr"] == pytest.approx(0.1 / 4)


def test_a_batch_that_may_not_grow_hands_over_to_the_rate_and_takes_it_back():
    made, size, controller = worn(largest=10)
    steps(made, controller)
    assert size.batch_size == 10 and made.param_groups[0]["lr"] == pytest.approx(0.1 / 4)
    steps(made, controller, 400, loss=0.16)
    assert size.batch_size == 4 and made.param_groups[0]["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize(("rule", "factor"), [("linear", 10.0), ("sqrt", 10**0.5)])
def test_the_rate_follows_the_noise_scale_where_asked(rule, factor):
    made, size, controller = worn(
        optimizer=torch.optim.Adam, law="noise_scale", noise=Fixed(80.0, 2.0), scale_lr=rule
    )
    steps(made, controller)
    assert size.batch_size == 40 and made.param_groups[0]["lr"] == pytest.approx(0.1 * factor)


def test_a_quadratic_is_held_where_the_noise_is_as_large_as_the_loss():
    # E f falls like exp(−aηk) and the batch grows as fast: the measured loop against the closed form
    a, lr, dim = 1.0, 0.05, 2000
    generator = torch.Generator().manual_seed(0)
    theta = torch.full((dim,), 0.5, dtype=torch.float64, requires_grad=True)
    optimizer, size = torch.optim.SGD([theta], lr=lr), Size(16)
    controller = BatchSizeController(optimizer, size, every=1, growth=1.2, beta=0.5)
    losses, sizes = [], []
    for _ in range(160):
        noise = torch.randn(dim, generator=generator, dtype=torch.float64) / size.batch_size**0.5
        theta.grad = a * theta.detach() + noise
        losses.append(float(a * theta.detach().square().sum() / 2))
        optimizer.step()
        controller.step(loss=losses[-1])
        sizes.append(size.batch_size)
    rate = math.log(losses[-60] / losses[-1]) / 59
    assert rate == pytest.approx(-math.log(1 - lr * a + (lr * a) ** 2), rel=0.15)
    assert math.log(sizes[-1] / sizes[-60]) / 59 == pytest.approx(rate, rel=0.15)


def test_gradients_of_mini_batches_tell_the_noise_that_single_samples_tell():
    data = digits()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-5)
    sampler = AdjustableBatchSampler(1438, 16)
    controller = BatchSizeController(optimizer, sampler, law="noise_scale", every=1000, beta=0.97)
    for batch in sampler:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(data.train_x[batch]), data.train_y[batch])
        loss.backward()
        optimizer.step()
        controller.step()
    exact = gradient_noise(net, nn.functional.cross_entropy, (data.train_x, data.train_y))
    assert controller.tracker.noise == pytest.approx(exact.trace().value, rel=0.1)
    assert controller.tracker.signal == pytest.approx(exact.squared_gradient().value, rel=0.2)


def test_it_keeps_the_contract_of_a_controller():
    check_controller(lambda optimizer: BatchSizeController(optimizer, every=2, growth=2.0, largest=32))


def test_what_makes_no_sense_is_refused():
    for settings, match in (
        ({"law": "noise"}, "law='noise'"),
        ({"law": "curvature"}, "needs curvature"),
        ({"law": "price", "curvature": 1.0}, "price="),
        ({"scale_lr": "linear"}, "scale_lr='linear'"),
        ({"smallest": 8, "largest": 4}, "smallest=8"),
        ({"growth": 1.0}, "growth=1.0"),
    ):
        with pytest.raises(ArgumentError, match=match):
            worn(**settings)
    with pytest.raises(UnsupportedError, match="Adam"):
        worn(optimizer=torch.optim.Adam, law="loss")
    made, _, controller = worn()
    with pytest.raises(ArgumentError, match="step\\(loss=loss\\)"):
        steps(made, controller, loss=None)
    weight = torch.ones(1, requires_grad=True)
    made = torch.optim.SGD([weight], lr=0.1)
    controller = BatchSizeController(made)
    with pytest.raises(ArgumentError, match="attach_batches"):
        steps(made, controller)


def test_a_smaller_last_batch_of_an_epoch_counts_with_its_own_size():
    generator, weight = torch.Generator().manual_seed(0), torch.zeros(100, requires_grad=True)
    made, sampler = torch.optim.SGD([weight], lr=1.0), AdjustableBatchSampler(100, 64)
    controller = BatchSizeController(made, sampler, law="noise_scale", every=10**6, beta=0.99)
    for _ in range(100):
        data = torch.randn(100, 100, generator=generator)
        for batch in sampler:
            weight.grad = data[batch].mean(0)
            made.step()
            controller.step()
    assert controller.tracker.noise == pytest.approx(100, rel=0.05)  # 139 if both had the size of the first


def test_a_loader_is_taken_by_its_sampler_if_that_changes_size():
    made, size, controller = worn()
    sampler = AdjustableBatchSampler(8, 2)
    controller.attach_batches(torch.utils.data.DataLoader(range(8), batch_sampler=sampler))
    assert controller.batches is sampler
    with pytest.raises(ArgumentError, match="AdjustableBatchSampler"):
        controller.attach_batches(torch.utils.data.DataLoader(range(8), batch_size=2))
