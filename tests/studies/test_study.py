"""What every study must be, and how several are run."""

import importlib

import pytest

from bolza.core.reference import Reference
from bolza.ops.errors import ArgumentError
from bolza.report import to_text
from bolza.studies import Row, Study, StudyFailure, StudyResult, _study, get, run_all, studies

PAPER = Reference("doe2020control", "Doe, Jane", "On control", 2020, arxiv="2001.00001")


def result(*holds: bool | None) -> StudyResult:
    rows = [Row(f"claim {i}", 1.0, 1.01, 0.02, h) for i, h in enumerate(holds)]
    return StudyResult("doe2020", "Title", PAPER, "Claim", "small", rows)


@pytest.mark.parametrize("key", sorted(studies()))
def test_a_study_is_complete_and_named_after_its_file(key):
    module = importlib.import_module(f"bolza.studies.{key}")
    assert key == module.KEY
    assert isinstance(module.REFERENCE, Reference) and module.REFERENCE.bibtex()
    assert module.TITLE and module.CLAIM and callable(module.run)


def test_a_result_holds_if_every_claim_does_and_is_open_if_one_is():
    assert result(True, True).holds is True
    assert result(True, None).holds is None
    assert result(True, None, False).holds is False
    assert result().holds is None


def test_the_table_shows_claim_expected_measured_and_verdict():
    text = to_text(result(True, False, None).document())
    assert "1.010 ± 0.020" in text
    assert "✓ yes" in text and "✗ no" in text and "open" in text
    assert "1 of 3 claims hold, 1 could not be judged" in text


def test_a_study_is_found_by_key_citation_key_and_arxiv_number():
    assert get("LIU2019_review") is not None
    assert get("liu2019review").key == get("arXiv:1908.10920").key == "liu2019_review"
    with pytest.raises(ArgumentError, match="did you mean liu2019_review"):
        get("liu2019")


def test_an_unknown_scale_is_refused_before_anything_runs():
    with pytest.raises(ArgumentError, match="'tiny'"):
        get("liu2019_review").run("tiny")
    with pytest.raises(ArgumentError, match="'tiny'"):
        next(run_all(["liu2019_review"], "tiny"))


def test_one_study_that_stops_does_not_stop_the_others(monkeypatch):
    def stops(scale, progress):
        raise ValueError("no data")

    told = []

    def works(scale, progress):
        progress(0.5, "halfway")
        return result(True)

    found = {"a": Study("a", "T", "C", PAPER, stops), "b": Study("b", "T", "C", PAPER, works)}
    monkeypatch.setattr(_study, "studies", lambda: found)
    first, second = run_all(["a", "b"], progress=lambda share, text: told.append((share, text)))
    assert (
        isinstance(first, StudyFailure)
        and first.message == "ValueError: no data"
        and "Traceback" in first.trace
    )
    assert isinstance(second, StudyResult) and second.seconds > 0
    assert told == [(0.75, "b: halfway")]
