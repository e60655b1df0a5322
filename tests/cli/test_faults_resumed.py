"""A matrix of faults that was killed goes on where it ended."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.faults.journal import FILE_NAME
from harness.faults.units import Unit

if TYPE_CHECKING:
    from tests.cli.conftest import Outcome, Run

SELECT = ("--select", "rope-theta", "--select", "norm-centred", "--toys", "tied")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, str]]:
    """The fault and the dtype of every unit that processes were asked for; each is killed."""
    found: list[tuple[str | None, str]] = []

    def over_benches(
        _function: object, arguments: Sequence[tuple[Any, ...]], **_: object
    ) -> Iterator[tuple[int, Any]]:
        for number, (name, toy, checks, compute, _enough) in enumerate(arguments):
            found.append((name, compute.dtype))
            yield (
                number,
                []
                if name is None
                else Unit(
                    fault=name, toy=toy, dtype=compute.dtype, killed_by=("logits",), first="x",
                    checks=tuple(checks), seconds=1.0,
                ),
            )  # fmt: skip

    monkeypatch.setattr("harness.faults.matrix.over_benches", over_benches)
    return found


def faults(run: Run, report: Path, *more: str) -> Outcome:
    """Run the command; two faults on one toy in two dtypes."""
    return run("faults", *SELECT, "--dtypes", "float32,bfloat16", "--report", str(report), *more)


def units_of(report: Path) -> list[Any]:
    """Of the matrix that was written."""
    found: list[Any] = json.loads((report / "faults.json").read_text())["units"]
    return found


def test_what_a_kill_has_left_is_not_run_again(
    asked: list[tuple[str | None, str]], run: Run, tmp_path: Path
) -> None:
    """The healthy model is: without it the matrix means nothing. A torn line is none."""
    assert faults(run, tmp_path).code == 0
    whole = units_of(tmp_path)
    assert len(whole) == 4
    journal = tmp_path / FILE_NAME
    header, first, second, *_ = journal.read_text().splitlines()
    journal.write_text(f"{header}\n{first}\n{second[:40]}")
    asked.clear()
    found = faults(run, tmp_path, "--resume")
    assert found.code == 0, found.err
    kept = json.loads(first)
    assert (kept["fault"], kept["dtype"]) not in asked
    assert len([name for name, _ in asked if name is not None]) == 3
    assert {dtype for name, dtype in asked if name is None} == {"float32", "bfloat16"}
    assert units_of(tmp_path) == whole
    assert len(journal.read_text().splitlines()) == 5


def test_without_the_flag_all_is_run_anew(
    asked: list[tuple[str | None, str]], run: Run, tmp_path: Path
) -> None:
    """Over the journal that is there."""
    faults(run, tmp_path)
    before = list(asked)
    faults(run, tmp_path)
    assert asked == before * 2
    assert len((tmp_path / FILE_NAME).read_text().splitlines()) == 5


@pytest.mark.usefixtures("asked")
def test_a_matrix_of_something_else_is_refused(run: Run, tmp_path: Path) -> None:
    """HN102 says what is other; the journal stays."""
    faults(run, tmp_path)
    before = (tmp_path / FILE_NAME).read_bytes()
    found = faults(run, tmp_path, "--resume", "--checks", "logits")
    assert found.code == 2
    assert "HN102" in found.err
    assert "the run to resume is another one: checks differ" in found.err
    assert (tmp_path / FILE_NAME).read_bytes() == before


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "there is no kill matrix to resume"),
        ("", "there is no kill matrix to resume"),
        ("{}\n", "files that no run of nemotron-bridge has left"),
        ("no JSON\n", "files that no run of nemotron-bridge has left"),
        ('{"identity": {}}\n[]\n', "there is no kill matrix to resume"),
    ],
)
def test_what_is_no_journal_is_refused(
    run: Run, tmp_path: Path, text: str | None, says: str
) -> None:
    """And left alone."""
    if text is not None:
        (tmp_path / FILE_NAME).write_text(text)
    found = faults(run, tmp_path, "--resume")
    assert says in found.err
    assert not (tmp_path / "faults.json").exists()
    assert text is None or (tmp_path / FILE_NAME).read_text() == text


def test_there_is_nothing_to_resume_without_a_report(run: Run) -> None:
    """Refused before anything is run."""
    found = run("faults", "--resume")
    assert "without the report of the earlier run" in found.err
