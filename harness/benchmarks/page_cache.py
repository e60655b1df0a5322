"""Put files into the page cache, or out of it, as an ordinary user can."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_PIECE: Final = 8 << 20


def files_of(directory: Path) -> Iterator[Path]:
    """Every file below, in a fixed order."""
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def warm(directory: Path) -> None:
    """Read every file once."""
    buffer = bytearray(_PIECE)
    for path in files_of(directory):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop(directory: Path) -> bool:
    """Have the kernel forget every file; False where the system has no way to ask for it.

    Pages not yet written cannot be forgotten, so files are synchronised first.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files_of(directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True


def cached_share(directory: Path) -> float | None:
    """How much of the files' bytes is in the page cache; None where the system does not tell.

    Asked of a map that is never touched: trying to read would bring pages in.
    """
    ask = getattr(ctypes.CDLL(None, use_errno=True), "mincore", None)
    if ask is None or sys.platform != "linux":
        return None
    pages = resident = 0
    for path in files_of(directory):
        size = path.stat().st_size
        if not size:
            continue
        states = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as held:
            start = ctypes.c_char.from_buffer(held)
            problem = ask(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), states)
            del start  # or the map could not be closed
        if problem:
            return None
        pages += len(states)
        resident += bytes(states).count(1)
    return resident / pages if pages else None
