"""Local entropy under label noise, at a tiny budget."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from bolza.report import to_png
from bolza.studies import get
from bolza.studies.chaudhari2017_entropy import (
    BUDGETS,
    Budget,
    Course,
    _accuracy_at,
    accuracy_rows,
    batches,
    methods,
    problem,
    stacked_network,
    train,
)

TINY = Budget(seeds=2, gradients=60, gammas=(1.0,))


def test_a_share_of_the_labels_of_the_noisy_runs_is_wrong():
    data = problem(Budget(seeds=4, noise=0.3))
    clean = data.labels[4:]
    assert torch.equal(clean, clean[:1].expand_as(clean))
    share = (data.labels[:4] != clean).double().mean(1)  # a tenth of the random labels is right by chance
    assert bool(((share - 0.27).abs() < 4 * (0.27 * 0.73 / 1438) ** 0.5).all())


def test_stacked_networks_train_as_each_alone():
    data = problem(TINY)
    course = train(partial(torch.optim.SGD, lr=0.1), data, Budget(seeds=2, gradients=20))
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    source = batches(data, 2, 2)
    for _ in range(20):
        x, y = (part[1] for part in next(source))
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        loss = F.cross_entropy(net(data.x), data.labels[1])
    torch.testing.assert_close(course.loss[-1][0, 1].float(), loss, rtol=1e-4, atol=1e-5)


def test_accuracy_at_a_training_loss_is_interpolated():
    course = Course(
        loss=[torch.tensor([[2.0, 2.0]]), torch.tensor([[1.0, 1.5]])],
        accuracy=[torch.tensor([[0.4, 0.5]]), torch.tensor([[0.8, 0.7]])],
    )
    found = _accuracy_at(course, torch.tensor([1.25, 0.1]))
    torch.testing.assert_close(found, torch.tensor([0.7, 0.7]))


def test_both_kinds_of_labels_start_alike():
    for p in stacked_network(2, 2):
        assert torch.equal(p[:2], p[2:])


def test_a_claim_within_two_standard_errors_of_its_limit_is_left_open():
    data = problem(TINY)
    made = methods(TINY)
    found = {name: train(make, data, Budget(seeds=2, gradients=20)) for name, make in made.items()}
    for course in found.values():
        course.accuracy[-1] = torch.tensor([[0.9, 0.8], [0.9, 0.8]])
    for row in accuracy_rows(found):
        assert abs(float(row.measured)) < 1e-6 or "equal training loss" in row.claim
        assert row.holds is (False if "at least" in str(row.expected) else row.holds)
    found["SGD"].accuracy[-1] = torch.tensor([[0.7, 0.9], [0.9, 0.8]])
    (row,) = (row for row in accuracy_rows(found) if "descent without" in row.claim)
    assert row.holds is None


def test_a_tiny_run_gives_rows_figures_and_facts(monkeypatch):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    told = []
    result = get("chaudhari2017_entropy").run("small", lambda share, text: told.append(share))
    assert told == sorted(told) and told[-1] == 1.0
    assert len(result.rows) == 8
    for row in result.rows[-2:]:  # identities
        assert row.holds, row
    assert set(result.facts) == set(methods(TINY))
    for figure in result.figures:
        assert to_png(figure, dpi=40).startswith(b"\x89PNG")
