"""A directory in which files are built before they are uploaded."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from bridge.errors import CheckpointError

HINT: Final = (
    "--staging DIR takes another disk; more tensor and pipeline ranks, or a smaller "
    "--max-shard-size, make smaller files"
)
_PREFIX: Final = "nemotron-bridge-staging-"


@contextmanager
def staging_directory(parent: Path | None, *, needed: int) -> Iterator[Path]:
    """Give an empty directory, and remove it afterwards; those of processes killed go first.

    Args:
        parent: Where to make it; None takes TMPDIR or the system's temporary directory.
        needed: Bytes of the largest file that will be built in it.

    Raises:
        CheckpointError: BR300, there is no room for that file, or the system refuses.
    """
    root = parent if parent is not None else Path(tempfile.gettempdir())
    try:
        _sweep(root)
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        lock = _lock(directory)
    except OSError as error:
        raise CheckpointError(
            f"cannot create a staging directory: {error.strerror}", where=str(root), hint=HINT
        ) from None
    try:
        free = shutil.disk_usage(directory).free
        if free < needed:
            raise CheckpointError(
                f"no room to build a file of {needed / 1e9:.3g} GB before its upload: "
                f"{free / 1e9:.3g} GB are free",
                where=str(root),
                hint=HINT,
            )
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _lock(directory: Path) -> int:
    """Hold a directory as long as this process lives.

    Raises:
        BlockingIOError: Another process does.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _sweep(root: Path) -> None:
    """Remove what nobody holds any more. A lock, unlike a process id, ends at a kill."""
    for left in root.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            descriptor = _lock(left)
            shutil.rmtree(left, ignore_errors=True)
            os.close(descriptor)
