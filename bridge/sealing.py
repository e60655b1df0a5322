"""Hash both sides of a conversion and write the manifest, by all processes that share the work."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from bridge.crew.protocol import Crew
from bridge.crew.sharing import share_of
from bridge.errors import BridgeError, ResumeError, VerificationError
from bridge.hashing import differences, hash_files, hash_tensors
from bridge.manifest import FileEntry, Files, Manifest, Part, entry_of, read_manifest
from bridge.manifest_check import come_since
from bridge.progress import Progress
from bridge.reading import TransferLimits
from bridge.record import RECORD_NAME, SIDE_DIRECTORY, sha256_of
from bridge.storage.journal import Job, changed, clear_up, is_complete
from bridge.storage.megatron import MegatronSource
from bridge.storage.new_checkpoint import NewCheckpoint, NewDirectory
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


def megatron_side(source: MegatronSource, *, carried: bool = True) -> ReadSide:
    """What an export reads: the model's tensors, and the files of the iteration.

    With `carried` what an import has laid beside them is read, too.

    Where the files hold an optimizer's state as well, which is far bigger than the model and is not
    read, they are watched and not hashed.
    """
    weights = [f"{source.directory.name}/{name}" for name in _below(source.directory)]
    beside = [f"{SIDE_DIRECTORY}/{name}" for name in _below(source.root / SIDE_DIRECTORY)]
    small = [TRACKER_NAME, *([RECORD_NAME, *beside] if carried else [])]
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
    source: ReadSide | None,
    layouts: Sequence[FileLayout],
    new: NewCheckpoint,
    *,
    crew: Crew,
    limits: TransferLimits,
    progress: Progress,
) -> Sealed:
    """Hash what was read and what was written, as it can be read now; each process its share.

    Of `new` only the files laid out: `write_manifest` adds the small ones. What a live model was
    written to has no source.
    """
    target = {layout.path: entry_of(layout) for layout in layouts}
    files = source.files if source is not None else {}
    tensors: dict[str, int] = {}
    if source is not None:
        tensors = {name: source.source.tensors[name].nbytes for name in source.tensors}
    work = [
        *(("source", name, entry.nbytes) for name, entry in files.items()),
        *(("target", name, entry.nbytes) for name, entry in target.items()),
        *(("tensor", name, nbytes) for name, nbytes in tensors.items()),
    ]
    sizes = [nbytes for *_, nbytes in work]
    mine = share_of(crew, work, sizes)

    def of(kind: str) -> list[str]:
        return [name for one, name, _ in mine if one == kind]

    with crew.phase(progress, "hash", sum(sizes)) as advance:
        found = Sealed()
        if source is not None:
            read = {name: files[name] for name in of("source")}
            found = Sealed(
                source=hash_files(source.root, read, limits=limits, advance=advance),
                tensors=hash_tensors(source.source, of("tensor"), limits=limits, advance=advance),
            )
        written = {name: target[name] for name in of("target")}
        found = replace(
            found, target=hash_files(new.written(), written, limits=limits, advance=advance)
        )
        shares = crew.gather(found)
    return Sealed(
        source={name: one for share in shares for name, one in share.source.items()},
        target={name: one for share in shares for name, one in share.target.items()},
        tensors={name: one for share in shares for name, one in share.tensors.items()},
    )


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
        _refuse_other_bytes(new, name, data)
    manifest = Manifest(
        what=what,
        source=sealed.source,
        source_tensors=sealed.tensors,
        target={**sealed.target, **small},
    )
    data = manifest.to_json()
    new.write_small_file(MANIFEST_NAME, data)
    _refuse_other_bytes(new, MANIFEST_NAME, data)
    if isinstance(new, NewDirectory):
        found = dict.fromkeys(_below(new.place), "there")
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
        return Manifest(source={}, target={}) if marked else None
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
    moved = differences(source.root, read, limits=limits, advance=_ignore)
    moved += [f"{name}: not there before" for name in source.files.keys() - found.source.keys()]
    tensors = list(source.tensors)[crew.rank :: crew.size]
    hashes = hash_tensors(source.source, tensors, limits=limits, advance=_ignore)
    moved += [name for name, one in hashes.items() if found.source_tensors.get(name) != one]
    damaged = differences(target, written, limits=limits, advance=_ignore)
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


def _ignore(_: int) -> None:
    """Progress that nobody watches."""
