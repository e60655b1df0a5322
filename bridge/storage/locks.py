"""The locks of a site (`bridge.storage.building`): who builds in it, and who still writes there."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bridge.errors import CheckpointError, TargetExistsError
from bridge.storage.disk import make_directories, refusals

LOCK_NAME: Final = "lock"
WRITERS_NAME: Final = "writers"
LOCKS: Final = frozenset({LOCK_NAME, WRITERS_NAME})
PARTIAL: Final = ".partial"
"""How the name of a site ends."""
_STRAGGLERS: Final = 30.0
"""Seconds for the workers of a conversion that was killed to notice it."""
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


def hold(root: Path, target: Path, made: list[Path]) -> int:
    """Create a site where there is none, and take its lock.

    Args:
        root: The site.
        target: Its target.
        made: Takes the directories that had to be made, from the top.

    Returns:
        The descriptor that holds it until it is closed.
    """
    lock = root / LOCK_NAME
    while True:
        make_directories(root, made)
        try:
            _refuse_foreign(root, target)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # whoever held the site has just removed it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise TargetExistsError(
                "another process is building this target",
                where=[str(target), f"its lock {lock}"],
                hint="wait for it, or choose another target",
            ) from None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor  # a file system without locks: nothing keeps a second one away
            os.close(descriptor)
            raise
        os.close(descriptor)


def _refuse_foreign(root: Path, target: Path) -> None:
    """A directory, or link, that only has the name of a site is somebody's."""
    names = set() if root.is_symlink() else {path.name for path in root.iterdir()}
    if root.is_symlink() or (names and LOCK_NAME not in names):
        raise TargetExistsError(
            "what is where the target is to be built was not made for that",
            where=[str(target), str(root)],
            hint="see whose it is; move it, or choose another target",
        )


@contextmanager
def writing(root: Path, claim: str) -> Iterator[None]:
    """Be one of those that write in a site, so that no later attempt begins before they end.

    Args:
        root: The site.
        claim: Of the attempt that this process works for.

    Raises:
        CheckpointError: BR300, another attempt has taken over.
    """
    with refusals(root), locked(root / WRITERS_NAME, fcntl.LOCK_SH):
        if (root / LOCK_NAME).read_text(encoding="utf-8") != claim:
            raise CheckpointError(
                "another attempt has taken over what this one was building", where=str(root)
            )
        yield


def wait_for_writers(root: Path, target: Path) -> None:
    """Let the workers of an attempt that was killed end, before another begins.

    Raises:
        TargetExistsError: BR304, one of them still writes after half a minute.
    """
    deadline = time.monotonic() + _STRAGGLERS
    while True:
        try:
            with locked(root / WRITERS_NAME, fcntl.LOCK_EX):
                return
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            raise TargetExistsError(
                "a worker of an attempt that was killed is still writing this target",
                where=[str(target), f"its lock {root / WRITERS_NAME}"],
                hint="end it, or wait until it ends",
            ) from None


@contextmanager
def locked(path: Path, how: int) -> Iterator[None]:
    """Hold a lock file; BlockingIOError where somebody else does."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)
