"""Sharpness along a run, and the steep directions, against dense matrices and closed forms."""

import copy
import math

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError, ShapeError, UnsupportedError
from bolza.ops.curvature import ggn_operator, hessian_operator
from bolza.ops.krylov import spectral_density, top_eigenpairs
from bolza.stability import Sharpness, stability_limit, subspace_share
from networks import NETWORKS, in_double

F64 = torch.float64


class Quadratic(nn.Module):
    """Half of Σ cᵢ θᵢ²."""

    def __init__(self, *curvature):
        super().__init__()
        self.theta = nn.Parameter(torch.linspace(1, 2, len(curvature), dtype=F64))
        self.curvature = torch.tensor(curvature, dtype=F64)

    def forward(self, x):
        return (self.curvature * self.theta.square()).sum() / 2 + 0 * x.sum()


def value(prediction, target):
    return prediction


DATA = (torch.zeros(1, 1, dtype=F64), torch.zeros(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_each_of_the_eight_networks_has_spectra_with_residuals_that_are_true(name):
    model, data, loss = in_double(NETWORKS[name]())
    before = copy.deepcopy(model.state_dict())
    for operator in (hessian_operator(model, loss, data), ggn_operator(model, loss, data)):
        generator = torch.Generator().manual_seed(0)
        found = top_eigenpairs(operator, 2, which="largest algebraic", tol=1e-4, generator=generator)
        u, lam = found.eigenvectors, found.eigenvalues
        off = torch.linalg.vector_norm(operator @ u - u * lam, dim=0)
        assert found.converged and bool((off <= 1.01 * found.residuals + 1e-13).all())
        density = spectral_density(operator, 8, 1, generator=generator)
        assert density.products == 8 and float(density.nodes.max()) <= float(lam[0] + found.residuals[0])
    point = Sharpness(model, loss, data, k=2, tol=1e-4).measure()
    again = top_eigenpairs(hessian_operator(model, loss, data), 2, which="largest algebraic", tol=1e-4)
    assert point.converged and point.eigenvalues == pytest.approx(again.eigenvalues.tolist(), rel=1e-3)
    assert all(torch.equal(v, before[key]) for key, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_too_few_products_are_not_called_converged_and_the_residual_still_holds():
    model, data, loss = in_double(NETWORKS["MLP"]())
    point = Sharpness(model, loss, data, k=4, tol=1e-8, max_products=6).measure()
    dense = torch.linalg.eigvalsh(hessian_operator(model, loss, data).dense())
    assert not point.converged and point.products == 6
    near = [float((dense - lam).abs().min()) for lam in point.eigenvalues]
    assert all(distance <= r + 1e-12 for distance, r in zip(near, point.residuals, strict=True))


def test_an_operation_without_second_derivative_is_refused_by_name():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 3))

        def forward(self, x):
            logits = (self.w * x).log_softmax(-1)[:, None]
            lengths = torch.tensor([4]), torch.tensor([1])
            return nn.functional.ctc_loss(logits, torch.tensor([[1]]), *lengths)

    sharp = Sharpness(Net(), lambda z, y: z, (torch.randn(4, 3), torch.zeros(4)))
    with pytest.raises(UnsupportedError, match="second derivative"):
        sharp.measure()


# ------------------------------------------------------------------------------------- along a run


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.8}, {"momentum": 0.8, "dampening": 0.5}, {"momentum": 0.6, "nesterov": True}],
    ids=["plain", "heavy ball", "dampened", "Nesterov"],
)
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_limit_is_where_the_steps_of_the_optimizer_begin_to_grow(options, decay):
    limit = stability_limit(0.1, **options, weight_decay=decay)
    for factor, grows in ((0.95, False), (1.05, True)):
        theta = nn.Parameter(torch.ones(1, dtype=F64))
        optimizer = torch.optim.SGD([theta], lr=0.1, weight_decay=decay, **options)
        for _ in range(200):
            theta.grad = factor * limit * theta.detach()
            optimizer.step()
        assert (float(theta.detach().abs()) > 1) == grows


def test_adam_grows_where_its_preconditioned_sharpness_passes_the_limit():
    for lr, grows in ((0.3, False), (0.45, True)):
        model = Quadratic(100.0, 1.0)
        with torch.no_grad():
            model.theta.copy_(torch.tensor([1e-3, 0.5]))
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 1 - 1e-12))
        p = model.theta  # P is held fixed: v = 1, so that P = 1 + ε
        optimizer.state[p] = {
            "step": torch.tensor(1e15),
            "exp_avg": torch.zeros(2, dtype=F64),
            "exp_avg_sq": torch.ones(2, dtype=F64),
        }
        point = Sharpness(model, value, DATA, k=1).measure(optimizer)
        assert point.sharpness == pytest.approx(100.0, rel=1e-6)
        assert point.limit == pytest.approx(2 * 1.9 / (0.1 * lr)) and (point.edge > 1) == (100 > 38 / lr)
        # the same step by hand, with a fixed P
        m, x = 0.0, 1.0
        for _ in range(300):
            m = 0.9 * m + 0.1 * 100 * x
            x -= lr * m
        assert (abs(x) > 1) == grows == (point.edge > 1)


def test_a_warm_start_follows_a_direction_that_overtakes_the_steepest_one():
    model = Quadratic(5.0, 4.0, *torch.linspace(-1, 1, 60).tolist())
    sharp = Sharpness(model, value, DATA)
    seen = []
    for second in (4.0, 4.6, 5.2, 5.8):
        model.curvature[1] = second
        with torch.no_grad():
            model.theta.mul_(1.0)  # the operator looks at versions of the parameters
        seen.append(sharp.measure())
    assert [round(p.sharpness, 2) for p in seen] == pytest.approx([5.0, 5.0, 5.2, 5.8], rel=1e-2)
    assert all(p.converged for p in seen) and [p.step for p in seen] == [0, 1, 2, 3]
    assert sum(p.products for p in seen[1:]) / 3 < seen[0].products


def test_the_first_step_at_the_edge_is_told():
    model = Quadratic(4.0, 1.0)
    sharp = Sharpness(model, value, DATA)
    assert math.isnan(sharp.measure().edge) and sharp.edge_step is None
    for lr in (0.3, 0.4, 0.6, 0.7):
        sharp.measure(torch.optim.SGD(model.parameters(), lr=lr))
    assert [round(p.edge, 3) for p in sharp.history[1:]] == [0.6, 0.8, 1.2, 1.4] and sharp.edge_step == 3
    assert "1.40 of the stability limit" in str(sharp.history[-1])


def test_a_state_that_is_loaded_goes_on_as_the_one_that_was_saved():
    model, data, loss = in_double(NETWORKS["MLP"]())
    one = Sharpness(model, loss, data, k=2)
    one.measure()
    two = Sharpness(model, loss, data, k=2)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert one.measure() == two.measure() and len(two.history) == 2
    torch.testing.assert_close(one.vectors, two.vectors, rtol=0, atol=0)
    with pytest.raises(ShapeError, match="another network"):
        two.load_state_dict({"vectors": torch.zeros(3, 3), "history": []})


def test_the_share_of_a_gradient_is_that_of_its_projection():
    g = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=F64)
    v = torch.linalg.qr(torch.randn(40, 7, generator=torch.Generator().manual_seed(1), dtype=F64))[0]
    assert subspace_share(g, v) == pytest.approx(float((v @ v.T @ g).norm() ** 2 / g.norm() ** 2), abs=1e-12)
    assert subspace_share(v @ torch.ones(7, dtype=F64), v) == pytest.approx(1.0)
    assert math.isnan(subspace_share(torch.zeros(40), v))
    with pytest.raises(ShapeError, match="vectors"):
        subspace_share(g, v.T)


def test_bad_arguments_are_named():
    model = Quadratic(4.0, 1.0)
    with pytest.raises(ArgumentError, match="k is 3"):
        Sharpness(model, value, DATA, k=3)
    sharp = Sharpness(model, value, DATA)
    with pytest.raises(UnsupportedError, match="Adagrad is not known"):
        sharp.measure(torch.optim.Adagrad(model.parameters()))
    with pytest.raises(ArgumentError, match="no state yet"):
        sharp.measure(torch.optim.Adam(model.parameters()))
    with pytest.raises(ArgumentError, match="none of the parameters"):
        sharp.measure(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    with pytest.raises(ArgumentError, match="lr is 0"):
        stability_limit(0.0)


def test_groups_with_rates_and_decays_of_their_own_have_one_limit():
    model = Quadratic(4.0, 1.0)
    model.other = nn.Parameter(torch.ones(1, dtype=F64))
    groups = [{"params": [model.theta], "weight_decay": 0.5}, {"params": [model.other], "lr": 0.2}]
    point = Sharpness(model, value, DATA).measure(torch.optim.SGD(groups, lr=0.1))
    assert point.sharpness == pytest.approx(4.5 / 2) and point.limit == pytest.approx(2 / 0.2)
    assert point.edge == pytest.approx(0.1 * 4.5 / 2)
