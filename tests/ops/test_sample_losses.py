"""One loss a sample, from losses of every make."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.ops.errors import ShapeError
from bolza.ops.sample_losses import sample_losses, without_reduction

OUT, Y = (
    torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    torch.arange(6) % 4,
)


def _smooth(out, y):
    return F.cross_entropy(out, y, label_smoothing=0.1)


@pytest.mark.parametrize(
    "loss", [F.cross_entropy, nn.CrossEntropyLoss(), _smooth, nn.CrossEntropyLoss(label_smoothing=0.2)]
)
def test_the_losses_are_those_of_batches_of_one_and_average_to_the_loss(loss):
    alone = torch.stack([loss(OUT[i : i + 1], Y[i : i + 1]) for i in range(6)])
    for one in (loss, without_reduction(loss, OUT, Y, 6)):
        found = sample_losses(one, OUT, Y, 6)
        assert torch.allclose(found, alone, rtol=1e-12, atol=0)
        assert torch.allclose(found.mean(), loss(OUT, Y), rtol=1e-12, atol=0)


def test_a_loss_that_branches_on_its_values_is_called_on_one_sample_after_another():
    def checked(out, y):
        if bool((out.abs() > 1e6).any()):
            raise ValueError("too large")
        return F.cross_entropy(out, y)

    found = sample_losses(checked, OUT, Y, 6)
    assert torch.allclose(found, F.cross_entropy(OUT, Y, reduction="none"), rtol=1e-12, atol=0)


def test_a_weighted_mean_is_not_taken_for_a_plain_one():
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    found = sample_losses(without_reduction(loss, OUT, Y, 6), OUT, Y, 6)
    assert torch.allclose(found, F.cross_entropy(OUT, Y, reduction="none"), rtol=1e-12, atol=0)


def test_targets_of_many_numbers_are_averaged_over_all_of_them():
    found = sample_losses(without_reduction(F.mse_loss, OUT, 2 * OUT, 6), OUT, 2 * OUT, 6)
    assert torch.allclose(found, OUT.square().mean(1), rtol=1e-12, atol=0)


def test_a_loss_of_another_shape_is_refused():
    with pytest.raises(ShapeError, match="6 examples"):
        sample_losses(lambda out, y: out, OUT, Y, 6)
