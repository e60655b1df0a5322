"""Signals and a crew: Ctrl-C and SIGTERM end its threads and processes with it, quietly."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Final

from bridge.crew.protocol import Brake, StoppedError

_AGAIN: Final = 1.0
"""Seconds until a word to end is repeated."""
_PR_SET_PDEATHSIG: Final = 1
"""Of `prctl`, on Linux."""

Handler = Callable[[int, FrameType | None], object]


class Terminated(BaseException):
    """SIGTERM. Nobody's `except Exception` may go on with the next piece of work."""

    exit_code: Final = 128 + signal.SIGTERM


@contextmanager
def interrupts_pull(brake: Brake) -> Iterator[None]:
    """Let Ctrl-C, and SIGTERM where it raises, stop this process's other threads.

    They would finish their files first. Nothing changes outside the main thread, or where somebody
    else handles the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with (
        _pulling(brake, signal.SIGINT, signal.default_int_handler, "interrupted"),
        _pulling(brake, signal.SIGTERM, _raise_terminated, "terminated"),
    ):
        yield


@contextmanager
def _pulling(brake: Brake, number: signal.Signals, usual: Handler, why: str) -> Iterator[None]:
    if signal.getsignal(number) is not usual:
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        brake.pull(StoppedError(why))
        usual(number, frame)

    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextmanager
def terminations_raise(handler: Handler | None = None) -> Iterator[None]:
    """Let SIGTERM, as of a scheduler that takes the machine away, raise `Terminated` here.

    So whatever clears up at Ctrl-C does so then. Nothing changes outside the main thread.

    Args:
        handler: Raises instead.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler or _raise_terminated)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGALRM) in {handler, _raise_terminated}:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def raise_until_heard(error: BaseException, handler: Handler) -> None:
    """Raise in a signal's handler, and again by it: what is raised in a destructor is lost."""
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, _AGAIN)
    handled = sys.exc_info()[1]
    while handled is not None:
        if isinstance(handled, type(error)):  # heard: whoever clears up is not to be disturbed
            return
        handled = handled.__context__
    raise error


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise_until_heard(Terminated(), _raise_terminated)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let a process that is started now never see Ctrl-C, which its terminal sends to all of us."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def signal_at_parents_death(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent has ended, where it can.

    A thread that waits for that cannot act while its process is stopped, or a library holds the
    interpreter's lock. The parent is, to be exact, the thread that has started this process.
    """
    with suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
