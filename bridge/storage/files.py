"""Reading and writing byte ranges of files, from several threads, with clear errors."""

from __future__ import annotations

import math
import os
from pathlib import Path
from threading import Lock
from typing import Any, Final, Self

import numpy as np

from bridge.dtypes import Words
from bridge.errors import CheckpointError, CorruptFileError
from bridge.tiling import Box, Shape

_SMALL_ROW: Final = 4096  # bytes; narrower column slices are cut out of complete rows
_SCRATCH: Final = 1 << 22  # bytes


class FileRanges:
    """Open files of one directory, read by position. Positional reads share no cursor."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._descriptors: dict[str, int] = {}
        self._lock = Lock()

    def _descriptor(self, name: str) -> int:
        with self._lock:
            if name not in self._descriptors:
                try:
                    self._descriptors[name] = os.open(self.directory / name, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(
                        f"cannot open the file: {error.strerror}", where=str(self.directory / name)
                    ) from None
            return self._descriptors[name]

    def read_into(self, name: str, offset: int, out: Words) -> None:
        """Fill a C-contiguous array from `offset` on.

        Raises:
            CorruptFileError: BR302, the file ends first, or the system cannot read it.
        """
        view = memoryview(out.reshape(-1).view("u1").data)
        descriptor = self._descriptor(name)
        while view:
            try:
                count = os.preadv(descriptor, [view], offset)
            except OSError as error:
                raise CorruptFileError(
                    f"cannot read at byte {offset}: {error.strerror}",
                    where=str(self.directory / name),
                ) from None
            if count == 0:
                raise CorruptFileError(
                    f"the file ends at byte {offset}, {len(view)} bytes early",
                    where=str(self.directory / name),
                    hint="copy or download the file again",
                )
            view = view[count:]
            offset += count

    def read_box(
        self,
        name: str,
        offset: int,
        *,
        shape: Shape,
        word: np.dtype[Any],
        box: Box,
        out: Words,
    ) -> None:
        """Fill `out` with a box of a row-major array that starts at `offset` of a file.

        Complete rows are one read. Of column slices, wide ones are read row by row and narrow ones
        cut out of complete rows, in bounded pieces.

        Args:
            name: The file.
            offset: Of the array's first element, in bytes.
            shape: Of the array in the file.
            word: Of its elements.
            box: What to read.
            out: Of shape `box.shape`; may be strided.
        """
        if not box.volume:
            return
        row = math.prod(shape[1:]) * word.itemsize
        if not box.starts or box.shape[1:] == shape[1:]:
            start = offset + (box.starts[0] * row if box.starts else 0)
            if out.flags.c_contiguous:
                self.read_into(name, start, out)
            else:
                scratch = np.empty(box.shape, word)
                self.read_into(name, start, scratch)
                out[...] = scratch
            return
        if box.shape[0] == 1 or (len(shape) > 2 and row > _SCRATCH):
            # Part of one large slice, as of a layer in a stack of layers: never the whole slice.
            inside = Box(box.starts[1:], box.stops[1:])
            for index in range(box.shape[0]):
                start = offset + (box.starts[0] + index) * row
                self.read_box(name, start, shape=shape[1:], word=word, box=inside, out=out[index])
            return
        wanted = math.prod(box.shape[1:]) * word.itemsize
        if len(shape) == 2 and wanted >= _SMALL_ROW and out.strides[-1] == word.itemsize:
            column = box.starts[1] * word.itemsize
            for index in range(box.shape[0]):
                self.read_into(name, offset + (box.starts[0] + index) * row + column, out[index])
            return
        step = max(1, _SCRATCH // row)
        inner = Box(box.starts[1:], box.stops[1:]).slices
        for first in range(box.starts[0], box.stops[0], step):
            last = min(first + step, box.stops[0])
            scratch = np.empty((last - first, *shape[1:]), word)
            self.read_into(name, offset + first * row, scratch)
            out[first - box.starts[0] : last - box.starts[0]] = scratch[(slice(None), *inner)]

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
