"""Certified constants: the closed forms, the order of the bounds, and radii that an attack does not reach."""

import torch

from bolza.report import to_png
from bolza.studies import pauli2024_lipschitz
from bolza.studies.pauli2024_lipschitz import BUDGETS, Budget


def test_the_study_runs_and_all_but_the_published_numbers_hold_for_a_network_trained_briefly(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", Budget(epochs=6, seeds={(32,): 1}, attacked=60, radii=5))
    state = torch.get_rng_state()
    result = pauli2024_lipschitz.run("small")
    assert torch.equal(state, torch.get_rng_state())
    needs = ("seed 0", "over product")  # these need the whole training
    judged = {row.claim: row for row in result.rows if not any(text in row.claim for text in needs)}
    assert len(judged) == 9
    assert [claim for claim, row in judged.items() if row.holds is False] == []
    assert result.facts["curves"]["attack"][0] > 0.8
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")


def test_an_attack_of_size_zero_leaves_the_accuracy():
    net, x, y = pauli2024_lipschitz.trained((8,), 0, epochs=2)
    kept = pauli2024_lipschitz.attack(net, x, y, torch.zeros(len(x)))
    assert torch.equal(kept, net(x).argmax(1) == y)
