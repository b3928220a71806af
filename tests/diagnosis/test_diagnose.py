"""The whole answer: findings, prescription, trial, and the three ways to read it."""

import copy
import json
import math
import os
import shutil
import signal
import subprocess
from html.parser import HTMLParser
from importlib.resources import files

import pytest
import torch
from torch import nn

import bolza
from bolza import data, models
from bolza.core.errors import ArgumentError
from bolza.diagnosis import trial
from bolza.diagnosis.course import Course
from schema_check import problems

SCHEMA = json.loads(files("bolza.diagnosis").joinpath("schema.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def deep():
    """A network of 20 layers that does not train, with a short trial."""
    torch.manual_seed(0)
    model = models.mlp(depth=20, width=40)
    return bolza.diagnose(model, data.digits(), train=True, samples=64, steps=60)


def test_a_deep_network_with_default_initialisation_is_found_ordered_and_its_gradient_lost(deep):
    assert deep["propagation.phase"].value == "ordered"
    assert deep["propagation.gradient_ratio"].verdict == "bad"
    assert deep["propagation.trainable_depth"].value < 10
    assert deep["propagation.chi_1"].value == pytest.approx(1 / 3, rel=0.05)  # torch draws from U(±1/√n)


def test_every_finding_has_a_number_or_a_word_and_a_sentence(deep):
    for finding in deep:
        assert finding.text.endswith("."), finding
        assert finding.verdict in ("good", "warn", "bad", "info")
        assert finding.verdict != "bad" or finding.question == "training" or finding.display
    questions = {f.question for f in deep}
    assert {"propagation", "landscape", "noise", "prescription", "training"} <= questions


def test_the_treated_network_keeps_its_gradient_and_learns_while_the_other_stays_at_chance(deep):
    assert 0.05 < deep.treated["propagation"]["gradient_ratio"] < 20
    before, after = deep.training["before"], deep.training["after"]
    assert before.metrics["test_accuracy"] < 0.2 < 0.8 < after.metrics["test_accuracy"]
    assert deep.training["before_with_prescribed_lr"].metrics["test_accuracy"] < 0.2
    runs = deep.training.values()
    assert len({(run.steps, run.batch_size) for run in runs}) == 1
    assert before.lr == 0.01 and after.lr == deep.prescription.learning_rate.value


def test_the_prescribed_rate_follows_from_the_curvature_and_the_noise_of_the_treated_network(deep):
    p = deep.prescription
    sharpness, critical = deep.treated["landscape"]["sharpness"], deep.treated["noise"]["critical_batch"]
    expected = (1 - p.momentum) / sharpness / (1 + critical / p.batch_size.value)
    assert p.learning_rate.value == pytest.approx(expected, rel=0.06)  # two figures
    assert p.batch_size.value >= min(critical, 256)
    for part in (p.initialisation, p.learning_rate, p.batch_size):
        assert part.reason.endswith(".") and any(c.isdigit() for c in part.reason)


def test_the_json_file_follows_its_schema(deep, tmp_path):
    record = json.loads(deep.to_json(tmp_path / "d.json").read_text(encoding="utf-8"))
    assert problems(record, SCHEMA, SCHEMA) == []
    assert record["training"]["before"]["test_accuracy"] < 0.2 < record["training"]["after"]["test_accuracy"]
    assert {"key", "value", "error", "verdict", "remedy"} <= set(record["findings"][0])


def test_the_terminal_is_readable_at_80_and_120_columns(deep):
    from bolza.report import to_text

    for width in (80, 120):
        text = to_text(deep.document(), width)
        assert max(map(len, text.splitlines())) <= width
        for word in ("ordered", "Test accuracy after", "critical_init_(model, x)", "What to change"):
            assert word in text
    assert str(deep).splitlines()[1].strip() == "Diagnosis of Sequential (20 layers) on digits"


class _Counter(HTMLParser):
    def __init__(self):
        super().__init__()
        self.figures, self.outside = [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "figure":
            self.figures.append(attrs["id"].removeprefix("figure-"))
        self.outside += [
            v for k, v in attrs.items() if k in ("src", "href", "xlink:href") and not v.startswith("#")
        ]


def test_the_page_has_all_figures_and_nothing_from_outside(deep, tmp_path):
    reader = _Counter()
    reader.feed(deep.to_html(tmp_path / "d.html").read_text(encoding="utf-8"))
    assert reader.figures == ["signal", "gradient", "phase", "spectra", "noise", "training", "course"]
    assert reader.outside == []


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on the path")
def test_a_browser_draws_the_page(deep, tmp_path):
    from PIL import Image

    page, image = deep.to_html(tmp_path / "d.html"), tmp_path / "d.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += [
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
    ]
    command += [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1000,5200",
        f"--screenshot={image}",
        page.as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    colours = Image.open(image).convert("RGB").getcolors(maxcolors=1 << 24)
    seen = {colour for count, colour in colours if count > 40}
    for drawn in ((0xC2, 0x41, 0x0C), (0x0B, 0x62, 0xB8), (0xD7, 0xE7, 0xF6), (0xFB, 0xE3, 0xD3)):
        assert drawn in seen  # the two networks, and the two phases


def test_the_answer_repeats_from_its_seed_and_nothing_global_moves():
    torch.manual_seed(3)
    model = models.mlp(depth=6, width=20)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first, second = (bolza.diagnose(model, "digits", samples=32, seed=5).to_dict() for _ in range(2))
    assert first == second
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_treat_applies_the_prescription_to_the_users_own_model(deep):
    model = models.mlp(depth=20, width=40)
    deep.treat_(model, torch.randn(4, 64))
    again = bolza.diagnose(model, "digits", samples=64)
    assert again["propagation.gradient_ratio"].verdict == "good"


def test_a_healthy_network_is_left_as_it_is():
    d = bolza.diagnose(models.mlp(depth=3, width=30), "digits", samples=64)
    assert d.prescription.initialisation.value is None
    assert not d.treated
    assert not [f for f in d if f.verdict == "bad"]


def test_one_question_that_fails_does_not_lose_the_others(monkeypatch):
    from bolza.diagnosis import landscape

    def fail(*_, **__):
        raise RuntimeError("derivative not implemented\nsecond line")

    monkeypatch.setattr(landscape, "hessian_operator", fail)
    d = bolza.diagnose(models.mlp(depth=3, width=30), "digits", samples=32)
    assert d["landscape.unavailable"].text == "derivative not implemented"
    assert d.facts["landscape"] is None and d.facts["noise"] is not None
    assert d.prescription.learning_rate.value is None
    assert problems(d.to_dict(), SCHEMA, SCHEMA) == []
    str(d)


def test_a_regressor_is_judged_by_its_r2():
    d = bolza.diagnose(
        models.make("mlp", data.diabetes(), depth=3, width=30), "diabetes", train=True, samples=64, steps=60
    )
    assert d.training["after"].metrics["test_r2"] > 0.2
    assert "test_accuracy" not in d.training["after"].to_dict()
    assert problems(d.to_dict(), SCHEMA, SCHEMA) == []


@pytest.mark.parametrize(
    ("name", "source"), [("resnet", "digits_images"), ("gpt", "text"), ("gru", "digits"), ("vit", "digits")]
)
def test_networks_that_are_no_chain_are_diagnosed_too(name, source):
    dataset = data.load(source)
    small = {"gpt": 16, "vit": 16, "gru": 16, "resnet": 8}
    d = bolza.diagnose(
        models.make(name, dataset, depth=2 if name in ("gpt", "vit") else None, width=small[name]),
        dataset,
        samples=16,
    )
    assert d["propagation.gradient_ratio"].value > 0
    assert d["landscape.lr_limit"].value > 0
    assert d["noise.trace"].value > 0
    assert problems(d.to_dict(), SCHEMA, SCHEMA) == []
    assert "propagation.phase" not in d
    str(d)


def test_a_model_that_cannot_be_traced_is_measured_with_a_note():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x)) if float(x.detach().sum()) > -1e9 else x
            return self.head(x)

    d = bolza.diagnose(Fickle(), "digits", samples=32)
    assert len(d.facts["propagation"]["layers"]) == 5
    assert any("trac" in f.text for f in d if f.question == "propagation")


def test_ctrl_c_in_training_keeps_what_was_computed():
    def interrupt(stage, done, total, numbers):
        if total and done == 5:
            os.kill(os.getpid(), signal.SIGINT)

    d = bolza.diagnose(
        models.mlp(depth=4, width=20), "digits", train=True, samples=32, steps=50, progress=interrupt
    )
    assert list(d.training) == ["before"]
    assert d.training["before"].status == "interrupted" and 5 <= d.training["before"].steps <= 6
    assert d["landscape.lr_limit"].value > 0
    assert problems(d.to_dict(), SCHEMA, SCHEMA) == []
    str(d)


def test_a_run_that_diverges_says_so_and_the_report_stands():
    d = bolza.diagnose(models.mlp(5, 20, "relu"), "digits", train=True, samples=32, steps=30, lr=1e20)
    assert d.training["before"].status == "diverged"
    assert d["training.before"].verdict == "bad" and "diverged" in d["training.before"].text
    assert problems(d.to_dict(), SCHEMA, SCHEMA) == []


def test_parameters_without_gradient_are_a_finding():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.spare = nn.Linear(64, 10), nn.Linear(64, 10)

        def forward(self, x):
            return self.body(x)

    finding = bolza.diagnose(Idle(), "digits", samples=32)["structure.no_gradient"]
    assert finding.value == 2 and "spare.weight" in finding.text and finding.remedy


@pytest.mark.parametrize(
    "options", [{"lr": 0.0}, {"lr": math.nan}, {"steps": 0}, {"batch_size": -1}, {"samples": 1}]
)
def test_settings_that_make_no_sense_are_named(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        bolza.diagnose(models.mlp(depth=2, width=5), "digits", **options)


class Unread(Course):
    """No readings along the run: they leave it alone (test_course), and take a quarter of the time."""

    def note(self, step, steps, lr):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("depth, seed", [(50, 0), (50, 1), (100, 0), (100, 1)])
def test_the_default_goes_from_chance_to_95_per_cent(depth, seed, monkeypatch):
    monkeypatch.setattr(trial, "Course", Unread)
    torch.manual_seed(seed)
    d = bolza.diagnose(models.mlp(depth=depth), "digits", train=True, seed=seed)
    assert d.training["before"].metrics["test_accuracy"] < 0.15
    assert d.training["before_with_prescribed_lr"].metrics["test_accuracy"] < 0.15
    assert d.training["after"].metrics["test_accuracy"] >= 0.95


class Counting(nn.Module):
    """Keeps a count in a buffer, gives a mapping, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        return {"scores": self.layer(x), "noise": torch.rand(1)}


def test_a_network_out_of_the_ordinary_is_tried_too_and_left_as_it_is():
    model, state = Counting(), torch.get_rng_state()
    d = bolza.diagnose(
        model,
        "digits",
        lambda out, y: nn.functional.cross_entropy(out["scores"], y),
        train=True,
        samples=16,
        steps=3,
    )
    assert d.training["after"].status == "finished" and "training.unavailable" not in d
    assert model.calls == 0 and torch.equal(state, torch.get_rng_state())


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_layers_get_one_set_of_weights_and_the_users_model_stays_lazy():
    model, state = nn.Sequential(nn.LazyLinear(12), nn.Tanh(), nn.LazyLinear(10)), torch.get_rng_state()
    d = bolza.diagnose(model, "digits", train=True, samples=16, steps=3)
    assert d.training["after"].status == "finished" and d.subject["parameters"] == 65 * 12 + 13 * 10
    assert isinstance(model[0].weight, nn.UninitializedParameter)
    assert torch.equal(state, torch.get_rng_state())


def test_a_question_in_which_the_users_code_raises_does_not_lose_the_others():
    class Moody(nn.Linear):
        calls = 0

        def forward(self, x):
            Moody.calls += 1
            if Moody.calls == 5:
                raise KeyError("cache")
            return super().forward(x)

    d = bolza.diagnose(Moody(64, 10), "digits", samples=16)
    assert [f.text for f in d if f.key.endswith(".unavailable")] == ["KeyError: 'cache'"]
