"""Each promise, broken by hand, is noticed; one that is kept is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.torture.faults import parse_fault
from harness.torture.judge import Judge
from harness.torture.scenarios import SCENARIOS, Prepared, contents
from harness.torture.warm import Ended

KILL, FLUSH, ERROR = map(parse_fault, ("w9-after", "w9-EIO", "r9-EIO"))
TOLD = "BR300 cannot write the file: No space left on device\n  --> out/model.safetensors\n"
FILES = {"config.json": b"{}", "model.safetensors": b"weights"}


def ended(code: int | None = -9, err: str = "", **seen: object) -> Ended:
    """A run; `struck` and `unsynced` are what the layer saw."""
    return Ended(code=code, seconds=1.0, orphans=(), out="", err=err, seen=seen)


def write(directory: Path, files: dict[str, bytes]) -> None:
    """Make a directory of these files."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A trial's place, with the TMPDIR beside it."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def judge(place: Path, scenario: str = "export", old: dict[str, bytes] | None = None) -> Judge:
    """One whose target is to be `FILES`."""
    write(place.parent / "right", FILES)
    write(place.parent / "old", old or {})
    prepared = Prepared(
        scenario=SCENARIOS[scenario],
        old=contents(place.parent / "old") if old else {},
        right=contents(place.parent / "right"),
        calls=(),
        old_nbytes=0,
        nbytes=0,
        seconds=1.0,
    )
    return Judge(prepared, place)


def test_absent_and_complete_are_right_after_a_kill(place: Path) -> None:
    """Whatever hidden site is beside it."""
    one = judge(place)
    (place / ".out.partial").mkdir()
    assert one.after(ended(), KILL) == "absent"
    write(place / "out", FILES)
    assert one.after(ended(), KILL) == "complete"
    assert one.problems == []


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": b"{}"},
        {**FILES, "model.safetensors": b"weight\0"},
        {**FILES, "more": b""},
    ],
)
def test_a_target_that_is_not_whole_is_wrong(place: Path, files: dict[str, bytes]) -> None:
    """A file short, a byte that differs, a file too many."""
    one = judge(place)
    write(place / "out", files)
    assert one.after(ended(), KILL) == "wrong"
    assert "is not right" in one.problems[0]


def test_an_old_target_is_there_until_the_new_one_is(place: Path) -> None:
    """Absent is wrong, and so is a mixture."""
    one = judge(place, "export-over", old={"config.json": b"old"})
    write(place / "out", {"config.json": b"old"})
    assert one.after(ended(), KILL) == "old"
    assert one.problems == []
    write(place / "out", {"model.safetensors": b"weights"})
    assert one.after(ended(), KILL) == "wrong"
    for path in (place / "out").iterdir():
        path.unlink()
    (place / "out").rmdir()
    assert one.after(ended(), KILL) == "wrong"
    assert "it is absent" in one.problems[-1]


def test_objects_are_no_checkpoint_before_their_last(place: Path) -> None:
    """A store may hold weights; with config.json they are a checkpoint."""
    one = judge(place, "export-store")
    target = place / "bucket" / "out"
    write(target, {"model.safetensors": b"weights", ".nemotron_bridge.partial": b""})
    assert one.after(ended(), KILL) == "absent"
    assert one.problems == []
    write(target, {"config.json": b"{}", "model.safetensors": b"half"})
    assert one.after(ended(), KILL) == "wrong"


def test_what_looks_like_a_checkpoint_beside_the_target_is_wrong(place: Path) -> None:
    """Hidden or not at the end, where nothing may be left."""
    one = judge(place)
    (place / "out.new").mkdir()
    one.after(ended(), KILL)
    assert one.problems == ["out.new is left beside the target"]
    end = judge(place)
    write(place / "out", FILES)
    (place / "out.new").rmdir()
    (place / ".out.partial").mkdir()
    (place.parent / "tmp" / "staging").mkdir()
    end.at_the_end(ended(0))
    assert end.problems == [
        ".out.partial is left beside the target",
        "staging is left in TMPDIR",
    ]


@pytest.mark.parametrize(
    ("run", "problem"),
    [
        (ended(3, "Traceback (most recent call last)\nOSError: x\n"), "traceback: OSError: x"),
        (ended(2, "it broke\n"), "tells of 0 errors"),
        (ended(2, TOLD + TOLD), "tells of 2 errors"),
        (ended(1, TOLD), "exits with 1"),
        (ended(None), "it hangs"),
        (ended(0), "the target is absent"),
    ],
)
def test_an_error_is_told_once_with_a_code(place: Path, run: Ended, problem: str) -> None:
    """And the exit code is that of bad input, or of a machine that refuses."""
    one = judge(place)
    one.after(run, ERROR)
    assert problem in " | ".join(one.problems)


def test_an_error_that_is_told_is_right(place: Path) -> None:
    """One code; 1 only where a check failed."""
    one = judge(place)
    one.after(ended(2, TOLD), ERROR)
    one.after(ended(1, "BR305 side files are not those that were imported\n"), ERROR)
    assert (one.problems, one.errors) == ([], ["BR300", "BR305"])


def test_a_flush_that_fails_is_never_passed_over(place: Path) -> None:
    """The bytes look right, and may not be on the disk."""
    write(place / "out", FILES)
    one = judge(place)
    one.after(ended(0, struck=f"fsync {place}/out/config.json"), FLUSH)
    assert one.problems == ["a flush failed, and it exits with 0"]
    other = judge(place)
    other.after(ended(0, struck=f"copy_file_range {place}/out/config.json"), FLUSH)
    assert other.problems == []


def test_success_is_durable(place: Path) -> None:
    """What is not on the disk when a command exits with 0 is a broken promise."""
    write(place / "out", FILES)
    one = judge(place)
    one.at_the_end(ended(0, unsynced=["the names in ."]))
    assert one.problems == ["it exits with 0, and the names in . would not outlive a loss of power"]


def test_the_last_run_has_to_succeed(place: Path) -> None:
    """With the right bytes."""
    one = judge(place)
    one.at_the_end(ended(2, TOLD))
    assert one.problems[0].startswith("taken up again, it exits with 2: BR300")
    assert one.problems[1] == "taken up again, the target is absent"


def test_processes_that_stay_are_a_problem(place: Path) -> None:
    """Of a command whose first process is gone."""
    one = judge(place)
    one.after(Ended(code=-9, seconds=1.0, orphans=(7, 8), out="", err=""), KILL)
    assert one.problems == ["2 of its processes outlive it"]
