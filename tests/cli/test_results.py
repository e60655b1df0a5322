"""Results that do not go where they were sent are an error of every command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
