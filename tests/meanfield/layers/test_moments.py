import math

import pytest
import torch

from bolza.meanfield.layers.moments import correlation_of, estimate, measure


def test_the_kernel_is_the_mean_product_over_units_in_both_layouts() -> None:
    value = torch.randn(3, 5, 2, 4, dtype=torch.float64)  # samples, units, two positions
    full, same = measure(value, 1, full=True), measure(value, 1, full=False)
    flat = value.movedim(1, -1).reshape(3, 8, 5)
    assert full.kernel.shape == (1, 24, 24) and same.kernel.shape == (8, 3, 3)
    assert float(full.kernel[0, 8 + 3, 2]) == pytest.approx(float(flat[1, 3] @ flat[0, 2] / 5))
    assert torch.allclose(full.same_positions().kernel, same.kernel)
    assert torch.allclose(full.same_positions().mean, same.mean)


def test_correlation_leaves_out_dead_items_and_the_diagonal() -> None:
    k = torch.tensor([[[4.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]], dtype=torch.float64)
    assert correlation_of(k) == pytest.approx(0.5)
    assert math.isnan(correlation_of(k[:, :1, :1]))


def test_standard_errors_are_those_of_many_repetitions() -> None:
    """Spread of estimates over 400 independent layers against the error each of them claims."""
    generator = torch.Generator().manual_seed(1)
    factor = torch.linalg.cholesky(torch.tensor([[1.0, 0.6, 0.3], [0.6, 2.0, 0.5], [0.3, 0.5, 1.0]]).double())
    runs = [
        estimate(factor @ torch.randn(3, 80, generator=generator, dtype=torch.float64), 1, True)
        for _ in range(400)
    ]
    for value, error in (("q", "q_error"), ("c", "c_error")):
        spread = torch.tensor([getattr(r, value) for r in runs]).std()
        claimed = torch.tensor([getattr(r, error) for r in runs]).square().mean().sqrt()
        # a spread over 400 runs is known to 3.5 %
        assert float(claimed / spread) == pytest.approx(1, abs=0.12)
