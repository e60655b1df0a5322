"""The directory that `--report` names: looked at before any work, written whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bridge.errors import UsageError

RANK_LOGS: Final = "ranks"
"""The folder of what each rank has logged."""


def report_directory(directory: Path, *, rank_logs: bool = False) -> Path:
    """Make a directory for reports, and see that they can be written there.

    Args:
        directory: Where they are to be.
        rank_logs: Make the folder for those, too.

    Raises:
        UsageError: BR001, they cannot: said before hours are spent on what they are to hold.
    """
    with writing_into(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".probe."):
            pass
        if rank_logs:
            (directory / RANK_LOGS).mkdir(exist_ok=True)
        for path in directory.iterdir():
            if path.suffix in {".json", ".jsonl", ".xml", ".md", ".html"} and path.is_dir():
                raise IsADirectoryError(0, "a report would take the place of a directory", path)
    return directory


@contextmanager
def writing_into(directory: Path) -> Iterator[None]:
    """Turn what the system refuses there into an error with a remedy."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write the report: {error.strerror}",
            where=str(error.filename or directory),
            hint="give --report a directory that can be written to, or a path where one can be "
            "made",
        ) from None
