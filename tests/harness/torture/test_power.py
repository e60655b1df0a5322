"""A loss of power takes what was not brought to the disk, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.torture.power import Unsynced


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    """A file of ten bytes that lie on the disk."""
    (tmp_path / "file").write_bytes(b"0123456789")
    opened = os.open(tmp_path / "file", os.O_RDWR)
    yield opened
    os.close(opened)


def write(unsynced: Unsynced, descriptor: int, data: bytes, offset: int) -> None:
    """As the layer does."""
    unsynced.before_write(descriptor)
    unsynced.written(descriptor, offset, os.pwrite(descriptor, data, offset))


def test_bytes_after_the_last_flush_are_lost(tmp_path: Path, descriptor: int) -> None:
    """What was flushed stays; what was written over is zeros, what was added is gone."""
    unsynced = Unsynced()
    write(unsynced, descriptor, b"AB", 0)
    unsynced.synced(descriptor)
    write(unsynced, descriptor, b"CD", 4)
    write(unsynced, descriptor, b"EF", 10)
    assert unsynced.left(tmp_path) == ["the bytes of file"]
    unsynced.lose()
    assert (tmp_path / "file").read_bytes() == b"AB23\0\0" + b"6789"


def test_a_size_is_no_data(tmp_path: Path, descriptor: int) -> None:
    """Room that was reserved stays, and holds nothing."""
    unsynced = Unsynced()
    os.posix_fallocate(descriptor, 0, 16)
    unsynced.resized(descriptor)
    write(unsynced, descriptor, b"XYZ", 12)
    unsynced.lose()
    assert (tmp_path / "file").read_bytes() == b"0123456789" + bytes(6)


def test_a_file_that_was_renamed_and_closed_loses_its_bytes_all_the_same(tmp_path: Path) -> None:
    """A rename that goes first is the classic mistake."""
    unsynced = Unsynced()
    opened = os.open(tmp_path / "new", os.O_RDWR | os.O_CREAT)
    write(unsynced, opened, b"data", 0)
    os.close(opened)
    (tmp_path / "new").rename(tmp_path / "file")
    unsynced.lose()
    assert (tmp_path / "file").read_bytes() == b""


def test_names_are_durable_once_their_directory_is(tmp_path: Path) -> None:
    """Unless they have been removed again."""
    unsynced = Unsynced()
    below = tmp_path / "below"
    below.mkdir()
    for name in ("one", "two"):
        (below / name).touch()
        unsynced.entered(str(below / name))
    assert unsynced.left(tmp_path) == ["the names in below"]
    unsynced.left_out(str(below / "one"))
    assert unsynced.left(tmp_path) == ["the names in below"]
    unsynced.left_out(str(below / "two"))
    assert unsynced.left(tmp_path) == []
    unsynced.entered(str(below / "one"))
    opened = os.open(below, os.O_RDONLY)
    unsynced.synced(opened)
    os.close(opened)
    assert unsynced.left(tmp_path) == []
