"""Directories for what nobody needs after a command, even one that is killed.

Whoever makes one removes those of the same kind that nobody holds any more.
"""

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

_PREFIX: Final = "nemotron-bridge-scratch-"


@contextmanager
def held_directory(parent: Path | None = None, *, prefix: str = _PREFIX) -> Iterator[Path]:
    """Give an empty directory, and remove it afterwards; those of processes killed go first.

    Args:
        parent: Where to make it; None takes TMPDIR or the system's temporary directory.
        prefix: Of its name, and of those that are removed: all of them are held.
    """
    sweep(parent, prefix=prefix)
    directory, lock = _create(prefix, _root(parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def sweep(parent: Path | None, *, prefix: str) -> None:
    """Remove what nobody holds any more. A lock, unlike a process id, ends at a kill.

    Args:
        parent: See `held_directory`.
        prefix: Likewise.
    """
    for left in _root(parent).glob(f"{prefix}*"):
        with suppress(OSError):
            descriptor = _lock(left)
            try:
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(descriptor)


def _root(parent: Path | None) -> Path:
    return parent if parent is not None else Path(tempfile.gettempdir())


def _create(prefix: str, root: Path) -> tuple[Path, int | None]:
    """Make a directory and hold it, whoever sweeps meanwhile.

    Returns:
        The directory, and the descriptor that holds it until it is closed; None where the file
        system has no locks, so that nobody else gets one either, and removes it.
    """
    while True:
        directory = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
        try:
            return directory, _lock(directory)
        # A sibling that sweeps now may take it before it is held: nothing is in it yet, so another
        # will do. That ends, as every sibling sweeps once.
        except (BlockingIOError, FileNotFoundError):
            continue
        except OSError:
            return directory, None


def _lock(directory: Path) -> int:
    """Hold a directory until the descriptor is closed or this process ends.

    Only who holds a directory removes it, so what is held here stays.

    Raises:
        BlockingIOError: Another process does.
        FileNotFoundError: It has been removed, or replaced, before it was held.
        PermissionError: It is another user's.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)  # a FIFO would keep us waiting
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _require_ours(os.fstat(descriptor), directory)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _require_ours(held: os.stat_result, directory: Path) -> None:
    if not os.path.samestat(held, directory.lstat()):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(directory))
    if held.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(directory))
