"""Results that do not go where they were sent are an error of every command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bridge.convert import import_checkpoint
from harness.toys import toy_named, write_checkpoint

ROOT = Path(__file__).parents[2]


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of a shell's; `nemotron-bridge` is this one."""
    ours = f"{sys.executable} -m harness"
    return subprocess.run(  # noqa: S603 - our own
        ["/bin/sh", "-c", command.replace("nemotron-bridge", ours)],
        capture_output=True, text=True, timeout=100, check=False, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is full")
@pytest.mark.parametrize("command", ["list", "list --json", "explain BR500", "list --help"])
def test_a_full_disk_is_one_error(command: str) -> None:
    """By rich, by JSON and by typer, in pieces that a buffer holds and in larger ones."""
    done = shell(f"nemotron-bridge {command} >/dev/full")
    assert done.returncode == 3
    assert done.stderr.splitlines() == [
        "BR500 results cannot be written: No space left on device",
        "  --> stdout",
        "help: make room or let them go elsewhere, and run the command again",
    ]


def test_a_closed_stdout_is_an_error() -> None:
    """Nobody would see that nothing came."""
    done = shell("nemotron-bridge list >&-")
    assert done.returncode == 3
    assert done.stderr.startswith("BR500 stdout is closed, and results would be lost\n")


def test_a_reader_may_go_before_the_end() -> None:
    """As `head` does: without a word, and without a traceback."""
    done = shell("nemotron-bridge list --json | head -n 1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "[\n", "")


def unread(*arguments: str | Path, stderr: int | None = None) -> int:
    """The exit code of a command into a pipe that nobody reads, and never will."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(  # noqa: S603 - our own
            [sys.executable, "-m", "harness", *arguments],
            stdout=writer, stderr=stderr or writer, timeout=100, check=False, cwd=ROOT,
        ).returncode  # fmt: skip
    finally:
        os.close(writer)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy and its conversion."""
    root = tmp_path_factory.mktemp("unread")
    write_checkpoint(toy_named("nano-4b"), root / "hf")
    import_checkpoint(root / "hf", root / "megatron")
    return root


def test_a_verdict_is_the_same_whoever_reads(converted: Path, tmp_path: Path) -> None:
    """Neither is a finding made of a pipe that is closed, nor one lost to it."""
    healthy = converted / "megatron"
    shutil.copytree(healthy, tmp_path / "damaged")
    with (tmp_path / "damaged" / "latest_checkpointed_iteration.txt").open("a") as file:
        file.write("x")
    assert unread("verify", "--manifest", healthy) == 0
    assert unread("verify", "--manifest", tmp_path / "damaged", "--json") == 1
    assert unread("verify", "--manifest", tmp_path / "nowhere") == 2


@pytest.mark.parametrize("command", ["list", "list --json", "explain BR500", "list --help"])
def test_nobody_reads_and_nothing_is_said(command: str) -> None:
    """By rich, by JSON and by typer: as in the place where the disk is full."""
    assert unread(*command.split()) == 0
    done = shell(f"{{ nemotron-bridge {command}; echo $? >&2; }} | true")
    assert done.stderr == "0\n"


def test_what_is_written_elsewhere_is_written(converted: Path, tmp_path: Path) -> None:
    """More than a pipe holds is printed, the work goes on, and the picture is there."""
    assert unread("plan", converted / "hf") == 0
    picture = tmp_path / "model.svg"
    assert unread("inspect", converted / "hf", "--blocks", "--draw", picture) == 0
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
def test_diagnostics_that_nobody_takes_change_no_exit_code(stderr: str) -> None:
    """Of bad input it is 2, and 1 would say that a check had failed."""
    done = shell(f"nemotron-bridge explain BR999 {stderr}")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
