"""The KL of a variational autoencoder at a set-point."""

import math

import pytest
import torch

from bolza.controllers import ControlVAE, DynamicVAE, resting_beta, water_filling_kl
from bolza.core.errors import ArgumentError
from bolza.models import vae
from bolza.studies.shao2020_controlvae import expected_terms

SPECTRA = ([4.0, 1.0, 0.25], [9.0, 4.0, 1.0, 0.5], [2.0, 2.0])


def test_resting_weights_of_linear_autoencoders_are_those_of_water_filling():
    found = [resting_beta(torch.tensor(s), kl) for s, kl in zip(SPECTRA, (1.5, 3.0, 1.0), strict=True)]
    assert found == pytest.approx([0.44626, 0.45960, 0.73576], abs=5e-6)
    assert found[2] == pytest.approx(2 / math.e, rel=1e-7)
    assert float(water_filling_kl(torch.tensor(SPECTRA[0]), 0.5)) == pytest.approx(2 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("kl", [1e-3, 0.1, 1.0, 7.0, 50.0])
def test_the_resting_weight_is_the_inverse_of_the_divergence(kl):
    spectrum = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5 + 0.01
    beta = resting_beta(spectrum, kl)
    assert float(water_filling_kl(spectrum, beta)) == pytest.approx(kl, rel=1e-10)


def test_the_divergence_of_many_weights_is_that_of_each():
    betas = torch.tensor([[0.1, 0.5], [2.0, 9.0]])
    spectrum = torch.tensor(SPECTRA[0])
    expected = [float(water_filling_kl(spectrum, float(beta))) for beta in betas.flatten()]
    assert water_filling_kl(spectrum, betas).flatten().tolist() == pytest.approx(expected)
    assert expected[-1] == 0.0


def test_the_divergence_is_the_least_a_linear_autoencoder_can_reach():
    """The optimum in closed form is stationary for the expected loss, and its KL is the rate of water-filling."""
    spectrum, beta = torch.tensor([[4.0, 1.0, 0.25]], dtype=torch.float64), 0.5
    gain = (
        (1 - beta / spectrum).clamp_min(0).sqrt()
    )  # decoder; the posterior variance is β/spectrum, at most 1
    D = torch.diag_embed(gain * spectrum.sqrt())
    W = torch.diag_embed(gain / spectrum.sqrt())
    log_variance = (beta / spectrum).clamp_max(1).log()
    parameters = [p.requires_grad_() for p in (W, D, log_variance)]
    reconstruction, kl = expected_terms(*parameters, spectrum)
    assert kl.item() == pytest.approx(float(water_filling_kl(spectrum[0], beta)), rel=1e-12)
    assert reconstruction.item() == pytest.approx(0.5 * float(spectrum.clamp_max(beta).sum()), rel=1e-12)
    gradients = torch.autograd.grad(reconstruction + beta * kl, parameters)
    assert max(float(g.abs().max()) for g in gradients) < 1e-12


def test_expected_terms_are_the_mean_of_the_sampled_ones():
    torch.manual_seed(0)
    spectrum = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)
    net = vae(3, 2, (), likelihood="gaussian").double()
    with torch.no_grad():
        net.encoder.mean.bias.zero_()
        net.decoder.bias.zero_()
        net.encoder.log_variance.copy_(torch.tensor([-1.0, 0.5]))
        expected = expected_terms(
            net.encoder.mean.weight[None],
            net.decoder.weight[None],
            net.encoder.log_variance[None],
            spectrum[None],
        )
        found = [net.terms(torch.randn(500, 3, dtype=torch.float64) * spectrum.sqrt()) for _ in range(40)]
    for k in (0, 1):
        values = torch.stack([terms[k] for terms in found])
        z = (values.mean() - expected[k].item()) / (values.std() / 40**0.5)
        assert abs(z) < 4


def test_controlled_linear_autoencoders_rest_where_theory_says():
    """Two, trained on their expected loss: one under the positional, one under the incremental law."""
    spectrum = torch.tensor([SPECTRA[0]] * 2, dtype=torch.float64)
    laws = ControlVAE(1.5, initial=1.0, ki=0.004), DynamicVAE(1.5, initial=1.0, ki=0.004)
    g = torch.Generator().manual_seed(0)
    W, D = (0.3 * torch.randn(2, 3, 3, dtype=torch.float64, generator=g) for _ in range(2))
    parameters = [p.requires_grad_() for p in (W, D, torch.zeros(2, 3, dtype=torch.float64))]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(500):
        reconstruction, kl = expected_terms(*parameters, spectrum)
        beta = [law.step(value) for law, value in zip(laws, kl, strict=True)]
        optimizer.zero_grad()
        (reconstruction + torch.tensor(beta) * kl).sum().backward()
        optimizer.step()
    assert kl.tolist() == pytest.approx([1.5, 1.5], rel=0.02)
    assert beta == pytest.approx([0.44626] * 2, rel=0.02)


def kl_of(beta):
    """A network that follows at once: water-filling of ten equal eigenvalues."""
    return max(0.0, 5 * math.log(30 / max(beta, 1e-9)))


def drop(control, before=600, after=500):
    beta = control.value
    for step in range(before + after):
        control.target = 25.0 if step < before else 5.0
        beta = control.step(kl_of(beta))
    return kl_of(beta), beta


def test_a_set_point_that_drops_is_recovered_unless_the_controller_latches():
    assert drop(ControlVAE(5.0, ki=0.05, low=0.1, initial=1.0), after=900)[0] == pytest.approx(5.0, abs=0.1)
    assert drop(DynamicVAE(5.0, ki=0.05, low=0.5, initial=1.0), after=900)[0] == pytest.approx(5.0, abs=0.1)
    kl, beta = drop(DynamicVAE(5.0, ki=0.05, low=0.5, initial=1.0, latching=True), after=900)
    assert beta == 0.5 and kl > 15


def after_unreachable(anti_windup):
    control = ControlVAE(1000.0, ki=0.02, anti_windup=anti_windup, initial=1.0)
    beta = 1.0
    for step in range(1500):
        if step == 500:
            control.target = 5.0
        beta = control.step(kl_of(beta))
    return kl_of(beta)


def test_an_unreachable_set_point_does_no_harm_unless_the_integral_winds_up():
    for anti_windup in ("both", "conditional", "clamp"):
        assert after_unreachable(anti_windup) == pytest.approx(5.0, abs=0.15)
    assert after_unreachable("none") > 50


def test_the_proportional_term_is_a_logistic_function_that_does_not_overflow():
    for kl, term in ((5.0, 0.005), (5.0 + math.log(3), 0.0075), (1e8, 0.01), (0.0, 0.01 / (1 + math.exp(5)))):
        assert ControlVAE(5.0, ki=0.0).step(kl) == pytest.approx(term)


def test_nonsense_is_refused_by_name():
    with pytest.raises(ArgumentError, match="kl"):
        resting_beta(torch.ones(2), 0.0)
    with pytest.raises(ArgumentError, match="eigenvalues"):
        water_filling_kl(torch.tensor([1.0, -1.0]), 1.0)
    with pytest.raises(ArgumentError, match="beta"):
        water_filling_kl(torch.tensor([1.0]), 0.0)
