"""A checkpoint under construction, in a directory here or behind a URL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from bridge.errors import UsageError
from bridge.progress import Advance
from bridge.storage.remote import Location, RemotePath
from bridge.storage.remote_target import NewPrefix, new_prefix
from bridge.storage.source import FileLayout, TensorSource
from bridge.storage.target import new_directory, write_small_file
from bridge.tiling import Tiling
from bridge.transfer import TransferLimits, write_files


@dataclass(frozen=True, slots=True)
class NewDirectory:
    """A checkpoint under construction in a directory that nobody looks into yet."""

    place: Path

    def effort(self, layout: FileLayout) -> int:
        """Bytes that `write_files` reports of a file."""
        return layout.payload_nbytes

    def write_files(
        self,
        layouts: Sequence[FileLayout],
        source: TensorSource,
        tilings: Mapping[str, Tiling],
        *,
        limits: TransferLimits,
        advance: Advance,
    ) -> None:
        """Write files in place; see `bridge.transfer.write_files`."""
        write_files(layouts, self.place, source, tilings, limits=limits, advance=advance)

    def write_small_file(self, name: str, data: bytes) -> None:
        """Write a file and see it to the disk."""
        write_small_file(self.place, name, data)

    def written(self) -> Path:
        """Where what is written so far can be read."""
        return self.place


NewCheckpoint: TypeAlias = NewDirectory | NewPrefix


@contextmanager
def new_checkpoint(
    target: Location, *, overwrite: bool, staging: Path | None, last: Sequence[str]
) -> Iterator[NewCheckpoint]:
    """Give a place to fill, and let the target appear when the block succeeds, else nothing.

    Args:
        target: The directory to create.
        overwrite: Replace a directory here, once the new one is complete.
        staging: For a URL, where files are built before their upload.
        last: For a URL, the small files that make a checkpoint of the others; they go last.

    Raises:
        TargetExistsError: BR304, the target exists and is not an empty directory.
        CheckpointError: BR300, the system or the backend refuses.
        UsageError: BR001, a staging directory for a target that needs none.
    """
    if isinstance(target, RemotePath):
        with new_prefix(target, overwrite=overwrite, staging=staging, last=last) as prefix:
            yield prefix
        return
    if staging is not None:
        raise UsageError(
            "a staging directory is for a target behind a URL; files here are written in place",
            where=f"target {target}",
            hint="leave --staging away",
        )
    with new_directory(target, overwrite=overwrite) as directory:
        yield NewDirectory(directory)
