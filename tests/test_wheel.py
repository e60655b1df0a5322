"""What a user installs is complete: the built wheel works where nothing of the clone is."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, as pip lays them out."""
    directory = tmp_path_factory.mktemp("wheel")
    subprocess.run(  # noqa: S603
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory / "site")
    return directory / "site"


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "harness", "parity", "--list"],
        ["-m", "harness", "golden", "check", "--select", "toy-nano-4b*"],
        ["-c", "import bridge, harness; print(bridge.__file__, harness.__file__)"],
    ],
    ids=["suites", "goldens", "packages"],
)
def test_the_wheel_alone_is_enough(site: Path, tmp_path: Path, command: list[str]) -> None:
    """Suites and goldens travel with it; the clone's are not looked at."""
    done = subprocess.run(  # noqa: S603
        [sys.executable, *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout
    assert done.stdout


def test_the_wheel_names_its_command(site: Path) -> None:
    """An installer makes `nemotron-bridge` from this entry."""
    (entry,) = site.glob("*.dist-info/entry_points.txt")
    assert "nemotron-bridge = harness.cli:main" in entry.read_text(encoding="utf-8")
