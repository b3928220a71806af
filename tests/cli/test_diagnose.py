"""`bolza diagnose`: one command from a network to the reason, the remedy and the proof; bad input in one sentence."""

import json
import subprocess
import sys
import textwrap

import pytest
from typer.testing import CliRunner

from bolza.cli import app

NETS = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy


def good():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def raising():
    raise FileNotFoundError("weights.pt")


def half():
    return good().half()


def idle():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.spare = good(), nn.Linear(2, 2)

        def forward(self, x):
            return self.body(x)

    return Idle()


def load():
    return torch.randn(40, 4), torch.arange(40) % 3


def nan():
    return torch.full((40, 4), float("nan")), torch.arange(40) % 3


def labels():
    return torch.randn(40, 4), torch.arange(40) % 5


def one():
    return torch.randn(1, 4), torch.zeros(1, dtype=torch.long)


def empty():
    return []
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a user's own module in it, unlike any that another test imported."""
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(NETS), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def run(*arguments, columns="100"):
    return CliRunner(env={"COLUMNS": columns}).invoke(app, ["diagnose", *map(str, arguments)])


def test_the_default_network_is_found_ordered_and_the_files_are_written(tmp_path):
    page, numbers = tmp_path / "d.html", tmp_path / "d.json"
    done = run("--samples", 32, "--depth", 12, "--width", 20, "--html", page, "--json", numbers)
    assert done.exit_code == 0, done.output
    assert "ordered" in done.stdout and "What to change" in done.stdout
    record = json.loads(numbers.read_text(encoding="utf-8"))
    assert record["schema_version"] == "1.2" and record["training"] is None
    assert {"key", "value", "error", "verdict", "remedy"} <= set(record["findings"][0])
    assert page.read_text(encoding="utf-8").count("<figure") == 5


def test_train_writes_the_accuracy_before_and_after(tmp_path):
    numbers = tmp_path / "d.json"
    done = run("--train", "--samples", 32, "--depth", 12, "--width", 30, "--steps", 40, "--json", numbers)
    assert done.exit_code == 0, done.output
    training = json.loads(numbers.read_text(encoding="utf-8"))["training"]
    assert training["before"]["test_accuracy"] < 0.3 < training["after"]["test_accuracy"]


def test_a_users_own_network_and_data_are_taken(here):
    done = run(f"{here}:good", "--data", f"{here}:load")
    assert done.exit_code == 0, done.output
    assert "Diagnosis of Sequential (2 layers)" in done.stdout


def test_a_parameter_without_gradient_is_named_and_not_a_crash(here):
    done = run(f"{here}:idle", "--data", f"{here}:load")
    assert done.exit_code == 0, done.output
    assert "spare.weight" in done.stdout


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        ("raising", "load", "weights.pt"),
        ("missing", "load", "missing"),
        ("half", "load", "float16 on a CPU"),
        ("good", "nan", "not finite"),
        ("good", "labels", "label 4"),
        ("good", "one", "1 sample"),
        ("good", "empty", "empty"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(here, model, data, words):
    done = run(f"{here}:{model}", "--data", f"{here}:{data}")
    assert done.exit_code == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--activation", "tanhh"], "tanh"),
        (["resnett"], "resnet"),
        (["--device", "abacus"], "--device abacus"),
        (["--html", "no/such/folder/r.html"], "no/such/folder"),
        (["--lr", "0"], "lr=0"),
    ],
)
def test_bad_options_are_named_before_any_work(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("--samples", 16, "--depth", 3, "--width", 8, *arguments)
    assert done.exit_code == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unwritable_page_does_not_lose_what_was_computed(tmp_path, monkeypatch):
    from bolza.report import files

    def fail(*_):
        raise OSError(28, "No space left on device")

    page, numbers = tmp_path / "d.html", tmp_path / "d.json"
    monkeypatch.setattr(files, "check_writable", lambda *_: None)
    monkeypatch.setattr(files.os, "fsync", fail)
    done = run("--samples", 16, "--depth", 3, "--width", 8, "--html", page, "--json", numbers)
    assert done.exit_code == 2
    assert "What to change" in done.stdout and "No space left" in done.stderr


@pytest.mark.slow
def test_ctrl_c_in_training_writes_the_report_and_ends_with_130(tmp_path):
    script = (
        "import os, signal, sys, bolza.training.loop as loop\n"
        "step = loop._Loop.step\n"
        "def counted(self):\n"
        "    step(self)\n"
        "    if self.run.step == 3: os.kill(os.getpid(), signal.SIGINT)\n"
        "loop._Loop.step = counted\n"
        "from bolza.cli import main\n"
        "sys.argv = ['bolza', 'diagnose', '--train', '--depth', '5', '--width', '10', "
        f"'--json', {str(tmp_path / 'd.json')!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 130
    assert "Ctrl-C" in done.stderr and "Traceback" not in done.stderr
    record = json.loads((tmp_path / "d.json").read_text(encoding="utf-8"))
    assert record["training"]["before"]["status"] == "interrupted" and "after" not in record["training"]


def test_help_is_understood_by_a_newcomer():
    done = run("--help", columns="110")
    assert done.exit_code == 0
    for word in ("--train", "--html", "--data", "pkg.module:factory", "bolza diagnose --train"):
        assert word in done.stdout


def test_hold_says_that_an_untrained_network_has_nothing_to_hold():
    done = run("--hold", "--samples", 16, "--depth", 2, "--width", 8)
    assert done.exit_code == 0, done.output
    assert "Will it hold?" in done.stdout and "--train" in done.stdout
