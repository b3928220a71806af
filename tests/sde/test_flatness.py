"""Flatness measures: rescaling the layers of a ReLU net tells which ones are about the function."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError
from bolza.ops.curvature import hessian_operator
from bolza.ops.krylov import EigenResult, top_eigenpairs
from bolza.sde import flatness, gradient_noise
from networks import NETWORKS

D = torch.float64


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def relu_net(scale=1.0, seed=0):
    """The same function for every scale: layer two times c, layer three over c, layer one as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        net[2].weight *= scale
        net[2].bias *= scale
        net[4].weight /= scale
    return net


X = torch.randn(40, 3, dtype=D, generator=draw())
DATA = X, (X[:, 0] > 0).long()


def test_exactly_the_measures_that_are_labelled_invariant_stay_when_layers_are_rescaled():
    one, other = relu_net(), relu_net(10.0)
    torch.testing.assert_close(one(X), other(X))
    before, after = (flatness(net, F.cross_entropy, DATA, probes=10**4) for net in (one, other))
    for a, b in zip(before.measures, after.measures, strict=True):
        change = abs(b.value.value / a.value.value - 1)
        assert change < 1e-8 if a.invariant else change > 0.01, (a.name, change)
    assert [m.invariant for m in before.measures] == [False] * 4 + [True] * 3


def test_the_numbers_are_those_of_dense_matrices():
    net = relu_net(seed=1)
    found = flatness(net, F.cross_entropy, DATA, probes=10**4)
    h = hessian_operator(net, F.cross_entropy, DATA).dense()
    sigma = gradient_noise(net, F.cross_entropy, DATA).covariance.dense()
    theta = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert found.top_eigenvalue.value.value == pytest.approx(float(torch.linalg.eigvalsh(h)[-1]), rel=1e-3)
    assert found.trace.value.value == pytest.approx(float(h.trace()), rel=1e-10)
    assert found.noise_trace.value.value == pytest.approx(float((h @ sigma).trace()), rel=1e-8)
    assert found.relative.value.value == pytest.approx(
        float((theta.square() * h.diagonal()).sum()), rel=1e-10
    )
    sizes = [p.numel() for p in net.parameters()]
    pairs = zip(theta.split(sizes), h.diagonal().split(sizes), strict=True)
    layers = sum(float(t.norm()) * max(0.0, float(b.sum()) / 40) ** 0.5 for t, b in pairs)
    assert found.pac_bayes_layers.value.value == pytest.approx(layers, rel=1e-10)
    # a homogeneous net without biases would have θ·g = depth × (prediction · slope): here, by difference
    step = 1e-6
    values = []
    for c in (1 + step, 1 - step):
        moved = dict(
            zip(
                (n for n, _ in net.named_parameters()),
                (c * p.detach() for p in net.parameters()),
                strict=True,
            )
        )
        values.append(
            F.cross_entropy(torch.func.functional_call(net, moved, (X,)), DATA[1], reduction="none")
        )
    slope = (values[0] - values[1]) / (2 * step)
    assert found.fisher_rao.value.value == pytest.approx(float(slope.square().mean()), rel=1e-6)


def test_estimates_from_few_probes_are_within_their_errors():
    net = relu_net(seed=2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    for _ in range(100):  # towards a minimum, where every block has positive curvature
        optimizer.zero_grad()
        F.cross_entropy(net(X), DATA[1]).backward()
        optimizer.step()
    exact = flatness(net, F.cross_entropy, DATA, probes=10**4)
    few = flatness(net, F.cross_entropy, DATA, probes=12, generator=draw(3))
    for a, b in zip(exact.measures[1:6], few.measures[1:6], strict=True):
        assert b.value.error > 0 or b.name == "tr(HΣ)", b.name
        assert abs(a.value.value - b.value.value) <= 4 * b.value.error + 1e-9, b.name


def test_the_rest_of_the_networks_people_have_is_measured_too():
    for name in ("CNN with batch norm, training", "LSTM", "causal attention"):
        model, data, loss = NETWORKS[name]()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        found = flatness(model, loss, data, probes=4, generator=draw())
        assert all(torch.isfinite(torch.tensor(m.value.value)) for m in found.measures), name
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert "depends on the parametrisation" in str(found)


def test_what_was_measured_before_is_used():
    net = relu_net()
    eigen = top_eigenpairs(
        hessian_operator(net, F.cross_entropy, DATA),
        2,
        which="largest algebraic",
        tol=1e-10,
        generator=draw(),
    )
    found = flatness(
        net,
        F.cross_entropy,
        DATA,
        hessian=eigen,
        noise=gradient_noise(net, F.cross_entropy, DATA),
        generator=draw(),
    )
    assert found.top_eigenvalue.value.value == float(eigen.eigenvalues[0])
    with pytest.raises(ArgumentError, match="probes is 1"):
        flatness(net, F.cross_entropy, DATA, probes=1)


def test_an_estimate_below_zero_is_not_zero_without_error_and_the_largest_curvature_is_the_largest():
    model, data = nn.Linear(3, 1), (X.float(), X[:, :1].float())

    def loss(a, b):
        return -F.mse_loss(a, b)

    found = flatness(model, loss, data, probes=2, generator=draw())
    assert (
        found.trace.value.value < 0 and found.pac_bayes.value.value == 0 and found.pac_bayes.value.error > 0
    )
    eigen = EigenResult(
        torch.tensor([-3.0, 2.0]).double(),
        torch.eye(3, 2),
        torch.ones(2),
        torch.tensor([0.1, 0.2]),
        2,
        2,
        True,
    )
    given = flatness(model, loss, data, probes=2, hessian=eigen, generator=draw()).top_eigenvalue.value
    assert (given.value, given.error) == (2.0, pytest.approx(0.2))
