"""Run a command as a user would, and say what it took."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

OURS: Final = (sys.executable, "-m", "harness")
"""`nemotron-bridge`, of this interpreter."""

_LAUNCHER: Final = Path(__file__).with_name("timed.py")
_LOOK_EVERY: Final = 0.1
_WAIT_EVERY: Final = 0.02
_TAIL: Final = 3


def program(name: str, *arguments: str | Path) -> tuple[str | Path, ...]:
    """The command of a trial of this package."""
    return (OURS[0], "-m", f"harness.benchmarks.{name}", *arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a command.

    Args:
        seconds: Wall time, from before its start until it was gone.
        exit_code: Negative for a signal, as `subprocess` has it.
        peak_rss: Bytes: of the largest process it consisted of; with `tree`, of all that it
            consisted of at any moment, if that is more.
        stdout: What it printed.
        stderr: What it said meanwhile.
        timed_out: It was killed at the time limit.
    """

    seconds: float
    exit_code: int
    peak_rss: int
    stdout: str = ""
    stderr: str = ""
    timed_out: bool = False

    @property
    def failure(self) -> str:
        """Why the run is no measurement; empty when it is one."""
        if self.timed_out:
            return f"killed at the time limit of {self.seconds:.0f} s"
        if self.exit_code == 0:
            return ""
        said = " | ".join(line for line in self.stderr.splitlines()[-_TAIL:] if line.strip())
        return f"exit code {self.exit_code}: {said or 'nothing on stderr'}"

    def json(self) -> dict[str, Any] | None:
        """The JSON object on its stdout; None without one.

        Lines around it are of libraries that announce themselves.
        """
        for begin in re.finditer(r"^{", self.stdout, re.MULTILINE):
            with contextlib.suppress(ValueError):
                found: dict[str, Any] = json.JSONDecoder().raw_decode(self.stdout, begin.start())[0]
                return found
        return None


def environment() -> dict[str, str]:
    """What children inherit: this process's environment, and Python may keep its bytecode.

    Compiling the same modules at every start is not what a user's start-up consists of.
    """
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def run(command: Sequence[str | Path], *, timeout: float, tree: bool = False) -> Run:
    """Run a command to its end, or kill it and all it started at the time limit.

    Args:
        command: Program and arguments.
        timeout: Seconds.
        tree: Also look at the memory of all its processes together, ten times a second.
    """
    with tempfile.TemporaryDirectory(prefix="nemotron-bridge-") as name:
        report, out, err = (Path(name) / part for part in ("report", "out", "err"))
        arguments = [str(one) for one in (report, out, err, *command)]
        started = time.perf_counter()
        launcher = subprocess.Popen(  # noqa: S603 - our own commands
            [sys.executable, "-I", "-S", str(_LAUNCHER), *arguments],
            env=environment(),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            together = _wait(launcher, timeout, tree=tree)
        except BaseException:
            _kill(launcher)
            raise
        timed_out = launcher.poll() is None
        found: dict[str, Any] = {"seconds": time.perf_counter() - started, "exit_code": 1}
        if timed_out:
            _kill(launcher)
        elif report.is_file():
            found = json.loads(report.read_text("utf-8"))
        return Run(
            seconds=found["seconds"],
            exit_code=found["exit_code"],
            peak_rss=max(found.get("peak_rss", 0), together),
            stdout=_text(out),
            stderr=_text(err),
            timed_out=timed_out,
        )


def _wait(launcher: subprocess.Popen[bytes], timeout: float, *, tree: bool) -> int:
    """Wait for the end or the time limit; the most bytes that all processes held at once."""
    ends, look_at, together = time.monotonic() + timeout, 0.0, 0
    while launcher.poll() is None and (now := time.monotonic()) < ends:
        if tree and now >= look_at:
            together, look_at = max(together, _tree_rss(launcher.pid)), now + _LOOK_EVERY
        time.sleep(_WAIT_EVERY)
    return together


def _tree_rss(pid: int) -> int:
    """Bytes of all descendants; pages that they share are counted for each."""
    found = 0
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return 0
    for child in children:
        try:
            found += int(child.memory_info().rss)
        except psutil.Error:  # it has just ended
            continue
    return found


def _kill(launcher: subprocess.Popen[bytes]) -> None:
    """End the launcher, the command, and whatever stayed in their process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()


def _text(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.is_file() else ""
