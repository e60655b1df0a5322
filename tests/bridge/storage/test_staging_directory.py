"""The staging directory: there while it is needed, gone afterwards, never too small."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


def work_in_one(root: Path) -> int:
    """Use a staging directory as an upload does; 1 when all of it stayed to the end."""
    with staging_directory(root, needed=1) as directory:
        (directory / "built").write_bytes(b"x")
        return len((directory / "built").read_bytes())


def test_many_at_once_do_not_take_each_others_directories(tmp_path: Path) -> None:
    """Each sweeps while its siblings are between creating theirs and holding them."""
    with ThreadPoolExecutor(16) as pool:  # a lock is of an open file: threads are as processes
        assert sum(pool.map(work_in_one, [tmp_path] * 1000)) == 1000
    assert list(tmp_path.iterdir()) == []


def test_processes_at_once_do_not_take_each_others_directories(tmp_path: Path) -> None:
    """As the workers of one command do, over and over."""
    code = (
        "import sys, pathlib\n"
        "from bridge.storage.staging_directory import staging_directory\n"
        "for _ in range(300):\n"
        "    with staging_directory(pathlib.Path(sys.argv[1]), needed=1) as directory:\n"
        "        (directory / 'built').touch(exist_ok=False)\n"
        "        (directory / 'built').unlink()\n"
    )
    others = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])  # noqa: S603 - our own
        for _ in range(4)
    ]
    assert [other.wait(timeout=240) for other in others] == [0, 0, 0, 0]
    assert list(tmp_path.iterdir()) == []


def held(directory: Path) -> int:
    """Lock a directory as another process would; the descriptor to close in the end."""
    descriptor = os.open(directory, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def before_the_lock(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Let a sibling act once, between the opening of the next directory and its lock."""
    true, pending = fcntl.flock, [act]

    def flock(descriptor: int, operation: int) -> None:
        while pending:
            pending.pop()()
        true(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("moment", ["gone when opened", "gone when locked", "being removed"])
def test_a_directory_that_a_sibling_sweeps_before_it_is_held_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Wherever the sibling strikes; what is given in the end is there, held, and the only one."""
    true, made, descriptors = tempfile.mkdtemp, list[Path](), list[int]()

    def mkdtemp(*, prefix: str, dir: Path) -> str:  # noqa: A002 - its own name for it
        made.append(Path(true(prefix=prefix, dir=dir)))
        if len(made) == 1 and moment == "gone when opened":
            made[0].rmdir()
        elif len(made) == 1 and moment == "gone when locked":
            before_the_lock(monkeypatch, made[0].rmdir)
        elif len(made) == 1:
            descriptors.append(held(made[0]))
        elif descriptors:
            made[0].rmdir()
            os.close(descriptors.pop())
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    with staging_directory(tmp_path, needed=1) as directory:
        assert [directory] == list(tmp_path.iterdir())
        assert made[1:] == [directory]
        with pytest.raises(BlockingIOError):
            held(directory)


def test_a_sweep_leaves_what_has_taken_the_place_of_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sweep the same leftover, and its name is given out again in between."""
    with staging_directory(tmp_path, needed=1) as theirs:
        pass
    theirs.mkdir()
    descriptors = []

    def replaced() -> None:
        theirs.rmdir()
        theirs.mkdir()
        descriptors.append(held(theirs))
        (theirs / "built").touch()

    before_the_lock(monkeypatch, replaced)
    with staging_directory(tmp_path, needed=1):
        assert (theirs / "built").exists()
    os.close(descriptors.pop())
