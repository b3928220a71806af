"""Controllers by name, each in a run that is interrupted and resumed."""

import pytest
import torch
from torch import nn

from bolza.controllers import NAMES, make
from bolza.core.errors import ArgumentError
from bolza.data import Dataset
from bolza.training import train

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(96, 1, 6, 6, generator=DRAW)
Y = (X[:, 0, 0, 0] > 0).long() + (X[:, 0, 5, 5] > 0).long()
IMAGES = Dataset(X[:80], Y[:80], X[80:], Y[80:])
SCHEDULES = ("constant", "cosine", "linear", "onecycle", "power", "signal", "stationarity")
MEASURING = ("optimal", "stability", "hypergradient-window")


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3))


def conv():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(16, 3),
    )


@pytest.mark.filterwarnings("ignore")  # a controller may say that it is at the edge of stability
@pytest.mark.parametrize(
    ("name", "net"), [(name, mlp if name in SCHEDULES else conv) for name in NAMES] + [("csgd", mlp)]
)
def test_every_named_controller_runs_interrupted_and_resumed_as_at_one_go(name, net, tmp_path):
    def stop(step, steps, values):
        if step == 11:
            raise KeyboardInterrupt

    def run(model, **options):
        def control(optimizer, steps):
            return make(name, optimizer, steps, model=model, data=IMAGES, batch_size=8)

        return train(
            model,
            IMAGES,
            lr=0.1,
            momentum=0.9,
            batch_size=8,
            steps=20,
            eval_every=10,
            controller=control,
            **options,
        )

    torch.manual_seed(0)
    whole, halves, fresh = net(), net(), net()
    halves.load_state_dict(whole.state_dict())
    expected = run(whole)
    run(halves, checkpoint=tmp_path / "a", progress=stop)
    again = run(fresh, checkpoint=tmp_path / "a", resume=True)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[key]), key
    assert expected.controls == again.controls and expected.status == again.status == "finished"


@pytest.mark.parametrize(
    ("name", "last"), [("constant", 0.3), ("cosine", 0.0), ("linear", 0.0), ("onecycle", 0.3 / 250_000)]
)
def test_schedules_end_where_they_should_without_touching_momentum(name, last):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.3, momentum=0.9)
    controller = make(name, optimizer, 25)
    rates = []
    for _ in range(25):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        controller.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(last, abs=1e-9)
    assert max(rates) == pytest.approx(0.3, rel=0.02) and optimizer.param_groups[0]["momentum"] == 0.9


def test_an_unknown_controller_lists_the_known_ones():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(ArgumentError, match="'pid' is not known: choose one of constant"):
        make("pid", optimizer, 10)
    with pytest.raises(ArgumentError, match="steps=0"):
        make("cosine", optimizer, 0)


@pytest.mark.parametrize("name", MEASURING)
def test_a_controller_that_measures_says_what_it_needs(name):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match=f"'{name}' measures the network: give model= and data="):
        make(name, optimizer, 10)
    with pytest.raises(ArgumentError, match="give loss="):
        make(name, optimizer, 10, model=model, data=(X, Y), batch_size=8)


def test_batches_of_the_window_have_the_size_of_the_run_and_mix_sorted_data():
    x, y = torch.randn(33, 4), torch.arange(33) // 11
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loss = nn.functional.cross_entropy
    made = make("hypergradient-window", optimizer, 10, model=net, loss=loss, data=(x, y), batch_size=16)
    assert [len(part[0]) for part in made._batches.batches] == [16, 16]
    assert all(len(part[1].unique()) == 3 for part in made._batches.batches)
