"""The units of a kill matrix on disk, one by one, so that a matrix that was killed goes on.

The first line says what is tried; each of the others is a unit that has ended. A last line that a
kill has torn is left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

from bridge.strict_json import parse_json
from harness.checks import CHECKS
from harness.errors import ResumeError
from harness.faults.units import Matrix, Unit, unit_from_data
from harness.report.files import writing_into
from harness.report.journal import same_run

FILE_NAME: Final = "faults.jsonl"


class UnitJournal:
    """An open journal; use `begin` or `resume`."""

    def __init__(self, directory: Path, file: BinaryIO, earlier: list[Unit]) -> None:
        self._directory = directory
        self._file = file
        self.earlier = earlier
        """Units that an earlier part of the run has left."""

    @classmethod
    def begin(cls, directory: Path, identity: Mapping[str, Any]) -> Self:
        """Start one anew, over whatever was there.

        Args:
            directory: Of the report; must exist.
            identity: What is tried: names to plain data, all of which a resumed run must share.
        """
        with writing_into(directory):
            journal = cls(directory, (directory / FILE_NAME).open("wb"), [])
            journal._write({"identity": identity})
        return journal

    @classmethod
    def resume(cls, directory: Path, identity: Mapping[str, Any]) -> Self:
        """Take one up.

        Raises:
            ResumeError: HN102, there is none, it cannot be read, or it is of another run.
        """
        path = directory / FILE_NAME
        try:
            theirs, earlier, end = _read(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResumeError(
                "there is no kill matrix to resume",
                where=[str(path), str(error)],
                hint="leave --resume away, or give the --report directory of the earlier run",
            ) from None
        same_run(theirs, identity, path)
        with writing_into(directory):
            file = path.open("r+b")
            file.truncate(end)
            file.seek(0, os.SEEK_END)
        return cls(directory, file, earlier)

    def add(self, unit: Unit) -> None:
        """Keep a unit; it is on the disk when this returns."""
        self._write(unit.to_dict())

    def _write(self, record: Mapping[str, Any]) -> None:
        with writing_into(self._directory):
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_matrix(path: Path) -> Matrix:
    """The matrix of the units in a journal, of all faults and checks that took part.

    Raises:
        OSError, ValueError, KeyError, TypeError: It cannot be read, or holds something else.
    """
    identity, units, _ = _read(path)
    took_part = {unit.fault for unit in units}
    looked = {check for unit in units for check in unit.checks}
    return Matrix(
        units=units,
        checks=[name for name in CHECKS if name in looked],
        faults=[name for name in identity["faults"] if name in took_part],
        seconds=sum(unit.seconds for unit in units),
    )


def _read(path: Path) -> tuple[dict[str, Any], list[Unit], int]:
    """What is tried, the units, and where the last whole line ends."""
    whole, newline, _torn = path.read_bytes().rpartition(b"\n")
    header, *units = (parse_json(line) for line in whole.split(b"\n"))
    return header["identity"], [unit_from_data(one) for one in units], len(whole) + len(newline)
