"""What a conversion reads: which files and tensors, their hashes, and whether they have changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from bridge.crew.protocol import Crew
from bridge.crew.sharing import share_of
from bridge.errors import CorruptFileError, VerificationError
from bridge.hashing import hash_files, hash_tensors
from bridge.manifest import FileEntry, Files, Manifest, Part
from bridge.progress import Advance
from bridge.reading import TransferLimits
from bridge.record import RECORD_NAME, SIDE_DIRECTORY
from bridge.storage.journal import Job, changed, fingerprint
from bridge.storage.megatron import MegatronSource
from bridge.storage.remote import Location, RemotePath
from bridge.storage.safetensors import INDEX_NAME, SafetensorsSource
from bridge.storage.source import TensorSource
from bridge.storage.torch_dist_config import TRACKER_NAME
from bridge.tiling import Box


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSide:
    """What a conversion reads.

    Args:
        root: The directory that file names are in.
        files: Every file, with the tensors in it where its format tells them apart.
        source: The open checkpoint.
        within: Tensors that can be hashed with the file they lie in, wherever that is.
        tensors: Those to hash by themselves.
        watched: Names of files that are too big to be hashed for what is read of them.
    """

    root: Location
    files: Files
    source: TensorSource
    within: Mapping[str, Sequence[Part]] = field(default_factory=dict)
    tensors: Collection[str] = ()
    watched: Collection[str] = ()

    @property
    def names(self) -> list[str]:
        """Every file whose change would be a change of the source."""
        return sorted({*self.files, *self.watched})


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
    weights = [f"{source.directory.name}/{name}" for name in files_below(source.directory)]
    beside = [f"{SIDE_DIRECTORY}/{name}" for name in files_below(source.root / SIDE_DIRECTORY)]
    small = [TRACKER_NAME, *([RECORD_NAME, *beside] if carried else [])]
    files = _sizes(source.root, small if source.ignored else [*small, *weights])
    within = {name: parts for name, parts in _whole_tensors(source).items() if name in files}
    apart = source.tensors.keys() - {part.tensor for parts in within.values() for part in parts}
    return ReadSide(
        root=source.root,
        files=files,
        source=source,
        within=within,
        tensors=[name for name in source.tensors if name in apart],
        watched=weights,
    )


def _whole_tensors(source: MegatronSource) -> dict[str, list[Part]]:
    """The tensors that are one run of bytes of a file here, in the order of the file."""
    found: dict[str, list[Part]] = {}
    runs = []
    for name, info in source.tensors.items():
        extents = source.extents(name, Box.whole(info.shape))
        if extents is not None and len(extents) == 1:
            runs.append((extents[0], name, (0,) * len(info.shape)))
    for (path, offset, nbytes), name, starts in sorted(runs):
        parts = found.setdefault(str(path.relative_to(str(source.root))), [])
        if not parts or parts[-1].offset + parts[-1].nbytes <= offset:  # two may share their bytes
            parts.append(Part(tensor=name, starts=starts, offset=offset, nbytes=nbytes))
    return found


def files_below(directory: Location) -> list[str]:
    """Every file of a directory and those in it, relative; none where it is not there."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Aside:
    """One process's share of what is hashed beside the writing, from files that do not change."""

    side: ReadSide
    files: Files
    tensors: Sequence[str]
    total: int
    """Bytes of all shares."""

    def hash(self, advance: Advance, *, limits: TransferLimits) -> Manifest:
        """Read and hash it, as `hash_files` and `hash_tensors` do."""
        root, source = self.side.root, self.side.source
        within = {name: self.side.within.get(name, ()) for name in self.files}
        files = {
            name: replace(entry, parts=(*entry.parts, *within[name]))
            for name, entry in self.files.items()
        }
        files = hash_files(root, files, limits=limits, advance=advance)
        tensors = hash_tensors(source, self.tensors, limits=limits, advance=advance)
        for name, parts in within.items():
            # Where a tensor lies depends on where the source does: the manifest must not.
            if parts:
                tensors |= {part.tensor: part.sha256 for part in files[name].parts}
                files[name] = replace(files[name], parts=self.files[name].parts)
        return Manifest(source=files, source_tensors=tensors)


def aside(side: ReadSide, *, without: Collection[str] = (), crew: Crew) -> Aside:
    """Divide what is to be hashed of a source by itself.

    Args:
        side: The source.
        without: Files that somebody else hashes: see `bridge.comparison.compare_files`.
        crew: Who divides.
    """
    files = {name: entry for name, entry in side.files.items() if name not in without}
    work = [
        *(("file", name, entry.nbytes) for name, entry in files.items()),
        *(("tensor", name, side.source.tensors[name].nbytes) for name in side.tensors),
    ]
    sizes = [nbytes for *_, nbytes in work]
    mine = share_of(crew, work, sizes)
    return Aside(
        side=side,
        files={name: files[name] for kind, name, _ in mine if kind == "file"},
        tensors=[name for kind, name, _ in mine if kind == "tensor"],
        total=sum(sizes),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceWatch:
    """Whether a source is still what it was when the conversion began.

    Args:
        side: The source.
        job: Says what it was.
        beside: Gives what tells of other files that are read: see `fingerprint`.
    """

    side: ReadSide
    job: Job
    beside: Callable[[], Mapping[str, str]] = dict

    def refuse_changes(self) -> None:
        """Look once more.

        Raises:
            CorruptFileError: BR302, naming the files that have changed.
        """
        root = self.side.root
        if isinstance(root, RemotePath):
            root.forget_listings()
        now = {**fingerprint(root, self.side.names), **self.beside()}
        if moved := changed(self.job.source, now):
            raise CorruptFileError(
                "the source was changed while it was converted",
                where=moved,
                hint="let nobody write to it, and convert again; the target was not created",
            )

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Where the sides differ because the source has changed since, say that instead."""
        try:
            yield
        except VerificationError:
            self.refuse_changes()
            raise
