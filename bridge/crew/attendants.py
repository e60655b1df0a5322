"""What multiprocessing starts beside our processes: its fork server and its resource tracker.

Each ends once nobody holds its pipe any more, which one that somebody has stopped does not see.
"""

from __future__ import annotations

import functools
import multiprocessing.util
import signal
from contextlib import suppress
from typing import Final, Literal

import psutil

Attendant = Literal["forkserver", "resource_tracker"]
_ALL: Final[tuple[Attendant, ...]] = ("forkserver", "resource_tracker")


def attendant(name: Attendant) -> psutil.Process | None:
    """This process's own; None where it has started none, or that one has ended."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if any(f"multiprocessing.{name}" in word for word in child.cmdline()):
                return child
    return None


@functools.cache
def wake_at_exit() -> None:
    """See that those that are stopped go on when this process ends, so that they end as well.

    Newer Pythons wait for their resource tracker at exit, without a bound.
    """
    multiprocessing.util.Finalize(None, _wake, exitpriority=0)


def _wake() -> None:
    for name in _ALL:
        found = attendant(name)
        if found is not None:
            with suppress(psutil.Error):
                found.send_signal(signal.SIGCONT)
