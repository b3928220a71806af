"""Tail indices, and the controls that keep them from misleading."""

import math

import pytest
import torch
from scipy import integrate, special

from bolza.core.errors import ArgumentError, DataError
from bolza.ops.stable_law import log_moments, stable_noise
from bolza.sde import gaussian_mixture_test, gaussian_surrogate, hill, tail_index, tail_report
from bolza.sde.tails import _student_log_mean

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=generator(seed))


def student(shape, degrees=3, seed=0):
    g = generator(seed)
    z = torch.randn((degrees + 1, *shape), dtype=F64, generator=g)
    return z[0] / z[1:].square().mean(0).sqrt()


def laplace(shape, seed=0):
    u = torch.rand(shape, dtype=F64, generator=generator(seed)) - 0.5
    return -u.sign() * (-2 * u.abs()).log1p()


@pytest.mark.parametrize("alpha", [2.0, 1.5, 1.0])
def test_a_million_draws_give_the_index_within_three_hundredths(alpha):
    x = stable_noise((1_000_000,), alpha, generator=generator(), dtype=F64)
    found = tail_index(x, block=1000, centre="none")
    assert abs(float(found.index) - alpha) < 0.03
    # 1/α̂ has the variance of log|Y| less that of the mean of M logarithms, plus what they share
    spread = math.sqrt(log_moments(alpha)[1]) / math.log(1000) / math.sqrt(1000) * alpha**2
    assert float(found.error) == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.8, 2.0])
def test_ten_thousand_draws_in_blocks_of_a_hundred_give_the_index(alpha):
    x = stable_noise((80, 10_000), alpha, generator=generator(1), dtype=F64)
    found = tail_index(x, block=100, centre="none")
    inverse = 1 / found.index
    assert abs(float(inverse.mean()) - 1 / alpha) < 4 * float(inverse.std()) / math.sqrt(80)
    # the stated errors are those of the scatter over the repeats
    assert float((found.error / found.index**2).square().mean().sqrt()) == pytest.approx(
        float(inverse.std()), rel=0.3
    )
    assert float(found.index.std()) < 0.2


def growth_of(log_mean_one, variance, block):
    """1/α of a law of finite variance, its sums of ``block`` draws taken as normal."""
    return (0.5 * (math.log(2 * variance * block) + special.digamma(0.5)) - log_mean_one) / math.log(block)


@pytest.mark.parametrize(
    ("law", "log_mean", "variance", "value"),
    [
        (laplace, -0.5772156649, 2, 1.84),
        (student, 0.5 * (math.log(3) + special.digamma(0.5) - special.digamma(1.5)), 3, 1.81),
    ],
)
def test_laws_of_finite_variance_read_below_two_and_pass_the_test(law, log_mean, variance, value):
    exact = growth_of(log_mean, variance, 1000)
    assert 1 / exact == pytest.approx(value, abs=0.01)
    found = tail_index(law((10, 100_000)), block=1000, centre="none", average=True)
    assert abs(float(found.index) - 1 / exact) < 0.005 + 3 * float(found.error)
    assert gaussian_mixture_test(law((20, 10_000), seed=3)).p_value > 0.01


def test_an_offset_of_a_tenth_reads_as_heavy_unless_it_is_taken_off():
    x = normal((100, 10_000)) + 0.1
    found = {c: tail_index(x, block=100, centre=c, average=True) for c in ("none", "mean", "median", "pairs")}
    # E log|Y| with Y = N(10, 100): 1/α = (E log|10 + 10 ξ| − E log|.1 + ξ|) / log 100
    mean_log = [
        integrate.quad(lambda z, m=m: math.exp(-((z - m) ** 2) / 2) * math.log(abs(z)), -9, 10, points=[0])[0]
        for m in (1.0, 0.1)
    ]
    exact = math.log(100) / (math.log(10) + (mean_log[0] - mean_log[1]) / math.sqrt(2 * math.pi))
    assert abs(float(found["none"].index) - exact) < 3 * float(found["none"].error) and exact < 1.8
    for c in ("mean", "median", "pairs"):
        assert abs(float(found[c].index) - 2) < 3.5 * float(found[c].error)


def test_unequal_variances_thrown_together_look_heavy_and_are_not_called_so():
    x = torch.logspace(-2, 2, 50, dtype=F64) * normal((2000, 50))
    report = tail_report(x, 0)
    assert report.pooled < 1.4 and abs(report.pooled - report.pooled_surrogate) < 0.15
    assert report.verdict == "Gaussian" and not report.heavy and "surrogate" in str(report)
    # each coordinate by itself is at 2, whatever its scale
    assert torch.allclose(report.coordinates.index, tail_index(normal((2000, 50)), 0, block=42).index)


@pytest.mark.parametrize(
    ("law", "verdict"),
    [
        (normal, "Gaussian"),
        (student, "finite variance"),
        (laplace, "finite variance"),
        (lambda shape: stable_noise(shape, 1.5, generator=generator(), dtype=F64), "heavy-tailed"),
        (lambda shape: normal(shape).cumsum(0), "dependent"),
    ],
)
def test_the_verdict_is_that_of_the_law(law, verdict):
    report = tail_report(law((2500, 20)), 0)
    assert report.verdict == verdict and str(report).startswith(verdict)


def test_stable_sums_keep_their_index_and_others_lose_it():
    for law, low, high in ((1.5, 1.4, 1.6), (None, 1.9, 2.1)):
        x = laplace((20, 40_000)) if law is None else stable_noise((20, 40_000), law, generator=generator())
        coarse = tail_index(x, block=200, fine=20, average=True)
        assert low < float(coarse.index) < high


def test_the_test_against_finite_variance_has_its_size_on_the_heaviest_law_it_allows():
    p = torch.tensor([gaussian_mixture_test(row).p_value for row in student((200, 2500), seed=5)])
    # nominal 5 %, stated 6 to 8 % for one coordinate; four deviations above that
    assert float((p < 0.05).double().mean()) < 0.08 + 4 * math.sqrt(0.08 * 0.92 / 200)
    assert 0.3 < float(p.median()) < 0.7
    p = torch.tensor([gaussian_mixture_test(row).p_value for row in normal((200, 2500), seed=6)])
    assert float((p < 0.05).double().mean()) < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 200)


def test_false_alarms_of_the_verdict_stay_at_their_level():
    x = student((80, 5, 400), seed=8)
    assert sum(tail_report(one, -1, level=0.05).heavy for one in x) < 80 * 0.05 + 4 * math.sqrt(80 * 0.05)


def test_the_mean_logarithm_of_sums_of_student_draws_is_exact():
    assert _student_log_mean(1, 1.0 + 2) == pytest.approx(
        0.5 * (math.log(3) + special.digamma(0.5) - special.digamma(1.5)), abs=1e-6
    )
    # with very many degrees it is the normal law: (log(2m) + ψ(1/2)) / 2
    exact = 0.5 * (math.log(2 * 7) + special.digamma(0.5))
    assert _student_log_mean(7, 200.0) - 0.5 * math.log(200 / 198) == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize("degrees", [2, 3])
def test_hill_measures_the_exponent_of_the_tail(degrees):
    found = hill(student((400_000,), degrees), k=400, centre="none")
    # the second order term of Student's law biases by about (k/n)^{2/ν}
    bias = (400 / 400_000) ** (2 / degrees) * degrees
    assert abs(float(found.index) - degrees) < 3 * float(found.error) + bias
    assert found.used == 400


def test_hill_is_scale_free_and_vectorised():
    x = student((4, 3000))
    found = hill(1e3 * x, k=50)
    assert torch.allclose(found.index, hill(x, k=50).index)
    assert torch.allclose(found.index[2], hill(x.T, 0, k=50).index[2])


def test_indices_do_not_depend_on_the_scale_of_a_coordinate_nor_on_where_the_draws_stand():
    x = student((1000, 6))
    scales = torch.logspace(-6, 6, 6, dtype=F64)
    found = tail_index(x, 0)
    assert torch.allclose(tail_index(x * scales, 0).index, found.index)
    assert torch.allclose(tail_index(x.T.contiguous()).index, found.index)
    assert tail_index(x.reshape(1000, 2, 3), 0).index.shape == (2, 3)
    low = tail_index(x.float(), 0)
    assert low.index.dtype == F64 and torch.allclose(low.index, found.index, atol=1e-4)


def test_coordinates_that_copy_one_another_do_not_shrink_the_error():
    x = normal((1, 2500))
    one, many = tail_index(x, average=True), tail_index(x.expand(50, -1), average=True)
    assert float(many.error) == pytest.approx(float(one.error))
    assert gaussian_mixture_test(x.expand(50, -1)).p_value == pytest.approx(gaussian_mixture_test(x).p_value)


def test_coordinates_without_noise_or_with_an_atom_are_left_out():
    x = normal((900, 4))
    x[:, 1] = 3.0
    x[:, 2] *= torch.rand(900, generator=generator()) < 0.3  # a unit that is dead for most draws
    found = tail_index(x, 0)
    assert found.index.isnan().tolist() == [False, True, True, False]
    assert float(tail_index(x, 0, average=True).index) == pytest.approx(
        float(tail_index(x[:, [0, 3]], 0, average=True).index)
    )
    assert gaussian_mixture_test(x, 0).coordinates == 2
    with pytest.raises(DataError, match="no coordinate"):
        gaussian_mixture_test(torch.ones(900, 2), 0)


def test_a_block_of_any_size_finds_finer_sums_that_divide_it():
    x = normal((2000,))
    found = [gaussian_mixture_test(x, block=block) for block in (50, 64, 53)]
    assert [(one.fine, one.block) for one in found] == [(5, 50), (8, 64), (1, 53)]
    assert tail_report(x, block=50).coordinates.block == 50


def test_a_surrogate_has_the_covariance_of_the_draws():
    mix = normal((5, 5), 1)
    x = normal((20_000, 5)) @ mix
    y = gaussian_surrogate(x, 0, generator=generator(1))
    assert torch.allclose(y.T @ y / 20_000, mix.T @ mix, atol=0.05 * float((mix.T @ mix).diagonal().max()))
    wide = gaussian_surrogate(normal((30, 100)).float(), 0, generator=generator(1))
    assert wide.shape == (30, 100) and wide.dtype == torch.float32


def test_a_surrogate_keeps_coordinates_of_whatever_size_apart():
    scales = torch.tensor([1e-40, 1.0, 1e250], dtype=F64)
    x = normal((2000, 3)) * scales
    y = gaussian_surrogate(x, 0, generator=generator(1)) / scales
    assert torch.allclose(y.square().mean(0), torch.ones(3, dtype=F64), atol=0.2)
    assert float((y.T @ y / 2000 - torch.eye(3)).abs().max()) < 0.2
    assert tail_report(x, 0).verdict == "Gaussian"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: tail_index(x, dim=2), ArgumentError, "dim is 2"),
        (lambda x: tail_index(x[0]), ArgumentError, "shape \\(\\)"),
        (lambda x: tail_index(x, block=3000), ArgumentError, "block is 3000"),
        (lambda x: tail_index(x, block=50, fine=7), ArgumentError, "fine is 7"),
        (lambda x: tail_index(x, centre="mode"), ArgumentError, "centre is"),
        (lambda x: tail_index(x.long()), ArgumentError, "dtype"),
        (lambda x: tail_index(x / 0), DataError, "not finite"),
        (lambda x: hill(x, k=1), ArgumentError, "k is 1"),
        (lambda x: gaussian_mixture_test(x, freedom=2), ArgumentError, "freedom is 2"),
        (lambda x: tail_report(x, level=0.7), ArgumentError, "level is"),
    ],
)
def test_what_makes_no_sense_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call(normal((1000,)))
