"""Processes that read inputs: started, watched, ended, and what killed them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from mmap import mmap
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Final

from harness.fuzz.worker import (
    MEMORY,
    STACK_SIGNAL,
    Outcome,
    Range,
    stamp,
    stamped,
    work,
    write_input,
)

_WARM_UP: Final = 120.0  # seconds that imports may take on a busy machine
_STARVED: Final = 6.0
"""So many times as long may an input take of which the machine is the cause."""
_CLOCK: Final = os.sysconf("SC_CLK_TCK")
_FOR_A_STACK: Final = 0.5  # seconds
_FRAME: Final = re.compile(r'File ".*/((?:bridge|harness)/(?!fuzz/).*?)", line (\d+)')


class Slot:
    """A place for one process at a time, with a world of its own.

    Args:
        world: What to copy.
        root: Where to.
        timeout: Seconds that one input may take.
        memory: Bytes that a process may take beyond what it begins with.
    """

    def __init__(self, world: Path, root: Path, *, timeout: float, memory: int) -> None:
        self._world, self._timeout, self._memory = world, timeout, memory
        self.root = Path(shutil.copytree(world, root))
        self.batch: Range | None = None
        self._process: BaseProcess | None = None
        self._results: Connection | None = None
        self._shared = mmap(-1, 64)
        self._log = (root.parent / f"{root.name}.log").open("w+b", buffering=0)
        self._next = 0
        self._began = 0.0
        self._is_full = False
        self._path = root

    @property
    def is_busy(self) -> bool:
        """Whether it has a batch."""
        return self.batch is not None

    @property
    def ends(self) -> list[Connection]:
        """What to wait for."""
        return [] if self._results is None else [self._results]

    def begin(self, batch: Range) -> None:
        """Start a process on a batch."""
        self.batch, self._next, self._began = batch, batch.start, time.monotonic()
        self._is_full = False
        self._path = batch.kind.file(self.root)
        stamp(self._shared, batch.start, 0.0)
        self._log.truncate(0)
        self._log.seek(0)
        context = multiprocessing.get_context("fork")  # kinds are functions, and starts are cheap
        self._results, theirs = context.Pipe(duplex=False)
        self._process = context.Process(
            target=work,
            args=(batch, self.root, theirs, self._shared, self._log.fileno()),
            kwargs={"memory": self._memory},
        )
        self._process.start()
        theirs.close()

    def look(self) -> tuple[list[Outcome], Range | None]:
        """What has become of inputs since, and what is left of the batch when its process ended."""
        assert self.batch is not None  # noqa: S101 - whoever asks has begun one
        assert self._process is not None and self._results is not None  # noqa: S101, PT018 - as above
        found: list[Outcome] = []
        ended = self._receive(found)
        if not ended:
            overdue = self._overdue()
            if overdue is not None:
                stack = self._stack()
                self.end()
                self._receive(found)
                # It may have gone on meanwhile, and have told of this input and of others.
                found = [one for one in found if one.index != overdue]
                found.append(self._fate("hang", stack, overdue))
                return found, self._finish()
            return found, None
        self._process.join(_WARM_UP if self._next < self.batch.stop else 5)
        code = self._process.exitcode
        stack = self._read_log()
        self.end()
        if code:
            word = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
            found.append(self._fate(word, stack))
        elif self._next < self.batch.stop and not self._is_full:
            found.append(self._fate("exit 0", stack))
        return found, self._finish()

    def _receive(self, found: list[Outcome]) -> bool:
        """Take what has come; whether nothing more will."""
        assert self._results is not None  # noqa: S101 - see `look`
        try:
            while self._results.poll():
                outcome: Outcome = self._results.recv()
                found.append(outcome)
                self._next = max(self._next, outcome.index + 1)
                self._is_full = outcome.problem == MEMORY  # upon which it ends
                self._began = time.monotonic()
        except (EOFError, OSError):
            return True
        return False

    def _overdue(self) -> int | None:
        """The input that takes too long, if one does: and not the machine, which has no time."""
        index, started, computed = stamped(self._shared)
        now = time.monotonic()
        if not started:
            return index if now - self._began > _WARM_UP else None
        waited = now - started
        if waited <= self._timeout:
            return None
        used, waits_for_a_core = self._state()
        starved = waits_for_a_core and used - computed < self._timeout / 2
        return None if starved and waited <= _STARVED * self._timeout else index

    def _state(self) -> tuple[float, bool]:
        """Seconds that the process has computed, and whether any thread of it could go on."""
        assert self._process is not None  # noqa: S101 - see `look`
        found, ready = 0.0, False
        with contextlib.suppress(OSError):  # it has ended meanwhile
            for task in Path(f"/proc/{self._process.pid}/task").iterdir():
                fields = (task / "stat").read_text("ascii").rpartition(") ")[2].split()
                found += (int(fields[11]) + int(fields[12])) / _CLOCK
                ready = ready or fields[0] == "R"
        return found, ready

    def _stack(self) -> str:
        """Where the process is, by its own word."""
        assert self._process is not None  # noqa: S101 - see `look`
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid or 0, STACK_SIGNAL)
            time.sleep(_FOR_A_STACK)
        return self._read_log()

    def _read_log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode("utf-8", "replace")

    def _fate(self, problem: str, stack: str, index: int | None = None) -> Outcome:
        now, started, _ = stamped(self._shared)
        index = now if index is None else index
        seconds = time.monotonic() - started if started and index == now else self._timeout
        self._next = max(self._next, index + 1)
        return Outcome(
            index=index, problem=problem, place=_place_of(stack), details=stack[-4000:],
            seconds=seconds,
        )  # fmt: skip

    def _finish(self) -> Range | None:
        """Put the world back as it was; what is left to do."""
        assert self.batch is not None  # noqa: S101 - see `look`
        batch, self.batch = self.batch, None
        write_input(self._path, batch.kind.originals(self._world)[0])
        return replace(batch, start=self._next) if self._next < batch.stop else None

    def end(self) -> None:
        """Kill the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def close(self) -> None:
        """Leave nothing behind."""
        self.end()
        self._log.close()
        self._shared.close()


def _place_of(stack: str) -> str:
    """The innermost lines of ours in what `faulthandler` has written, or its first line."""
    found = [f"{Path(name).name}:{line}" for name, line in _FRAME.findall(stack)]
    return ", ".join(found[1::-1]) or stack.partition("\n")[0]
