"""SGD as a sampler: the rate that it finds, the law it then rests at, and what it owes its user."""

import pytest
import torch
from torch import nn

from bolza.bayes import ConstantSGD
from bolza.bayes.constant_rate import constant_rate
from bolza.core.errors import ArgumentError, DivergenceError, UnsupportedError
from bolza.sde import posterior_rate
from bolza.testing import check_optimizer

F = torch.float64
CHAINS = 3000


def run(a, v, steps, warmup=0, chains=CHAINS, **settings):
    """Chains side by side at a minimum of curvatures a, with gradients of variances v."""
    draw = torch.Generator().manual_seed(1)
    w = nn.Parameter(torch.zeros(chains, len(a), dtype=F))
    optimizer = torch.optim.SGD([w], lr=settings["lr"], momentum=settings.get("momentum", 0.0))
    sampler = ConstantSGD([w], num_data=100, prior_precision=0.0, **settings)
    for k in range(-warmup, steps):
        w.grad = a * w.detach() + v.sqrt() * torch.randn(w.shape, generator=draw, dtype=F)
        (optimizer if k < 0 else sampler).step()
    return sampler, w.detach()


def test_the_rate_is_that_of_the_formula():
    c = torch.tensor([[1.0, 0.2], [0.2, 0.6]])
    assert constant_rate(float(c.trace()) / 10, 2, 1000) == pytest.approx(0.025)
    assert constant_rate(float(c.trace()) / 7, 2, 500, momentum=0.8) == pytest.approx(
        posterior_rate(c, samples=500, batch_size=7, momentum=0.8)
    )


@pytest.mark.parametrize(("lr", "momentum"), [(0.1, 0.0), (0.5, 0.0), (0.2, 0.8)])
def test_the_noise_is_measured_exactly_at_rest_also_near_the_largest_stable_rate(lr, momentum):
    a, v = torch.tensor([3.0, 1.0], dtype=F), torch.tensor([1.0, 2.0], dtype=F)
    sampler, _ = run(a, v, 152, lr=lr, momentum=momentum, adapt=150, warmup=50)
    wanted = constant_rate(1.5, 1, 100, momentum=momentum)
    assert sampler.rates()[0] == pytest.approx(wanted, rel=0.02)  # plain differences would be off by 1 + 3η


def test_it_rests_at_the_posterior_up_to_the_step():
    a, v = torch.tensor([3.0, 1.0], dtype=F), torch.tensor([1.0, 1.0], dtype=F)
    sampler, w = run(a, v, 300, lr=0.1, adapt=50)
    eta = sampler.rates()[0]
    exact = eta * v / (a * (2 - eta * a))
    z = (w.var(0) / exact - 1) / (2 / CHAINS) ** 0.5
    assert bool((z.abs() < 4).all())
    torch.testing.assert_close(exact, 1 / (100 * a), rtol=0.04, atol=0)


def test_a_rate_for_every_weight_samples_where_a_single_one_cannot():
    a, v = torch.tensor([2.0, 2.0], dtype=F), torch.tensor([0.4, 3.6], dtype=F)
    _, single = run(a, v, 600, lr=0.1, adapt=200, chains=1000)
    ratio = 200 * single.var(0)
    torch.testing.assert_close(ratio, v / v.mean(), rtol=0.15, atol=0)  # only the mean of the two is right
    sampler, own = run(a, v, 600, lr=0.1, adapt=200, chains=1000, rule="diagonal")
    found = (
        (sampler._own_rate(sampler.param_groups[0], sampler.param_groups[0]["params"][0])).median(0).values
    )
    torch.testing.assert_close(found, 0.02 / v, rtol=0.05, atol=0)
    # 200 steps leave a tenth of error in each V, whose inverse is larger on average by 2/200
    torch.testing.assert_close(100 * a * own.var(0), torch.ones(2, dtype=F), rtol=0.2, atol=0)


def test_until_the_noise_is_known_it_is_sgd_bit_for_bit():
    start = torch.randn(5, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    sampler = ConstantSGD([ours], lr=0.1, num_data=50, prior_precision=0.0, momentum=0.5, adapt=10)
    other = torch.optim.SGD([theirs], lr=0.1, momentum=0.5)
    for k in range(10):
        ours.grad, theirs.grad = ours.detach() * (1 + k), theirs.detach() * (1 + k)
        sampler.step()
        other.step()
        torch.testing.assert_close(ours, theirs)


def test_on_batches_of_data_it_finds_the_rate_of_the_known_noise_and_the_spread_of_the_posterior():
    draw = torch.Generator().manual_seed(2)
    n, d, batch = 2000, 5, 10
    x = torch.randn(n, d, dtype=F, generator=draw)
    y = x.sum(1) + torch.randn(n, dtype=F, generator=draw)
    mode = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    each = (x @ mode - y)[:, None] * x
    wanted = posterior_rate(each.T @ each / n, samples=n, batch_size=batch)
    w = nn.Parameter(mode.repeat(200, 1))
    sampler = ConstantSGD([w], lr=0.05, num_data=n, prior_precision=0.0, adapt=60)
    for _ in range(460):
        pick = torch.randint(n, (200, batch), generator=draw)
        w.grad = (
            torch.einsum("cb,cbd->cd", torch.einsum("cbd,cd->cb", x[pick], w.detach()) - y[pick], x[pick])
            / batch
        )
        sampler.step()
    assert sampler.rates()[0] == pytest.approx(wanted, rel=0.1)
    white = (w.detach() - mode) @ torch.linalg.cholesky(x.T @ x)
    assert float(white.square().mean()) == pytest.approx(1.01, abs=0.15)


@pytest.mark.parametrize("rule", ["scalar", "diagonal"])
def test_it_stands_where_an_optimizer_stands(rule):
    # a batch that never changes has no noise, so that the rate stays as it is
    check_optimizer(lambda p: ConstantSGD(p, lr=0.05, num_data=1000, momentum=0.5, rule=rule, adapt=100))


def test_a_rate_that_comes_out_too_large_is_capped_with_a_warning():
    a, v = torch.tensor([1.0], dtype=F), torch.tensor([1e-4], dtype=F)
    with pytest.warns(UserWarning, match="too small to sample with"):
        sampler, _ = run(a, v, 13, lr=0.1, adapt=10)
    assert sampler.rates() == [0.1] and sampler.noise_excess() == 0.0


def test_it_resumes_with_the_rate_that_it_found():
    a, v = torch.tensor([1.0], dtype=F), torch.tensor([1.0], dtype=F)
    sampler, w = run(a, v, 40, lr=0.1, adapt=30)
    assert 0 < sampler.noise_excess() < 1
    other = ConstantSGD([nn.Parameter(w.clone())], lr=0.1, num_data=100, adapt=30)
    other.load_state_dict(sampler.state_dict())
    assert other.rates() == sampler.rates() != [0.1]


def test_settings_that_make_no_sense_are_named():
    w = nn.Parameter(torch.zeros(2))
    for settings, word in (
        ({"momentum": 1.0}, "momentum"),
        ({"rule": "full"}, "rule"),
        ({"adapt": 1}, "adapt"),
        ({"temperature": 0.0}, "temperature"),
    ):
        with pytest.raises(ArgumentError, match=word):
            ConstantSGD([w], lr=0.1, num_data=10, **settings)
    sampler = ConstantSGD([w], lr=0.1, num_data=10, adapt=3)
    with pytest.raises(UnsupportedError, match="not measured"):
        sampler.noise_excess()
    with pytest.raises(DivergenceError, match="smaller rate"):
        for k in range(5):
            w.grad = torch.full((2,), float("nan") if k == 1 else 1.0)
            sampler.step()
