"""A pool of rank processes that stays alive from case to case.

Starting a process that has torch and Megatron-Core imported costs seconds; forking one from a
server that has them costs milliseconds, and a rank that is already there costs nothing. Ranks form
new groups whenever the layout changes, meeting where their source says: on this host in a file of a
private directory, so that any number of pools run side by side. When a rank throws, dies or hangs,
all are ended at once, the error shows the one that failed first, and the next call starts afresh.
"""

from __future__ import annotations

import logging
import multiprocessing.connection
import pickle
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

from bridge.scratch import held_directory
from bridge.spec import ParallelLayout
from harness.errors import (
    BackendUnavailableError,
    RanksUnavailableError,
    WorkerFailedError,
    WorkerTimeoutError,
)
from harness.rank_processes import LocalRanks, Worker, WorkerSource, dump_stacks, kill
from harness.ranks import Hook, Outcome, RankFunction, RankSettings, Task

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT: Final = 300.0
_COLLECTIVES: Final = "torch/distributed/"
"""In the stack of a rank that waits for another."""
_GRACE: Final = 1.0
"""Seconds in which the other ranks may still say what happened to them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    rank: int
    kind: Literal["ended", "threw", "hung"]
    what: str
    outcome: Outcome
    at: float

    @property
    def order(self) -> tuple[bool, float]:
        """First failures first. A rank only dies of itself; others throw because it did."""
        return self.kind != "ended", self.at


class RankPool:
    """Rank processes, on this host unless `source` has them elsewhere.

    Args:
        device: "cpu" runs gloo, "cuda" NCCL.
        timeout: Seconds a call may take unless it says otherwise, process start included.
        log_dir: Where each rank's output goes, as `rank3.log`. By default a private directory that
            goes away with the pool.
        source: Where ranks come from; by default any number of processes of this host.
    """

    def __init__(
        self,
        *,
        device: Literal["cpu", "cuda"] = "cpu",
        timeout: float = DEFAULT_TIMEOUT,
        log_dir: Path | None = None,
        source: WorkerSource | None = None,
    ) -> None:
        self.device = device
        self._source: WorkerSource = source or LocalRanks()
        self.timeout = timeout
        stack = ExitStack()
        self._private = stack.enter_context(held_directory())
        self.log_dir = log_dir or self._private
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self._workers: list[Worker] = []
        self._formed: tuple[object, ...] | None = None
        self._rendezvous = ""
        self._generation = 0
        # Non-daemonic processes (a checkpoint save starts children) are joined at exit: end them
        # first, whatever became of the pool.
        self._finalizer = weakref.finalize(self, _clean_up, self._workers, stack)

    def run(
        self,
        layout: ParallelLayout,
        function: RankFunction,
        *args: Any,  # noqa: ANN401 - the function's own
        timeout: float | None = None,
        hook: Hook | None = None,
    ) -> list[Any]:
        """Call `function(context, *args)` on every rank of a layout.

        Args:
            layout: Groups are formed for it unless they already are.
            function: Importable by name; its first argument is a `RankContext`.
            *args: Picklable.
            timeout: Seconds; None takes the pool's.
            hook: A context manager to run it in, called with the `RankContext`.

        Returns:
            What each rank returned, by rank.

        Raises:
            WorkerFailedError: HN202, a rank threw or died; the first one's traceback is in it.
            WorkerTimeoutError: HN203, ranks did not finish in time; their stacks are in it.
            WorkerLostError: BR501, the process that ranks are forked from does not answer.
            BridgeError: A rank raised one: the same error, with the rank noted.
            RanksUnavailableError: HN205, the source has not that many.
            BackendUnavailableError: HN201, the function cannot be sent, or the pool is closed.
        """
        if not self._finalizer.alive:
            raise BackendUnavailableError("the pool of rank processes is closed")
        capacity = self._source.capacity
        if capacity is not None and layout.world_size > capacity:
            raise RanksUnavailableError(
                f"layout {layout.name} has {layout.world_size} ranks, torchrun has started "
                f"{capacity}",
                hint="start more processes, or leave such layouts out",
            )
        limit = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        try:
            self._start(layout.world_size)
            self._form(layout)
            workers = self._workers[: layout.world_size]
            task = Task(
                rendezvous=self._rendezvous,
                world_size=layout.world_size,
                layout=layout,
                function=function,
                args=args,
                hook=hook,
            )
            _send(workers, task)
            outcomes, failures = _collect(workers, deadline, limit)
            if not failures:
                return [outcomes[worker.rank].value for worker in workers]
            dump_stacks([worker for worker in workers if worker.rank not in outcomes])
            tails = {worker.rank: worker.log_tail() for worker in workers}
        except BaseException:
            self._end()
            raise
        first = min(failures, key=lambda one: one.order)
        if first.kind == "hung":
            first = _first_to_hang(
                [worker for worker in workers if worker.rank not in outcomes], tails, limit
            )
        self._end()
        raise self._error(first, layout, tails, function)

    def warm_up(self) -> None:
        """Have Megatron-Core imported, without waiting for it."""
        self._source.warm_up()

    def close(self) -> None:
        """End every rank and remove the private directory."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pids(self) -> tuple[int, ...]:
        """Process id of each rank that is alive, by rank."""
        return tuple(worker.pid for worker in self._workers)

    def _start(self, num_ranks: int) -> None:
        if not all(worker.is_idle() for worker in self._workers):
            for worker in self._workers:  # a rank has ended between two calls
                if not worker.is_alive():
                    logger.warning(
                        "rank %d (process %s) %s between two cases; new ranks are started",
                        worker.rank, worker.pid, worker.death(),
                    )  # fmt: skip
            self._end()
        settings = [
            RankSettings(
                rank=rank,
                device=self.device,
                log=self.log_dir / f"rank{rank}.log",
                start_timeout=self.timeout,
                collective_timeout=2 * self.timeout,
                private=self._private,
            )
            for rank in range(len(self._workers), num_ranks)
        ]
        if settings:
            self._workers += self._source.start(settings)

    def _form(self, layout: ParallelLayout) -> None:
        """Choose the groups' meeting place; ranks that are not part of the layout leave."""
        wanted = (
            layout.tensor_model_parallel_size,
            layout.pipeline_model_parallel_size,
            layout.virtual_pipeline_model_parallel_size,
        )
        # Groups do not depend on the stages, but a rank's cached models do: `layout` is in the
        # task, and whoever caches says so in the key.
        if wanted != self._formed:
            self._generation += 1
            self._rendezvous = self._source.rendezvous(self._private, self._generation)
            self._formed = wanted
            _send(self._workers[layout.world_size :], None)

    def _end(self) -> None:
        kill(self._workers)
        self._formed = None

    def _error(
        self,
        failure: _Failure,
        layout: ParallelLayout,
        tails: dict[int, str],
        function: RankFunction,
    ) -> Exception:
        outcome = failure.outcome
        if outcome.error is not None:
            outcome.error.add_note(f"raised on rank {failure.rank} of layout {layout.name}")
            return outcome.error
        name = getattr(function, "__qualname__", str(function))
        kind = WorkerTimeoutError if failure.kind == "hung" else WorkerFailedError
        kept = f"; logs in {self.log_dir}" if self.log_dir != self._private else ""
        return kind(
            f"rank {failure.rank} of {layout.world_size} {failure.what}",
            where=f"{name} at layout {layout.name}{kept}",
            hint="the other ranks were ended; the next case starts new ones",
            rank=failure.rank,
            rank_traceback=outcome.traceback or "",
            log_tails=tails,
        )


def _send(workers: list[Worker], task: Task | None) -> None:
    try:
        message = pickle.dumps(task, protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise BackendUnavailableError(
            f"this cannot be sent to rank processes: {error}",
            hint="rank functions and their arguments must be importable by name and picklable",
        ) from error
    for worker in workers:
        worker.send(message)


def _collect(
    workers: list[Worker], deadline: float, limit: float
) -> tuple[dict[int, Outcome], list[_Failure]]:
    """Wait for every rank, or for the first failure and a little longer."""
    pending = {worker.rank: worker for worker in workers}
    outcomes: dict[int, Outcome] = {}
    failures: list[_Failure] = []
    while pending:
        handles = {handle: worker for worker in pending.values() for handle in worker.handles}
        ready = multiprocessing.connection.wait(
            list(handles), timeout=max(0.0, deadline - time.monotonic())
        )
        if not ready:
            break
        for worker in {handles[one].rank: handles[one] for one in ready}.values():
            del pending[worker.rank]
            answer = worker.receive()
            if answer is None:
                failures.append(
                    _Failure(
                        rank=worker.rank, kind="ended", what=worker.death(), outcome=Outcome(),
                        at=time.monotonic(),
                    )
                )  # fmt: skip
                continue
            outcome: Outcome = pickle.loads(answer)  # noqa: S301 - of our own rank
            outcomes[worker.rank] = outcome
            if outcome.traceback is not None:
                failures.append(
                    _Failure(
                        rank=worker.rank, kind="threw", what=f"failed with {outcome.what}",
                        outcome=outcome, at=outcome.at if worker.is_here else time.monotonic(),
                    )
                )  # fmt: skip
        if failures:
            deadline = min(deadline, min(one.at for one in failures) + _GRACE)
    if pending and not failures:
        what = f"did not finish within {limit:g} s"  # which of them is for their stacks to say
        failures.append(
            _Failure(rank=min(pending), kind="hung", what=what, outcome=Outcome(), at=0.0)
        )
    return outcomes, failures


def _first_to_hang(workers: Sequence[Worker], tails: Mapping[int, str], limit: float) -> _Failure:
    """Of ranks that did not finish, one that does not wait for another inside a collective."""
    stopped = {worker.rank for worker in workers if worker.is_stopped()}
    waiting = {worker.rank for worker in workers if _COLLECTIVES in tails[worker.rank]} - stopped
    ranks = sorted(worker.rank for worker in workers)
    rank = next((one for one in ranks if one not in waiting), ranks[0])
    others = [one for one in ranks if one != rank]
    what = f"did not finish within {limit:g} s"
    if rank in stopped:
        what += ": it is stopped, as by SIGSTOP"
    if others:
        what += f" (nor did ranks {others})"
    return _Failure(rank=rank, kind="hung", what=what, outcome=Outcome(), at=0.0)


def _clean_up(workers: list[Worker], stack: ExitStack) -> None:
    kill(workers)
    stack.close()
