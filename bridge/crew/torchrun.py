"""A crew that torchrun has started, on one machine or on several with a shared filesystem.

Values, the bytes done, signs of life and the word that a rank has failed all go by way of
torchrun's store. A rank that waits for another looks there again and again, so that nothing but a
bound, a failure or a signal ends its wait: no collective of torch can be left in the middle.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import Any, Final, TypeVar

from bridge.crew import bounds
from bridge.crew.board import LEFT, REPORTED, Board
from bridge.crew.interrupts import Handler, Terminated, interrupts_pull
from bridge.crew.lookout import Lookout
from bridge.crew.protocol import Brake, StoppedError, Value
from bridge.errors import BridgeError, WorkerLostError
from bridge.progress import Advance, Progress

NO_TARGET: Final = "; the target was not created"
_NOTICED: Final = 2.0
"""Seconds in which the lookout has noticed what a collective of torch has failed of."""
_POLL: Final = 0.1
"""Seconds between two looks for a value that another rank will give, at most."""


Some = TypeVar("Some")


class TorchrunCrew:
    """This process among the ranks of torchrun. To be closed.

    Args:
        timeout: Seconds without progress after which a rank is taken for lost.
        so: What follows from the loss of a rank, for the end of a sentence.

    Raises:
        WorkerLostError: BR501, the ranks do not come together.
    """

    def __init__(self, timeout: float = bounds.HUNG, *, so: str = NO_TARGET) -> None:
        self.rank = int(os.environ["RANK"])
        self.size = int(os.environ["WORLD_SIZE"])
        self.brake = Brake()
        self._lock = threading.Lock()
        self._pending = 0
        self._seen = 0
        self._phase = 0
        self._round = 0
        self._advance: Advance | None = None
        self._settled = False
        self._so = so
        try:
            self._board = Board(self.rank, self.size)
            members = self._board.join((socket.gethostname(), os.getpid()))
        except (RuntimeError, ValueError) as error:
            raise WorkerLostError(
                f"the {self.size} ranks of torchrun do not come together",
                where=str(error).partition("\n")[0],
                hint="start all of them with torchrun, on machines that reach each other; to run "
                "alone, unset RANK and WORLD_SIZE",
            ) from error
        self._lookout = Lookout(self._board, members, self.brake, timeout, so, self._tell)
        self._lookout.start()

    def gather(self, value: Value) -> list[Value]:
        """See `Crew`."""
        told = self._exchange(value, None)
        failed = _first(told)
        if failed is not None:
            self._settle()
            raise failed[1]
        return [value for value, _ in told]

    @contextmanager
    def phase(self, progress: Progress, name: str, total: int) -> Iterator[Advance]:
        """See `Crew`."""
        with self._lock:
            self._phase += 1
            self._seen = 0
        if self.rank:
            yield self.brake.on(self._count)
            return
        with self.timed(is_timed=True), progress.phase(name, total) as advance:
            self._advance = advance
            try:
                yield self.brake.on(self.renewing(advance))
                self._hear()
            finally:
                self._advance = None

    def working(self) -> AbstractContextManager[None]:
        """Within it this rank must make progress.

        Rank 0 only in phases: what it does between them, such as to put the target into its place,
        counts no bytes, and nobody is to end it in the middle of that.
        """
        return self.timed(is_timed=self.rank > 0)

    def settle(self, error: BaseException) -> BaseException:
        """See `Crew`."""
        if self._settled:
            return error
        self._settle()
        # Where a rank is lost there is nobody to agree with; the others see it as this one did.
        is_told = isinstance(error, Exception) and not isinstance(error, WorkerLostError)
        with suppress(RuntimeError):  # without the store the others learn of it by our end
            self._board.stop(None if is_told else self._leaving(error))
        if not isinstance(error, Exception) or not is_told:
            return error
        try:
            told = self._exchange(None, _portable(error, self.rank))
        except WorkerLostError as lost:
            return lost if isinstance(error, StoppedError) else error
        rank, first = _first(told) or (self.rank, error)
        return error if rank == self.rank else first

    def renewing(self, function: Callable[[Some], object]) -> Callable[[Some], None]:
        """The same, and a sign of progress each time."""

        def renewed(argument: Some) -> None:
            self._lookout.progress.renew()
            function(argument)

        return renewed

    def loss_behind(self) -> WorkerLostError | None:
        """The loss of a rank that may be why something of torch's has just failed here."""
        deadline = time.monotonic() + _NOTICED
        while self._lookout.failure is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self._lookout.failure

    @property
    def store(self) -> Any:  # noqa: ANN401 - of torch, which types it by platform
        """What the ranks met at; it outlives the crew, and others may meet there too."""
        return self._board.store

    def lead_is_lost(self) -> bool:
        """Whether rank 0 has died, as seen from here, and somebody else must report."""
        return self._lookout.is_lost(0)

    def wait_for_lead(self) -> None:
        """Stay until rank 0 has cleared up and reported: torchrun ends all when one leaves."""
        report = bounds.Patience(bounds.LEAVE)
        with suppress(RuntimeError):
            while not (self._board.has(REPORTED) or self.lead_is_lost()):
                if not self._lookout.has_left(0):
                    report.renew()
                if report.is_over():
                    return
                time.sleep(_POLL)

    def close(self, *, failed: bool = False) -> None:
        """End this rank's part.

        Rank 0 may serve the store: it leaves when the others have. After a failure they wait until
        it has reported, which is at its end.
        """
        self._lookout.close()
        with suppress(RuntimeError):
            if self.rank:
                self._board.beat(LEFT)
            elif failed:
                self._board.beat(LEFT)  # there are no signs of life from here on
                atexit.register(self._report)
            else:
                self._wait_for_others()

    def terminated(self, before: Handler | None) -> Handler:
        """A signal handler: torchrun ends the ranks that are left when one has died.

        Args:
            before: For where none has: then it is the whole run that is to end.
        """

        def handler(number: int, frame: FrameType | None) -> None:
            if self._settled:
                return  # on the way out already, with an error that says more
            lost = self._lookout.failure or self._lookout.loss("this rank was told to end")
            self.brake.pull(lost)
            if before is not None and not self._lookout.gone():
                before(number, frame)
            raise lost

        return handler

    def _exchange(
        self, value: Value, error: Exception | None
    ) -> list[tuple[Value, Exception | None]]:
        with self.timed(is_timed=False):
            return self._exchanged(value, error)

    def _exchanged(
        self, value: Value, error: Exception | None
    ) -> list[tuple[Value, Exception | None]]:
        self._round += 1
        mine, everybodys = f"round/{self._round}/{self.rank}", f"round/{self._round}"
        try:
            self._tell()
            self._board.put(mine, (value, error))
            if self.rank == 0:
                told = [self._await(f"{everybodys}/{rank}") for rank in range(self.size)]
                self._board.put(everybodys, told)
            else:
                told = self._await(everybodys)
        except RuntimeError as broken:
            what = str(broken).partition("\n")[0]
            raise self._lookout.failure or self._lookout.loss(what) from broken
        return told

    @contextmanager
    def timed(self, *, is_timed: bool) -> Iterator[None]:
        """Whether this rank must make progress within it."""
        before = self._lookout.is_timed
        self._lookout.progress.renew()
        self._lookout.is_timed = is_timed
        try:
            yield
        finally:
            self._lookout.progress.renew()
            self._lookout.is_timed = before

    def _await(self, name: str) -> Any:  # noqa: ANN401 - whatever is gathered
        pause = 0.001
        while not self._board.has(name):
            if self._lookout.failure is not None:
                raise self._lookout.failure
            time.sleep(pause)
            pause = min(2 * pause, _POLL)
        return self._board.get(name)

    def _settle(self) -> None:
        self._settled = True
        self._lookout.is_leaving = True

    def _leaving(self, error: BaseException) -> WorkerLostError:
        """What the others are told of a rank that leaves at once."""
        if isinstance(error, WorkerLostError):
            return error
        how = {KeyboardInterrupt: "was interrupted", Terminated: "was told to end (SIGTERM)"}
        return WorkerLostError(
            f"rank {self.rank} of {self.size} {how.get(type(error), f'left: {error!r}')}{self._so}",
            where=f"process {os.getpid()} on {socket.gethostname()}",
            hint="run it again",
        )

    def _count(self, nbytes: int) -> None:
        self._lookout.progress.renew()
        with self._lock:
            self._pending += nbytes

    def _tell(self) -> None:
        """Tell rank 0 of the bytes done here; as rank 0, show what the others have done since."""
        with self._lock:
            pending, self._pending = self._pending, 0
            phase = self._phase
        if pending:
            with suppress(RuntimeError):  # progress is not worth a failure
                self._board.add(f"done/{phase}", pending)
        if self.rank == 0:
            self._hear()

    def _hear(self) -> None:
        with self._lock, suppress(RuntimeError):
            done = self._board.add(f"done/{self._phase}", 0)
            advance = self._advance
            if advance is not None and done > self._seen:
                advance(done - self._seen)
                self._seen = done

    def _report(self) -> None:
        with suppress(RuntimeError):
            self._board.put(REPORTED, self.rank)
            self._wait_for_others()

    def _wait_for_others(self) -> None:
        """As rank 0, stay until no other needs the store."""
        deadline = time.monotonic() + bounds.DEATH
        while time.monotonic() < deadline:
            gone = self._lookout.gone()
            ranks = [rank for rank in range(1, self.size) if rank not in gone]
            if not ranks or set(self._board.beats(ranks)) == {LEFT}:
                return
            time.sleep(0.01)


@contextmanager
def joined(timeout: float = bounds.HUNG, *, so: str = NO_TARGET) -> Iterator[TorchrunCrew]:
    """Join the ranks of torchrun; see `crew_of`."""
    crew = TorchrunCrew(timeout, so=so)
    handles = crew.rank == 0 and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    if handles:
        outer = before if callable(before) else None
        signal.signal(signal.SIGTERM, crew.terminated(outer))
    try:
        with interrupts_pull(crew.brake):
            yield crew
    except BaseException as error:
        told = crew.settle(error)
        waits = crew.rank and isinstance(told, BridgeError) and not crew.lead_is_lost()
        if waits:
            crew.wait_for_lead()
        crew.close(failed=True)
        if waits and isinstance(told, BridgeError):
            raise SystemExit(told.exit_code) from None
        if told is error:
            raise
        raise told from error
    crew.close()
    if handles:  # after a failure it stays: torchrun may end us while we still clear up
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _first(told: Sequence[tuple[Any, Exception | None]]) -> tuple[int, Exception] | None:
    """The error to report and its rank: the lowest one that has an error of its own."""
    failed = [(rank, error) for rank, (_, error) in enumerate(told) if error is not None]
    own = [(rank, error) for rank, error in failed if not isinstance(error, StoppedError)]
    return next(iter(own or failed), None)


def _portable(error: Exception, rank: int) -> Exception:
    if isinstance(error, BridgeError | StoppedError):
        return error
    return RuntimeError(f"rank {rank} failed: {type(error).__name__}: {error}")
