"""Scratch of a killed command goes with the next one; nobody else's is touched.

What siblings do to one another at the same moment is in `storage/test_staging_directory.py`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bridge.scratch import held_directory
from harness.conditions import scratch
from harness.launcher import RankPool

HOLD = """
import time
from harness.conditions import scratch
from harness.launcher import RankPool

with scratch(None) as directory:
    pool = RankPool()
    (directory / "toy").touch()
    print(directory, pool.log_dir, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What TMPDIR says."""
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_what_a_killed_run_left_goes_with_the_next_and_a_living_ones_stays(temporary: Path) -> None:
    """Of a command and of a pool of ranks."""
    with subprocess.Popen(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        theirs = {Path(one) for one in other.stdout.readline().split()}
        assert len(theirs) == 2
        try:
            with scratch(None):
                assert theirs < set(temporary.iterdir())
        finally:
            other.send_signal(signal.SIGKILL)
    assert theirs == set(temporary.iterdir())
    with RankPool() as pool:
        assert [pool.log_dir] == list(temporary.iterdir())
    assert list(temporary.iterdir()) == []


def test_a_directory_that_others_share_is_not_swept(temporary: Path) -> None:
    """Locks of one machine say nothing of another's, in `--workdir`."""
    left = temporary / "nemotron-bridge-scratch-1"
    left.mkdir()
    with scratch(temporary) as directory:
        assert {left, directory} == set(temporary.iterdir())
    assert left.is_dir()


def test_links_files_and_directories_of_others_are_left_alone(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever they are called."""
    (temporary / "mine").mkdir()
    (temporary / "mine" / "precious").touch()
    (temporary / "nemotron-bridge-scratch-link").symlink_to(temporary / "mine")
    (temporary / "nemotron-bridge-scratch-file").touch()
    os.mkfifo(temporary / "nemotron-bridge-scratch-fifo")
    (temporary / "nemotron-bridge-staging-1").mkdir()
    (temporary / "nemotron-bridge-1").mkdir()
    before = set(temporary.rglob("*"))
    with held_directory():
        pass
    assert before == set(temporary.rglob("*"))
    (temporary / "nemotron-bridge-scratch-root").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 1 + os.getuid())
    with held_directory() as directory:
        assert directory.is_dir()
    assert (temporary / "nemotron-bridge-scratch-root").is_dir()


def test_where_there_are_no_locks_a_directory_is_given_all_the_same(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is swept."""
    (temporary / "nemotron-bridge-scratch-1").mkdir()

    def flock(descriptor: int, operation: int) -> None:
        del descriptor, operation
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with held_directory() as directory:
        (directory / "file").touch()
    assert [temporary / "nemotron-bridge-scratch-1"] == list(temporary.iterdir())
