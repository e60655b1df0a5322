"""Running a function as a crew, whichever way its processes are started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from bridge.crew import bounds
from bridge.crew.interrupts import interrupts_pull
from bridge.crew.protocol import Alone
from bridge.errors import UsageError

if TYPE_CHECKING:  # torch takes seconds to import
    from bridge.crew.torchrun import TorchrunCrew

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Launch:
    """A crew about to start.

    Args:
        workers: Processes on this machine; the crew is `crew` if there is one.
        crew: That has been started by somebody else.
        timeout: Seconds without progress after which a process is taken for lost.
    """

    workers: int
    crew: TorchrunCrew | None
    timeout: float = bounds.HUNG

    @property
    def rank(self) -> int:
        """This process's. Only rank 0 has anything to say to the user."""
        return self.crew.rank if self.crew is not None else 0

    def run(
        self,
        function: Callable[..., Result],
        *args: Any,  # noqa: ANN401 - the function's own
        **kwargs: Any,  # noqa: ANN401 - the function's own
    ) -> Result:
        """Call `function(*args, crew=crew, **kwargs)` in every process of the crew.

        Args:
            function: Importable by name.
            *args: Picklable.
            **kwargs: Picklable.

        Returns:
            What it returns here.

        Raises:
            WorkerLostError: BR501, a process has died, or hangs.
            BridgeError: Whatever the function raises, in whichever process.
        """
        if self.crew is not None:
            with self.crew.working():
                return function(*args, crew=self.crew, **kwargs)
        if self.workers == 1:
            alone = Alone()
            with interrupts_pull(alone.brake):
                return function(*args, crew=alone, **kwargs)
        from bridge.crew.local import led

        with (
            led(self.workers, function, args, kwargs, timeout=self.timeout) as lead,
            interrupts_pull(lead.brake),
        ):
            return function(*args, crew=lead, **kwargs)


@contextmanager
def crew_of(
    workers: int | None,
    places: Iterable[str | None] = (),
    *,
    timeout: float = bounds.HUNG,
) -> Iterator[Launch]:
    """A crew of `workers` processes on this machine, or of torchrun's ranks.

    Under torchrun (`RANK` and a `WORLD_SIZE` above 1 in the environment) the ranks meet here. An
    error inside the block, on whichever rank, is raised by rank 0 alone, and the others exit with
    its status, so that the user reads it once.

    Args:
        workers: Processes on this machine; None is 1, or torchrun's.
        places: What all of them will read and write, as the user named it; None is nothing.
        timeout: Seconds without progress after which a process is taken for lost. One that gives
            no sign of life is given up earlier, see `bounds.FROZEN`.

    Raises:
        UsageError: BR001, fewer than one, both `workers` and torchrun, or several processes and a
            place that each would see differently.
        WorkerLostError: BR501, the ranks do not come together.
    """
    if not under_torchrun():
        if workers is not None and workers < 1:
            raise UsageError(f"{workers} workers cannot do any work", hint="give 1 or more")
        _refuse_private_memory(workers or 1, places)
        yield Launch(workers or 1, None, timeout)
        return
    from bridge.crew.torchrun import joined

    with joined(timeout) as crew:
        if workers is not None:
            raise UsageError(
                "workers and torchrun both say how many processes there are",
                where=f"WORLD_SIZE={os.environ['WORLD_SIZE']} in the environment",
                hint="leave --workers away under torchrun; elsewhere, unset RANK and WORLD_SIZE",
            )
        _refuse_private_memory(crew.size, places)
        yield Launch(crew.size, crew, timeout)


def _refuse_private_memory(size: int, places: Iterable[str | None]) -> None:
    """Refuse what the processes of a crew cannot share: each would find its own memory empty."""
    private = [place for place in places if place and place.startswith("memory://")]
    if size > 1 and private:
        raise UsageError(
            f"{size} processes do not share one memory: each has a memory:// of its own",
            where=private,
            hint="use one process, or a directory or an object store that all of them see",
        )


def under_torchrun() -> bool:
    """Whether this process is one of several that torchrun, or the like, has started."""
    size = os.environ.get("WORLD_SIZE", "")
    return "RANK" in os.environ and size.isdigit() and int(size) > 1


def processes_here(workers: int | None) -> int:
    """How many processes of the crew share this machine's cores."""
    if under_torchrun():
        here = os.environ.get("LOCAL_WORLD_SIZE", "")
        return max(1, int(here)) if here.isdigit() else 1
    return workers or 1
