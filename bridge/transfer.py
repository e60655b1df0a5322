"""Move and compare tensors piece by piece: constant memory, whatever the model.

Work is cut by bands of rows of a tile, never by tensor, so the largest buffer is a few MiB even
when one tensor has 14 GB. Bytes are moved as words; nothing is computed with them but checksums.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from bridge.dtypes import Words
from bridge.errors import CheckpointError, PlanError
from bridge.storage.source import FileLayout, Payload, TensorInfo, TensorSource
from bridge.tiling import Box, Tiling, bands

_Result = TypeVar("_Result")

Advance = Callable[[int], None]
"""Called with the number of bytes that were just finished; from several threads."""

DEFAULT_MEMORY_BUDGET: Final = 1 << 30
_MAX_BAND: Final = 16 << 20  # bytes; larger bands only leave the processor's caches
_MIN_BAND: Final = 64 << 10


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
        """Bytes of one buffer. Each thread holds at most four: two compared, two of scratch."""
        return max(_MIN_BAND, min(_MAX_BAND, self.memory_budget // (4 * self.threads)))

    @property
    def buffers_nbytes(self) -> int:
        """Bytes of all buffers together; more than the budget where that is tiny."""
        return 4 * self.threads * self.band_nbytes


def write_files(
    layouts: Sequence[FileLayout],
    directory: Path,
    source: TensorSource,
    tilings: Mapping[str, Tiling],
    *,
    limits: TransferLimits,
    advance: Advance,
) -> None:
    """Write files by their layouts, each payload filled from the source through its tiling.

    Args:
        layouts: The files, relative to `directory`, which must exist and not hold them yet.
        directory: Where to write.
        source: What the tilings read.
        tilings: Target tensor to its tiling by tensors of `source`.
        limits: Memory and threads.
        advance: Progress in payload bytes.

    Raises:
        CheckpointError: BR300, the system refuses a write (disk full, permissions).
        CorruptFileError: BR302, the source ends early.
    """
    with ThreadPoolExecutor(limits.threads) as pool:
        for layout in layouts:
            with _new_file(directory / layout.path, layout.size) as descriptor:
                for offset, literal in layout.literals:
                    write_at(descriptor, literal, offset)
                _all_or_first_error(
                    pool.submit(
                        _write_payload, descriptor, payload, source, tilings[payload.tensor],
                        limits.band_nbytes, advance,
                    )
                    for payload in sorted(layout.payloads, key=lambda payload: payload.offset)
                )  # fmt: skip


@contextmanager
def _new_file(path: Path, size: int) -> Iterator[int]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)  # a full disk is noticed before any work
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the file: {error.strerror}", where=str(path)
        ) from error


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at a position of an open file."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _write_payload(
    descriptor: int,
    payload: Payload,
    source: TensorSource,
    tiling: Tiling,
    band_nbytes: int,
    advance: Advance,
) -> None:
    word = _word(tiling, source.tensors)
    if payload.nbytes != payload.box.volume * word.itemsize:
        raise PlanError(
            f"{payload.tensor}{payload.box} of {word.itemsize}-byte elements does not fill the "
            f"{payload.nbytes} bytes laid out for it"
        )
    checksum, offset = 0, payload.offset
    for words in read_bands(source, tiling, payload.box, word=word, band_nbytes=band_nbytes):
        data = words.reshape(-1).view("u1").data
        if payload.crc32_at:
            checksum = zlib.crc32(data, checksum)
        write_at(descriptor, data, offset)
        offset += len(data)
        advance(len(data))
    for position in payload.crc32_at:
        write_at(descriptor, checksum.to_bytes(4, "little"), position)


def _word(tiling: Tiling, tensors: Mapping[str, TensorInfo]) -> np.dtype[Any]:
    found = next((tile.source for tile in tiling.tiles if tile.source is not None), None)
    if found is None:
        raise PlanError(f"a tensor of shape {tiling.shape} is made of no source")
    return tensors[found].dtype.word


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
    with ThreadPoolExecutor(limits.threads) as pool:
        return _all_or_first_error(
            pool.submit(_compare_one, name, expected, actual, tiling, limits.band_nbytes, advance)
            for name, tiling in tilings.items()
        )


def _compare_one(
    name: str,
    expected: TensorSource,
    actual: TensorSource,
    tiling: Tiling,
    band_nbytes: int,
    advance: Advance,
) -> Digest:
    dtype = expected.tensors[name].dtype
    word = dtype.word
    same_dtype = all(
        actual.tensors[tile.source].dtype == dtype for tile in tiling.tiles if tile.source
    )
    whole = Box.whole(tiling.shape)
    digest = hashlib.sha256()
    first: tuple[int, ...] | None = None
    different = position = 0
    buffer = np.empty(min(whole.volume, max(1, band_nbytes // word.itemsize)), word)
    ours = read_bands(actual, tiling, whole, word=word, band_nbytes=band_nbytes)
    for band in bands(whole, max_elements=buffer.size):
        theirs = buffer[: band.volume].reshape(band.shape)
        expected.read_into(name, band, theirs)
        digest.update(theirs.reshape(-1).view("u1").data)
        unequal = np.flatnonzero(theirs != next(ours)) if same_dtype else np.arange(band.volume)
        if unequal.size and first is None:
            index = np.unravel_index(position + int(unequal[0]), tiling.shape)
            first = tuple(int(i) for i in index)
        different += unequal.size
        position += band.volume
        advance(theirs.nbytes)
    return Digest(
        name=name, sha256=digest.hexdigest(), first_difference=first, num_different=different
    )


def _all_or_first_error(futures: Iterable[Future[_Result]]) -> list[_Result]:
    """Wait for all; on the first failure drop what has not started and raise it."""
    pending = list(futures)
    _, unfinished = wait(pending, return_when=FIRST_EXCEPTION)
    for future in unfinished:
        future.cancel()
    wait(pending)  # those that run still use the files that the caller will close
    return [future.result() for future in pending if not future.cancelled()]
