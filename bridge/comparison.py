"""Compare tensors bit by bit, wherever they are stored, and hash them on the way.

Either tensor by tensor, or file by file of one side: then what is hashed is what was compared.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bridge import reading
from bridge.errors import VerificationError
from bridge.hashing import biggest_first, hash_file
from bridge.manifest import FileEntry, Files, Part
from bridge.progress import Advance, unwatched
from bridge.reading import (
    SEGMENT_NBYTES,
    TransferLimits,
    all_or_first_error,
)
from bridge.storage.extents import Extent, aligned
from bridge.storage.files import FileRanges
from bridge.storage.remote import Location
from bridge.storage.remote_ranges import open_ranges
from bridge.storage.source import TensorSource
from bridge.tiling import Box, Tile, Tiling, bands

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """What a comparison found of one tensor.

    `sha256` is of the expected tensor's bytes, row-major and little-endian. `first_difference` is
    the index of the first element whose bits differ, None when all are equal.
    """

    name: str
    sha256: str
    first_difference: tuple[int, ...] | None
    num_different: int


def compare(
    expected: TensorSource,
    actual: TensorSource,
    tilings: Mapping[str, Tiling],
    *,
    limits: TransferLimits,
    advance: Advance,
) -> list[Digest]:
    """Compare every tensor of `expected` bit by bit with what `actual` holds of it.

    Args:
        expected: The tensors as they should be.
        actual: The other side of a conversion, read from where it was written.
        tilings: Expected tensor to its tiling by tensors of `actual`.
        limits: Memory and threads.
        advance: Progress in bytes of `expected`.
    """
    # Hashing one tensor is one thread's work: begin with the biggest, or it ends alone.
    order = sorted(tilings, key=lambda name: -expected.tensors[name].nbytes)
    with (
        FileRanges(Path()) as files,
        ThreadPoolExecutor(limits.threads) as helpers,
        ThreadPoolExecutor(limits.threads) as pool,
    ):
        comparison = _Comparison(expected, actual, tilings, files, helpers, limits, advance)
        found = all_or_first_error(pool.submit(comparison.tensor, name) for name in order)
    by_name = {digest.name: digest for digest in found}
    return [by_name[name] for name in tilings]


def compare_files(
    expected: TensorSource,
    actual: TensorSource,
    tilings: Mapping[str, Tiling],
    directory: Location,
    files: Files,
    *,
    limits: TransferLimits,
    advance: Advance,
) -> tuple[list[Digest], dict[str, FileEntry]]:
    """Compare the tensors that files of `expected` hold, and hash these files on the way.

    Each byte of both sides is read once; between the tensors there is little.

    Args:
        expected: The tensors as they lie in the files.
        actual: See `compare`.
        tilings: See `compare`; of the tensors in the files.
        directory: That the files are in.
        files: What they hold: each part is a whole tensor.
        limits: Memory and threads.
        advance: Progress in bytes of `expected`.

    Returns:
        What was found of each tensor, and the files with their hashes.

    Raises:
        CheckpointError, CorruptFileError: As `hash_files`.
    """
    order = biggest_first(files)
    with (
        FileRanges(Path()) as inputs,
        open_ranges(directory) as remote,
        ThreadPoolExecutor(2 * limits.threads) as helpers,
        ThreadPoolExecutor(limits.threads) as pool,
    ):
        comparison = _Comparison(expected, actual, tilings, inputs, helpers, limits, advance)
        # What lies here is one open file, whether between the tensors or in them.
        ranges = inputs if isinstance(directory, Path) else remote
        places = [str(directory / name) if ranges is inputs else name for name in order]
        found = all_or_first_error(
            pool.submit(comparison.file, ranges, place, files[name])
            for place, name in zip(places, order, strict=True)
        )
    entries = {name: entry for name, (_, entry) in zip(order, found, strict=True)}
    return [digest for digests, _ in found for digest in digests], entries


@dataclass(slots=True)
class _Tally:
    """What a comparison has found of one tensor so far."""

    tiling: Tiling
    position: int = 0
    first: tuple[int, ...] | None = None
    different: int = 0

    def add(self, index: int, count: int, num_elements: int) -> None:
        """Count `num_elements` more, `count` of which differ, the first of them at `index`."""
        if count and self.first is None:
            place = np.unravel_index(self.position + index, self.tiling.shape)
            self.first = tuple(int(i) for i in place)
        self.different += count
        self.position += num_elements

    def digest(self, name: str, sha256: str) -> Digest:
        """Sum up."""
        first, different = self.first, self.different
        return Digest(name=name, sha256=sha256, first_difference=first, num_different=different)


@dataclass(frozen=True, slots=True)
class _Comparison:
    """What the threads of one comparison share."""

    expected: TensorSource
    actual: TensorSource
    tilings: Mapping[str, Tiling]
    files: FileRanges
    helpers: ThreadPoolExecutor
    limits: TransferLimits
    advance: Advance

    def tensor(self, name: str) -> Digest:
        """Compare one tensor and hash it, a piece at a time, both at once."""
        tally = _Tally(self.tilings[name])
        digest = hashlib.sha256()
        for window in self._compared(name, tally):
            digest.update(window)
        return tally.digest(name, digest.hexdigest())

    def file(
        self, ranges: FileRanges, name: str, entry: FileEntry
    ) -> tuple[list[Digest], FileEntry]:
        """Compare the tensors of one file, and hash it and them."""
        tallies = {part.tensor: _Tally(self.tilings[part.tensor]) for part in entry.parts}

        def windows(part: Part) -> Iterator[memoryview]:
            return self._compared(part.tensor, tallies[part.tensor])

        hashed = hash_file(
            ranges, name, entry,
            limits=self.limits, advance=unwatched, helpers=self.helpers, windows=windows,
        )  # fmt: skip
        found = [tallies[part.tensor].digest(part.tensor, part.sha256) for part in hashed.parts]
        return found, hashed

    def _compared(self, name: str, tally: _Tally) -> Iterator[memoryview]:
        """The bytes of a tensor, compared while whoever takes them does something with them."""
        itemsize = self.expected.tensors[name].dtype.itemsize
        for theirs, ours in self._pieces(name, tally.tiling):
            found = self.helpers.submit(first_and_count, theirs, ours, itemsize=itemsize)
            yield theirs
            tally.add(*found.result(), len(theirs) // itemsize)
            self.advance(len(theirs))

    def _pieces(self, name: str, tiling: Tiling) -> Iterator[tuple[memoryview, memoryview | None]]:
        """Bytes of the tensor and those that should be equal; None where the dtype is another."""
        dtype = self.expected.tensors[name].dtype
        same_dtype = all(
            self.actual.tensors[tile.source].dtype == dtype for tile in tiling.tiles if tile.source
        )
        whole = Box.whole(tiling.shape)
        itself = Tiling(tiling.shape, (Tile(name, whole, whole),))
        for box in bands(whole, max_elements=SEGMENT_NBYTES // dtype.itemsize):
            nbytes = box.volume * dtype.itemsize
            theirs = reading.byte_ranges(self.expected, itself, box, nbytes=nbytes)
            ours = reading.byte_ranges(self.actual, tiling, box, nbytes=nbytes)
            if theirs is None or ours is None or not same_dtype:
                yield from self._bands(name, tiling if same_dtype else None, box)
                continue
            for one, other in aligned(theirs, ours, max_nbytes=self.limits.window_nbytes):
                with self._window(one) as left, self._window(other) as right:
                    yield left, right

    def _window(self, extent: Extent) -> AbstractContextManager[memoryview]:
        return self.files.window(str(extent.path), extent.offset, extent.nbytes)

    def _bands(
        self, name: str, tiling: Tiling | None, box: Box
    ) -> Iterator[tuple[memoryview, memoryview | None]]:
        """The same through buffers."""
        word, band_nbytes = self.expected.tensors[name].dtype.word, self.limits.band_nbytes
        max_elements = max(1, band_nbytes // word.itemsize)
        buffer = np.empty(min(box.volume, max_elements), word)
        ours = (
            None
            if tiling is None
            else reading.read_bands(self.actual, tiling, box, word=word, band_nbytes=band_nbytes)
        )
        for band in bands(box, max_elements=max_elements):
            theirs = buffer[: band.volume]
            self.expected.read_into(name, band, theirs.reshape(band.shape))
            others = None if ours is None else next(ours).reshape(-1).view("u1").data
            yield theirs.view("u1").data, others


def first_and_count(
    theirs: memoryview, ours: memoryview | None, *, itemsize: int
) -> tuple[int, int]:
    """The first element whose bits differ, and how many do.

    Args:
        theirs: Bytes of elements.
        ours: As many; None stands for elements that differ whatever they are.
        itemsize: Bytes of an element.
    """
    if ours is None:
        return 0, len(theirs) // itemsize
    one, other = np.frombuffer(theirs, "u1"), np.frombuffer(ours, "u1")
    # Three times as fast as numpy, without memory, and without the interpreter's lock.
    if not _memcmp(one.ctypes.data, other.ctypes.data, one.size):
        return 0, 0
    unequal = one.view(f"<u{itemsize}") != other.view(f"<u{itemsize}")
    return int(unequal.argmax()), int(np.count_nonzero(unequal))


def refuse_differences(what: str, wrong: Sequence[str]) -> None:
    """End a conversion whose target is not what it should be.

    Raises:
        VerificationError: BR305, `what` is so in the places that are `wrong`, if there are any.
    """
    if wrong:
        raise VerificationError(
            what,
            where=wrong,
            hint="suspect the disk or the memory: the target was not created",
        )
