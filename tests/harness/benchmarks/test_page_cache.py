"""Files that were read are in the page cache; files that were dropped are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.benchmarks.machine import filesystem
from harness.benchmarks.page_cache import cached_share, drop, files_of, warm


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two files of a few MiB, one of them in a folder, and an empty one."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "a").write_bytes(b"a" * (24 << 20))
    (tmp_path / "folder" / "b").write_bytes(b"b" * (4 << 20))
    (tmp_path / "empty").write_bytes(b"")
    return tmp_path


def test_every_file_is_found(directory: Path) -> None:
    """In folders too."""
    names = [path.relative_to(directory).as_posix() for path in files_of(directory)]
    assert names == ["a", "empty", "folder/b"]


def test_warm_is_cached_and_dropped_is_not(directory: Path) -> None:
    """As the kernel says, not as we hope; what has just been written is dropped as well."""
    if cached_share(directory) is None:
        pytest.skip("needs a system that tells what is cached (mincore)")
    if filesystem(directory) in {"tmpfs", "ramfs"}:
        pytest.skip("needs a file system on a disk: one in memory cannot be dropped")
    for _ in range(2):  # asking must not bring anything in
        assert drop(directory)
        assert cached_share(directory) == cached_share(directory) == 0.0
    with (directory / "a").open("rb") as file:
        file.read(1)
    assert 0.0 < (cached_share(directory) or 0.0) < 1.0
    warm(directory)
    assert cached_share(directory) == 1.0


def test_contents_survive(directory: Path) -> None:
    """Dropping loses nothing."""
    drop(directory)
    assert (directory / "a").read_bytes() == b"a" * (24 << 20)


def test_nothing_is_known_of_no_files(tmp_path: Path) -> None:
    """Rather than a division by zero."""
    assert cached_share(tmp_path) is None
