"""What a conversion that was cut short had done, so that `--resume` can go on with it.

A `Job` says what is being built and from what. It is written down before the first byte, and each
file once it is complete and on the disk. Whoever goes on must have the same job; then the files
that are noted, and that nobody has touched since, need not be written again. They are compared with
the source like all others before the target appears. What appears has a mark of its job.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeGuard

from bridge import __version__
from bridge.errors import (
    BridgeError,
    CorruptFileError,
    DtypeMismatchError,
    ResumeError,
    VerificationError,
)
from bridge.storage.building import DATA_NAME, DONE, JOB_NAME, Site, building_site
from bridge.storage.disk import refusals, sync_directory
from bridge.storage.remote import Location
from bridge.storage.source import FileLayout
from bridge.strict_json import parse_json

logger = logging.getLogger(__name__)

_FORMAT_VERSION: Final = 1
_MARK: Final = "user.nemotron_bridge.job"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is being built.

    Args:
        what: Everything that decides the bytes of the result, by name; values are digests or words.
        source: Each file that is read, with what tells that it has changed: see `fingerprint`.
        sizes: Bytes of each file that is made.
        resume: Go on with what an earlier attempt has left, if there is something.
    """

    what: Mapping[str, str]
    source: Mapping[str, str]
    sizes: Mapping[str, int]
    resume: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data, to be written down and compared with."""
        return {
            "format_version": _FORMAT_VERSION,
            "what": dict(self.what),
            "source": dict(self.source),
        }


def job_of(
    layouts: Sequence[FileLayout], source: Mapping[str, str], *, resume: bool, **what: str
) -> Job:
    """A job by the files it makes.

    Args:
        layouts: Of all of them; what they hold besides tensors is part of the job.
        source: See `Job`.
        resume: See `Job`.
        what: What else decides the bytes.
    """
    digest = hashlib.sha256()
    for layout in layouts:
        for part in (layout.path, layout.size, layout.literals, layout.payloads):
            digest.update(repr(part).encode())
    everything = {"version of nemotron-bridge": __version__, "files": digest.hexdigest(), **what}
    sizes = {layout.path: layout.size for layout in layouts}
    return Job(what=everything, source=source, sizes=sizes, resume=resume)


def fingerprint(root: Location, names: Iterable[str]) -> dict[str, str]:
    """What tells cheaply whether files have changed: size and time, or what a store has for it.

    Args:
        root: The directory that the names are in.
        names: Those that are not there are left out.
    """
    found = {}
    for name in names:
        path = root / name
        if not path.is_file():
            continue
        mark = f"modified {path.stat().st_mtime_ns}" if isinstance(path, Path) else path.version()
        found[name] = f"{path.stat().st_size} bytes, {mark}"
    return found


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Each file that is no more what it was, in words."""
    return [
        f"{name}: {before.get(name, 'not there')}, then {after.get(name, 'not there')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


@dataclass(frozen=True, slots=True)
class Journal:
    """The notes in a site. Every process of a crew has a copy, and writes to a file of its own."""

    root: Path
    claim: str
    complete: frozenset[str] = frozenset()
    """Files that an earlier attempt has completed, relative to the target."""

    def note(self, layout: FileLayout) -> None:
        """A file is complete, and on the disk."""
        path = self.root / DATA_NAME / layout.path
        # Without its name on the disk a file may be gone after a power cut, and the note not.
        sync_directory(path.parent)
        status = path.stat()
        line = {"file": layout.path, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
        with (self.root / f"{DONE}{socket.gethostname()}-{os.getpid()}").open("ab") as stream:
            stream.write(json.dumps(line).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())


def open_journal(site: Site, job: Job | None) -> Journal | None:
    """Begin to build, or go on where that is asked for and there is something.

    Raises:
        ResumeError: BR306, what is there was built from another source, or is something else.
    """
    if job is None:
        site.sweep()
        site.data.mkdir()
        return None
    found = _read_job(site.root / JOB_NAME) if job.resume else None
    if found is None:
        site.sweep()
        site.data.mkdir()
        _write_whole(site.root / JOB_NAME, json.dumps(job.to_dict(), indent=1).encode())
        return Journal(site.root, site.claim)
    refuse_other_job(found, job, where=str(site.root))
    site.data.mkdir(exist_ok=True)
    complete = _completed(site)
    _keep_only(site.data, complete)
    return Journal(site.root, site.claim, frozenset(complete))


def is_of(site: Site, job: Job) -> bool:
    """Whether what is in a site, if there is anything, was begun for this job."""
    found = _read_job(site.root / JOB_NAME)
    return found is None or dict(found["what"]) == dict(job.what)


def mark(directory: Path, job: Job) -> None:
    """Say of a directory that it is complete, and what it is, as the file system keeps its times.

    So no file of it differs, and no copy says so. Not where a file system keeps no such attributes.
    """
    with suppress(OSError, AttributeError):  # AttributeError: not Linux
        os.setxattr(directory, _MARK, _mark_of(directory, job))


def is_complete(target: Location, job: Job) -> bool:
    """Whether a target has the mark of this job, and nobody has touched it or its source since.

    Nothing is read: it is for what was not verified either.
    """
    try:
        return isinstance(target, Path) and os.getxattr(target, _MARK) == _mark_of(target, job)
    except (OSError, AttributeError):
        return False


def _mark_of(directory: Path, job: Job) -> bytes:
    names = (str(path.relative_to(directory)) for path in directory.rglob("*"))
    files = fingerprint(directory, sorted(names))
    return hashlib.sha256(json.dumps([job.to_dict(), files]).encode()).hexdigest().encode()


def clear_up(target: Path, job: Job) -> None:
    """Do for a complete target what the attempt that made it was killed before."""
    target = Path(os.path.realpath(target))
    with refusals(target):
        sync_directory(target.parent)
    with suppress(BridgeError, OSError), building_site(target, overwrite=True) as site:
        if is_of(site, job):
            site.sweep()


def refuse_other_job(found: Mapping[str, Any], job: Job, *, where: str) -> None:
    """See that what was begun is what is to be gone on with.

    Raises:
        ResumeError: BR306, naming what differs.
    """
    hint = "leave --resume away to start over; what is there is removed then"
    if moved := changed(found["source"], job.source):
        raise ResumeError(
            f"the source has changed since this target was begun: {len(moved)} files",
            where=moved,
            hint=hint,
        )
    if other := changed(found["what"], job.what):
        raise ResumeError(
            "what was begun here is another conversion", where=[where, *other], hint=hint
        )


def is_spoilt(error: BaseException) -> bool:
    """Whether a failure says that what was written is wrong, or that the source is."""
    return isinstance(error, (VerificationError, ResumeError, CorruptFileError, DtypeMismatchError))


def has_progress(site: Site) -> bool:
    """Whether anything is noted that going on would save."""
    try:
        return bool(_completed(site)) or not site.root.is_dir()
    except OSError:
        return True  # what cannot be looked at may be there, as on a mount that has vanished


def say_how_to_go_on(place: str, error: BaseException) -> None:
    """Add to an error that the work so far is kept; log it where the user has ended the work."""
    kept = f"--resume goes on with what is complete; to give it up, remove {place}"
    if isinstance(error, BridgeError):
        error.hint = f"{error.hint}; {kept}" if error.hint else kept
    elif isinstance(error, Exception):
        error.add_note(kept)
    else:
        logger.warning("%s", kept)


def is_job(found: object) -> TypeGuard[dict[str, Any]]:
    """Whether this is what a `Job` wrote down, in the format of today."""
    return (
        isinstance(found, dict)
        and found.get("format_version") == _FORMAT_VERSION
        and isinstance(found.get("what"), dict)
        and isinstance(found.get("source"), dict)
    )


def _read_job(path: Path) -> Mapping[str, Any] | None:
    """The job on record; None where there is none that can be gone on with."""
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if is_job(found) else None


def _completed(site: Site) -> set[str]:
    """Files that are noted, and are as they were when they were noted."""
    found = set()
    for notes in site.root.glob(f"{DONE}*"):
        for line in notes.read_bytes().splitlines():
            try:
                note = parse_json(line)
                name, size, mtime = note["file"], note["size"], note["mtime_ns"]
                status = (site.data / name).stat()
            except (OSError, ValueError, KeyError, TypeError):
                continue  # the line that a kill cut short, or a file that is gone
            if (status.st_size, status.st_mtime_ns) == (size, mtime):
                found.add(name)
    return found


def _keep_only(directory: Path, names: Collection[str]) -> None:
    for path in sorted(directory.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(directory).as_posix() not in names:
            path.unlink()


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all."""
    partial = path.with_name(f"{path.name}.new")
    with partial.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    sync_directory(path.parent)
