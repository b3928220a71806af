"""Orders of convergence without Monte Carlo: the one-step map of each scheme, averaged over quadrature nodes."""

from math import exp, inf, log2, pi, sqrt

import numpy as np
import pytest
import torch
from pytest import approx

from bolza.core import Diffusion, Isotropic, draw_noise, langevin, simulate, stepper
from bolza.core.errors import ArgumentError, DivergenceError, ShapeError, UnsupportedError

F64 = torch.float64
NODES, WEIGHTS = (
    torch.tensor(v, dtype=F64) for v in np.polynomial.hermite_e.hermegauss(24)
)  # exact for polynomials of degree 47 of a normal variable
WEIGHTS = WEIGHTS / sqrt(2 * pi)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def plane():
    """Two independent normals: nodes ``(n, 2)`` and weights."""
    xi = torch.cartesian_prod(NODES, NODES)
    return xi, torch.outer(WEIGHTS, WEIGHTS).flatten()


# --------------------------------------------------------------------------------------- weak orders


def coupled_drift(t, x):
    """A drift without symmetry, nonlinear and coupled."""
    u, v = x[..., 0], x[..., 1]
    return torch.stack(
        [torch.sin(v) - u**3 / 3 + 0.3 * t, u * v - v + 0.2 * torch.cos(torch.as_tensor(t) * u + v)], -1
    )


def own_factor(t, x):
    """Diagonal noise: every entry has its own."""
    return torch.stack([1 + 0.3 * torch.sin(x[..., 0]) + 0.1 * t, 0.5 + 0.2 * x[..., 1] ** 2], -1)


ADDITIVE = torch.tensor([[0.7, 0.2], [-0.3, 0.5]], dtype=F64)
PROBLEMS = {
    "additive": Diffusion(coupled_drift, lambda t, x, noise: noise @ ADDITIVE.T),
    "diagonal": Diffusion(
        coupled_drift, lambda t, x, noise: own_factor(torch.as_tensor(t), x) * noise, diagonal=True
    ),
}


def generator_of(sde, f):
    """(L f)(t, x) of the equation, f a scalar function of (t, x), all derivatives by autograd."""

    def value(t, x):
        slope_t, slope = torch.autograd.grad(f(t, x), (t, x), create_graph=True)
        bend = torch.stack([torch.autograd.grad(s, x, create_graph=True)[0] for s in slope])
        g = torch.stack([sde.factor(t, x, e) for e in torch.eye(2, dtype=F64)], -1)
        return slope_t + slope @ sde.drift(t, x) + (bend * (g @ g.T)).sum() / 2

    return value


def local_error(sde, scheme, h):
    """E f(X_h) of one step less f + h Lf + ½h² L²f."""

    def f(t, x):
        return torch.sin(x[..., 0]) * x[..., 1] + x[..., 0] ** 2 + 0 * t

    start = torch.tensor([0.4, -0.7], dtype=F64, requires_grad=True)
    when = torch.tensor(0.3, dtype=F64, requires_grad=True)
    xi, weights = plane()
    ends = stepper(sde, scheme)(0.3, start.detach().expand(len(xi), 2), h, xi)
    once = generator_of(sde, f)
    exact = f(when, start) + h * once(when, start) + h**2 / 2 * generator_of(sde, once)(when, start)
    return abs(float((weights @ f(when, ends) - exact).detach()))


@pytest.mark.parametrize(
    ("problem", "scheme", "order"),
    [
        ("additive", "euler", 1),
        ("additive", "heun", 2),
        ("diagonal", "euler", 1),
        ("diagonal", "heun", 1),
        ("diagonal", "milstein", 1),
        ("diagonal", "srk", 2),
    ],
)
def test_a_step_agrees_with_the_generator_to_its_weak_order_plus_one(problem, scheme, order):
    errors = [local_error(PROBLEMS[problem], scheme, h) for h in (0.004, 0.001)]
    slope = log2(errors[0] / errors[1]) / 2
    assert slope == approx(order + 1, abs=0.15)


A, S = -0.9, 0.6
MOTION = Diffusion(lambda t, x: A * x, lambda t, x, noise: S * x * noise, diagonal=True)


def step_factors(scheme, h):
    """Geometric Brownian motion: the numbers by which one step multiplies, at the nodes."""
    return stepper(MOTION, scheme)(0.0, torch.ones_like(NODES), h, NODES)


@pytest.mark.parametrize(("scheme", "order"), [("euler", 1), ("heun", 1), ("milstein", 1), ("srk", 2)])
def test_the_second_moment_converges_with_the_weak_order(scheme, order):
    """E x² of n steps is (E p²)ⁿ, p the factor of one step: exact moments, no sampling."""

    def error(n):
        return abs(float(WEIGHTS @ step_factors(scheme, 1 / n) ** 2) ** n - exp(2 * A + S**2))

    assert log2(error(32) / error(128)) / 2 == approx(order, abs=0.15)


@pytest.mark.parametrize(("scheme", "order"), [("euler", 0.5), ("heun", 0.5), ("milstein", 1), ("srk", 1)])
def test_paths_converge_with_the_strong_order(scheme, order):
    """E|X_n − exact|² = (E p²)ⁿ − 2 (E p e)ⁿ + (E e²)ⁿ on the same Brownian path, e the exact factor of a step."""

    def error(n):
        p, h = step_factors(scheme, 1 / n), 1 / n
        e = torch.exp((A - S**2 / 2) * h + S * sqrt(h) * NODES)
        return sqrt(sum(c * float(WEIGHTS @ v) ** n for c, v in ((1, p * p), (-2, p * e), (1, e * e))))

    assert log2(error(64) / error(1024)) / 4 == approx(order, abs=0.06)


# ------------------------------------------------------------------------------------- jumps, times


def test_stable_noise_has_the_characteristic_function_of_its_own_chain():
    """x ← r x + h^{1/α} ξ: E cos(u x) = exp(−|u|^α h Σ r^{αk})."""
    alpha, h, steps, paths = 1.4, 0.2, 10, 40_000
    flight = Diffusion(lambda t, x: -x, lambda t, x, noise: noise, alpha=alpha)
    x = simulate(flight, torch.zeros(paths, 1, dtype=F64), dt=h, steps=steps, generator=generator(0))[0]
    scale = h * sum((1 - h) ** (alpha * k) for k in range(steps))
    for u in (0.5, 1.0, 2.0):
        exact = exp(-(u**alpha) * scale)
        spread = sqrt(((1 + exp(-((2 * u) ** alpha) * scale)) / 2 - exact**2) / paths)
        assert abs(float(torch.cos(u * x).mean()) - exact) < 4 * spread
    assert draw_noise(flight, x[:5].float()).dtype == torch.float32


def test_states_are_kept_at_the_times_asked_for_with_a_shortened_last_step():
    decay = Diffusion(lambda t, x: -x, lambda t, x, noise: 0 * noise)
    x0 = torch.ones(2, 1, dtype=F64)
    found = simulate(decay, x0, dt=0.1, times=[0.0, 0.25, 0.3, 1.0])[:, 0, 0].tolist()
    first = 0.9**2 * 0.95
    assert found == approx([1.0, first, first * 0.95, first * 0.95 * 0.9**7], rel=1e-12)
    clock = Diffusion(lambda t, x: torch.full_like(x, t), lambda t, x, noise: 0 * noise)
    (seen,) = simulate(clock, torch.zeros(1, 1, dtype=F64), dt=0.1, times=torch.tensor([0.25]))
    assert float(seen) == approx(0.1 * 0 + 0.1 * 0.1 + 0.05 * 0.2)


def test_noise_of_a_shortened_step_is_shortened_too():
    motion = Diffusion(lambda t, x: 0 * x, lambda t, x, noise: noise)
    x0 = torch.zeros(40_000, 1, dtype=F64)
    found = simulate(motion, x0, dt=0.2, times=[0.1, 0.5, 0.9], generator=generator(0))
    for t, x in zip((0.1, 0.5, 0.9), found, strict=True):
        assert abs(float(x.var()) / t - 1) < 4 * sqrt(2 / 40_000)


# ------------------------------------------------------------------------------------ blocks, gradients


def test_blocks_are_the_same_chain_with_other_draws():
    motion = Diffusion(lambda t, x: -x, lambda t, x, noise: noise, diagonal=True)
    x0 = torch.arange(7.0)[:, None]
    whole = simulate(motion, x0, dt=0.1, steps=3, save_every=1, generator=generator(0), block=None)
    parts = simulate(motion, x0, dt=0.1, steps=3, save_every=1, generator=generator(0), block=3)
    assert whole.shape == parts.shape == (4, 7, 1)
    assert torch.equal(whole[0], parts[0]) and not torch.equal(whole[1], parts[1])
    source = generator(0)
    again = [
        simulate(motion, x0[i : i + 3], dt=0.1, steps=3, save_every=1, generator=source) for i in (0, 3, 6)
    ]
    assert torch.equal(torch.cat(again, 1), parts)


@pytest.mark.parametrize("scheme", ["euler", "heun", "milstein", "srk"])
def test_isotropic_noise_is_the_product_that_is_not_formed(scheme):
    drift = lambda t, x: x - x**3  # noqa: E731
    found = [
        simulate(
            Diffusion(drift, factor, diagonal=True),
            torch.ones(4, 3, dtype=F64),
            dt=0.1,
            steps=6,
            scheme=scheme,
            generator=generator(0),
        )
        for factor in (Isotropic(0.7), lambda t, x, noise: 0.7 * noise)
    ]
    assert torch.allclose(*found, rtol=1e-14, atol=1e-14)


def test_states_given_to_the_drift_are_never_changed_afterwards():
    kept = []

    def drift(t, x):
        kept.append((x, x.clone()))
        return x  # the state itself, which the step must not write into

    for scheme in ("euler", "heun", "milstein", "srk"):
        motion = Diffusion(drift, lambda t, x, noise: 1.0 * noise, diagonal=True)
        simulate(motion, torch.ones(3, 2), dt=0.1, steps=4, scheme=scheme, generator=generator(0))
    assert all(torch.equal(seen, copy) for seen, copy in kept)


@pytest.mark.parametrize("scheme", ["euler", "heun", "milstein", "srk"])
def test_gradients_pass_through_the_paths(scheme):
    """dx_n/dσ on fixed noise, against a difference."""

    def end(sigma):
        motion = Diffusion(
            lambda t, x: -(x**3), lambda t, x, noise: sigma * torch.cos(x) * noise, diagonal=True
        )
        x0 = torch.ones(5, 2, dtype=F64)
        return simulate(motion, x0, dt=0.1, steps=5, scheme=scheme, generator=generator(4)).sum()

    sigma = torch.tensor(0.4, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(end(sigma), sigma)
    with torch.no_grad():
        difference = float(end(sigma + 1e-5) - end(sigma - 1e-5)) / 2e-5
    assert float(slope) == approx(difference, rel=1e-7)


# --------------------------------------------------------------------------------------------- refusals

PLAIN = Diffusion(lambda t, x: -x, lambda t, x, noise: noise)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give one of the two"),
        ({"steps": 3, "times": [1.0]}, "give one of the two"),
        ({"times": [1.0, 0.5]}, "increasing"),
        ({"times": [-1.0]}, "increasing"),
        ({"times": [0.5, float("nan")]}, "increasing"),
        ({"times": []}, "increasing"),
        ({"times": [1.0], "save_every": 2}, "None with times"),
        ({"times": [1.0], "dt": inf}, "dt is inf"),
        ({"steps": 3, "save_every": 4}, "save_every is 4"),
        ({"steps": 3, "block": 0}, "block"),
        ({"steps": 3, "scheme": "rk4"}, "choose from"),
    ],
)
def test_senseless_options_are_refused(options, words):
    with pytest.raises(ArgumentError, match=words):
        simulate(PLAIN, torch.zeros(2, 1), **{"dt": 0.1, **options})


def test_a_scheme_that_does_not_fit_the_noise_is_refused_with_another():
    for scheme, words in (("milstein", "diagonal=True"), ("srk", "heun"), ("splitting", "langevin")):
        with pytest.raises(UnsupportedError, match=words):
            simulate(PLAIN, torch.zeros(2, 1), dt=0.1, steps=1, scheme=scheme)
    with pytest.raises(UnsupportedError, match="euler"):
        simulate(
            Diffusion(PLAIN.drift, PLAIN.factor, alpha=1.5), torch.zeros(2, 1), dt=0.1, steps=1, scheme="heun"
        )


def test_an_index_friction_or_temperature_out_of_range_is_refused():
    for alpha in (0.0, 2.1):
        with pytest.raises(ArgumentError, match="alpha"):
            Diffusion(PLAIN.drift, PLAIN.factor, alpha=alpha)
    with pytest.raises(ArgumentError, match="friction"):
        langevin(lambda x: -x, friction=0.0, temperature=1.0)
    with pytest.raises(ArgumentError, match="temperature"):
        langevin(lambda x: -x, friction=1.0, temperature=-1.0)
    with pytest.raises(ArgumentError, match="floating"):
        simulate(PLAIN, torch.zeros(2, 1, dtype=torch.long), dt=0.1, steps=1)


def test_the_step_of_an_explosion_counts_all_stretches():
    cubic = Diffusion(lambda t, x: x**3, lambda t, x, noise: 0 * noise)
    with pytest.raises(DivergenceError) as caught:
        simulate(cubic, torch.full((3, 1), 10.0), dt=1.0, times=[3.5, 60.0])
    assert caught.value.step == 61


@pytest.mark.parametrize("scheme", ["heun", "srk"])
def test_additive_noise_that_changes_in_time_keeps_the_weak_order_of_two(scheme):
    sde = Diffusion(lambda t, x: -x, lambda t, x, noise: exp(t) * noise, diagonal=True)
    step, one, zero = stepper(sde, scheme), torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
    errors = []
    for n in (20, 40):
        variance = 0.0
        for k in range(n):  # x → a x + b ξ
            a, b = (float(step(k / n, x, 1 / n, xi)) for x, xi in ((one, zero), (zero, one)))
            variance = a * a * variance + b * b
        errors.append(abs(variance - (exp(2) - exp(-2)) / 4))
    assert log2(errors[0] / errors[1]) == approx(2, abs=0.15)


def test_langevin_states_have_two_parts():
    spring = langevin(lambda x: -x, friction=1.0, temperature=0.5)
    for x0 in (torch.zeros(5, 3), torch.zeros(3)):
        with pytest.raises(ShapeError, match="2, d"):
            simulate(spring, x0, dt=0.1, steps=1, scheme="splitting")


def test_a_force_is_taken_anew_where_the_state_was_changed_or_asked_for_gradients():
    spring = langevin(lambda x: -x, friction=1.0, temperature=0.5)
    step, xi = stepper(spring, "splitting"), torch.ones(3, 1)
    x = step(0.0, torch.ones(3, 2, 1), 0.1, xi)
    x[:, 0].clamp_(max=0.5)
    later = step(0.1, x, 0.1, xi)
    assert torch.equal(later, stepper(spring, "splitting")(0.1, x.clone(), 0.1, xi))
    slopes = []
    for start in (later.requires_grad_(), later.detach().clone().requires_grad_()):
        slopes.append(torch.autograd.grad(step(0.2, start, 0.1, xi).sum(), start)[0])
    assert torch.equal(*slopes)
