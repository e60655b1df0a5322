"""The other processes of a crew on one machine, which `bridge.crew.local` starts.

A hand sends what it has to give (values, bytes done, an error); the lead answers each round of
values with all of them. A hand gives signs of life, and says so itself when it makes no progress.
It ends itself when the lead is gone, or gives no sign of life in its turn.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, Final

from bridge.crew import bounds
from bridge.crew.interrupts import signal_at_parents_death
from bridge.crew.protocol import Brake, Value
from bridge.crew.stacks import stacks
from bridge.errors import BridgeError, WorkerLostError
from bridge.progress import Advance, Progress

_REPORT_EVERY: Final = 0.1
"""Seconds between two reports of bytes done."""


class LocalHand:
    """Any other rank of a crew on one machine.

    Args:
        rank: From 1.
        size: Of the crew.
        connection: To the lead.
        timeout: Seconds without progress after which it says that it hangs.
        pulse: What the lead counts up while it lives; shared memory.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        connection: Connection,
        timeout: float,
        pulse: Any,  # noqa: ANN401 - ctypes
    ) -> None:
        self.rank = rank
        self.size = size
        self.brake = Brake()
        self._connection = connection
        self._lock = threading.Lock()
        self._pending = 0
        self._reported = 0.0
        self._progress = bounds.Patience(timeout)
        self._is_waiting = False
        self._pulse, self._felt = pulse, -1
        self._silence = bounds.Patience(min(bounds.FROZEN, timeout))
        threading.Thread(target=self._live, daemon=True, name="signs of life").start()

    def send(self, kind: str, content: object = None) -> None:
        """Tell the lead, after whatever bytes it has not heard of yet."""
        with self._lock:
            self._flush()
            self._connection.send((kind, content))

    def gather(self, value: Value) -> list[Value]:
        """See `Crew`."""
        self.send("value", value)
        self._is_waiting = True
        values: list[Value] = self._connection.recv()
        self._progress.renew()
        self._is_waiting = False
        return values

    @contextmanager
    def phase(self, progress: Progress, name: str, total: int) -> Iterator[Advance]:
        """See `Crew`."""
        del progress, name, total
        yield self.brake.on(self._count)

    def settle(self, error: BaseException) -> BaseException:
        """See `Crew`. The lead is told when this process leaves."""
        return error

    def _live(self) -> None:
        """Tell the lead that this process lives, or where it is when it gets no further."""
        with suppress(OSError):  # the lead is gone
            while True:
                time.sleep(bounds.BEAT)
                self._leave_with_lead()
                if self._is_waiting:
                    self._progress.renew()
                found = None
                if self._progress.is_over():
                    found = stacks(without={threading.get_ident()})
                with self._lock:
                    self._connection.send(("alive", None) if found is None else ("hung", found))

    def _leave_with_lead(self) -> None:
        """End when the lead has been silent for too long: whoever has stopped it must not stop us.

        Nobody is there to be told. Where it is woken, it finds that this process has ended.
        """
        if self._pulse.value != self._felt:
            self._felt = self._pulse.value
            self._silence.renew()
        elif self._silence.is_over():
            sys.stderr.write(
                f"worker {self.rank} of {self.size} ends: the process that leads has given no sign "
                f"of life for {self._silence.limit:g} s\n"
            )
            sys.stderr.flush()
            os._exit(WorkerLostError.exit_code)

    def _count(self, nbytes: int) -> None:
        self._progress.renew()
        with self._lock:
            self._pending += nbytes
            if time.monotonic() - self._reported >= _REPORT_EVERY:
                self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._connection.send(("advance", self._pending))
            self._pending = 0
            self._reported = time.monotonic()


def serve(
    connection: Connection,
    rank: int,
    size: int,
    function: Callable[..., object],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    timeout: float,
    pulse: Any,  # noqa: ANN401 - of ctypes
) -> None:
    """Be a hand: the whole life of its process."""
    signal_at_parents_death(signal.SIGKILL)  # the lead's thread that started us waits for us
    threading.Thread(target=_end_with_lead, daemon=True, name="end with the lead").start()
    crew = LocalHand(rank, size, connection, timeout, pulse)
    with suppress(OSError):  # the lead is gone, and so is everybody who could be told
        try:
            function(*args, crew=crew, **kwargs)
        except BridgeError as error:
            crew.send("error", error)
        except BaseException:  # noqa: BLE001 - the lead raises it, whatever it is: sys.exit, too
            crew.send("crash", traceback.format_exc())
        else:
            crew.send("done")


def _end_with_lead() -> None:
    lead = multiprocessing.parent_process()
    if lead is not None:
        multiprocessing.connection.wait([lead.sentinel])
        os._exit(1)  # in the middle of whatever the other threads do
