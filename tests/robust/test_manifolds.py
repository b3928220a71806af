"""Subspaces and autoencoders of states."""

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError, DataError
from bolza.robust import Autoencoder, Subspace

D = torch.float64


@pytest.mark.parametrize(("n", "d"), [(200, 6), (12, 40)])
def test_a_subspace_holds_the_fewest_directions_that_carry_the_fraction(n, d):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(n, d, generator=draw, dtype=D) * torch.logspace(0, -1, d, dtype=D) + 3
    space = Subspace.fit(rows, 0.9)
    _, size, right = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    share = size.square().cumsum(0) / size.square().sum()
    r = space.rank
    assert share[r - 1] >= 0.9 > share[r - 2]
    assert torch.allclose(space.basis.mT @ space.basis, torch.eye(r, dtype=D), atol=1e-12)
    assert torch.allclose(space.basis @ space.basis.mT, right[:r].mT @ right[:r], atol=1e-8)
    assert torch.allclose(space.mean, rows.mean(0))


def test_states_of_a_plane_have_two_directions_at_any_fraction_and_are_left_alone():
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(50, 2, generator=draw, dtype=D) @ torch.randn(2, 9, generator=draw, dtype=D) + 1
    space = Subspace.fit(rows, 1.0)
    assert space.rank == 2
    assert torch.allclose(space(rows), rows, atol=1e-9)
    x = torch.randn(4, 3, 9, generator=draw, dtype=D)
    assert torch.allclose(space(space(x)), space(x), atol=1e-12)
    assert float((space.along(x - space(x))).abs().max()) < 1e-10


def test_constant_states_have_no_direction():
    space = Subspace.fit(torch.full((5, 3), 2.0))
    assert space.rank == 0 and torch.equal(space(torch.randn(2, 3)), torch.full((2, 3), 2.0))


def test_the_average_of_subspaces_has_the_average_residual():
    draw = torch.Generator().manual_seed(2)
    spaces = [Subspace.fit(torch.randn(6, 10, generator=draw, dtype=D), 0.7) for _ in range(3)]
    joint = Subspace.average(spaces)
    x = torch.randn(5, 10, generator=draw, dtype=D)
    mean = spaces[0].mean
    residual = torch.stack([x - mean - space.along(x - mean) for space in spaces]).mean(0)
    assert torch.allclose(x - joint(x), residual, atol=1e-9)
    assert joint.rank <= 10


def test_an_autoencoder_brings_points_back_to_a_circle_where_no_subspace_can():
    angle = torch.linspace(0, 6.28, 200)
    rows = torch.stack([angle.cos(), angle.sin()], 1)
    before = torch.random.get_rng_state()
    curve = Autoencoder.fit(rows, code=2, hidden=24, steps=150, lr=1e-2)
    assert torch.equal(torch.random.get_rng_state(), before)
    off = rows * 1.4
    assert Subspace.fit(rows, 0.95).rank == 2
    distance = (curve(off).norm(dim=1) - 1).abs().mean()
    assert float(distance) < 0.25 < 0.4
    assert not any(p.requires_grad for p in curve.parameters())
    again = Autoencoder.fit(rows, code=2, hidden=24, steps=3)
    assert torch.equal(again(off), Autoencoder.fit(rows, code=2, hidden=24, steps=3)(off))
    own = Autoencoder.fit(rows.double(), net=nn.Linear(2, 2), steps=2)
    assert own(off.double()).dtype == D


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ArgumentError, match="fraction=0"):
        Subspace.fit(torch.randn(3, 2), 0)
    with pytest.raises(DataError, match="at least two"):
        Subspace.fit(torch.randn(1, 2))
    with pytest.raises(DataError, match="not finite"):
        Subspace.fit(torch.full((3, 2), torch.nan))
    with pytest.raises(ArgumentError, match="steps=0"):
        Autoencoder.fit(torch.randn(3, 2), steps=0)
    with pytest.raises(DataError, match="at least two"):
        Autoencoder.fit(torch.randn(2))
