import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss
from torch.testing import assert_close

from bolza.controllers import hypergradients
from bolza.core.errors import ArgumentError, DataError
from bolza.systems import SGD, Adam

F64 = torch.float64


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(12, 2)

    def forward(self, x):
        return self.b(torch.tanh(self.norm(self.a(x))).flatten(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.a(x)[0][:, -1])


def case(kind):
    torch.manual_seed(0)
    net, shape = {
        "mlp": lambda: (nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), (3,)),
        "conv": lambda: (Conv().eval(), (1, 4, 4)),
        "gru": lambda: (Recurrent(), (4, 3)),
    }[kind]()
    data = [(torch.randn(6, *shape, dtype=F64), torch.randint(2, (6,))) for _ in range(5)]
    return net.double(), data[:4], data[4]


def through_autograd(net, data, held_out, values, wanted):
    """The run written down with leaves for the hyper-parameters, one a step, and differentiated."""
    theta = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    hyper = {n: [torch.tensor(v, dtype=F64, requires_grad=True) for _ in data] for n, v in values.items()}
    first = {n: torch.zeros_like(p) for n, p in theta.items()}
    second = {n: torch.zeros_like(p) for n, p in theta.items()}
    start = theta
    for t, (x, y) in enumerate(data):
        u = {name: steps[t] for name, steps in hyper.items()}
        loss = cross_entropy(functional_call(net, theta, x), y)
        grads = dict(
            zip(theta, torch.autograd.grad(loss, list(theta.values()), create_graph=True), strict=True)
        )
        new = {}
        for n, p in theta.items():
            g = grads[n] + u["weight_decay"] * p
            if "beta1" in u:
                first[n] = u["beta1"] * first[n] + (1 - u["beta1"]) * g
                second[n] = u["beta2"] * second[n] + (1 - u["beta2"]) * g * g
                mean = first[n] / (1 - u["beta1"] ** (t + 1))
                root = (second[n] / (1 - u["beta2"] ** (t + 1))).sqrt()
                new[n] = p - u["lr"] * mean / (root + 1e-8)
            else:
                first[n] = u["momentum"] * first[n] + g
                new[n] = p - u["lr"] * first[n]
        theta = new
    value = cross_entropy(functional_call(net, theta, held_out[0]), held_out[1])
    leaves = [leaf for name in wanted for leaf in hyper[name]]
    found = torch.autograd.grad(value, [*leaves, *start.values()], allow_unused=True, materialize_grads=True)
    per_step = torch.stack(found[: len(leaves)]).reshape(len(wanted), len(data))
    return (
        value.detach(),
        dict(zip(wanted, per_step, strict=True)),
        dict(zip(start, found[len(leaves) :], strict=True)),
    )


RULES = {
    "sgd": (SGD(lr=0.2, momentum=0.8, weight_decay=0.01), {"lr": 0.2, "momentum": 0.8, "weight_decay": 0.01}),
    "adam": (
        Adam(lr=0.05, betas=(0.8, 0.9), weight_decay=0.01),
        {"lr": 0.05, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.01},
    ),
}


@pytest.mark.parametrize(("kind", "rule"), [("mlp", "sgd"), ("mlp", "adam"), ("conv", "sgd"), ("gru", "sgd")])
def test_both_modes_are_autograd_through_the_run(kind, rule):
    net, data, held_out = case(kind)
    made, values = RULES[rule]
    value, per_step, initial = through_autograd(net, data, held_out, values, list(values))
    reverse = hypergradients(net, cross_entropy, data, held_out, made, hyper=list(values))
    forward = hypergradients(net, cross_entropy, data, held_out, made, hyper=list(values), mode="forward")
    assert_close(reverse.value, value, rtol=1e-12, atol=0)
    assert_close(reverse.per_step, per_step, rtol=0, atol=1e-10)
    assert_close(reverse.initial, initial, rtol=0, atol=1e-10)
    assert_close(forward.total, {k: v.sum() for k, v in per_step.items()}, rtol=0, atol=1e-10)
    assert_close(forward.total, reverse.total, rtol=0, atol=1e-10)
    assert_close(forward.final, reverse.final, rtol=0, atol=1e-12)


def test_groups_split_the_derivative_in_both_modes():
    net, data, held_out = case("mlp")
    rule = SGD(lr=0.2, momentum=0.8)
    whole = hypergradients(net, cross_entropy, data, held_out, rule, hyper=["lr", "momentum"])
    split = {
        mode: hypergradients(
            net,
            cross_entropy,
            data,
            held_out,
            rule,
            hyper=["lr", "momentum"],
            groups=[["0"], ["2"]],
            mode=mode,
        )
        for mode in ("reverse", "forward")
    }
    assert split["reverse"].per_step["lr"].shape == (4, 2)
    for name in ("lr", "momentum"):
        assert_close(split["reverse"].total[name].sum(), whole.total[name], rtol=0, atol=1e-12)
        assert_close(split["forward"].total[name], split["reverse"].total[name], rtol=0, atol=1e-12)


def test_a_schedule_is_differentiated_where_it_is():
    net, data, held_out = case("mlp")
    rates = [0.1, 0.2, 0.3, 0.4]
    found = hypergradients(net, cross_entropy, data, held_out, SGD(0.1), schedule=[{"lr": r} for r in rates])

    def final(at, shift):
        moved = [{"lr": r + shift * (i == at)} for i, r in enumerate(rates)]
        return hypergradients(net, cross_entropy, data, held_out, SGD(0.1), schedule=moved).value

    slopes = [(final(i, 1e-5) - final(i, -1e-5)) / 2e-5 for i in range(4)]
    assert_close(found.per_step["lr"], torch.stack(slopes), rtol=1e-6, atol=1e-9)


def test_the_reverse_mode_keeps_few_states_and_the_numbers_do_not_depend_on_which():
    net, data, held_out = case("mlp")
    few = hypergradients(net, cross_entropy, data * 4, held_out, SGD(0.1, momentum=0.9))
    all_ = hypergradients(net, cross_entropy, data * 4, held_out, SGD(0.1, momentum=0.9), every=1)
    assert few.most_states == 7 and all_.most_states == 16
    assert_close(few.per_step, all_.per_step, rtol=0, atol=0)


def test_the_network_and_single_precision_stay_as_they_are():
    net, data, held_out = case("mlp")
    net, data = net.float(), [(x.float(), y) for x, y in data]
    before = {name: p.clone() for name, p in net.state_dict().items()}
    found = hypergradients(net, cross_entropy, data, (held_out[0].float(), held_out[1]))
    assert_close(dict(net.state_dict()), before, rtol=0, atol=0)
    assert found.value.dtype == torch.float32 and found.initial["0.weight"].dtype == torch.float32


def test_validation_in_batches_is_their_mean():
    net, data, held_out = case("mlp")
    one = [hypergradients(net, cross_entropy, data, b).total["lr"] for b in (held_out, data[0])]
    both = hypergradients(net, cross_entropy, data, [held_out, data[0]]).total["lr"]
    assert_close(both, sum(one) / 2, rtol=1e-12, atol=0)


def test_senseless_arguments_are_refused_by_name():
    net, data, held_out = case("mlp")
    for word, options in {
        "momentum is one where": {"hyper": ["momentum"]},
        "mode='sideways'": {"mode": "sideways"},
        "leaves out '2.weight'": {"groups": [["0"]]},
        "in group 0 and in group 1": {"groups": [["0", "2"], ["2.bias"]]},
    }.items():
        with pytest.raises(ArgumentError, match=word):
            hypergradients(net, cross_entropy, data, held_out, **options)
    with pytest.raises(DataError, match="batches"):
        hypergradients(net, mse_loss, [], held_out)
