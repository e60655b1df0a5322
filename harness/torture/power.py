"""What a loss of power takes away: the bytes of files that were not brought to the disk.

The model is that of a journalling file system (ext4, XFS): names, sizes and renames survive in the
order in which they were made; what was written to a file since its last fsync does not. A kill
alone cannot show a missing fsync, since the system's cache outlives the process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

# As they are now: the layer above replaces these names in `os` later.
_fstat, _open, _close, _pwrite, _truncate, _stat = (
    os.fstat, os.open, os.close, os.pwrite, os.ftruncate, os.stat,
)  # fmt: skip
_CHUNK: Final = 1 << 20


class _Inode(NamedTuple):
    """Which file it is, whatever its name."""

    device: int
    number: int


@dataclass(slots=True)
class _Written:
    """What would be lost of one file.

    Args:
        descriptor: Of our own; the writer's may be closed by then.
        size: Bytes that the file keeps.
        ranges: Offset and length of what was written.
    """

    descriptor: int
    size: int
    ranges: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class Unsynced:
    """The files and directories that a loss of power would take something from."""

    _files: dict[_Inode, _Written] = field(default_factory=dict)
    _directories: dict[_Inode, set[str]] = field(default_factory=dict)
    """The names that were made in each."""

    def before_write(self, descriptor: int) -> None:
        """Remember how long the file is, before it is written to."""
        inode, size = _of(descriptor)
        if inode not in self._files:
            # A description of our own: it does not append, and holds no lock.
            ours = _open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
            self._files[inode] = _Written(ours, size)

    def written(self, descriptor: int, offset: int, nbytes: int) -> None:
        """Bytes were written."""
        self._files[_of(descriptor)[0]].ranges.append((offset, nbytes))

    def resized(self, descriptor: int) -> None:
        """The file was given its size, which is no data."""
        inode, size = _of(descriptor)
        if inode in self._files:
            self._files[inode].size = size

    def synced(self, descriptor: int) -> None:
        """The file, or the directory's entries, are on the disk."""
        inode, _ = _of(descriptor)
        self._directories.pop(inode, None)
        written = self._files.pop(inode, None)
        if written is not None:
            _close(written.descriptor)

    def entered(self, path: str) -> None:
        """A name was made in, or moved into, its directory."""
        directory, name = os.path.split(path)
        found = _stat(directory)
        self._directories.setdefault(_Inode(found.st_dev, found.st_ino), set()).add(name)

    def left_out(self, path: str) -> None:
        """A name was removed again, and need not outlive anything."""
        directory, name = os.path.split(path)
        found = _stat(directory)
        self._directories.get(_Inode(found.st_dev, found.st_ino), set()).discard(name)

    def lose(self) -> None:
        """Take it all away; the time of a change is no data, and stays."""
        for written in self._files.values():
            before = _fstat(written.descriptor)
            _truncate(written.descriptor, written.size)
            for offset, nbytes in written.ranges:
                for at in range(offset, min(offset + nbytes, written.size), _CHUNK):
                    end = min(at + _CHUNK, offset + nbytes, written.size)
                    _pwrite(written.descriptor, bytes(end - at), at)
            os.utime(written.descriptor, ns=(before.st_atime_ns, before.st_mtime_ns))

    def left(self, place: Path) -> list[str]:
        """What of a directory, itself included, is not on the disk; relative names."""
        found = []
        for path in (place, *sorted(place.rglob("*"))):
            if path.is_symlink():
                continue
            state = path.stat()
            inode = _Inode(state.st_dev, state.st_ino)
            name = path.relative_to(place).as_posix()
            if inode in self._files:
                found.append(f"the bytes of {name}")
            elif self._directories.get(inode):
                found.append(f"the names in {name}")
        return found


def _of(descriptor: int) -> tuple[_Inode, int]:
    found = _fstat(descriptor)
    return _Inode(found.st_dev, found.st_ino), found.st_size
