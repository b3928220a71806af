"""Successive approximation as an optimizer."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bolza.core import TerminalCost, gradient_minimizer, lbfgs_minimizer, proximal_minimizer, rollout
from bolza.core.errors import ArgumentError, DivergenceError, UnsupportedError
from bolza.optim import EMSA, MSA
from bolza.optim.hamiltonians import Hamiltonians
from bolza.solve import hamiltonian_sweep
from bolza.systems import as_system
from bolza.testing import check_optimizer
from networks import NETWORKS

F64 = torch.float64


def net(seed=0, dtype=F64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def data(n=12, seed=1, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=g, dtype=dtype), torch.randn(n, 2, generator=g, dtype=dtype)


def closure_of(model, opt, x, y, loss=nn.functional.mse_loss):
    def closure():
        opt.zero_grad()
        value = loss(model(x), y)
        value.backward()
        return value

    return closure


@pytest.mark.parametrize(
    "make",
    [
        lambda model: MSA(model, iterations=2),
        lambda model: EMSA(model, iterations=2, split="affine"),
    ],
)
def test_it_is_an_optimizer(make):
    check_optimizer(make, takes_model=True)


def test_with_accept_and_reject_it_is_an_optimizer_whose_step_needs_a_closure():
    model, (x, y) = net(), data()
    opt = EMSA(model, adapt=True)
    nn.functional.mse_loss(model(x), y).backward()
    with pytest.raises(ArgumentError, match="got no closure"):
        opt.step()


def test_one_gradient_step_on_each_hamiltonian_is_sgd():
    x, y = data()
    models = [net(), net()]
    ours = MSA(models[0], proximal=0.0, weight_decay=0.02, minimizer=gradient_minimizer(0.1))
    theirs = torch.optim.SGD(models[1].parameters(), lr=0.1, weight_decay=0.02)
    for _ in range(20):
        for model, opt in zip(models, (ours, theirs), strict=True):
            opt.step(closure_of(model, opt, x, y))
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("split", ["parameters", "affine"])
@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_a_step_is_the_sweep_of_successive_approximation(split, rho):
    """Two routes: recorded passes, all layers in one evaluation; and each layer of the system by itself."""
    model, (x, y) = net(), data()
    before = copy.deepcopy(model)
    opt = (
        EMSA(model, lr=1.0, rho=rho, iterations=4, split=split)
        if rho
        else MSA(model, proximal=3.0, iterations=4, split=split)
    )
    opt.step(closure_of(model, opt, x, y))
    system = as_system(before, x, split=split)
    with torch.no_grad():
        run = rollout(system, x)
    minimizer = lbfgs_minimizer(4) if rho else proximal_minimizer(3.0, 4)
    cost = TerminalCost(nn.functional.mse_loss, y)
    for u in hamiltonian_sweep(system, cost, run, minimizer, rho=rho, samples=len(x)):
        for name, value in u.items():
            assert_close(model.get_parameter(name).detach(), value, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_the_networks_that_people_have_are_trained(name):
    torch.manual_seed(0)
    model, (x, y), loss = NETWORKS[name]()
    opt = EMSA(model, lr=1.0, rho=1.0, proximal=0.5, iterations=2, adapt=True)
    losses = [opt.step(closure_of(model, opt, x, y, loss)).item() for _ in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["residual", "attention"])
def test_all_layers_at_once_give_the_sum_of_each(name):
    found = [
        key for key in NETWORKS if name in key.lower() or (name == "attention" and "causal" in key.lower())
    ]
    model, (x, y), loss = NETWORKS[found[0] if found else sorted(NETWORKS)[0]]()
    opt = EMSA(model)
    loss(model(x), y).backward()
    wanted = {key: p for key, p in model.named_parameters() if p.grad is not None}
    assert opt.system is not None
    with opt._recorder.paused():
        problem = Hamiltonians(
            [(opt.system, opt._recorder.trajectory)], wanted, dict.fromkeys(wanted, (0.0, 0.0)), 0.7, None
        )
        parts = problem.split(problem.start + 0.05 * torch.randn_like(problem.start))
        each = torch.stack([problem.of_block(b, values) for b, values in enumerate(parts)])
        assert_close(problem.together(parts), each)


def test_weight_decay_is_part_of_the_hamiltonian_not_of_the_gradient():
    """With ρ and κ large the step is one down ∇J + λθ, over the curvature; λ enters once."""
    steps = []
    for decay in (0.0, 0.5):
        model, (x, y) = net(), data()
        before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        opt = MSA(model, proximal=1e4, weight_decay=decay)
        opt.step(closure_of(model, opt, x, y))
        steps.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]) - before)
    assert_close((steps[1] - steps[0]) * 1e4, -0.5 * before, rtol=1e-2, atol=1e-3)


def test_adapting_makes_the_loss_fall_at_each_step_and_finds_rho():
    model, (x, y) = net(), data()
    opt = EMSA(model, lr=1.0, rho=1e-3, adapt=True, iterations=5)
    closure, rhos, losses = closure_of(model, opt, x, y), [], []
    for _ in range(10):
        losses.append(opt.step(closure).item())
        rhos.append(opt.param_groups[0]["rho"])
    assert losses == sorted(losses, reverse=True)
    assert max(rhos) > 1e-3 and all(
        torch.tensor(rhos).log2().sub(torch.tensor(1e-3).log2()).round(decimals=3) % 1 == 0
    )


def test_a_step_that_cannot_lower_the_loss_leaves_the_parameters_alone():
    model, (x, y) = net(), data()
    opt = EMSA(model, adapt=True)
    values = iter(range(100))

    def rising():
        opt.zero_grad()
        value = nn.functional.mse_loss(model(x), y)
        value.backward()
        return value.detach() + 10 * next(values)

    before = copy.deepcopy(model.state_dict())
    opt.step(rising)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_that_are_not_those_of_the_passes_need_a_proximal_term():
    model, (x, y) = net(), data()

    def penalised(opt):
        opt.zero_grad()
        (nn.functional.mse_loss(model(x), y) + 0.3 * model[0].weight.square().sum()).backward()
        opt.step()

    opt = EMSA(model)
    with pytest.raises(UnsupportedError, match="weight_decay="):
        penalised(opt)
    opt.close()
    opt = EMSA(model, proximal=1.0)
    before = model[0].weight.norm().item()
    for _ in range(5):
        penalised(opt)
    assert model[0].weight.norm().item() < before


def test_to_first_order_the_step_follows_the_gradient_that_there_is():
    """Clipped, penalised or noisy: with a large κ the step is −∇/κ of the .grad, not of the recorded pass."""
    model, (x, y) = net(), data()
    opt = MSA(model, proximal=1e5)
    nn.functional.mse_loss(model(x), y).backward()
    for p in model.parameters():
        p.grad.mul_(0.1).add_(0.3)
    before = [p.detach().clone() for p in model.parameters()]
    opt.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert_close((old - p.detach()) * 1e5, p.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: MSA(m, proximal=0.0), "has no minimum"),
        (lambda m: MSA(m, lr=1.5), "at most 1"),
        (lambda m: EMSA(m, rho=0.0), "rho is 0.0"),
        (lambda m: EMSA(m, weight_decay=-1.0), "weight_decay is -1.0"),
        (lambda m: EMSA(m, iterations=0), "iterations is 0"),
        (lambda m: EMSA(m.parameters()), "pass the nn.Module"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, words):
    with pytest.raises(ArgumentError, match=words):
        make(net())


def test_a_gradient_that_is_not_finite_stops_the_step_before_anything_changed():
    model, (x, y) = net(), data()
    opt = EMSA(model)
    nn.functional.mse_loss(model(x), y).backward()
    model[2].weight.grad[0, 0] = torch.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DivergenceError, match=r"2\.weight"):
        opt.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
