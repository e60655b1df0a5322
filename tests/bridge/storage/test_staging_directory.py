"""The staging directory: there while it is needed, gone afterwards, never too small."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from bridge.errors import CheckpointError
from bridge.storage.staging_directory import staging_directory


class Usage(NamedTuple):
    """What `shutil.disk_usage` tells."""

    free: int


def test_it_is_empty_and_does_not_stay(tmp_path: Path) -> None:
    """Whatever was built in it goes with it, after a failure too."""
    with staging_directory(tmp_path, needed=1) as directory:
        assert directory.parent == tmp_path
        assert list(directory.iterdir()) == []
        (directory / "deep" / "er").mkdir(parents=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), staging_directory(tmp_path, needed=1):
        1 / 0  # noqa: B018 - a failure
    assert list(tmp_path.iterdir()) == []


def test_by_default_it_is_where_tmpdir_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for every program."""
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with staging_directory(None, needed=1) as directory:
        assert directory.parent == tmp_path


def test_a_file_that_has_no_room_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both sizes, and the option that takes another disk."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(free=2_000_000_000))
    with (
        pytest.raises(CheckpointError, match=r"file of 5 GB .* 2 GB are free") as caught,
        staging_directory(tmp_path, needed=5_000_000_000),
    ):
        pytest.fail("there is no room")
    assert caught.value.where == (str(tmp_path),)
    assert "--staging DIR" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []
    with staging_directory(tmp_path, needed=2_000_000_000):
        pass


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """An error of ours, with the way out."""
    with (
        pytest.raises(CheckpointError, match="No such file") as caught,
        staging_directory(tmp_path / "nowhere", needed=1),
    ):
        pytest.fail("there is no directory")
    assert "--staging DIR" in str(caught.value.hint)


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(
    tmp_path: Path,
) -> None:
    """By a lock, which ends with its holder however that ends."""
    code = (
        "import sys, time, pathlib\n"
        "from bridge.storage.staging_directory import staging_directory\n"
        "with staging_directory(pathlib.Path(sys.argv[1]), needed=1) as directory:\n"
        "    (directory / 'half').write_bytes(b'x')\n"
        "    print(directory, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        try:
            with staging_directory(tmp_path, needed=1) as ours:
                assert {theirs, ours} == set(tmp_path.iterdir())
        finally:
            other.send_signal(signal.SIGKILL)
    assert [theirs] == list(tmp_path.iterdir())
    with staging_directory(tmp_path, needed=1) as ours:
        assert [ours] == list(tmp_path.iterdir())
