"""A directory in which files are built before they are uploaded."""

from __future__ import annotations

import errno
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
    root = _root(parent)
    try:
        sweep(parent)
        directory, lock = _create(root)
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


def sweep(parent: Path | None) -> None:
    """Remove what nobody holds any more. A lock, unlike a process id, ends at a kill.

    Args:
        parent: See `staging_directory`.
    """
    for left in _root(parent).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            descriptor = _lock(left)
            try:
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(descriptor)


def _root(parent: Path | None) -> Path:
    return parent if parent is not None else Path(tempfile.gettempdir())


def _create(root: Path) -> tuple[Path, int]:
    """Make a directory and hold it, whoever sweeps meanwhile.

    Returns:
        The directory, and the descriptor that holds it until it is closed.
    """
    while True:
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        # A sibling that sweeps now may take it before it is held: nothing is in it yet, so another
        # will do. That ends, as every sibling sweeps once.
        with suppress(BlockingIOError, FileNotFoundError):
            return directory, _lock(directory)


def _lock(directory: Path) -> int:
    """Hold a directory until the descriptor is closed or this process ends.

    Only who holds a directory removes it, so what is held here stays.

    Raises:
        BlockingIOError: Another process does.
        FileNotFoundError: It has been removed, or replaced, before it was held.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _require_in_place(descriptor, directory)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _require_in_place(descriptor: int, directory: Path) -> None:
    if not os.path.samestat(os.fstat(descriptor), directory.stat()):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(directory))
