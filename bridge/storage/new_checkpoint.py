"""A checkpoint under construction, in a directory here or behind a URL."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

from bridge.errors import CheckpointError, UsageError
from bridge.manifest import Files
from bridge.progress import Advance
from bridge.storage.building import building_site, new_directory
from bridge.storage.disk import refusals
from bridge.storage.journal import (
    Job,
    Journal,
    has_progress,
    is_spoilt,
    mark,
    open_journal,
    say_how_to_go_on,
)
from bridge.storage.locks import writing
from bridge.storage.remote import Location, RemotePath
from bridge.storage.remote_target import NewPrefix, new_prefix
from bridge.storage.source import FileLayout, TensorSource
from bridge.storage.target import write_small_file
from bridge.tiling import Tiling
from bridge.transfer import TransferLimits, write_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NewDirectory:
    """A checkpoint under construction in a directory that nobody looks into yet."""

    place: Path
    journal: Journal | None = None
    small: dict[str, bytes] = field(default_factory=dict)
    """What this process has written besides weights."""

    def effort(self, layout: FileLayout) -> int:
        """Bytes that `write_files` reports of a file."""
        return layout.payload_nbytes

    def is_complete(self, layout: FileLayout) -> bool:
        """Whether an earlier attempt has written a file already."""
        return self.journal is not None and layout.path in self.journal.complete

    def write_files(
        self,
        layouts: Sequence[FileLayout],
        source: TensorSource,
        tilings: Mapping[str, Tiling],
        *,
        limits: TransferLimits,
        advance: Advance,
        hashed: bool = False,
    ) -> Files:
        """Write files in place; see `bridge.transfer.write_files`."""
        write = partial(
            write_files, layouts, self.place, source, tilings,
            limits=limits, advance=advance, hashed=hashed,
        )  # fmt: skip
        if self.journal is None:
            return write()
        with writing(self.journal.root, self.journal.claim):
            return write(done=self.journal.note)

    def write_small_file(self, name: str, data: bytes) -> None:
        """Write a file and see it to the disk."""
        write_small_file(self.place, name, data)
        self.small[name] = data

    def written(self) -> Path:
        """Where what is written so far can be read."""
        return self.place


NewCheckpoint: TypeAlias = NewDirectory | NewPrefix


@contextmanager
def new_checkpoint(
    target: Location,
    *,
    overwrite: bool,
    staging: Path | None,
    last: Sequence[str],
    job: Job | None = None,
) -> Iterator[NewCheckpoint]:
    """Give a place to fill, and let the target appear when the block succeeds, else nothing.

    Args:
        target: The directory to create.
        overwrite: Replace a directory here, once the new one is complete.
        staging: For a URL, where files are built before their upload.
        last: For a URL, the small files that make a checkpoint of the others; they go last.
        job: What is being built. With one a kill, and here a failure too, leaves the files that
            are complete for `Job.resume` to go on with; without one nothing is gone on with.

    Raises:
        TargetExistsError: BR304, the target exists and is not an empty directory.
        ResumeError: BR306, what an earlier attempt has left cannot be gone on with.
        CheckpointError: BR300, the system or the backend refuses.
        UsageError: BR001, a staging directory for a target that needs none.
    """
    if isinstance(target, RemotePath):
        with new_prefix(target, overwrite=overwrite, staging=staging, last=last, job=job) as prefix:
            yield prefix
        return
    if staging is not None:
        raise UsageError(
            "a staging directory is for a target behind a URL; files here are written in place",
            where=f"target {target}",
            hint="leave --staging away",
        )
    if job is None:
        with new_directory(target, overwrite=overwrite) as directory:
            yield NewDirectory(directory)
        return
    with building_site(target, overwrite=overwrite) as site:
        try:
            with refusals(site.target):
                journal = open_journal(site, job)
        except CheckpointError:
            if not has_progress(site):
                with suppress(OSError):
                    site.sweep()
            raise
        try:
            with refusals(site.target):
                yield NewDirectory(site.data, journal)
                mark(site.data, job)
                site.place()
        except BaseException as error:
            if has_progress(site) and not is_spoilt(error):
                say_how_to_go_on(str(site.root), error)
            else:
                with suppress(OSError):
                    site.sweep()
            raise
        try:
            site.sweep()
        except OSError as error:  # the target is complete all the same
            logger.warning(
                "what was replaced, or built on the way, is left in %s: %s",
                site.root, error.strerror,
            )  # fmt: skip
