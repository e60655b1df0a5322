"""The manifest of a conversion: written last, and what tells a later attempt that all is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from bridge.crew.protocol import Crew
from bridge.crew.sharing import share_of
from bridge.errors import BridgeError, ResumeError, VerificationError
from bridge.hashing import differences, hash_tensors
from bridge.manifest import FileEntry, Files, Manifest, read_manifest
from bridge.manifest_check import come_since
from bridge.progress import unwatched
from bridge.read_side import ReadSide, files_below
from bridge.reading import TransferLimits
from bridge.record import sha256_of
from bridge.storage.journal import Job, changed, clear_up, is_complete
from bridge.storage.new_checkpoint import NewCheckpoint, NewDirectory
from bridge.storage.remote import Location, RemotePath
from bridge.storage.remote_target import MARKER_NAME
from bridge.storage.target import MANIFEST_NAME, read_small_file


def tensor_hashes(files: Files, names: Iterable[str]) -> dict[str, str]:
    """sha256 of tensors that files hold whole, in the order of `names`; empty without hashes."""
    found = {part.tensor: part.sha256 for entry in files.values() for part in entry.parts}
    return {name: found[name] for name in names} if found else {}


def write_manifest(hashes: Manifest, new: NewCheckpoint, what: Mapping[str, str]) -> None:
    """Write the manifest, the last of the small files, on rank 0; nothing where all is unhashed.

    Raises:
        VerificationError: BR305, a small file is not what was written.
    """
    if not hashes.target:
        return
    small = {}
    for name, data in new.small.items():
        small[name] = FileEntry(nbytes=len(data), sha256=sha256_of(data))
        _refuse_other_bytes(new, name, data)
    manifest = replace(hashes, what=what, target={**hashes.target, **small})
    data = manifest.to_json()
    new.write_small_file(MANIFEST_NAME, data)
    _refuse_other_bytes(new, MANIFEST_NAME, data)
    if isinstance(new, NewDirectory):
        found = dict.fromkeys(files_below(new.place), "there")
        expected = dict.fromkeys((*manifest.target, MANIFEST_NAME), "there")
        if wrong := changed(expected, found):
            raise VerificationError(
                "the files of the target are not those that were written",
                where=wrong,
                hint="see who else writes there: the target was not created",
            )


def _refuse_other_bytes(new: NewCheckpoint, name: str, data: bytes) -> None:
    path = new.written() / name
    if isinstance(path, RemotePath) and not path.is_file():
        return  # behind a URL some come last
    if not path.is_file() or read_small_file(path) != data:
        raise VerificationError(
            "a file differs after reading it back",
            where=name,
            hint="suspect the disk or the memory: the target was not created",
        )


def is_done_already(
    target: Location,
    source: ReadSide,
    job: Job,
    *,
    crew: Crew,
    limits: TransferLimits,
    hashed: bool,
    overwrite: bool,
) -> Manifest | None:
    """Whether the target is what this job makes, complete: so an attempt killed at its very end.

    Where hashes are asked for both sides are read and hashed; else the target's mark tells.

    Returns:
        Its manifest, an empty one without hashes; None where there is no target of this job, or one
        that is not what it was or would be now, and that is to be overwritten.

    Raises:
        ResumeError: BR306, the source is not what the target was made from.
        VerificationError: BR305, the target is not what it was.
    """
    if isinstance(target, RemotePath) and (target / MARKER_NAME).is_file():
        return None  # somebody began and did not end, be the manifest there already
    if not hashed:
        marked = crew.gather(is_complete(target, job))[0]
        if marked and crew.rank == 0 and isinstance(target, Path):
            clear_up(target, job)
        return Manifest() if marked else None
    found: Manifest | None = None
    with suppress(BridgeError):  # what is there is refused elsewhere, in better words
        found = read_manifest(target)
    if found is None or dict(found.what) != dict(job.what):
        return None
    names = [*(("source", name) for name in found.source), *(("t", name) for name in found.target)]
    entries = [*found.source.values(), *found.target.values()]
    mine = share_of(crew, names, [entry.nbytes for entry in entries])
    read = {name: found.source[name] for side, name in mine if side == "source"}
    written = {name: found.target[name] for side, name in mine if side != "source"}
    moved = differences(source.root, read, limits=limits, advance=unwatched)
    moved += [f"{name}: not there before" for name in source.files.keys() - found.source.keys()]
    tensors = list(source.tensors)[crew.rank :: crew.size]
    hashes = hash_tensors(source.source, tensors, limits=limits, advance=unwatched)
    moved += [name for name, one in hashes.items() if found.source_tensors.get(name) != one]
    damaged = differences(target, written, limits=limits, advance=unwatched)
    if crew.rank == 0:
        damaged += [f"{name}: was not there" for name in come_since(target, found)[0]]
    shares = crew.gather((moved, damaged))
    if overwrite and any(map(any, shares)):
        return None  # it is the old one: what was begun in its place may be gone on with
    if moved := sorted(text for share, _ in shares for text in share):
        raise ResumeError(
            "the target is complete, and its source has changed since",
            where=moved,
            hint="--overwrite instead of --resume converts it anew",
        )
    if damaged := sorted(text for _, share in shares for text in share):
        raise VerificationError(
            "the target was completed, and has been damaged since",
            where=damaged,
            hint="--overwrite instead of --resume converts it anew",
        )
    if crew.rank == 0 and isinstance(target, Path):
        clear_up(target, job)
    return found


def done_notes(done: Manifest) -> tuple[str, ...]:
    """What to say where there was nothing to do."""
    hashed = "has the hashes of its manifest, like its source"
    unhashed = "neither it nor its source was changed since; no hash says more (--verify none)"
    return (f"nothing to do: the target was complete, and {hashed if done.target else unhashed}",)
