"""What files hold around their tensors: headers, records of archives, alignment."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import numpy as np

from bridge.manifest import Files
from bridge.progress import Advance
from bridge.reading import TransferLimits, all_or_first_error
from bridge.storage.remote import Location
from bridge.storage.remote_ranges import open_ranges
from bridge.storage.source import FileLayout

AROUND: Final = "files differ around their tensors after reading them back"
_CRC32_NBYTES: Final = 4


def changed_literals(
    directory: Location,
    layouts: Sequence[FileLayout],
    files: Files,
    *,
    limits: TransferLimits,
    advance: Advance,
) -> list[str]:
    """Where files differ, around their tensors, from what was laid out.

    Args:
        directory: That the files are in.
        layouts: Of the files.
        files: The CRC-32 of payloads that are to have it somewhere; see `hash_file`.
        limits: Threads; a literal is read whole, as it was written.
        advance: Progress in bytes of literals.

    Raises:
        CheckpointError: BR300, a file is not there or cannot be read.
        CorruptFileError: BR302, a file ends early.
    """
    ranges = open_ranges(directory)

    def change(layout: FileLayout, offset: int, literal: bytes) -> str:
        now = np.empty(len(literal), "u1")
        ranges.read_into(layout.path, offset, now)
        advance(len(literal))
        differs = now != np.frombuffer(literal, "u1")
        return f"{layout.path}: byte {offset + int(differs.argmax())}" if differs.any() else ""

    def submitted(pool: ThreadPoolExecutor) -> Iterator[Future[str]]:
        for layout in layouts:
            checksums = _checksums(layout, files)
            for offset, literal in layout.literals:
                expected = _with_checksums(offset, literal, checksums)
                yield pool.submit(change, layout, offset, expected)

    try:
        with ThreadPoolExecutor(limits.threads) as pool:
            return [text for text in all_or_first_error(submitted(pool)) if text]
    finally:
        ranges.close()


def _checksums(layout: FileLayout, files: Files) -> list[tuple[int, bytes]]:
    """Where the file has the CRC-32 of a payload, and what it is, in the order of the file."""
    if not any(payload.crc32_at for payload in layout.payloads):
        return []
    known = {(part.offset, part.nbytes): part.crc32 for part in files[layout.path].parts}
    return sorted(
        (at, known[payload.offset, payload.nbytes].to_bytes(_CRC32_NBYTES, "little"))
        for payload in layout.payloads
        for at in payload.crc32_at
    )


def _with_checksums(offset: int, literal: bytes, checksums: Sequence[tuple[int, bytes]]) -> bytes:
    """A literal as it is once the payloads are written."""
    first, last = (bisect_left(checksums, (at, b"")) for at in (offset, offset + len(literal)))
    complete = bytearray(literal)
    for at, checksum in checksums[first:last]:
        complete[at - offset : at - offset + _CRC32_NBYTES] = checksum
    return bytes(complete)
