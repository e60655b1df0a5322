"""Rank processes as the operating system sees them: started, dumped, ended, read."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import psutil

from bridge.crew import bounds
from bridge.crew.attendants import wake_at_exit
from bridge.crew.local import without_main
from harness.fork_server import answering
from harness.ranks import RankSettings, serve

_PRELOAD: Final = ["harness.rank_imports"]
_DYING: Final = 10.0
"""Seconds in which a process that has closed its pipe is seen to have ended, mostly at once."""
_STACK_DUMP: Final = 0.3
"""Seconds for hung ranks to write their stacks."""
_TAIL_LINES: Final = 40


class Worker(Protocol):
    """A rank process, here or elsewhere, and the way to it."""

    @property
    def rank(self) -> int:
        """Which, from 0."""

    @property
    def pid(self) -> int:
        """Its process id, on its own host."""

    @property
    def is_here(self) -> bool:
        """Whether it runs on this host: whether its clock is ours."""

    @property
    def handles(self) -> Sequence[Any]:
        """What `multiprocessing.connection.wait` finds ready when there is something to receive."""

    def is_alive(self) -> bool:
        """Whether it has not ended."""

    def is_idle(self) -> bool:
        """Whether it is alive and has nothing to say."""

    def is_stopped(self) -> bool:
        """Whether a signal has stopped it, as far as this host can tell."""

    def send(self, message: bytes) -> None:
        """Give it a task; one that has ended is noticed by `receive`."""

    def receive(self) -> bytes | None:
        """What it answers; None when it has ended instead."""

    def death(self) -> str:
        """How it ended, said of it: "was ended by SIGKILL"."""

    def dump_stacks(self) -> None:
        """Have it write the stacks of its threads to its log, soon."""

    def log_tail(self) -> str:
        """The last lines it has logged since it was sent something."""

    def kill(self) -> None:
        """End it and all it has started, without waiting."""

    def join(self) -> None:
        """Wait until it has ended."""


class WorkerSource(Protocol):
    """Where a pool has its rank processes from."""

    @property
    def capacity(self) -> int | None:
        """How many ranks there can be, for one pool at a time; None for any number of both."""

    def start(self, settings: Sequence[RankSettings]) -> list[Worker]:
        """Start ranks, those of the settings; they are ready when they answer.

        Raises:
            WorkerFailedError: HN202, a place for one is gone.
            WorkerLostError: BR501, the process that they are forked from does not answer.
        """

    def rendezvous(self, private: Path, generation: int) -> str:
        """A name for new groups, for `Task.rendezvous`; `private` is the pool's directory."""

    def warm_up(self) -> None:
        """Import what ranks need, without waiting for it."""


class LocalRanks:
    """A `WorkerSource`: any number of processes of this host."""

    capacity: Final = None

    def start(self, settings: Sequence[RankSettings]) -> list[Worker]:
        """See `WorkerSource`."""
        started: list[Worker] = []
        try:
            started.extend(LocalWorker(one) for one in settings)
        except BaseException:
            kill(started)
            raise
        return started

    def rendezvous(self, private: Path, generation: int) -> str:
        """See `WorkerSource`."""
        return str(private / f"rendezvous-{generation}")

    def warm_up(self) -> None:
        """Start the process that imports Megatron-Core and forks ranks, without waiting for it."""
        wake_at_exit()
        multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOAD)
        multiprocessing.forkserver.ensure_running()


class LocalWorker:
    """A `Worker` of this host, started: its process, the pipe to it and where it logs."""

    is_here: Final = True

    def __init__(self, settings: RankSettings) -> None:
        wake_at_exit()
        context = _context(settings.device)
        self._is_forked = settings.device == "cpu"
        self.rank = settings.rank
        self._connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=serve, args=(theirs, settings), name=f"rank{settings.rank}"
        )
        with without_main(), self._answered(min(bounds.JOIN, settings.start_timeout)):
            self._process.start()
        theirs.close()
        self._log = settings.log
        self._logged = _size(settings.log)

    @property
    def pid(self) -> int:
        """See `Worker`."""
        return self._process.pid or 0

    @property
    def handles(self) -> Sequence[Connection | int]:
        """See `Worker`."""
        return self._connection, self._process.sentinel

    def is_alive(self) -> bool:
        """See `Worker`."""
        return self._process.is_alive()

    def is_idle(self) -> bool:
        """See `Worker`."""
        return self._process.is_alive() and not self._connection.poll()

    def is_stopped(self) -> bool:
        """See `Worker`."""
        with contextlib.suppress(psutil.Error):
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_STOPPED)
        return False

    def send(self, message: bytes) -> None:
        """See `Worker`."""
        self._logged = _size(self._log)
        with contextlib.suppress(OSError):
            self._connection.send_bytes(message)

    def receive(self) -> bytes | None:
        """See `Worker`."""
        with contextlib.suppress(EOFError, OSError):
            if self._connection.poll(0):
                return self._connection.recv_bytes()
        return None

    def death(self) -> str:
        """See `Worker`."""
        self._process.join(_DYING)
        code = self._process.exitcode
        if code is None or code >= 0:
            return f"ended by itself with exit code {code}"
        what = f"was ended by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            what += ": somebody killed it, or memory ran out"
        return what

    def dump_stacks(self) -> None:
        """See `Worker`."""
        if self._process.is_alive():  # forked children of a rank dump theirs too
            self._signal(signal.SIGUSR1)

    def log_tail(self) -> str:
        """See `Worker`."""
        if not self._log.exists():
            return ""
        with self._log.open("rb") as stream:
            stream.seek(self._logged)
            lines = stream.read().decode("utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_TAIL_LINES:])

    def kill(self) -> None:
        """See `Worker`."""
        self._signal(signal.SIGKILL)
        self._process.kill()

    def join(self) -> None:
        """See `Worker`."""
        with self._answered(_DYING):
            self._process.join()
        self._connection.close()

    def _answered(self, limit: float) -> AbstractContextManager[None]:
        """For a block that waits for the process that this one is forked from, if it is."""
        return answering(limit) if self._is_forked else contextlib.nullcontext()

    def _signal(self, what: signal.Signals) -> None:
        """Signal the rank's process group; a rank that has none yet is left alone."""
        if self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, what)


def _context(device: Literal["cpu", "cuda"]) -> ForkServerContext | SpawnContext:
    """Where ranks come from: a fork server that has imported everything, or nothing at all.

    A process cannot be forked from one that has touched a GPU, so GPU ranks import for themselves.
    """
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def dump_stacks(workers: Sequence[Worker]) -> None:
    """Let ranks write the stacks of all their threads to their logs."""
    for worker in workers:
        worker.dump_stacks()
    if workers:
        time.sleep(_STACK_DUMP)


def kill(workers: list[Worker]) -> None:
    """End ranks and everything they started; nobody is asked nicely."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
    workers.clear()


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0
