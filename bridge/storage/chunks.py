"""Boxes of global tensors that are stored in chunks: which chunks, and where in their files."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np

from bridge.dtypes import Words
from bridge.storage.extents import Extent, flat_index, in_order, is_contiguous
from bridge.storage.remote import Location, RemotePath
from bridge.storage.remote_ranges import open_ranges
from bridge.storage.torch_dist_metadata import StoredChunk, StoredKey
from bridge.storage.torch_record import TensorLocation
from bridge.tiling import Box, Shape

Locate = Callable[[str, StoredKey, StoredChunk], TensorLocation]
"""Key, what is stored of it and one of its chunks, to where that chunk's elements lie."""


class ChunkReader:
    """Reads boxes of the tensors below a directory.

    Args:
        directory: Chunks name their files relative to it.
        locate: Finds a chunk's elements in its file; asked each time.
    """

    def __init__(self, directory: Location, locate: Locate) -> None:
        self.directory = directory
        self.files = open_ranges(directory)
        self._locate = locate

    def read_into(self, name: str, stored: StoredKey, box: Box, out: Words) -> None:
        """Fill `out`, of shape `box.shape` and the dtype's word, with that box of the tensor.

        `out` may be strided. Only what is needed is read: runs of complete rows at once, wide
        column slices row by row, narrow ones out of complete rows.

        Raises:
            CorruptFileError: BR302, a record that is not what the metadata says.
        """
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

    def extents(self, name: str, stored: StoredKey, box: Box) -> list[Extent] | None:
        """Where the box lies, run by run; see `bridge.storage.extents.FileSource`."""
        if isinstance(self.directory, RemotePath):
            return None
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

    def _read_part(
        self, file: str, offset: int, shape: Shape, word: np.dtype[Any], part: Box, out: Words
    ) -> None:
        """Read a box of one chunk: one matrix at a time unless its rows are complete."""
        if len(shape) <= 2 or part.shape[1:] == shape[1:]:
            self.files.read_box(file, offset, shape=shape, word=word, box=part, out=out)
            return
        inner = Box(part.starts[1:], part.stops[1:])
        stride = math.prod(shape[1:]) * word.itemsize
        for index in range(part.shape[0]):
            start = offset + (part.starts[0] + index) * stride
            self._read_part(file, start, shape[1:], word, inner, out[index])

    def bytes_of(self, file: str) -> Callable[[int, int], bytes]:
        """Reader of a file's bytes: (offset, length) to exactly that many."""

        def read(offset: int, length: int) -> bytes:
            out = np.empty(length, "u1")
            self.files.read_into(file, offset, out)
            return out.tobytes()

        return read

    def close(self) -> None:
        """Close every file."""
        self.files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
