import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from bolza.core.errors import ArgumentError
from bolza.data import diabetes, digits, text
from bolza.models import make, mlp
from bolza.training import BatchOrder, ensemble_parameters, train_ensemble

DATA = digits()
RATES = [0.01, 0.1, 0.3]


def single(model, parameters, m, lr, momentum, data, steps, loss):
    """Member m trained alone, by a plain loop."""
    params = {name: nn.Parameter(p[m].clone()) for name, p in parameters.items()}
    optimizer = torch.optim.SGD(params.values(), lr=lr, momentum=momentum)
    data = data.to(dtype=next(iter(params.values())).dtype)
    order = BatchOrder(data.train_x, data.train_y, 64, seed=4)
    for _ in range(steps):
        x, y = order.next()
        optimizer.zero_grad()
        loss(functional_call(model, params, (x,)), y).backward()
        optimizer.step()
    return params


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_members_end_where_single_runs_end(momentum):
    def build():
        return mlp(5, 20).double()  # in float32 the dynamics amplify rounding beyond any fixed tolerance

    start = ensemble_parameters(build, [0.5, 1.0, 2.0], [0.0, 0.1, 0.05], seed=1)
    run = train_ensemble(build, DATA, parameters=start, lr=RATES, momentum=momentum, steps=30, seed=4)
    for m, lr in enumerate(RATES):
        alone = single(build(), start, m, lr, momentum, DATA, 30, F.cross_entropy)
        for name, p in alone.items():
            assert torch.allclose(run.parameters[name][m], p, atol=1e-10)
        outputs = functional_call(build(), alone, (DATA.test_x.double(),))
        assert (outputs.argmax(1) == DATA.test_y).double().mean().item() == pytest.approx(
            run.test_accuracy[m].item()
        )


@pytest.mark.parametrize(("name", "data"), [("mlp", diabetes()), ("gpt", text(length=8))])
def test_other_networks_and_losses_train_as_if_alone(name, data):
    def build():
        return make(name, data, depth=2, width=16)

    from bolza.training import default_loss

    run = train_ensemble(build, data, parameters=2, lr=0.1, steps=0)
    start = run.parameters
    run = train_ensemble(build, data, parameters=start, lr=0.1, steps=5, seed=4)
    for m in range(2):
        alone = single(build(), start, m, 0.1, 0.0, data, 5, default_loss(data.task))
        assert all(torch.allclose(run.parameters[n][m], p, atol=1e-5) for n, p in alone.items())


def test_chunks_change_nothing():
    options = {"weight_vars": [0.5, 1.0, 2.0], "lr": 0.1, "steps": 10, "seed": 2}
    whole = train_ensemble(lambda: mlp(3, 10), DATA, **options)
    parts = train_ensemble(lambda: mlp(3, 10), DATA, chunk=2, **options)
    assert torch.allclose(whole.train_loss, parts.train_loss, atol=1e-6) and len(parts) == 3


def test_a_member_that_diverges_leaves_the_others_alone():
    options = {"weight_vars": [1.0, 1.0], "steps": 20}
    both = train_ensemble(lambda: mlp(2, 8, "relu"), DATA, lr=[0.1, 1e30], **options)
    tame = train_ensemble(lambda: mlp(2, 8, "relu"), DATA, lr=0.1, **options)
    assert both.diverged.tolist() == [False, True] and math.isinf(both.train_loss[1])
    assert torch.allclose(both.train_loss[0], tame.train_loss[0], atol=1e-6)


def test_drawn_parameters_have_the_variances_asked_for():
    stacked = ensemble_parameters(lambda: nn.Linear(200, 300), [1.0, 4.0], [0.5, 0.0])
    for m, variance in enumerate([1.0, 4.0]):
        draws = stacked["weight"][m] * math.sqrt(200)
        assert abs(draws.square().mean() / variance - 1) < 4 * math.sqrt(2 / draws.numel())
    assert (
        abs(stacked["bias"][0].var() / 0.5 - 1) < 4 * math.sqrt(2 / 300) and (stacked["bias"][1] == 0).all()
    )


def test_impossible_ensembles_are_refused():
    with pytest.raises(ArgumentError, match="lr holds 2 values for 3 members"):
        train_ensemble(lambda: mlp(2, 5), DATA, parameters=3, lr=[0.1, 0.2])
    with pytest.raises(ArgumentError, match="has buffers"):
        train_ensemble(lambda: nn.BatchNorm1d(64), DATA, parameters=2)
    with pytest.raises(ArgumentError, match="must not be negative"):
        ensemble_parameters(lambda: mlp(2, 5), [-1.0])
    with pytest.raises(ArgumentError, match="give parameters="):
        train_ensemble(lambda: mlp(2, 5), DATA)
