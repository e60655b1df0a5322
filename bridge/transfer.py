"""Move tensors from any source into files: constant memory, whatever the model.

Work is cut by rows of tiles, never by tensor, so one tensor of 14 GB is no special case. Nothing is
computed with the bytes but checksums; where they are runs of files, the kernel moves them. Files
can be hashed behind the writing: read back while the system still has them in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from bridge import reading
from bridge.checksums import combine_crc32, crc32
from bridge.errors import PlanError
from bridge.hashing import hash_file, read_windows
from bridge.manifest import FileEntry, Files, Part, entry_of
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
    "TransferLimits",
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
    hashed: bool = False,
) -> Files:
    """Write files by their layouts, each payload filled from the source through its tiling.

    All of it is on the disk when this returns.

    Args:
        layouts: The files, relative to `directory`, which must exist and not hold them yet.
        directory: Where to write.
        source: What the tilings read.
        tilings: Target tensor to its tiling by tensors of `source`.
        limits: Memory and threads.
        advance: Progress in payload bytes; where files are hashed, in all their bytes once more.
        done: Hears of each file once it is on the disk, in a thread of its own.
        hashed: Read and hash each file behind whoever writes it.

    Returns:
        The files with their hashes, none where they are not hashed.

    Raises:
        CheckpointError: BR300, the system refuses a write (disk full, permissions).
        CorruptFileError: BR302, the source ends early.
    """
    with (
        FileRanges(Path()) as files,
        Flusher() as flusher,
        ThreadPoolExecutor(limits.threads) as helpers,
        ThreadPoolExecutor(limits.threads) as behind,
        ThreadPoolExecutor(limits.threads) as pool,
    ):
        writer = _Writer(source, tilings, files, flusher, limits, advance, done)
        entries: dict[str, FileEntry] = {}
        # The system lets one thread at a time write to a file: each gets a file of its own.
        for start in range(0, len(layouts), limits.threads):
            with FileRanges(directory) as written:
                follower = _Follower(written, helpers, limits, advance) if hashed else None
                some = layouts[start : start + limits.threads]
                entries |= writer.write(some, directory, pool, behind, follower)
    return entries


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
    written: Future[None] = field(default_factory=Future)


@dataclass(slots=True)
class _NewFile:
    """A file that is written, and the segments of its payloads, these by ascending offset."""

    layout: FileLayout
    file: NewFile
    payloads: list[list[_Segment]]


@dataclass(frozen=True, slots=True)
class _Follower:
    """Hashes files as they can be read, up to where they are complete."""

    written: FileRanges
    helpers: ThreadPoolExecutor
    limits: TransferLimits
    advance: Advance

    def hash(self, layout: FileLayout, complete: Callable[[], None]) -> FileEntry:
        """Hash a file, waiting for each payload in turn until it is `complete`."""

        def windows(part: Part) -> Iterator[memoryview]:
            complete()  # and with it what lies before it, where its checksum is
            return read_windows(
                self.written, layout.path, part.offset, part.offset + part.nbytes,
                limits=self.limits, advance=self.advance,
            )  # fmt: skip

        return hash_file(
            self.written, layout.path, entry_of(layout), limits=self.limits,
            advance=self.advance, helpers=self.helpers, windows=windows, checksums=True,
        )  # fmt: skip


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
        self,
        layouts: Sequence[FileLayout],
        directory: Path,
        pool: ThreadPoolExecutor,
        behind: ThreadPoolExecutor,
        follower: _Follower | None,
    ) -> dict[str, FileEntry]:
        """Write some files, a segment of each in turn, and see behind it that each is complete."""
        files = []
        for layout in layouts:
            file = self.flusher.create(directory, layout.path, layout.size)
            for offset, literal in layout.literals:
                file.write(literal, offset)
            payloads = sorted(layout.payloads, key=lambda payload: payload.offset)
            segments = [self._segments(file, payload) for payload in payloads]
            files.append(_NewFile(layout, file, segments))
        turns = zip_longest(*(chain.from_iterable(one.payloads) for one in files))

        def submitted() -> Iterator[Future[Any]]:
            for segment in filter(None, chain.from_iterable(turns)):
                segment.written = pool.submit(self._write_segment, segment)
                yield segment.written
            for one in files:
                yield behind.submit(self._complete, one, follower)

        found = all_or_first_error(submitted())
        for one in files:
            self.flusher.finish(one.file, then=self.done and partial(self.done, one.layout))
        entries = found[len(found) - len(files) :]
        return {one.layout.path: entry for one, entry in zip(files, entries, strict=True) if entry}

    def _complete(self, new: _NewFile, follower: _Follower | None) -> FileEntry | None:
        """Give each payload its checksum as soon as it is written, and hash up to there."""
        waiting = iter(new.payloads)

        def complete() -> None:
            segments = next(waiting)
            for segment in segments:
                segment.written.result()
            self._write_crc32(segments)

        try:
            if follower is not None:
                return follower.hash(new.layout, complete)
            for _ in new.payloads:
                complete()
        except CancelledError:
            pass  # somebody else has failed, and says why
        return None

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
