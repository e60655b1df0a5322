"""Single files that commands write where the user says."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bridge.errors import CheckpointError, TargetExistsError
from bridge.storage.disk import sync_directory


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse a file that could not be written, before hours are spent on what it is to hold.

    Raises:
        CheckpointError: BR300, no such directory, none that can be written to, or no plain file.
        TargetExistsError: BR304, it is there, and not to be replaced.
    """
    if path.is_dir():
        problem = "is a directory"
    elif path.exists() and not path.is_file():
        problem = "is a device or a pipe"
    elif not path.parent.is_dir():
        problem = "is in no such directory"
    elif not os.access(_home(path), os.W_OK):
        problem = "is in a directory that cannot be written to"
    else:
        _refuse_existing(path, overwrite=overwrite)
        return
    raise CheckpointError(
        f"the output {problem}", where=str(path), hint="name a file in a directory that is there"
    )


def _home(path: Path) -> Path:
    """Where a file lies, links followed: they stay, and what they lead to is replaced."""
    return Path(os.path.realpath(path)).parent


def _refuse_existing(path: Path, *, overwrite: bool) -> None:
    if os.path.lexists(path) and not overwrite:
        raise TargetExistsError(
            "the output already exists",
            where=str(path),
            hint="name another file, or pass --overwrite to replace it once the new one is "
            "complete",
        )


@contextmanager
def new_output(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a file to fill; let it appear when the block succeeds, whole and on the disk.

    Args:
        path: Where it appears.
        overwrite: In place of one that is there.

    Raises:
        TargetExistsError: BR304, one has come there meanwhile that is not to be replaced.
    """
    partial = _home(path) / f".nemotron-bridge-{uuid.uuid4().hex}"
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL, 0o666))
    try:
        mode = partial.stat().st_mode  # as the umask has it
        yield partial
        partial.chmod(mode)
        with partial.open("rb") as file:  # whoever filled it may have made it anew
            os.fsync(file.fileno())
        _refuse_existing(path, overwrite=overwrite)
        partial.replace(os.path.realpath(path))
        sync_directory(partial.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: str | bytes, *, overwrite: bool = True) -> None:
    """Write a file so that a reader, or a killed run, never meets half of it; see `new_output`."""
    with new_output(path, overwrite=overwrite) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
