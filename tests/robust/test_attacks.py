"""Attacks: worst cases of linear scores, ranges, radii, and a model that is left as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bolza.core.errors import ArgumentError, DataError, DivergenceError
from bolza.robust import fgsm, pgd

BCE = F.binary_cross_entropy_with_logits
D = torch.float64
W = torch.tensor([[1.0, -2.0, 0.5]], dtype=D)
X = torch.tensor([[0.3, 0.1, -0.4]], dtype=D)


def score(x):
    return x @ W.T


def network(dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


@pytest.mark.parametrize(("norm", "worst"), [("linf", 0.9432490), ("l2", 0.8711916)])
@pytest.mark.parametrize("attack", [fgsm, lambda *a, **k: pgd(*a, 60, step_size=0.1, **k)])
def test_the_worst_loss_of_a_linear_score_is_its_closed_form(norm, worst, attack):
    y = torch.ones(1, 1, dtype=D)
    found = attack(score, BCE, X, y, 0.1, norm=norm, clip=None)
    dual = W.abs().sum() if norm == "linf" else W.norm()
    assert float(BCE(score(found), y)) == pytest.approx(worst, abs=1e-7)
    assert float(score(X) - score(found)) == pytest.approx(0.1 * float(dual), abs=1e-12)


def test_each_sample_has_a_radius_of_its_own_and_zero_is_no_attack():
    g = torch.Generator().manual_seed(0)
    x, y, eps = torch.rand(4, 6), torch.arange(4) % 3, torch.tensor([0.0, 0.05, 0.1, 0.3])
    for norm, size in (("linf", lambda d: d.abs().amax(1)), ("l2", lambda d: d.norm(dim=1))):
        found = pgd(network(), F.cross_entropy, x, y, eps, 5, norm=norm, generator=g)
        reached = size(found - x)
        assert bool((reached <= eps + 1e-6).all()) and float(reached[0]) < 1e-7 and float(reached[3]) > 0.2
        assert bool((found >= 0).all() and (found <= 1).all())


def test_more_restarts_never_lower_a_loss_and_the_best_step_is_kept():
    net, x, y = network(), torch.rand(64, 6, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 3

    def losses(**options):
        found = pgd(net, F.cross_entropy, x, y, 0.3, 4, generator=torch.Generator().manual_seed(2), **options)
        return F.cross_entropy(net(found), y, reduction="none").detach()

    one, three, last = losses(), losses(restarts=3), losses(best=False)
    assert bool((three >= one - 1e-6).all()) and bool((three > one + 1e-6).any())
    assert bool((one >= last - 1e-6).all())


def test_a_mean_loss_without_the_option_gives_the_same_as_losses_of_samples():
    net, x, y = network(D), torch.rand(8, 6, dtype=D), torch.arange(8) % 3

    def own(out, y):
        return -(out.log_softmax(1).gather(1, y[:, None])).mean()

    def each(out, y):
        return F.cross_entropy(out, y, reduction="none")

    for norm in ("linf", "l2"):
        found = [
            pgd(net, loss, x, y, 0.2, 5, norm=norm, generator=torch.Generator().manual_seed(0))
            for loss in (own, each, F.cross_entropy, nn.CrossEntropyLoss())
        ]
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=0, atol=1e-12)


def test_a_targeted_attack_raises_the_probability_of_its_target():
    net, x = network(), torch.rand(16, 6, generator=torch.Generator().manual_seed(3))
    target = (net(x).argmax(1) + 1) % 3
    found = pgd(net, F.cross_entropy, x, target, 0.5, 10, targeted=True)
    before, after = (net(z).softmax(1).gather(1, target[:, None]) for z in (x, found))
    assert bool((after > before).all()) and float((net(found).argmax(1) == target).float().mean()) > 0.5


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3)
    ).train(training)
    net[0].bias.requires_grad_(False)
    net[4].weight.grad = torch.ones_like(net[4].weight)
    before = copy.deepcopy(net.state_dict())
    found = pgd(net, F.cross_entropy, torch.rand(6, 1, 4, 4), torch.arange(6) % 3, 0.1, 3, norm="l2")
    assert found.shape == (6, 1, 4, 4) and not found.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training is training and net[0].weight.grad is None and bool((net[4].weight.grad == 1).all())
    assert [p.requires_grad for p in net.parameters()].count(False) == 1


def test_the_floating_entry_of_a_tuple_or_a_dict_is_attacked():
    table = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    net, tokens, x = network(), torch.tensor([0, 1, 4]), torch.rand(3, 6)
    y = torch.arange(3)
    found = pgd(lambda i, z: net(z + table[i]), F.cross_entropy, (tokens, x), y, 0.1, 2)
    assert found[0] is tokens and found[1].shape == x.shape and not torch.equal(found[1], x)
    found = fgsm(lambda z, i: net(z + table[i]), F.cross_entropy, {"i": tokens, "z": x}, y, 0.1)
    assert set(found) == {"i", "z"} and float((found["z"] - x).abs().max()) <= 0.1 + 1e-6


def test_a_recurrent_and_an_attention_network_can_be_attacked():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.mix = (
                nn.GRU(4, 8, batch_first=True),
                nn.MultiheadAttention(8, 2, batch_first=True),
            )
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            h, _ = self.cell(x)
            return self.head(self.mix(h, h, h)[0].mean(1))

    net, x, y = Reader(), torch.randn(5, 3, 4), torch.arange(5) % 2
    found = pgd(net, F.cross_entropy, x, y, 0.5, 5, clip=None)
    with torch.no_grad():
        assert float(F.cross_entropy(net(found), y)) > float(F.cross_entropy(net(x), y))


def test_what_makes_no_sense_is_refused_with_a_remedy():
    net, x, y = network(), torch.rand(4, 6), torch.arange(4) % 3

    def attack(model=net, x=x, eps=0.1, **options):
        return pgd(model, F.cross_entropy, x, y, eps, **options)

    with pytest.raises(DataError, match="outside of clip"):
        attack(x=x - 0.5)
    with pytest.raises(DataError, match="tokens"):
        attack(x=torch.arange(4))
    with pytest.raises(DataError, match="not finite"):
        attack(x=x / 0)
    with pytest.raises(DataError, match="nothing to attack"):
        attack(x=x[:0])
    with torch.inference_mode(), pytest.raises(ArgumentError, match="inference_mode"):
        attack()
    with pytest.raises(ArgumentError, match="eps"):
        attack(eps=-1.0)
    with pytest.raises(ArgumentError, match="one for each"):
        attack(eps=torch.ones(3))
    with pytest.raises(ArgumentError, match="norm"):
        attack(norm="l7")
    with pytest.raises(ArgumentError, match="steps"):
        attack(steps=0)
    with pytest.raises(ArgumentError, match="first end"):
        attack(clip=(1.0, 0.0))
    with pytest.raises(ArgumentError, match="no gradient"):
        attack(model=lambda z: net(z).detach())
    with pytest.raises(DivergenceError, match="not finite"):
        attack(model=lambda z: net(z) * torch.inf)
