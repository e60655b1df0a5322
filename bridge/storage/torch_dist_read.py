"""Reading a Megatron `torch_dist` checkpoint by box, whatever layout of ranks wrote it.

`.metadata` says which boxes of which tensor are stored, and in which record of which file. All of
it is checked against the files when the checkpoint is opened; of the tensors only the bytes that
are asked for are read, and no pickle is ever run (`bridge.storage.unpickle`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, Self

import numpy as np

from bridge.dtypes import Words
from bridge.errors import CorruptFileError
from bridge.storage.extents import Extent, flat_index, in_order, is_contiguous
from bridge.storage.remote import Location, RemotePath
from bridge.storage.remote_ranges import open_ranges
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
from bridge.tiling import Box, Shape

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
        self._files = open_ranges(directory)
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

    def _size(self, name: str) -> int | None:
        path = self._listed.get(name, self.directory / name)
        return path.stat().st_size if path.is_file() else None

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Global shape and dtype of every tensor, by key."""
        return {key: stored.info for key, stored in self._metadata.tensors.items()}

    @property
    def objects(self) -> Mapping[str, RecordRange]:
        """Where the record of every object is, by key: `_extra_state` and other byte entries."""
        return self._metadata.objects

    def chunks(self, name: str) -> tuple[Box, ...]:
        """The boxes in which a tensor is stored."""
        return tuple(chunk.box for chunk in self._stored(name).chunks)

    def read_into(self, name: str, box: Box, out: Words) -> None:
        """Fill `out`, of shape `box.shape` and the dtype's word, with that box of the tensor.

        `out` may be strided. Only what is needed is read: runs of complete rows at once, wide
        column slices row by row, narrow ones out of complete rows.

        Raises:
            CorruptFileError: BR302, a record that is not what the metadata says.
        """
        stored = self._stored(name)
        if out.shape != box.shape or not _inside(box, stored.info.shape):
            raise ValueError(f"{box} of {name}, shape {stored.info.shape}, into {out.shape}")
        for chunk in _touched(stored, box):
            common = chunk.box.intersect(box)
            if common is None:
                continue
            location = self._locate(name, stored, chunk)
            # The ellipsis keeps a scalar's place a view.
            place: tuple[Any, ...] = (*common.relative_to(box).slices, ...)
            self._read_part(
                chunk.record.file,
                location.offset,
                location.shape,
                stored.info.dtype.word,
                common.relative_to(chunk.box),
                out[place],
            )

    def extents(self, name: str, box: Box) -> list[Extent] | None:
        """Where the box lies, run by run; see `bridge.storage.extents.FileSource`."""
        if isinstance(self.directory, RemotePath):
            return None
        stored = self._stored(name)
        itemsize = stored.info.dtype.itemsize
        parts = []
        for chunk in _touched(stored, box):
            common = chunk.box.intersect(box)
            if common is None:
                continue
            part = common.relative_to(chunk.box)
            if not is_contiguous(part, chunk.box.shape):
                return None
            location = self._locate(name, stored, chunk)
            start = location.offset + flat_index(part.starts, location.shape) * itemsize
            extent = Extent(self.directory / chunk.record.file, start, common.volume * itemsize)
            parts.append((common.relative_to(box), [extent]))
        return in_order(box.shape, parts)

    def read_object(self, name: str) -> object:
        """Read an object without running its pickle: see `unpickle.unpickle_object`.

        Raises:
            CorruptFileError: BR302, no such record, or a pickle that asks for more than data.
        """
        self._refuse_damaged(name)
        record = self._metadata.objects[name]
        return read_object(
            self._reader(record.file),
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
            value = read_object(self._reader(COMMON_NAME), 0, size, where=str(path))
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

    def _reader(self, file: str) -> Callable[[int, int], bytes]:
        def read(offset: int, length: int) -> bytes:
            out = np.empty(length, "u1")
            self._files.read_into(file, offset, out)
            return out.tobytes()

        return read

    def _locate(self, name: str, stored: StoredKey, chunk: StoredChunk) -> TensorLocation:
        place = (chunk.record.file, chunk.record.offset)
        location = self._locations.get(place)
        if location is None:
            where = f"{self.directory / chunk.record.file}: {name} {chunk.box}"
            read = self._reader(chunk.record.file)
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

    def _read_part(
        self, file: str, offset: int, shape: Shape, word: np.dtype[Any], part: Box, out: Words
    ) -> None:
        """Read a box of one chunk: one matrix at a time unless its rows are complete."""
        if len(shape) <= 2 or part.shape[1:] == shape[1:]:
            self._files.read_box(file, offset, shape=shape, word=word, box=part, out=out)
            return
        inner = Box(part.starts[1:], part.stops[1:])
        stride = math.prod(shape[1:]) * word.itemsize
        for index in range(part.shape[0]):
            start = offset + (part.starts[0] + index) * stride
            self._read_part(file, start, shape[1:], word, inner, out[index])

    def close(self) -> None:
        """Close every file."""
        self._files.close()

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


def _inside(box: Box, shape: Shape) -> bool:
    return len(box.starts) == len(shape) and all(
        stop <= extent for stop, extent in zip(box.stops, shape, strict=True)
    )


def _touched(stored: StoredKey, box: Box) -> Iterator[StoredChunk]:
    """Chunks that may share elements with the box: by their rows, which they are sorted by."""
    if not box.starts:
        yield from stored.chunks
        return
    last = bisect_left(stored.chunks, box.stops[0], key=lambda chunk: chunk.box.starts[0])
    for chunk in stored.chunks[:last]:
        if chunk.box.stops[0] > box.starts[0]:
            yield chunk
