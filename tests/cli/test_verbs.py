"""The verbs as a person uses them."""

import json
import subprocess
import sys
import warnings

import pytest

VERBS = ("diagnose", "phase", "train", "watch", "methods", "cite", "reproduce", "bench")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from bolza.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'matplotlib', 'sklearn', 'scipy', 'numpy', 'joblib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_names_every_verb_and_the_version_is_shown(bolza):
    text = bolza("--help").stdout
    assert all(verb in text for verb in VERBS)
    assert bolza("--version").stdout.startswith("bolza 0.")


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_has_an_example_and_the_debug_option(bolza, verb):
    result = bolza(verb, "--help")
    assert result.exit_code == 0
    assert f"bolza {verb}" in result.stdout.split("Usage:")[1].partition("\n")[2]
    assert "--debug" in result.stdout


def test_phase_prints_the_critical_point_and_writes_its_files(bolza, home):
    result = bolza("phase", "--at", "1.0,0.05", "--html", "p.html", "--json", "p.json", "--png", "p.png")
    assert result.exit_code == 0, result.stderr
    assert "1.760955" in result.stdout
    assert "ordered" in result.stdout
    record = json.loads((home / "p.json").read_text())
    assert record["critical_weight_var"] == pytest.approx(1.760955, abs=1e-6)
    assert record["here"]["xi_c"] == pytest.approx(3.6270, abs=1e-4)  # stored by the review's companion code
    assert (home / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "<svg" in (home / "p.html").read_text()


def test_phase_takes_an_activation_of_ones_own(bolza):
    result = bolza(
        "phase", "--activation", "user_code:F.relu", "--bias-var", "0", "--weight-var-range", "1", "3"
    )
    assert result.exit_code == 0, result.stderr
    assert "2.000000" in result.stdout


def test_training_resumes_where_it_stopped(bolza, home):
    """Ten steps in one go end where five and five do, bit for bit."""
    common = (
        "train",
        "--model",
        "user_code:net",
        "--data",
        "user_code:good",
        "--batch",
        "8",
        "--lr",
        "0.1",
        "--momentum",
        "0.9",
    )
    assert bolza(*common, "--steps", "10", "--json", "once.json").exit_code == 0
    assert bolza(*common, "--steps", "5", "--checkpoint", "c").exit_code == 0
    again = bolza(*common, "--steps", "10", "--checkpoint", "c", "--resume", "--json", "twice.json")
    assert again.exit_code == 0, again.stderr
    once, twice = (json.loads((home / name).read_text())["run"] for name in ("once.json", "twice.json"))
    assert twice["step"] == 10
    assert twice["test_loss"][-1] == once["test_loss"][-1]


@pytest.mark.parametrize(
    "extra",
    [
        ("--optimizer", "adam"),
        ("--controller", "cosine"),
        ("--init", "critical"),
        ("--optimizer", "user_code:torch.optim.AdamW"),
        ("--clip", "1.0"),
    ],
)
def test_training_takes_every_method(bolza, extra):
    result = bolza("train", "--depth", "3", "--width", "20", "--steps", "20", "--lr", "0.05", *extra)
    assert result.exit_code == 0, result.stderr
    assert "finished after 20 steps" in result.stdout


def test_training_writes_a_page_with_curves(bolza, home):
    assert bolza("train", "--depth", "2", "--steps", "10", "--html", "run.html").exit_code == 0
    assert "<svg" in (home / "run.html").read_text()


def test_a_controller_is_drawn_and_recorded_and_all_are_listed(bolza, home):
    common = (
        "--model",
        "user_code:net",
        "--data",
        "user_code:good",
        "--batch",
        "8",
        "--steps",
        "12",
        "--lr",
        "0.1",
    )
    result = bolza(
        "train", *common, "--controller", "csgd-global", "--html", "run.html", "--json", "run.json"
    )
    assert result.exit_code == 0, result.stderr
    assert "Controls" in result.stdout and "learning rate" in result.stdout.split("Controls")[1]
    run = json.loads((home / "run.json").read_text())["run"]
    assert run["controls"]["lr"][0] == 0.1 and len(run["control_steps"]) == 12 and run["samples"] == 96
    assert "learning rate" in (home / "run.html").read_text()
    listed = bolza("train", "--controller", "help")
    assert listed.exit_code == 0
    assert all(f" {name} " in listed.stdout for name in ("cosine", "csgd", "optimal", "batch-size"))


def test_a_constant_run_draws_no_controls(bolza):
    common = ("--model", "user_code:net", "--data", "user_code:good", "--batch", "8", "--steps", "5")
    assert "Controls" not in bolza("train", *common, "--lr", "0.1").stdout


def test_a_controller_of_ones_own_is_a_function_of_optimizer_and_steps(bolza, home):
    with (home / "user_code.py").open("a") as file:
        file.write(
            "def halve(optimizer, steps): return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)\n"
        )
    common = (
        "--model",
        "user_code:net",
        "--data",
        "user_code:good",
        "--batch",
        "8",
        "--steps",
        "4",
        "--lr",
        "1",
    )
    assert bolza("train", *common, "--controller", "user_code:halve", "--json", "r.json").exit_code == 0
    assert json.loads((home / "r.json").read_text())["run"]["controls"]["lr"] == [1, 0.5, 0.25, 0.125]


def test_a_warning_is_a_sentence_without_the_line_that_raised_it():
    from bolza.cli._errors import _plain_warnings

    shown, kept = (UserWarning("the rate is too large"), UserWarning, "loop.py", 318), warnings.formatwarning
    with _plain_warnings(debug=False):
        assert warnings.formatwarning(*shown) == "warning: the rate is too large\n"
    assert warnings.formatwarning is kept and "loop.py:318" in warnings.formatwarning(*shown)


def test_methods_shows_no_markup(bolza):
    shown = bolza("methods", "controllers").stdout
    assert ":func:" not in shown and "`" not in shown


def test_cite_prints_bibtex(bolza):
    result = bolza("cite", "liu2019_review")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("@misc{liu2019review,")


def test_methods_lists_names_and_papers(bolza, home):
    result = bolza("methods", "meanfield", "--json", "m.json")
    assert result.exit_code == 0, result.stderr
    assert "fixed_point" in result.stdout and "Poole 2016" in result.stdout
    names = [m["name"] for m in json.loads((home / "m.json").read_text())["methods"]]
    assert "meanfield.fixed_point" in names


def test_reproduce_without_a_key_lists_the_studies(bolza):
    assert "liu2019_review" in bolza("reproduce").stdout


def test_reproduce_does_not_drop_a_report_that_it_cannot_write(bolza, home):
    result = bolza("reproduce", "--json", "x.json")
    assert result.exit_code == 2 and "name one, or give --all" in result.stderr
    assert not (home / "x.json").exists()


def test_reproduce_says_that_a_claim_fails_and_ends_with_zero(bolza, home, monkeypatch):
    import bolza.studies._study as study
    from bolza.core.reference import Reference

    paper = Reference("doe2020control", "Doe, Jane", "On control", 2020)

    def fails(scale, progress):
        progress(0.5, "halfway")
        return study.StudyResult(
            "doe2020", "T", paper, "C", scale, [study.Row("x is 1", 1.0, 2.0, 0.1, False)]
        )

    def stops(scale, progress):
        raise ValueError("no data")

    found = {
        key: study.Study(key, "T", "C", paper, runner)
        for key, runner in (("doe2020", fails), ("roe2021", stops))
    }
    monkeypatch.setattr(study, "studies", lambda: found)
    monkeypatch.setattr("bolza.studies.studies", lambda: found)
    result = bolza("reproduce", "doe2020", "--json", "r.json")
    assert result.exit_code == 0, result.stderr
    assert "✗ no" in result.stdout and "2.00 ± 0.10" in result.stdout
    assert json.loads((home / "r.json").read_text())["studies"][0]["holds"] is False
    both = bolza("reproduce", "--all")
    assert both.exit_code == 1
    assert "0 of 1 studies hold" in both.stdout
    assert "roe2021 could not be run: ValueError: no data" in both.stderr
