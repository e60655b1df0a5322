"""Ctrl-C and a crew: one process ends quietly, its threads and the other processes with it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from bridge.crew.protocol import Brake, StoppedError


@contextmanager
def interrupts_pull(brake: Brake) -> Iterator[None]:
    """Let Ctrl-C stop this process's other threads, which would finish their files first.

    Nothing changes outside the main thread, or where somebody else handles the signal.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return

    def interrupted(number: int, frame: FrameType | None) -> None:
        brake.pull(StoppedError("interrupted"))
        signal.default_int_handler(number, frame)

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let a process that is started now never see Ctrl-C, which its terminal sends to all of us."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
