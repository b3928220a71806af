"""Bad input: one clear sentence that names the thing and the remedy, an exit code, nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

TRAIN = ("train", "--steps", "3", "--batch", "8", "--lr", "0.1")
OWN = (*TRAIN, "--model", "user_code:net", "--data", "user_code:good")


def refused(result, *words, code=2):
    assert result.exit_code == code, result.stderr + result.stdout
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


def test_the_good_case_passes(bolza):
    assert bolza(*OWN).exit_code == 0


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--model", "mpl", ("'mpl'", "did you mean mlp?")),
        ("--model", "user_code:nett", ("'nett'", "did you mean net?")),
        ("--model", "user_cod:net", ("'user_cod'", "did you mean user_code?")),
        (
            "--model",
            "user_code:raises",
            ("user_code:raises", "RuntimeError: no such file", "user_code.py, line"),
        ),
        ("--model", "user_code:no_module", ("gave a int", "torch.nn.Module")),
        ("--model", "user_code:unused", ("unused.weight", "no gradient", "requires_grad_(False)")),
        ("--model", "user_code:explodes", ("KeyError", "hidden_state")),
        ("--data", "digts", ("'digts'", "did you mean digits")),
        ("--data", "user_code:nan", ("nan", "train_x")),
        ("--data", "user_code:labels", ("3", "6")),
        ("--data", "user_code:one", ("1 sample", "at least 2")),
        ("--data", "user_code:empty", ("empty",)),
        ("--loss", "user_code:vector_loss", ("scalar", "reduction='mean'")),
        ("--optimizer", "sdg", ("sdg",)),
        ("--controller", "cosin", ("'cosin'", "did you mean cosine?")),
        ("--init", "orthogonal", ("'orthogonal'", "critical")),
        ("--lr", "-1", ("-1",)),
        ("--device", "abacus", ("abacus",)),
        ("--json", "no/such/folder/x.json", ("--json", "no/such/folder", "create it")),
        ("--html", ".", ("--html", "folder")),
        ("--checkpoint", "no/such/folder/run.ckpt", ("no/such/folder",)),
    ],
)
def test_training_refuses_in_one_sentence(bolza, option, value, words):
    refused(bolza(*OWN, option, value), *words)


def test_half_precision_on_a_cpu_is_refused_or_works(bolza):
    """What must not happen is a traceback or a silently diverged run."""
    result = bolza(*OWN, "--model", "user_code:half")
    if result.exit_code:
        refused(result, "float16")


def test_sizes_are_for_built_in_networks(bolza):
    refused(bolza(*OWN, "--depth", "3"), "--depth", "user_code:net")


def test_resuming_needs_a_file_and_a_second_start_asks_for_it(bolza, home):
    refused(bolza(*OWN, "--resume"), "checkpoint")
    assert bolza(*OWN, "--checkpoint", "run.ckpt").exit_code == 0
    refused(bolza(*OWN, "--checkpoint", "run.ckpt"), "run.ckpt", "resume")


def test_a_run_that_diverges_says_where_and_still_shows_its_curves(bolza):
    result = bolza(
        "train", "--data", "diabetes", "--depth", "3", "--activation", "relu", "--lr", "1e6", "--steps", "30"
    )
    assert result.exit_code == 2
    assert "diverged" in result.stdout
    assert "step" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--activation", "tanhh"), ("'tanhh'", "did you mean tanh")),
        (("--activation", "user_code:squar"), ("'squar'", "did you mean square?")),
        (("--activation", "user_code:bad_activation"), ("bad_activation", "raised")),
        (("--at", "1.5"), ("--at", "1.5,0.05")),
        (("--bias-var", "-0.1"), ("-0.1",)),
        (("--weight-var-range", "3", "1"), ("weight_var_range", "3 to 1")),
        (("--png", "no/such/folder/x.png"), ("--png", "create it")),
    ],
)
def test_the_phase_diagram_refuses_in_one_sentence(bolza, arguments, words):
    refused(bolza("phase", *arguments), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("cite", "fixed_poin"), ("'fixed_poin'", "did you mean")),
        (("methods", "meanfeld"), ("meanfeld", "meanfield")),
        (("reproduce", "liu2019_revue"), ("'liu2019_revue'", "did you mean liu2019_review")),
        (("reproduce", "liu2019_review", "--all"), ("--all",)),
        (("reproduce", "liu2019_review", "--scale", "tiny"), ("'tiny'", "small")),
        (("bench", "nothing_like_it"), ("nothing_like_it",)),
    ],
)
def test_the_other_verbs_refuse_in_one_sentence(bolza, arguments, words):
    refused(bolza(*arguments), *words)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("model", "user_code:raises", ("RuntimeError: no such file",)),
        ("model", "user_code:nett", ("did you mean net?",)),
        ("model", "user_code:half", ("float16",)),
        ("data", "user_code:nan", ("nan",)),
        ("data", "user_code:labels", ("6",)),
        ("data", "user_code:one", ("1 sample",)),
        ("data", "user_code:empty", ("empty",)),
    ],
)
def test_diagnosing_refuses_in_one_sentence(bolza, option, value, words):
    model, data = (value, "user_code:good") if option == "model" else ("user_code:net", value)
    result = bolza("diagnose", model, "--data", data)
    refused(result, *words)


def test_a_network_that_cannot_be_traced_is_diagnosed_in_coarser_stages_or_refused(bolza):
    result = bolza("diagnose", "user_code:branching", "--data", "user_code:good")
    if result.exit_code:
        refused(result, "trace")
    else:
        assert "trace" in result.stdout or "stage" in result.stdout or "module" in result.stdout


def test_debug_shows_the_traceback_of_user_code(bolza):
    result = bolza(*OWN, "--model", "user_code:raises", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and 'raise RuntimeError("no such file' in result.stderr


def test_a_report_that_fails_late_does_not_lose_the_others(bolza, home, monkeypatch):
    import bolza.report as report
    from bolza.ops.errors import ReportError

    def full(*_):
        raise ReportError("--html page.html cannot be written: the disk is full")

    monkeypatch.setattr(report, "to_html", full)
    result = bolza(*OWN, "--html", "page.html", "--json", "run.json")
    refused(result, "the disk is full")
    assert "Result" in result.stdout
    assert json.loads((home / "run.json").read_text())["run"]["status"] == "finished"


@pytest.mark.slow
def test_ctrl_c_in_training_keeps_the_run_and_it_goes_on(home):
    options = ["--steps", "100000", "--depth", "3", "--checkpoint", "run.ckpt", "--json", "run.json"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from bolza.cli import main; main()", "train", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not (home / "run.ckpt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "run.ckpt" in err and "--resume" in err
    assert "interrupted" in out
    record = json.loads((home / "run.json").read_text())["run"]
    assert record["status"] == "interrupted" and record["step"] > 0
