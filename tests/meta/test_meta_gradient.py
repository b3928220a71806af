"""The meta-gradient: closed forms, the costate recursion, autograd through the loop."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from bolza.core.errors import ArgumentError, DataError, DivergenceError, ShapeError
from bolza.meta import meta_gradient
from bolza.systems import SGD, Adam

D = torch.float64
A = torch.stack(
    [torch.diag(torch.tensor([1.0, 2.0], dtype=D)), torch.diag(torch.tensor([3.0, 0.5], dtype=D))]
)
C = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=D)
QUADRATICS = (A, C)


def quadratic(w, data):
    a, c = data
    return (w - c) @ a @ (w - c) / 2


def stationary(steps, mode):
    """Where the meta-gradient, an affine function of w, is zero."""

    def g(w):
        return meta_gradient(quadratic, w, QUADRATICS, QUADRATICS, 0.1, steps, mode=mode).gradient

    zero = g(torch.zeros(2, dtype=D))
    slope = torch.stack([g(e) - zero for e in torch.eye(2, dtype=D)], 1)
    return torch.linalg.solve(slope, -zero)


@pytest.mark.parametrize(
    ("steps", "mode", "expected"),
    [
        (1, "reverse", (0.355263, 0.521300)),
        (1, "checkpointed", (0.355263, 0.521300)),
        (1, "first_order", (0.3, 0.457831)),
        (0, "reverse", (0.25, 0.4)),
    ],
)
def test_two_quadratic_tasks_have_the_known_optima(steps, mode, expected):
    assert torch.allclose(stationary(steps, mode), torch.tensor(expected, dtype=D), atol=6e-7)


def test_the_gradient_is_the_costate_of_the_recursion_with_hessians():
    w = torch.tensor([0.3, -1.1], dtype=D)
    p = []
    for a, c in zip(A, C, strict=True):
        step = torch.eye(2, dtype=D) - 0.1 * a
        end = c + torch.linalg.matrix_power(step, 4) @ (w - c)
        p.append(torch.linalg.matrix_power(step, 4) @ a @ (end - c))
    found = meta_gradient(quadratic, w, QUADRATICS, QUADRATICS, 0.1, 4, mode="checkpointed")
    assert torch.allclose(found.gradient, torch.stack(p).mean(0), atol=1e-14)
    assert found.params.shape == (2, 2)


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).to(D)
    sets = [(torch.randn(3, 5, 2, dtype=D), torch.randn(3, 5, 1, dtype=D)) for _ in range(2)]

    def loss(p, batch):
        return nn.functional.mse_loss(functional_call(net, p, batch[0]), batch[1])

    return dict(net.named_parameters()), loss, *sets


def by_hand(params, loss, support, query, lr, steps):
    """Autograd through the loop, task by task."""
    total = 0.0
    for i in range(3):
        w = params
        for _ in range(steps):
            slopes = torch.autograd.grad(
                loss(w, (support[0][i], support[1][i])), list(w.values()), create_graph=True
            )
            w = {name: p - lr * g for (name, p), g in zip(w.items(), slopes, strict=True)}
        total = total + loss(w, (query[0][i], query[1][i])) / 3
    return torch.autograd.grad(total, [*params.values(), lr])


def test_every_exact_mode_is_autograd_through_the_loop():
    params, loss, support, query = network()
    lr = torch.tensor(0.2, dtype=D, requires_grad=True)
    *expected, by_lr = by_hand(params, loss, support, query, lr, 6)
    for options in (
        {},
        {"mode": "checkpointed"},
        {"mode": "checkpointed", "every": 6},
        {"vectorized": False},
    ):
        found = meta_gradient(loss, params, support, query, 0.2, 6, **options)
        for g, e in zip(found.gradient.values(), expected, strict=True):
            assert torch.allclose(g, e, rtol=1e-10, atol=1e-12)
        assert abs(float(found.rule_gradient["lr"] - by_lr)) < 1e-10
    assert meta_gradient(loss, params, support, query, 0.2, 16, mode="checkpointed").states_held <= 8


@pytest.mark.parametrize(
    "rule", [SGD(0.1, momentum=0.9, nesterov=True), SGD(0.1, weight_decay=0.2), Adam(0.05)]
)
def test_the_two_sweeps_agree_for_every_inner_rule(rule):
    params, loss, support, query = network()
    one = meta_gradient(loss, params, support, query, rule, 4)
    two = meta_gradient(loss, params, support, query, rule, 4, mode="checkpointed")
    for name in params:
        assert torch.allclose(one.gradient[name], two.gradient[name], rtol=1e-9, atol=1e-13)
    for name, g in one.rule_gradient.items():
        assert torch.allclose(g, two.rule_gradient[name], rtol=1e-9, atol=1e-12)


def test_first_order_is_the_gradient_where_the_inner_steps_end():
    params, loss, support, query = network()
    found = meta_gradient(loss, params, support, query, 0.2, 3, mode="first_order")
    expected = {name: 0.0 for name in params}
    for i in range(3):
        w = {name: p[i].requires_grad_() for name, p in found.params.items()}
        slopes = torch.autograd.grad(loss(w, (query[0][i], query[1][i])), list(w.values()))
        for name, g in zip(w, slopes, strict=True):
            expected[name] = expected[name] + g / 3
    assert all(torch.allclose(found.gradient[name], expected[name], atol=1e-14) for name in params)


def test_what_cannot_be_is_refused_by_name():
    w = torch.zeros(2, dtype=D)
    with pytest.raises(ArgumentError, match="mode='backward'"):
        meta_gradient(quadratic, w, QUADRATICS, QUADRATICS, 0.1, mode="backward")
    with pytest.raises(DataError, match="support has 2 tasks and query 1"):
        meta_gradient(quadratic, w, QUADRATICS, (A[:1], C[:1]), 0.1)
    with pytest.raises(DataError, match="first dimension"):
        meta_gradient(quadratic, w, (A, C[:1]), QUADRATICS, 0.1)
    with pytest.raises(DivergenceError, match="check_rates"):
        meta_gradient(quadratic, w, QUADRATICS, QUADRATICS, 1e60, 9)
    with pytest.raises(ShapeError, match="scalar"):
        meta_gradient(lambda w, data: data[0] * w, w, QUADRATICS, QUADRATICS, 0.1)
