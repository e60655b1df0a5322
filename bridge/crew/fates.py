"""What becomes of a process that is lost to its crew, and the words for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Final

import psutil

from bridge.crew import bounds
from bridge.errors import WorkerLostError

STOPPED: Final = "somebody has stopped it (SIGSTOP); run it again"
SILENT: Final = "the machine, its memory or its disk may be overloaded; run it again"
HUNG: Final = "its stacks say what it waits for; where that is only slow, give a longer --timeout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What has become of a hand that is lost.

    Args:
        how: Said of it: "was killed by SIGKILL".
        pid: Its process.
        killed: By SIGKILL, as the system does when memory runs out.
        stacks: Where it hangs.
        hint: What to do about it; None where the caller knows better.
    """

    how: str
    pid: int | None
    killed: bool = False
    stacks: tuple[str, ...] = ()
    hint: str | None = None

    @property
    def where(self) -> tuple[str, ...]:
        """For an error: the process, and the stacks."""
        return (f"process {self.pid}", *self.stacks)


Loss = Callable[[int, int, Fate], WorkerLostError]
"""Words for the hand of this rank, among so many, that is lost."""
Naming = Callable[[int, int], str]
"""Of a rank among so many."""


def worker(rank: int, size: int) -> str:
    """What a hand is called, unless its caller knows better."""
    return f"worker {rank} of {size}"


def lost_worker(rank: int, size: int, fate: Fate) -> WorkerLostError:
    """The `Loss` of a conversion."""
    if fate.killed:
        hint = "if nobody killed it, memory ran out: lower --workers or --memory-budget, and run "
        hint += "it again"
    else:
        hint = "run it again; what is above may say why it ended"
    return WorkerLostError(
        f"worker {rank} of {size} {fate.how}; the target was not created",
        where=fate.where,
        hint=fate.hint or hint,
    )


def death_of(process: BaseProcess) -> Fate:
    """Of a child whose pipe has closed."""
    process.join(bounds.DEATH)
    code, pid = process.exitcode, process.pid
    if code is None or code >= 0:
        how = "ended early" if code is None else f"ended with exit code {code}"
        return Fate(how=how, pid=pid)
    try:
        how = f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        how = f"was killed by signal {-code}"
    return Fate(how=how, pid=pid, killed=code == -signal.SIGKILL)


def silence_of(process: BaseProcess, seconds: float) -> Fate:
    """Of a child that gives no sign of life."""
    how, hint = silence(process.pid, seconds)
    return Fate(how=how, pid=process.pid, hint=hint)


def is_stopped(process: BaseProcess) -> bool:
    """Whether somebody has stopped a child, so that others wait for it."""
    try:
        return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False


def hang_of(process: BaseProcess, seconds: float, stacks: tuple[str, ...]) -> Fate:
    """Of a child that lives and gets no further."""
    how = f"has made no progress for {seconds:g} s"
    return Fate(how=how, pid=process.pid, stacks=stacks, hint=HUNG)


def own_hang(seconds: float, stacks: tuple[str, ...]) -> Fate:
    """Of the process that looks, whose main thread gets no further."""
    how = f"has made no progress for {seconds:g} s"
    return Fate(how=how, pid=os.getpid(), stacks=stacks, hint=HUNG)


def silence(pid: int | None, seconds: float) -> tuple[str, str]:
    """Words for a process of this machine that gives no sign of life, and what to do about it."""
    how = f"has given no sign of life for {seconds:g} s"
    try:
        state = psutil.Process(pid).status()
    except psutil.Error:
        return how, SILENT
    if state == psutil.STATUS_STOPPED:
        return f"{how}: it is stopped", STOPPED
    return f"{how}: its state is {state}", SILENT
