import pytest
import torch
from torch import nn

from bolza.stability.operator_norm import matrix_norm, operator_gain

D = torch.float64


def dense(layer, shape):
    n = int(torch.Size(shape).numel())
    basis = torch.eye(n, dtype=D).reshape(n, *shape)
    with torch.no_grad():
        return (layer(basis) - layer(torch.zeros(1, *shape, dtype=D))).reshape(n, -1)


@pytest.mark.parametrize(
    ("layer", "shape", "slack"),
    [
        (nn.Conv2d(2, 3, 3, padding=1), (2, 7, 6), 1.06),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 7, 6), 1 + 1e-6),
        (nn.Conv2d(2, 4, 3, stride=2, padding=1), (2, 8, 7), 1.15),
        (nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2), (4, 8, 8), 1.25),
        (nn.Conv2d(1, 4, (5, 2), stride=(3, 1)), (1, 11, 6), 1.15),
        (nn.Conv1d(3, 2, 4, padding=1), (3, 12), 1.15),
        (nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1), (3, 5, 5), 1.15),
        (nn.AvgPool2d(2), (3, 6, 6), 1 + 1e-6),
        (nn.AvgPool2d(3, 2, padding=1), (2, 7, 7), 2.1),
        (nn.Linear(7, 4), (7,), 1 + 1e-6),
        (nn.Flatten(), (2, 3), 1 + 1e-6),
    ],
    ids=str,
)
def test_bounds_without_a_matrix_are_above_and_near_the_norm_of_the_matrix(layer, shape, slack):
    torch.manual_seed(0)
    if hasattr(layer, "reset_parameters"):
        layer.reset_parameters()
    layer = layer.double()
    exact = float(torch.linalg.matrix_norm(dense(layer, shape), 2))
    bound = operator_gain(layer, torch.Size((1, *shape)))
    assert exact * (1 - 1e-12) <= bound <= exact * slack


def test_the_bound_of_a_convolution_tightens_on_larger_images():
    torch.manual_seed(1)
    layer = nn.Conv2d(2, 2, 3, padding=1).double()
    ratios = [
        operator_gain(layer, torch.Size((1, 2, n, n)))
        / float(torch.linalg.matrix_norm(dense(layer, (2, n, n)), 2))
        for n in (4, 12)
    ]
    assert 1 <= ratios[1] < ratios[0]


def test_matrix_norm_is_an_upper_bound_at_any_scale():
    torch.manual_seed(0)
    a = torch.randn(20, 30, dtype=D)
    exact = float(torch.linalg.matrix_norm(a, 2))
    for scale in (1e-200, 1.0, 1e200):
        assert exact <= matrix_norm(a * scale) / scale <= exact * (1 + 1e-8)
    assert matrix_norm(torch.zeros(3, 2)) == 0
