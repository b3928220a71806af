import math

import pytest
import torch

from bolza.core.errors import ArgumentError
from bolza.meanfield import correlation_map, residual_map


def test_relu_streams_and_gradients_grow_by_the_known_factor() -> None:
    orbit = residual_map("relu", 2.0, 0.0, depth=5, out_weight_var=0.5, p0=3.0)
    factor = 1 + 0.5 * 2 / 2  # 1 + σ_v² σ_w² / 2
    assert orbit.p.tolist() == pytest.approx([3 * factor**k for k in range(6)], rel=1e-12)
    assert orbit.chi.tolist() == pytest.approx([factor] * 5, rel=1e-12)
    assert orbit.q.tolist() == pytest.approx([6 * factor**k for k in range(5)], rel=1e-12)
    assert float(orbit.log_gain[-1]) == pytest.approx(5 * math.log(factor))


def test_a_linear_stream_is_a_geometric_series_with_all_four_variances() -> None:
    orbit = residual_map("linear", 0.5, 0.2, depth=4, out_weight_var=0.3, out_bias_var=0.1, p0=2.0, c0=0.25)
    p, gamma = 2.0, 0.5
    for k in range(4):
        p, gamma = (v + 0.3 * (0.5 * v + 0.2) + 0.1 for v in (p, gamma))
        assert float(orbit.p[k + 1]) == pytest.approx(p, rel=1e-12)
        assert float(orbit.c[k + 1]) == pytest.approx(gamma / p, rel=1e-12)


def test_tanh_streams_grow_linearly_and_their_gradients_slower_than_any_exponential() -> None:
    orbit = residual_map("tanh", 1.5, 0.0, depth=200, out_weight_var=1.0, out_bias_var=0.1, c0=1.0)
    steps = orbit.p.diff(dim=0)
    assert (steps.diff(dim=0) > 0).all() and float(steps[-1]) == pytest.approx(
        1.05, abs=0.02
    )  # → σ_v² + σ_a²
    assert (orbit.chi.diff(dim=0) < 0).all() and (orbit.chi > 1).all()


def test_branches_of_variance_one_over_depth_stay_bounded_at_any_depth() -> None:
    for depth in (10, 100, 400):
        orbit = residual_map("relu", 1.0, 0.0, depth=depth, out_weight_var=1 / depth)
        assert 1.5 < float(orbit.p[-1]) < math.exp(0.5)


def test_a_stream_keeps_angles_that_a_plain_network_loses() -> None:
    stream = residual_map("tanh", 1.0, 0.05, depth=40, c0=0.1).c
    plain = correlation_map("tanh", 1.0, 0.05, 1.0, 1.0, 0.1, 40)[2]
    assert float(plain[-1]) > 0.999
    assert float((stream - 0.1).abs().max()) < 0.025


@pytest.mark.parametrize("name", ["tanh", "relu"])
@pytest.mark.parametrize("projected", [True, False])
def test_a_wide_network_does_what_the_recursion_says(name: str, projected: bool) -> None:
    width, depth = 1500, 6
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(2, width, generator=draw)
    x[1] = 0.6 * x[0] + 0.8 * x[1]
    f = getattr(torch, name)
    for _ in range(depth):
        w = torch.randn(width, width, generator=draw) * (0.8 / width) ** 0.5
        branch = f(x @ w + 0.2 * torch.randn(width, generator=draw))
        if projected:
            branch = branch @ torch.randn(width, width, generator=draw) * (0.7 / width) ** 0.5
        x = x + branch
    start = {"p0": 1.0, "c0": 0.6, "out_weight_var": 0.7 if projected else None}
    orbit = residual_map(name, 0.8, 0.04, depth=depth, **start)
    p, gamma = float(x.square().mean()), float((x[0] * x[1]).mean())
    assert p / float(orbit.p[-1]) == pytest.approx(1, abs=4 * (2 * depth / width) ** 0.5)
    assert gamma / p == pytest.approx(float(orbit.c[-1]), abs=4 * (depth / width) ** 0.5)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match="out_weight_var is -1"):
        residual_map("tanh", 1.0, 0.0, depth=3, out_weight_var=-1.0)
    with pytest.raises(ArgumentError, match="c0 is 2"):
        residual_map("tanh", 1.0, 0.0, depth=3, c0=2.0)
    assert residual_map("tanh", 1.0, depth=0).chi.shape == (0,)
