"""Move tensors from any source into files: constant memory, whatever the model.

Work is cut by rows of tiles, never by tensor, so one tensor of 14 GB is no special case. Nothing is
computed with the bytes but checksums; where they are runs of files, the kernel moves them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from bridge import reading
from bridge.checksums import combine_crc32, crc32
from bridge.comparison import Digest, compare
from bridge.errors import PlanError
from bridge.progress import Advance
from bridge.reading import (
    SEGMENT_NBYTES,
    TransferLimits,
    all_or_first_error,
    read_bands,
)
from bridge.storage.extents import Extent, pieces
from bridge.storage.files import FileRanges
from bridge.storage.new_files import Flusher, NewFile
from bridge.storage.source import FileLayout, Payload, TensorInfo, TensorSource
from bridge.tiling import Box, Tiling, bands

__all__ = [
    "Advance",
    "Digest",
    "TransferLimits",
    "compare",
    "read_bands",
    "write_files",
]


def write_files(
    layouts: Sequence[FileLayout],
    directory: Path,
    source: TensorSource,
    tilings: Mapping[str, Tiling],
    *,
    limits: TransferLimits,
    advance: Advance,
    done: Callable[[FileLayout], None] | None = None,
) -> None:
    """Write files by their layouts, each payload filled from the source through its tiling.

    All of it is on the disk when this returns.

    Args:
        layouts: The files, relative to `directory`, which must exist and not hold them yet.
        directory: Where to write.
        source: What the tilings read.
        tilings: Target tensor to its tiling by tensors of `source`.
        limits: Memory and threads.
        advance: Progress in payload bytes.
        done: Hears of each file once it is on the disk, in a thread of its own.

    Raises:
        CheckpointError: BR300, the system refuses a write (disk full, permissions).
        CorruptFileError: BR302, the source ends early.
    """
    with (
        FileRanges(Path()) as files,
        Flusher() as flusher,
        ThreadPoolExecutor(limits.threads) as pool,
    ):
        writer = _Writer(source, tilings, files, flusher, limits, advance, done)
        # The system lets one thread at a time write to a file: each gets a file of its own.
        for start in range(0, len(layouts), limits.threads):
            writer.write(layouts[start : start + limits.threads], directory, pool)


@dataclass(slots=True)
class _Segment:
    """A part of a payload, written by one thread: no tensor is too big to be shared."""

    file: NewFile
    payload: Payload
    box: Box
    offset: int
    nbytes: int
    crc32: int = 0
    """Once it is written, where the payload wants it."""


@dataclass(frozen=True, slots=True)
class _Writer:
    """What the threads of one `write_files` share."""

    source: TensorSource
    tilings: Mapping[str, Tiling]
    files: FileRanges
    flusher: Flusher
    limits: TransferLimits
    advance: Advance
    done: Callable[[FileLayout], None] | None

    def write(
        self, layouts: Sequence[FileLayout], directory: Path, pool: ThreadPoolExecutor
    ) -> None:
        """Write some files, a segment of each in turn."""
        queues = []
        for layout in layouts:
            file = self.flusher.create(directory, layout.path, layout.size)
            for offset, literal in layout.literals:
                file.write(literal, offset)
            payloads = sorted(layout.payloads, key=lambda payload: payload.offset)
            parts = [self._segments(file, payload) for payload in payloads]
            queues.append((layout, file, parts))
        turns = zip_longest(*(chain.from_iterable(parts) for *_, parts in queues))
        all_or_first_error(
            pool.submit(self._write_segment, one) for one in chain.from_iterable(turns) if one
        )
        for layout, file, parts in queues:
            for segments in parts:
                self._write_crc32(segments)
            self.flusher.finish(file, then=self.done and partial(self.done, layout))

    def _segments(self, file: NewFile, payload: Payload) -> list[_Segment]:
        itemsize = _word(self.tilings[payload.tensor], self.source.tensors).itemsize
        if payload.nbytes != payload.box.volume * itemsize:
            raise PlanError(
                f"{payload.tensor}{payload.box} of {itemsize}-byte elements does not fill the "
                f"{payload.nbytes} bytes laid out for it"
            )
        segments = []
        offset = payload.offset
        for box in bands(payload.box, max_elements=SEGMENT_NBYTES // itemsize):
            segments.append(_Segment(file, payload, box, offset, box.volume * itemsize))
            offset += segments[-1].nbytes
        return segments

    def _write_segment(self, segment: _Segment) -> None:
        tiling = self.tilings[segment.payload.tensor]
        ranges = reading.byte_ranges(self.source, tiling, segment.box, nbytes=segment.nbytes)
        if ranges is None:
            self._write_bands(segment, tiling)
        else:
            self._copy(segment, ranges)
        self.flusher.start(segment.file)

    def _write_bands(self, segment: _Segment, tiling: Tiling) -> None:
        """Through a buffer: elements are picked, padded or generated."""
        offset = segment.offset
        word = _word(tiling, self.source.tensors)
        for words in reading.read_bands(
            self.source, tiling, segment.box, word=word, band_nbytes=self.limits.band_nbytes
        ):
            data = words.reshape(-1).view("u1").data
            segment.file.write(data, offset)
            if segment.payload.crc32_at:
                segment.crc32 = crc32(data, segment.crc32)
            offset += len(data)
            self.advance(len(data))

    def _copy(self, segment: _Segment, ranges: Sequence[Extent]) -> None:
        """From file to file, each piece checksummed while it is in the processor's cache."""
        offset = segment.offset
        for piece in pieces(ranges, max_nbytes=self.limits.window_nbytes):
            segment.file.copy(self.files, piece, offset)
            if segment.payload.crc32_at:
                with self.files.window(str(piece.path), piece.offset, piece.nbytes) as data:
                    segment.crc32 = crc32(data, segment.crc32)
            offset += piece.nbytes
            self.advance(piece.nbytes)

    def _write_crc32(self, segments: Sequence[_Segment]) -> None:
        """Write the CRC-32 of a payload, whose segments these are, where it wants it."""
        checksum = 0
        for segment in segments:
            checksum = combine_crc32(checksum, segment.crc32, segment.nbytes)
        for segment in segments[:1]:
            for position in segment.payload.crc32_at:
                segment.file.write(checksum.to_bytes(4, "little"), position)


def _word(tiling: Tiling, tensors: Mapping[str, TensorInfo]) -> np.dtype[Any]:
    found = next((tile.source for tile in tiling.tiles if tile.source is not None), None)
    if found is None:
        raise PlanError(f"a tensor of shape {tiling.shape} is made of no source")
    return tensors[found].dtype.word
