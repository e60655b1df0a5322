"""Directories that appear whole: what the sweep before them takes away, and what it leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bridge.storage.building import new_directory


@pytest.fixture(scope="module")
def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(timeout=60)
    return process.pid


@pytest.mark.parametrize("name", ["m[1]", "m*", "m?", "plain"])
def test_leftovers_of_a_target_of_any_name_are_swept(tmp_path: Path, gone: int, name: str) -> None:
    """A name may hold what a pattern gives a meaning to."""
    (tmp_path / f".{name}.partial-{gone}").mkdir()
    with new_directory(tmp_path / name, overwrite=False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("name", "other"), [("m[1]", "m1"), ("m*", "model"), ("m?", "mx")])
def test_leftovers_of_another_target_are_none_of_its_business(
    tmp_path: Path, gone: int, name: str, other: str
) -> None:
    """An old target that was moved aside would come back under the wrong name."""
    for left in (f".{other}.partial-{gone}", f".{other}.partial-{gone}-old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "theirs").touch()
    with new_directory(tmp_path / name, overwrite=False):
        pass
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == {
        name,
        f".{other}.partial-{gone}",
        f".{other}.partial-{gone}/theirs",
        f".{other}.partial-{gone}-old",
        f".{other}.partial-{gone}-old/theirs",
    }
