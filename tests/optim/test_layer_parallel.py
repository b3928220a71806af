"""Slices of a network that train at the same time, against back-propagation through the whole."""

import copy

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError, BolzaError, UnsupportedError
from bolza.ops.processes import run_processes
from bolza.optim import LayerParallel
from bolza.optim.interfaces import multiplier_step
from layer_parallel_worker import F64, problem
from networks import NETWORKS

LOSS = nn.functional.cross_entropy
METHODS = ("lagrangian", "penalty", "parareal", "mgrit")


def gradients(net):
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def exact(net, x, y, loss=LOSS):
    twin = copy.deepcopy(net)
    loss(twin(x), y).backward()
    return gradients(twin)


@pytest.mark.parametrize("method", ["lagrangian", "mgrit"])
def test_one_slice_is_back_propagation_bit_for_bit(method):
    for name in NETWORKS:
        model, (x, y), loss = NETWORKS[name]()
        twin = copy.deepcopy(model)
        state = torch.get_rng_state()
        value = loss(twin(*x) if isinstance(x, tuple) else twin(x), y)
        value.backward()
        torch.set_rng_state(state)
        found = LayerParallel(model, loss, 1, method=method).backward(x, y)
        assert torch.equal(found, value.detach()), name
        for a, b in zip(gradients(model), gradients(twin), strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), name
        for a, b in zip(model.buffers(), twin.buffers(), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("method", ["lagrangian", "parareal", "mgrit"])
def test_the_first_step_from_a_serial_pass_or_enough_iterations_is_back_propagation(method):
    net, x, y = problem()
    wanted = exact(net, x, y)
    parallel = LayerParallel(net, LOSS, 4, method=method, iterations=4, samples=12)
    parallel.backward(x, y, torch.arange(12))
    for a, b in zip(gradients(net), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert parallel.violation < 1e-12


def test_few_iterations_come_closer_to_the_gradient_with_each():
    net, x, y = problem(blocks=14, h=0.1, smooth=True)
    wanted = torch.cat([g.flatten() for g in exact(net, x, y)])
    errors = []
    for iterations in (0, 1, 2):
        net.zero_grad()
        LayerParallel(net, LOSS, 8, method="parareal", iterations=iterations).backward(x, y)
        found = torch.cat([g.flatten() for g in gradients(net)])
        errors.append(float((found - wanted).norm() / wanted.norm()))
    assert errors[1] < errors[0] / 3 and errors[2] < errors[1] / 3 and errors[2] < 1e-2


def test_a_remembered_start_is_better_than_a_jump():
    """A second step on the same samples begins from the states and costates of the first."""
    net, x, y = problem(blocks=14, h=0.1, smooth=True)
    wanted = torch.cat([g.flatten() for g in exact(net, x, y)])
    errors = []
    for samples in (12, None):
        parallel = LayerParallel(net, LOSS, 8, method="parareal", iterations=1, samples=samples)
        for _ in range(2):
            net.zero_grad()
            parallel.backward(x, y, None if samples is None else torch.arange(12))
        found = torch.cat([g.flatten() for g in gradients(net)])
        errors.append(float((found - wanted).norm() / wanted.norm()))
    assert errors[0] < errors[1] / 5


def augmented_lagrangian(parallel, x, y, lam, kappa, beta):
    """The objective as it is written down, per sample, with the sum over samples divided by their number."""
    net, batch = parallel.sliced, len(x)
    entered = [x, *lam]
    value = 0.0
    for k in range(len(net)):
        out = net.run(k, entered[k])
        if k == len(net) - 1:
            return value + LOSS(out, y)
        gap = out - lam[k]
        value = value + ((kappa[k] * gap).sum() + beta / 2 * gap.square().sum()) / batch


@pytest.mark.parametrize("method", ["lagrangian", "penalty"])
def test_weights_and_inputs_of_slices_descend_the_augmented_lagrangian(method):
    """Gradients of autograd on the objective itself, at inputs and multipliers that fit nothing."""
    net, x, y = problem()
    beta, lr, rho = 0.7, 0.3, 0.6
    parallel = LayerParallel(
        net, LOSS, 3, method=method, beta=beta, rho=rho, interface_lr=lr, samples=12
    ).read(x)
    rows = torch.arange(12)
    lam = [torch.randn(12, 6, dtype=F64, requires_grad=True) for _ in range(2)]
    kappa = [torch.randn(12, 6, dtype=F64) * (method == "lagrangian") for _ in range(2)]
    for k in (1, 2):
        parallel.memory.store(k, rows, lam[k - 1], kappa[k - 1])
    parallel.memory.mark(rows)
    value = augmented_lagrangian(parallel, x, y, lam, kappa, beta)
    wanted = torch.autograd.grad(value, [*net.parameters(), *lam])
    parallel.backward(x, y, rows)
    for p, g in zip(net.parameters(), wanted, strict=False):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-13)
    for k in (1, 2):
        form = parallel.sliced.form(k)
        found, price = parallel.memory.recall(k, rows, form)
        stepped = (lam[k - 1] - lr * 12 * wanted[len(list(net.parameters())) + k - 1]).detach()
        torch.testing.assert_close(found, stepped, rtol=1e-10, atol=1e-12)
        came = parallel.sliced.replay(k - 1, x if k == 1 else lam[0])
        rule = kappa[k - 1] + rho * beta * (came - stepped) if method == "lagrangian" else kappa[k - 1]
        torch.testing.assert_close(price, rule.detach(), rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------- a linear-quadratic chain


class Plant(nn.Module):
    """x_{t+1} = A x_t + u_t, a stage whose parameter is the control."""

    def __init__(self, A):
        super().__init__()
        self.register_buffer("A", A)
        self.u = nn.Parameter(torch.zeros(len(A), dtype=F64))

    def forward(self, x):
        return nn.functional.linear(x, self.A, self.u)


T, CUTS = 6, (2, 4)
A = torch.tensor([[0.9, 0.2], [-0.2, 0.9]], dtype=F64)
X0, TARGET = torch.tensor([[1.0, -2.0]], dtype=F64), torch.tensor([[0.5, 0.5]], dtype=F64)


def phi(x, target):
    return (x - target).square().sum() / 2


def objective(v, kappa, beta):
    """Augmented Lagrangian of controls (T, 2) and inputs (2, 2) of the slices, all in one vector."""
    us, lam = v[: 2 * T].split(2), v[2 * T :].split(2)
    state, value = X0[0], v[: 2 * T].square().sum() / 2
    for t, u in enumerate(us):
        if t in CUTS and len(kappa):
            k = CUTS.index(t)
            gap = state - lam[k]
            value = value + kappa[k] @ gap + beta / 2 * gap.square().sum()
            state = lam[k]
        state = A @ state + u
    return value + phi(state, TARGET[0])


def curvature(beta, size):
    """Hessian of the quadratic; multipliers enter linearly."""
    kappa = [torch.zeros(2, dtype=F64) for _ in CUTS] if size > 2 * T else []
    return torch.func.hessian(objective)(torch.zeros(size, dtype=F64), kappa, beta)


def minimum(kappa, beta, hessian):
    """Newton on an exact quadratic."""
    start = torch.zeros(len(hessian), dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(objective(start, kappa, beta), start)
    return -torch.linalg.solve(hessian, gradient)


def ends(v):
    """What the first two slices leave, and what the next ones begin from."""
    us, lam, state, left = v[: 2 * T].split(2), v[2 * T :].split(2), X0[0], []
    for t, u in enumerate(us):
        if t in CUTS:
            left.append(state)
            state = lam[CUTS.index(t)]
        state = A @ state + u
    return left, lam


def at_rest(v, kappa, method, beta):
    """Gradients, and change of λ and κ, of one step of the optimizer's own at this point."""
    net = nn.Sequential(*[Plant(A) for _ in range(T)])
    with torch.no_grad():
        for layer, u in zip(net, v[: 2 * T].split(2), strict=True):
            layer.u.copy_(u)
    parallel = LayerParallel(
        net, phi, 3, method=method, beta=beta, interface_lr=0.5 / beta, samples=1, reduction="sum"
    ).read(X0)
    row = torch.tensor([0])
    lam = v[2 * T :].split(2)
    for k in (1, 2):
        parallel.memory.store(k, row, lam[k - 1][None], kappa[k - 1][None])
    parallel.memory.mark(row)
    parallel.backward(X0, TARGET, row)
    (sum(layer.u.square().sum() for layer in net) / 2).backward()
    moved = [p.grad for p in net.parameters()]
    for k in (1, 2):
        found, price = parallel.memory.recall(k, row, parallel.sliced.form(k))
        moved += [found[0] - lam[k - 1], price[0] - kappa[k - 1]]
    return max(float(a.abs().max()) for a in moved), parallel.violation


@pytest.mark.parametrize("beta", [1.0, 10.0])
def test_the_augmented_lagrangian_reaches_the_optimum_of_a_linear_quadratic_chain_and_its_costates(beta):
    best = minimum([], beta, curvature(beta, 2 * T))
    hessian = curvature(beta, 2 * T + 4)
    kappa = [torch.zeros(2, dtype=F64) for _ in CUTS]
    for _ in range(120 if beta == 1.0 else 24):
        v = minimum(kappa, beta, hessian)
        kappa = [
            multiplier_step(price, x, lam, beta, rho=1.0)
            for price, x, lam in zip(kappa, *ends(v), strict=True)
        ]
    assert float((v[: 2 * T] - best).abs().max()) < 1e-10
    for t, price in zip(CUTS, kappa, strict=True):  # at the optimum u_t = −p_{t+1}
        assert float((price + best.split(2)[t - 1]).abs().max()) < 1e-10
    change, violation = at_rest(v, kappa, "lagrangian", beta)
    assert change < 1e-9 and violation < 1e-10


def test_descent_in_weights_and_inputs_with_ascent_in_multipliers_gets_there_too():
    best = minimum([], 1.0, curvature(1.0, 2 * T))
    net = nn.Sequential(*[Plant(A) for _ in range(T)])
    parallel = LayerParallel(
        net, phi, 3, interface_lr=0.4, rho=0.5, samples=1, start="states", reduction="sum"
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        parallel.backward(X0, TARGET, torch.tensor([0]))
        (sum(layer.u.square().sum() for layer in net) / 2).backward()
        optimizer.step()
    found = torch.cat([layer.u for layer in net]).detach()
    assert float((found - best).abs().max()) < 1e-6


def test_the_penalty_s_violation_falls_as_one_over_beta_and_its_cost_gap_as_the_square():
    best = minimum([], 1.0, curvature(1.0, 2 * T))
    optimum = objective(best, [], 1.0)
    nothing = [torch.zeros(2, dtype=F64) for _ in CUTS]
    violation, gap = [], []
    for beta in (10.0, 100.0, 1000.0):
        v = minimum(nothing, beta, curvature(beta, 2 * T + 4))
        change, found = at_rest(v, nothing, "penalty", beta)
        assert change < 1e-10
        violation.append(found)
        gap.append(float(objective(v[: 2 * T], [], beta) - optimum))
    for large, small in zip(violation, violation[1:], strict=False):
        assert 9 < large / small < 11
    for large, small in zip(gap, gap[1:], strict=False):
        assert 85 < large / small < 115


# -------------------------------------------------------------------------------- the nets people have


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_networks_as_they_are_train_in_slices_or_are_refused_by_name(name):
    model, (x, y), loss = NETWORKS[name]()
    twin = copy.deepcopy(model)
    state = torch.get_rng_state()
    loss(twin(*x) if isinstance(x, tuple) else twin(x), y).backward()
    torch.set_rng_state(state)
    samples = len(y)
    try:
        parallel = LayerParallel(model, loss, 2, samples=samples).read(x)
    except UnsupportedError as error:
        assert "between stages" in str(error)
        return
    parallel.backward(x, y, torch.arange(samples))
    if any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in model.modules()):
        return  # the serial pass has drawn other numbers
    for a, b in zip(gradients(model), gradients(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)  # running statistics moved once, as they should


def test_iterations_refuse_batch_normalisation_and_dropout_in_training_mode_only():
    for layer in (nn.BatchNorm1d(4), nn.Dropout(0.5)):
        net = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 4))
        with pytest.raises(UnsupportedError, match="dropout or running statistics"):
            LayerParallel(net, LOSS, 2, method="parareal").read(torch.zeros(3, 4))
        LayerParallel(net.eval(), LOSS, 2, method="parareal").read(torch.zeros(3, 4))


def test_training_goes_on_from_a_checkpoint_bit_for_bit():
    net, x, y = problem()
    rows = torch.arange(12)

    def steps(parallel, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            parallel.backward(x, y, rows)
            optimizer.step()

    parallel = LayerParallel(net, LOSS, 3, samples=12)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    steps(parallel, optimizer, 3)
    saved, weights = copy.deepcopy(parallel.state_dict()), copy.deepcopy(net.state_dict())
    steps(parallel, optimizer, 3)
    wanted = copy.deepcopy(net.state_dict())
    net.load_state_dict(weights)
    resumed = LayerParallel(net, LOSS, 3, samples=12)
    resumed.load_state_dict(saved)
    steps(resumed, optimizer, 3)
    for name, value in net.state_dict().items():
        assert torch.equal(value, wanted[name])


def test_the_critical_path_is_what_each_method_waits_for():
    net, x, y = problem()  # eight stages, four slices of two
    rows = torch.arange(12)
    first, then = {"lagrangian": (24 + 6, 6), "penalty": (8 + 6, 6)}, {}
    for method in METHODS:
        parallel = LayerParallel(net, LOSS, 4, method=method, iterations=1, samples=12)
        path = []
        for _ in range(2):
            parallel.backward(x, y, rows)
            path.append(parallel.critical_path)
        then[method] = tuple(path)
    assert parallel.serial_path == 24
    assert {m: then[m] for m in first} == first
    # jumps 4 + 8; iterations (2 + 4) + 2 (2 + 4); and the last sweep, 2 forward and 4 backward
    assert then["parareal"] == (12 + 18 + 6, 18 + 6) and then["mgrit"] == (12 + 24 + 6, 24 + 6)


def test_arguments_that_make_no_sense_are_refused_by_name():
    net, x, y = problem()
    for bad, words in (
        ({"method": "admm"}, "method is 'admm'"),
        ({"beta": 0.0}, "beta is 0"),
        ({"interface_lr": float("nan")}, "interface_lr is nan"),
        ({"rho": -1.0}, "rho is -1"),
        ({"start": "zero"}, "start is 'zero'"),
    ):
        with pytest.raises(ArgumentError, match=words):
            LayerParallel(net, LOSS, 2, **bad)
    parallel = LayerParallel(net, LOSS, 2)
    with pytest.raises(ArgumentError, match="read at the first batch"):
        parallel.parameters()
    with pytest.raises(ArgumentError, match="samples is None"):
        parallel.backward(x, y, torch.arange(12))
    with pytest.raises(ArgumentError, match="index has shape"):
        LayerParallel(net, LOSS, 2, samples=5).backward(x, y, torch.arange(12))
    with pytest.raises(ArgumentError, match="slices is 9"):
        LayerParallel(net, LOSS, 9).read(x)
    with pytest.raises(ArgumentError, match="processes is 0"):
        run_processes(print, 0)
    assert issubclass(ArgumentError, BolzaError)


@pytest.mark.parametrize("method", ["lagrangian", "parareal", "mgrit"])
def test_a_frozen_stem_is_left_alone(method):
    net = nn.Sequential(*[nn.Linear(4, 4, dtype=F64) for _ in range(6)])
    net[:3].requires_grad_(False)
    x, y = torch.randn(5, 4, dtype=F64), torch.randint(0, 4, (5,))
    expected = exact(net, x, y)
    LayerParallel(net, LOSS, 3, method=method, samples=5, iterations=3).backward(x, y, torch.arange(5))
    for a, b in zip(gradients(net), expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_empty_batches_and_fractions_of_slices_are_refused_by_name():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ArgumentError, match="no samples"):
        LayerParallel(net, LOSS).backward(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ArgumentError, match="slices"):
        LayerParallel(net, LOSS, 2.5)
