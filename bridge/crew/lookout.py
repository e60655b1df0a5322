"""Who of torchrun's ranks is gone, silent or hung: each rank looks out in a thread of its own.

Rank 0 watches all, the others watch rank 0, each watches itself. On one machine a rank that has
died is seen at once by its process id; elsewhere by its silence. Whoever notices tells all.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import psutil

from bridge.crew import bounds, fates
from bridge.crew.board import LEFT, STOP, Board
from bridge.crew.protocol import Brake, StoppedError
from bridge.crew.stacks import is_waiting, stacks
from bridge.errors import WorkerLostError

_POLL: Final = 0.3
"""Seconds between two looks at the store."""
_DYING: Final = 1.0
"""Seconds in which a process whose connection has closed ends."""

Member = tuple[str, int]
"""Host and process id."""


class Lookout:
    """Looks out for one rank, from `start` to `close`.

    Args:
        board: Where signs of life and the word to stop are.
        members: Of all ranks.
        brake: Pulled when the work is off.
        timeout: Seconds without progress after which this rank says that it hangs.
        so: What follows from a loss, for the end of a sentence.
        also: Called each time.

    `failure` is set when a rank is lost; `progress` is to be renewed by whoever makes some, and
    `is_timed` set while it should; `is_leaving` when it has stopped.
    """

    def __init__(
        self,
        board: Board,
        members: Sequence[Member],
        brake: Brake,
        timeout: float,
        so: str,
        also: Callable[[], None],
    ) -> None:
        self.failure: WorkerLostError | None = None
        self.progress = bounds.Patience(timeout)
        self.is_timed = False
        self.is_leaving = False
        self._board = board
        self._members = members
        self._brake = brake
        self._so = so
        self._also = also
        limit = min(bounds.FROZEN, timeout)
        watched = [0] if board.rank else range(1, board.size)
        self._silences = {rank: bounds.Patience(limit) for rank in watched}
        self._signs: dict[int, bytes] = {}
        self._silent: set[int] = set()
        self._left: set[int] = set()
        self._store = bounds.Patience(limit)
        self._leave: bounds.Patience | None = None
        self._is_cut = False
        self._is_stopped = False
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=target, daemon=True, name="lookout")
            for target in (self._look_out, self._look_at_store)
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End: a thread that is inside torch when the interpreter ends would crash the process."""
        self._closing.set()
        for thread in self._threads:
            thread.join()

    def gone(self) -> list[int]:
        """The ranks on this machine that are no more, and have not said that they leave."""
        here = socket.gethostname()
        return [
            rank
            for rank, (host, pid) in enumerate(self._members)
            if host == here and rank not in self._left and _is_gone(pid)
        ]

    def is_lost(self, rank: int) -> bool:
        """Whether a rank is gone or silent, so that somebody else must do its part."""
        host, pid = self._members[rank]
        return rank in self._silent or (host == socket.gethostname() and _is_gone(pid))

    def has_left(self, rank: int) -> bool:
        """Whether a rank that this one watches has said that it leaves."""
        return rank in self._left

    def loss(self, what: str) -> WorkerLostError:
        """Name the ranks that are gone, as far as this machine can tell."""
        # A connection closes a moment before its process is no more.
        deadline = time.monotonic() + _DYING
        while not (gone := self.gone()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return WorkerLostError(
            f"{len(gone) or 'some'} of {self._board.size} ranks died{self._so}",
            where=[f"rank {rank}: process {self._members[rank][1]}" for rank in gone] or what,
            hint="torchrun's report names the rank that failed first and says how; SIGKILL mostly "
            "means that memory ran out",
        )

    def lose(self, error: WorkerLostError) -> None:
        """The work is off: a rank is lost."""
        self.failure = self.failure or error
        self._brake.pull(error)

    def _look_out(self) -> None:
        beat = 0
        while not self._closing.wait(_POLL):
            beat += 1
            try:
                if not self._is_cut:
                    self._board.beat(b"%d" % beat)
                    self._also()
                    self._heed_stop()
                    self._heed_beats()
            except RuntimeError:  # the store is gone, and rank 0, or torchrun, with it
                self._is_cut = self._is_stopped = True
                self._brake.pull(StoppedError("torchrun's store is gone"))
            self._store.renew()
            if self.failure is None and self.gone():
                self.lose(self.loss("it is gone"))
            self._look_at_self()

    def _heed_stop(self) -> None:
        if self._is_stopped or not self._board.has(STOP):
            return
        self._is_stopped = True
        rank, error = self._board.get(STOP)
        if error is not None:
            self.lose(error)
        elif rank != self._board.rank:
            self._brake.pull(StoppedError("another rank has failed"))

    def _heed_beats(self) -> None:
        ranks = [rank for rank in self._silences if rank not in self._left | self._silent]
        for rank, sign in zip(ranks, self._board.beats(ranks) if ranks else (), strict=True):
            if sign == LEFT:
                self._left.add(rank)
            elif sign != self._signs.get(rank):
                self._signs[rank] = sign
                self._silences[rank].renew()
            elif self._silences[rank].is_over():
                self._silent.add(rank)
                self._give_up(rank)
                return

    def _give_up(self, rank: int) -> None:
        """A rank is silent: tell all, and end it where that can be done from here."""
        host, pid = self._members[rank]
        is_here = host == socket.gethostname()
        how, hint = fates.silence(pid if is_here else None, self._silences[rank].limit)
        error = self.failure or WorkerLostError(
            f"rank {rank} of {self._board.size} {how}{self._so}",
            where=f"process {pid} on {host}",
            hint=hint,
        )
        if self._board.rank:  # torchrun ends this rank, too, once rank 0 has ended: say it before
            _say(error)
        self.lose(error)
        self._board.stop(error)
        if is_here:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def _look_at_self(self) -> None:
        if not self.is_timed or self._is_stopped or self.is_leaving:
            self.progress.renew()
        found = stacks(without=self._own()) if self.progress.is_over() else ()
        # Who waits for others lets them speak first.
        if found and (not is_waiting(found) or self.progress.is_over(by=bounds.ACCORD)):
            host, pid = self._members[self._board.rank]
            error = WorkerLostError(
                f"rank {self._board.rank} of {self._board.size} has made no progress for "
                f"{self.progress.limit:g} s{self._so}",
                where=(f"process {pid} on {host}", *found),
                hint=fates.HUNG,
            )
            self.lose(error)
            with suppress(RuntimeError):
                self._board.stop(error)
        if self._is_stopped:
            self._leave = self._leave or bounds.Patience(bounds.LEAVE)
        if self._leave is not None and self._leave.is_over() and not self.is_leaving:
            if self._board.rank == 0 and self.failure is not None:
                _say(self.failure)  # who should report it cannot
            os._exit(WorkerLostError.exit_code)

    def _look_at_store(self) -> None:
        """The store itself may be silent: it may be rank 0 that serves it, and rank 0 that hangs.

        Then the other thread waits inside torch, and perhaps the main thread, too.
        """
        while not self._closing.wait(bounds.BEAT):
            if not self._store.is_over():
                continue
            host, pid = self._members[0]
            how, hint = fates.silence(pid, self._store.limit)
            if host == socket.gethostname() and hint == fates.STOPPED and self._board.rank:
                self._silent.add(0)
                place = f"process {pid} on {host}"
                what = f"rank 0 of {self._board.size} {how}{self._so}"
                error = WorkerLostError(what, where=place, hint=hint)
                _say(error)  # as in `_give_up`
                self.lose(error)
                self._store.renew()
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)  # which ends our wait
                continue
            what = f"torchrun's store has not answered for {self._store.limit:g} s{self._so}"
            _say(WorkerLostError(what, where=f"rank {self._board.rank}", hint=fates.SILENT))
            os._exit(WorkerLostError.exit_code)

    def _own(self) -> set[int]:
        return {thread.ident for thread in self._threads if thread.ident is not None}


def _say(error: WorkerLostError) -> None:
    if error.is_said:
        return
    with suppress(OSError, ValueError):  # nobody reads it: no reason to leave others waiting
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        error.is_said = True


def _is_gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
