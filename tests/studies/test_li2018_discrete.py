"""Binary and ternary weights beside real ones."""

import torch
from torch import nn

from bolza.data import digits
from bolza.report import to_png
from bolza.studies import get
from bolza.studies.li2018_discrete import BUDGETS, Budget, accuracy, network, signs_of, squared_hinge

TINY = Budget(epochs=3, seeds=2, width=48)


def test_the_hinge_is_zero_where_every_margin_is_one():
    outputs = torch.tensor([[1.0, -1.0, -1.5], [-2.0, 1.0, -1.0]], requires_grad=True)
    loss = squared_hinge(outputs, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == 0 and outputs.grad.norm() == 0


def test_networks_of_one_seed_are_alike_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    one, two = network(8, 3), network(8, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_signs_have_the_statistics_of_their_own_activations():
    net = signs_of(network(8, 0), digits())
    assert all(set(m.weight.unique().tolist()) == {-1.0, 1.0} for m in net if isinstance(m, nn.Linear))
    with torch.no_grad():
        inputs = net[0](digits().train_x)
    torch.testing.assert_close(net[1].running_mean, inputs.mean(0), rtol=1e-4, atol=1e-4)
    assert 0 <= accuracy(net, digits()) <= 1 and net.training


def test_a_tiny_run_gives_rows_and_a_figure(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told = []
    result = get("li2018_discrete").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    rows = {row.claim: row for row in result.rows}
    for words in ("not in their alphabet", "accuracy with binary", "accuracy with ternary", "plain method"):
        (row,) = (row for claim, row in rows.items() if words in claim)
        assert row.holds, row
    assert to_png(result.figures[0], dpi=40).startswith(b"\x89PNG")
