"""The results of a run on disk, case by case, so that a killed run can be taken up again.

`journal.jsonl` has one JSON document a line: first what the run is, then each result as it came.
Every line is flushed to the disk before the next case starts; a last line that a kill has torn is
left out. A journal is only taken up by the same run: other code, cases, limits or inputs would make
a report about nothing that ever was.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

from bridge.strict_json import parse_json
from harness.errors import ResumeError
from harness.report.evidence import case_as_data, result_from_data, strict
from harness.report.files import writing_into
from harness.runner import Result

FILE_NAME: Final = "journal.jsonl"
_VERSION: Final = 1
_KEPT: Final = ("passed", "failed")
"""A verdict stands. What could not be carried out is tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """What an unfinished run has left.

    Args:
        started: When it began.
        results: Verdicts by case id.
        seconds: What it took so far, all its parts together.
    """

    started: str
    results: Mapping[str, Result]
    seconds: float


class Journal:
    """An open journal; use `begin` or `resume`."""

    def __init__(self, file: BinaryIO, earlier: Earlier) -> None:
        self._file = file
        self.earlier = earlier

    @classmethod
    def begin(cls, directory: Path, identity: Mapping[str, Any], *, started: str) -> Self:
        """Start one anew, over whatever was there.

        Args:
            directory: Of the report; must exist.
            identity: What the run is: names to plain data, all of which a resumed run must share.
            started: ISO 8601.

        Raises:
            ResumeError: HN102, another run is writing there.
        """
        file = _open(directory / FILE_NAME)
        file.truncate(0)
        journal = cls(file, Earlier(started=started, results={}, seconds=0.0))
        journal._write({"journal": _VERSION, "started": started, "identity": strict(identity)})
        return journal

    @classmethod
    def resume(cls, directory: Path, identity: Mapping[str, Any]) -> Self:
        """Take one up.

        Raises:
            ResumeError: HN102, there is none, it is not readable, it is of another run, or that run
                is still going on.
        """
        path = directory / FILE_NAME
        if not path.is_file():
            raise ResumeError(
                "there is no run to resume",
                where=str(path),
                hint="leave --resume away, or give the --report directory of the earlier run",
            )
        file = _open(path)
        try:
            header, records, end = _read(file, path)
            same_run(header["identity"], strict(identity), path)
            results = [result_from_data(record["result"]) for record in records]
            earlier = Earlier(
                started=header["started"],
                results={one.case.id: one for one in results if one.status in _KEPT},
                seconds=float(records[-1]["seconds"]) if records else 0.0,
            )
        except (KeyError, TypeError, ValueError) as error:
            file.close()
            raise _unreadable(path, repr(error)) from None
        except ResumeError:
            file.close()
            raise
        file.seek(end)
        file.truncate()
        return cls(file, earlier)

    def add(self, result: Result, *, seconds: float) -> None:
        """Keep a result; it is on the disk when this returns.

        Args:
            result: Of a case that has just ended.
            seconds: What the run has taken so far, its earlier parts included.
        """
        self._write({"seconds": round(seconds, 3), "result": strict(case_as_data(result))})

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file, and of its lock."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open(path: Path) -> BinaryIO:
    """Open for reading and writing, alone: two runs in one journal would be none."""
    with contextlib.ExitStack() as stack:
        with writing_into(path.parent):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        file = stack.enter_context(os.fdopen(descriptor, "r+b"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResumeError(
                "another run is writing there",
                where=str(path),
                hint="wait for it, or give --report another directory",
            ) from None
        stack.pop_all()
        return file


def _read(file: BinaryIO, path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """Header, results, and the byte at which the next line goes."""
    whole, newline, _torn = file.read().rpartition(b"\n")
    records = list(_records(whole, path)) if newline else []
    if not records or records[0].get("journal") != _VERSION:
        raise _unreadable(path, f"it does not begin as a journal of version {_VERSION} does")
    return records[0], records[1:], len(whole) + len(newline)


def _records(whole: bytes, path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(whole.split(b"\n"), start=1):
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise _unreadable(path, f"line {number} is no JSON object")
        yield record


def _unreadable(path: Path, why: str) -> ResumeError:
    return ResumeError(
        "the journal cannot be read",
        where=[str(path), why],
        hint="start over without --resume",
    )


def same_run(theirs: Mapping[str, Any], ours: Mapping[str, Any], path: Path) -> None:
    """Refuse a journal of another run, and say what is other."""
    if not isinstance(theirs, Mapping):
        raise _unreadable(path, "what the run was is no JSON object")
    changed = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if changed:
        raise ResumeError(
            f"the run to resume is another one: {', '.join(changed)} differ",
            where=[
                str(path),
                *(_change(name, theirs.get(name), ours.get(name)) for name in changed),
            ],
            hint="restore what has changed, or start over without --resume",
        )


def _change(name: str, theirs: object, ours: object) -> str:
    """`cases: 2 only then, 0 only now`; of a mapping only the keys that differ."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        return f"{name}: {', '.join(map(str, keys))}"
    if isinstance(theirs, list) and isinstance(ours, list):
        then, now = (
            [one for one in a if one not in b] for a, b in ((theirs, ours), (ours, theirs))
        )
        return f"{name}: {len(then)} only then, {len(now)} only now"
    return f"{name}: {theirs} then, {ours} now"
