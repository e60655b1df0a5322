"""What moving and comparing tensors share: the limits, and how a box of a tiled tensor is read.

Either as runs of bytes of files, which nothing of ours has to touch, or band by band through a
buffer, where elements are picked out of rows, padded, or generated.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np

from bridge.dtypes import Words
from bridge.storage.extents import Extent, FileSource, in_order
from bridge.storage.source import TensorSource
from bridge.tiling import Box, Tiling, bands

_Result = TypeVar("_Result")

DEFAULT_MEMORY_BUDGET: Final = 1 << 30
SEGMENT_NBYTES: Final = 64 << 20
"""Of what one thread does at a time, as long as there is so much."""
_MAX_BAND: Final = 16 << 20  # bytes; larger bands only leave the processor's caches
_MIN_BAND: Final = 64 << 10
_MAX_WINDOW: Final = 4 << 20  # bytes; read, then looked at, by each thread: in the caches still


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferLimits:
    """How much memory and how many threads a conversion may use.

    Args:
        memory_budget: Bytes for buffers, over all threads.
        threads: Concurrent tiles. Reading, checksums and writing release the interpreter's lock.
    """

    memory_budget: int = DEFAULT_MEMORY_BUDGET
    threads: int = min(4, os.cpu_count() or 1)

    @property
    def band_nbytes(self) -> int:
        """Bytes of one buffer, of which there are at most four for each thread.

        Two that are compared, or one that is written and one that is hashed meanwhile; and as many
        of scratch.
        """
        return max(_MIN_BAND, min(_MAX_BAND, self.memory_budget // (4 * self.threads)))

    @property
    def window_nbytes(self) -> int:
        """Bytes of a file that are looked at together. Two such windows take no more than bands.

        A multiple of every element's size, so that none is cut in two.
        """
        return min(self.band_nbytes, _MAX_WINDOW) // 8 * 8

    @property
    def buffers_nbytes(self) -> int:
        """Bytes of all buffers together; more than the budget where that is tiny."""
        return 4 * self.threads * self.band_nbytes


def byte_ranges(
    source: TensorSource, tiling: Tiling, box: Box, *, nbytes: int
) -> list[Extent] | None:
    """A box of a tiled tensor as runs of bytes of local files, in row-major order.

    Args:
        source: What the tiling reads.
        tiling: Of the tensor.
        box: The part of the tensor.
        nbytes: Of the box.

    Returns:
        None where the bytes are elsewhere, are padding, or are not runs: `read_bands` has them.
    """
    if not isinstance(source, FileSource):
        return None
    parts = []
    for tile in tiling.restrict([box]).tiles:
        extents = source.extents(tile.source, tile.source_box) if tile.source else None
        if extents is None:
            return None
        parts.append((tile.target_box, extents))
    found = in_order(box.shape, parts)
    return found if found and sum(extent.nbytes for extent in found) == nbytes else None


def read_bands(
    source: TensorSource, tiling: Tiling, box: Box, *, word: np.dtype[Any], band_nbytes: int
) -> Iterator[Words]:
    """The elements of a box of a tiled tensor, band by band, in row-major order.

    The array yielded is reused for the next band.
    """
    buffer = np.empty(min(box.volume, max(1, band_nbytes // word.itemsize)), word)
    for band in bands(box, max_elements=buffer.size):
        words = buffer[: band.volume].reshape(band.shape)
        for tile in tiling.restrict([band]).tiles:
            place: tuple[Any, ...] = (*tile.target_box.slices, ...)  # a view, of a scalar too
            target = words[place]
            if tile.source is None:
                target[...] = 0
            else:
                source.read_into(tile.source, tile.source_box, target)
        yield words


def all_or_first_error(futures: Iterable[Future[_Result]]) -> list[_Result]:
    """Wait for all; on the first failure drop what has not started and raise it.

    Whatever interrupts the wait itself, Ctrl-C above all, counts as a failure.
    """
    pending: list[Future[_Result]] = []
    try:
        pending.extend(futures)  # keeps those submitted so far when submitting is interrupted
        wait(pending, return_when=FIRST_EXCEPTION)
    finally:
        for future in pending:
            future.cancel()  # leaves those alone that run or are done
        wait(pending)  # those that run still use the files that the caller will close
    return [future.result() for future in pending if not future.cancelled()]
