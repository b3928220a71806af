"""Files are whole or not there, and a bad path is refused before work begins."""

import json
import math
import os
import stat

import pytest
import torch

from bolza.core.errors import ReportError
from bolza.report import check_writable, jsonable, to_json, write_atomic


def test_what_json_cannot_say_becomes_null():
    record = {"a": math.nan, "b": [math.inf, 1.5], "c": torch.tensor([1.0, math.inf]), "d": torch.tensor(2)}
    assert jsonable(record) == {"a": None, "b": [None, 1.5], "c": [1.0, None], "d": 2}


def test_json_is_strict_and_whole(tmp_path):
    path = to_json({"x": math.nan, "ξ": "∞"}, tmp_path / "r.json")
    assert json.loads(path.read_text(encoding="utf-8")) == {"x": None, "ξ": "∞"}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_failing_write_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "r.txt"
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ReportError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_link_is_followed_and_permissions_are_those_of_a_new_file(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_atomic(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    plain = tmp_path / "plain"
    plain.write_text("")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("bad", ["missing/folder/r.html", ".", "file/inside.html"])
def test_a_path_that_cannot_be_written_is_named_before_any_work(tmp_path, bad):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="--html="):
        check_writable(tmp_path / bad, "--html")


def test_checking_a_good_path_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []
    check_writable("/dev/null")
