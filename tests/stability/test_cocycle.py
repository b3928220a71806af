"""The QR step by itself."""

import math

import pytest
import torch

from bolza.stability.cocycle import orthonormalise

F64 = torch.float64


@pytest.mark.parametrize("k", [1, 3])
def test_directions_come_out_orthonormal_with_the_volume_they_span(k):
    z = torch.randn(k, 4, 5, dtype=F64)
    q, logs = orthonormalise(z)
    gram = torch.einsum("ibn,jbn->bij", q, q)
    assert torch.allclose(gram, torch.eye(k, dtype=F64).expand(4, k, k), atol=1e-12)
    volume = torch.einsum("ibn,jbn->bij", z, z).det().log() / 2
    assert torch.allclose(logs.sum(1), volume, atol=1e-10)
    # the first direction keeps its line
    assert torch.allclose((q[0] * z[0]).sum(-1).abs(), z[0].norm(dim=-1))


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_direction_in_the_span_of_the_others_is_lost_and_a_short_one_is_not(dtype):
    a, b = torch.randn(2, 1, 40, dtype=dtype)
    z = torch.stack([a, b, 2 * a - b, torch.randn(1, 40, dtype=dtype) * 1e-30])
    _, logs = orthonormalise(z)
    assert logs[0, 2] == -math.inf
    assert logs[0, [0, 1, 3]].isfinite().all() and logs[0, 3] < -60


@pytest.mark.parametrize("k", [1, 2])
def test_zero_directions_give_minus_infinity_and_a_frame_that_is_finite(k):
    q, logs = orthonormalise(torch.zeros(k, 2, 3))
    assert (logs == -math.inf).all() and q.isfinite().all()
    assert torch.allclose(q.norm(dim=-1), torch.ones(k, 2))


def test_float32_directions_are_resolved_beyond_their_own_rounding():
    # the QR is in float64: nearly parallel directions lose nothing that float32 holds
    z = torch.tensor([[[1.0, 0.0]], [[1.0, 1e-4]]])
    assert orthonormalise(z)[1][0, 1] == pytest.approx(math.log(1e-4), abs=1e-6)
