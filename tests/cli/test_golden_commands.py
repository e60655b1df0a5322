"""`nemotron-bridge golden`: exit codes, what is printed, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import locations

if TYPE_CHECKING:
    from tests.cli.conftest import Run


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the goldens, which a test may spoil."""
    shutil.copytree(locations.golden_dir(), tmp_path / "golden")
    monkeypatch.setattr(locations, "golden_dir", lambda: tmp_path / "golden")
    monkeypatch.delenv("CI", raising=False)
    return tmp_path / "golden"


@pytest.mark.usefixtures("root")
def test_a_golden_that_holds_exits_with_0(run: Run) -> None:
    """One model, as text and as JSON."""
    outcome = run("golden", "check", "--select", "all-no-op")
    assert (outcome.code, outcome.out) == (0, "1 goldens hold, 0 do not\n")
    outcome = run("golden", "check", "--select", "all-no-op", "--json")
    assert json.loads(outcome.out) == {
        "passed": True,
        "goldens": [{"name": "all-no-op", "passed": True, "problems": []}],
    }


def test_a_golden_that_is_missing_exits_with_1(run: Run, root: Path) -> None:
    """And is named."""
    (root / "cases" / "all-no-op.json").unlink()
    outcome = run("golden", "check", "--select", "all-no-op")
    assert outcome.code == 1
    assert "all-no-op: failed\n  cases/all-no-op.json: missing\n" in outcome.out
    outcome = run("golden", "check", "--select", "all-no-op", "--json")
    assert outcome.code == 1
    assert json.loads(outcome.out)["passed"] is False


def test_an_index_of_another_format_is_one_error(run: Run, root: Path) -> None:
    """HN302, no traceback."""
    (root / "index.json").write_text('{"version": 0}', "utf-8")
    outcome = run("golden", "check", "--select", "all-no-op")
    assert outcome.code == 2
    assert outcome.err.startswith("HN302 a golden of format 0, this release reads format 1")


def test_recording_says_what_it_wrote(run: Run, root: Path) -> None:
    """The removed file is back, bit for bit, with its reason in the index."""
    path = root / "cases" / "all-no-op.json"
    before = path.read_bytes()
    path.unlink()
    outcome = run("golden", "record", "--select", "all-no-op", "--reason", "lost it")
    assert outcome.code == 0
    assert outcome.out == "written: all-no-op\n1 written, 0 unchanged, 0 removed\n"
    assert path.read_bytes() == before
    assert json.loads((root / "index.json").read_text())["recordings"][-1]["reason"] == "lost it"


def test_recording_is_refused_without_a_reason_and_in_ci(
    run: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HN301 and exit code 2; nothing is written."""
    before = (root / "index.json").read_bytes()
    outcome = run("golden", "record")
    assert outcome.code == 2
    assert outcome.err.startswith("HN301 goldens are recorded for a reason")
    monkeypatch.setenv("CI", "1")
    outcome = run("golden", "record", "--reason", "because", "--json")
    assert outcome.code == 2
    assert outcome.err.startswith("HN301 goldens are not recorded in CI")
    assert (root / "index.json").read_bytes() == before
