"""Files under construction: refused, flushed in the background, closed whatever happens."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from bridge.errors import CheckpointError
from bridge.storage.new_files import Flusher, NewFile


def open_files(directory: Path) -> int:
    """How many files of a directory this process holds open."""
    links = [Path(link) for link in Path("/proc/self/fd").iterdir()]
    return sum(link.is_symlink() and directory in link.readlink().parents for link in links)


def test_a_file_that_cannot_be_created_is_an_error_of_ours(tmp_path: Path) -> None:
    """The error names the file and the system's reason."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Not a directory") as error:
        NewFile(tmp_path / "file", "new", 1)
    assert error.value.where == (str(tmp_path / "file" / "new"),)


def test_a_file_that_cannot_be_reserved_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk found when reserving leaves no descriptor behind."""

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match="No space left"):
        NewFile(tmp_path, "new", 10)
    assert open_files(tmp_path) == 0


def test_leaving_waits_until_all_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`finish` returns at once; the end of the block does not, and everything is closed then."""
    fsync, may_go, synced = os.fsync, threading.Event(), []

    def slow(descriptor: int) -> None:
        assert may_go.wait(10)
        fsync(descriptor)
        synced.append(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    with Flusher() as flusher:
        for name in "ab":
            file = flusher.create(tmp_path, name, 1)
            file.write(b"x", 0)
            flusher.finish(file)
        assert synced == []
        may_go.set()
    assert len(synced) == 2
    assert open_files(tmp_path) == 0


def test_one_flush_of_a_file_is_under_way_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is asked for, so that they do not pile up behind a slow disk."""
    started, may_go, flushes = threading.Event(), threading.Event(), []

    def slow(self: NewFile) -> None:
        flushes.append(self)
        started.set()
        assert may_go.wait(10)

    monkeypatch.setattr(NewFile, "flush", slow)
    with Flusher() as flusher:
        file = flusher.create(tmp_path, "a", 1)
        flusher.start(file)
        assert started.wait(10)
        for _ in range(5):
            flusher.start(file)
        may_go.set()
    assert flushes == [file]


def test_an_error_of_a_background_flush_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system reports a failed write-back once: a later fsync of the file may succeed."""

    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("bridge.storage.new_files._flush", broken)
    with pytest.raises(CheckpointError, match="Input/output error") as error, Flusher() as flusher:  # noqa: PT012 - the block's end raises
        file = flusher.create(tmp_path, "a", 1)
        flusher.start(file)
        flusher.finish(file)
    assert error.value.where == (str(tmp_path / "a"),)
    assert open_files(tmp_path) == 0


def test_an_error_in_the_block_closes_files_that_are_not_finished(tmp_path: Path) -> None:
    """And is the one that is seen."""
    with pytest.raises(ZeroDivisionError), Flusher() as flusher:  # noqa: PT012 - as above
        flusher.create(tmp_path, "a", 1)
        raise ZeroDivisionError
    assert open_files(tmp_path) == 0


def test_a_file_that_lost_bytes_once_is_never_said_to_be_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports a failed write-back once; the flush after it means nothing."""
    results = iter([OSError(errno.EIO, os.strerror(errno.EIO))])

    def once(descriptor: int) -> None:
        del descriptor
        for error in results:
            raise error

    monkeypatch.setattr("bridge.storage.new_files._flush", once)
    noted: list[str] = []

    def build() -> None:
        with Flusher() as flusher:
            file = flusher.create(tmp_path, "new", 8)
            file.write(b"12345678", 0)
            flusher.start(file)
            flusher.finish(file, then=lambda: noted.append("complete"))

    with pytest.raises(CheckpointError, match="Input/output error"):
        build()
    assert noted == []
