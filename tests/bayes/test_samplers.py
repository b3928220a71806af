"""The samplers: what they are at temperature 0, their law at rest, and what every optimizer owes its user."""

import copy
import math

import pytest
import torch
from torch import nn

from bolza.bayes import BAOAB, PSGLD, SGHMC, SGLD, SGNHT, CyclicalSchedule, stationary_variance
from bolza.bayes.baoab import baoab_step
from bolza.bayes.cyclical import cyclical_rate
from bolza.bayes.sghmc import sghmc_step
from bolza.bayes.sgld import sgld_step
from bolza.bayes.sgnht import sgnht_step
from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.testing import check_optimizer

F = torch.float64
ALL = {"SGLD": SGLD, "PSGLD": PSGLD, "SGHMC": SGHMC, "SGNHT": SGNHT, "BAOAB": BAOAB}


@pytest.mark.parametrize("name", ALL)
def test_a_sampler_stands_where_an_optimizer_stands(name):
    more = {} if name == "SGNHT" else {"noise_estimate": "running"}
    check_optimizer(lambda params: ALL[name](params, lr=0.02, num_data=10_000, seed=3, **more))
    check_optimizer(lambda params: ALL[name](params, lr=0.02, num_data=10_000))


def run(make, steps, start, gradient):
    w = nn.Parameter(start.clone())
    optimizer = make([w])
    for k in range(steps):
        w.grad = gradient(w.detach(), k)
        optimizer.step()
    return w.detach()


@pytest.mark.parametrize(
    ("sampler", "descent"),
    [
        (
            lambda p: SGLD(p, lr=0.1, num_data=50, prior_precision=2.0, temperature=0.0),
            lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.04),
        ),
        (
            lambda p: SGHMC(p, lr=0.1, num_data=50, prior_precision=2.0, temperature=0.0, friction=0.2),
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, weight_decay=0.04),
        ),
        (
            lambda p: PSGLD(p, lr=0.01, num_data=50, prior_precision=0.0, temperature=0.0, beta=0.9),
            lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9, eps=1e-5),
        ),
    ],
)
def test_at_temperature_zero_a_sampler_is_descent(sampler, descent):
    stiff = torch.tensor([3.0, 0.5], dtype=F)
    start = torch.tensor([1.0, -2.0], dtype=F)

    def gradient(w, k):
        return stiff * (w - 1)

    found = run(sampler, 20, start, gradient)

    def make(p):
        optimizer = descent(p)
        if isinstance(optimizer, torch.optim.RMSprop):  # ours starts at the first square, not at zero
            optimizer.state[p[0]] = {
                "step": torch.zeros(()),
                "square_avg": gradient(start, 0).square(),
            }
        return optimizer

    assert torch.allclose(found, run(make, 20, start, gradient), rtol=1e-12)


def test_baoab_at_temperature_zero_is_momentum_at_its_own_rate():
    """The velocity after each kick is that of momentum c with the rate η(1 + c)/2."""
    start, c = torch.tensor([1.0, -2.0], dtype=F), 0.7

    def gradient(w, k):
        return 2 * w

    ours = run(
        lambda p: BAOAB(p, 0.1, num_data=9, prior_precision=0, temperature=0, friction=0.3),
        15,
        start,
        gradient,
    )
    rate = 0.1 * (1 + c) / 2
    theirs = run(lambda p: torch.optim.SGD(p, lr=rate, momentum=c), 15, start, gradient)
    assert torch.allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("name", ["SGLD", "SGHMC", "BAOAB", "SGNHT"])
def test_the_optimizer_and_the_step_of_the_paper_are_one(name):
    N, lr, alpha, prior, T = 40, 0.3, 0.25, 2.0, 0.7
    friction = {} if name == "SGLD" else {"friction": alpha}
    w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=F))
    sampler = ALL[name]([w], lr=lr, num_data=N, prior_precision=prior, temperature=T, seed=5, **friction)
    h = math.sqrt(lr / N)
    gamma = (alpha if name == "SGHMC" else -math.log(1 - alpha)) / h
    theta, m = w.detach().clone(), torch.zeros(3, dtype=F)
    xi = torch.full((1,), gamma, dtype=F)
    from bolza.bayes._sampler import _normal

    for _ in range(5):
        w.grad = torch.sin(w.detach())
        xi_noise = _normal([w], sampler.param_groups[0], 0)[0]
        slope = N * torch.sin(theta) + prior * theta
        sampler.step()
        if name == "SGLD":
            theta = sgld_step(theta, slope, lr / N, xi_noise, T)
        elif name == "SGHMC":
            theta, m = sghmc_step(theta, m, slope, h, xi_noise, gamma, T)
        elif name == "BAOAB":
            theta, m = baoab_step(theta, m, slope, h, xi_noise, gamma, T)
        else:
            theta, m, xi = sgnht_step(theta, m, xi, slope, h, xi_noise, gamma, T)
        assert torch.allclose(w.detach(), theta, rtol=1e-11)


CHAINS = 20_000


def variance(make, precision, noise, steps, seed=0):
    """Empirical variance of many chains at rest, which are the coordinates of one parameter."""
    draw = torch.Generator().manual_seed(seed + 1)
    w = nn.Parameter(torch.randn(CHAINS, generator=draw) / precision**0.5)
    sampler = make([w])
    for _ in range(steps):
        w.grad = precision * w.detach() + noise**0.5 * torch.randn(CHAINS, generator=draw)
        sampler.step()
    return float(w.detach().var())


@pytest.mark.parametrize(
    ("name", "h", "noise", "corrected"),
    [
        ("sgld", 0.2, 0.0, False),
        ("sgld", 0.2, 4.0, False),
        ("sgld", 0.2, 4.0, True),
        ("sghmc", 0.2, 0.0, False),
        ("sghmc", 0.2, 4.0, True),
        ("baoab", 0.5, 0.0, False),
        ("baoab", 0.2, 1.0, True),
        ("baoab", 0.2, 4.0, False),
    ],
)
def test_a_chain_has_the_variance_of_its_own_law(name, h, noise, corrected):
    """Twenty thousand chains against the discrete Lyapunov equation: the error of a variance is v √(2/n)."""
    gamma = 1.0
    more = {"noise_estimate": noise} if corrected else {}
    if name == "sgld":
        make = lambda p: SGLD(p, lr=h, num_data=1, prior_precision=0, seed=2, **more)  # noqa: E731
    else:
        alpha = h * gamma if name == "sghmc" else 1 - math.exp(-h * gamma)
        kind = SGHMC if name == "sghmc" else BAOAB
        make = lambda p: kind(p, lr=h * h, num_data=1, prior_precision=0, friction=alpha, seed=2, **more)  # noqa: E731
    exact = stationary_variance(name, 3.0, h=h, friction=gamma, gradient_noise=noise, corrected=corrected)
    found = variance(make, 3.0, noise, steps=int(12 / (h * min(1.0, gamma))))
    assert abs(found - exact) < 4 * exact * math.sqrt(2 / CHAINS)


def test_the_noise_of_batches_is_estimated_coordinate_by_coordinate_and_taken_off():
    """The estimate tells noise from the motion of the chain, and brings the variance back to that without noise."""
    noise = torch.tensor([0.5, 4.0]).repeat_interleave(CHAINS // 2)
    found = {}

    def watch(p):
        found["w"] = p[0]
        found["sampler"] = BAOAB(
            p, 0.01, num_data=1, prior_precision=0, friction=0.3, noise_estimate="running", seed=0
        )
        return found["sampler"]

    variance(watch, 3.0, noise, steps=200)
    sampler, w = found["sampler"], found["w"].detach()
    state = sampler.state[found["w"]]
    estimate = (state["noise"] / (1 - 0.99 ** (state["seen"] - 1))).view(2, -1).mean(1)
    assert torch.allclose(estimate, torch.tensor([0.5, 4.0]), rtol=0.12)  # and O(λh²) for the motion
    assert torch.allclose(w.view(2, -1).var(1), torch.tensor(1 / 3), rtol=0.04)
    assert stationary_variance("baoab", 3.0, h=0.1, friction=3.57, gradient_noise=4.0) > 0.35
    assert sampler.noise_excess() == 0.0
    sampler.param_groups[0]["lr"] = (
        1.0  # now a kick brings 4 where a step may bring 0.51: half of the coordinates
    )
    assert 0.45 < sampler.noise_excess() < 1.0


def test_a_thermostat_finds_the_law_without_knowing_the_noise():
    make = lambda p: SGNHT(p, 0.01, num_data=1, prior_precision=0, friction=0.1, speed=4.0, seed=0)  # noqa: E731
    found = variance(make, 3.0, 4.0, steps=500)
    assert found == pytest.approx(1 / 3, rel=0.05)
    assert stationary_variance("baoab", 3.0, h=0.1, friction=1.05, gradient_noise=4.0) > 0.39


def test_a_frozen_metric_samples_the_right_law_where_curvatures_differ():
    stiff = torch.tensor([100.0, 1.0]).repeat_interleave(CHAINS // 2)
    w = nn.Parameter(torch.randn(CHAINS, generator=torch.Generator().manual_seed(1)) / stiff.sqrt())
    square = stiff  # E g² of the Gaussian law: the metric it comes to
    sampler = PSGLD([w], 0.02, num_data=1, prior_precision=0, adapt=1, eps=1e-8, seed=0)
    w.grad = square.sqrt()
    sampler.step()
    for _ in range(300):
        w.grad = stiff * w.detach()
        sampler.step()
    rate = 0.02 * stiff / stiff.sqrt()  # ηGλ
    exact = (1 / stiff / (1 - rate / 2)).view(2, -1)[:, 0]
    assert torch.allclose(w.detach().view(2, -1).var(1), exact, rtol=4 * math.sqrt(2 / (CHAINS / 2)))


def test_batches_of_real_data_give_the_posterior_of_a_linear_model():
    """Means and variances of a Bayesian linear regression with minibatches, against the closed form."""
    draw = torch.Generator().manual_seed(0)
    N, B, chains = 200, 50, 200
    x = torch.randn(N, 2, generator=draw)
    y = x @ torch.tensor([1.0, -0.5]) + torch.randn(N, generator=draw)
    precision = x.T @ x + torch.eye(2)
    mean = torch.linalg.solve(precision, x.T @ y)
    w = nn.Parameter(mean.repeat(chains, 1))
    sampler = BAOAB([w], lr=0.02, num_data=N, friction=0.2, noise_estimate="running", seed=1)
    kept = []
    for k in range(400):
        rows = torch.randint(N, (chains, B), generator=draw)  # every chain has batches of its own
        sampler.zero_grad()
        residual = (x[rows] @ w[..., None])[..., 0] - y[rows]
        (residual.square().mean(1) / 2).sum().backward()
        sampler.step()
        if k >= 200 and k % 20 == 0:
            kept.append(w.detach().clone())
    samples = torch.cat(kept)
    assert torch.allclose(samples.mean(0), mean, atol=0.02)
    assert torch.allclose(torch.cov(samples.T), torch.linalg.inv(precision), rtol=0.1, atol=1e-4)


def test_seeds_tell_chains_apart_and_a_copy_goes_on_as_its_original():
    def chain(seed):
        return run(lambda p: SGLD(p, 0.1, num_data=3, seed=seed), 3, torch.zeros(4), lambda w, k: w)

    assert torch.equal(chain(1), chain(1)) and not torch.equal(chain(1), chain(2))
    torch.manual_seed(0)
    assert not torch.equal(chain(None), chain(None))
    w = nn.Parameter(torch.zeros(2, 2))
    sampler = SGHMC([w], 0.1, num_data=3)
    pair = copy.deepcopy((w, sampler))
    for p, s in ((w, sampler), pair):
        p.grad = torch.ones(2, 2)
        s.step()
    assert torch.equal(w, pair[0])


def test_two_groups_have_noise_of_their_own_and_channels_last_is_kept():
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    sampler = SGLD([{"params": [a]}, {"params": [b], "prior_precision": 0.0}], 0.1, num_data=3, seed=0)
    a.grad, b.grad = torch.zeros(3), torch.zeros(3)
    sampler.step()
    assert not torch.equal(a, b)
    w = nn.Parameter(torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last))
    w.grad = torch.zeros_like(w)
    SGNHT([w], 0.1, num_data=3).step()
    assert w.is_contiguous(memory_format=torch.channels_last) and bool((w != 0).all())


def test_a_cyclical_schedule_explores_cold_and_samples_warm_and_resumes():
    assert [cyclical_rate(k, 9, 2)[1] for k in (0, 4, 5)] == [0.0, 0.8, 0.0]

    def make():
        w = nn.Parameter(torch.ones(5))
        sampler = BAOAB([w], 0.1, num_data=10, temperature=0.5, seed=0)
        return w, sampler, CyclicalSchedule(sampler, steps=20, cycles=2, exploration=0.6)

    def go(w, sampler, schedule, steps):
        phases = []
        for _ in range(steps):
            phases.append((schedule.sampling, sampler.param_groups[0]["temperature"], schedule.cycle))
            w.grad = w.detach().clone()
            sampler.step()
            schedule.step()
        return phases

    one = make()
    phases = go(*one, 20)
    assert [p[0] for p in phases] == ([False] * 6 + [True] * 4) * 2
    assert (
        all(t == (0.5 if s else 0.0) for s, t, _ in phases) and [p[2] for p in phases] == [0] * 10 + [1] * 10
    )
    half = make()
    go(*half, 7)
    again = make()
    again[0].data.copy_(half[0].data)
    again[1].load_state_dict(half[1].state_dict())
    again[2].load_state_dict(half[2].state_dict())
    go(*again, 13)
    assert torch.equal(one[0], again[0])
    with pytest.raises(ArgumentError, match="temperature"):
        CyclicalSchedule(torch.optim.SGD([one[0]], lr=0.1), steps=10)
    with pytest.raises(ArgumentError, match="cycles is 30"):
        CyclicalSchedule(one[1], steps=20, cycles=30)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: SGLD(p, -1.0, num_data=3), "lr is -1.0"),
        (lambda p: SGLD(p, 0.1, num_data=0), "num_data"),
        (lambda p: SGLD(p, 0.1, num_data=3, noise_estimate="yes"), "'running'"),
        (lambda p: SGHMC(p, 0.1, num_data=3, friction=1.5), "friction is 1.5"),
        (lambda p: SGNHT(p, 0.1, num_data=3, temperature=0.0), "temperature"),
        (lambda p: SGNHT(p, 0.1, num_data=3, friction=1.0), "friction is 1"),
        (lambda p: PSGLD(p, 0.1, num_data=3, adapt=0), "adapt is 0"),
    ],
)
def test_settings_out_of_range_are_refused(make, words):
    with pytest.raises(ArgumentError, match=words):
        make([nn.Parameter(torch.zeros(1))])


def test_sparse_gradients_and_unknown_noise_are_refused():
    table = nn.Embedding(3, 2, sparse=True)
    sampler = SGLD(table.parameters(), 0.1, num_data=3)
    with pytest.raises(UnsupportedError, match="noise_estimate='running'"):
        sampler.noise_excess()
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UnsupportedError, match="sparse=False"):
        sampler.step()


def test_groups_are_checked_and_complex_parameters_refused():
    for wrong in ({"lr": -1.0}, {"temperature": -1.0}, {"friction": 2.0}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            BAOAB([{"params": [nn.Parameter(torch.zeros(1))], **wrong}], num_data=3)
    with pytest.raises(UnsupportedError, match="complex"):
        SGLD([nn.Parameter(torch.zeros(1, dtype=torch.complex64))], num_data=3)


@pytest.mark.parametrize("friction", [0.2, 1.0, 5.0])
def test_noise_of_batches_that_is_taken_off_leaves_no_heat_at_a_small_step(friction):
    """BAOAB: 1 + O(h²λ), whatever the friction; the momentum's own share would leave a fifth here."""
    h, c = 0.1, math.exp(-friction * 0.1)
    V = 0.8 * 4 * (1 - c * c) / ((1 + c) * h) ** 2
    found = stationary_variance("baoab", 1.0, h=h, friction=friction, gradient_noise=V, corrected=True)
    assert found == pytest.approx(1.0, rel=0.01)
    w = nn.Parameter(torch.zeros(4))
    sampler = BAOAB([w], h * h, num_data=1, prior_precision=0, friction=1 - c, noise_estimate=V, seed=0)
    w.grad = torch.zeros(4)
    assert sampler._allowed(sampler.param_groups[0], w) == pytest.approx(V / 0.8)
    sampler.step()
    plain = BAOAB([v := nn.Parameter(torch.zeros(4))], h * h, num_data=1, friction=1 - c, seed=0)
    v.grad = torch.zeros(4)
    plain.step()
    assert torch.allclose(w.detach() / v.detach(), torch.tensor(0.2**0.5))
