"""Activations of sums and products that are not Gaussian, against closed forms and wide networks."""

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError, UnsupportedError
from bolza.meanfield.kernels import empirical_ntk, infinite_kernels, nngp
from bolza.models import resnet

F64 = torch.float64


class Post(nn.Module):
    """relu(h(x) + f(x))."""

    def __init__(self, width, inner=None):
        super().__init__()
        self.inner = inner or nn.Identity()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return torch.relu(x + self.inner(self.linear(x)))


class Gate(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.value, self.gate = nn.Linear(4, width), nn.Linear(4, width)
        self.out = nn.Linear(width, 1)

    def forward(self, x):
        return self.out(torch.square(self.value(x) * self.gate(x)))


def inputs():
    """Of which two are equal, one is opposite and one is zero."""
    x = torch.randn(5, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    x[1], x[2], x[3] = x[0], -x[0], 0
    return x


def test_relu_of_a_sum_of_relus_is_the_sum():
    """The sum is not negative, so that relu changes nothing, and K and Θ have a closed form."""

    def net(last):
        class Branches(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two, self.out = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 1)

            def forward(self, x):
                return self.out(last(torch.relu(self.one(x)) + torch.relu(self.two(x))))

        return Branches()

    exact = infinite_kernels(net(nn.Identity()), inputs(), weight_var=2.0, bias_var=0.1)
    sampled = infinite_kernels(net(nn.ReLU()), inputs(), weight_var=2.0, bias_var=0.1)
    assert exact.error == 0 and 0 < sampled.error < 0.01
    for a, b in ((exact.nngp, sampled.nngp), (exact.ntk, sampled.ntk)):
        assert (a - b).abs().max() < 0.005 * a.max()
        assert (a - b).abs().max() > 1e-9  # it is sampled
    finer = infinite_kernels(net(nn.ReLU()), inputs(), weight_var=2.0, bias_var=0.1, samples=2**14)
    assert (finer.ntk - exact.ntk).abs().max() < 2e-3 * exact.ntk.max()


def test_a_square_of_a_product_has_its_polynomial():
    """E u²g² u'²g'² = (E u²u'²)², and E u²u'² = q² + 2K²."""
    k = nngp(Gate(8), inputs(), weight_var=1.0, bias_var=0.5, samples=2**17)
    before = inputs() @ inputs().T / 4 + 0.5
    q = before.diagonal()
    exact = (q[:, None] * q + 2 * before.square()).square() + 0.5
    assert (k - exact).abs().max() < 0.05 * exact.max()


def test_wide_networks_with_relu_after_the_sum_have_these_kernels():
    width, x = 192, inputs()

    def net():
        blocks = [Post(width), Post(width, nn.Sequential(nn.ReLU(), nn.Linear(width, width)))]
        net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), *blocks, nn.Linear(width, 1)).to(F64)
        for p in net.parameters():
            nn.init.normal_(p, 0, (1.5 / p.shape[1]) ** 0.5 if p.ndim == 2 else 0.5)
        return net

    torch.manual_seed(0)
    limit = infinite_kernels(
        net(), x, weight_var=1.5, bias_var=0.25, parametrization="standard", samples=2**15
    )
    covariances, tangents = [], []
    for _ in range(24):
        drawn = net()
        with torch.no_grad():
            h = drawn[:-1](x)
        covariances.append(1.5 * h @ h.T / width + 0.25)
        tangents.append(empirical_ntk(drawn, x))
    for drawn, wanted in ((covariances, limit.nngp), (tangents, limit.ntk)):
        drawn = torch.stack(drawn)
        error = drawn.std(0) / len(drawn) ** 0.5
        assert ((drawn.mean(0) - wanted).abs() < 3.5 * error + 0.02 * wanted.abs().max()).all()
        assert error.max() < 0.06 * wanted.abs().max()


def test_a_residual_network_of_images_has_its_kernels():
    net = resnet(width=4).eval()
    x = torch.randn(2, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    whole = infinite_kernels(net, x, samples=256)
    assert whole.nngp.shape == whole.ntk.shape == (2, 2) and 0 < whole.error < 0.1
    assert torch.linalg.eigvalsh(whole.nngp).min() > 0
    part = infinite_kernels(net, x, x[:1], samples=256)
    assert torch.allclose(part.nngp, whole.nngp[:, :1], rtol=0.02)
    assert torch.allclose(part.ntk, whole.ntk[:, :1], rtol=0.02)


def test_the_seed_decides():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Post(8), nn.Linear(8, 1))
    first, again, other = (nngp(net, inputs(), samples=64, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_values_that_depend_on_each_other_and_too_few_points_are_refused():
    class Tangled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.out = nn.Linear(4, 4), nn.Linear(4, 1)
            self.second = nn.Linear(4, 4)

        def forward(self, x):
            h = self.first(x)
            return self.out(torch.relu((h + self.second(torch.relu(h))) * torch.relu(h)))

    with pytest.raises(UnsupportedError, match=r"stem from the same random layer \(.*first"):
        nngp(Tangled(), inputs())
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Post(8), nn.Linear(8, 1))
    with pytest.raises(ArgumentError, match="samples=2 are too few"):
        nngp(net, inputs(), samples=2)
