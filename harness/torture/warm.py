"""A process that has imported everything, and forks a command for each trial.

Importing takes seconds, a conversion of a toy a few tenths of one. The server starts no thread, so
that a fork of it is a process like any other; jobs come as lines of JSON on its stdin, and answers
go to its stdout.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from harness.errors import TortureError

_START: Final = 120.0
"""Seconds for the server to import everything."""
_LONGEST: Final = 120.0
"""Seconds for a command; a conversion of a toy that takes longer hangs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One command, run as a process of its own.

    Args:
        arguments: After `nemotron-bridge`.
        directory: Below which changes are counted; holds `tmp`, which is its TMPDIR.
        sources: Below which reading is counted.
        log: Its stdout and stderr go to this name with `.out` and `.err`, what the layer saw to
            `.json`.
        fault: As `harness.torture.faults` spells it; empty for none.
    """

    arguments: Sequence[str]
    directory: str
    sources: Sequence[str]
    log: str
    fault: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a command ended.

    Args:
        code: Its exit code, negative for a signal; None where it had to be killed for time.
        seconds: It took.
        orphans: Processes of it that outlived it by more than they may.
        seen: What the layer saw: `counts`, `events`, `struck`, `unsynced`.
    """

    code: int | None
    seconds: float
    orphans: Sequence[int]
    out: str
    err: str
    seen: Mapping[str, Any] = field(default_factory=dict)


class Warm:
    """The client's side of one server.

    Args:
        load: Modules that it imports first: a test breaks the product so.
    """

    def __init__(self, load: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", "harness.torture.server", *load],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is ours to handle
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self._buffer = b""
        self._answer(_START)

    def run(self, job: Job, *, meanwhile: Callable[[int], None] | None = None) -> Ended:
        """Run a command to its end.

        Args:
            job: The command.
            meanwhile: Is given its process id, and may kill what it likes.
        """
        if self._process.stdin is None:
            raise AssertionError("the server was started with a pipe")
        started = time.monotonic()
        self._process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
        self._process.stdin.flush()
        pid = self._answer(_START)["pid"]
        code = None
        if meanwhile is not None:
            meanwhile(pid)
        try:
            code = self._answer(_LONGEST)["code"]
        except TimeoutError:
            _kill_session(pid)
            self._answer(_START)
        seconds = time.monotonic() - started
        orphans = _outliving(pid)
        return Ended(
            code=code,
            seconds=seconds,
            orphans=orphans,
            out=_text(f"{job.log}.out"),
            err=_text(f"{job.log}.err"),
            seen=json.loads(_text(f"{job.log}.json") or "{}"),
        )

    def _answer(self, timeout: float) -> dict[str, Any]:
        stdout = self._process.stdout
        if stdout is None:
            raise AssertionError("the server was started with a pipe")
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                read = os.read(stdout.fileno(), 1 << 16)
                if not read:
                    raise TortureError(
                        "the process that forks the trials has ended",
                        where=f"exit code {self._process.wait()}",
                        hint="what is above may say why",
                    )
                self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End the server."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def session_of(leader: int) -> list[int]:
    """The living processes that a command consists of, itself first."""
    found = []
    for entry in os.listdir("/proc"):  # noqa: PTH208 - many, and often
        if entry.isdigit():
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{entry}/stat").read_text("utf-8", errors="replace")
                state, _, _, session, *_ = stat.rpartition(")")[2].split()
                if int(session) == leader and state not in "ZX":
                    found.append(int(entry))
    return sorted(found, key=lambda pid: (pid != leader, pid))


_OUTLIVE: Final = 10.0
"""Seconds in which the other processes of a command have to notice that its first is gone."""


def _outliving(leader: int) -> list[int]:
    deadline = time.monotonic() + _OUTLIVE
    while left := session_of(leader):
        if time.monotonic() > deadline:
            _kill_session(leader)
            return left
        time.sleep(0.02)
    return []


def _kill_session(leader: int) -> None:
    for pid in session_of(leader):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _text(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def load_all(names: Sequence[str]) -> None:
    """Import modules by name."""
    for name in names:
        importlib.import_module(name)
