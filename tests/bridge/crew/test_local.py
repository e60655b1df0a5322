"""A crew on one machine: what its processes exchange, and what becomes of a failure."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from bridge.crew.launch import crew_of
from bridge.crew.local import led
from bridge.errors import ConfigError, UsageError, WorkerLostError
from bridge.progress import Advance

if TYPE_CHECKING:
    from tests.bridge.crew import crew_functions as functions
else:  # a module beside this file: tests are not a package
    sys.path.append(str(Path(__file__).parent))
    import crew_functions as functions


pytestmark = pytest.mark.usefixtures("nobody_stays_behind")


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_everybody_gets_everybodys_value_by_rank(workers: int) -> None:
    """A round per call, in the order of ranks."""
    with crew_of(workers) as crew:
        assert crew.run(functions.squares) == [rank**2 for rank in range(workers)]
        assert crew.rank == 0


def test_workers_are_processes_of_their_own() -> None:
    """This one is the first of them."""
    with crew_of(3) as crew:
        found = crew.run(functions.pids)
    assert len(set(found)) == 3
    assert found[0] == psutil.Process().pid


def test_no_workers_cannot_work() -> None:
    """Bad usage, said before anything starts."""
    with pytest.raises(UsageError), crew_of(0):
        pass


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_an_error_of_any_worker_is_raised_as_it_is(rank: int) -> None:
    """Class, place and help are those of the worker that raised it."""
    with pytest.raises(ConfigError) as caught, crew_of(3) as crew:
        crew.run(functions.fail, rank)
    assert (caught.value.where, caught.value.hint) == ((f"rank {rank}",), "mend it")


def test_a_bug_in_a_worker_keeps_its_traceback() -> None:
    """It is no error that a user can act on."""
    with pytest.raises(RuntimeError, match="in crash") as caught, crew_of(2) as crew:
        crew.run(functions.crash)
    assert "worker 1 of 2" in str(caught.value)
    assert "ZeroDivisionError: a bug of ours" in str(caught.value)


def test_a_hand_has_the_name_that_its_caller_gives_it() -> None:
    """Where the lead is no rank, the first hand is rank 0."""
    with (
        pytest.raises(RuntimeError, match=r"^rank 0 of 1 failed"),
        led(
            2, functions.crash, (), {}, called=lambda rank, size: f"rank {rank - 1} of {size - 1}"
        ) as lead,
    ):
        lead.gather(None)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (signal.SIGKILL, "was killed by SIGKILL"),
        (signal.SIGTERM, "was killed by SIGTERM"),
        (-7, "ended with exit code 7"),
    ],
)
def test_a_worker_that_dies_is_named_with_how(how: int, said: str) -> None:
    """By its number, and by the signal or the exit code."""
    with pytest.raises(WorkerLostError, match=f"worker 1 of 3 {said}"), crew_of(3) as crew:
        crew.run(functions.leave, how)


def test_a_busy_worker_stops_when_another_has_died(tmp_path: Path) -> None:
    """Not only where it would have waited for the dead one."""
    with pytest.raises(WorkerLostError), crew_of(2) as crew:
        crew.run(functions.work_on, tmp_path)
    assert not (tmp_path / "finished").exists()


class Counter:
    """Remembers what was shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, int, int]] = []

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Advance]:
        """Add up."""
        done: list[int] = []
        yield done.append
        self.shown.append((name, total, sum(done)))


@pytest.mark.parametrize("workers", [1, 3])
def test_progress_is_that_of_all_workers(workers: int) -> None:
    """The total is everybody's, and reached when the phase ends."""
    progress = Counter()
    with crew_of(workers) as crew:
        crew.run(functions.count, 100, progress=progress)
    assert progress.shown == [("count", 300 * workers, 300 * workers)]
