"""What tests compare directories by, and damage files with."""

from __future__ import annotations

from pathlib import Path

from bridge.storage.target import MANIFEST_NAME


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, with its bytes; but the manifest, which a source has not."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }


def flip_one_bit(path: Path, position: int) -> None:
    """Damage a file the way a disk does."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
