"""The benchmark scripts leave records that can be compared: one schema, with versions and machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
