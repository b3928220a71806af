import copy
import gc
import inspect
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, DivergenceError, TraceError
from bolza.optim import EMSA, MSA, DDPNOpt, DGNOpt

MAKE = {
    "ddp": lambda net: DDPNOpt(net, lr=0.05),
    "rmsprop": lambda net: DDPNOpt(net, lr=1e-3, curvature="rmsprop"),
    "kronecker": lambda net: DDPNOpt(net, lr=0.05, curvature="kronecker"),
    "game": lambda net: DGNOpt(net, lr=0.05, information="cooperative", alignment="bandit"),
    "msa": lambda net: MSA(net),
    "emsa": lambda net: EMSA(net),
}
every = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def some(*names):
    return pytest.mark.parametrize("make", [MAKE[name] for name in names], ids=names)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def batch():
    draw = torch.Generator().manual_seed(1)
    return torch.randn(6, 4, generator=draw), torch.randint(3, (6,), generator=draw)


def alone(make):
    net = network()
    return net, make(net)


def losses(net, optimizer, steps=3):
    x, y = batch()
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@every
def test_a_copy_of_network_and_optimizer_goes_on_as_they_do(make):
    net = network()
    optimizer = make(net)
    losses(net, optimizer, 2)
    twin, other = copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))
    assert losses(*twin, 2) == losses(*other, 2) == losses(net, optimizer, 2)


def test_a_copy_of_the_network_alone_is_not_recorded():
    net = network()
    optimizer = DDPNOpt(net, lr=0.05)
    losses(net, optimizer)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        F.cross_entropy(twin(batch()[0]), batch()[1]).backward()
        assert optimizer._recorder.trajectories == ()
        assert list(inspect.signature(twin.forward).parameters) == ["input"]


@every
def test_a_scaled_loss_makes_the_same_steps(make):
    found = []
    for enabled in (False, True):
        net = network()
        optimizer, scaler = make(net), torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=enabled)
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(net(batch()[0]), batch()[1])).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6)


@some("kronecker", "emsa")
def test_it_trains_under_autocast(make):
    plain = losses(*alone(make), 4)
    net, (x, y), found = network(), batch(), []
    optimizer = make(net)
    for _ in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found == pytest.approx(plain, rel=2e-2)
    assert found[-1] < found[0]


@pytest.mark.parametrize("name", ["kronecker", "game"])
def test_kronecker_factors_of_a_network_in_half_precision_are_kept_in_single(name):
    net = network().bfloat16()
    optimizer, (x, y) = MAKE[name](net), batch()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(x.bfloat16()).float(), y).backward()
        optimizer.step()
    assert optimizer.state[net[0].weight]["input_factor"].dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in net.parameters())


@some("ddp", "emsa")
def test_two_optimizers_made_before_the_first_run_share_a_network(make):
    whole, net = network(), network()
    kind = type(make(network()))
    parts = [list(net[:2].parameters()), list(net[2:].parameters())]
    first, second = (kind(net, params=part) for part in parts)
    single = kind(whole)
    for _ in range(2):
        x, y = batch()
        for one in (first, second, single):
            one.zero_grad()
        F.cross_entropy(net(x), y).backward()
        F.cross_entropy(whole(x), y).backward()
        for one in (first, second, single):
            one.step()
        assert net[0].weight.allclose(whole[0].weight, rtol=0.05, atol=1e-3)
    assert not net[3].weight.equal(network()[3].weight)


def test_an_optimizer_made_during_a_run_leaves_the_others_passes_alone():
    net = network()
    first = DDPNOpt(net, lr=0.05, params=list(net[:2].parameters()))
    losses(net, first)
    second = DDPNOpt(net, lr=0.05, params=list(net[2:].parameters()))
    for one in (first, second):
        one.zero_grad()
    F.cross_entropy(net(batch()[0]), batch()[1]).backward()
    assert len(first._recorder.trajectories) == len(second._recorder.trajectories) == 1
    first.step()
    second.step()


@some("ddp")
def test_a_first_run_that_fails_is_not_the_last_one(make):
    net = network()
    optimizer = make(net)
    with pytest.raises(TraceError):
        net(torch.zeros(2, 5))
    assert losses(net, optimizer) == losses(*alone(make))


@some("ddp", "game")
def test_a_deleted_optimizer_leaves_no_hook_on_the_network(make):
    net = network()
    optimizer = make(net)
    losses(net, optimizer, 1)
    recorder = weakref.ref(optimizer._recorder)
    del optimizer
    gc.collect()
    assert recorder() is None
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
    assert {"forward", "zero_grad"}.isdisjoint(net.__dict__)


@some("ddp", "msa")
def test_parameters_of_another_network_are_refused(make):
    net, head = network(), nn.Linear(3, 2)
    optimizer = make(net)
    with pytest.raises(ArgumentError, match="no parameter of Sequential"):
        optimizer.add_param_group({"params": list(head.parameters())})
    assert len(optimizer.param_groups) == 1


@some("ddp", "game")
def test_a_gradient_that_is_not_finite_stops_the_step_before_anything_changed(make):
    net = network()
    optimizer, before = make(net), [p.clone() for p in net.parameters()]
    (net(batch()[0]).sum() * float("nan")).backward()
    with pytest.raises(DivergenceError, match="not finite"):
        optimizer.step()
    assert all(p.equal(old) for p, old in zip(net.parameters(), before, strict=True))
