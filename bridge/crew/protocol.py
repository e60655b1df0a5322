"""What a process of a crew can ask for, and the crew of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final, Protocol, TypeVar

from bridge.progress import Advance, Progress

Value = TypeVar("Value")


class StoppedError(Exception):
    """The work is off, for a reason that another process or the main thread has."""


class Brake:
    """Makes every thread of a process notice that the work is off: its `advance` raises."""

    def __init__(self) -> None:
        self._reason: BaseException | None = None

    def pull(self, reason: BaseException) -> None:
        """From now on `advance` raises this; the first reason counts."""
        if self._reason is None:
            self._reason = reason

    def on(self, advance: Advance) -> Advance:
        """Check before each step that is counted."""

        def checked(nbytes: int) -> None:
            if self._reason is not None:
                raise self._reason
            advance(nbytes)

        return checked


class Crew(Protocol):
    """One process's view of those that work together.

    All processes call `gather` and `phase` equally often and in the same order.
    """

    @property
    def rank(self) -> int:
        """Which process this is. 0 is the one that creates, places and reports."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    @property
    def brake(self) -> Brake:
        """Stops this process's own threads."""
        ...

    def gather(self, value: Value) -> list[Value]:
        """Everybody's value by rank, on every rank, once all have come this far.

        Raises:
            BridgeError: Whatever another process has failed of.
            WorkerLostError: BR501, another process has died.
        """
        ...

    def phase(self, progress: Progress, name: str, total: int) -> AbstractContextManager[Advance]:
        """A phase of `total` bytes over all processes; rank 0 shows what all of them have done.

        The value also raises when another process has failed, so that nobody works on in vain.
        """
        ...

    def settle(self, error: BaseException) -> BaseException:
        """This process has failed: have all stop. May be called again.

        When it returns on rank 0, no other process writes any more.

        Returns:
            The error to raise: `error` itself, or the one that led to it elsewhere.
        """
        ...


class Alone:
    """The crew of one process."""

    rank: Final = 0
    size: Final = 1

    def __init__(self) -> None:
        self.brake = Brake()

    def gather(self, value: Value) -> list[Value]:
        """See `Crew`."""
        return [value]

    @contextmanager
    def phase(self, progress: Progress, name: str, total: int) -> Iterator[Advance]:
        """See `Crew`."""
        with progress.phase(name, total) as advance:
            yield self.brake.on(advance)

    def settle(self, error: BaseException) -> BaseException:
        """See `Crew`."""
        return error
