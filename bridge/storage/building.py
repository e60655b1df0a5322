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

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bridge.errors import CheckpointError, TargetExistsError
from bridge.storage.disk import (
    exchange,
    refusals,
    remove_directory,
    sync_directories,
    sync_directory,
)
from bridge.storage.existing import is_occupied, refuse_existing
from bridge.storage.locks import LOCK_NAME, LOCKS, PARTIAL, WRITERS_NAME, hold, wait_for_writers

DATA_NAME: Final = "data"
JOB_NAME: Final = "job.json"
DONE: Final = "done-"
_OLD_NAME: Final = "old"
_OURS: Final = (DATA_NAME, _OLD_NAME, f"{JOB_NAME}*", f"{DONE}*")
"""What may be swept from a site; anything else in it is somebody's."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where a target is built, while this process holds it."""

    target: Path
    root: Path
    claim: str
    """Of this attempt alone; what the lock file says while it is held."""
    overwrite: bool
    """Whether what is there gives way."""

    @property
    def data(self) -> Path:
        """What becomes the target."""
        return self.root / DATA_NAME

    def place(self) -> None:
        """Make the target of what was built: the last step, and the only one that shows.

        Raises:
            TargetExistsError: BR304, something has come there meanwhile that is not to give way.
        """
        sync_directories(self.data)
        mode = self.target.stat().st_mode if self.target.is_dir() else None
        if not (self.overwrite and is_occupied(self.target)):
            self._enter()
        elif self._may_replace() and not exchange(self.data, self.target):
            old = self.root / _OLD_NAME
            try:
                self.target.rename(old)
                self.data.rename(self.target)
            except BaseException:  # Ctrl-C between the two, too
                self.give_back()
                raise
        if mode is not None:  # not before: what its owner may not write to cannot be moved
            self.target.chmod(mode)
        sync_directory(self.target.parent)

    def _enter(self) -> None:
        try:
            self.data.rename(self.target)  # an empty directory gives way
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
            raise TargetExistsError(
                "something has come to where the target was to be",
                where=str(self.target),
                hint="see whose it is; move it, or choose another directory",
            ) from None

    def _may_replace(self) -> bool:
        refuse_existing(self.target, overwrite=True)
        return True

    def sweep(self) -> None:
        """Remove what is in the site, is ours and is nobody's target."""
        self.give_back()
        for left in [path for pattern in _OURS for path in self.root.glob(pattern)]:
            if left.is_dir() and not left.is_symlink():
                remove_directory(left)
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
    return target.parent / f".{target.name}{PARTIAL}"


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
    made: list[Path] = []
    try:
        refuse_existing(target, overwrite=overwrite)
        descriptor = hold(root, target, made)
    except OSError as error:
        is_long = error.errno == errno.ENAMETOOLONG
        raise CheckpointError(
            f"cannot create the target: {error.strerror}",
            where=str(target),
            hint=f"it is built as {root.name}: give it a shorter name" if is_long else None,
        ) from error
    try:
        site = Site(target, root, uuid.uuid4().hex, overwrite)
        with refusals(target):
            wait_for_writers(root, target)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, site.claim.encode(), 0)
            site.give_back()
            refuse_existing(target, overwrite=overwrite)
        yield site
    finally:
        with suppress(OSError):
            if {left.name for left in root.iterdir()} <= LOCKS:
                (root / WRITERS_NAME).unlink(missing_ok=True)
                # Whoever waits for this lock finds that it has no name any more: see `_hold`.
                (root / LOCK_NAME).unlink()
                for path in reversed(
                    list(dict.fromkeys(made)) or [root]
                ):  # parents of ours go while they are empty
                    path.rmdir()
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
