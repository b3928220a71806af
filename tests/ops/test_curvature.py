"""Curvature products against dense matrices built by nested ``torch.func`` transforms or by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from bolza.ops.curvature import closure_hessian, ggn_operator, gradient, hessian_operator
from bolza.ops.errors import ArgumentError, DataError, DivergenceError, ShapeError, UnsupportedError
from bolza.ops.replay import differentiable_kernels, frozen_statistics
from networks import NETWORKS, in_double


def dense_hessian(model: nn.Module, loss, data, names=None) -> Tensor:
    """Independent and slow: ``torch.autograd.functional.hessian`` of the loss in the flat vector."""
    model = copy.deepcopy(model)  # functional_call damages a model that holds one module under two names
    params = {name: p.detach() for name, p in model.named_parameters() if names is None or name in names}
    theta = torch.cat([p.flatten() for p in params.values()])

    def value(vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in params.values()])
        values = {name: part.view_as(p) for part, (name, p) in zip(parts, params.items(), strict=True)}
        return loss(functional_call(model, values, (data[0],)), data[1])

    with frozen_statistics(model), differentiable_kernels(model):
        return torch.autograd.functional.hessian(value, theta)


def dense_ggn(model: nn.Module, loss, data) -> Tensor:
    model = copy.deepcopy(model)
    params = {name: p.detach() for name, p in model.named_parameters()}
    theta = torch.cat([p.flatten() for p in params.values()])

    def output(vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in params.values()])
        values = {name: part.view_as(p) for part, (name, p) in zip(parts, params.items(), strict=True)}
        return functional_call(model, values, (data[0],))

    with frozen_statistics(model), differentiable_kernels(model):
        z = output(theta)
        j = torch.autograd.functional.jacobian(output, theta).reshape(z.numel(), -1)
        h = torch.autograd.functional.hessian(lambda z: loss(z, data[1]), z).reshape(z.numel(), z.numel())
    return j.T @ h @ j


@pytest.mark.parametrize("name", NETWORKS)
def test_hessian_and_gauss_newton_products_equal_the_dense_matrices(name):
    model, data, loss = in_double(NETWORKS[name]())
    before = copy.deepcopy(model.state_dict())
    size = sum(p.numel() for p in model.parameters())
    v = torch.randn(size, 2, dtype=torch.float64)
    hessian, ggn = hessian_operator(model, loss, data), ggn_operator(model, loss, data)
    assert hessian.shape == (size, size) and (hessian @ v).dtype == torch.float64
    torch.testing.assert_close(hessian @ v, dense_hessian(model, loss, data) @ v, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ggn @ v, dense_ggn(model, loss, data) @ v, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_hessian_product_is_symmetric_in_float32(name):
    model, data, loss = NETWORKS[name]()
    op = hessian_operator(model, loss, data)
    u, v = torch.randn(2, op.size)
    assert float(u @ (op @ v)) == pytest.approx(float(v @ (op @ u)), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("build", [hessian_operator, ggn_operator])
def test_batches_of_unequal_size_add_up_to_the_whole(build):
    model, (x, y), loss = in_double(NETWORKS["MLP"]())
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    whole = build(model, loss, (x, y)) @ v
    batches = [(x[:1], y[:1]), (x[1:], y[1:])]
    torch.testing.assert_close(build(model, loss, batches) @ v, whole, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(build(model, loss, iter(batches)) @ v, whole, rtol=1e-12, atol=1e-14)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    torch.testing.assert_close(build(model, loss, loader) @ v, whole, rtol=1e-12, atol=1e-14)
    total = build(model, lambda z, t: F.cross_entropy(z, t, reduction="sum"), batches, reduction="sum") @ v
    torch.testing.assert_close(total, len(x) * whole, rtol=1e-12, atol=1e-14)


def test_the_operator_follows_the_parameters():
    model, data, loss = in_double(NETWORKS["MLP"]())
    op = hessian_operator(model, loss, data)
    v = torch.randn(op.size, dtype=torch.float64)
    first = op @ v
    torch.testing.assert_close(op @ v, first, rtol=0, atol=0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    torch.testing.assert_close(op @ v, dense_hessian(model, loss, data) @ v, rtol=1e-10, atol=1e-12)


def test_parameters_are_selected_by_name_and_frozen_ones_left_out():
    model, data, loss = in_double(NETWORKS["MLP"]())
    names = ["2.weight", "2.bias"]
    reference = dense_hessian(model, loss, data, names)
    torch.testing.assert_close(
        hessian_operator(model, loss, data, ["2"]).dense(), reference, rtol=1e-10, atol=1e-12
    )
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    torch.testing.assert_close(hessian_operator(model, loss, data).dense(), reference, rtol=1e-10, atol=1e-12)
    with pytest.raises(ArgumentError, match="frozen"):
        hessian_operator(model, loss, data, ["0.weight"])
    with pytest.raises(ArgumentError, match="no such parameter"):
        hessian_operator(model, loss, data, ["nine"])


def test_a_parameter_that_does_not_reach_the_loss_has_zero_rows():
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1)}).double()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            return self.parts["used"](x)

    data = (torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64))
    for build in (hessian_operator, ggn_operator):
        h = build(Net(), F.mse_loss, data).dense()
        assert h[:3, :3].abs().min() > 0
        assert h[3:].abs().max() == 0 and h[:, 3:].abs().max() == 0


def test_a_loss_that_is_linear_has_no_curvature():
    net = nn.Linear(3, 1, bias=False)
    data = (torch.randn(4, 3), torch.zeros(4))
    for build in (hessian_operator, ggn_operator):
        assert torch.equal(build(net, lambda z, y: z.mean(), data) @ torch.ones(3), torch.zeros(3))


def test_dropout_draws_the_same_mask_at_every_product_and_leaves_the_generator_alone():
    net = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Tanh(), nn.Linear(50, 1))
    x, y = torch.randn(8, 4), torch.randn(8, 1)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    op = hessian_operator(net, F.mse_loss, batches)
    v = torch.randn(op.size)
    state = torch.get_rng_state()
    assert torch.equal(op @ v, op @ v)
    assert torch.equal(state, torch.get_rng_state())
    other = hessian_operator(net, F.mse_loss, batches, seed=1)
    assert not torch.equal(op @ v, other @ v)


def test_gauss_newton_equals_the_hessian_of_a_linear_model_and_is_positive():
    net = nn.Linear(3, 4).double()
    data = (torch.randn(7, 3, dtype=torch.float64), torch.arange(7) % 4)
    h, g = (build(net, F.cross_entropy, data).dense() for build in (hessian_operator, ggn_operator))
    torch.testing.assert_close(h, g, rtol=1e-10, atol=1e-13)
    assert torch.linalg.eigvalsh(g)[0] > -1e-13


def test_models_may_take_several_arguments_and_return_trees():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(3, 2)

        def forward(self, u, v):
            return {"sum": torch.tanh(self.a(u)) + self.b(v), "count": 3, "left": self.a(u)}

    def loss(out, y):
        return F.mse_loss(out["sum"], y) + out["left"].pow(4).mean() / out["count"]

    net = Two().double()
    u, v, y = (torch.randn(5, k, dtype=torch.float64) for k in (2, 3, 2))
    direction = torch.randn(14, dtype=torch.float64)
    by_tuple = hessian_operator(net, loss, ((u, v), y)) @ direction
    by_name = hessian_operator(net, loss, [({"u": u, "v": v}, y)]) @ direction
    assert torch.equal(by_tuple, by_name)
    eps = 1e-5
    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()

    def slope(at):
        torch.nn.utils.vector_to_parameters(at, net.parameters())
        return gradient(net, loss, ((u, v), y))[1]

    by_differences = (slope(theta + eps * direction) - slope(theta - eps * direction)) / (2 * eps)
    torch.testing.assert_close(by_tuple, by_differences, rtol=1e-7, atol=1e-8)
    assert float(torch.linalg.eigvalsh(ggn_operator(net, loss, ((u, v), y)).dense())[0]) > -1e-12


def test_the_hessian_of_a_closure_follows_its_leaves():
    a = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    op = closure_hessian(lambda: b * (a**3).sum(), [a, b])
    expected = [[18.0, 0, 3], [0, 36, 12], [3, 12, 0]]
    assert torch.equal(op.dense(), torch.tensor(expected, dtype=torch.float64))
    with torch.no_grad():
        b.zero_()
    assert torch.equal(op.dense()[:2, :2], torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("of", ["network", "closure"])
def test_an_operator_follows_a_fused_optimizer_which_counts_no_version(of):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), torch.ones(5, 3).double()
    y, params = torch.zeros(5, 1).double(), list(model.parameters())
    by = {
        "network": hessian_operator(model, F.mse_loss, (x, y)),
        "closure": closure_hessian(lambda: F.mse_loss(model(x), y), params),
    }
    v = torch.ones(by[of].size).double()
    by[of] @ v
    F.mse_loss(model(x), y).backward()
    torch.optim.SGD(params, lr=0.5, fused=True).step()
    assert torch.allclose(by[of] @ v, dense_hessian(model, F.mse_loss, (x, y)) @ v, atol=1e-12)


def test_the_gradient_equals_backward():
    model, (x, y), loss = NETWORKS["CNN with batch norm, evaluation"]()
    value, slope = gradient(model, loss, [(x[:2], y[:2]), (x[2:], y[2:])])
    whole = loss(model(x), y)
    whole.backward()
    assert value == pytest.approx(whole.item(), rel=1e-6)
    torch.testing.assert_close(slope, torch.cat([p.grad.flatten() for p in model.parameters()]))


class TestBadInput:
    net = nn.Linear(2, 1)
    data = (torch.zeros(3, 2), torch.zeros(3, 1))

    def test_a_loss_that_is_not_scalar(self):
        with pytest.raises(ShapeError, match=r"\(3, 1\).*scalar"):
            hessian_operator(self.net, lambda z, y: (z - y) ** 2, self.data) @ torch.ones(3)
        with pytest.raises(ShapeError, match="float"):
            hessian_operator(self.net, lambda z, y: 1.0, self.data) @ torch.ones(3)

    def test_a_loss_that_is_not_finite(self):
        with pytest.raises(DivergenceError, match="nan"):
            hessian_operator(self.net, F.mse_loss, (self.data[0] / 0, self.data[1])) @ torch.ones(3)

    def test_a_detached_loss(self):
        with pytest.raises(ArgumentError, match="depend"):
            hessian_operator(self.net, lambda z, y: z.detach().mean(), self.data) @ torch.ones(3)
        detached = nn.Sequential(self.net, nn.Identity())
        detached[1].forward = lambda z: z.detach()
        with pytest.raises(ArgumentError, match="depend"):
            ggn_operator(detached, F.mse_loss, self.data) @ torch.ones(3)

    def test_an_empty_loader_and_an_empty_batch(self):
        with pytest.raises(DataError, match="no batches"):
            hessian_operator(self.net, F.mse_loss, [])
        with pytest.raises(DataError, match="no samples"):
            hessian_operator(self.net, F.mse_loss, [(torch.zeros(0, 2), torch.zeros(0, 1))] * 2) @ torch.ones(
                3
            )

    def test_data_that_is_not_a_pair(self):
        for bad in (torch.zeros(3), 3, (1, 2, 3), (self.data, self.data)):
            with pytest.raises(ArgumentError, match="pair"):
                hessian_operator(self.net, F.mse_loss, bad)
        with pytest.raises(DataError, match="pair"):
            hessian_operator(self.net, F.mse_loss, [torch.zeros(3)]) @ torch.ones(3)

    def test_half_precision_frozen_models_and_wrong_lengths(self):
        with pytest.raises(UnsupportedError, match=r"float16.*model.float"):
            hessian_operator(nn.Linear(2, 1).half(), F.mse_loss, self.data)
        with pytest.raises(ArgumentError, match="frozen"):
            hessian_operator(nn.Linear(2, 1).requires_grad_(False), F.mse_loss, self.data)
        with pytest.raises(ShapeError, match="3 × 3"):
            hessian_operator(self.net, F.mse_loss, self.data) @ torch.ones(4)
        with pytest.raises(ArgumentError, match="reduction"):
            hessian_operator(self.net, F.mse_loss, self.data, reduction="none")

    def test_an_operation_without_second_derivative_is_named(self):
        class NoSecond(nn.Module):
            def __init__(self):
                super().__init__()
                self.cell = nn.Linear(2, 4)

            def forward(self, x):
                logits = self.cell(x).log_softmax(-1)[:, None]
                return F.ctc_loss(logits, torch.ones(1, 1, dtype=torch.long), [3], [1])

        with pytest.raises(UnsupportedError, match="ctc"):
            hessian_operator(NoSecond(), lambda z, y: z, self.data) @ torch.ones(12)


def test_an_operator_follows_mode_running_statistics_and_data_changed_in_place():
    model, x = (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double(),
        torch.randn(6, 3).double(),
    )
    y = torch.ones(6, 1).double()
    hessian = hessian_operator(model, F.mse_loss, (x, y))
    v = torch.ones(hessian.size).double()

    def now():
        return torch.allclose(hessian @ v, hessian_operator(model, F.mse_loss, (x, y)) @ v)

    hessian @ v
    model.eval()
    assert now()
    model[1].running_var.mul_(4.0)
    assert now()
    x.mul_(2.0)
    assert now()
