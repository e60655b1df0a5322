"""A crew on one machine: the command's own process leads, and starts the others.

The others, the hands, are spawned, and each is joined to the lead by a pipe. A hand sends what it
has to give (values, bytes done, an error); the lead answers each round of values with all of them.
The lead ends its hands when it leaves, however it leaves; a hand ends itself when the lead is gone.
A hand gives signs of life, and says so itself when it makes no progress: the lead waits for nobody
without a bound.
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
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Final, Literal

from bridge.crew import bounds
from bridge.crew.fates import (
    Loss,
    Naming,
    death_of,
    hang_of,
    lost_worker,
    silence_of,
    worker,
)
from bridge.crew.interrupts import interrupts_held, signal_at_parents_death
from bridge.crew.protocol import Brake, Value
from bridge.crew.stacks import is_waiting, stacks
from bridge.errors import BridgeError
from bridge.progress import Advance, Progress

_Kind = Literal["value", "advance", "alive", "hung", "error", "crash", "done"]
_Message = tuple[_Kind, Any]

_REPORT_EVERY: Final = 0.1
"""Seconds between two reports of bytes done."""


@dataclass(slots=True)
class _Hand:
    """One of the other processes, as the lead sees it."""

    rank: int
    process: BaseProcess
    connection: Connection
    silence: bounds.Patience
    done: bool = False
    hung: tuple[str, ...] | None = None
    """The stacks that it has sent."""


class LocalLead:
    """Rank 0: starts the hands and hears from them in a thread of its own.

    Args:
        size: Processes, this one included.
        function: What each hand runs, as `function(*args, crew=..., **kwargs)`; importable by name.
        args: Picklable.
        kwargs: Picklable.
        lost: What to say when a hand has died.
        called: What to call a hand that has failed.
        timeout: Seconds without progress after which a hand is taken for lost.
    """

    rank: Final = 0

    def __init__(
        self,
        size: int,
        function: Callable[..., object],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        lost: Loss,
        called: Naming,
        timeout: float,
    ) -> None:
        self.size = size
        self._timeout = timeout
        self._lost = lost
        self._called = called
        self.brake = Brake()
        self._changed = threading.Condition()
        self._values: dict[int, Any] = {}
        self._failure: BaseException | None = None
        self._advance: Advance | None = None
        self._leaving = False
        self._hands: list[_Hand] = []
        try:
            for rank in range(1, size):
                self._hands.append(_start(rank, size, timeout, function, args, kwargs))
        except BaseException:
            self._end()
            raise
        self._listener = threading.Thread(target=self._listen, daemon=True, name="crew")
        self._listener.start()

    def gather(self, value: Value) -> list[Value]:
        """See `Crew`."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or len(self._values) == len(self._hands))
            if self._failure is not None:
                raise self._failure
            values = [value, *(self._values[hand.rank] for hand in self._hands)]
            self._values.clear()
        for hand in self._hands:
            with suppress(OSError):  # it has died since, and the listener says so
                hand.connection.send(values)
        return values

    @contextmanager
    def phase(self, progress: Progress, name: str, total: int) -> Iterator[Advance]:
        """See `Crew`."""
        with progress.phase(name, total) as advance:
            self._advance = advance
            try:
                yield self.brake.on(advance)
            finally:
                self._advance = None

    def settle(self, error: BaseException) -> BaseException:
        """See `Crew`."""
        self._leaving = True
        self._end()
        return error

    def close(self) -> None:
        """The work is done: let the hands leave by themselves, and see that they do."""
        self._leaving = True
        self._join()
        self._end()

    def _join(self) -> None:
        """Wait until the hands are no more; one that the kernel holds is not waited for."""
        deadline = time.monotonic() + bounds.DEATH
        for hand in self._hands:
            hand.process.join(max(0.0, deadline - time.monotonic()))

    def _end(self) -> None:
        for hand in self._hands:
            hand.process.kill()
        self._join()
        self._hands.clear()

    def _listen(self) -> None:
        hands = {hand.connection: hand for hand in self._hands}
        accord = bounds.Patience(bounds.ACCORD)
        while hands:
            for connection in multiprocessing.connection.wait(list(hands), timeout=bounds.BEAT):
                hand = hands[connection]  # type: ignore[index]  # only connections are waited for
                try:
                    self._take(hand, hand.connection.recv())
                except (EOFError, OSError):
                    del hands[hand.connection]
                    hand.connection.close()
                    if not (hand.done or self._leaving):
                        self._fail(self._lost(hand.rank, self.size, death_of(hand.process)))
            if self._failure is None and not self._leaving:
                self._look_at(list(hands.values()), accord)

    def _look_at(self, hands: Sequence[_Hand], accord: bounds.Patience) -> None:
        """Fail when a hand has been silent for too long, or hangs."""
        for hand in hands:
            if hand.silence.is_over() and not hand.done:
                self._fail(
                    self._lost(hand.rank, self.size, silence_of(hand.process, hand.silence.limit))
                )
                return
        hung = [hand for hand in hands if hand.hung is not None]
        if not hung:
            accord.renew()
        first = next((hand for hand in hung if not is_waiting(hand.hung or ())), None)
        if accord.is_over() and hung and first is None:
            first = hung[0]  # all of them wait for one another
        if first is not None:
            fate = hang_of(first.process, self._timeout, first.hung or ())
            self._fail(self._lost(first.rank, self.size, fate))

    def _take(self, hand: _Hand, message: _Message) -> None:
        hand.silence.renew()
        hand.silence.limit = min(bounds.FROZEN, self._timeout)
        kind, content = message
        if kind == "advance":
            advance = self._advance
            if advance is not None:
                advance(content)
        elif kind == "value":
            with self._changed:
                self._values[hand.rank] = content
                self._changed.notify_all()
        elif kind == "hung":
            hand.hung = content
        elif kind != "alive":
            hand.done = True
            if kind == "error":
                self._fail(content)
            elif kind == "crash":
                self._fail(RuntimeError(f"{self._called(hand.rank, self.size)} failed:\n{content}"))

    def _fail(self, error: BaseException) -> None:
        self.brake.pull(error)
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()


class LocalHand:
    """Any other rank of a crew on one machine.

    Args:
        rank: From 1.
        size: Of the crew.
        connection: To the lead.
        timeout: Seconds without progress after which it says that it hangs.
    """

    def __init__(self, rank: int, size: int, connection: Connection, timeout: float) -> None:
        self.rank = rank
        self.size = size
        self.brake = Brake()
        self._connection = connection
        self._lock = threading.Lock()
        self._pending = 0
        self._reported = 0.0
        self._progress = bounds.Patience(timeout)
        self._is_waiting = False
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
                if self._is_waiting:
                    self._progress.renew()
                found = None
                if self._progress.is_over():
                    found = stacks(without={threading.get_ident()})
                with self._lock:
                    self._connection.send(("alive", None) if found is None else ("hung", found))

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


@contextmanager
def led(
    size: int,
    function: Callable[..., object],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    lost: Loss = lost_worker,
    called: Naming = worker,
    timeout: float = bounds.HUNG,
) -> Iterator[LocalLead]:
    """A lead and its hands, which are gone when the block ends; see `LocalLead`."""
    lead = LocalLead(size, function, args, kwargs, lost, called, timeout)
    try:
        yield lead
    except BaseException as error:
        lead.settle(error)
        raise
    lead.close()


def _start(
    rank: int,
    size: int,
    timeout: float,
    function: Callable[..., object],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> _Hand:
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # starting it lets go of the interrupts that are held below
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_serve,
        args=(theirs, rank, size, timeout, function, args, kwargs),
        name=f"worker {rank}",
        daemon=True,
    )
    with theirs, without_main(), interrupts_held():
        process.start()
    return _Hand(rank, process, ours, bounds.Patience(bounds.JOIN))


def _serve(
    connection: Connection,
    rank: int,
    size: int,
    timeout: float,
    function: Callable[..., object],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    """Be a hand: the whole life of its process."""
    signal_at_parents_death(signal.SIGKILL)  # the lead's thread that started us waits for us
    threading.Thread(target=_end_with_lead, daemon=True, name="end with the lead").start()
    crew = LocalHand(rank, size, connection, timeout)
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


@contextmanager
def without_main() -> Iterator[None]:
    """Keep multiprocessing from importing the user's `__main__` again in a process it starts.

    A script without a `__main__` guard would otherwise start itself over and over.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
