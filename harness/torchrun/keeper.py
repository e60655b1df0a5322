"""What a process of torchrun does that is not the first: it keeps a rank process for the lead."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from bridge.scratch import held_directory
from harness.rank_processes import LocalRanks, LocalWorker, dump_stacks
from harness.ranks import RankSettings
from harness.torchrun.meeting import Member, join, meet


def keep() -> None:
    """Do what the lead asks, until it closes the connection. Prints nothing.

    Raises:
        BackendUnavailableError: HN201, the lead cannot be reached.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the lead hears of it, too, and then closes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    store = meet()
    with held_directory() as private:
        keeper = _Keeper(join(store, Member.here()), private)
        try:
            keeper.serve()
        finally:
            keeper.kill()


class _Keeper:
    def __init__(self, lead: Connection, private: Path) -> None:
        self._lead = lead
        self._private = private
        self._worker: LocalWorker | None = None
        self._has_ended = False

    def serve(self) -> None:
        while True:
            worker = None if self._has_ended else self._worker
            ready = wait([self._lead, *(worker.handles if worker is not None else ())])
            if self._lead in ready:
                try:
                    what, payload = self._lead.recv()
                except (EOFError, OSError):  # the lead has closed the connection, or is gone
                    return
                self._obey(what, payload)
            elif worker is not None:
                answer = worker.receive()
                self._has_ended = answer is None
                if answer is None:
                    self._tell("ended", worker.death())
                else:
                    self._tell("answer", answer)

    def kill(self) -> None:
        """End the rank process, and whatever it has started."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.join()
        self._worker = None

    def _obey(self, what: str, payload: object) -> None:
        match what, payload:
            case "start", RankSettings():
                self._tell(what, self._start(payload))
            case "task", bytes() if self._worker is not None:
                self._worker.send(payload)
            case "dump", _:
                if self._worker is not None:
                    dump_stacks([self._worker])  # with time to write them, before the tail is read
            case "tail", _:
                tail = "" if self._worker is None else self._worker.log_tail()
                self._tell(what, tail)
            case "kill", _:
                self.kill()
                self._tell(what, None)
            case "warm up", _:
                LocalRanks().warm_up()
            case "sees", (list(names), float(seconds)):
                self._tell(what, _unseen(names, seconds))
            case _:
                raise RuntimeError(f"a keeper cannot {what}")

    def _tell(self, what: str, payload: object) -> None:
        with contextlib.suppress(OSError):  # without a lead the next question never comes
            self._lead.send((what, payload))

    def _start(self, settings: RankSettings) -> int:
        self.kill()
        self._has_ended = False
        kept = settings.log.parent != settings.private  # a pool's private directory is its host's
        log = settings.log if kept else self._private / settings.log.name
        self._worker = LocalWorker(replace(settings, log=log, private=self._private))
        return self._worker.pid


def _unseen(names: list[str], seconds: float) -> list[str]:
    """Which of these files are not here, nor appear in a while."""
    deadline = time.monotonic() + seconds
    while unseen := [name for name in names if not os.path.exists(name)]:  # noqa: PTH110 - no errors
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return unseen
