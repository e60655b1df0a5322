"""sha256 of files and of the tensors in them: from first byte to last, in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace

from bridge.checksums import crc32
from bridge.errors import BridgeError
from bridge.manifest import FileEntry, Files, Part
from bridge.progress import Advance
from bridge.reading import TransferLimits, all_or_first_error, read_bands
from bridge.storage.files import FileRanges
from bridge.storage.remote import Location
from bridge.storage.remote_ranges import open_ranges
from bridge.storage.source import TensorSource
from bridge.tiling import Box, Tile, Tiling

Windows = Callable[[Part], Iterable[memoryview]]
"""Where the bytes of a part come from, in order. A window may be reused once the next is taken."""


def hash_files(
    directory: Location,
    files: Files,
    *,
    limits: TransferLimits,
    advance: Advance,
    checksums: bool = False,
) -> dict[str, FileEntry]:
    """Read files from their first byte to their last, and fill in the hashes; see `hash_file`.

    Raises:
        CheckpointError: BR300, a file is not there or cannot be read.
        CorruptFileError: BR302, a file ends early.
    """
    ranges = open_ranges(directory)
    try:
        with (
            ThreadPoolExecutor(limits.threads) as helpers,
            ThreadPoolExecutor(limits.threads) as pool,
        ):
            order = biggest_first(files)
            found = all_or_first_error(
                pool.submit(
                    hash_file, ranges, name, files[name],
                    limits=limits, advance=advance, helpers=helpers, checksums=checksums,
                )
                for name in order
            )  # fmt: skip
        return dict(zip(order, found, strict=True))
    finally:
        ranges.close()


def biggest_first(files: Files) -> list[str]:
    """Names in the order to begin with them: a file is one thread's, and a big one ends alone."""
    return sorted(files, key=lambda name: -files[name].nbytes)


def hash_file(
    ranges: FileRanges,
    name: str,
    entry: FileEntry,
    *,
    limits: TransferLimits,
    advance: Advance,
    helpers: Executor,
    windows: Windows | None = None,
    checksums: bool = False,
) -> FileEntry:
    """Fill in the hashes of one file, its own and its parts' at the same time, and close it.

    Args:
        ranges: Of its directory.
        name: Of the file.
        entry: What it holds; its parts one after the other, or hashes of them say nothing.
        limits: How much is read at once.
        advance: Progress in bytes that are read here.
        helpers: Threads for what is done at the same time.
        windows: Who else reads the bytes of the parts. It is called before anything that lies
            between a part and the one before it is read.
        checksums: Find the CRC-32 of each part, too.
    """

    def read(start: int, stop: int) -> Iterator[memoryview]:
        return read_windows(ranges, name, start, stop, limits=limits, advance=advance)

    whole, parts, position = hashlib.sha256(), [], 0
    for part in entry.parts:
        end = part.offset + part.nbytes
        own = read(max(position, part.offset), end) if windows is None else windows(part)
        for window in read(position, part.offset):
            whole.update(window)
        digest, checksum = hashlib.sha256(), 0
        for window in own:
            other = helpers.submit(whole.update, window)
            digest.update(window)
            if checksums:
                checksum = crc32(window, checksum)
            other.result()
        parts.append(replace(part, sha256=digest.hexdigest(), crc32=checksum))
        position = max(position, end)  # a manifest may say anything: nothing is read twice
    for window in read(position, entry.nbytes):
        whole.update(window)
    ranges.release(name)
    return replace(entry, sha256=whole.hexdigest(), parts=tuple(parts))


def read_windows(
    ranges: FileRanges,
    name: str,
    start: int,
    stop: int,
    *,
    limits: TransferLimits,
    advance: Advance,
) -> Iterator[memoryview]:
    """The bytes of a file from `start` to before `stop`, piece by piece in one buffer."""
    for position in range(start, stop, limits.window_nbytes):
        nbytes = min(limits.window_nbytes, stop - position)
        with ranges.window(name, position, nbytes) as window:
            yield window
        advance(nbytes)


def hash_tensors(
    source: TensorSource, names: Sequence[str], *, limits: TransferLimits, advance: Advance
) -> dict[str, str]:
    """sha256 of whole tensors, row-major and little-endian, however they are stored."""
    with ThreadPoolExecutor(limits.threads) as pool:
        found = all_or_first_error(
            pool.submit(_hash_tensor, source, name, limits.band_nbytes, advance) for name in names
        )
    return dict(zip(names, found, strict=True))


def _hash_tensor(source: TensorSource, name: str, band_nbytes: int, advance: Advance) -> str:
    info, digest = source.tensors[name], hashlib.sha256()
    whole = Box.whole(info.shape)
    tiling = Tiling(info.shape, (Tile(name, whole, whole),))
    word = info.dtype.word
    for words in read_bands(source, tiling, whole, word=word, band_nbytes=band_nbytes):
        data = words.reshape(-1).view("u1").data
        digest.update(data)
        advance(len(data))
    return digest.hexdigest()


def differences(
    directory: Location, files: Files, *, limits: TransferLimits, advance: Advance
) -> list[str]:
    """Every file that is not what it was, and the tensors in it that are not, in words."""
    ranges = open_ranges(directory)

    def check(name: str) -> list[str]:
        path, entry = directory / name, files[name]
        size = path.stat().st_size if path.is_file() else None
        if size != entry.nbytes:
            advance(entry.nbytes)
            found = "is not there" if size is None else f"has {size} bytes"
            return [f"{name}: {found}, it had {entry.nbytes}"]
        try:
            now = hash_file(ranges, name, entry, limits=limits, advance=advance, helpers=helpers)
        except BridgeError as error:
            return [f"{name}: {error.message}"]
        return [f"{name}: {text}" for text in _differences(entry, now)]

    try:
        with (
            ThreadPoolExecutor(limits.threads) as helpers,
            ThreadPoolExecutor(limits.threads) as pool,
        ):
            found = all_or_first_error(pool.submit(check, name) for name in biggest_first(files))
        return sorted(text for texts in found for text in texts)
    finally:
        ranges.close()


def _differences(before: FileEntry, after: FileEntry) -> list[str]:
    if before.sha256 == after.sha256:
        return []
    wrong = [
        f"{one} (bytes {one.offset} to {one.offset + one.nbytes - 1})"
        for one, other in zip(before.parts, after.parts, strict=True)
        if one.sha256 != other.sha256
    ]
    if wrong:
        return wrong
    return ["its bytes before, between or after the tensors" if before.parts else "its bytes"]
