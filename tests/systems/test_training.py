from itertools import product

import pytest
import torch
from pytest import approx
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, scaled_dot_product_attention
from torch.testing import assert_close

from bolza.core import CallableCost, System, adjoint, linearize, rollout
from bolza.core.errors import ArgumentError, DataError, ShapeError
from bolza.systems import SGD, TrainingSystem, UpdateRule, module_loss

F64 = torch.float64


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def batches(count, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, 3, dtype=F64, generator=g), torch.randint(2, (8,), generator=g)) for _ in range(count)
    ]


def parameters(net):
    return {name: p.detach() for name, p in net.named_parameters()}


def validation_cost(net):
    objective = module_loss(net, cross_entropy)
    data = batches(1, seed=2)[0]
    return CallableCost(terminal=lambda x: objective(x["params"], data))


# ----------------------------------------------------------------------------- torch.optim.SGD

GRID = [
    {"momentum": m, "dampening": d, "weight_decay": w, "nesterov": n, "maximize": x}
    for m, d, w, n, x in product((0.0, 0.9), (0.0, 0.3), (0.0, 0.1), (False, True), (False, True))
    if not (n and (m == 0 or d != 0))
]


@pytest.mark.parametrize("options", GRID, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_steps_are_those_of_torch_sgd_under_all_options(options):
    net, data = network(), batches(4)
    system = TrainingSystem.from_module(net, cross_entropy, data, SGD(lr=0.1, **options))
    with torch.no_grad():
        run = rollout(system, system.initial_state(parameters(net)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, **options)
    for (x, y), state in zip(data, run.states[1:], strict=True):
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
        assert_close(state["params"], parameters(net), rtol=0, atol=1e-12)


def test_nothing_of_the_network_changes():
    net = network()
    before = {name: p.clone() for name, p in parameters(net).items()}
    system = TrainingSystem.from_module(net, cross_entropy, batches(2), SGD(lr=0.5))
    rollout(system, system.initial_state(dict(net.named_parameters())))
    assert_close(parameters(net), before, rtol=0, atol=0)
    assert all(p.grad is None for p in net.parameters())


def test_a_run_that_goes_on_is_the_run_in_one_piece():
    net, data = network(), batches(4)
    rule = SGD(lr=0.1, momentum=0.9, dampening=0.5)
    whole = TrainingSystem.from_module(net, cross_entropy, data, rule)
    state = whole.initial_state(parameters(net))
    run = rollout(whole, state)
    rest = TrainingSystem.from_module(net, cross_entropy, data[2:], rule, start=2)
    assert_close(rollout(rest, run.states[2]).states[-1], run.states[-1], rtol=0, atol=0)


def test_single_precision_stays_single():
    net = network().float()
    data = [(x.float(), y) for x, y in batches(2)]
    rule = SGD(lr=torch.full((1,), 0.1, dtype=F64), momentum=0.9, weight_decay=0.01)
    system = TrainingSystem.from_module(net, cross_entropy, data, rule)
    last = rollout(system, system.initial_state(parameters(net))).states[-1]
    assert {p.dtype for p in last["params"].values()} == {torch.float32}


# -------------------------------------------------------------------------- costates of the run


def autograd_through_the_run(system, cost, net, names):
    """The obvious way: unroll everything in one graph and differentiate it."""
    start = {name: p.clone().requires_grad_() for name, p in parameters(net).items()}
    controls = [
        {name: value.clone().requires_grad_() if name in names else value for name, value in u.items()}
        for u in system.controls
    ]
    state = {"params": start, **system.optimizer.init({name: p.detach() for name, p in start.items()})}
    value = cost.terminal(rollout(system, state, controls).states[-1])
    leaves = [*start.values(), *(u[name] for u in controls for name in names)]
    found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return dict(zip(start, found, strict=False)), found[len(start) :], value.detach()


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_hyper_gradients_are_the_gradients_of_the_training_clock(momentum, nesterov):
    """∂J/∂lr_t, ∂J/∂momentum_t and ∂J/∂weight_decay_t of six steps, and the meta-gradient p₀."""
    net, cost = network(), validation_cost(network())
    rule = SGD(lr=0.2, momentum=momentum, weight_decay=0.05, nesterov=nesterov)
    system = TrainingSystem.from_module(net, cross_entropy, batches(6), rule)
    solved = adjoint(system, cost, rollout(system, system.initial_state(parameters(net))))
    names = sorted(rule.controls())
    meta, hyper, value = autograd_through_the_run(system, cost, net, names)
    assert_close(solved.value, value, rtol=1e-12, atol=0)
    ours = [u[name] for u in solved.gradients for name in names]
    assert_close(ours, list(hyper), rtol=0, atol=1e-10)
    assert_close(solved.costates[0]["params"], meta, rtol=0, atol=1e-10)
    assert max(abs(float(g)) for g in ours) > 1e-3


def test_hyper_gradients_can_be_differentiated_again():
    """The second derivative in a learning rate of all steps, by adjoint with a graph and by differences."""
    net, cost = network(), validation_cost(network())
    system = TrainingSystem.from_module(net, cross_entropy, batches(3), SGD(lr=0.2))
    state = system.initial_state(parameters(net))

    def slope(lr, create_graph=False):
        run = rollout(system, state, [{"lr": lr}] * 3)
        return sum(u["lr"] for u in adjoint(system, cost, run, create_graph=create_graph).gradients)

    lr, h = torch.tensor(0.2, dtype=F64, requires_grad=True), 1e-4
    (curvature,) = torch.autograd.grad(slope(lr, create_graph=True), lr)
    difference = (slope(lr.detach() + h) - slope(lr.detach() - h)) / (2 * h)
    assert curvature.item() == approx(difference.item(), rel=1e-6)


def test_the_weight_of_a_sample_has_minus_lr_times_the_product_of_gradients():
    """One step: ∂J/∂wᵢ = −lr ⟨∇Φ(θ₁), ∇ℓᵢ(θ₀)⟩, the influence of sample i."""
    net, cost = network(), validation_cost(network())
    (x, y), lr = batches(1)[0], 0.3

    def losses(prediction, target):
        return cross_entropy(prediction, target, reduction="none")

    weights = [torch.full((8,), 1 / 8, dtype=F64)]
    system = TrainingSystem.from_module(net, losses, [(x, y)], SGD(lr=lr), sample_weights=weights)
    plain = TrainingSystem.from_module(net, cross_entropy, [(x, y)], SGD(lr=lr))
    state = system.initial_state(parameters(net))
    solved = adjoint(system, cost, rollout(system, state))
    assert_close(solved.states[1], rollout(plain, state).states[1], rtol=0, atol=1e-14)
    after = solved.costates[1]["params"]
    for i in range(8):
        one = torch.func.grad(module_loss(net, cross_entropy))(state["params"], (x[i : i + 1], y[i : i + 1]))
        influence = -lr * sum((after[name] * one[name]).sum() for name in one)
        assert solved.gradients[0]["sample_weights"][i].item() == approx(influence.item(), abs=1e-12)


def test_a_linearisation_is_a_hessian_vector_product():
    """∂f/∂θ = I − lr ∇²ℓ."""
    net, data = network(), batches(1)
    system = TrainingSystem.from_module(net, cross_entropy, data, SGD(lr=0.2))
    state = system.initial_state(parameters(net))
    v = {name: torch.randn_like(p) for name, p in state["params"].items()}
    gradient = torch.func.grad(module_loss(net, cross_entropy))
    _, product_hv = torch.func.jvp(lambda p: gradient(p, data[0]), (state["params"],), (v,))
    tangent = linearize(system, 0, state).jvp({"params": v})["params"]
    for name in v:
        assert_close(tangent[name], v[name] - 0.2 * product_hv[name], rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------- meta-learning

TASKS = [
    (torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([1.0, 0.0], dtype=F64)),
    (torch.tensor([3.0, 0.5], dtype=F64), torch.tensor([0.0, 2.0], dtype=F64)),
]


def task_loss(theta, task):
    curvature, centre = task
    return (curvature * (theta - centre) ** 2).sum() / 2


def costates_of_tasks(theta, lr=0.1, steps=1):
    found = []
    for task in TASKS:
        system = TrainingSystem(task_loss, [task] * steps, SGD(lr=lr))
        cost = CallableCost(terminal=lambda x, task=task: task_loss(x["params"], task))
        found.append(adjoint(system, cost, rollout(system, system.initial_state(theta))))
    return found


def root_of_linear(function):
    zero = torch.zeros(2, dtype=F64)
    slope = torch.stack([function(e) - function(zero) for e in torch.eye(2, dtype=F64)], dim=1)
    return -torch.linalg.solve(slope, function(zero))


@pytest.mark.parametrize(
    ("which", "optimum"), [(0, (0.355263, 0.521300)), (-1, (0.3, 0.457831))], ids=["MAML", "FOMAML"]
)
def test_the_meta_gradient_vanishes_at_the_known_optimum(which, optimum):
    """Quadratic tasks: Σ p₀ = 0 where MAML is optimal, Σ p_K = 0 where its first-order form stops."""

    def meta_gradient(theta):
        return sum(run.costates[which]["params"] for run in costates_of_tasks(theta))

    root = root_of_linear(meta_gradient)
    assert root.tolist() == approx(optimum, abs=0.51e-6)
    # and by the formula: M = (I − αA)A(I − αA), or A(I − αA)
    weights = [a * (1 - 0.1 * a) ** (2 if which == 0 else 1) for a, _ in TASKS]
    exact = sum(w * c for w, (_, c) in zip(weights, TASKS, strict=True)) / sum(weights)
    assert_close(root, exact, rtol=0, atol=1e-12)
    assert_close(meta_gradient(exact), torch.zeros(2, dtype=F64), rtol=0, atol=1e-14)


def test_the_costate_of_several_steps_is_the_product_of_the_tasks_contractions():
    """p_k = (I − αA) p_{k+1}."""
    theta = torch.tensor([0.3, -0.4], dtype=F64)
    for (curvature, _), run in zip(TASKS, costates_of_tasks(theta, steps=5), strict=True):
        for k in range(5):
            wanted = (1 - 0.1 * curvature) * run.costates[k + 1]["params"]
            assert_close(run.costates[k]["params"], wanted, rtol=0, atol=1e-14)


def test_every_parameter_may_have_its_own_learning_rate():
    """Meta-SGD: the control is a tree, and its gradient is −p₁ ∘ ∇ℓ(θ₀)."""
    net, cost = network(), validation_cost(network())
    rates = {name: torch.rand_like(p) for name, p in parameters(net).items()}
    data = batches(1)
    system = TrainingSystem.from_module(net, cross_entropy, data, SGD(lr=rates))
    state = system.initial_state(parameters(net))
    solved = adjoint(system, cost, rollout(system, state))
    gradient = torch.func.grad(module_loss(net, cross_entropy))(state["params"], data[0])
    for name, rate in rates.items():
        step = state["params"][name] - rate * gradient[name]
        assert_close(solved.states[1]["params"][name], step, rtol=0, atol=1e-15)
        wanted = -solved.costates[1]["params"][name] * gradient[name]
        assert_close(solved.gradients[0]["lr"][name], wanted, rtol=0, atol=1e-14)


# ------------------------------------------------------------------------ layers that need care


def test_batch_statistics_are_used_and_running_ones_do_not_move():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    data = batches(3)
    system = TrainingSystem.from_module(net, cross_entropy, data, SGD(lr=0.1))
    cost = CallableCost(terminal=lambda x: sum(p.square().sum() for p in x["params"].values()))
    solved = adjoint(system, cost, rollout(system, system.initial_state(parameters(net))))
    assert int(net[1].num_batches_tracked) == 0
    meta, _, _ = autograd_through_the_run(system, cost, net, [])
    assert_close(solved.costates[0]["params"], meta, rtol=0, atol=1e-10)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for x, y in data:
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
    assert_close(solved.states[-1]["params"], parameters(net), rtol=0, atol=1e-12)


def test_dropout_repeats_from_its_seed_so_that_the_costates_are_of_the_run_that_was():
    net = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), nn.Linear(16, 2)).double()
    cost = CallableCost(terminal=lambda x: sum(p.square().sum() for p in x["params"].values()))
    system = TrainingSystem.from_module(net, cross_entropy, batches(3), SGD(lr=0.3), seed=0)
    outside = torch.get_rng_state()
    solved = adjoint(system, cost, rollout(system, system.initial_state(parameters(net))))
    assert torch.equal(torch.get_rng_state(), outside)
    meta, _, _ = autograd_through_the_run(system, cost, net, [])
    assert_close(solved.costates[0]["params"], meta, rtol=0, atol=1e-10)


def test_attention_can_be_trained_through():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x):
            return scaled_dot_product_attention(*self.qkv(x).chunk(3, dim=-1))

    net = Attention().double()
    data = [(torch.randn(2, 5, 4, dtype=F64), torch.randn(2, 5, 4, dtype=F64))] * 2
    cost = CallableCost(terminal=lambda x: x["params"]["qkv.weight"].square().sum())
    system = TrainingSystem.from_module(net, mse_loss, data, SGD(lr=0.5))
    state = system.initial_state(parameters(net))
    solved = adjoint(system, cost, rollout(system, state))

    def value(lr):
        return cost.terminal(rollout(system, state, [{"lr": lr}, system.controls[1]]).states[-1]).item()

    difference = (value(0.5 + 1e-5) - value(0.5 - 1e-5)) / 2e-5
    assert solved.gradients[0]["lr"].item() == approx(difference, rel=1e-6)


# ---------------------------------------------------------------------------------- interface


def test_it_is_a_system_with_a_rule():
    system = TrainingSystem(task_loss, TASKS, SGD(lr=0.1))
    assert isinstance(system, System) and isinstance(SGD(lr=0.1), UpdateRule)
    assert sorted(system.controls[0]) == ["lr", "weight_decay"] and system.horizon == 2


def test_batches_may_come_from_a_function():
    system = TrainingSystem(task_loss, lambda t: TASKS[t % 2], SGD(lr=0.1), horizon=5)
    listed = TrainingSystem(task_loss, [TASKS[t % 2] for t in range(5)], SGD(lr=0.1))
    state = system.initial_state(torch.zeros(2, dtype=F64))
    assert_close(rollout(system, state).states[-1], rollout(listed, state).states[-1], rtol=0, atol=0)


def test_hyper_parameters_that_a_control_lacks_are_those_of_the_optimizer():
    rule = SGD(lr=0.1, momentum=0.5)
    system = TrainingSystem(task_loss, TASKS, rule, controls=[{"lr": 0.2}, {"momentum": 0.0}])
    by_hand = TrainingSystem(
        task_loss, TASKS, rule, controls=[{"lr": 0.2, "momentum": 0.5}, {"lr": 0.1, "momentum": 0.0}]
    )
    state = system.initial_state(torch.ones(2, dtype=F64))
    assert_close(rollout(system, state).states[-1], rollout(by_hand, state).states[-1], rtol=0, atol=0)


def test_the_initial_state_does_not_share_memory_with_the_parameters():
    w = torch.zeros(2, requires_grad=True)
    state = TrainingSystem(task_loss, TASKS, SGD(lr=0.1, momentum=0.9)).initial_state(w)
    assert state["params"].data_ptr() != w.data_ptr() and not state["params"].requires_grad
    assert state["velocity"].tolist() == [0, 0]


def test_senseless_arguments_are_refused_by_name():
    with pytest.raises(ArgumentError, match="nesterov is set, but momentum is 0"):
        SGD(lr=0.1, nesterov=True)
    with pytest.raises(ArgumentError, match="dampening is 0.5"):
        SGD(lr=0.1, momentum=0.9, dampening=0.5, nesterov=True)
    with pytest.raises(ArgumentError, match="batches is a function"):
        TrainingSystem(task_loss, lambda t: None, SGD(lr=0.1))
    with pytest.raises(DataError, match="there are 0 batches for 0 steps"):
        TrainingSystem(task_loss, [], SGD(lr=0.1))
    with pytest.raises(DataError, match="there are 2 batches for 3 steps"):
        TrainingSystem(task_loss, TASKS, SGD(lr=0.1), horizon=3)
    with pytest.raises(ShapeError, match="there are 1 controls, but 2 steps"):
        TrainingSystem(task_loss, TASKS, SGD(lr=0.1), controls=[{}])
    with pytest.raises(ShapeError, match="there are 1 sample_weights, but 2 steps"):
        TrainingSystem(task_loss, TASKS, SGD(lr=0.1), sample_weights=[torch.ones(1)])


def test_a_loss_of_the_wrong_shape_is_refused_with_the_step():
    theta = torch.zeros(2, dtype=F64)
    for loss in (lambda p, b: p, lambda p, b: 1.0):
        system = TrainingSystem(loss, TASKS, SGD(lr=0.1))
        with pytest.raises(
            ShapeError, match="the loss of step 1 has shape .*not \\(\\): without sample_weights"
        ):
            system.step(1, system.initial_state(theta), {})
    system = TrainingSystem(task_loss, TASKS, SGD(lr=0.1), sample_weights=[torch.ones(3)] * 2)
    with pytest.raises(ShapeError, match=r"has shape \(\), not \(3,\).*reduction='none'"):
        system.step(0, system.initial_state(theta), system.controls[0])
