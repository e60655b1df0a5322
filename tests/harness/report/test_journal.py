"""A journal holds every verdict of a run, and is only taken up by the same run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.errors import ResumeError
from harness.report.journal import FILE_NAME, Journal
from harness.runner import Result

IDENTITY: dict[str, Any] = {"suite": "parity", "cases": ["a", "b"], "inputs": {"m": {"sha": "0"}}}
STARTED = "2026-01-02T03:04:05+00:00"


def begin(directory: Path, found: list[Result]) -> Path:
    """Write a journal of these results."""
    with Journal.begin(directory, IDENTITY, started=STARTED) as journal:
        for number, result in enumerate(found, start=1):
            journal.add(result, seconds=number * 1.5)
    return directory / FILE_NAME


def test_verdicts_stand_and_errors_are_tried_again(
    tmp_path: Path, run_results: list[Result]
) -> None:
    """Passed and failed cases are kept, with the time that they took; others are not."""
    begin(tmp_path, run_results)
    with Journal.resume(tmp_path, IDENTITY) as journal:
        earlier = journal.earlier
    kept = {one.case.id for one in run_results if one.status in ("passed", "failed")}
    assert set(earlier.results) == kept
    assert (earlier.started, earlier.seconds) == (STARTED, 1.5 * len(run_results))


def test_a_torn_last_line_is_left_out_and_written_over(
    tmp_path: Path, run_results: list[Result]
) -> None:
    """A kill in the middle of a write costs one case."""
    path = begin(tmp_path, run_results[:2])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with Journal.resume(tmp_path, IDENTITY) as journal:
        assert list(journal.earlier.results) == [run_results[0].case.id]
        journal.add(run_results[1], seconds=3.0)
    assert path.read_bytes() == whole


def test_a_case_that_was_tried_twice_counts_as_it_ended_last(
    tmp_path: Path, run_results: list[Result]
) -> None:
    """An error of the first part that passed in the second."""
    passed = run_results[0]
    error = Result(case=passed.case, status="error", reason="no memory")
    begin(tmp_path, [error, passed])
    with Journal.resume(tmp_path, IDENTITY) as journal:
        assert journal.earlier.results[passed.case.id].status == "passed"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"suite": "other"}, "suite: parity then, other now"),
        ({"cases": ["a", "c", "d"]}, "cases: 1 only then, 2 only now"),
        ({"inputs": {"m": {"sha": "1"}}}, "inputs: m"),
        ({"code": "new"}, "code: None then, new now"),
    ],
)
def test_another_run_is_refused_and_what_is_other_is_said(
    tmp_path: Path, run_results: list[Result], changes: dict[str, Any], said: str
) -> None:
    """HN102, and the journal stays as it was."""
    path = begin(tmp_path, run_results)
    before = path.read_bytes()
    with pytest.raises(ResumeError, match="HN102") as caught:
        Journal.resume(tmp_path, IDENTITY | changes)
    assert said in str(caught.value)
    assert "help:" in str(caught.value)
    assert path.read_bytes() == before


def damage_middle(text: str) -> str:
    """Break a line that is not the last."""
    lines = text.splitlines(keepends=True)
    lines[1] = lines[1][:30] + "\n"
    return "".join(lines)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _text: "",
        lambda _text: "{}\n",
        lambda text: text.replace('"journal": 1', '"journal": 99'),
        lambda text: text.replace('"status"', '"state"'),
        damage_middle,
    ],
)
def test_a_journal_that_makes_no_sense_is_one_error(
    tmp_path: Path, run_results: list[Result], spoil: Callable[[str], str]
) -> None:
    """Never half a run, and never a traceback."""
    path = begin(tmp_path, run_results)
    path.write_text(spoil(path.read_text("utf-8")), "utf-8")
    with pytest.raises(ResumeError, match="HN102 the journal cannot be read"):
        Journal.resume(tmp_path, IDENTITY)


def test_nothing_to_resume_is_an_error_and_not_a_new_run(tmp_path: Path) -> None:
    """A misspelt directory must not cost an hour."""
    with pytest.raises(ResumeError, match="HN102 there is no run to resume"):
        Journal.resume(tmp_path, IDENTITY)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_do_not_share_a_journal(tmp_path: Path, run_results: list[Result]) -> None:
    """The second is refused and destroys nothing of the first."""
    with Journal.begin(tmp_path, IDENTITY, started=STARTED) as journal:
        journal.add(run_results[0], seconds=1.0)
        with pytest.raises(ResumeError, match="another run is writing"):
            Journal.begin(tmp_path, IDENTITY, started=STARTED)
        with pytest.raises(ResumeError, match="another run is writing"):
            Journal.resume(tmp_path, IDENTITY)
    lines = (tmp_path / FILE_NAME).read_text("utf-8").splitlines()
    assert [next(iter(json.loads(line))) for line in lines] == ["journal", "seconds"]
