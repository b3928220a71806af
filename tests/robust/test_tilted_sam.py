"""Tilted sharpness-aware minimisation: the quadratic, its special cases, and what an optimizer owes its user."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError, UnsupportedError
from bolza.robust import TiltedSAM, tilted_quadratic

D = torch.float64
LAM, THETA = torch.tensor([4.0, 1.0, 0.25], dtype=D), torch.tensor([0.5, -1.0, 2.0], dtype=D)


def bowl(optimizer, weight, lam=LAM):
    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (lam * weight**2).sum()
        loss.backward()
        return loss

    return closure


def slopes(steps, **settings):
    weight = nn.Parameter(THETA.clone())
    optimizer = TiltedSAM(torch.optim.SGD([weight], lr=0.0), rho=0.3, **settings)
    found = []
    for _ in range(steps):
        optimizer.step(bowl(optimizer, weight))
        found.append(weight.grad.clone())
    return torch.stack(found), optimizer


def test_the_quadratic_has_its_published_values_and_the_gradient_of_its_value():
    for t, value in ((0.0, 1.736250), (0.5, 1.894814), (1.0, 2.123887), (2.0, 3.298396)):
        assert abs(float(tilted_quadratic(LAM, THETA, t, 0.3)[0]) - value) < 1e-6
    theta = THETA.clone().requires_grad_()
    value, slope = tilted_quadratic(LAM, theta, 0.5, 0.3)
    assert torch.allclose(torch.autograd.grad(value, theta)[0], slope)
    assert torch.allclose(slope, torch.tensor([2.439024, -1.047120, 0.505689], dtype=D), atol=1e-6)
    with pytest.raises(ArgumentError, match="infinite"):
        tilted_quadratic(LAM, THETA, 3.0, 0.3)
    with pytest.raises(ShapeError):
        tilted_quadratic(LAM, THETA[:2], 1.0, 0.3)


def test_gaussian_draws_have_the_closed_form_gradient_on_average():
    found, _ = slopes(30, sampler="gaussian", samples=40, tilt=0.5)
    error = found.std(0) / len(found) ** 0.5
    z = (found.mean(0) - tilted_quadratic(LAM, THETA, 0.5, 0.3)[1]).abs() / error
    assert float(z.max()) < 4.5


def test_the_hamiltonian_chain_has_the_closed_form_gradient_on_average_with_few_samples():
    found, _ = slopes(40, sampler="hamiltonian", samples=8, leapfrog=3, tilt=1.0)
    exact, flat = (tilted_quadratic(LAM, THETA, t, 0.3)[1] for t in (1.0, 0.0))
    later = found.mean(0)
    error = found.std(0) / len(found) ** 0.5
    assert (
        float(((later - exact).abs() / error).max()) < 5
    )  # eight samples forget the start up to a few per cent
    assert float((later - flat).norm()) > 0.7 * float((exact - flat).norm())


def test_one_sample_without_a_radius_is_sharpness_aware_minimisation_bit_for_bit():
    one, two = nn.Parameter(THETA.clone()), nn.Parameter(THETA.clone())
    wrapped = TiltedSAM(torch.optim.SGD([one], lr=0.1, momentum=0.9), rho=0.3, radius=0.0, samples=1)
    plain = torch.optim.SGD([two], lr=0.1, momentum=0.9)
    for _ in range(5):
        wrapped.step(bowl(wrapped, one))
        slope = LAM * two.detach()
        two.grad = LAM * (two.detach() + slope * (0.3 / (slope.square().sum().sqrt() + 1e-12)))
        plain.step()
    assert torch.equal(one, two)


def test_no_tilt_is_the_plain_mean_an_infinite_one_the_worst_sample_and_the_rest_the_softmax():
    for t in (0.0, 7.0, -7.0, math.inf, -math.inf):
        places = []
        weight = nn.Parameter(THETA.clone())
        optimizer = TiltedSAM(torch.optim.SGD([weight], lr=0.1), rho=0.3, samples=4, tilt=t)
        inner = bowl(optimizer, weight)

        def closure(places=places, weight=weight, inner=inner):
            places.append(weight.detach().clone())
            return inner()

        optimizer.step(closure)
        assert len(places) == 8
        at = torch.stack(places[1::2])
        losses = 0.5 * (LAM * at**2).sum(1)
        assert torch.allclose(torch.tensor(optimizer.losses, dtype=D), losses)
        hard = F.one_hot(losses.argmax() if t > 0 else losses.argmin(), 4).to(D)
        w = hard if math.isinf(t) else torch.softmax(t * losses, 0)
        assert torch.allclose(weight.grad, (w[:, None] * LAM * at).sum(0), atol=1e-12)
        assert torch.allclose(weight, THETA - 0.1 * weight.grad)
        assert torch.allclose((torch.stack(places[::2]) - THETA).norm(dim=1), torch.tensor(0.3, dtype=D))


def network(dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3), nn.Linear(3, 3)
        ).to(dtype)
        net[0].bias.requires_grad_(False)
        net[5].weight = nn.Parameter(torch.eye(3, dtype=dtype))
        return net, torch.randn(16, 4, dtype=dtype), torch.arange(16) % 3


def stepper(net, x, y, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)


def test_running_statistics_see_one_pass_and_random_numbers_are_those_of_one_pass():
    net, x, y = network()
    optimizer = TiltedSAM(torch.optim.SGD(net.parameters(), lr=0.1), model=net)
    torch.manual_seed(3)
    stepper(net, x, y, optimizer)()
    state = torch.get_rng_state()
    assert int(net[1].num_batches_tracked) == 1
    torch.manual_seed(3)
    net(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training and net[1].track_running_stats


@pytest.mark.parametrize("sampler", ["ascent", "gaussian", "ball", "hamiltonian"])
def test_every_sampler_trains_repeats_and_resumes_bit_for_bit(sampler):
    def make():
        net, x, y = network(D)
        base = torch.optim.Adam(net.parameters(), lr=0.01)
        optimizer = TiltedSAM(base, rho=0.02, samples=2, sampler=sampler, model=net)
        return net, optimizer, stepper(net, x, y, optimizer)

    net, optimizer, step = make()
    frozen = net[0].bias.clone()
    torch.manual_seed(0)
    first = [float(step().detach()) for _ in range(3)]
    assert first[-1] < first[0]
    assert torch.equal(net[0].bias, frozen)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    state = torch.get_rng_state()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    step()
    again, resumed, step_again = make()
    again.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    torch.set_rng_state(state)
    step_again()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert resumed.param_groups[0]["tilted_steps"] == 4


def test_schedulers_groups_and_copies_work_on_the_wrapper():
    net, x, y = network()
    optimizer = TiltedSAM(torch.optim.SGD(net[0].parameters(), lr=0.1), model=net)
    optimizer.add_param_group({"params": list(net[4].parameters()), "lr": 0.0})
    assert optimizer.base.param_groups is optimizer.param_groups and len(optimizer.param_groups) == 2
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    step, before = stepper(net, x, y, optimizer), net[4].weight.clone()
    step()
    scheduler.step()
    assert optimizer.base.param_groups[0]["lr"] == 0.05
    assert torch.equal(net[4].weight, before)
    other, twin = copy.deepcopy((net, optimizer))
    assert twin.model is other and twin.base.param_groups is twin.param_groups
    torch.manual_seed(1)
    step()
    torch.manual_seed(1)
    stepper(other, x, y, twin)()
    assert torch.equal(net[0].weight, other[0].weight)


def test_weights_are_put_back_when_a_loss_is_not_finite_and_mistakes_are_named():
    weight = nn.Parameter(THETA.clone())
    base = torch.optim.SGD([weight], lr=0.1)
    optimizer = TiltedSAM(base)
    with pytest.raises(DivergenceError, match="rho"):
        optimizer.step(lambda: weight.sum() * math.inf)
    assert torch.equal(weight, THETA)
    with pytest.raises(ArgumentError, match="step\\(closure\\)"):
        optimizer.step()
    with pytest.raises(ArgumentError, match="returned nothing"):
        optimizer.step(lambda: None)
    for settings in ({"rho": -1.0}, {"samples": 0}, {"sampler": "x"}, {"tilt": math.nan}):
        with pytest.raises(ArgumentError, match=next(iter(settings))):
            TiltedSAM(base, **settings)
    with pytest.raises(ArgumentError, match="base is a list"):
        TiltedSAM([weight])
    table = nn.Embedding(3, 2, sparse=True)
    with pytest.raises(UnsupportedError, match="sparse"):
        sparse = TiltedSAM(torch.optim.SGD(table.parameters(), lr=0.1))

        def closure():
            loss = table(torch.tensor([0])).sum()
            loss.backward()
            return loss

        sparse.step(closure)
