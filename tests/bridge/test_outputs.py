"""Files that commands write where the user says: whole, on the disk, and in nobody's place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bridge.errors import CheckpointError, TargetExistsError
from bridge.outputs import check_output, new_output, write_atomically


def test_a_file_that_comes_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """It was not there when the command began, and hours have passed."""
    path = tmp_path / "out"

    def write() -> None:
        with new_output(path, overwrite=False) as new:
            new.write_text("ours")
            path.write_text("theirs")

    with pytest.raises(TargetExistsError, match="already exists"):
        write()
    assert path.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_is_on_the_disk_when_writing_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes first, then the name: a power cut leaves the old file or the new one."""
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def flushed(descriptor: int) -> None:
        calls.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink().parent.name}")
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        calls.append("rename")
        return replace(self, target)

    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    write_atomically(place / "out", "new")
    assert calls == ["fsync place", "rename", f"fsync {tmp_path.name}"]


def test_only_plain_files_are_replaced_and_links_stay(tmp_path: Path) -> None:
    """A pipe or a device is none; what a link leads to is."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="device or a pipe"):
        check_output(tmp_path / "pipe", overwrite=True)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("old")
    (tmp_path / "link").symlink_to("there/file")
    check_output(tmp_path / "link", overwrite=True)
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").read_text() == "new"


def test_a_file_has_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    """Whoever keeps others out keeps them out of this, whatever library fills the file."""
    before = os.umask(0o077)
    try:
        with new_output(tmp_path / "out", overwrite=False) as partial:
            partial.unlink()
            partial.touch(mode=0o666)
            partial.chmod(0o777)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o600


def test_the_longest_name_is_no_longer_than_others(tmp_path: Path) -> None:
    """255 characters are a name; none is needed for a name beside it."""
    write_atomically(tmp_path / ("x" * 255), "new")
    assert (tmp_path / ("x" * 255)).read_text() == "new"


def test_a_directory_that_cannot_be_written_to_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file may be writable: it is its directory that gets another. Root is told no here."""
    (tmp_path / "out").touch()
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)
    with pytest.raises(CheckpointError, match="cannot be written to"):
        check_output(tmp_path / "out", overwrite=True)
