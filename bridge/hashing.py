"""sha256 of files and of the tensors in them, in one pass of bounded memory, several at once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from bridge.errors import BridgeError
from bridge.manifest import FileEntry, Files, Part
from bridge.progress import Advance
from bridge.reading import TransferLimits, all_or_first_error, read_bands
from bridge.storage.files import FileRanges
from bridge.storage.remote import Location
from bridge.storage.remote_ranges import open_ranges
from bridge.storage.source import TensorSource
from bridge.tiling import Box, Tile, Tiling


def hash_files(
    directory: Location, files: Files, *, limits: TransferLimits, advance: Advance
) -> dict[str, FileEntry]:
    """Read files from their first byte to their last, and fill in the hashes.

    Raises:
        CheckpointError: BR300, a file is not there or cannot be read.
        CorruptFileError: BR302, a file ends early.
    """
    ranges = open_ranges(directory)
    try:
        with ThreadPoolExecutor(limits.threads) as pool:
            # Hashing one file is one thread's work: begin with the biggest, or it ends alone.
            order = sorted(files, key=lambda name: -files[name].nbytes)
            found = all_or_first_error(
                pool.submit(_hash_file, ranges, name, files[name], limits.window_nbytes, advance)
                for name in order
            )
        return dict(zip(order, found, strict=True))
    finally:
        ranges.close()


def _hash_file(
    ranges: FileRanges, name: str, entry: FileEntry, band_nbytes: int, advance: Advance
) -> FileEntry:
    whole, buffer = hashlib.sha256(), np.empty(min(band_nbytes, max(1, entry.nbytes)), "u1")
    parts: list[Part] = []
    position = 0

    def read_to(stop: int, digest: Any) -> None:  # noqa: ANN401 - hashlib has no type for it
        nonlocal position
        while position < stop:
            band = buffer[: min(buffer.size, stop - position)]
            ranges.read_into(name, position, band)
            whole.update(band.data)
            if digest is not None:
                digest.update(band.data)
            position += band.size
            advance(band.size)

    for part in entry.parts:
        read_to(part.offset, None)
        digest = hashlib.sha256()
        read_to(part.offset + part.nbytes, digest)
        parts.append(
            Part(
                tensor=part.tensor,
                starts=part.starts,
                offset=part.offset,
                nbytes=part.nbytes,
                sha256=digest.hexdigest(),
            )
        )
    read_to(entry.nbytes, None)
    return FileEntry(nbytes=entry.nbytes, sha256=whole.hexdigest(), parts=tuple(parts))


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
            now = _hash_file(ranges, name, entry, limits.window_nbytes, advance)
        except BridgeError as error:
            return [f"{name}: {error.message}"]
        return [f"{name}: {text}" for text in _differences(entry, now)]

    try:
        with ThreadPoolExecutor(limits.threads) as pool:
            order = sorted(files, key=lambda name: -files[name].nbytes)
            found = all_or_first_error(pool.submit(check, name) for name in order)
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
