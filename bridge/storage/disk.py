"""What is asked of the system about names: made, exchanged, on the disk; and what it refuses."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bridge.errors import CheckpointError

_RENAME_EXCHANGE: Final = 2
_AT_FDCWD: Final = -100
_UNSUPPORTED: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


@contextmanager
def refusals(target: Path) -> Iterator[None]:
    """What the system refuses, as an error that names the target."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write the target: {error.strerror}", where=str(error.filename or target)
        ) from error


def remove_directory(directory: Path) -> None:
    """Remove a directory of ours with all that is in it, write-protected or not."""
    for root, _, _ in os.walk(directory):
        mode = Path(root).stat().st_mode
        if mode & stat.S_IRWXU != stat.S_IRWXU:
            Path(root).chmod(mode | stat.S_IRWXU)
    shutil.rmtree(directory)


def make_directories(directory: Path, made: list[Path]) -> None:
    """Make a directory and its parents, with their names on the disk.

    Args:
        directory: May be there.
        made: Takes those that had to be made, from the top.
    """
    missing = []
    path = directory
    while not os.path.lexists(path):
        missing.append(path)
        path = path.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        made.append(path)
        sync_directory(path.parent)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step.

    Returns:
        False where the system or the file system cannot: nothing has happened then.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other)
    if rename(*names, _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(other))


def sync_directories(directory: Path) -> None:
    """Bring the names of all files below a directory to the disk."""
    for path in (directory, *(path for path in directory.rglob("*") if path.is_dir())):
        sync_directory(path)


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
