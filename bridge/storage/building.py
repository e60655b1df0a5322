"""Directories that appear whole or not at all, whoever is killed when.

A target NAME is built in a site beside it:

    .NAME.partial/lock       held (flock) by the process that builds; a kill ends that
    .NAME.partial/writers    held (shared) by all that write: workers may outlive their lead
    .NAME.partial/job.json   what is being built, and from what (`bridge.storage.journal`)
    .NAME.partial/done-*     which of its files are complete and on the disk
    .NAME.partial/data/      what becomes NAME, by one rename; with --overwrite by an exchange of
                             names, so that there is a NAME at every moment
    .NAME.partial/old/       the old NAME, where the system cannot exchange names

No reader takes a hidden directory for a checkpoint. The next attempt finds the site, and goes on
with it or sweeps it away.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bridge.errors import CheckpointError, TargetExistsError

LOCK_NAME: Final = "lock"
WRITERS_NAME: Final = "writers"
DATA_NAME: Final = "data"
_LOCKS: Final = frozenset({LOCK_NAME, WRITERS_NAME})
_STRAGGLERS: Final = 30.0
"""Seconds for the workers of a conversion that was killed to notice it."""
_OLD_NAME: Final = "old"
_PARTIAL: Final = ".partial"
_RENAME_EXCHANGE: Final = 2
_AT_FDCWD: Final = -100
_UNSUPPORTED: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


@dataclass(frozen=True, slots=True)
class Site:
    """Where a target is built, while this process holds it."""

    target: Path
    root: Path
    claim: str
    """Of this attempt alone; what the lock file says while it is held."""

    @property
    def data(self) -> Path:
        """What becomes the target."""
        return self.root / DATA_NAME

    def place(self) -> None:
        """Make the target of what was built: the last step, and the only one that shows."""
        sync_directories(self.data)
        if not is_occupied(self.target):
            self.data.rename(self.target)  # an empty directory gives way
        elif not _exchange(self.data, self.target):
            old = self.root / _OLD_NAME
            self.target.rename(old)
            try:
                self.data.rename(self.target)
            except OSError:
                old.rename(self.target)
                raise
        sync_directory(self.target.parent)

    def sweep(self) -> None:
        """Remove what is in the site and is nobody's target."""
        for left in self.root.iterdir():
            if left.name in _LOCKS:
                continue
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()

    def give_back(self) -> None:
        """Put back a target that a killed process had moved aside."""
        old = self.root / _OLD_NAME
        if old.is_dir() and not self.target.exists():
            old.rename(self.target)


def site_of(target: Path) -> Path:
    """The site of a target, whether or not it is there. Links are followed."""
    target = Path(os.path.realpath(target))
    return target.parent / f".{target.name}{_PARTIAL}"


@contextmanager
def building_site(target: Path, *, overwrite: bool) -> Iterator[Site]:
    """Hold the place where a target is built; what earlier attempts left is still in it.

    A link is followed: what it points to is created or replaced. What is in the site when the block
    ends stays there; a site in which nothing is left but the lock goes.

    Raises:
        TargetExistsError: BR304, the target exists and is not an empty directory, or another
            process is building it.
        CheckpointError: BR300, the system refuses.
    """
    target = Path(os.path.realpath(target))
    root = site_of(target)
    try:
        _refuse_existing(target, overwrite=overwrite)
        descriptor = _hold(root, target)
    except OSError as error:
        raise CheckpointError(
            f"cannot create the target: {error.strerror}", where=str(target)
        ) from error
    try:
        site = Site(target, root, uuid.uuid4().hex)
        with refusals(target):
            _wait_for_writers(root, target)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, site.claim.encode(), 0)
            site.give_back()
            _refuse_existing(target, overwrite=overwrite)
        yield site
    finally:
        with suppress(OSError):
            if {left.name for left in root.iterdir()} <= _LOCKS:
                (root / WRITERS_NAME).unlink(missing_ok=True)
                # Whoever waits for this lock finds that it has no name any more: see `_hold`.
                (root / LOCK_NAME).unlink()
                root.rmdir()
        os.close(descriptor)


@contextmanager
def new_directory(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a directory to fill; make the target of it when the block succeeds.

    A failure removes what was built. A kill leaves the site, which the next attempt sweeps. An
    existing target is replaced only with `overwrite`, and only once the new one is complete.

    Raises:
        TargetExistsError: BR304, the target exists and is not an empty directory, or another
            process is building it.
        CheckpointError: BR300, the system refuses.
    """
    with building_site(target, overwrite=overwrite) as site, refusals(site.target):
        try:
            site.sweep()
            site.data.mkdir()
            yield site.data
            site.place()
        finally:
            with suppress(OSError):
                site.sweep()


@contextmanager
def refusals(target: Path) -> Iterator[None]:
    """What the system refuses, as an error that names the target."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write the target: {error.strerror}", where=str(error.filename or target)
        ) from error


def _hold(root: Path, target: Path) -> int:
    """Create a site where there is none, and take its lock.

    Returns:
        The descriptor that holds it until it is closed.
    """
    lock = root / LOCK_NAME
    while True:
        root.mkdir(parents=True, exist_ok=True)
        try:
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


@contextmanager
def writing(root: Path, claim: str) -> Iterator[None]:
    """Be one of those that write in a site, so that no later attempt begins before they end.

    Args:
        root: The site.
        claim: Of the attempt that this process works for.

    Raises:
        CheckpointError: BR300, another attempt has taken over.
    """
    with refusals(root), _locked(root / WRITERS_NAME, fcntl.LOCK_SH):
        if (root / LOCK_NAME).read_text(encoding="utf-8") != claim:
            raise CheckpointError(
                "another attempt has taken over what this one was building", where=str(root)
            )
        yield


def _wait_for_writers(root: Path, target: Path) -> None:
    deadline = time.monotonic() + _STRAGGLERS
    while True:
        try:
            with _locked(root / WRITERS_NAME, fcntl.LOCK_EX):
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
def _locked(path: Path, how: int) -> Iterator[None]:
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


def _refuse_existing(target: Path, *, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise TargetExistsError("the target is a file", where=str(target), hint="give a directory")
    if is_occupied(target) and not overwrite:
        raise TargetExistsError(
            "the target already exists",
            where=str(target),
            hint="choose another directory, or pass --overwrite to replace it once the new one "
            "is complete",
        )


def is_occupied(target: Path) -> bool:
    """Whether there is a directory with anything in it."""
    return target.is_dir() and any(target.iterdir())


def _exchange(one: Path, other: Path) -> bool:
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
