"""Targets appear whole, are swapped in one step, and are built by one process at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.errors import CheckpointError, TargetExistsError
from bridge.storage import building
from bridge.storage.building import building_site, new_directory, writing

ROOT = Path(__file__).parents[3]
HOLD = """
import sys, time
from pathlib import Path
from bridge.storage.building import new_directory
with new_directory(Path(sys.argv[1]), overwrite=True) as directory:
    (directory / "half").touch()
    print("built", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def builder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is building `tmp_path / "target"`."""
    process = subprocess.Popen(  # noqa: S603 (our own interpreter)
        [sys.executable, "-c", HOLD, str(tmp_path / "target")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "built\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=60)


def test_a_second_process_is_refused_and_harms_nothing(
    builder: subprocess.Popen[str], tmp_path: Path
) -> None:
    """It says who is in the way; what is being built stays."""
    with (
        pytest.raises(TargetExistsError, match="another process is building this target"),
        new_directory(tmp_path / "target", overwrite=True),
    ):
        pass
    assert (tmp_path / ".target.partial" / "data" / "half").exists()
    builder.send_signal(signal.SIGKILL)
    builder.wait(timeout=60)
    with new_directory(tmp_path / "target", overwrite=False) as directory:
        assert list(directory.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_an_old_target_is_there_until_the_new_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but one exchange of names lies between them."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    renamed: list[object] = []
    monkeypatch.setattr(Path, "rename", lambda *paths: renamed.append(paths))
    with new_directory(target, overwrite=True) as directory:
        (directory / "new").touch()
        assert [path.name for path in target.iterdir()] == ["old"]
    assert [path.name for path in target.iterdir()] == ["new"]
    assert renamed == []
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("refused", ["nothing", "data"])
def test_where_names_cannot_be_exchanged_the_old_target_is_moved_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    """And is put back when the second of the two renames fails."""
    monkeypatch.setattr(building, "_exchange", lambda *_: False)
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    rename = Path.rename

    def refuse_data(path: Path, to: Path) -> Path:
        if path.name == refused:
            raise PermissionError(13, "Permission denied", str(path))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse_data)
    if refused == "data":
        with (
            pytest.raises(CheckpointError, match="Permission denied"),
            new_directory(target, overwrite=True) as directory,
        ):
            (directory / "new").touch()
    else:
        with new_directory(target, overwrite=True) as directory:
            (directory / "new").touch()
    assert [path.name for path in target.iterdir()] == ["old" if refused == "data" else "new"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_target_that_was_moved_aside_is_put_back(tmp_path: Path) -> None:
    """A kill between the two renames: the next attempt finds the old target in the site."""
    aside = tmp_path / ".target.partial" / "old"
    aside.mkdir(parents=True)
    (aside / "mine").touch()
    with (
        pytest.raises(TargetExistsError, match="already exists"),
        new_directory(tmp_path / "target", overwrite=False),
    ):
        pass
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["mine"]


def test_an_exchange_that_fails_is_an_error(tmp_path: Path) -> None:
    """Only a system that cannot exchange names gets the two renames instead."""
    (tmp_path / "target").mkdir()
    with building_site(tmp_path / "target", overwrite=True) as site:
        (tmp_path / "target" / "mine").touch()
        with pytest.raises(FileNotFoundError):
            site.place()
    assert (tmp_path / "target" / "mine").exists()


def test_nobody_begins_while_a_worker_of_a_killed_attempt_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers outlive their lead by a moment; one that does not end is named."""
    with building_site(tmp_path / "target", overwrite=False) as site:
        root, claim = site.root, site.claim
        site.data.mkdir()
    monkeypatch.setattr(building, "_STRAGGLERS", 0.3)
    with writing(root, claim):
        started = time.monotonic()
        with (
            pytest.raises(TargetExistsError, match="still writing this target"),
            building_site(tmp_path / "target", overwrite=False),
        ):
            pass
        assert time.monotonic() - started >= 0.3
    with building_site(tmp_path / "target", overwrite=False):
        pass
    with pytest.raises(CheckpointError, match="another attempt"), writing(root, claim):
        pass
