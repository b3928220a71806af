"""Scores of examples: the costate of a training run against autograd through it, and against other routes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.controllers import data_values, example_losses, gradient_similarity, select_data
from bolza.controllers.weighted_run import WeightedRun
from bolza.core import CallableCost, adjoint, rollout
from bolza.core.errors import ArgumentError, DataError, DivergenceError, ShapeError
from bolza.systems.training import SGD, Adam, TrainingSystem, module_loss

D = torch.float64


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


NETS = {
    "mlp": lambda: (nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), (5,)),
    "batch norm": lambda: (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.SiLU(), nn.Flatten(), nn.Linear(8, 3)),
        (1, 4, 4),
    ),
    "recurrent": lambda: (Recurrent(), (4, 3)),
    "attention": lambda: (
        nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), nn.Flatten(), nn.Linear(12, 3)
        ),
        (3, 4),
    ),
}


def problem(kind="mlp", n=12, dtype=D):
    net, shape = NETS[kind]()
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(n + 7, *shape, generator=draw, dtype=dtype), torch.arange(n + 7) % 3
    return net.to(dtype), (x[:n], y[:n]), (x[n:], y[n:])


def unrolled(net, pool, target, gamma, steps, lr, batches=None):
    """J and its gradient in γ, by autograd through the run."""
    each = module_loss(net, lambda out, y: F.cross_entropy(out, y, reduction="none"))
    params = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}
    gamma = gamma.clone().requires_grad_()
    total = torch.zeros((), dtype=gamma.dtype)
    for t in range(steps):
        index = torch.arange(len(gamma)) if batches is None else batches[t]
        w = gamma[index] * (len(gamma) / len(index))
        objective = (w * each(params, (pool[0][index], pool[1][index]))).sum()
        slopes = torch.autograd.grad(objective, list(params.values()), create_graph=True)
        params = {name: p - lr * g for (name, p), g in zip(params.items(), slopes, strict=True)}
        total = total + each(params, target).mean()
    (slope,) = torch.autograd.grad(total, gamma)
    return float(total.detach()), -slope


@pytest.mark.parametrize("kind", NETS)
def test_scores_are_what_autograd_through_the_run_gives(kind):
    net, pool, target = problem(kind)
    gamma = torch.rand(12, dtype=D) / 12
    found = data_values(net, F.cross_entropy, pool, target, steps=6, lr=0.7, weights=gamma)
    cost, exact = unrolled(net, pool, target, gamma, 6, 0.7)
    torch.testing.assert_close(found.scores, exact, rtol=1e-10, atol=1e-14)
    assert found.cost == pytest.approx(cost, rel=1e-12)


def test_scores_of_batches_are_what_autograd_through_the_run_gives():
    net, pool, target = problem()
    batches = [torch.randperm(12)[:5] for _ in range(7)]
    found = data_values(net, F.cross_entropy, pool, target, steps=7, lr=0.4, batches=batches)
    _, exact = unrolled(net, pool, target, torch.full((12,), 1 / 12, dtype=D), 7, 0.4, batches)
    torch.testing.assert_close(found.scores, exact, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("rule", "cost"),
    [
        (SGD(0.3), "final"),
        (SGD(0.2, momentum=0.9, weight_decay=0.01, nesterov=True), "area"),
        (Adam(0.01, weight_decay=0.01), "area"),
    ],
)
def test_scores_are_the_gradients_that_the_adjoint_of_the_training_system_gives(rule, cost):
    net, pool, target = problem()
    weights = torch.full((12,), 1 / 12, dtype=D)

    def each(out, y):
        return F.cross_entropy(out, y, reduction="none")

    system = TrainingSystem.from_module(net, each, [pool] * 6, rule, sample_weights=[weights] * 6)
    aim = module_loss(net, F.cross_entropy)
    running = (
        (lambda t, x, u: aim(x["params"], target) if t else 0.0) if cost == "area" else (lambda t, x, u: 0.0)
    )
    j = CallableCost(terminal=lambda x: aim(x["params"], target), running=running)
    with torch.no_grad():
        states = rollout(system, system.initial_state(dict(net.named_parameters())))
    swept = adjoint(system, j, states)
    exact = -torch.stack([u["sample_weights"] for u in swept.gradients]).sum(0)
    found = data_values(net, each, pool, target, steps=6, optimizer=rule, cost=cost)
    torch.testing.assert_close(found.scores, exact, rtol=1e-10, atol=1e-14)
    assert found.cost == pytest.approx(float(swept.value), rel=1e-12)
    last = states.states[-1]["params"]
    assert all(torch.allclose(found.params[name], last[name], rtol=1e-12, atol=1e-14) for name in last)


class Squared(SGD):
    """An update that is not linear in the gradient, so that its adjoint needs the gradient."""

    def update(self, t, params, memory, gradient, u):
        bent = {name: g / (1 + g.square()).sqrt() for name, g in gradient.items()}
        return super().update(t, params, memory, bent, u)


def test_an_update_that_bends_the_gradient_has_the_adjoint_of_its_own():
    net, pool, target = problem()
    found = data_values(net, F.cross_entropy, pool, target, steps=4, optimizer=Squared(0.3))
    gamma, h = torch.full((12,), 1 / 12, dtype=D), 1e-5
    for n in (0, 5):
        bump = torch.eye(12, dtype=D)[n] * h
        up, down = (
            data_values(
                net, F.cross_entropy, pool, target, steps=4, optimizer=Squared(0.3), weights=gamma + s * bump
            ).cost
            for s in (1, -1)
        )
        assert float(found.scores[n]) == pytest.approx(-(up - down) / (2 * h), rel=1e-6)


def test_after_one_step_a_score_is_a_product_of_two_gradients():
    net, pool, target = problem()
    found = data_values(net, F.cross_entropy, pool, target, steps=1, lr=0.5)
    after = gradient_at(net, found.params, target)
    before = {name: p.detach() for name, p in net.named_parameters()}
    for n in range(12):
        own = gradient_at(net, before, (pool[0][n : n + 1], pool[1][n : n + 1]))
        assert float(found.scores[n]) == pytest.approx(0.5 * float(own @ after), rel=1e-12)


def gradient_at(net, params, batch):
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    value = F.cross_entropy(torch.func.functional_call(net, leaves, batch[0]), batch[1])
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(leaves.values()))])


def test_micro_batches_and_checkpoints_change_nothing_and_bound_what_is_held():
    net, pool, target = problem()
    options = {"steps": 12, "lr": 0.5}
    plain = data_values(net, F.cross_entropy, pool, target, checkpoint_every=1, **options)
    held = {}
    for every in (1, 3, 5, 12, 20):
        found = data_values(net, F.cross_entropy, pool, target, checkpoint_every=every, **options)
        assert torch.equal(found.scores, plain.scores)
        held[every] = found.states_held
        assert found.states_held <= -(-12 // every) + min(every, 12)
    assert held[3] < held[1] * 0.6 and held[3] < held[12] * 0.6
    pieces = data_values(net, F.cross_entropy, pool, target, chunk=5, **options)
    torch.testing.assert_close(pieces.scores, plain.scores, rtol=1e-11, atol=1e-15)
    several = [(pool[0][:5], pool[1][:5]), (pool[0][5:], pool[1][5:])]
    joined = data_values(net, F.cross_entropy, several, target, **options)
    torch.testing.assert_close(joined.scores, plain.scores, rtol=1e-12, atol=1e-15)


def test_no_more_states_are_alive_than_are_said_to_be_held(monkeypatch):
    import weakref

    net, pool, target = problem()
    alive, peak = weakref.WeakSet(), [0]
    step = WeightedRun.step

    def watched(self, t, state, weights):
        after = step(self, t, state, weights)
        alive.add(next(iter(after["params"].values())))
        peak[0] = max(peak[0], len(alive))
        return after

    monkeypatch.setattr(WeightedRun, "step", watched)
    found = data_values(net, F.cross_entropy, pool, target, steps=16, lr=0.1)
    assert peak[0] <= found.states_held + 2  # the newest state, and the last of the run
    assert found.states_held == 8


def test_scoring_the_whole_pool_in_every_step_is_exact_where_batches_are_the_pool():
    net, pool, target = problem()
    everything = [torch.arange(12)] * 5
    exact = data_values(net, F.cross_entropy, pool, target, steps=5, lr=0.3)
    swept = data_values(
        net, F.cross_entropy, pool, target, steps=5, lr=0.3, batches=everything, score_every=1
    )
    torch.testing.assert_close(swept.scores, exact.scores, rtol=1e-11, atol=1e-15)


def test_scoring_now_and_then_has_the_order_of_scoring_always():
    net, pool, target = problem()
    options = {"steps": 16, "lr": 0.05, "batch_size": 4}
    always = data_values(net, F.cross_entropy, pool, target, score_every=1, **options).scores
    seldom = data_values(net, F.cross_entropy, pool, target, score_every=2, **options).scores
    assert float(torch.corrcoef(torch.stack([always, seldom]))[0, 1]) > 0.99
    assert float(seldom.norm() / always.norm()) == pytest.approx(1, abs=0.1)


def test_the_selection_stays_on_the_simplex_its_cost_never_rises_and_wrong_labels_lose_their_weight():
    net, (x, y), _ = problem(n=30)
    labels = (x[:, :3]).argmax(1)
    wrong = torch.arange(30) < 12
    given = torch.where(wrong, (labels + 1) % 3, labels)
    draw = torch.randn(40, 5, dtype=D)
    chosen = select_data(
        net, F.cross_entropy, (x, given), (draw, draw[:, :3].argmax(1)), steps=12, lr=1.5, rounds=3, step=1.5
    )
    assert float(chosen.weights.sum()) == pytest.approx(1) and float(chosen.weights.min()) >= 0
    assert all(b <= a for a, b in zip(chosen.costs, chosen.costs[1:], strict=False))
    assert chosen.costs[-1] < chosen.costs[0]
    assert float(chosen.weights[wrong].sum()) < 0.2


def test_a_mean_loss_and_one_that_gives_each_number_score_alike_and_the_model_is_left_as_it_was():
    net, pool, target = problem("batch norm", dtype=torch.float32)
    before = copy.deepcopy(net.state_dict())
    mean = data_values(net, F.cross_entropy, pool, target, steps=3, lr=0.1)
    each = data_values(
        net, lambda out, y: F.cross_entropy(out, y, reduction="none"), pool, target, steps=3, lr=0.1
    )
    torch.testing.assert_close(mean.scores, each.scores)
    assert mean.scores.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_dropout_draws_the_same_masks_in_the_sweep_as_in_the_run():
    _, pool, target = problem()
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    gamma, h = torch.full((12,), 1 / 12, dtype=D), 1e-5
    found = data_values(net, F.cross_entropy, pool, target, steps=5, lr=0.5)
    bump = torch.eye(12, dtype=D)[3] * h
    up, down = (
        data_values(net, F.cross_entropy, pool, target, steps=5, lr=0.5, weights=gamma + s * bump).cost
        for s in (1, -1)
    )
    assert float(found.scores[3]) == pytest.approx(-(up - down) / (2 * h), rel=1e-6)


class Two(nn.Module):
    """Two inputs, and one matrix used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5, bias=False)
        self.again, self.head = self.first, nn.Linear(5, 3)

    def forward(self, a, b):
        return self.head(torch.tanh(self.again(torch.tanh(self.first(a + b)))))


@pytest.mark.parametrize("form", [lambda x: (x, x), lambda x: {"a": x, "b": x}])
def test_inputs_may_be_tuples_or_dicts_and_parameters_may_be_shared(form):
    net, (_, pool, target) = Two().double(), problem()
    nested = tuple((form(x), y) for x, y in (pool, target))
    found = data_values(net, nn.CrossEntropyLoss(), *nested, steps=4, lr=0.5)
    whole = nn.Sequential(nn.Flatten(), net)  # the same network of one input
    whole.forward = lambda x: net(x, x)
    _, exact = unrolled(whole, pool, target, torch.full((12,), 1 / 12, dtype=D), 4, 0.5)
    torch.testing.assert_close(found.scores, exact, rtol=1e-10, atol=1e-14)


def test_frozen_parameters_stay_and_the_others_are_scored():
    net, pool, target = problem()
    found = data_values(net, F.cross_entropy, pool, target, steps=3, lr=0.1, params=["2"])
    assert set(found.params) == {"2.weight", "2.bias"}


def test_baselines_are_the_losses_and_the_products_of_gradients():
    net, pool, target = problem()
    losses = F.cross_entropy(net(pool[0]), pool[1], reduction="none").detach()
    torch.testing.assert_close(example_losses(net, F.cross_entropy, pool), losses)
    params = {name: p.detach() for name, p in net.named_parameters()}
    aim = gradient_at(net, params, target)
    own = torch.stack([gradient_at(net, params, (pool[0][n : n + 1], pool[1][n : n + 1])) for n in range(12)])
    torch.testing.assert_close(gradient_similarity(net, F.cross_entropy, pool, target), own @ aim)
    cosine = gradient_similarity(net, F.cross_entropy, pool, target, cosine=True, params=params)
    torch.testing.assert_close(cosine, F.cosine_similarity(own, aim[None]))


def test_what_cannot_work_is_refused_by_name():
    net, pool, target = problem()
    for wrong, match in (
        ({"steps": 0, "lr": 0.1}, "steps=0"),
        ({"steps": 1}, "give one of them"),
        ({"steps": 1, "lr": 0.1, "optimizer": SGD(0.1)}, "give one of them"),
        ({"steps": 1, "lr": 0.1, "cost": "mean"}, "'mean'"),
        ({"steps": 1, "lr": 0.1, "score_every": 2}, "score_every=2"),
        ({"steps": 1, "lr": 0.1, "batch_size": 13}, "batch_size=13"),
        ({"steps": 2, "lr": 0.1, "batches": [torch.arange(3)]}, "batches has 1"),
        ({"steps": 1, "lr": 0.1, "chunk": 0}, "chunk=0"),
        ({"steps": 1, "lr": 0.1, "checkpoint_every": 0}, "checkpoint_every=0"),
    ):
        with pytest.raises(ArgumentError, match=match):
            data_values(net, F.cross_entropy, pool, target, **wrong)
    with pytest.raises(ShapeError, match="weights has shape"):
        data_values(net, F.cross_entropy, pool, target, steps=1, lr=0.1, weights=torch.ones(3))
    with pytest.raises(ShapeError, match="one number an example"):
        data_values(net, lambda out, y: out, pool, target, steps=1, lr=0.1)
    with pytest.raises(DivergenceError, match="step"):
        data_values(net, lambda out, y: (out**4).mean(), pool, target, steps=40, lr=1e6)
    normed, pool, target = problem("batch norm")
    with pytest.raises(ArgumentError, match="model.eval"):
        data_values(normed, F.cross_entropy, pool, target, steps=1, lr=0.1, chunk=5)
    with pytest.raises(ArgumentError, match="rounds=0"):
        select_data(net, F.cross_entropy, pool, target, rounds=0, steps=1, lr=0.1)


def test_a_pool_in_another_order_every_time_is_refused_and_an_iterator_is_read_once():
    net, pool, target = problem()
    pairs = torch.utils.data.TensorDataset(*pool)
    shuffled = torch.utils.data.DataLoader(pairs, batch_size=4, shuffle=True)
    for score in (data_values, select_data):
        with pytest.raises(DataError, match="shuffles"):
            score(net, F.cross_entropy, shuffled, target, steps=2, lr=0.1)
    once = iter([(pool[0][:5], pool[1][:5]), (pool[0][5:], pool[1][5:])])
    options = {"steps": 2, "lr": 0.1, "rounds": 1}
    found = [select_data(net, F.cross_entropy, given, target, **options) for given in (pool, once)]
    torch.testing.assert_close(found[0].weights, found[1].weights)


def test_a_mean_with_class_weights_is_refused_where_it_would_be_taken_for_one_without():
    net, pool, target = problem()
    weight = torch.tensor([1.0, 5.0, 9.0], dtype=torch.float64)[: int(pool[1].max()) + 1]
    with pytest.raises(ArgumentError, match="reduction='none'"):
        data_values(net, torch.nn.CrossEntropyLoss(weight), pool, target, steps=1, lr=0.1)
    each = torch.nn.CrossEntropyLoss(weight, reduction="none")
    values = data_values(net, each, pool, target, steps=1, lr=0.1)
    plain = data_values(net, F.cross_entropy, pool, target, steps=1, lr=0.1)
    assert values.target_losses[0] > 1.5 * plain.target_losses[0]


@pytest.mark.parametrize("wrong", [torch.arange(0), torch.ones(12, dtype=torch.bool), torch.tensor([0, 99])])
def test_batches_that_are_no_places_in_the_pool_are_refused(wrong):
    net, pool, target = problem()
    with pytest.raises(ArgumentError, match=r"batches\[0\]"):
        data_values(net, F.cross_entropy, pool, target, steps=1, lr=0.1, batches=[wrong])
