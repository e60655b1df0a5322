"""What a `.metadata` file says, as plain data: which box of which key is in which record."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from reprlib import repr as brief

from bridge.dtypes import Dtype
from bridge.errors import CheckpointError, CorruptFileError, DtypeMismatchError
from bridge.storage.input_files import is_plain_name, read_input
from bridge.storage.pickle_objects import Inert
from bridge.storage.remote import Location
from bridge.storage.source import TensorInfo
from bridge.storage.unpickle import unpickle_metadata
from bridge.tiling import Box, Shape, find_overlap

_HINT = "the checkpoint is incomplete or damaged: copy it again, or load another iteration"
_MOST_PLACES = 20  # of the offenders that one error prints


@dataclass(frozen=True, slots=True, order=True)
class RecordRange:
    """The bytes of one record: file relative to the iteration's directory, offset, length."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """One stored box of a global tensor."""

    box: Box
    record: RecordRange


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A global tensor and the chunks that hold it, by their first corner."""

    info: TensorInfo
    chunks: tuple[StoredChunk, ...]

    def damage(self) -> str | None:
        """Why the chunks do not partition the tensor, None if they do."""
        boxes = [chunk.box for chunk in self.chunks]
        whole = Box.whole(self.info.shape)
        for box in boxes:
            if box.volume and box.intersect(whole) != box:
                return f"chunk {box} sticks out of shape {self.info.shape}"
        overlap = find_overlap(boxes)
        if overlap is not None:
            return f"chunks {overlap[0]} and {overlap[1]} overlap"
        stored = sum(box.volume for box in boxes)
        if stored != whole.volume:
            return f"its chunks hold {stored} of {whole.volume} elements"
        return None


@dataclass(frozen=True, slots=True)
class Metadata:
    """All of `.metadata` that says where things are."""

    tensors: Mapping[str, StoredKey]
    objects: Mapping[str, RecordRange]

    def records(self) -> Iterator[tuple[str, RecordRange]]:
        """Every record, with the key it belongs to."""
        for key, stored in self.tensors.items():
            for chunk in stored.chunks:
                yield key, chunk.record
        yield from self.objects.items()


def contradiction(what: str, where: str, problems: Sequence[str]) -> CorruptFileError:
    """One error for many problems of one file or directory, the first of them printed."""
    places = [f"{where}: {problem}" for problem in problems[:_MOST_PLACES]]
    if len(problems) > _MOST_PLACES:
        places.append(f"and {len(problems) - _MOST_PLACES} more")
    return CorruptFileError(what, where=places, hint=_HINT)


def read_metadata(path: Location) -> Metadata:
    """Read a `.metadata` file without running it.

    Raises:
        CheckpointError: BR300, there is none.
        CorruptFileError: BR302, a pickle of something else, chunks without a record, records
            without a chunk, or a path that leaves the directory.
        DtypeMismatchError: BR303, a tensor of a dtype the bridge does not know.
    """
    try:
        data = read_input(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot read the checkpoint's metadata: {error.strerror}", where=str(path), hint=_HINT
        ) from None
    root = unpickle_metadata(data, where=str(path))
    try:
        return _parse(root, str(path))
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"it is no torch.distributed.checkpoint metadata: {error}", where=str(path), hint=_HINT
        ) from None


def _parse(root: object, where: str) -> Metadata:
    fields = _fields(root, "Metadata", "MCoreMetadata")
    records: dict[tuple[str, Shape | None], RecordRange] = {}
    problems: list[str] = []
    for index, info in _dict(fields["storage_data"]).items():
        of_index = _fields(index, "MetadataIndex")
        key, offset = _text(of_index["fqn"]), of_index.get("offset")
        place = (key, None if offset is None else _shape(offset))
        if place in records:
            problems.append(f"{key}: two records for offset {place[1]}")
        records[place] = _record(_fields(info, "_StorageInfo"), key, problems)
    tensors: dict[str, StoredKey] = {}
    objects: dict[str, RecordRange] = {}
    for key, entry in _dict(fields["state_dict_metadata"]).items():
        if isinstance(entry, Inert) and entry.is_a("BytesStorageMetadata"):
            record = records.pop((_text(key), None), None)
            if record is None:
                problems.append(f"{key}: no record")
            else:
                objects[_text(key)] = record
            continue
        tensors[_text(key)] = _tensor(_text(key), entry, records, problems)
    problems += [f"{key}: a record and no chunk at offset {offset}" for key, offset in records]
    if problems:
        raise contradiction("the checkpoint's metadata contradicts itself", where, problems)
    return Metadata(tensors, objects)


def _tensor(
    key: str,
    entry: object,
    records: dict[tuple[str, Shape | None], RecordRange],
    problems: list[str],
) -> StoredKey:
    fields = _fields(entry, "TensorStorageMetadata")
    shape = _shape(fields["size"])
    chunks = []
    for chunk in _list(fields["chunks"]):
        of_chunk = _fields(chunk, "ChunkStorageMetadata")
        starts, sizes = _shape(of_chunk["offsets"]), _shape(of_chunk["sizes"])
        if len(starts) != len(shape) or len(sizes) != len(shape):
            raise ValueError(f"{key}: a chunk of {len(sizes)} dimensions, shape {shape}")
        record = records.pop((key, starts), None)
        if record is None:
            problems.append(f"{key}: no record, or two chunks, at offset {starts}")
            continue
        stops = tuple(start + size for start, size in zip(starts, sizes, strict=True))
        chunks.append(StoredChunk(Box(starts, stops), record))
    chunks.sort(key=lambda chunk: chunk.box.starts)
    info = TensorInfo(shape=shape, dtype=_dtype(key, fields["properties"]))
    return StoredKey(info, tuple(chunks))


def _record(fields: Mapping[str, object], key: str, problems: list[str]) -> RecordRange:
    file, offset, length = _text(fields["relative_path"]), fields["offset"], fields["length"]
    if fields.get("transform_descriptors"):
        raise ValueError(f"{key} is stored compressed: {brief(fields['transform_descriptors'])}")
    if not all(map(is_plain_name, file.split("/"))):
        problems.append(f"{key}: {file!r} is outside the checkpoint")
    sizes = _shape((offset, length))
    return RecordRange(file, sizes[0], sizes[1])


def record_problems(metadata: Metadata, sizes: Mapping[str, int | None]) -> dict[str, list[str]]:
    """Compare records with the files they should be in.

    Args:
        metadata: What should be there.
        sizes: File to its size in bytes, None when it is missing.

    Returns:
        Key to what is wrong with its records: in no file, past a file's end, or sharing bytes
        with a record of another key or chunk.
    """
    problems = defaultdict[str, list[str]](list)
    by_file = defaultdict[str, list[tuple[RecordRange, str]]](list)
    for key, record in metadata.records():
        size = sizes[record.file]
        if size is None:
            problems[key].append(f"{key}: {record.file} is missing")
        elif record.offset + record.length > size:
            problems[key].append(
                f"{key}: bytes {record.offset} to {record.offset + record.length} of "
                f"{record.file}, which ends at {size}"
            )
        by_file[record.file].append((record, key))
    for file, of_file in by_file.items():
        of_file.sort()
        for (one, key), (two, other) in pairwise(of_file):
            if two.offset < one.offset + one.length:
                text = f"{key} and {other} share bytes from {two.offset} on of {file}"
                problems[key].append(text)
                if other != key:
                    problems[other].append(text)
    return problems


def _fields(value: object, *names: str) -> Mapping[str, object]:
    if not isinstance(value, Inert) or not value.is_a(*names):
        raise TypeError(f"expected {names[0]}, found {brief(value)}")
    return _dict(value.state or {})


def _dict(value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise TypeError(f"expected a dict, found {brief(value)}")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, found {brief(value)}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, found {brief(value)}")
    return value


def _shape(value: object) -> Shape:
    if not isinstance(value, tuple) or not all(
        type(extent) is int and 0 <= extent < 1 << 63 for extent in value
    ):
        raise TypeError(f"expected sizes, found {brief(value)}")
    return value


def _dtype(key: str, properties: object) -> Dtype:
    if not isinstance(properties, Inert) or not properties.is_a("TensorProperties"):
        raise TypeError(f"{key}: expected TensorProperties, found {brief(properties)}")
    state = properties.state
    dtype = state[0] if isinstance(state, tuple) and state else properties.field("dtype")
    if not isinstance(dtype, Dtype):
        raise DtypeMismatchError(f"unknown dtype {brief(dtype)}", where=key)
    return dtype
