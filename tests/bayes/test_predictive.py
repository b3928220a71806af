"""What is kept of a chain, what the kept weights say together, and how true that is."""

import math

import pytest
import torch
from torch import nn

from bolza.bayes import SGLD, Trace, calibration, predict
from bolza.bayes.predictive import _outputs
from bolza.core.errors import ArgumentError, CheckpointError, DataError, DivergenceError, ShapeError


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


NETS = {
    "conv and batch norm": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2)
        ),
        (6, 1, 5, 5),
    ),
    "attention": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(12, 2)
        ),
        (6, 3, 4),
    ),
    "recurrent": (Recurrent, (6, 5, 3)),
}


@pytest.mark.parametrize("name", NETS)
def test_predictions_are_the_mean_over_networks_run_one_by_one(name):
    torch.manual_seed(0)
    make, shape = NETS[name]
    net, x = make(), torch.randn(shape)
    trace, kept = Trace(net), []
    sampler = SGLD(net.parameters(), 1e-2, num_data=10, seed=0)
    for _ in range(3):
        sampler.zero_grad()
        nn.functional.cross_entropy(net(x), torch.zeros(6).long()).backward()
        sampler.step()
        trace.record()
        with torch.no_grad():
            kept.append(net.eval()(x).softmax(-1))
        net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = predict(net, trace, x, keep=True)
    exact = torch.stack(kept)
    assert torch.allclose(found.mean, exact.mean(0), atol=1e-5)
    assert torch.allclose(found.spread, exact.std(0), atol=1e-5)
    assert torch.allclose(found.total - found.aleatoric, found.mutual_information, atol=1e-5)
    assert found.outputs.shape == (3, 6, 2) and net.training and next(net.modules()).training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    piecewise = predict(net, trace, x, batch_size=4, keep=True)
    assert torch.allclose(piecewise.outputs, found.outputs, atol=1e-5)
    with torch.no_grad():
        single = _outputs(net.eval(), trace.samples, x, vectorise=False)
    assert torch.allclose(single, found.outputs, atol=1e-5)


def test_a_regression_s_spread_is_that_of_its_posterior():
    weights = torch.randn(4000, 1, 2, generator=torch.Generator().manual_seed(0))
    x = torch.tensor([[3.0, 4.0]])
    found = predict(nn.Linear(2, 1, bias=False), {"weight": weights}, x, kind="regression")
    assert float(found.spread) == pytest.approx(5.0, rel=4 * math.sqrt(0.5 / 4000))
    assert found.total is None and found.mean.shape == (1, 1)
    one = predict(nn.Linear(2, 1, bias=False), {"weight": weights[:1]}, {"input": x}, kind="regression")
    assert float(one.spread) == 0.0


def test_a_trace_goes_through_a_file_and_goes_on_evenly(tmp_path):
    net = nn.Linear(1, 1)

    def go(trace, start, stop):
        for k in range(start, stop):
            nn.init.constant_(net.weight, k)
            trace.record()

    whole, first = Trace(net, capacity=5, thin=2), Trace(net, capacity=5, thin=2)
    go(whole, 0, 40)
    go(first, 0, 17)
    first.save(tmp_path / "t.safetensors")
    again = Trace(net, capacity=9).load(tmp_path / "t.safetensors")
    go(again, 17, 40)
    assert torch.equal(whole.matrix(), again.matrix()) and len(again) <= 5
    gaps = whole.samples["weight"].flatten().diff()
    assert bool((gaps == whole.thin).all()) and whole.matrix().shape == (len(whole), 2)
    with pytest.raises(CheckpointError, match="other names or shapes"):
        Trace(nn.Linear(2, 1)).load(tmp_path / "t.safetensors")
    assert Trace(net, dtype=torch.bfloat16, names=["weight"]).matrix().dtype == torch.bfloat16
    found = predict(net, [whole, again], torch.ones(2, 1), kind="regression")
    assert found.mean.shape == (2, 1)


def test_wrong_traces_and_predictions_are_named():
    net = nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match="capacity=1"):
        Trace(net, capacity=1)
    with pytest.raises(ArgumentError, match="'nothing'"):
        Trace(net, names=["nothing"])
    with pytest.raises(ShapeError, match="at least one"):
        predict(net, Trace(net), torch.ones(1, 2))
    with pytest.raises(ArgumentError, match="at least one trace"):
        predict(net, [], torch.ones(1, 2))
    with pytest.raises(ArgumentError, match="'other'"):
        predict(net, {"other": torch.ones(1, 2)}, torch.ones(1, 2))
    weights = {"weight": torch.ones(2, 2, 2)}
    with pytest.raises(ArgumentError, match="kind"):
        predict(net, weights, torch.ones(1, 2), kind="ranking")
    with pytest.raises(ArgumentError, match="batch_size"):
        predict(net, weights, torch.ones(1, 2), batch_size=0)
    with pytest.raises(ShapeError, match="logits"):
        predict(net, weights, torch.ones(2))
    with pytest.raises(DataError, match="not finite"):
        predict(net, weights, torch.full((1, 2), math.inf))
    nn.init.constant_(net.weight, math.nan)
    with pytest.raises(DivergenceError, match="weight is not finite at step 1"):
        Trace(net).record()


def test_labels_drawn_from_the_probabilities_are_calibrated_and_sharpened_ones_are_not():
    draw = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(1500, 4, generator=draw)
    p = logits.softmax(1)
    y = torch.multinomial(p, 1, generator=draw)[:, 0]
    true = calibration(p, y)
    assert true.calibrated and abs(true.ece.value - true.reference.value) < 3 * true.reference.error
    sharp = calibration((3 * logits).softmax(1), y)
    assert not sharp.calibrated and sharp.ece.value > 0.1 and sharp.log_score.value > true.log_score.value
    chosen = p[torch.arange(1500), y]
    assert true.log_score.value == pytest.approx(float(-chosen.double().log().mean()))
    target = nn.functional.one_hot(y, 4)
    assert true.brier.value == pytest.approx(float((p.double() - target).square().sum(1).mean()))
    assert int(true.count.sum()) == 1500
    mass = calibration(p, y, binning="mass", bins=10)
    assert bool((mass.count == 150).all())
    weight = mass.count / 1500
    assert float((weight * (mass.frequency - mass.confidence).abs()).sum()) == pytest.approx(mass.ece.value)


def test_logits_and_wrong_labels_are_not_taken_for_probabilities():
    p, y = torch.full((3, 2), 0.5), torch.tensor([0, 1, 1])
    with pytest.raises(DataError, match="softmax"):
        calibration(torch.randn(3, 2), y)
    with pytest.raises(DataError, match="labels"):
        calibration(p, y + 1)
    with pytest.raises(ShapeError, match="probabilities"):
        calibration(p, y[:2])
    with pytest.raises(ArgumentError, match="binning"):
        calibration(p, y, binning="log")


def test_damaged_traces_are_refused_and_change_nothing():
    net = nn.Linear(1, 1)
    trace = Trace(net, capacity=4)
    for _ in range(3):
        trace.record()
    state = trace.state_dict()
    uneven = {"samples": {**state["samples"], "bias": torch.zeros(2, 1)}}
    for change in ({"thin": 0}, {"capacity": 2}, {"samples": 3}, {"seen": "many"}, uneven):
        with pytest.raises(CheckpointError):
            trace.load_state_dict({**state, **change})
        assert (len(trace), trace.thin, trace.capacity) == (3, 1, 4)
    with pytest.raises(CheckpointError, match="seen"):
        trace.load_state_dict({name: value for name, value in state.items() if name != "seen"})


def test_one_logit_and_outputs_that_are_no_tensor_are_named():
    class Named(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x)}

    weights = {"weight": torch.ones(3, 1, 2)}
    with pytest.raises(ShapeError, match="one logit"):
        predict(nn.Linear(2, 1), weights, torch.ones(4, 2))
    with pytest.raises(ShapeError, match="a dict"):
        predict(Named(2, 1), weights, torch.ones(4, 2))


def test_probabilities_of_half_precision_and_labels_of_any_integer_type_are_scored():
    draw = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(300, 10, generator=draw)).softmax(1)
    y = torch.multinomial(p, 1, generator=draw)[:, 0]
    whole = calibration(p, y)
    assert calibration(p, y.to(torch.uint8)).ece == whole.ece
    assert calibration(p.bfloat16(), y).brier.value == pytest.approx(whole.brier.value, rel=0.02)
