"""The first process of torchrun: it runs the command, on the ranks of all."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Final

from harness.errors import WorkerFailedError
from harness.rank_processes import LocalRanks, WorkerSource
from harness.torchrun.meeting import Link, Member, gather, meet
from harness.torchrun.ranks import TorchrunRanks

_AGAIN: Final = 1.0
"""Seconds until a word to end is repeated."""
_led: TorchrunRanks | None = None


def torchrun_ranks() -> TorchrunRanks | None:
    """The ranks that this process leads; None without torchrun."""
    return _led


def rank_source() -> WorkerSource:
    """Where pools of this process have their ranks from."""
    return _led or LocalRanks()


class _ToldToEnd(BaseException):
    """Nobody's `except Exception` may go on with the next case."""


@contextlib.contextmanager
def led() -> Iterator[None]:
    """Lead the other processes of torchrun: pools made inside have their ranks there.

    Raises:
        BackendUnavailableError: HN201, they do not come together.
        UsageError: BR001, they do not run the same software.
    """
    global _led  # noqa: PLW0603 - one process is one rank of torchrun
    links: dict[int, Link] = {}
    outer = _led
    with ending():
        try:
            lead, store = Member.here(), meet()  # it may be this process that serves the store
            links = gather(store, lead)
            _led = TorchrunRanks(lead, links)
            yield
        finally:
            _led = outer
            for link in links.values():
                link.connection.close()


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Clear up and exit at SIGTERM, which torchrun sends when another process has ended."""
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    except _ToldToEnd:
        sys.stderr.write(
            "HN202 torchrun ends this run: the process of another rank has ended\n"
            "help: torchrun's report says how; start again, with --resume if there is a --report\n"
        )
        sys.exit(WorkerFailedError.exit_code)
    finally:
        if signal.getsignal(signal.SIGALRM) is _end:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    """Raise, and again until it is heard: what is raised inside a weakref's callback is lost."""
    del number, frame
    signal.signal(signal.SIGALRM, _end)
    signal.setitimer(signal.ITIMER_REAL, _AGAIN)
    handled = sys.exc_info()[1]
    while handled is not None:
        if isinstance(handled, _ToldToEnd):  # heard: whoever clears up is not to be disturbed
            return
        handled = handled.__context__
    raise _ToldToEnd
