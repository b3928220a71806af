import math

import pytest
import torch

from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.stability.sectors import SectorNetwork, closed_form, gain, newton, semidefinite

D = torch.float64


def matrix(*rows):
    return torch.tensor(rows, dtype=D)


def random_weights(*sizes, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, m, dtype=D, generator=draw) / math.sqrt(m)
        for m, n in zip(sizes, sizes[1:], strict=False)
    ]


def inequality(net, multipliers, bound):
    """The matrix inequality L² ⊕ 0 − Σ λ sym(e gᵀ) − CᵀC ⪰ 0, written out densely and slowly."""
    at, n = net.offsets(), net.units
    m = torch.zeros(n, n, dtype=D)
    m[: at[1], : at[1]] = bound**2 * torch.eye(at[1], dtype=D)
    for k, lam in enumerate(multipliers, 1):
        row = torch.zeros(net.sizes[k], n, dtype=D)
        for j in range(k):
            if (k, j) in net.Y:
                row[:, at[j] : at[j + 1]] = net.Y[k, j]
        e = torch.eye(n, dtype=D)[at[k] : at[k + 1]]
        half = e.T @ (bound**2 * lam[:, None] * (e - row))
        m += (half + half.T) / 2
    c = net.dense_output()
    return float(torch.linalg.eigvalsh(m - c.T @ c)[0]), float(m.abs().max())


@pytest.mark.parametrize(
    ("weights", "product", "optimum"),
    [
        ([matrix([1.0], [-1.0]), matrix([1.0, 1.0])], 2.0, 1.0),  # |x| as relu(x) + relu(−x)
        ([matrix([1.0], [-1.0]), matrix([1.0, -1.0])], 2.0, 2.0),  # x as relu(x) − relu(−x): conservative
        ([torch.diag(matrix(2.0, 1.0)), torch.diag(matrix(3.0, 5.0))], 10.0, 6.0),
        ([torch.linalg.qr(w)[0] for w in random_weights(5, 5, 5, 5)], 1.0, 1.0),
    ],
)
def test_bounds_of_small_networks_are_known_in_closed_form(weights, product, optimum):
    net = SectorNetwork.from_weights(weights)
    assert math.prod(float(torch.linalg.matrix_norm(w, 2)) for w in weights) == pytest.approx(product)
    assert newton(net, 1e-7)[0] == pytest.approx(optimum, rel=1e-6)
    assert semidefinite(net)[0] == pytest.approx(optimum, rel=1e-6)


def test_newton_reaches_the_optimum_of_the_solver_and_its_gap_is_true():
    net = SectorNetwork.from_weights(random_weights(6, 10, 8, 3))
    exact = semidefinite(net)[2]
    for tol in (1e-2, 1e-3, 1e-5):
        bound, multipliers, floor = newton(net, tol)
        assert floor * (1 - 1e-7) <= exact <= bound * (1 + 1e-7)
        assert bound <= exact * (1 + tol)
        assert gain(net, multipliers) == pytest.approx(bound, rel=1e-8)


def test_every_bound_satisfies_the_matrix_inequality_written_out():
    net = SectorNetwork.from_weights(random_weights(5, 9, 7, 4, seed=1))
    skip = SectorNetwork(
        net.sizes, net.Y | {(2, 0): random_weights(5, 7)[0]}, net.C | {0: random_weights(5, 4)[0]}
    )
    for one in (net, skip):
        for bound, multipliers in (closed_form(one, "norm"), closed_form(one, "rows"), newton(one)[:2]):
            least, scale = inequality(one, multipliers, bound)
            assert least > -1e-10 * scale
            assert inequality(one, multipliers, bound * 0.999)[0] < 0  # and is the best for its multipliers


def test_scaling_a_layer_scales_the_bound():
    weights = random_weights(4, 8, 8, 2, seed=2)
    plain = newton(SectorNetwork.from_weights(weights), 1e-6)[0]
    weights[1] = -3 * weights[1]
    # a sign cannot be absorbed by ReLU, but sectors [0, 1] of u and of −u have the same inequality
    assert newton(SectorNetwork.from_weights(weights), 1e-6)[0] == pytest.approx(3 * plain, rel=1e-5)


def test_multipliers_that_prove_nothing_give_nothing():
    net = SectorNetwork.from_weights(random_weights(4, 6, 2))
    _, (lam,) = closed_form(net)
    assert gain(net, [1e3 * lam]) is None
    assert gain(net, [lam]) is not None


def test_a_dead_network_has_constant_zero():
    net = SectorNetwork.from_weights([torch.zeros(3, 2, dtype=D), torch.ones(1, 3, dtype=D)])
    assert closed_form(net)[0] < 1e-6


def test_the_solver_refuses_what_is_too_large_for_it():
    with pytest.raises(UnsupportedError, match="recursive"):
        semidefinite(SectorNetwork.from_weights([torch.ones(300, 2), torch.ones(1, 300)]))
    with pytest.raises(ArgumentError, match="weights is empty"):
        SectorNetwork.from_weights([])
