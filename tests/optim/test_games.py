"""The optimizer whose layers are players."""

import copy
import io

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError
from bolza.models import resnet
from bolza.optim.cooperation import damped_blocks
from bolza.optim.ddp import DDPNOpt
from bolza.optim.games import DGNOpt
from bolza.testing import check_optimizer


class Block(nn.Module):
    """x ↦ two(tanh one(x)) + skip(x)."""

    def __init__(self, width=6, dtype=torch.float64):
        super().__init__()
        self.one, self.two = (nn.Linear(width, width, dtype=dtype) for _ in range(2))
        self.skip = nn.Linear(width, width, bias=False, dtype=dtype)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x))) + self.skip(x)


class Branches(nn.Module):
    """Players side by side, called in a given order."""

    def __init__(self, order=(0, 1), width=5, dtype=torch.float64):
        super().__init__()
        self.first = nn.Linear(4, width, dtype=dtype)
        self.branches = nn.ModuleList(nn.Linear(width, 3, dtype=dtype) for _ in order)
        self.last = nn.Linear(3 * len(order), 3, dtype=dtype)
        self.order = order

    def forward(self, x):
        x = torch.tanh(self.first(x))
        out = {k: self.branches[k](x) for k in self.order}
        return self.last(torch.tanh(torch.cat([out[k] for k in range(len(out))], 1)))


def data(features=4, classes=3, n=16, dtype=torch.float64):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(n, features, generator=draw, dtype=dtype), torch.randint(classes, (n,), generator=draw)


def train(net, optimizer, steps, x, y):
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def made(kind, *args, **kwargs):
    torch.manual_seed(0)
    return kind(*args, **kwargs)


def tanh_mlp():
    torch.manual_seed(0)
    return nn.Sequential(*(m for k in range(4) for m in (nn.Linear(6, 6).double(), nn.Tanh())))


@pytest.mark.parametrize(
    "options",
    [{}, {"information": "open"}, {"information": "cooperative"}],
    ids=["feedback", "open", "cooperative"],
)
def test_it_is_an_optimizer(options):
    check_optimizer(lambda model: DGNOpt(model, **options), takes_model=True)


# ------------------------------------------------------------------------------ special cases


@pytest.mark.parametrize(
    ("information", "curvature"), [("feedback", "identity"), ("cooperative", "kronecker")]
)
def test_on_a_chain_it_is_differential_dynamic_programming(information, curvature):
    x, y = data(6, 6)
    one, two = tanh_mlp(), tanh_mlp()
    ours = train(one, DGNOpt(one, lr=0.1, information=information), 20, x, y)
    theirs = train(two, DDPNOpt(two, lr=0.1, curvature=curvature), 20, x, y)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_open_players_make_stochastic_gradient_descent():
    x, y = data(6, 6)
    one, two = made(Block), made(Block)
    ours = train(one, DGNOpt(one, lr=0.1, momentum=0.9, information="open"), 20, x, y)
    theirs = train(two, torch.optim.SGD(two.parameters(), lr=0.1, momentum=0.9), 20, x, y)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("information", ["feedback", "cooperative"])
def test_with_a_skip_that_is_zero_it_is_differential_dynamic_programming_bit_for_bit(information):
    class Net(nn.Module):
        def __init__(self, skip):
            super().__init__()
            self.block, self.with_skip = Block(), skip
            nn.init.zeros_(self.block.skip.weight).requires_grad_(False)

        def forward(self, x):
            path = self.block.two(torch.tanh(self.block.one(x)))
            return path + self.block.skip(x) if self.with_skip else path

    x, y = data(6, 6)
    curvature = "identity" if information == "feedback" else "kronecker"
    one, two = made(Net, True), made(Net, False)
    optimizer = DGNOpt(one, lr=0.3, information=information, alignment="late")
    ours = train(one, optimizer, 10, x, y)
    assert optimizer.teams() == (("block.one",), ("block.two",))
    theirs = train(two, DDPNOpt(two, lr=0.3, curvature=curvature), 10, x, y)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---------------------------------------------------------------- feedback through a block, independently


def oracle(net, x, y, lr, stages):
    """One damped step of a block, its samples one by one; ``stages`` names the layers of each stage."""
    net, n, s = copy.deepcopy(net), len(x), 0.5
    named = dict(net.named_parameters())

    def parts(x, inside):
        """Output, with what enters the second stage given instead of computed."""
        h = torch.tanh(net.one(x)) if inside is None else inside[0]
        r = (x if "skip" in stages[1] else net.skip(x)) if inside is None else inside[1]
        return net.two(h) + (net.skip(r) if "skip" in stages[1] else r), (h, r)

    grads, inner, costates = [], [], []
    for i in range(n):
        out, inside = parts(x[i], None)
        inside = [v.detach().requires_grad_() for v in inside]
        out = parts(x[i], inside)[0]
        costates.append(torch.autograd.grad(nn.functional.cross_entropy(out, y[i]), inside))
        loss = nn.functional.cross_entropy(net(x[i]), y[i])
        grads.append(dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)))
        inner.append([v.detach() for v in inside])

    def norm(i, stage):
        return lr * sum(g.square().sum() for name, g in grads[i].items() if name.split(".")[0] in stage)

    with torch.no_grad():
        for t, stage in enumerate(stages):
            if t == 1:
                moved = [parts(x[i], None)[1] for i in range(n)]
            steps = {name: torch.zeros_like(p) for name, p in named.items()}
            for i in range(n):
                alpha, beta = s, 1.0
                t2 = alpha**2 * norm(i, stages[1]) / n
                room = 1 + t2
                weight = beta
                if t == 1:
                    deviation = sum(
                        (p * (a - b)).sum() for p, a, b in zip(costates[i], moved[i], inner[i], strict=True)
                    )
                    weight = beta + alpha * (alpha * deviation / room).clamp(-1, 1)
                else:
                    weight = beta / room
                for name, g in grads[i].items():
                    steps[name] += weight * g / n
            for name, p in named.items():
                if name.split(".")[0] in stage:
                    p -= lr * steps[name]
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("alignment", ["late", "early"])
def test_a_step_through_a_residual_block_is_that_of_the_augmented_state(alignment):
    x, y = data(6, 6, n=5)
    net = made(Block)
    stages = [["one"], ["two", "skip"]] if alignment == "late" else [["one", "skip"], ["two"]]
    expected = oracle(net, x, y, 0.8, stages)
    found = train(net, DGNOpt(net, lr=0.8, alignment=alignment), 1, x, y)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_alignments_differ_in_what_they_feed_back():
    x, y = data(6, 6)
    results = []
    for alignment in ("whole", "early", "late"):
        net = made(Block)
        results.append(train(net, DGNOpt(net, lr=0.5, alignment=alignment), 2, x, y))
    for one in range(3):
        for two in range(one):
            assert any(not torch.allclose(a, b) for a, b in zip(results[one], results[two], strict=True))


# ----------------------------------------------------------------------------------- cooperation


@pytest.mark.parametrize("players", [2, 3])
def test_cooperating_branches_take_the_joint_kronecker_step(players):
    """Without a value Hessian (scale 0) the step is −η M⁻¹∇J with the dense joint M."""
    x, y = data()
    net = made(Branches, tuple(range(players)))
    before = [torch.cat([b.weight, b.bias[:, None]], 1).detach().clone() for b in net.branches]
    hidden = torch.tanh(net.first(x)).detach()
    outs = [b(hidden) for b in net.branches]
    loss = nn.functional.cross_entropy(net.last(torch.tanh(torch.cat(outs, 1))), y)
    signals = [g * len(x) for g in torch.autograd.grad(loss, outs)]
    entered = torch.cat([hidden, hidden.new_ones(len(x), 1)], 1)
    inputs = [[entered.T @ entered / len(x)] * players] * players
    backs = [[a.T @ b / len(x) for b in signals] for a in signals]
    inputs, backs = damped_blocks(inputs, backs, 0.03)
    n = range(players)
    joint = torch.cat([torch.cat([torch.kron(backs[u][v], inputs[u][v]) for v in n], 1) for u in n])
    gradient = torch.cat([(g.T @ entered / len(x)).flatten() for g in signals])
    expected = torch.linalg.solve(joint, gradient).split(before[0].numel())
    train(net, DGNOpt(net, lr=0.1, information="cooperative", scale=0.0), 1, x, y)
    for b, start, step in zip(net.branches, before, expected, strict=True):
        after = torch.cat([b.weight, b.bias[:, None]], 1)
        assert torch.allclose(after, start - 0.1 * step.reshape(start.shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("players", [2, 3])
def test_the_order_in_which_players_are_called_does_not_matter(players):
    x, y = data()
    order = tuple(range(players))
    one, two = made(Branches, order), made(Branches, order[::-1])
    options = {"lr": 0.05, "information": "cooperative", "damping": 0.3}
    ours = train(one, DGNOpt(one, **options), 5, x, y)
    theirs = train(two, DGNOpt(two, **options), 5, x, y)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-8)


def test_cooperation_differs_from_players_alone():
    x, y = data()
    one, two = made(Branches), made(Branches)
    ours = train(one, DGNOpt(one, lr=0.05, information="cooperative"), 1, x, y)
    theirs = train(two, DGNOpt(two, lr=0.05, curvature="kronecker"), 1, x, y)
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))


def test_convolutions_and_a_strided_skip_cooperate_and_learn():
    torch.manual_seed(0)
    net = resnet(depth=6, width=4)
    x, y = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    optimizer = DGNOpt(net, lr=0.05, information="cooperative")
    start = nn.functional.cross_entropy(net(x), y).item()
    train(net, optimizer, 12, x, y)
    assert {"4.conv2", "4.skip.0"} in [set(team) for team in optimizer.teams()]
    assert nn.functional.cross_entropy(net(x), y).item() < 0.8 * start


@pytest.mark.parametrize(
    "options", [{"alignment": "bandit"}, {"information": "cooperative", "alignment": "bandit"}]
)
def test_a_run_goes_on_from_its_saved_state_bit_for_bit(options):
    x, y = data(6, 6)

    def optimizer_of(net):
        return DGNOpt(net, lr=0.05, momentum=0.5, refresh=4, exploration=0.5, **options)

    whole = made(Block)
    optimizer = optimizer_of(whole)
    train(whole, optimizer, 6, x, y)
    file = io.BytesIO()
    torch.save({"net": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = train(whole, optimizer, 9, x, y)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = made(Block)
    again = optimizer_of(resumed)
    resumed.load_state_dict(saved["net"])
    again.load_state_dict(saved["optimizer"])
    found = train(resumed, again, 9, x, y)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert again.probabilities() == optimizer.probabilities()


def test_the_bandit_tries_every_alignment_and_learns():
    x, y = data(6, 6)
    net = made(Block)
    optimizer = DGNOpt(net, lr=0.05, alignment="bandit", exploration=0.5)
    seen = set()
    for _ in range(12):
        train(net, optimizer, 1, x, y)
        seen.add(optimizer.teams())
    assert len(seen) == 3
    p = optimizer.probabilities()
    assert list(p) == ["whole", "early", "late"]
    assert sum(p.values()) == pytest.approx(1) and max(p.values()) > 0.34


@pytest.mark.parametrize(
    "options",
    [
        {"information": "telepathy"},
        {"alignment": "middle"},
        {"schur": "none"},
        {"exploration": 0.0},
        {"information": "cooperative", "curvature": "identity"},
        {"lr": -1.0},
        {"lr": float("nan")},
    ],
)
def test_bad_settings_are_refused_by_name(options):
    with pytest.raises(ArgumentError, match=next(reversed(options))):
        DGNOpt(nn.Linear(2, 2), **options)


def test_questions_before_the_network_has_run_are_refused():
    optimizer = DGNOpt(nn.Linear(2, 2), alignment="bandit")
    for question in (optimizer.teams, optimizer.probabilities):
        with pytest.raises(ArgumentError, match="has not been read"):
            question()


def test_the_factored_form_of_the_joint_solve_learns_too_and_is_another_step():
    x, y = data(6, 6)
    runs = []
    for schur in ("exact", "factored"):
        net = made(Block)
        start = nn.functional.cross_entropy(net(x), y).item()
        runs.append(train(net, DGNOpt(net, lr=0.02, information="cooperative", schur=schur), 10, x, y))
        assert nn.functional.cross_entropy(net(x), y).item() < start
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(*runs, strict=True))


def test_a_saved_state_in_memory_stays_as_it_was_while_the_run_goes_on():
    x, y = data(6, 6)
    net = made(Block)
    optimizer = DGNOpt(net, lr=0.05, alignment="bandit")
    train(net, optimizer, 2, x, y)
    saved = optimizer.state_dict()["param_groups"][0]["bandit"]
    before = copy.deepcopy(saved)
    train(net, optimizer, 3, x, y)
    assert saved == before
    assert optimizer.param_groups[0]["bandit"]["draws"] == 5
