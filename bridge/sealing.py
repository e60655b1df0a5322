"""Hash both sides of a conversion and write the manifest, by all processes that share the work."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from bridge.crew.protocol import Crew
from bridge.crew.sharing import share_of
from bridge.errors import BridgeError, ResumeError, VerificationError
from bridge.manifest import (
    FileEntry,
    Files,
    Manifest,
    Part,
    differences,
    entry_of,
    hash_files,
    hash_tensors,
    read_manifest,
)
from bridge.progress import Progress
from bridge.reading import TransferLimits
from bridge.record import RECORD_NAME, SIDE_DIRECTORY, sha256_of
from bridge.storage.building import building_site, sync_directory
from bridge.storage.journal import Job
from bridge.storage.megatron import MegatronSource
from bridge.storage.new_checkpoint import NewCheckpoint
from bridge.storage.remote import Location, RemotePath
from bridge.storage.remote_target import MARKER_NAME
from bridge.storage.safetensors import INDEX_NAME, SafetensorsSource
from bridge.storage.source import FileLayout, TensorSource
from bridge.storage.target import MANIFEST_NAME, read_small_file
from bridge.storage.torch_dist_config import TRACKER_NAME


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSide:
    """What a conversion reads.

    Args:
        root: The directory that file names are in.
        files: Every file, with the tensors in it where it tells them apart.
        source: The open checkpoint.
        tensors: Those to hash by themselves.
        watched: Names of files that are too big to be hashed for what is read of them.
    """

    root: Location
    files: Files
    source: TensorSource
    tensors: Collection[str] = ()
    watched: Collection[str] = ()

    @property
    def names(self) -> list[str]:
        """Every file whose change would be a change of the source."""
        return sorted({*self.files, *self.watched})


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """What hashing found; empty where it was not asked for."""

    source: Files = field(default_factory=dict)
    target: Files = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)


def hf_side(source: SafetensorsSource, side_files: Iterable[str]) -> ReadSide:
    """What an import reads: weights, index, and the files that are carried."""
    files = {
        header.file: FileEntry(
            nbytes=(source.directory / header.file).stat().st_size,
            parts=tuple(
                Part(
                    tensor=name,
                    starts=(0,) * len(stored.info.shape),
                    offset=stored.offset,
                    nbytes=stored.info.nbytes,
                )
                for name, stored in header.tensors.items()
            ),
        )
        for header in source.headers.values()
    }
    small = _sizes(source.directory, [*side_files, INDEX_NAME])
    return ReadSide(root=source.directory, files={**small, **files}, source=source)


def megatron_side(source: MegatronSource) -> ReadSide:
    """What an export reads: the model's tensors, and the files of the iteration.

    Where the files hold an optimizer's state as well, which is far bigger than the model and is not
    read, they are watched and not hashed.
    """
    weights = [f"{source.directory.name}/{name}" for name in _below(source.directory)]
    carried = [f"{SIDE_DIRECTORY}/{name}" for name in _below(source.root / SIDE_DIRECTORY)]
    small = [TRACKER_NAME, RECORD_NAME, *carried]
    hashed = small if source.ignored else [*small, *weights]
    return ReadSide(
        root=source.root,
        files=_sizes(source.root, hashed),
        source=source,
        tensors=tuple(source.tensors),
        watched=weights,
    )


def _below(directory: Location) -> list[str]:
    if not directory.is_dir():
        return []
    paths: Iterable[Location] = directory.rglob("*")
    root = PurePosixPath(str(directory))
    return [str(PurePosixPath(str(path)).relative_to(root)) for path in paths if path.is_file()]


def _sizes(root: Location, names: Iterable[str]) -> dict[str, FileEntry]:
    return {
        name: FileEntry(nbytes=(root / name).stat().st_size)
        for name in sorted(set(names))
        if (root / name).is_file()
    }


def seal(
    source: ReadSide,
    layouts: Sequence[FileLayout],
    new: NewCheckpoint,
    *,
    crew: Crew,
    limits: TransferLimits,
    progress: Progress,
) -> Sealed:
    """Hash what was read and what was written, as it can be read now; each process its share.

    Of `new` only the files laid out: `write_manifest` adds the small ones.
    """
    target = {layout.path: entry_of(layout) for layout in layouts}
    tensors = {name: source.source.tensors[name].nbytes for name in source.tensors}
    work = [
        *(("source", name, entry.nbytes) for name, entry in source.files.items()),
        *(("target", name, entry.nbytes) for name, entry in target.items()),
        *(("tensor", name, nbytes) for name, nbytes in tensors.items()),
    ]
    sizes = [nbytes for *_, nbytes in work]
    mine = share_of(crew, work, sizes)

    def of(kind: str) -> list[str]:
        return [name for one, name, _ in mine if one == kind]

    with crew.phase(progress, "hash", sum(sizes)) as advance:
        read = {name: source.files[name] for name in of("source")}
        written = {name: target[name] for name in of("target")}
        found = Sealed(
            source=hash_files(source.root, read, limits=limits, advance=advance),
            target=hash_files(new.written(), written, limits=limits, advance=advance),
            tensors=hash_tensors(source.source, of("tensor"), limits=limits, advance=advance),
        )
        shares = crew.gather(found)
    return Sealed(
        source={name: one for share in shares for name, one in share.source.items()},
        target={name: one for share in shares for name, one in share.target.items()},
        tensors={name: one for share in shares for name, one in share.tensors.items()},
    )


def seal_live(
    layouts: Sequence[FileLayout],
    new: NewCheckpoint,
    *,
    what: Mapping[str, str],
    crew: Crew,
    limits: TransferLimits,
    progress: Progress,
) -> None:
    """Hash what a live model was written to, each process its share, and write the manifest.

    It names no files that were read, and is the last of the small files to be written.
    """
    entries = {layout.path: entry_of(layout) for layout in layouts}
    sizes = [entry.nbytes for entry in entries.values()]
    mine = share_of(crew, list(entries), sizes)
    with crew.phase(progress, "hash", sum(sizes)) as advance:
        written = {name: entries[name] for name in mine}
        shares = crew.gather(hash_files(new.written(), written, limits=limits, advance=advance))
    if crew.rank == 0:
        found = {name: entry for share in shares for name, entry in share.items()}
        write_manifest(Sealed(target=found), new, what)


def tensor_hashes(files: Files, names: Iterable[str]) -> dict[str, str]:
    """sha256 of tensors that files hold whole, in the order of `names`; empty without hashes."""
    found = {part.tensor: part.sha256 for entry in files.values() for part in entry.parts}
    return {name: found[name] for name in names} if found else {}


def write_manifest(sealed: Sealed, new: NewCheckpoint, what: Mapping[str, str]) -> None:
    """Write the manifest, the last of the small files, on rank 0; nothing where all is unhashed.

    Raises:
        VerificationError: BR305, a small file is not what was written.
    """
    if not sealed.target:
        return
    small = {}
    for name, data in new.small.items():
        small[name] = FileEntry(nbytes=len(data), sha256=sha256_of(data))
        path = new.written() / name
        if path.is_file() and read_small_file(path) != data:  # behind a URL some come last
            raise VerificationError(
                "a file differs after reading it back",
                where=name,
                hint="suspect the disk or the memory: the target was not created",
            )
    manifest = Manifest(
        what=what,
        source=sealed.source,
        source_tensors=sealed.tensors,
        target={**sealed.target, **small},
    )
    new.write_small_file(MANIFEST_NAME, manifest.to_json())


def is_done_already(
    target: Location, source: ReadSide, job: Job, *, crew: Crew, limits: TransferLimits
) -> Manifest | None:
    """Whether the target is what this job makes, complete: so an attempt killed at its very end.

    Both sides are read and hashed, for nothing else tells.

    Returns:
        Its manifest; None where there is no target of this job.

    Raises:
        ResumeError: BR306, the source is not what the target was made from.
        VerificationError: BR305, the target is not what it was.
    """
    if isinstance(target, RemotePath) and (target / MARKER_NAME).is_file():
        return None  # somebody began and did not end, be the manifest there already
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
    changed = differences(source.root, read, limits=limits, advance=_ignore)
    tensors = list(source.tensors)[crew.rank :: crew.size]
    hashes = hash_tensors(source.source, tensors, limits=limits, advance=_ignore)
    changed += [name for name, one in hashes.items() if found.source_tensors.get(name) != one]
    damaged = differences(target, written, limits=limits, advance=_ignore)
    shares = crew.gather((changed, damaged))
    if changed := sorted(text for share, _ in shares for text in share):
        raise ResumeError(
            "the target is complete, and its source has changed since",
            where=changed,
            hint="--overwrite instead of --resume converts it anew",
        )
    if damaged := sorted(text for _, share in shares for text in share):
        raise VerificationError(
            "the target was completed, and has been damaged since",
            where=damaged,
            hint="--overwrite instead of --resume converts it anew",
        )
    if crew.rank == 0 and isinstance(target, Path):
        with suppress(BridgeError, OSError), building_site(target, overwrite=True) as site:
            sync_directory(site.target.parent)  # the attempt that was killed may not have
            site.sweep()
    return found


def _ignore(_: int) -> None:
    """Progress that nobody watches."""
