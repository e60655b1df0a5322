"""A crew that torchrun has started, on one machine or on several with a shared filesystem.

Values go over gloo, which notices at once when a peer's connection closes; torchrun's store carries
the bytes done, and the word that a rank has failed while the others are busy.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any, Final

import psutil
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from bridge.crew.interrupts import interrupts_pull
from bridge.crew.protocol import Brake, StoppedError, Value
from bridge.errors import BridgeError, WorkerLostError
from bridge.progress import Advance, Progress

_JOIN: Final = timedelta(minutes=5)
_PATIENCE: Final = timedelta(days=7)
"""How long a rank waits for the others to finish their shares. A dead one is noticed at once."""
_POLL: Final = 0.3
"""Seconds between two looks at the store."""
_DYING: Final = 1.0
"""Seconds in which a process whose connection has closed ends."""
_STOP: Final = "nemotron_bridge/stop"


class TorchrunCrew:
    """This process among the ranks of torchrun. To be closed.

    Raises:
        WorkerLostError: BR501, the ranks do not come together.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ["RANK"])
        self.size = int(os.environ["WORLD_SIZE"])
        self.brake = Brake()
        self._lock = threading.Lock()
        self._pending = 0
        self._seen = 0
        self._phase = 0
        self._advance: Advance | None = None
        self._settled = False
        self._members: list[tuple[str, int]] = []
        try:
            self._store, *_ = next(rendezvous("env://", self.rank, self.size, timeout=_JOIN))
            self._store.set(f"nemotron_bridge/{self.rank}", "here")
            self._store.wait([f"nemotron_bridge/{rank}" for rank in range(self.size)], _JOIN)
            distributed.init_process_group(
                "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.size,
                timeout=_PATIENCE,
            )
        except (RuntimeError, ValueError) as error:
            raise WorkerLostError(
                f"the {self.size} ranks of torchrun do not come together",
                where=str(error).partition("\n")[0],
                hint="start all of them with torchrun, and name the network with "
                "GLOO_SOCKET_IFNAME where there are several; to run alone, unset RANK and "
                "WORLD_SIZE",
            ) from error
        self._members = self.gather((socket.gethostname(), os.getpid()))
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="crew")
        self._watcher.start()

    def gather(self, value: Value) -> list[Value]:
        """See `Crew`."""
        told = self._exchange(value, None)
        failed = _first(told)
        if failed is not None:
            self._settled = True
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
        with progress.phase(name, total) as advance:
            self._advance = advance
            try:
                yield self.brake.on(advance)
                self._hear()
            finally:
                self._advance = None

    def settle(self, error: BaseException) -> BaseException:
        """See `Crew`."""
        if self._settled:
            return error
        self._settled = True
        with suppress(RuntimeError):  # without the store the others learn of it one round later
            self._store.set(_STOP, str(self.rank))
        # Where a rank is lost there is nobody to agree with; the others see it as this one did.
        if not isinstance(error, Exception) or isinstance(error, WorkerLostError):
            return error
        try:
            told = self._exchange(None, _portable(error, self.rank))
        except WorkerLostError as lost:
            return lost if isinstance(error, StoppedError) else error
        rank, first = _first(told) or (self.rank, error)
        return error if rank == self.rank else first

    @property
    def store(self) -> Any:  # noqa: ANN401 - of torch, which types it by platform
        """What the ranks met at; it outlives the crew, and others may meet there too."""
        return self._store

    def lead_is_gone(self) -> bool:
        """Whether rank 0 was on this machine and has died, and somebody else must report."""
        return 0 in self._gone()

    def wait_for_lead(self) -> None:
        """Stay until rank 0 has cleared up and reported: torchrun ends all when one leaves."""
        with suppress(WorkerLostError):
            self._exchange(None, None)

    def close(self, *, failed: bool = False) -> None:
        """End this rank's part.

        After a failure the connections are left to the process's end: who waits for rank 0 then
        waits until it has reported. They do end in Python, and the watcher always goes: a thread
        that is inside torch when the interpreter ends takes the process down with SIGABRT.
        """
        self._closing.set()
        self._watcher.join()
        if failed:
            atexit.register(_part)
        else:
            _part()

    def terminated(self, number: int, frame: FrameType | None) -> None:
        """A signal handler: torchrun ends the ranks that are left when one has died."""
        del number, frame
        if self._settled:
            return  # on the way out already, with an error that says more
        lost = self._lost("this rank was told to end")
        self.brake.pull(lost)
        raise lost

    def _exchange(
        self, value: Value, error: Exception | None
    ) -> list[tuple[Value, Exception | None]]:
        self._report()
        told: list[Any] = [None] * self.size
        try:
            distributed.all_gather_object(told, (value, error))
        except RuntimeError as broken:
            raise self._lost(str(broken).partition("\n")[0]) from broken
        return told

    def _lost(self, what: str) -> WorkerLostError:
        """Name the ranks that are gone, as far as this machine can tell."""
        # A connection closes a moment before its process is no more.
        deadline = time.monotonic() + _DYING
        while not (gone := self._gone()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return WorkerLostError(
            f"{len(gone) or 'some'} of {self.size} ranks died; the target was not created",
            where=[f"rank {rank}: process {self._members[rank][1]}" for rank in gone] or what,
            hint="torchrun's report names the rank that failed first and says how; SIGKILL mostly "
            "means that memory ran out",
        )

    def _gone(self) -> list[int]:
        """The ranks on this machine that are no more."""
        here = socket.gethostname()
        return [
            rank for rank, (host, pid) in enumerate(self._members) if host == here and _is_gone(pid)
        ]

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._pending += nbytes

    def _report(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, 0
            phase = self._phase
        if pending:
            with suppress(RuntimeError):  # progress is not worth a failure
                self._store.add(f"nemotron_bridge/done/{phase}", pending)

    def _hear(self) -> None:
        """Show what the other ranks have done since."""
        with self._lock, suppress(RuntimeError):
            done = self._store.add(f"nemotron_bridge/done/{self._phase}", 0)
            advance = self._advance
            if advance is not None and done > self._seen:
                advance(done - self._seen)
                self._seen = done

    def _watch(self) -> None:
        while not self._closing.wait(_POLL):
            self._report()
            if self.rank == 0:
                self._hear()
            with suppress(RuntimeError):
                if self._store.check([_STOP]):
                    self.brake.pull(StoppedError("another rank has failed"))
            if self._gone():
                self.brake.pull(self._lost("it is gone"))


def _part() -> None:
    with suppress(RuntimeError):
        if distributed.is_initialized():
            distributed.destroy_process_group()


@contextmanager
def joined() -> Iterator[TorchrunCrew]:
    """Join the ranks of torchrun; see `crew_of`."""
    crew = TorchrunCrew()
    handles = crew.rank == 0 and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, crew.terminated) if handles else None
    try:
        with interrupts_pull(crew.brake):
            yield crew
    except BaseException as error:
        told = crew.settle(error)
        crew.close(failed=True)
        if crew.rank and isinstance(told, BridgeError) and not crew.lead_is_gone():
            crew.wait_for_lead()
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


def _is_gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
