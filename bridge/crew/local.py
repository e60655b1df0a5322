"""A crew on one machine: the command's own process leads, and starts the others.

The others, the hands (`bridge.crew.hand`), are spawned, and each is joined to the lead by a pipe.
The lead ends its hands when it leaves, however it leaves, waits for none of them without a bound,
and looks at itself as well: in a phase of work it, too, must make progress.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Final, Literal

from bridge.crew import bounds
from bridge.crew.attendants import wake_at_exit
from bridge.crew.fates import (
    Loss,
    Naming,
    death_of,
    hang_of,
    is_stopped,
    lost_worker,
    own_hang,
    silence_of,
    worker,
)
from bridge.crew.hand import serve
from bridge.crew.interrupts import interrupts_held
from bridge.crew.protocol import Brake, Value
from bridge.crew.stacks import is_waiting, stacks
from bridge.errors import WorkerLostError
from bridge.progress import Advance, Progress

_Kind = Literal["value", "advance", "alive", "hung", "error", "crash", "done"]
_Message = tuple[_Kind, Any]


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
        self._pulse = multiprocessing.get_context("spawn").RawValue("L", 0)
        self._progress = bounds.Patience(timeout)
        self._is_timed = False
        self._leave: bounds.Patience | None = None
        try:
            for rank in range(1, size):
                self._hands.append(
                    _start(rank, size, function, args, kwargs, timeout=timeout, pulse=self._pulse)
                )
        except BaseException:
            self._end()
            raise
        self._listener = threading.Thread(target=self._listen, daemon=True, name="crew")
        self._listener.start()

    def gather(self, value: Value) -> list[Value]:
        """See `Crew`."""
        timed, self._is_timed = self._is_timed, False  # who waits for others does not hang
        with self._changed:
            self._changed.wait_for(lambda: self._failure or len(self._values) == len(self._hands))
            self._is_timed = timed
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

            def count(nbytes: int) -> None:
                self._progress.renew()
                advance(nbytes)

            self._advance, self._is_timed = advance, True
            try:
                yield self.brake.on(count)
            finally:
                self._advance, self._is_timed = None, False

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
            self._pulse.value += 1
            if not self._leaving:
                self._look_at_self()
                if self._failure is None:
                    self._look_at(list(hands.values()), accord)

    def _look_at_self(self) -> None:
        """Fail when this process hangs; and leave when it does not even heed that it has failed."""
        if not self._is_timed:
            self._progress.renew()
        if self._leave is not None:
            if self._is_timed and self._leave.is_over():
                sys.stderr.write(f"{self._failure}\n")
                sys.stderr.flush()
                os._exit(WorkerLostError.exit_code)  # whose end ends the hands
        elif self._progress.is_over(by=bounds.ACCORD) and self._failure is None:
            found = stacks(without={threading.get_ident()})
            own = self._lost(0, self.size, own_hang(self._timeout, found))
            self._fail(self._stopped() or own)
            self._leave = bounds.Patience(bounds.LEAVE)

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
            self._fail(self._stopped() or self._lost(first.rank, self.size, fate))

    def _stopped(self) -> BaseException | None:
        """Of a hand that somebody has stopped, and for which those wait that seem to hang."""
        for hand in self._hands:
            if not hand.done and is_stopped(hand.process):
                return self._lost(hand.rank, self.size, silence_of(hand.process, self._timeout))
        return None

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
    function: Callable[..., object],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    timeout: float,
    pulse: Any,  # noqa: ANN401 - of ctypes
) -> _Hand:
    context = multiprocessing.get_context("spawn")
    wake_at_exit()
    resource_tracker.ensure_running()  # starting it lets go of the interrupts that are held below
    ours, theirs = context.Pipe()
    process = context.Process(
        target=serve,
        args=(theirs, rank, size, function, args, kwargs),
        kwargs={"timeout": timeout, "pulse": pulse},
        name=f"worker {rank}",
        daemon=True,
    )
    with theirs, without_main(), interrupts_held():
        process.start()
    return _Hand(rank, process, ours, bounds.Patience(bounds.JOIN))


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
