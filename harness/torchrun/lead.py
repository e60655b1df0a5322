"""The first process of torchrun: it runs the command, on the ranks of all."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType

from bridge.crew.interrupts import raise_until_heard, terminations_raise
from harness.errors import WorkerFailedError
from harness.rank_processes import LocalRanks, WorkerSource
from harness.torchrun.meeting import Link, Member, gather, meet
from harness.torchrun.ranks import TorchrunRanks

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
    try:
        with terminations_raise(_end):
            yield
    except _ToldToEnd:
        sys.stderr.write(
            "HN202 torchrun ends this run: the process of another rank has ended\n"
            "help: torchrun's report says how; start again, with --resume if there is a --report\n"
        )
        sys.exit(WorkerFailedError.exit_code)


def _end(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise_until_heard(_ToldToEnd(), _end)
