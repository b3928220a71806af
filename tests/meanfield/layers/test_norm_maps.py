import math

import pytest
import torch
from torch import nn

from bolza.meanfield import propagate
from bolza.meanfield.layers.norm_maps import BatchStatistics


@pytest.mark.parametrize("batch", [4, 5, 8, 16, 64])
def test_the_gradient_of_a_linear_batch_normed_layer_grows_by_a_rational_number(batch: int) -> None:
    """(B - 2)/(B - 3) (Yang et al. 2019): 2, 1.5, 1.2, 1.0769, 1.0164 for B = 4, 5, 8, 16, 64."""
    centred = torch.eye(batch, dtype=torch.float64) - 1 / batch
    kernel = centred * batch / (batch - 1)  # what a batch norm and a layer of σ_w² = 1 leave, diagonal 1
    norm = BatchStatistics(kernel, 0.0)
    assert torch.allclose(norm.forward(), kernel)  # a fixed point
    back = norm.backward(centred)
    assert float(back.trace() / centred.trace()) == pytest.approx((batch - 2) / (batch - 3), rel=2e-5)


def test_relu_with_large_batches_grows_by_pi_over_pi_minus_one() -> None:
    """π/(π - 1) = 1.466942, approached as 1/B."""
    rates = []
    for batch in (64, 192):
        y = torch.full((batch, batch), -1 / (batch - 1), dtype=torch.float64).fill_diagonal_(1.0)
        angle = math.acos(-1 / (batch - 1))
        mixed = (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / (2 * math.pi)
        kernel = torch.full_like(y, 2 * mixed).fill_diagonal_(1.0)  # a layer of σ_w² = 2 after ReLU
        norm = BatchStatistics(kernel, 0.0)
        slope = torch.full_like(y, (math.pi - angle) / (2 * math.pi)).fill_diagonal_(0.5)
        g = torch.eye(batch, dtype=torch.float64)
        for _ in range(30):
            g = norm.backward(2 * slope * g)
            rates.append(float(g.trace()) / batch)
            g = g / rates[-1]
    small, large = rates[29], rates[-1]
    assert large == pytest.approx(math.pi / (math.pi - 1), rel=0.01)
    limit = (3 * large - small) / 2  # without the term 1/B
    assert limit == pytest.approx(math.pi / (math.pi - 1), rel=1e-3)


def test_the_kernel_of_gradients_through_batch_norm_is_that_of_sampled_units() -> None:
    """Against 100,000 units taken back by autograd, for correlated items and gradients and an ε that matters."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    kernel, upstream = a @ a.T / 6 + 0.1 * torch.eye(6), b @ b.T / 6
    units = 100_000
    h = torch.linalg.cholesky(kernel) @ torch.randn(6, units, dtype=torch.float64, generator=generator)
    g = b / math.sqrt(6) @ torch.randn(6, units, dtype=torch.float64, generator=generator)
    h.requires_grad_(True)
    y = nn.functional.batch_norm(h, None, None, training=True, eps=0.05)
    (back,) = torch.autograd.grad(y, h, g)
    exact = BatchStatistics(kernel, 0.05).backward(upstream)
    spread = (back[:, None] * back[None]).std(-1) / math.sqrt(units)
    assert bool(((back @ back.T / units - exact).abs() < 4.5 * spread).all())


def test_batch_norm_of_large_images_goes_on_position_by_position() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64),
        nn.Tanh(),
    )  # fmt: skip
    result = propagate(model, torch.randn(8, 3, 20, 20))
    assert not result.unmapped
    for row in result.layers[1:]:
        assert row.q_theory == pytest.approx(row.q_measured, rel=0.1)
        assert row.grad_theory == pytest.approx(row.grad_measured, rel=0.35)


def test_scales_and_shifts_of_single_units_count() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 400), nn.BatchNorm1d(400), nn.ReLU(), nn.Linear(400, 400))
    with torch.no_grad():
        model[1].weight.uniform_(0.2, 2.0)
        model[1].bias.normal_()
    for training in (True, False):
        rows = propagate(model.train(training), torch.randn(16, 20)).layers
        assert [r.source for r in rows] == ["theory"] * 4
        for row in rows:
            assert row.q_theory == pytest.approx(row.q_measured, rel=0.12)
            assert row.c_theory == pytest.approx(row.c_measured, abs=0.04)
            assert row.grad_theory == pytest.approx(row.grad_measured, rel=0.2)
