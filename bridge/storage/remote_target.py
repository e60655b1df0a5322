"""A checkpoint that is written to a URL: visible when it is complete and verified, or never.

No object store can rename a directory or write into the middle of an object. So each file is built
in a staging directory and uploaded whole, and the few files without which no loader takes the
others for a checkpoint come last. A marker object is there from the first moment to the last: the
next attempt knows by it what a killed one has left.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bridge.errors import CheckpointError, TargetExistsError
from bridge.manifest import FileEntry, Files
from bridge.progress import Advance
from bridge.storage.journal import Job, is_job, refuse_other_job
from bridge.storage.remote import RemotePath, backend_errors
from bridge.storage.source import FileLayout, TensorSource
from bridge.storage.staging_directory import HINT, staging_directory, sweep
from bridge.tiling import Tiling
from bridge.transfer import TransferLimits, write_files

logger = logging.getLogger(__name__)

MARKER_NAME: Final = ".nemotron_bridge.partial"
_FOREIGN: Final = frozenset({".gitattributes"})  # the Hub puts one into every new repository
# These make no directories; asked to, some would make a bucket of a name that was mistyped.
_WITHOUT_DIRECTORIES: Final = frozenset(
    {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "tos", "hf", "memory"}
)


@dataclass(slots=True)
class NewPrefix:
    """A checkpoint under construction below a URL. Every process of a crew may have a copy.

    Args:
        place: Where the files go, and can be read from at once.
        staging: Where they are built first; None takes the system's temporary directory.
        last: Names of the small files that make a checkpoint of the others, in the order in which
            they are uploaded at the end.
    """

    place: RemotePath
    staging: Path | None
    last: Sequence[str]
    complete: frozenset[str] = frozenset()
    """Files that an earlier attempt has sent."""
    small: dict[str, bytes] = field(default_factory=dict)
    """What this process has written, or will in the end, besides weights."""

    def effort(self, layout: FileLayout) -> int:
        """Bytes that `write_files` reports of a file: its payloads built, and all of it sent."""
        return layout.payload_nbytes + layout.size

    def is_complete(self, layout: FileLayout) -> bool:
        """Whether an earlier attempt has sent a file already."""
        return layout.path in self.complete

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
        """Build and upload files one by one; see `bridge.transfer.write_files`.

        Raises:
            CheckpointError: BR300, no room to build the largest, or the backend fails.
        """
        entries: dict[str, FileEntry] = {}
        if not layouts:
            sweep(self.staging)  # as `staging_directory` does for whoever has something to build
            return entries
        largest = max(layout.size for layout in layouts)
        with staging_directory(self.staging, needed=largest) as directory:
            for layout in layouts:
                built = directory / layout.path
                try:
                    entries |= write_files(
                        [layout], directory, source, tilings,
                        limits=limits, advance=advance, hashed=hashed,
                    )  # fmt: skip
                except CheckpointError as error:
                    cause = error.__cause__
                    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
                        raise CheckpointError(
                            error.message, where=error.where, hint=HINT
                        ) from cause
                    raise
                upload(built, self.place / layout.path, advance=advance)
                built.unlink()
        return entries

    def write_small_file(self, name: str, data: bytes) -> None:
        """Upload a file, or keep it for the end if it is one of the last."""
        self.small[name] = data
        if name not in self.last:
            write_object(self.place / name, data)

    def written(self) -> RemotePath:
        """The place as it is now: other processes have written to it too."""
        self.place.forget_listings()
        return self.place

    def publish(self) -> None:
        """Upload the last files."""
        for name in self.last:
            if name in self.small:
                write_object(self.place / name, self.small[name])


@contextmanager
def new_prefix(
    target: RemotePath,
    *,
    overwrite: bool,
    staging: Path | None,
    last: Sequence[str],
    job: Job | None = None,
) -> Iterator[NewPrefix]:
    """Give a place below a URL to fill; make a checkpoint of it when the block succeeds.

    A failure removes what was uploaded. A kill leaves objects and their marker, but none of the
    `last` files; the next attempt removes them, or goes on with those that a job says are complete.

    Args:
        target: The directory to create.
        overwrite: Refused where there is something: no store can replace one checkpoint by another
            in one step, and one that is half old and half new is what this module exists to avoid.
        staging: See `NewPrefix`.
        last: See `NewPrefix`.
        job: What is being built. A file counts as complete by its size alone: stores show none
            before it is whole, and what others show is compared with the source in the end.

    Raises:
        TargetExistsError: BR304, the target exists, or somebody is writing it.
        ResumeError: BR306, what an earlier attempt has left cannot be gone on with.
        CheckpointError: BR300, the backend fails.
    """
    claim = _claim(target, overwrite=overwrite, last=last, job=job)
    complete = _complete(target, job) if job is not None and job.resume else frozenset()
    new = NewPrefix(target, staging, last, complete)
    try:
        yield new
        _require(target, claim)
        new.publish()
        _remove_marker(target)
    except BaseException:
        _discard(target, claim, last)
        with suppress(OSError):  # workers that were stopped by a kill have left theirs
            sweep(staging)
        raise


def upload(file: Path, path: RemotePath, *, advance: Advance) -> None:
    """Copy a local file to a URL, in parts as the backend sees fit, and see that all has arrived.

    Raises:
        CheckpointError: BR300, the backend fails, or has stored another number of bytes.
    """
    _make_parent(path)
    size = file.stat().st_size
    counter = _counter(advance)
    try:
        with backend_errors(str(path)):
            path.fs.put_file(str(file), path.path, callback=counter)
    except CheckpointError:
        if counter.stopped is not None:
            raise counter.stopped from None
        raise
    # Some backends report nothing; others again what they had to send twice.
    advance(size - counter.value)
    stored = path.stat().st_size
    if stored != size:
        raise CheckpointError(f"{stored} of {size} bytes have arrived", where=str(path))


def write_object(path: RemotePath, data: bytes) -> None:
    """Store a small file.

    Raises:
        CheckpointError: BR300, the backend fails.
    """
    _make_parent(path)
    try:
        with backend_errors(str(path)):
            path.fs.pipe_file(path.path, data)
    except FileNotFoundError as error:  # of the bucket, or the repository
        raise CheckpointError(
            f"cannot write the file: {error.strerror}",
            where=str(path),
            hint="the bucket or repository must exist",
        ) from None


def _counter(advance: Advance) -> Any:  # noqa: ANN401 - fsspec has no types
    from fsspec.callbacks import Callback

    class Counter(Callback):  # type: ignore[misc]  # as above
        """Reports bytes; keeps what the report raised, which is no failure of the backend."""

        stopped: BaseException | None = None

        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            try:
                advance(inc)
            except BaseException as error:
                self.stopped = error
                raise

    return Counter()


def _make_parent(path: RemotePath) -> None:
    if _has_directories(path):
        with backend_errors(str(path.parent)):
            path.fs.makedirs(path.parent.path, exist_ok=True)


def _claim(target: RemotePath, *, overwrite: bool, last: Sequence[str], job: Job | None) -> str:
    """Clear up after a killed attempt or take it over, refuse what is occupied, set our marker."""
    target.forget_listings()
    if target.is_file():
        raise TargetExistsError("the target is a file", where=str(target), hint="give a directory")
    marker = _read_marker(target)
    if marker is not None:
        if _is_running(marker):
            raise TargetExistsError(
                f"process {marker.get('pid')} on this machine is writing this target",
                where=str(target),
                hint="wait for it, or choose another target",
            )
        if job is not None and job.resume and is_job(marker.get("job")):
            refuse_other_job(marker["job"], job, where=str(target))
            _remove_all(target, first=last, keep=_complete(target, job))
        else:
            logger.info("removing what a killed conversion has left in %s", target)
            _remove_all(target, first=last)
    elif any(child.name not in _FOREIGN for child in _files(target)):
        raise TargetExistsError(
            "the target already exists"
            + (", and --overwrite cannot replace one behind a URL" if overwrite else ""),
            where=str(target),
            hint="choose another place, and remove the old checkpoint when the new one is there: "
            "an object store cannot swap them in one step",
        )
    claim = uuid.uuid4().hex
    held: dict[str, Any] = {"claim": claim, "host": socket.gethostname(), "pid": os.getpid()}
    if job is not None:
        held["job"] = job.to_dict()
    write_object(target / MARKER_NAME, json.dumps(held).encode())
    return claim


def _complete(target: RemotePath, job: Job) -> frozenset[str]:
    """Files of a job that are there, by their size."""
    found = {str(child.relative_to(target)): child.stat().st_size for child in _files(target)}
    return frozenset(name for name, size in job.sizes.items() if found.get(name) == size)


def _has_directories(path: RemotePath) -> bool:
    return not path.protocols & _WITHOUT_DIRECTORIES


def _files(target: RemotePath) -> list[RemotePath]:
    try:
        return list(target.rglob("*"))
    except FileNotFoundError:
        return []


def _read_marker(target: RemotePath) -> Mapping[str, Any] | None:
    """What a marker says; an unreadable one says nothing, but is one."""
    try:
        found = json.loads((target / MARKER_NAME).read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_held_by(target: RemotePath, claim: str) -> bool:
    target.forget_listings()
    return (_read_marker(target) or {}).get("claim") == claim


def _require(target: RemotePath, claim: str) -> None:
    if not _is_held_by(target, claim):
        raise TargetExistsError(
            "another conversion has taken this target over meanwhile",
            where=str(target),
            hint="nothing was made visible and nothing removed; choose another target",
        )


def _is_running(marker: Mapping[str, Any]) -> bool:
    """Whether the writer is a living process of this machine; of another one nobody can tell."""
    pid = marker.get("pid")
    if marker.get("host") != socket.gethostname() or type(pid) is not int:
        return False
    if not 0 < pid < 1 << 31:  # of no process: others than positive ones are groups of them
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's process
    return pid != os.getpid()


def _remove_all(target: RemotePath, *, first: Sequence[str], keep: Collection[str] = ()) -> None:
    """Remove every file, the marker last: as long as any is left, it says what they are.

    Args:
        target: What to empty.
        first: Names whose removal makes that no loader takes the others for a checkpoint.
        keep: Files to leave, relative; the marker stays with them.
    """
    found = [child for child in _files(target) if child.name not in {MARKER_NAME, *_FOREIGN}]
    wanted = [target / name for name in first]
    for child in sorted(found, key=lambda child: (child not in wanted, child)):
        if str(child.relative_to(target)) not in keep:
            _remove(child)
    if keep:
        return
    _remove_marker(target)
    if _has_directories(target) and not _files(target):
        with suppress(FileNotFoundError), backend_errors(str(target)):
            target.fs.rm(target.path, recursive=True)


def _remove_marker(target: RemotePath) -> None:
    _remove(target / MARKER_NAME)


def _remove(path: RemotePath) -> None:
    with suppress(FileNotFoundError), backend_errors(str(path)):
        path.fs.rm_file(path.path)


def _discard(target: RemotePath, claim: str, last: Sequence[str]) -> None:
    try:
        if _is_held_by(target, claim):
            _remove_all(target, first=last)
    except (CheckpointError, OSError) as error:
        logger.warning(
            "what was uploaded could not be removed, the next attempt will do it: %s", error
        )
