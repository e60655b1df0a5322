"""A real file system with little room: memory, mounted where a trial's target goes."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_PAGE: Final = 4096
_ROOM: Final = 1 << 20
"""Bytes beside the files: directories, and what a conversion notes about itself."""


def can_mount(directory: Path) -> bool:
    """Whether this process may mount a file system: as root, outside most containers."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with small_disk(directory, _ROOM):
            return True
    except OSError:
        return False


@contextmanager
def small_disk(directory: Path, nbytes: int) -> Iterator[Callable[[int], None]]:
    """Mount a file system of this size on a directory; what is given changes its size.

    Raises:
        OSError: It cannot be mounted.
    """
    _mount(directory, f"size={nbytes}")
    try:
        yield lambda more: _mount(directory, f"remount,size={more}")
    finally:
        subprocess.run([_tool("umount"), "--lazy", str(directory)], check=True)  # noqa: S603 - our own


def room(old: int, new: int, part: float) -> int:
    """Bytes of a disk that holds what is there and a part of what is to come."""
    return old + math.ceil(new * part / _PAGE) * _PAGE


def plenty(old: int, new: int) -> int:
    """Bytes of a disk that holds both, and all that a conversion notes."""
    return old + 2 * new + _ROOM


def _mount(directory: Path, options: str) -> None:
    done = subprocess.run(  # noqa: S603 - our own command
        [_tool("mount"), "-t", "tmpfs", "-o", options, "nemotron-bridge", str(directory)],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise OSError(done.returncode, done.stderr.strip() or "cannot mount", str(directory))


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise OSError(0, f"no {name} here")
    return found
