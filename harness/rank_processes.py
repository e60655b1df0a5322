"""Rank processes as the operating system sees them: started, dumped, ended, read."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Final, Literal

from bridge.crew.local import without_main
from harness.ranks import RankSettings, serve

_PRELOAD: Final = ["harness.rank_imports"]
_STACK_DUMP: Final = 0.3
"""Seconds for hung ranks to write their stacks."""
_TAIL_LINES: Final = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One rank: its process, the pipe to it and where it logs."""

    rank: int
    process: BaseProcess
    connection: Connection
    log: Path


def start_server() -> None:
    """Start the process that imports Megatron-Core and forks ranks, without waiting for it."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOAD)
    multiprocessing.forkserver.ensure_running()


def start(settings: RankSettings) -> Worker:
    """Start a rank; it is ready when it answers."""
    context = _context(settings.device)
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, settings), name=f"rank{settings.rank}")
    with without_main():
        process.start()
    theirs.close()
    return Worker(rank=settings.rank, process=process, connection=ours, log=settings.log)


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
    alive = [worker for worker in workers if worker.process.is_alive()]
    for worker in alive:  # forked children of a rank dump theirs too
        _signal(worker, signal.SIGUSR1)
    if alive:
        time.sleep(_STACK_DUMP)


def kill(workers: list[Worker]) -> None:
    """End ranks and everything they started; nobody is asked nicely."""
    for worker in workers:
        _signal(worker, signal.SIGKILL)
        worker.process.kill()
    for worker in workers:
        worker.process.join()
        worker.connection.close()
    workers.clear()


def _signal(worker: Worker, what: signal.Signals) -> None:
    """Signal a rank's process group; a rank that has none yet is left alone."""
    if worker.process.pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.process.pid, what)


def log_size(path: Path) -> int:
    """Bytes a rank has logged so far."""
    return path.stat().st_size if path.exists() else 0


def log_tail(path: Path, first: int) -> str:
    """The last lines a rank has logged since byte `first`."""
    if not path.exists():
        return ""
    with path.open("rb") as stream:
        stream.seek(first)
        lines = stream.read().decode("utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_TAIL_LINES:])
