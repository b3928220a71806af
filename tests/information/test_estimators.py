"""Estimators of mutual information against what is known exactly."""

import math

import pytest
import torch

from bolza.core.errors import ArgumentError, ShapeError
from bolza.information import binned_information, pairwise_information

BITS = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 12)


def test_all_inputs_of_twelve_bits_hold_twelve_bits():
    assert binned_information(BITS, width=0.5).input == pytest.approx(12.0, abs=1e-12)
    found = pairwise_information(BITS, noise_var=1e-3)
    assert found.input_lower == pytest.approx(12.0, abs=1e-9)
    assert found.input_upper == pytest.approx(12.0, abs=1e-9)


def test_a_label_that_is_a_function_of_the_input_is_held_whole():
    few = BITS[:1024]
    for found in (
        binned_information(few, few.sum(1).long() % 2, width=0.5),
        pairwise_information(few, few.sum(1).long() % 2, noise_var=1e-3),
    ):
        assert found.output_lower == pytest.approx(1.0, abs=1e-9)
        assert found.output_upper == pytest.approx(1.0, abs=1e-9)


def test_a_constant_layer_holds_nothing():
    flat = torch.full((64, 3), 0.3)
    y = torch.arange(64) % 2
    for found in (binned_information(flat, y, width=0.1), pairwise_information(flat, y, noise_var=0.1)):
        assert found.input_upper == pytest.approx(0.0, abs=1e-9)
        assert found.output_upper == pytest.approx(0.0, abs=1e-9)


def test_bins_count_cells_as_a_plain_dictionary_does():
    t = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    y = (t[:, 0] > 0.2).long()
    cells = [tuple(int(math.floor(float(v) / 0.7)) for v in row) for row in t]

    def entropy(chosen):
        counts = {cell: chosen.count(cell) for cell in set(chosen)}
        return -sum(n / len(chosen) * math.log2(n / len(chosen)) for n in counts.values())

    inner = sum(
        float((y == c).double().mean())
        * entropy([cell for cell, label in zip(cells, y, strict=True) if label == c])
        for c in (0, 1)
    )
    found = binned_information(t, y, width=0.7)
    assert found.input == pytest.approx(entropy(cells), abs=1e-9)
    assert found.output == pytest.approx(entropy(cells) - inner, abs=1e-9)


def test_edges_and_equal_widths_agree():
    t = torch.rand(300, 3) * 2 - 1
    edges = torch.arange(-1.0, 1.0, 0.25)
    y = (t.sum(1) > 0).long()
    assert binned_information(t, y, edges=edges).input == pytest.approx(
        binned_information(t, y, width=0.25).input, abs=1e-12
    )


def test_finer_bins_never_tell_less_about_the_input():
    t = torch.tanh(torch.randn(400, 3))
    values = [binned_information(t, width=w).input for w in (0.8, 0.4, 0.2, 0.1)]
    assert values == sorted(values) and values[-1] <= math.log2(400) + 1e-9


def mixture_information(t, noise_var):
    """I(X;T̃) of a one-dimensional mixture by quadrature, in bits."""
    grid = torch.linspace(-40, 40, 160_001, dtype=torch.float64)
    density = torch.zeros_like(grid)
    for mean in t.flatten().double().tolist():
        density += torch.exp(-((grid - mean) ** 2) / (2 * noise_var))
    density /= len(t) * math.sqrt(2 * math.pi * noise_var)
    entropy = -torch.trapezoid(torch.special.xlogy(density, density), grid)
    return float((entropy - 0.5 * math.log(2 * math.pi * math.e * noise_var)) / math.log(2))


@pytest.mark.parametrize("noise_var", [0.01, 0.3, 5.0])
def test_the_pairwise_bounds_enclose_the_exact_value(noise_var):
    t = 2 * torch.randn(30, 1, generator=torch.Generator().manual_seed(1))
    exact = mixture_information(t, noise_var)
    found = pairwise_information(t, noise_var=noise_var)
    assert found.input_lower - 1e-9 <= exact <= found.input_upper + 1e-9
    assert found.input_upper - found.input_lower < 1.0


def test_the_bounds_of_two_points_are_the_formula():
    # −ln(½ + ½ e^{−d²/8s}) and the same with 2s, at d² = 4, s = 1
    t = torch.tensor([[0.0], [2.0]])
    found = pairwise_information(t, noise_var=1.0)
    assert found.input_lower == pytest.approx(-math.log2((1 + math.exp(-0.5)) / 2), abs=1e-12)
    assert found.input_upper == pytest.approx(-math.log2((1 + math.exp(-2.0)) / 2), abs=1e-12)


def test_what_is_known_about_the_label_stays_within_its_entropy_and_the_input():
    t = torch.randn(200, 4)
    y = (torch.rand(200) > 0.9).long()
    found = pairwise_information(t, y, noise_var=0.5)
    p = float(y.double().mean())
    entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    assert 0 <= found.output_lower <= found.output_upper <= min(entropy, found.input_upper) + 1e-9


def test_many_inputs_are_taken_in_pieces(monkeypatch):
    t, y = torch.randn(300, 4), torch.arange(300) % 3
    whole = pairwise_information(t, y, noise_var=0.5)
    monkeypatch.setattr("bolza.information.estimators._ROWS", 1000)
    cut = pairwise_information(t, y, noise_var=0.5)
    assert cut.input_lower == pytest.approx(whole.input_lower, abs=1e-12)
    assert cut.output_upper == pytest.approx(whole.output_upper, abs=1e-12)


def test_states_of_images_and_of_integers_are_taken():
    assert binned_information(torch.arange(8).reshape(8, 1, 1), width=1.0).input == pytest.approx(3.0)
    assert math.isnan(binned_information(BITS, width=1.0).output)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: binned_information(BITS), ArgumentError, "width= or edges="),
        (lambda: binned_information(BITS, width=0.0), ArgumentError, "width=0.0"),
        (lambda: binned_information(BITS, edges=torch.tensor([1.0, 0.0])), ArgumentError, "increasing"),
        (lambda: binned_information(BITS, torch.zeros(3, dtype=torch.long), width=1.0), ShapeError, "labels"),
        (lambda: pairwise_information(BITS, noise_var=0.0), ArgumentError, "noise_var"),
        (lambda: pairwise_information(BITS * math.inf, noise_var=1.0), ArgumentError, "not finite"),
        (lambda: pairwise_information(torch.tensor(1.0), noise_var=1.0), ShapeError, "states"),
    ],
)
def test_what_cannot_be_used_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_narrow_bins_of_half_precision_do_not_overflow():
    ramp = torch.arange(1, 65.0)[:, None]
    assert binned_information(ramp.half(), width=1e-5).input == 6.0
    with pytest.raises(ArgumentError, match="width=1e-30 is too small"):
        binned_information(ramp, width=1e-30)


def test_noise_beyond_the_range_of_the_states_is_refused():
    with pytest.raises(ArgumentError, match="is too small"):
        pairwise_information(torch.randn(8, 2).double() * 1e300, noise_var=0.1)
    with pytest.raises(ArgumentError, match="is too small"):
        pairwise_information(torch.randn(8, 2), noise_var=1e-320)


def test_the_imaginary_part_of_a_state_counts():
    phases = torch.polar(torch.ones(8), torch.tensor([0.5, -0.5]).repeat(4))[:, None]  # one real part
    assert binned_information(phases, width=0.1).input == 1.0
    assert pairwise_information(phases, noise_var=1e-6).input == pytest.approx(1.0)


def test_edges_that_are_no_numbers_are_refused():
    for edges in ([math.nan], [0.0, math.nan], [0.0, math.inf]):
        with pytest.raises(ArgumentError, match="increasing numbers"):
            binned_information(torch.randn(4, 2), edges=torch.tensor(edges))


def test_equal_states_hold_no_information_and_nothing_below_it():
    found = pairwise_information(torch.ones(64, 5), torch.arange(64) % 3, noise_var=0.1)
    assert (found.input_lower, found.input_upper, found.output_lower, found.output_upper) == (0, 0, 0, 0)
