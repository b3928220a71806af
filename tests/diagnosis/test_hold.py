"""Whether a result holds: bounds from both sides, confidence, and what is said where there is nothing to ask."""

import copy
import json
from importlib.resources import files

import pytest
import torch
from torch import nn

import bolza
from bolza.core.errors import ShapeError, UnsupportedError
from bolza.data import Dataset
from bolza.diagnosis import hold, margin
from bolza.diagnosis.confidence import confidence_findings, measure_confidence
from bolza.diagnosis.problem import prepare
from bolza.report import to_svg
from schema_check import problems

SCHEMA = json.loads(files("bolza.diagnosis").joinpath("schema.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def gradient_ascent_alone(monkeypatch):
    """The independent suite has its own tests; here it would take most of the time."""
    monkeypatch.setattr(margin, "_BUDGET", 0.0)


def line(width=2, scale=4.0):
    """A linear classifier that is right on which of two coordinates is larger, and data for it."""
    generator = torch.Generator().manual_seed(0)
    x = 0.3 + 0.4 * torch.rand(120, width, generator=generator)
    x[0], x[1] = 0.0, 1.0  # the range of the data, out of reach of the attack on the others
    x[0, 1], x[1, 1] = 1.0, 0.0
    y = (x[:, 0] > x[:, 1]).long()
    net = nn.Linear(width, 2)
    with torch.no_grad():
        net.weight.zero_()[:, :2] = scale * torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
        net.bias.zero_()
    return net, Dataset(x, y, x, y)


def found(net, data, **options):
    return hold.measure_hold(prepare(net, data, samples=120), **options)


def test_for_a_linear_classifier_attack_and_certificate_meet_at_the_exact_answer(monkeypatch):
    monkeypatch.setattr(margin, "_BUDGET", 1.0)
    monkeypatch.setattr(margin, "_SUITES", ((("apgd-ce", "square"), 5, 20, 1),))
    net, data = line()
    m = found(net, data).margin
    assert m.attacks == ["pgd", "apgd-ce", "square"]
    gap = (data.test_x[:, 0] - data.test_x[:, 1]).abs()
    exact = [float((gap > 2 * r).double().mean()) for r in m.radii]
    assert list(m.attacked) == pytest.approx(exact) and exact[-1] < 0.2
    certified = torch.tensor(m.certified)
    assert [float((certified > r).double().mean()) for r in m.radii] == pytest.approx(exact)
    assert m.robust == m.attacked[m.radii.index(m.eps)] and m.certified_share == pytest.approx(m.robust)
    assert m.median_certified == pytest.approx(float(gap.median()) / 2, rel=1e-4)
    assert 2 * m.half == pytest.approx(float(gap.median()), rel=0.3)


def test_the_harder_of_the_attacks_counts_and_the_curve_does_not_increase(monkeypatch):
    net, data = line()
    asked = []

    def weak(model, x, y, eps, *, attack, **options):
        asked.append(attack)
        broken = torch.zeros(len(x), dtype=torch.bool)
        broken[: 10 if attack != "pgd" else 1] = True
        return type("Found", (), {"broken": broken, "notes": ()})()

    monkeypatch.setattr(margin, "robust_accuracy", weak)
    monkeypatch.setattr(margin, "_BUDGET", 6.0)
    m = found(net, data).margin
    assert asked[2] == ("apgd-ce", "apgd-t", "square") and {asked[0], *asked[3:]} == {"pgd"}
    drops = [round(120 * (a - b)) for a, b in zip(m.attacked, m.attacked[1:], strict=False)]
    assert drops == [1, 1, 10, 1, 1, 1]
    monkeypatch.setattr(margin, "find_spec", lambda name: None)
    m = found(net, data).margin
    assert m.attacks == ["pgd"] and "bolza[attacks]" in m.doubts[0]


def test_at_chance_there_is_nothing_to_hold_and_no_attack_is_run():
    net, data = line(scale=0.0)
    facts = found(net, data)
    (only,) = hold.findings(facts)
    assert facts.margin is None and facts.confidence is None
    assert only.verdict == "bad" and "chance" in only.text and "--train" in only.remedy


def test_a_layer_without_a_bound_is_named_and_the_attack_runs_all_the_same():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = line()[0]

        def forward(self, x):
            return self.net(x.sort(1).values * 0 + x)

    facts = found(Odd(), line()[1])
    certificate = next(f for f in hold.findings(facts) if f.key == "hold.certified_radius")
    assert certificate.value is None and "sort" in certificate.text
    assert 0 < facts.margin.robust <= 1 and facts.margin.certified == []


def test_tokens_cannot_be_moved_a_little_but_confidence_is_asked():
    tokens = torch.randint(0, 8, (60, 5), generator=torch.Generator().manual_seed(0))
    y = (tokens[:, 0] > 3).long()

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(8, 2)
            with torch.no_grad():
                self.table.weight.copy_(torch.tensor([[2.0, 0.0]] * 4 + [[0.0, 2.0]] * 4))

        def forward(self, tokens):
            return self.table(tokens[:, 0])

    facts = found(Reader(), Dataset(tokens, y, tokens, y))
    told = {f.key: f for f in hold.findings(facts)}
    assert facts.margin is None and facts.accuracy == 1.0
    assert "tokens" in told["hold.robust_accuracy"].text and told["hold.calibration"].value > 0


def test_values_and_single_logits_are_refused_with_what_to_do():
    x = torch.randn(20, 3)
    with pytest.raises(UnsupportedError, match="lipschitz"):
        found(nn.Linear(3, 1), (x, x[:, :1]))
    loss = nn.functional.binary_cross_entropy_with_logits
    problem = prepare(nn.Linear(3, 1), (x, torch.arange(20) % 2), lambda z, y: loss(z[:, 0], y.float()))
    with pytest.raises(ShapeError, match="one logit a class"):
        hold.measure_hold(problem)


def test_the_temperature_that_spoilt_the_probabilities_is_found_and_true_ones_are_left_alone():
    generator = torch.Generator().manual_seed(0)
    z = 1.5 * torch.randn(1000, 4, generator=generator)
    y = torch.multinomial(z.softmax(1), 1, generator=generator)[:, 0]
    spoilt, fine = measure_confidence(3 * z, y, 0), measure_confidence(z, y, 0)
    assert spoilt.temperature == pytest.approx(3, rel=0.15) and fine.temperature == pytest.approx(1, rel=0.15)
    assert (
        not spoilt.calibrated and spoilt.gain > 5 * spoilt.gain_error and spoilt.ece_after < 0.3 * spoilt.ece
    )
    assert fine.gain < 3 * fine.gain_error
    verdict, remedy = confidence_findings(spoilt)
    assert verdict.verdict == "bad" and "too sure" in verdict.text and "softmax(1)" in remedy.remedy
    assert confidence_findings(fine)[0].verdict == "good" and not confidence_findings(fine)[1].remedy


def test_features_of_unlike_ranges_are_said():
    net, data = line(width=9)
    wide = data.train_x.clone()
    wide[:, 2:] *= 0.01
    told = hold.findings(found(net, Dataset(wide, data.train_y, wide, data.train_y)))
    assert any(f.key == "hold.scale" and "Standardise" in f.remedy for f in told)


def test_the_network_of_the_trial_is_asked_and_the_report_shows_it(tmp_path):
    model = bolza.models.mlp(depth=2, width=16)
    before = copy.deepcopy(model.state_dict())
    d = bolza.diagnose(model, "digits", train=True, hold=True, samples=16, steps=50, lr=1e-4)
    facts = d.facts["hold"]
    assert facts["accuracy"] == pytest.approx(d.training["after"].metrics["test_accuracy"])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert d.findings[-1].question == "hold" and {"hold.robust_accuracy", "hold.noise"} <= {f.key for f in d}
    assert all(f.text.endswith(".") for f in d)
    record = json.loads(d.to_json(tmp_path / "d.json").read_text(encoding="utf-8"))
    assert problems(record, SCHEMA, SCHEMA) == []
    section = next(part for part in d.document().parts if getattr(part, "title", "") == "Will it hold?")
    picture = next(part for part in section.parts if getattr(part, "key", "") == "hold")
    assert "certified (lower bound)" in to_svg(picture) and "under attack" in picture.alt
    assert "hold" in d.document().summary and "What holds" in str(d)


def test_an_untrained_network_and_a_regression_say_so_in_the_diagnosis():
    d = bolza.diagnose(bolza.models.mlp(depth=1, width=8), "digits", hold=True, samples=16)
    assert d["hold.accuracy"].verdict == "bad" and d.facts["hold"]["margin"] is None
    assert problems(d.to_dict(), SCHEMA, SCHEMA) == []
    x = torch.randn(20, 3)
    d = bolza.diagnose(nn.Linear(3, 1), (x, x[:, :1]), hold=True, samples=16)
    assert "classifiers" in d["hold.unavailable"].text and d.facts["hold"] is None
