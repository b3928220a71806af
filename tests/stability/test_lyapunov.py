"""Lyapunov exponents against closed forms, identities and independent routes."""

import math

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError, DivergenceError, ShapeError, UnsupportedError
from bolza.meanfield import fixed_point
from bolza.stability import lyapunov_exponents
from bolza.systems import SGD, LinearSystem, ODESystem, TrainingSystem, as_system

F64 = torch.float64


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def logistic(x):
    return 4 * x * (1 - x)


def henon(x):
    return torch.stack([1 - 1.4 * x[..., 0] ** 2 + x[..., 1], 0.3 * x[..., 0]], -1)


def lorenz(s, x, u):
    a, b, c = x.unbind(-1)
    return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)


# ------------------------------------------------------------------------------------- closed forms


def test_the_logistic_map_has_the_exponent_log_two():
    # the generic orbit: log |4 − 8x| has mean log 2 under the invariant density
    starts = torch.rand(500, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = lyapunov_exponents(logistic, starts, 150, warmup=20)
    assert float(found.exponents) == pytest.approx(math.log(2), abs=2e-3)
    assert abs(float(found.exponents) - math.log(2)) < 4 * float(found.error)


def test_henon_has_its_known_exponents_and_their_sum_exactly():
    found = lyapunov_exponents(henon, 0.02 * seeded(600, 2), 300, warmup=60)
    assert found.exponents.tolist() == pytest.approx([0.4192, -1.6232], abs=1e-2)
    assert found.sum.value == pytest.approx(math.log(0.3), abs=1e-12)


def test_the_cat_map_stretches_by_the_golden_ratio_squared():
    matrix = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=F64)
    found = lyapunov_exponents(
        lambda x: (x @ matrix.T) % 1, torch.tensor([0.1, 0.7], dtype=F64), 200, warmup=40
    )
    assert found.exponents.tolist() == pytest.approx([0.962424, -0.962424], abs=1e-6)


@pytest.mark.slow
def test_lorenz_has_its_known_spectrum_per_unit_of_time():
    system = ODESystem(lorenz, horizon=700, dt=0.03, method="rk4")
    start = seeded(512, 3) + torch.tensor([0.0, 0.0, 25.0], dtype=F64)
    found = lyapunov_exponents(system, start, warmup=200)
    expected = torch.tensor([0.906, 0.0, -14.57], dtype=F64)
    assert found.unit == "time" and found.times[-1] == pytest.approx(15.0)
    assert ((found.exponents - expected).abs() < torch.tensor([0.02, 0.01, 0.05])).all(), found.exponents
    assert found.dimension == pytest.approx(2.062, abs=0.004)
    # the trace of the field is −10 − 1 − 8/3 everywhere; RK4 keeps it to its order
    assert found.sum.value == pytest.approx(-41 / 3, abs=0.01)


def test_an_autonomous_linear_map_has_the_logarithms_of_its_eigenvalues():
    p = torch.linalg.qr(seeded(4, 4))[0]
    upper = torch.diag(torch.tensor([1.3, 0.9, 0.5, 0.05], dtype=F64)) + 0.4 * seeded(4, 4).triu(1)
    matrix = p @ upper @ p.T
    expected = torch.linalg.eigvals(matrix).abs().log().sort(descending=True).values
    found = lyapunov_exponents(lambda x: x @ matrix.T, torch.ones(4, dtype=F64), 200, warmup=150)
    assert torch.allclose(found.exponents, expected, atol=1e-8)


def test_an_orthogonal_map_has_exponents_zero_and_no_memory_limit():
    q = torch.linalg.qr(seeded(5, 5))[0]
    found = lyapunov_exponents(lambda x: x @ q.T, seeded(3, 5), 50)
    assert found.exponents.abs().max() < 1e-13


def test_a_linear_system_gives_the_exponents_of_its_matrix():
    matrix = torch.diag(torch.tensor([2.0, 0.5], dtype=F64))
    system = LinearSystem(matrix, torch.eye(2, dtype=F64), horizon=60)
    found = lyapunov_exponents(system, torch.ones(2, dtype=F64), warmup=30)
    assert found.exponents.tolist() == pytest.approx([math.log(2), -math.log(2)], abs=1e-6)


# --------------------------------------------------------------------------------- random networks


def tanh_net(g, n, seed=0):
    w = g * seeded(n, n, seed=seed) / math.sqrt(n)
    return lambda x: torch.tanh(x) @ w.T


def test_a_random_tanh_network_agrees_with_the_mean_field_theory():
    theory = 0.5 * math.log(float(fixed_point("tanh", 4.0, 0.0).chi_1))
    assert theory == pytest.approx(0.1547, abs=1e-4)
    found = lyapunov_exponents(tanh_net(2.0, 300), seeded(1, 300), 1000, k=1, warmup=100)
    assert 0.13 < float(found.exponents) < 0.17


def test_below_the_edge_a_random_network_contracts_by_the_log_of_its_gain():
    # near 0 the map is linear, and its largest eigenvalue is g (1 + O(1/√n))
    found = lyapunov_exponents(tanh_net(0.5, 200), 1e-3 * seeded(1, 200), 300, k=1, warmup=200)
    assert float(found.exponents) == pytest.approx(math.log(0.5), abs=0.08)


def test_fewer_exponents_are_the_first_of_the_full_spectrum():
    step, start = tanh_net(2.0, 30), seeded(2, 30)
    full = lyapunov_exponents(step, start, 400, warmup=100)
    some = lyapunov_exponents(step, start, 400, k=5, warmup=100)
    assert torch.allclose(some.exponents, full.exponents[:5], atol=1e-3)
    assert full.k == full.size == 30 and some.size == 30


def test_orthonormalising_less_often_changes_little():
    step, start = tanh_net(2.0, 30), seeded(1, 30)
    every = lyapunov_exponents(step, start, 400, k=3, warmup=40)
    fifth = lyapunov_exponents(step, start, 400, k=3, warmup=40, every=5)
    assert torch.allclose(every.exponents, fifth.exponents, atol=1e-8)
    odd = lyapunov_exponents(step, start, 401, k=3, warmup=43, every=5)  # ends between two QRs
    assert torch.allclose(every.exponents, odd.exponents, atol=0.02)


# ------------------------------------------------------------------------------- layers of a network


def test_orthogonal_layers_have_exponents_zero():
    net = nn.Sequential(*(nn.Linear(6, 6) for _ in range(8))).double()
    for layer in net:
        nn.init.orthogonal_(layer.weight)
    found = lyapunov_exponents(net, seeded(3, 6))
    assert found.unit == "layer" and found.steps == 8
    assert found.exponents.abs().max() < 1e-12


def test_the_sum_over_layers_is_the_log_determinant_of_the_network():
    torch.manual_seed(0)
    layers = [m for _ in range(5) for m in (nn.Linear(4, 4), nn.Tanh())]
    net, x = nn.Sequential(*layers).double(), seeded(3, 4)
    found = lyapunov_exponents(net, x)
    jacobians = torch.vmap(torch.func.jacrev(net))(x)
    assert torch.allclose(found.per_sample.sum(1) * 5, jacobians.det().abs().log(), atol=1e-10)


def test_widths_may_change_and_the_narrowest_bounds_the_number():
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 7))
    assert lyapunov_exponents(net, torch.randn(2, 6)).k == 4
    assert lyapunov_exponents(net, torch.randn(2, 6), stages=(0, 1)).k == 6
    with pytest.raises(ArgumentError, match="between 1 and 4"):
        lyapunov_exponents(net, torch.randn(2, 6), k=5)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv, self.drop = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop(torch.relu(self.conv(self.norm(x))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("kind", ["convolution", "attention"])
def test_networks_in_use_are_read_and_left_as_they_were(kind):
    torch.manual_seed(0)
    if kind == "convolution":
        net, x = nn.Sequential(Block(), Block(), nn.Conv2d(3, 4, 3)), torch.randn(4, 3, 5, 5)
    else:
        net, x = Attention(), torch.randint(0, 7, (4, 3))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = lyapunov_exponents(net, x, k=3)
    assert found.exponents.isfinite().all() and found.per_sample.shape == (4, 3)
    assert net.training and all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    again = lyapunov_exponents(as_system(net, x), x, k=3)
    assert torch.allclose(found.exponents, again.exponents, atol=1e-4)


# ---------------------------------------------------------------------------------- training steps


def test_gradient_descent_on_a_quadratic_has_exponents_log_one_minus_lr_lambda():
    curvature, lr = torch.tensor([1.0, 3.0, 7.0], dtype=F64), 0.25
    run = TrainingSystem(
        lambda w, batch: (curvature * w**2).sum() / 2, lambda t: None, SGD(lr=lr), horizon=60
    )
    found = lyapunov_exponents(run, run.initial_state(torch.ones(3, dtype=F64)), warmup=20)
    expected = (1 - lr * curvature).abs().log().sort(descending=True).values
    assert torch.allclose(
        found.exponents, expected, atol=1e-6
    )  # the float32 lr of a tensor would show at 1e-8


def test_momentum_has_the_exponents_of_its_companion_matrix():
    a, lr, mu = 2.0, 0.1, 0.9
    run = TrainingSystem(lambda w, batch: a * w @ w / 2, lambda t: None, SGD(lr=lr, momentum=mu), horizon=60)
    found = lyapunov_exponents(run, run.initial_state(torch.ones(1, dtype=F64)), warmup=10)
    companion = torch.tensor([[1 - lr * a, -lr * mu], [a, mu]], dtype=F64)
    expected = torch.linalg.eigvals(companion).abs().log()  # a complex pair: both are log √μ
    assert found.exponents.tolist() == pytest.approx(sorted(expected.tolist(), reverse=True), abs=0.05)
    assert found.sum.value == pytest.approx(math.log(mu), abs=1e-8)


def test_a_network_in_training_has_the_exponents_of_its_training_map():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    data = [(seeded(8, 2, seed=i), seeded(8, 1, seed=50 + i)) for i in range(6)]
    run = TrainingSystem.from_module(net, nn.functional.mse_loss, data, SGD(lr=0.3))
    start = run.initial_state(dict(net.named_parameters()))
    found = lyapunov_exponents(run, start)
    assert found.size == 13
    product = torch.eye(13, dtype=F64)
    state = start
    from bolza.core import linearize, rollout

    for t, state in enumerate(rollout(run, start).states[:-1]):
        product = linearize(run, t, state).matrices()[0] @ product
    assert found.sum.value * 6 == pytest.approx(float(product.det().abs().log()), abs=1e-8)


# --------------------------------------------------------------------------------------- the record


def test_finite_time_exponents_end_at_the_exponents_and_errors_shrink():
    found = lyapunov_exponents(henon, 0.1 * seeded(50, 2), 400, warmup=50)
    assert found.finite_time.shape == (200, 50, 2) and found.times[-1] == 400
    assert torch.allclose(found.finite_time[-1], found.per_sample)
    spread = found.finite_time[:, :, 0].std(1)
    assert spread[-1] < spread[5] / 2


def test_the_error_of_a_single_trajectory_covers_the_truth():
    starts = torch.rand(40, 1, generator=torch.Generator().manual_seed(1), dtype=F64)
    found = lyapunov_exponents(logistic, starts, 400, warmup=20)
    z = (found.per_sample - math.log(2)) / found.per_sample_error
    assert (
        z.abs().median() < 2.5
    )  # increments of this map are anticorrelated: ten stretches err on the safe side
    alone = lyapunov_exponents(logistic, starts[:1], 400, warmup=20)
    assert torch.allclose(alone.error, found.per_sample_error[0], rtol=0.5)


def test_time_units_divide_the_exponents_and_states_come_back_in_their_form():
    steps = lyapunov_exponents(henon, torch.zeros(2, dtype=F64), 100)
    half = lyapunov_exponents(henon, torch.zeros(2, dtype=F64), 100, dt=0.5)
    assert torch.allclose(half.exponents, 2 * steps.exponents) and half.unit == "time"
    assert steps.final_state.shape == (2,)
    x = torch.zeros(2, dtype=F64)
    for _ in range(100):
        x = henon(x)
    assert torch.equal(steps.final_state, x)
    assert "per step" in str(steps) and steps.memory == pytest.approx(1 / float(steps.exponents[0]))


def test_states_may_be_trees_and_dtypes_are_kept():
    def swing(state):
        q, p = state["q"], state["p"]
        p = p - 0.1 * q.sin()
        return {"q": q + 0.1 * p, "p": p}

    start = {"q": torch.ones(3, 1), "p": torch.zeros(3, 1)}
    found = lyapunov_exponents(swing, start, 200)
    assert found.final_state["q"].dtype == torch.float32 and found.exponents.dtype == F64
    assert found.sum.value == pytest.approx(0.0, abs=1e-5)  # symplectic


def test_a_map_of_its_own_call_count_is_not_recorded_wrongly():
    class Counting:
        calls = 0

        def __call__(self, x):
            self.calls += 1
            return x * (2.0 if self.calls < 8 else 0.5)

    step = Counting()
    found = lyapunov_exponents(step, torch.ones(1, dtype=F64), 100)
    assert float(found.exponents) < 0  # log 2 would be the graph of the first step, for ever


def test_a_field_that_depends_on_time_is_not_taken_for_an_autonomous_one():
    def field(s, x, u):
        return x * (1.0 if s < 5 else -1.0)

    system = ODESystem(field, horizon=40, dt=0.25, method="midpoint")
    assert abs(float(lyapunov_exponents(system, torch.ones(1, dtype=F64)).exponents)) < 0.05


def test_maps_that_only_have_backward_derivatives_are_served():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    found = lyapunov_exponents(Double.apply, torch.ones(2, 3, dtype=F64), 10)
    assert torch.allclose(found.exponents, torch.full((3,), math.log(2), dtype=F64))


# --------------------------------------------------------------------------------------- bad input


def test_bad_arguments_are_named():
    x = torch.zeros(2, dtype=F64)
    with pytest.raises(ArgumentError, match="steps is None"):
        lyapunov_exponents(henon, x)
    with pytest.raises(ArgumentError, match="every 0"):
        lyapunov_exponents(henon, x, 10, every=0)
    with pytest.raises(ArgumentError, match="k is 3"):
        lyapunov_exponents(henon, x, 10, k=3)
    with pytest.raises(ArgumentError, match="x0 is None"):
        lyapunov_exponents(henon, steps=3)
    with pytest.raises(ArgumentError, match="dt is 0"):
        lyapunov_exponents(henon, x, 10, dt=0.0)
    with pytest.raises(ArgumentError, match="stages"):
        lyapunov_exponents(henon, x, 10, stages=(0, 1))
    with pytest.raises(ArgumentError, match="30 steps can be taken"):
        lyapunov_exponents(lambda r, u: r + u, x, 31, inputs=torch.zeros(30, 2, dtype=F64))
    with pytest.raises(UnsupportedError, match="floating-point"):
        lyapunov_exponents(henon, torch.zeros(2, dtype=torch.long), 10)
    with pytest.raises(UnsupportedError, match="give a network"):
        lyapunov_exponents(3, x, 10)
    with pytest.raises(ShapeError, match="samples"):
        lyapunov_exponents(lambda x: x.sum(0), torch.zeros(2, 3), 3)


def test_a_trajectory_that_leaves_every_bound_says_when():
    with pytest.raises(DivergenceError, match="finite") as caught:
        lyapunov_exponents(lambda x: x**2, torch.full((1, 1), 3.0), 60)
    assert caught.value.step is not None and caught.value.step < 20


@pytest.mark.parametrize(
    ("name", "value"), [("k", 1.5), ("steps", 2.0), ("warmup", 1.0), ("every", 2.5), ("k", True)]
)
def test_a_number_that_is_not_whole_is_named(name, value):
    with pytest.raises(ArgumentError, match=f"{name} is {value}: give a whole number"):
        lyapunov_exponents(lambda x: x / 2, torch.ones(3), **({"steps": 10} | {name: value}))


def test_a_state_that_is_not_finite_is_refused_although_the_tangent_is():
    with pytest.raises(DivergenceError, match="holds nan"):
        lyapunov_exponents(lambda x: x / 2, torch.tensor([1.0, math.nan]), 10)
    with pytest.raises(DivergenceError, match="stopped being finite"):
        lyapunov_exponents(lambda x: 1e5 * x, torch.ones(2), 100)  # beyond float32 after eight steps


@pytest.mark.parametrize("x0", [torch.ones(0), torch.ones(0, 3)])
def test_an_empty_state_is_refused(x0):
    with pytest.raises(ShapeError, match="at least one sample"):
        lyapunov_exponents(lambda x: x / 2, x0, 10)


def test_a_step_without_a_state_or_a_derivative_is_refused():
    with pytest.raises(UnsupportedError, match="step 0 gives NoneType"):
        lyapunov_exponents(lambda x: None, torch.ones(3), 10)
    with pytest.raises(UnsupportedError, match="differentiable operations of torch"):
        lyapunov_exponents(lambda x: torch.from_numpy(x.numpy() * 0.5), torch.ones(3), 10)


def test_inputs_that_are_no_sequence_are_refused():
    with pytest.raises(ArgumentError, match="inputs is 3.0: give a sequence"):
        lyapunov_exponents(lambda x, u: x / 2 + u, torch.ones(3), inputs=3.0)


def test_momentum_on_a_normalised_conv_net_with_its_own_batches_has_the_exponents_of_its_jacobians():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 2)
    )
    net, before = net.double(), {name: value.double().clone() for name, value in net.state_dict().items()}
    batches = [(seeded(6, 1, 3, 3, seed=i), torch.arange(6) % 2) for i in range(3)]
    rule = SGD(lr=0.2, momentum=0.7, weight_decay=0.01)
    run = TrainingSystem.from_module(net, nn.functional.cross_entropy, batches, rule)
    start = run.initial_state(dict(net.named_parameters()))
    places = [(part, name) for part in start for name in start[part]]
    leaves = [start[part][name] for part, name in places]

    def step(flat, t):
        state = {part: {} for part in start}
        pieces = flat.split([leaf.numel() for leaf in leaves])
        for (part, name), piece, leaf in zip(places, pieces, leaves, strict=True):
            state[part][name] = piece.view_as(leaf)
        moved = run.step(t, state, run.controls[t])
        return torch.cat([moved[part][name].reshape(-1) for part, name in places])

    flat = torch.cat([leaf.reshape(-1) for leaf in leaves])
    product = torch.eye(flat.numel(), dtype=F64)
    for t in range(3):
        product = torch.func.jacrev(lambda x, t=t: step(x, t))(flat) @ product
        flat = step(flat, t)
    found = lyapunov_exponents(run, start)
    assert found.size == found.k == 2 * sum(p.numel() for p in net.parameters())
    assert found.sum.value * 3 == pytest.approx(float(torch.linalg.slogdet(product)[1]), abs=1e-8)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
