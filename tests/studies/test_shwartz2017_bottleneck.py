"""The information plane and its criticism."""

import pytest
import torch

from bolza.report import to_png
from bolza.studies import get, shwartz2017_bottleneck
from bolza.studies.shwartz2017_bottleneck import BUDGETS, Budget, bottleneck_rows, network, task

SHORT = Budget((0, 12, 20, 28, 36), 1)


def test_the_task_is_balanced_and_symmetric():
    x, y = task()
    assert x.shape == (4096, 12) and x.unique().tolist() == [-1, 1]
    assert abs(float(y.double().mean()) - 0.5) < 0.01
    # choosing the other vertices turns the sum around: the label cannot change
    other = {tuple(row): int(label) for row, label in zip(x.tolist(), y, strict=True)}
    assert all(
        other[tuple(-v for v in row)] == int(label) for row, label in zip(x[:99].tolist(), y, strict=False)
    )


def test_the_bottleneck_rows_hold():
    assert all(row.holds for row in bottleneck_rows())


def test_networks_repeat():
    assert torch.equal(network("tanh", 3)[0].weight, network("tanh", 3)[0].weight)


@pytest.mark.slow
def test_tanh_compresses_and_relu_does_not(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", SHORT)
    monkeypatch.setattr(shwartz2017_bottleneck, "READINGS", 5)
    result = get("shwartz2017_bottleneck").run("small")
    rows = {row.claim: row for row in result.rows}
    tanh = next(row for claim, row in rows.items() if claim.startswith("tanh: once fitted"))
    relu = next(row for claim, row in rows.items() if claim.startswith("ReLU: once fitted"))
    assert tanh.measured < -0.5 and tanh.holds
    assert relu.measured > 0.5 and relu.holds is False
    for claim in ("bins: I(X;T) of T = X, bits", "pairs: I(X;T) of T = X, bits"):
        assert rows[claim].holds and rows[claim].measured == pytest.approx(12.0, abs=1e-6)
    assert rows["no layer holds more than the 12 bits of the input"].holds
    for figure in result.figures:
        assert to_png(figure, dpi=40).startswith(b"\x89PNG")
    assert shwartz2017_bottleneck.KEY == result.key
