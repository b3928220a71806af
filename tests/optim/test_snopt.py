"""Second-order training of continuous-depth networks."""

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, DivergenceError, UnsupportedError
from bolza.models.continuous import ContinuousBlock, NeuralODE, Piecewise
from bolza.optim import SNOpt
from bolza.optim.second_order import second_order_adjoint
from bolza.optim.sites import rows_of
from bolza.optim.snopt import eigenbasis, preconditioned
from bolza.systems.ode import RK4
from bolza.testing import check_optimizer

D = torch.float64


def field(width=3, hidden=5, dtype=D):
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width)).to(dtype)


def ode_net(gradient="autograd", method="euler", steps=4, dtype=D):
    torch.manual_seed(1)
    block = NeuralODE(field(), method=method, steps=steps, gradient=gradient)
    return nn.Sequential(nn.Linear(4, 3), block, nn.Linear(3, 2)).to(dtype)


def batch(n=6, dtype=D):
    draw = torch.Generator().manual_seed(2)
    return torch.randn(n, 4, generator=draw, dtype=dtype), torch.randint(0, 2, (n,), generator=draw)


def backward(net, x, y):
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()


# --------------------------------------------------------------------- backward second-order equations


def test_the_scalar_linear_equation_has_its_known_curvature():
    """ẋ = θ x: Q_uu = Φ_xx (T x₀ e^{θT})²."""
    theta, x0, T, phi_xx = torch.tensor(0.7, dtype=D), 1.3, 1.5, 2.0
    x_T = torch.tensor([x0 * math.exp(0.7 * T)], dtype=D)
    y = torch.tensor([[math.sqrt(phi_xx)]], dtype=D)
    found = second_order_adjoint(lambda t, x, u: u * x, theta, x_T, y, T, steps=40)
    assert float(found.r.square().sum()) == pytest.approx(
        phi_xx * (T * x0 * math.exp(0.7 * T)) ** 2, rel=1e-6
    )
    assert float(found.x0) == pytest.approx(x0, rel=1e-6)
    assert float(found.q.square().sum()) == pytest.approx(phi_xx * math.exp(2 * 0.7 * T), rel=1e-6)


def test_the_curvature_of_a_tanh_field_is_that_of_automatic_differentiation():
    draw = torch.Generator().manual_seed(0)
    theta = {"W": torch.randn(3, 3, generator=draw, dtype=D), "b": torch.randn(3, generator=draw, dtype=D)}
    x0 = torch.randn(3, generator=draw, dtype=D)
    phi = torch.randn(3, 3, generator=draw, dtype=D)  # Φ_xx = Σ y yᵀ, one y a row

    def velocity(t, x, u):
        return torch.tanh(u["W"] @ x + u["b"]) * math.cos(t)

    def final(x, u, steps=100, T=1.2):
        for k in range(steps):
            x = RK4.advance(velocity, k * T / steps, T / steps, x, (u,) * 4)
        return x

    J_x, J = torch.func.jacrev(final, argnums=(0, 1))(x0, theta)
    found = second_order_adjoint(velocity, theta, final(x0, theta), phi, 1.2, steps=100)
    flat = torch.cat([found.r["W"].flatten(1), found.r["b"]], 1)
    jacobian = torch.cat([J["W"].flatten(1), J["b"]], 1)
    exact = jacobian.T @ (phi.T @ phi) @ jacobian
    assert float((flat.T @ flat - exact).norm() / exact.norm()) < 1e-7
    cross = jacobian.T @ (phi.T @ phi) @ J_x
    assert float((flat.T @ found.q - cross).norm() / cross.norm()) < 1e-7


def test_with_the_costate_as_the_one_factor_r_is_the_gradient_at_the_order_of_the_method():
    def velocity(t, x, u):
        return torch.sin(u * x + t)

    errors = []
    theta, x0 = torch.tensor(0.8, dtype=D), torch.tensor([0.4, -1.0], dtype=D)

    def final(u, steps):
        x = x0
        for k in range(steps):
            x = RK4.advance(velocity, k / steps, 1 / steps, x, (u,) * 4)
        return x

    x_T = final(theta, 100)
    exact = torch.func.grad(lambda u: final(u, 100).square().sum())(theta)
    for steps in (10, 20):
        found = second_order_adjoint(velocity, theta, x_T, 2 * x_T[None], 1.0, steps=steps, method="midpoint")
        errors.append(abs(float(found.r[0] - exact)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)


# --------------------------------------------------------------------------------- factors


def test_factors_are_those_of_all_calls_of_a_layer():
    """Against a loop over evaluations that keeps every input and signal."""
    net, (x, y) = ode_net(), batch()
    optimizer = SNOpt(net, lr=0.0)
    backward(net, x, y)
    layer = net[1].trajectory.field[0]
    site = next(s for s in optimizer._sites if s.weight is layer.weight)
    sums = [total.clone() for total in site.sums]
    assert site.rows == 4 * 6

    state, inputs, outputs = net[0](x), [], []
    for _ in range(4):
        pre = F.linear(state, layer.weight, layer.bias)
        inputs.append(torch.cat([state, torch.ones(6, 1, dtype=D)], 1))
        outputs.append(pre)
        state = state + 0.25 * net[1].trajectory.field[2](torch.tanh(pre))
    signals = torch.autograd.grad(F.cross_entropy(net[2](state), y), outputs)
    torch.testing.assert_close(sums[0], sum(a.T @ a for a in inputs).detach())
    torch.testing.assert_close(sums[1], sum(g.T @ g for g in signals))


def test_for_one_sample_and_one_call_the_kronecker_product_is_the_outer_product_of_the_gradient():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2)).to(D)
    optimizer = SNOpt(net, lr=0.0, alpha=0.999999999)
    net(torch.randn(1, 3, dtype=D)).square().sum().backward()
    optimizer.step()
    state = optimizer.state[net[0].weight]
    U = torch.kron(state["basis_out"], state["basis_in"])
    g = torch.cat([net[0].weight.grad, net[0].bias.grad[:, None]], 1).flatten()
    torch.testing.assert_close(
        U @ torch.diag(state["m"].flatten()) @ U.T, torch.outer(g, g), rtol=1e-6, atol=1e-7
    )


CONVOLUTIONS = [
    (nn.Conv2d(2, 3, 3, padding=1), (2, 5, 6)),
    (nn.Conv2d(2, 3, (3, 2), stride=2, dilation=(1, 2)), (2, 7, 6)),
    (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", bias=False), (2, 5, 5)),
    (nn.Conv1d(2, 3, 3, padding="same"), (2, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=["same", "strided", "reflected", "1d"])
def test_patches_and_signals_of_a_convolution_make_its_gradient(layer, shape):
    layer = copy.deepcopy(layer).to(D)
    x = torch.randn(4, *shape, dtype=D)
    out = layer(x)
    signal = torch.randn_like(out)
    out.backward(signal)
    a, g = rows_of(layer, x, signal)
    torch.testing.assert_close((g.T @ a).view_as(layer.weight), layer.weight.grad)


def test_a_convolutional_field_with_norms_trains_and_norms_have_no_rotation():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True))
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        ContinuousBlock(inner, steps=3, method="euler"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    x, y = torch.randn(16, 1, 8, 8), torch.arange(16) % 2
    x = x + y[:, None, None, None]
    optimizer = SNOpt(net, lr=0.05, refresh=5)
    first = float(F.cross_entropy(net(x), y).detach())
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert float(F.cross_entropy(net(x), y).detach()) < 0.7 * first
    assert optimizer.state[inner[1].weight]["basis_in"].shape == (37, 37)
    assert "basis_in" not in optimizer.state[inner[0].weight] and "m" in optimizer.state[inner[0].weight]


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        x = self.table(tokens)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(self.recurrent(x)[0])


def test_attention_recurrence_and_tied_embeddings_train_without_a_rotation_where_no_layer_is_called():
    torch.manual_seed(0)
    net = Attentive()
    tokens = torch.randint(0, 11, (8, 6))
    optimizer = SNOpt(net, lr=0.02, refresh=4)

    def loss():
        return F.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten())

    first = float(loss().detach())
    for _ in range(15):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss().detach()) < 0.9 * first
    assert "basis_out" in optimizer.state[net.head.weight]
    assert "basis_out" not in optimizer.state[net.attention.out_proj.weight]


def test_a_side_that_is_too_long_has_a_diagonal_factor():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 2)).to(D)
    x = torch.randn(5, 6, dtype=D)
    optimizer = SNOpt(net, lr=0.0, largest=4, alpha=0.999999999)
    net(x).square().mean().backward()
    optimizer.step()
    state = optimizer.state[net[0].weight]
    assert "basis_in" not in state and state["basis_out"].shape == (2, 2)
    expected = torch.cat([x, torch.ones(5, 1, dtype=D)], 1).square().mean(0)
    torch.testing.assert_close(state["m"][1] / state["m"][1, -1], expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------- gradients and modes


@pytest.mark.parametrize("gradient", ["autograd", "checkpoint", "adjoint"])
def test_gradients_in_a_refresh_iteration_are_the_ordinary_ones(gradient):
    plain, watched = ode_net(gradient), ode_net(gradient)
    optimizer = SNOpt(watched, refresh=1)
    x, y = batch()
    for net in (plain, watched):
        backward(net, x, y)
    assert all(site.rows for site in optimizer._sites)
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_adjoint_gradients_while_factors_are_computed_are_exact_to_the_tolerance_of_the_solver():
    x, y = batch()
    exact, adjoint = ode_net(method="rk4", steps=20), ode_net("adjoint", method="rk4", steps=20)
    optimizer = SNOpt(adjoint, refresh=1)
    for net in (exact, adjoint):
        backward(net, x, y)
    assert all(site.rows for site in optimizer._sites)
    for p, q in zip(exact.parameters(), adjoint.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_the_adjoint_gives_the_factors_of_the_direct_gradient_in_one_unit(method):
    """Signals per unit of time, times the horizon over the evaluations, are signals of an evaluation."""
    x, y = batch()
    found = []
    for gradient, scheme in (("autograd", "euler"), ("adjoint", method)):
        net = ode_net(gradient, scheme, steps=60)
        net[1].horizon = 1.5
        optimizer = SNOpt(net, lr=0.0, alpha=0.999999999)
        backward(net, x, y)
        site = next(s for s in optimizer._sites if s.weight is net[1].trajectory.field[0].weight)
        scale = site.inside.per_evaluation(1)
        signals = site.sums[1] * scale**2 * site.inside.evaluations**2 / site.rows
        found.append((site.sums[0] / site.rows, signals))
    for direct, adjoint in zip(*found, strict=True):
        close = 0.05 if method == "euler" else 0.2  # dopri5 does not sample time evenly
        assert float((direct - adjoint).norm() / direct.norm()) < close


def test_cells_of_a_block_share_its_horizon():
    net = nn.Sequential(
        ContinuousBlock(Piecewise(nn.Linear(4, 4), 2), steps=6, method="euler", gradient="adjoint")
    )
    optimizer = SNOpt(net.to(D), lr=0.0)
    backward(net, *batch())
    assert {site.inside.evaluations for site in optimizer._sites} == {6}
    assert [site.rows for site in optimizer._sites] == [18, 18]
    assert optimizer._sites[0].inside.per_evaluation(1) == pytest.approx(1 / 6)


def test_memory_does_not_grow_with_the_number_of_steps_under_the_adjoint(monkeypatch):
    """A forward pass keeps what autograd saves, and what the hooks on outputs hold."""
    x, y = batch(64)
    register, hooked = torch.Tensor.register_hook, []
    monkeypatch.setattr(
        torch.Tensor, "register_hook", lambda t, hook: hooked.append(t.numel()) or register(t, hook)
    )

    def held(gradient, steps):
        net = ode_net(gradient, steps=steps)
        optimizer = SNOpt(net, refresh=1)
        sizes = []
        hooked.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            loss = F.cross_entropy(net(x), y)
        kept = sum(sizes), sum(hooked)
        loss.backward()
        optimizer.step()
        return kept

    assert held("adjoint", 40) == held("adjoint", 4)
    for many, few in zip(held("autograd", 40), held("autograd", 4), strict=True):
        assert many > 5 * few


def test_an_in_place_activation_changes_nothing():
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace), nn.Linear(5, 2)).to(D)
        optimizer = SNOpt(net)
        backward(net, *batch())
        optimizer.step()
        found.append(net[0].weight.detach())
    assert torch.equal(*found)


# --------------------------------------------------------------------------------- the optimizer


def test_it_is_an_optimizer():
    check_optimizer(lambda net: SNOpt(net, lr=0.02, momentum=0.5, refresh=2), takes_model=True)
    check_optimizer(lambda net: SNOpt(net), takes_model=True)


def test_without_a_refresh_it_is_ordinary_descent_bit_for_bit():
    one, two = ode_net(), ode_net()
    ours = SNOpt(one, lr=0.1, momentum=0.9, weight_decay=1e-3, refresh=None)
    theirs = torch.optim.SGD(two.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for _ in range(20):
        for net, optimizer in ((one, ours), (two, theirs)):
            backward(net, *batch())
            optimizer.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-15)


def test_one_step_is_the_formula():
    torch.manual_seed(0)
    net, (x, y) = nn.Sequential(nn.Linear(4, 2)).to(D), batch()
    optimizer = SNOpt(net, lr=0.3, alpha=0.6, eps=0.1)
    before = torch.cat([net[0].weight, net[0].bias[:, None]], 1).detach()
    backward(net, x, y)
    optimizer.step()
    a = torch.cat([x, torch.ones(6, 1, dtype=D)], 1)
    logits = (a @ before.T).requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(logits, y), logits)
    e_a, U_a = torch.linalg.eigh(a.T @ a / 6)
    e_g, U_g = torch.linalg.eigh((6 * g).T @ (6 * g) / 6)
    q = U_g.T @ (g.T @ a) @ U_a
    m = 0.6 * torch.outer(e_g, e_a).clamp(min=0) + 0.4 * 6 * q**2
    expected = before - 0.3 * U_g @ (q / (m + 0.1)) @ U_a.T
    torch.testing.assert_close(torch.cat([net[0].weight, net[0].bias[:, None]], 1).detach(), expected)


def test_the_step_does_not_depend_on_the_signs_of_eigenvectors():
    torch.manual_seed(0)
    g, A, G = torch.randn(2, 3, dtype=D), torch.randn(3, 3, dtype=D), torch.randn(2, 2, dtype=D)
    (right, e_a), (left, e_g) = eigenbasis(A @ A.T), eigenbasis(G @ G.T)
    m = torch.outer(e_g, e_a)
    one = preconditioned(g, left, right, m, 8.0, 0.75, 0.05)[0]
    two = preconditioned(g, -left, right * torch.tensor([1.0, -1.0, 1.0]), m, 8.0, 0.75, 0.05)[0]
    torch.testing.assert_close(one, two)


def test_evaluation_between_backward_and_step_does_not_count():
    found = []
    for evaluate in (False, True):
        net, (x, y) = ode_net(), batch()
        optimizer = SNOpt(net)
        backward(net, x, y)
        if evaluate:
            net(x)  # with gradients, but no backward follows
            with torch.no_grad():
                net(x)
            copy.deepcopy(net)(x).sum().backward()  # a copy carries the hooks, but is another network
        optimizer.step()
        found.append(net[0].weight.detach())
    assert torch.equal(*found)


def test_transforms_of_functions_pass_by():
    net, (x, y) = ode_net(), batch()
    optimizer = SNOpt(net)
    values = {name: p.detach() for name, p in net.named_parameters()}

    def loss(values, x, y):
        return F.cross_entropy(torch.func.functional_call(net, values, (x,)), y)

    torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(values, x[:, None], y[:, None])
    torch.func.jvp(lambda v: torch.func.grad(loss)(v, x, y), (values,), (values,))
    assert optimizer._seen == [] and not any(site.rows for site in optimizer._sites)


def test_a_sparse_gradient_is_refused():
    net = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = SNOpt(net)
    net(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UnsupportedError, match="sparse gradient"):
        optimizer.step()


def test_half_precision_weights_keep_their_type_and_move():
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(torch.bfloat16)
    optimizer = SNOpt(net, lr=0.5)
    x, y = batch()
    before = net[0].weight.clone()
    F.cross_entropy(net(x.bfloat16()).float(), y).backward()
    optimizer.step()
    assert net[0].weight.dtype == torch.bfloat16 and not torch.equal(before, net[0].weight)
    assert optimizer.state[net[0].weight]["basis_in"].dtype == torch.float32


def test_an_optimizer_that_is_dropped_leaves_the_network_free():
    net = ode_net()
    optimizer = SNOpt(net)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    backward(net, *batch())


def test_closing_takes_the_hooks_off():
    net = ode_net()
    optimizer = SNOpt(net)
    optimizer.close()
    assert not any(part._forward_hooks for part in net.modules()) and "zero_grad" not in vars(net)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1},
        {"lr": math.nan},
        {"alpha": 1.0},
        {"eps": 0.0},
        {"refresh": 0},
        {"momentum": 1.0},
        {"largest": -1},
    ],
)
def test_arguments_that_make_no_sense_are_refused(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        SNOpt(ode_net(), **options)


def test_what_it_cannot_see_it_refuses():
    net, (x, y) = ode_net(), batch()
    with pytest.raises(ArgumentError, match=r"nn\.Module"):
        SNOpt(list(net.parameters()))
    with pytest.raises(ArgumentError, match="nothing to train"):
        SNOpt(nn.ReLU())
    optimizer = SNOpt(net)
    F.cross_entropy(net[2](net[1](net[0](x))), y).backward()  # layers called, but not the network
    with pytest.raises(UnsupportedError, match="no pass of the network was seen"):
        optimizer.step()
    optimizer.zero_grad()
    x[0, 0] = math.nan
    backward(net, x, y)
    with pytest.raises(DivergenceError, match=r"'0\.weight' are not finite at step 0"):
        optimizer.step()


def test_an_input_that_is_overwritten_is_refused():
    net, (x, y) = nn.Sequential(nn.Linear(4, 2)).to(D), batch()
    optimizer = SNOpt(net)
    loss = F.cross_entropy(net(x), y)
    x.mul_(2)
    with pytest.raises(UnsupportedError, match="overwritten"):
        loss.backward()
    optimizer.close()


# ------------------------------------------------------------------------------ scaled losses, copies


def test_a_scaled_loss_makes_the_same_steps():
    nets = [ode_net(), ode_net()]
    for net, scale in zip(nets, (None, 2.0**10), strict=True):
        optimizer = SNOpt(net, lr=0.1, refresh=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(net(batch()[0]), batch()[1])).backward()
            scaler.step(optimizer)
            scaler.update()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_a_scaled_loss_that_overflows_is_skipped_and_one_unscaled_in_secret_refused():
    net = ode_net()
    optimizer, scaler = SNOpt(net), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = copy.deepcopy(net.state_dict())
    x, y = batch()
    scaler.scale(F.cross_entropy(net(x * math.inf), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(net(x), y)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(UnsupportedError, match="get_scale"):
        scaler.step(optimizer)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_of_network_and_optimizer_goes_on_as_they_do(copied):
    net = ode_net()
    optimizer = SNOpt(net, lr=0.1, refresh=2)

    def step(net, optimizer):
        optimizer.zero_grad()
        F.cross_entropy(net(batch()[0]), batch()[1]).backward()
        optimizer.step()

    step(net, optimizer)
    twins = copied((net, optimizer))
    for _ in range(3):
        step(net, optimizer)
        step(*twins)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twins[0].parameters(), strict=True))
