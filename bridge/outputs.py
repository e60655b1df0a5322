"""Single files that commands write where the user says."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from bridge.errors import CheckpointError


def check_output(path: Path) -> None:
    """Refuse a file that could not be written, before hours are spent on what it is to hold.

    Raises:
        CheckpointError: BR300, no such directory, a directory itself, or no permission.
    """
    if path.is_dir():
        problem = "is a directory"
    elif not path.parent.is_dir():
        problem = "is in no such directory"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        problem = "is not writable"
    else:
        return
    raise CheckpointError(
        f"the output {problem}", where=str(path), hint="name a file in a directory that is there"
    )


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a killed run, never meets half of it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)  # mkstemp lets nobody else read it; a report is for others
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
