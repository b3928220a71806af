"""Gauss–Newton matrices of single samples, against the dense ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ShapeError, UnsupportedError
from bolza.ops.curvature import ggn_operator, hessian_operator
from bolza.ops.projected import projected_curvature
from networks import NETWORKS, in_double


def columns(size, k=3, seed=0):
    return torch.randn(size, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NETWORKS)
def test_their_mean_is_the_gauss_newton_matrix_of_all_samples(name):
    model, data, loss = in_double(NETWORKS[name]())
    model.eval()
    operator = ggn_operator(model, loss, data)
    v = columns(operator.size)
    found = projected_curvature(model, loss, data, v)
    assert len(found) == 6
    torch.testing.assert_close(found.mean(0), v.T @ (operator @ v), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found, found.mT)


def test_a_sample_has_the_matrix_that_it_has_alone():
    model, (x, y), loss = in_double(NETWORKS["residual MLP"]())
    model.eval()
    v = columns(sum(p.numel() for p in model.parameters()))
    together = projected_curvature(model, loss, [(x[:4], y[:4]), (x[4:], y[4:])], v)
    alone = torch.cat(
        [projected_curvature(model, loss, (x[i : i + 1], y[i : i + 1]), v) for i in range(len(x))]
    )
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-10)


def test_regression_without_hidden_layers_has_its_hessian():
    net = nn.Linear(3, 1).double()
    x = columns(5, 3)
    v = columns(4, 2, seed=1)
    data = (x, x.sum(1, keepdim=True))
    hessian = hessian_operator(net, F.mse_loss, data)
    found = projected_curvature(net, F.mse_loss, data, v).mean(0)
    torch.testing.assert_close(found, v.T @ (hessian @ v))
    linear = projected_curvature(net, lambda z, y: z.mean(), data, v)
    assert not bool(linear.any())  # a loss that is linear in the outputs has no curvature there


def test_shapes_that_do_not_fit_are_named():
    net, x = nn.Linear(3, 1), torch.ones(5, 3)
    with pytest.raises(ShapeError, match=r"directions has shape \(3, 2\).*length 4"):
        projected_curvature(net, F.mse_loss, (x, x[:, :1]), torch.ones(3, 2))

    class Mean(nn.Linear):
        def forward(self, x):
            return super().forward(x).mean(0)

    with pytest.raises(UnsupportedError, match="samples first"):
        projected_curvature(Mean(3, 1), F.mse_loss, (x, torch.zeros(1)), torch.ones(4, 1))
