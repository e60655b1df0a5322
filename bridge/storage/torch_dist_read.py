"""Reading a Megatron `torch_dist` checkpoint by box, whatever layout of ranks wrote it.

`.metadata` says which boxes of which tensor are stored, and in which record of which file. All of
it is checked against the files when the checkpoint is opened; of the tensors only the bytes that
are asked for are read, and no pickle is ever run (`bridge.storage.unpickle`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, Self

from bridge.dtypes import Words
from bridge.errors import CorruptFileError
from bridge.storage.chunks import ChunkReader
from bridge.storage.extents import Extent
from bridge.storage.remote import Location, RemotePath
from bridge.storage.source import TensorInfo
from bridge.storage.torch_dist_config import (
    COMMON_KEY,
    COMMON_NAME,
    METADATA_NAME,
    check_config,
)
from bridge.storage.torch_dist_metadata import (
    RecordRange,
    StoredChunk,
    StoredKey,
    contradiction,
    read_metadata,
    record_problems,
)
from bridge.storage.torch_record import TensorLocation, locate_tensor, read_object
from bridge.tiling import Box

_EDGE: Final = 4096  # bytes; of a zip record of torch.save, headers and pickle take fewer


class TorchDistReader:
    """A `bridge.storage.source.TensorSource` over one iteration's directory; keys are as stored.

    Args:
        directory: The one that holds `.metadata`: see `open_checkpoint`.
        ignore: Keys to leave unchecked until they are read, such as optimizer state.

    Raises:
        CheckpointError: BR300, no checkpoint there.
        CorruptFileError: BR302, another format; or metadata and files contradict each other:
            chunks that do not partition their tensor, records in missing or short files.
    """

    def __init__(
        self, directory: Location, *, ignore: Callable[[str], bool] = lambda _: False
    ) -> None:
        self.directory = directory
        check_config(directory)
        self._metadata = read_metadata(directory / METADATA_NAME)
        self._chunks = ChunkReader(directory, self._locate)
        # A listing answers for the files in it; where that is a URL each question is a request.
        self._listed: Mapping[str, Location] = {child.name: child for child in directory.iterdir()}
        self._locations: dict[tuple[str, int], TensorLocation] = {}
        files = {record.file for _, record in self._metadata.records()}
        problems = record_problems(self._metadata, {name: self._size(name) for name in files})
        for key, stored in self._metadata.tensors.items():
            damage = stored.damage()
            if damage is not None:
                problems.setdefault(key, []).append(f"{key}: {damage}")
        checked = [text for key, texts in problems.items() if not ignore(key) for text in texts]
        if checked:
            raise contradiction(
                "the checkpoint's metadata and its files do not agree", str(directory), checked
            )
        self._damaged = problems  # of ignored keys: reported when one of them is read
        self._ignore = ignore

    def _size(self, name: str) -> int | None:
        path = self._listed.get(name, self.directory / name)
        return path.stat().st_size if path.is_file() else None

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Global shape and dtype of every tensor, by key."""
        return {key: stored.info for key, stored in self._metadata.tensors.items()}

    @property
    def ignored_nbytes(self) -> Mapping[str, int]:
        """Bytes of the tensors that were to be ignored, by the kind of key: `optimizer.*`."""
        found: dict[str, int] = {}
        for key, info in self.tensors.items():
            if self._ignore(key):
                kind = f"{key.split('.')[0]}.*"
                found[kind] = found.get(kind, 0) + info.nbytes
        return found

    @property
    def objects(self) -> Mapping[str, RecordRange]:
        """Where the record of every object is, by key: `_extra_state` and other byte entries."""
        return self._metadata.objects

    def chunks(self, name: str) -> tuple[Box, ...]:
        """The boxes in which a tensor is stored."""
        return tuple(chunk.box for chunk in self._stored(name).chunks)

    def read_into(self, name: str, box: Box, out: Words) -> None:
        """Fill `out` with that box of the tensor; see `ChunkReader.read_into`."""
        self._chunks.read_into(name, self._stored(name), box, out)

    def extents(self, name: str, box: Box) -> list[Extent] | None:
        """Where the box lies, run by run; see `bridge.storage.extents.FileSource`."""
        return self._chunks.extents(name, self._stored(name), box)

    def read_object(self, name: str) -> object:
        """Read an object without running its pickle: see `unpickle.unpickle_object`.

        Raises:
            CorruptFileError: BR302, no such record, or a pickle that asks for more than data.
        """
        self._refuse_damaged(name)
        record = self._metadata.objects[name]
        return read_object(
            self._chunks.bytes_of(record.file),
            record.offset,
            record.length,
            where=f"{self.directory / record.file}: {name}",
        )

    def common(self) -> Mapping[str, object]:
        """What all ranks share: `args`, `iteration`, `checkpoint_version`, `content_metadata`.

        From `common.pt`, or from the object that newer versions of Megatron-Core write instead.
        `args` is an `argparse.Namespace` whose dtypes are `bridge.dtypes.Dtype` and whose
        instances of foreign classes are `unpickle.Inert`.

        Raises:
            CorruptFileError: BR302, neither is there, or it does not hold a dictionary.
        """
        size = self._size(COMMON_NAME)
        path = self.directory / COMMON_NAME
        if size is not None:
            value = read_object(self._chunks.bytes_of(COMMON_NAME), 0, size, where=str(path))
        elif COMMON_KEY in self._metadata.objects:
            value = self.read_object(COMMON_KEY)
            value = value[0] if isinstance(value, list) and len(value) == 1 else value
        else:
            raise CorruptFileError(
                f"the checkpoint has neither {COMMON_NAME} nor {COMMON_KEY}", where=str(path)
            )
        if not isinstance(value, dict):
            raise CorruptFileError(f"holds {type(value).__name__}, not a dict", where=str(path))
        return MappingProxyType(value)

    def _stored(self, name: str) -> StoredKey:
        self._refuse_damaged(name)
        return self._metadata.tensors[name]

    def _refuse_damaged(self, name: str) -> None:
        if name in self._damaged:
            raise contradiction(f"{name} is damaged", str(self.directory), self._damaged[name])

    def _locate(self, name: str, stored: StoredKey, chunk: StoredChunk) -> TensorLocation:
        place = (chunk.record.file, chunk.record.offset)
        location = self._locations.get(place)
        if location is None:
            where = f"{self.directory / chunk.record.file}: {name} {chunk.box}"
            read = self._chunks.bytes_of(chunk.record.file)
            if isinstance(self.directory, RemotePath):
                read = _from_edges(read, chunk.record.offset, chunk.record.length)
            location = locate_tensor(
                read,
                chunk.record.offset,
                chunk.record.length,
                where=where,
            )
            if (location.shape, location.dtype) != (chunk.box.shape, stored.info.dtype):
                raise CorruptFileError(
                    f"the record holds {location.dtype.name} {location.shape}, the metadata says "
                    f"{stored.info.dtype.name} {chunk.box.shape}",
                    where=where,
                )
            self._locations[place] = location
        return location

    def close(self) -> None:
        """Close every file."""
        self._chunks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _from_edges(
    read: Callable[[int, int], bytes], offset: int, length: int
) -> Callable[[int, int], bytes]:
    """Read what describes a record by one request for each of its ends, instead of many."""
    kept: dict[int, bytes] = {}
    end = offset + length

    def read_kept(start: int, count: int) -> bytes:
        for edge in (offset, max(offset, end - _EDGE)):
            stop = min(edge + _EDGE, end)
            if edge <= start and start + count <= stop:
                if edge not in kept:
                    kept[edge] = read(edge, stop - edge)
                return kept[edge][start - edge : start - edge + count]
        return read(start, count)

    return read_kept
