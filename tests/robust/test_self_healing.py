"""Feedback control of hidden states of a trained network."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn

from bolza.core.errors import ArgumentError, DataError, ShapeError
from bolza.models import gpt, gru, resnet
from bolza.robust import SelfHealing, control_gains

D = torch.float64


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    ).double()


def plane(n=120, d=12, seed=0):
    """Inputs that live in a plane."""
    draw = torch.Generator().manual_seed(seed)
    basis = torch.randn(2, d, generator=torch.Generator().manual_seed(9), dtype=D)
    return torch.randn(n, 2, generator=draw, dtype=D) @ basis + 1


def saved(module):
    """A state dict that went through a file, read without running code."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_gains_at_price_one_are_ratios_of_fibonacci_numbers_down_to_the_golden_one():
    alpha, value = control_gains(1.0, 4)
    assert alpha == pytest.approx((13 / 34, 5 / 13, 2 / 5, 1 / 2), abs=1e-15)
    assert alpha[0] * alpha[1] * alpha[2] * alpha[3] == pytest.approx(1 / 34, abs=1e-15)
    assert value[-1] == 0 and control_gains(1.0, 60)[0][0] == pytest.approx((3 - 5**0.5) / 2, abs=1e-14)
    assert control_gains(0.3, 1)[0] == pytest.approx((0.3 / 1.3,))
    assert max(control_gains(1e-9, 5)[0]) < 1e-8 and control_gains(float("inf"), 3)[0] == (1, 1, 1)


@pytest.mark.parametrize("c", [0.1, 1.0, 3.0])
def test_gains_minimise_the_scalar_problem(c):
    T = 5
    # z_t = 1 + u_0 + … + u_t: the cost is quadratic in u, and its minimum a linear system
    lower = torch.tril(torch.ones(T, T, dtype=D))
    u = torch.linalg.solve(lower.mT @ lower + c * torch.eye(T, dtype=D), -lower.mT @ torch.ones(T, dtype=D))
    z = 1 + lower @ u
    alpha, value = control_gains(c, T)
    assert z.tolist() == pytest.approx(list(itertools.accumulate(alpha, lambda a, b: a * b)), abs=1e-9)
    assert float((z.square().sum() + c * u.square().sum()) / 2) == pytest.approx(value[0] / 2, abs=1e-9)


def test_an_orthogonal_network_loses_what_is_off_by_1_34_and_nothing_of_what_is_in():
    draw = torch.Generator().manual_seed(4)
    net = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4))).double()
    for layer in net:
        layer.weight.data = torch.linalg.qr(torch.randn(8, 8, generator=draw, dtype=D)).Q
    basis = torch.linalg.qr(torch.randn(8, 8, generator=draw, dtype=D)).Q
    x = torch.randn(40, 3, generator=draw, dtype=D) @ basis[:3] + 2
    healed = SelfHealing(net, c=1.0, fraction=1.0).fit(x)
    assert [part.rank for part in healed.manifolds] == [3] * 4
    with torch.no_grad():
        off = healed(x[:1] + basis[3:4]) - net(x[:1])
        inside = healed(x[:1] + basis[:1]) - net(x[:1])
    assert float(off.norm()) == pytest.approx(1 / 34, abs=1e-8)
    assert float(inside.norm()) == pytest.approx(1, abs=1e-8)
    assert torch.allclose(off, (net(basis[3:4]) / 34), atol=1e-8)


def test_dear_control_leaves_the_outputs_alone_and_free_control_projects():
    net, x = network(), plane()
    draw = torch.Generator().manual_seed(0)
    noisy = x + torch.randn(x.shape, generator=draw, dtype=D)
    assert torch.allclose(SelfHealing(net, c=1e6).fit(x)(noisy), net(noisy), atol=1e-5, rtol=0)
    assert torch.equal(SelfHealing(net, c=float("inf")).fit(x)(noisy), net(noisy))
    hard = SelfHealing(net, c=1e-12, fraction=1.0, layers="input").fit(x)
    assert torch.allclose(hard(noisy), net(hard.manifolds[0](noisy)), atol=1e-9)
    assert torch.allclose(hard(x), net(x), atol=1e-9)


def test_controls_are_those_of_the_law_stage_by_stage():
    net, x = network(), plane()
    healed = SelfHealing(net, c=0.7, fraction=0.8).fit(x)
    z = x[:5] + 1
    for t, (u, alpha) in enumerate(zip(healed.controls(z), healed.gains, strict=True)):
        assert torch.allclose(u, -(1 - alpha) * (z - healed.manifolds[t](z)), atol=1e-12)
        z = net[2 * t](z + u)
        z = net[2 * t + 1](z) if t < 2 else z
    assert torch.allclose(z, healed(x[:5] + 1), atol=1e-12)


def test_only_what_the_network_gets_right_is_learned_from():
    net, x = network(), plane()
    y = net(x).argmax(1)
    wrong = torch.arange(len(x)) % 3 == 0
    strange = x.clone()
    strange[wrong] += 50 * torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=D)
    labels = net(strange).argmax(1)
    labels[wrong] = (labels[wrong] + 1) % 3
    seen = SelfHealing(net, fraction=0.99).fit(strange, labels)
    alone = SelfHealing(net, fraction=0.99).fit(x[~wrong], y[~wrong])
    assert torch.allclose(seen.manifolds[0].mean, alone.manifolds[0].mean)
    assert [part.rank for part in seen.manifolds] == [part.rank for part in alone.manifolds]
    with pytest.raises(DataError, match="right on 0 of 120"):
        SelfHealing(net).fit(x, (y + 1) % 3)


def test_images_with_batch_norm_and_residual_blocks_are_healed_sample_by_sample():
    torch.manual_seed(0)
    net = resnet(depth=8, width=4)
    x = torch.randn(24, 1, 8, 8)
    with pytest.raises(ArgumentError, match="eval"):
        SelfHealing(net).fit(x)
    net.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    rng = torch.random.get_rng_state()
    for form in ("flat", "embedding"):
        healed = SelfHealing(net, c=0.1, fraction=0.7, form=form).fit(x)
        together, alone = healed(x[:6] + 1), torch.cat([healed(x[i : i + 1] + 1) for i in range(6)])
        assert torch.allclose(together, alone, atol=1e-5)
        assert not torch.allclose(together, net(x[:6] + 1), atol=1e-3)
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    healed.train()
    with pytest.raises(ArgumentError, match="training mode"):
        healed(x)


@pytest.mark.parametrize("terms", ["P", "PI", "PD", "PID"])
def test_a_decoder_is_healed_position_by_position_and_stays_causal(terms):
    torch.manual_seed(0)
    net = gpt(vocabulary=11, depth=2, width=8, length=6, heads=2).eval()
    tokens = torch.randint(11, (20, 6))
    healed = SelfHealing(net, c=0.1, fraction=0.6, terms=terms).fit(tokens, net(tokens).argmax(-1))
    assert healed.controls(tokens)[0] is None and healed.gains == control_gains(0.1, len(healed.manifolds))[0]
    assert all(part.basis.shape[0] == 8 for part in healed.manifolds)
    out = healed(tokens[:3])
    other = tokens[:3].clone()
    other[:, -1] = (other[:, -1] + 1) % 11
    assert torch.allclose(out[:, :-1], healed(other)[:, :-1], atol=1e-6)
    assert torch.allclose(out[:, :4], healed(tokens[:3, :4]), atol=1e-5)
    assert not torch.allclose(out, net(tokens[:3]), atol=1e-4)
    report = healed.report(tokens, net(tokens).argmax(-1), noise=0.2)
    assert [row.name for row in report.rows] == ["clean", "noise"] and report["clean"].base == 1
    with pytest.raises(DataError, match="tokens"):
        healed.report(tokens, tokens, eps=0.1)


def test_running_means_and_differences_widen_the_subspaces_at_no_more_than_full_rank():
    net, x = network(), plane()
    ranks = {
        terms: [part.rank for part in SelfHealing(net, terms=terms).fit(x).manifolds]
        for terms in ("P", "PID")
    }
    assert ranks["P"][:2] == ranks["PID"][:2]  # nothing of that shape came before
    assert ranks["P"][2] < ranks["PID"][2] <= 16


@pytest.mark.parametrize("manifold", ["linear", "autoencoder", "own"])
def test_what_was_learned_is_saved_loaded_and_copied(manifold):
    net, x = network(), plane(40)
    make = (lambda d: nn.Sequential(nn.Linear(d, 2), nn.Linear(2, d))) if manifold == "own" else manifold
    healed = SelfHealing(net, c=0.3, manifold=make).fit(x, steps=20)
    other = SelfHealing(network(), manifold=make)
    other.load_state_dict(saved(healed))
    noisy = x[:4] + 1
    assert torch.equal(other(noisy), healed(noisy)) and other.gains == healed.gains
    if manifold != "own":
        assert torch.equal(copy.deepcopy(healed)(noisy), healed(noisy))
    assert not torch.allclose(healed(noisy), net(noisy), atol=1e-3)


def test_gradients_pass_through_the_control():
    net, x = network(), plane()
    healed = SelfHealing(net, c=0.3, fraction=0.8).fit(x)
    at = x[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(healed, (at,))


def test_the_maximum_principle_goes_below_the_cost_of_the_feedback_law():
    net, x = network(), plane()
    healed = SelfHealing(net, c=0.3, fraction=0.8).fit(x)
    found = healed.solve(x[:8] + 1, iterations=15, lr=0.02)
    assert bool((found.cost <= found.start).all()) and float((found.cost / found.start).mean()) < 0.999
    assert torch.allclose(healed.solve(x[:8] + 1, iterations=0).output, healed(x[:8] + 1))
    with pytest.raises(ArgumentError, match="terms='P'"):
        SelfHealing(net, terms="PI").fit(x).solve(x)


def test_several_arguments_are_taken():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x, shift):
            return self.second(torch.tanh(self.first(x + shift)))

    net, x, shift = Sum(), torch.randn(30, 4), torch.randn(30, 4)
    healed = SelfHealing(net, c=1e6, layers="hidden").fit((x, shift))
    assert torch.allclose(healed(x, shift), net(x, shift), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"c": 0}, "c=0"),
        ({"terms": "I"}, "terms='I'"),
        ({"fraction": 1.5}, "fraction=1.5"),
        ({"manifold": "curve"}, "manifold='curve'"),
        ({"manifold": "autoencoder", "terms": "PI"}, "terms='P'"),
        ({"form": "long"}, "form='long'"),
        ({"layers": "some"}, "layers='some'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ArgumentError, match=words):
        SelfHealing(network(), **options)


def test_misuse_is_named():
    net, x = network(), plane(20)
    with pytest.raises(ArgumentError, match="fit"):
        SelfHealing(net)(x)
    with pytest.raises(ArgumentError, match="layers has 7"):
        SelfHealing(net, layers=[7]).fit(x)
    with pytest.raises(ShapeError, match="without labels"):
        SelfHealing(net).fit(x, torch.zeros(20, 2))
    with pytest.raises(ArgumentError, match="samples=1"):
        SelfHealing(net).fit(x, samples=1)
    with pytest.raises(DataError, match="dict"):
        SelfHealing(net).fit({"x": x})


def test_an_unrolled_recurrent_network_is_taken():
    torch.manual_seed(0)
    net = gru(steps=3, in_features=2, width=4, out_features=2)
    x = torch.randn(10, 3, 2)
    healed = SelfHealing(net, c=1e6, layers="hidden").fit(x)
    assert torch.allclose(healed(x), net(x), atol=1e-5)
