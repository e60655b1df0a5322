"""The directory that `--report` names: looked at before any work, written whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bridge.errors import UsageError
from bridge.storage.target import MANIFEST_NAME

RANK_LOGS: Final = "ranks"
"""The folder of what each rank has logged."""
_DATA: Final = {
    "alarms.json": b'"alarms"', "bench.json": b'"code_sha256"', "evidence.json": b'"code_sha256"',
    "faults.json": b'"killed_by"', "faults.jsonl": b'"identity"', "fuzz.json": b'"kinds"',
    "journal.jsonl": b'"identity"', "torture.json": b'"code_sha256"',
}  # fmt: skip
"""The files that all others of a run are made from, and what is in each."""
REPORTS: Final = frozenset(
    {
        *_DATA, "bench.md", "faults.html", "junit.xml", "report.html", "report.md",
        "memory-by-budget.svg", "memory-by-size.svg", "rate-by-budget.svg", "time-by-size.svg",
    }
)  # fmt: skip
"""Every file that a run replaces in the directory of an earlier one."""


_OF_CHECKPOINTS: Final = (
    MANIFEST_NAME, "latest_checkpointed_iteration.txt", ".metadata", "model*.safetensors*",
)  # fmt: skip


def report_directory(directory: Path, *, rank_logs: bool = False) -> Path:
    """Make a directory for reports, and see that they can be written there.

    Args:
        directory: Where they are to be.
        rank_logs: Make the folder for those, too.

    Raises:
        UsageError: BR001, they cannot, would replace what no run has left, or lie in a checkpoint:
            said before hours are spent on what they are to hold.
    """
    if any(True for pattern in _OF_CHECKPOINTS for _ in directory.glob(pattern)):
        raise UsageError(
            "a report does not belong into a checkpoint",
            where=str(directory),
            hint="give --report another directory",
        )
    with writing_into(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".probe."):
            pass
        for path in directory.iterdir():
            if path.suffix in {".json", ".jsonl", ".xml", ".md", ".html"} and path.is_dir():
                raise IsADirectoryError(0, "a report would take the place of a directory", path)
        found = {name: directory / name for name in REPORTS if (directory / name).is_file()}
        data = {name: word for name, word in _DATA.items() if name in found}
        ours = any(word in found[name].read_bytes() for name, word in data.items())
        is_lost = any(path.stat().st_size for path in found.values())
    if is_lost and not ours:
        raise UsageError(
            "a report would replace files that no run of nemotron-bridge has left",
            where=[str(path) for _, path in sorted(found.items())],
            hint="give --report another directory, or move them",
        )
    with writing_into(directory):
        if rank_logs:
            (directory / RANK_LOGS).mkdir(exist_ok=True)
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
