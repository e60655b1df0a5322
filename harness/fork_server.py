"""The process that ranks are forked from, and a bound to each wait for it.

Multiprocessing has none: it waits for the server's word when a rank starts and when one has ended,
at exit as well. With the server gone it hears that nobody will answer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

import psutil

from bridge.crew import bounds, fates
from bridge.crew.attendants import attendant
from bridge.errors import WorkerLostError

_WHO: Final = "the process that ranks are forked from"


@contextmanager
def answering(limit: float) -> Iterator[None]:
    """Run a block that waits for the server; one that does not answer is ended.

    The next rank to be started has a new one.

    Args:
        limit: Seconds that the block may take; less where the server is stopped, see
            `bounds.FROZEN`.

    Raises:
        WorkerLostError: BR501, the block has failed because the server is gone.
    """
    silences: list[WorkerLostError] = []
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(limit, done, silences), daemon=True)
    watch.start()
    try:
        yield
    except (EOFError, ConnectionError) as error:
        lost = WorkerLostError(
            f"{_WHO} has ended", hint="somebody killed it, or memory ran out; run it again"
        )
        raise next(iter(silences), lost) from error
    finally:
        done.set()
        watch.join(bounds.DEATH)


def _watch(limit: float, done: threading.Event, silences: list[WorkerLostError]) -> None:
    slow, stopped = bounds.Patience(limit), bounds.Patience(min(limit, bounds.FROZEN))
    server = None
    while server is None or not (slow.is_over() or stopped.is_over()):
        if done.wait(bounds.BEAT):
            return
        server = server or attendant("forkserver")
        if server is not None and not _is_stopped(server):
            stopped.renew()
    over = stopped if stopped.is_over() else slow
    how, hint = fates.silence(server.pid, over.limit)
    silences.append(WorkerLostError(f"{_WHO} {how}", where=f"process {server.pid}", hint=hint))
    with suppress(psutil.Error, ChildProcessError):
        server.kill()
        # It is for multiprocessing to fetch its status, and to see that there is none any more.
        os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)


def _is_stopped(server: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(server.status() == psutil.STATUS_STOPPED)
    return False
