"""MAML on the networks people have, beside the same thing done task by task."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, DataError, DivergenceError, UnsupportedError
from bolza.meta import MAML, MetaSGD, Reptile, iMAML
from bolza.systems import Adam

D = torch.float64


class Attention(nn.Module):
    """A small transformer classifier."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Recurrent(nn.Module):
    """A small LSTM classifier, which torch cannot batch over tasks."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


def conv(norm):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )


NETWORKS = {
    "batch norm": lambda: conv(nn.BatchNorm2d(4)),
    "group norm": lambda: conv(nn.GroupNorm(2, 4)),
    "attention": Attention,
    "recurrent": Recurrent,
}


def problem(kind="batch norm", dtype=D, tasks=2):
    torch.manual_seed(0)
    net = NETWORKS[kind]().to(dtype)
    shape = (5, 8) if kind in ("attention", "recurrent") else (1, 4, 4)
    sets = [(torch.randn(tasks, n, *shape, dtype=dtype), torch.randint(3, (tasks, n))) for n in (4, 6)]
    return net, *sets


def gradients(net):
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize("kind", NETWORKS)
def test_batched_tasks_give_the_gradient_of_tasks_one_by_one(kind):
    net, support, query = problem(kind)
    before = copy.deepcopy(net.state_dict())
    found = []
    for options in ({}, {"vectorized": False}, {"checkpointed": True}):
        net.zero_grad()
        loss = MAML(net, lr=0.1, steps=2, **options)(support, query)
        loss.backward()
        found.append((loss.detach(), gradients(net)))
    for value, slopes in found[1:]:
        assert torch.allclose(value, found[0][0], rtol=1e-10)
        assert all(
            torch.allclose(a, b, rtol=1e-8, atol=1e-11) for a, b in zip(slopes, found[0][1], strict=True)
        )
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.values(), strict=True))


def test_the_gradient_is_that_of_finite_differences():
    net, support, query = problem("group norm")
    maml = MAML(net, lr=0.1, steps=3)
    maml(support, query).backward()
    with torch.no_grad():
        v = [torch.randn_like(p) for p in net.parameters()]
        slope = sum(float((g * d).sum()) for g, d in zip(gradients(net), v, strict=True))
        values = []
        for sign in (1, -1):
            for p, d in zip(net.parameters(), v, strict=True):
                p.add_(d, alpha=sign * 1e-6)
            values.append(float(maml(support, query)))
            for p, d in zip(net.parameters(), v, strict=True):
                p.add_(d, alpha=-sign * 1e-6)
    assert abs((values[0] - values[1]) / 2e-6 - slope) < 1e-6 * max(1, abs(slope))


def test_adapt_gives_the_network_that_predict_uses_and_leaves_the_first_alone():
    for statistics in ("batch", "support"):
        net, support, query = problem()
        maml = MAML(net, lr=0.1, steps=3, statistics=statistics)
        outputs = maml.predict(support, query[0])
        for i in range(2):
            one = maml.adapt(support[0][i], support[1][i])
            assert torch.allclose(one(query[0][i]), outputs[i], atol=1e-10)
            assert not torch.equal(next(one.parameters()), next(net.parameters()))
        assert all(p.grad is None for p in net.parameters())
    with torch.no_grad():
        plain = net(query[0][0])
    maml = MAML(net, lr=0.1, steps=3)
    assert torch.allclose(maml.predict(support, query[0], steps=0)[0], plain, atol=1e-12)


def test_statistics_of_the_support_make_a_prediction_independent_of_the_other_queries():
    net, support, query = problem()
    alone = {}
    for statistics in ("batch", "support"):
        maml = MAML(net, lr=0.1, steps=1, statistics=statistics)
        many = maml.predict(support, query[0])
        few = maml.predict(support, query[0][:, :2])
        alone[statistics] = float((many[:, :2] - few).detach().abs().max())
    assert alone["support"] < 1e-12 < 1e-3 < alone["batch"]


def test_support_statistics_are_differentiated_through():
    net, support, query = problem()
    slopes = []
    for vectorized in (True, False):
        net.zero_grad()
        MAML(net, lr=0.1, steps=2, statistics="support", vectorized=vectorized)(support, query).backward()
        slopes.append(gradients(net))
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(*slopes, strict=True))
    # by hand, for one task and no inner rate to speak of: normalise the query by the support
    net.zero_grad()
    pair = [(x[:1], y[:1]) for x, y in (support, query)]
    MAML(net, lr=1e-12, steps=1, statistics="support")(*pair).backward()
    norm, seen = net[1], net[0](support[0][0])
    var, mean = torch.var_mean(seen, (0, 2, 3), correction=0)
    h = (net[0](query[0][0]) - mean.reshape(-1, 1, 1)) / (var.reshape(-1, 1, 1) + norm.eps).sqrt()
    out = net[2:](h * norm.weight.reshape(-1, 1, 1) + norm.bias.reshape(-1, 1, 1))
    expected = torch.autograd.grad(F.cross_entropy(out, query[1][0]), list(net.parameters()))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(gradients(net), expected, strict=True))


def test_evaluation_mode_uses_the_running_averages():
    net, support, query = problem()
    net[1].running_mean.fill_(0.3)
    net.eval()
    for statistics in ("batch", "support"):
        maml = MAML(net, lr=1e-12, steps=1, statistics=statistics)
        with torch.no_grad():
            assert torch.allclose(maml.predict(support, query[0])[0], net(query[0][0]), atol=1e-9)


def test_dropout_is_replayed_in_the_sweep_and_torch_s_generator_moves_as_in_a_forward():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1)).to(D)
    support = query = torch.randn(3, 5, 4, dtype=D), torch.randn(3, 5, 1, dtype=D)
    maml = MAML(net, lr=0.1, steps=4, checkpointed=True)
    slopes = []
    for _ in range(2):
        torch.manual_seed(1)
        net.zero_grad()
        maml(support, query).backward()
        slopes.append(gradients(net))
    assert all(torch.equal(a, b) for a, b in zip(*slopes, strict=True))
    after = torch.get_rng_state()
    maml(support, query).backward()
    assert not torch.equal(after, torch.get_rng_state())
    still = MAML(nn.Linear(4, 1).to(D), steps=2, checkpointed=True)
    state = torch.get_rng_state()
    still(support, query).backward()
    assert torch.equal(state, torch.get_rng_state())


def test_what_is_not_adapted_is_learned_by_the_outer_loop_alone():
    net, support, query = problem("group norm")
    slopes = []
    for options in ({}, {"checkpointed": True}):
        net.zero_grad()
        maml = MAML(net, lr=0.1, steps=2, params=["5"], **options)
        maml(support, query).backward()
        slopes.append(gradients(net))
        assert list(maml.adapt_tasks(support)) == ["5.weight", "5.bias"]
    assert all(bool(g.abs().max() > 0) for g in slopes[0])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*slopes, strict=True))
    own = maml.adapt(support[0][0], support[1][0])
    assert torch.equal(own[0].weight, net[0].weight) and not torch.equal(own[5].weight, net[5].weight)


@pytest.mark.parametrize("make", [MAML, MetaSGD, Reptile, iMAML])
def test_every_learner_learns_lines_of_many_slopes(make):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 1))
    learner = make(net, lr=0.05, steps=2, **({"regularization": 20.0} if make is iMAML else {}))
    outer = torch.optim.Adam(learner.parameters(), lr=0.03)
    values = []
    for _ in range(20):
        x = 4 * torch.rand(8, 10, 1) - 2
        y = (1 + torch.rand(8, 1, 1)) * x
        outer.zero_grad()
        loss = learner((x[:, :5], y[:, :5]), (x[:, 5:], y[:, 5:]))
        loss.backward()
        outer.step()
        values.append(float(loss.detach()))
    assert sum(values[-5:]) < 0.5 * sum(values[:5])
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_inputs_may_be_several_and_losses_one_a_sample():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, a, b):
            return self.layer(a + b)

    torch.manual_seed(0)
    net, x, y = Two(), torch.randn(3, 4, 2), torch.randn(3, 4, 1)
    values = [
        float(MAML(net, lr=0.1, steps=2, loss=loss)((inputs, y), (inputs, y)).detach())
        for inputs in ((x, x), {"a": x, "b": x})
        for loss in (F.mse_loss, lambda out, y: (out - y).square().flatten(1).mean(1))
    ]
    assert max(values) - min(values) < 1e-6
    assert MAML(net, rule=Adam(0.01)).adapt((x[0], x[0]), y[0])(x[0], x[0]).shape == (4, 1)


def test_misuse_is_refused_by_name():
    net, support, query = problem("group norm")
    with pytest.raises(ArgumentError, match="lr=0"):
        MAML(net, lr=0)
    with pytest.raises(ArgumentError, match="steps=0"):
        MAML(net, steps=0)
    with pytest.raises(ArgumentError, match="statistics='task'"):
        MAML(net, statistics="task")
    with pytest.raises(ArgumentError, match="no such parameter"):
        MAML(net, params=["tail"])
    with pytest.raises(DataError, match="query"):
        MAML(net)(support, query[0])
    with pytest.raises(DataError, match="2 tasks and query 1"):
        MAML(net)(support, (query[0][:1], query[1][:1]))
    with pytest.raises(DivergenceError, match="lower their lr"):
        MAML(net, lr=1e300, steps=3)(support, query)

    class Choosing(nn.Linear):
        def forward(self, x):
            return super().forward(x if x.sum().item() > 0 else -x)

    points = torch.ones(2, 3, 4, dtype=D), torch.zeros(2, 3, 1, dtype=D)
    with pytest.raises(UnsupportedError, match="vectorized=False"):
        MAML(Choosing(4, 1).to(D))(points, points)
    assert float(MAML(Choosing(4, 1).to(D), vectorized=False)(points, points).detach()) > 0


@pytest.mark.parametrize("first_order", [False, True])
def test_attention_in_evaluation_mode_learns_as_in_training_mode(first_order):
    """Without dropout the modes are one; torch's fused kernels of evaluation mode have no second derivatives."""
    net, support, query = problem("attention")
    found = []
    for mode in (True, False):
        net.train(mode).zero_grad()
        learner = MAML(net, lr=0.1, steps=2, first_order=first_order)
        learner(support, query).backward()
        found.append([*gradients(net), learner.predict(support, query[0])])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(*found, strict=True))
    assert torch.backends.mha.get_fastpath_enabled()


def test_inference_mode_is_refused_and_outputs_may_be_dicts():
    class Named(nn.Linear):
        def forward(self, x):
            return {"out": super().forward(x)}

    net, x = Named(2, 1), torch.ones(3, 4, 2)
    learner = MAML(net, loss=lambda out, y: F.mse_loss(out["out"], y), vectorized=False)
    data = x, torch.zeros(3, 4, 1)
    assert learner.predict(data, x)["out"].shape == (3, 4, 1)
    with torch.inference_mode(), pytest.raises(UnsupportedError, match="no_grad"):
        learner.predict(data, x)
