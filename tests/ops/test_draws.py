import pytest
import torch

from bolza.core.errors import ArgumentError
from bolza.ops.draws import gaussian_draws, white_draws


@pytest.mark.parametrize("lead", [(), (3,), (2, 2)])
def test_second_moments_are_exact_and_odd_ones_zero(lead):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(*lead, 5, 3, generator=g, dtype=torch.float64)  # rank 3 of 5
    kernel = a @ a.mT
    h = gaussian_draws(kernel, 40, g)
    assert h.shape == (*lead, 5, 40)
    torch.testing.assert_close(h @ h.mT / 40, kernel)
    assert h.mean(-1).abs().max() < 1e-12 and h.pow(3).mean(-1).abs().max() < 1e-12


def test_fourth_moment_is_that_of_a_gaussian():
    h = gaussian_draws(torch.full((1, 1), 4.0), 200_000, torch.Generator().manual_seed(1))
    error = (h**4).std() / 200_000**0.5
    assert abs(float((h**4).mean()) - 48) < 4 * error


def test_too_few_units_are_refused():
    with pytest.raises(ArgumentError, match="units=6"):
        white_draws(4, 6)
