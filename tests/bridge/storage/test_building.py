"""Targets appear whole, are swapped in one step, and are built by one process at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.errors import CheckpointError, TargetExistsError
from bridge.storage import building, disk, locks
from bridge.storage.building import building_site, new_directory
from bridge.storage.locks import writing

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
    (target / "config.json").touch()
    renamed: list[object] = []
    monkeypatch.setattr(Path, "rename", lambda *paths: renamed.append(paths))
    with new_directory(target, overwrite=True) as directory:
        (directory / "new").touch()
        assert [path.name for path in target.iterdir()] == ["config.json"]
    assert [path.name for path in target.iterdir()] == ["new"]
    assert renamed == []
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("refused", ["nothing", "data"])
def test_where_names_cannot_be_exchanged_the_old_target_is_moved_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    """And is put back when the second of the two renames fails."""
    monkeypatch.setattr(building, "exchange", lambda *_: False)
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").touch()
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
    assert [path.name for path in target.iterdir()] == [
        "config.json" if refused == "data" else "new"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_target_that_was_moved_aside_is_put_back(tmp_path: Path) -> None:
    """A kill between the two renames: the next attempt finds the old target in the site."""
    aside = tmp_path / ".target.partial" / "old"
    aside.mkdir(parents=True)
    (aside.parent / "lock").touch()
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
    monkeypatch.setattr(locks, "_STRAGGLERS", 0.3)
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


@pytest.mark.parametrize("theirs", ["target/exported", "target"])
def test_what_comes_to_the_target_meanwhile_is_not_replaced(tmp_path: Path, theirs: str) -> None:
    """Another process may have made a checkpoint there: only --overwrite says that it may go."""

    def build() -> None:
        with new_directory(tmp_path / "target", overwrite=False):
            (tmp_path / theirs).mkdir(parents=True)
            (tmp_path / theirs / "thesis").touch()

    with pytest.raises(TargetExistsError, match="something has come"):
        build()
    assert (tmp_path / theirs / "thesis").exists()


def test_a_target_in_which_another_is_built_is_not_replaced(tmp_path: Path) -> None:
    """Its site would go with the old target."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").touch()
    with (
        building_site(target / "nested", overwrite=False),
        pytest.raises(TargetExistsError, match="another process is building a checkpoint in"),
        new_directory(target, overwrite=True),
    ):
        pass
    with new_directory(target, overwrite=True):
        pass
    assert list(target.iterdir()) == []


def test_what_is_no_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    """`--megatron-path . --overwrite` at home."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").touch()
    with (
        pytest.raises(TargetExistsError, match="no checkpoint"),
        new_directory(tmp_path / "home", overwrite=True),
    ):
        pass
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis"]


@pytest.mark.parametrize("kind", ["directory", "link"])
def test_what_only_has_the_name_of_a_site_is_somebody_s(tmp_path: Path, kind: str) -> None:
    """It is neither built in nor swept."""
    theirs = tmp_path / (".target.partial" if kind == "directory" else "elsewhere")
    theirs.mkdir()
    (theirs / "thesis").touch()
    if kind == "link":
        (tmp_path / ".target.partial").symlink_to(theirs)
    with (
        pytest.raises(TargetExistsError, match="was not made for that"),
        new_directory(tmp_path / "target", overwrite=False),
    ):
        pass
    assert [path.name for path in theirs.iterdir()] == ["thesis"]


def test_what_somebody_lays_into_a_site_is_not_swept(tmp_path: Path) -> None:
    """Only what is built there is."""
    with new_directory(tmp_path / "target", overwrite=False) as directory:
        (directory.parent / "thesis").touch()
    assert (tmp_path / ".target.partial" / "thesis").exists()
    assert (tmp_path / "target").is_dir()


def test_ctrl_c_between_the_two_renames_puts_the_old_target_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where names cannot be exchanged."""
    monkeypatch.setattr(building, "exchange", lambda *_: False)
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").touch()
    rename = Path.rename

    def interrupted(path: Path, to: Path) -> Path:
        found = rename(path, to)
        if path == target:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), new_directory(target, overwrite=True):
        pass
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_mount_point_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rename can take its place, and the work would be lost at its end."""
    (tmp_path / "target").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "target")
    with (
        pytest.raises(TargetExistsError, match="mount point"),
        new_directory(tmp_path / "target", overwrite=True),
    ):
        pass


def test_a_link_to_itself_is_refused_at_once(tmp_path: Path) -> None:
    """As it can never become a directory."""
    (tmp_path / "target").symlink_to("target")
    with (
        pytest.raises(TargetExistsError, match="leads to itself"),
        new_directory(tmp_path / "target", overwrite=True),
    ):
        pass


def test_the_names_of_new_parents_are_on_the_disk_and_go_with_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever finds the target after a power cut finds it by its whole path."""
    synced: list[Path] = []
    real = disk.sync_directory

    def sync(path: Path) -> None:
        synced.append(path)
        real(path)

    monkeypatch.setattr(disk, "sync_directory", sync)
    with pytest.raises(RuntimeError), new_directory(tmp_path / "a" / "b" / "c", overwrite=False):
        raise RuntimeError
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} <= set(synced)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_target_keeps_its_mode(tmp_path: Path) -> None:
    """Whoever made it may have had a reason to let nobody else in."""
    (tmp_path / "target").mkdir(mode=0o700)
    with new_directory(tmp_path / "target", overwrite=False) as directory:
        (directory / "new").touch()
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o700


def test_a_write_protected_target_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could not be moved at the end. Root may do anything, so its answer is given for it."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").touch()
    monkeypatch.setattr(os, "access", lambda path, _: path.name != "target")
    with (
        pytest.raises(TargetExistsError, match="write-protected"),
        new_directory(tmp_path / "target", overwrite=True),
    ):
        pass


def test_the_mode_of_the_old_target_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its owner may not write, the new one could not be moved with it."""
    target, modes = tmp_path / "target", []
    target.mkdir()
    (target / "config.json").touch()
    target.chmod(0o555)
    exchange = disk.exchange

    def seen(one: Path, other: Path) -> bool:
        modes.append(one.stat().st_mode & 0o777)
        return exchange(one, other)

    monkeypatch.setattr(building, "exchange", seen)
    monkeypatch.setattr(os, "access", lambda *_: True)
    with new_directory(target, overwrite=True) as directory:
        (directory / "new").touch()
    assert modes[0] & 0o700 == 0o700
    assert target.stat().st_mode & 0o777 == 0o555
    assert [path.name for path in target.iterdir()] == ["new"]


def test_what_is_ours_goes_write_protected_or_not() -> None:
    """Of an old target whose owner had protected it; as somebody who is not root."""
    script = """
import os, sys
from pathlib import Path
from bridge.storage.building import building_site
if not os.geteuid():
    os.setgid(65534)
    os.setuid(65534)
target = Path(sys.argv[1])
with building_site(target, overwrite=False) as site:
    inner = site.root / "old" / "inner"
    inner.mkdir(parents=True)
    (inner / "file").touch()
    inner.chmod(0o555)
    inner.parent.chmod(0o555)
    target.mkdir()
    site.sweep()
    print(sorted(path.name for path in site.root.iterdir()))
"""
    with tempfile.TemporaryDirectory() as home:  # pytest's own are for root alone
        Path(home).chmod(0o777)
        found = subprocess.run(  # noqa: S603 (our own interpreter)
            [sys.executable, "-c", script, f"{home}/target"],
            env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert found.stdout == "['lock', 'writers']\n", found.stderr


@pytest.mark.parametrize("inside", [False, True])
def test_the_current_directory_is_no_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, inside: bool
) -> None:
    """It would be another one afterwards, and relative names would lead nowhere."""
    (tmp_path / "target" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "target" / ("below" if inside else "."))
    with (
        pytest.raises(TargetExistsError, match="current directory"),
        new_directory(tmp_path / "target", overwrite=True),
    ):
        pass
    with new_directory(Path("new"), overwrite=False) as directory:
        (directory / "file").touch()
    assert Path("new", "file").is_file()


def test_a_name_that_is_too_long_for_its_site_is_told_why(tmp_path: Path) -> None:
    """A file system has 255 bytes for a name, of which the site's beside it takes some."""
    name = "x" * 250
    with (
        pytest.raises(CheckpointError, match=f"it is built as .{name}.partial: give it a shorter"),
        new_directory(tmp_path / name, overwrite=False),
    ):
        pass
