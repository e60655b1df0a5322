"""Reading and writing byte ranges of files, from several threads, with clear errors."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Final, Self

import numpy as np

from bridge.dtypes import Words
from bridge.errors import CheckpointError, CorruptFileError
from bridge.storage.input_files import links_are_followed, open_input
from bridge.tiling import Box, Shape

_SMALL_ROW: Final = 4096  # bytes; narrower column slices are cut out of complete rows
_SCRATCH: Final = 1 << 22  # bytes


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at a position of an open file."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def kernel_copy(source: int, target: int, nbytes: int, *, offset: int, at: int) -> int:
    """Let the system copy bytes of one open file, from `offset` on, to another, `at` there.

    Returns:
        How many it copied: fewer where it does not do that (other file systems, other systems),
        the source ends, or it refuses to. Copying the rest by hand tells which.
    """
    done = 0
    while done < nbytes and hasattr(os, "copy_file_range"):
        try:
            count = os.copy_file_range(source, target, nbytes - done, offset + done, at + done)
        except OSError:
            break
        if not count:
            break
        done += count
    return done


class FileRanges:
    """Open files of one directory, read by position. Positional reads share no cursor."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._descriptors: dict[str, int] = {}
        self._follow = links_are_followed()  # by whoever opens it; threads read it later
        self._lock = Lock()
        self._buffers: list[Words] = []  # of windows that are closed

    def _descriptor(self, name: str) -> int:
        with self._lock:
            if name not in self._descriptors:
                try:
                    path = self.directory / name
                    self._descriptors[name] = open_input(path, follow=self._follow)
                except OSError as error:
                    raise CheckpointError(
                        f"cannot open the file: {error.strerror}", where=str(self.directory / name)
                    ) from None
            return self._descriptors[name]

    def read_into(self, name: str, offset: int, out: Words) -> None:
        """Fill a C-contiguous array from `offset` on.

        Raises:
            CorruptFileError: BR302, the file ends first.
            CheckpointError: BR300, the system cannot read it.
        """
        view = memoryview(out.reshape(-1).view("u1").data)
        descriptor = self._descriptor(name)
        while view:
            try:
                count = os.preadv(descriptor, [view], offset)
            except OSError as error:
                raise CheckpointError(
                    f"cannot read at byte {offset}: {error.strerror}",
                    where=str(self.directory / name),
                    hint="see to the disk or the network; the file need not be damaged",
                ) from None
            if count == 0:
                raise CorruptFileError(
                    f"the file ends at byte {offset}, {len(view)} bytes early",
                    where=str(self.directory / name),
                    hint="copy or download the file again",
                )
            view = view[count:]
            offset += count

    @contextmanager
    def window(self, name: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        """See bytes of a file for as long as the block lasts.

        They are copied: a file that is mapped, and that somebody cuts short, would end the process
        by a signal when it is looked at.

        Args:
            name: The file.
            offset: Of the first byte.
            nbytes: All of them are in memory at once.

        Raises:
            CorruptFileError, CheckpointError: As `read_into`.
        """
        with self._lock:
            buffer = self._buffers.pop() if self._buffers else np.empty(0, "u1")
        if buffer.size < nbytes:
            buffer = np.empty(nbytes, "u1")
        try:
            self.read_into(name, offset, buffer[:nbytes])
            yield buffer[:nbytes].data
        finally:
            self._buffers.append(buffer)

    def copy_to(self, name: str, offset: int, nbytes: int, *, target: int, at: int) -> None:
        """Copy bytes of a file to an open one, in the kernel where it can.

        Args:
            name: The file to read.
            offset: Of the first byte to read.
            nbytes: How many. Where the kernel cannot, all of them are in memory at once.
            target: Descriptor to write to.
            at: Where the first byte goes.

        Raises:
            CorruptFileError, CheckpointError: As `read_into`.
            OSError: The system refuses to write.
        """
        done = kernel_copy(self._descriptor(name), target, nbytes, offset=offset, at=at)
        if done < nbytes:
            with self.window(name, offset + done, nbytes - done) as view:
                write_at(target, view, at + done)

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

    def release(self, name: str) -> None:
        """Close a file that nobody reads now; reading it again opens it again."""
        with self._lock:
            descriptor = self._descriptors.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)

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
