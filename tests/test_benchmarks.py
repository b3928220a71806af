"""The benchmark scripts leave records that can be compared: one schema, with versions and machine."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
RECORDS = sorted((ROOT / "benchmarks" / "records").glob("*.json"))
ENVIRONMENT = {"python", "machine", "processor", "cpus", "threads", "device", "commit", "versions"}


def check_record(record: dict, bench: str) -> None:
    assert set(record) == {"schema", "bench", "date", "environment", "rows"}
    assert record["schema"] == "bolza.bench/1" and record["bench"] == bench
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"])
    about = record["environment"]
    assert set(about) >= ENVIRONMENT
    assert {"bolza", "torch", "numpy"} <= set(about["versions"]) and about["threads"] >= 1
    assert record["rows"]
    for row in record["rows"]:
        assert isinstance(row["name"], str) and len(row) > 1
        for key, value in row.items():
            assert value is None or isinstance(value, (str, int, float, bool, list, dict)), key
            if key in ("s", "cpu_s", "min_s"):
                assert value >= 0


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_has_the_schema_and_a_script(path: Path) -> None:
    check_record(json.loads(path.read_text(encoding="utf-8")), path.stem)
    assert (ROOT / "benchmarks" / f"{path.stem}.py").exists()


def test_the_mean_field_record_meets_its_bars() -> None:
    rows = json.loads((ROOT / "benchmarks" / "records" / "meanfield.json").read_text(encoding="utf-8"))[
        "rows"
    ]
    met = [row["bar_met"] for row in rows if "bar_met" in row]
    assert len(met) == 3 and all(met)


SCRIPT = """
from _bench import emit, environment, timed
emit("tiny", "environment", **environment("scipy"), extra=1)
emit("tiny", "a sum", **timed(lambda: sum(range(10))), ratio=1 / 3)
{ending}
"""


@pytest.mark.parametrize("fails", [False, True])
def test_a_script_that_ends_well_writes_its_record_and_one_that_fails_does_not(
    tmp_path: Path, fails: bool
) -> None:
    script = tmp_path / "tiny.py"
    script.write_text(SCRIPT.format(ending="raise RuntimeError('no')" if fails else ""), encoding="utf-8")
    out = tmp_path / "records"
    environment = os.environ | {"BENCH_RECORDS": str(out), "PYTHONPATH": str(ROOT / "benchmarks")}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert (done.returncode != 0) == fails
    assert out.exists() != fails
    if not fails:
        record = json.loads((out / "tiny.json").read_text(encoding="utf-8"))
        check_record(record, "tiny")
        assert [row["name"] for row in record["rows"]] == ["a sum"]
        assert record["environment"]["extra"] == 1 and "scipy" in record["environment"]["versions"]
        assert record["rows"][0]["ratio"] == 0.333333


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Import a helper of the benchmarks by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_kfac_of_the_benchmarks_has_the_factors_of_single_samples(script, kind: str) -> None:
    """A = E[a aᵀ] and G = E[g gᵀ] by autograd, one sample after the other; a convolution sums A over its places."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double() if kind == "linear" else nn.Conv2d(1, 2, 2).double()
    x = torch.randn(5, 3).double() if kind == "linear" else torch.randn(5, 1, 3, 3).double()
    target = torch.randn_like(layer(x)).detach()
    inputs, signals = [], []
    for i in range(5):
        out = layer(x[i : i + 1])
        loss = (out - target[i : i + 1]).square().sum()
        signals.append(torch.autograd.grad(loss, out)[0].reshape(2, -1).T)
        patches = x[i : i + 1] if kind == "linear" else nn.functional.unfold(x[i : i + 1], 2)[0].T
        inputs.append(torch.cat([patches, patches.new_ones(len(patches), 1)], 1))
    a = torch.stack([rows.T @ rows for rows in inputs]).mean(0)
    g = torch.stack([rows.T @ rows / len(rows) for rows in signals]).mean(0)
    optimizer = script("_rivals").KFAC(layer, lr=0.1, damping=1e-3, clip=math.inf, momentum=0.0)
    before = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1).detach().clone()
    (layer(x) - target).square().flatten(1).sum(1).mean().backward()
    slope = torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1)
    optimizer.step()
    state = optimizer.state[layer.weight]
    torch.testing.assert_close(state["A"], a)
    torch.testing.assert_close(state["G"], g)
    ratio = (a.diagonal().mean() / g.diagonal().mean()).sqrt()
    root = 1e-3**0.5
    left = torch.linalg.inv(g + root / ratio * torch.eye(len(g)))
    right = torch.linalg.inv(a + root * ratio * torch.eye(len(a)))
    after = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1).detach()
    torch.testing.assert_close(before - after, 0.1 * left @ slope @ right)


def test_a_run_arrives_between_two_evaluations_at_the_logarithm_of_the_target(script) -> None:
    race = script("_race")
    curve = [(0.0, 1, 4.0), (1.0, 11, 2.0), (2.0, 21, 0.5), (3.0, 31, None)]
    seconds, steps = race.arrival({"curve": curve}, 1.0)
    assert seconds == pytest.approx(1.5) and steps == pytest.approx(16)
    assert race.arrival({"curve": curve}, 2.0) == (1.0, 11)
    assert race.arrival({"curve": curve}, 0.1) == (math.inf, math.inf)


def test_a_race_tunes_the_rate_and_takes_finished_cells_from_its_folder(script, tmp_path: Path) -> None:
    from bolza.data import digits

    race = script("_race")
    made = []

    def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        made.append(lr)
        return torch.optim.SGD(model.parameters(), lr=lr)

    problem = race.Problem("digits", "digits", digits, lambda: nn.Linear(64, 10), 32, 0.02, 0.5)
    contender = race.Contender("SGD", sgd, 0.1)
    first = race.race(problem, contender, tmp_path, 2, 0.02, (1e-4, 1.0, 1e39))
    assert first["rate"] == 0.1 and not first["edge"] and made == pytest.approx([1e-5, 0.1, 1e38, 0.1, 0.1])
    assert first["trials"][2]["diverged"] and first["trials"][2]["final"] is None
    assert [cell["seed"] for cell in first["runs"]] == [1, 2]
    torn = next((tmp_path / "digits" / "SGD").glob("*seed 2.json"))
    torn.write_text(torn.read_text()[:40])
    made.clear()
    second = race.race(problem, contender, tmp_path, 2, 0.02, (1e-4, 1.0, 1e39))
    assert made == [0.1] and second["trials"] == json.loads(json.dumps(first["trials"]))
