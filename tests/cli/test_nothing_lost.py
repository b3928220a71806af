"""What was computed survives Ctrl-C twice, a full disk, a terminal without Greek and a second report on one file."""

import json
import os
import subprocess
import sys

import pytest

OWN = ("--model", "user_code:net", "--data", "user_code:good")
TRAIN = ("train", "--steps", "3", "--batch", "8", "--lr", "0.1", *OWN)
DIAGNOSE = (
    "diagnose",
    "user_code:net",
    "--data",
    "user_code:good",
    "--samples",
    "8",
    "--train",
    "--steps",
    "5",
)

# Ctrl-C in the third step, and again while the report is written
TWICE = """
import os, signal, sys
import bolza.report as report
import bolza.training.loop as loop
signal.signal(signal.SIGINT, signal.default_int_handler)
press = lambda: os.kill(os.getpid(), signal.SIGINT)
step, show = loop._Loop.step, report.to_terminal
def step_and_press(self):
    step(self)
    if self.run.step == 3: press()
def show_and_press(document, *rest):
    press()
    show(document, *rest)
loop._Loop.step, report.to_terminal = step_and_press, show_and_press
from bolza.cli import main
main()
"""


def process(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
    )


@pytest.mark.slow
@pytest.mark.parametrize("verb", [TRAIN, DIAGNOSE])
def test_a_second_ctrl_c_does_not_lose_the_report(home, verb):
    arguments = [*verb, "--json", "run.json"]
    arguments[arguments.index("--steps") + 1] = "500"
    done = process(TWICE, *arguments)
    assert done.returncode == 130, done.stderr
    assert b"Traceback" not in done.stderr
    record = json.loads((home / "run.json").read_text(encoding="utf-8"))
    run = record["run"] if "run" in record else record["training"]["before"]
    assert run["status"] == "interrupted"


@pytest.mark.slow
def test_a_terminal_without_greek_letters_shows_replacements(home):
    done = process("from bolza.cli import main; main()", "phase", "--help", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = process("from bolza.cli import main; main()", *TRAIN, **plain)
    assert done.returncode == 0, done.stderr
    assert b"finished after 3 steps" in done.stdout


def test_an_output_that_fails_does_not_lose_the_files(bolza, home, monkeypatch):
    import bolza.report as report

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "to_terminal", full)
    result = bolza(*TRAIN, "--json", "run.json")
    assert result.exit_code == 2
    assert "the standard output cannot be written (No space left on device)" in result.stderr
    assert json.loads((home / "run.json").read_text())["run"]["status"] == "finished"


def test_a_page_that_fails_for_any_reason_does_not_lose_the_others(bolza, home, monkeypatch):
    import bolza.report as report

    def broken(*_):
        raise ImportError("a matplotlib.py in this folder")

    monkeypatch.setattr(report, "to_html", broken)
    result = bolza(*TRAIN, "--html", "page.html", "--json", "run.json")
    assert result.exit_code == 1 and "ImportError" in result.stderr
    assert (home / "run.json").exists()


@pytest.mark.parametrize("other", ["--html", "--checkpoint"])
def test_two_results_on_one_file_are_refused_before_the_work(bolza, home, other):
    result = bolza(*TRAIN, "--json", "run", other, "./run")
    assert result.exit_code == 2
    assert "--json" in result.stderr and other in result.stderr and "a file of its own" in result.stderr
    assert not (home / "run").exists()


def test_a_checkpoint_that_fails_late_ends_in_one_sentence_after_the_curves(bolza, home, monkeypatch):
    from bolza.core.errors import CheckpointError
    from bolza.training import loop

    def full(state, path):
        if state["run"]["step"]:
            raise CheckpointError("the checkpoint 'run.ckpt' cannot be written: No space left on device")

    monkeypatch.setattr(loop, "save_tree", full)
    with pytest.warns(RuntimeWarning, match="the run goes on"):
        result = bolza(*TRAIN, "--checkpoint", "run.ckpt", "--json", "run.json")
    assert result.exit_code == 2
    assert "the run finished after 3 steps, but the checkpoint 'run.ckpt' cannot be written" in result.stderr
    assert "Result" in result.stdout and (home / "run.json").exists()


def test_a_trial_that_cannot_run_leaves_the_diagnosis(bolza, home):
    """Batch norm refuses a batch of one, which the measurement never uses."""
    with (home / "user_code.py").open("a") as file:
        file.write(
            "def normed(): return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))\n"
        )
    result = bolza(
        "diagnose", "user_code:normed", "--data", "user_code:good", "--samples", "8", "--train", "--steps", "5",
        "--batch", "1", "--json", "d.json",
    )  # fmt: skip
    assert result.exit_code == 2
    assert "Training the network as it is failed" in result.stderr and "ValueError" in result.stderr
    keys = [finding["key"] for finding in json.loads((home / "d.json").read_text())["findings"]]
    assert "landscape.lr_limit" in keys and "training.unavailable" in keys


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--seed", str(2**80)), ("--seed", "64 bits")),
        (("--lr", "nan"), ("lr=nan", "finite")),
        (("--epochs", "nan"), ("epochs=nan", "finite")),
        (("--model", "user_code:needs"), ("'width'", "supplies it")),
        (("--model", "user_code:large"), ("not enough memory", "smaller")),
        (("--loss", "user_code:late_loss"), ("ValueError", "(user_code.py, line")),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(bolza, home, arguments, words):
    with (home / "user_code.py").open("a") as file:
        file.write(
            "def needs(width, depth=2): return nn.Linear(4, width)\n"
            "def late_loss(outputs, targets): raise ValueError('no targets')\n"
            "class Large(nn.Linear):\n"
            "    def forward(self, x): raise MemoryError\n"
            "def large(): return Large(4, 3)\n"
        )
    steps = () if "--epochs" in arguments else ("--steps", "3")
    result = bolza("train", *steps, "--batch", "8", "--lr", "0.1", *OWN, *arguments)
    assert result.exit_code == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr


def test_factories_that_are_wrapped_or_filled_in_are_called(bolza, home):
    with (home / "user_code.py").open("a") as file:
        file.write(
            "import functools\npart = functools.partial(nn.Linear, 4, 3)\nonce = functools.lru_cache(net)\n"
        )
    for name in ("part", "once"):
        assert bolza(*TRAIN, "--model", f"user_code:{name}").exit_code == 0
