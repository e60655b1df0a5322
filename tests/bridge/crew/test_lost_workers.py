"""Workers of one machine that stop, hang, throw or leave, and a command that is ended.

The rows are what goes wrong, in each place; what must follow is always the same: an end within a
bound, the first cause in words, and nothing left: no process, port, shared memory or file.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from bridge.crew import bounds
from bridge.crew.launch import crew_of
from bridge.errors import WorkerLostError

if TYPE_CHECKING:
    from tests import leftovers
    from tests.bridge.crew import crew_functions as functions
    from tests.bridge.crew.hanging_command import Command
else:  # modules beside this file and above it: tests are not a package
    sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    import crew_functions as functions
    import leftovers
    from hanging_command import Command

pytestmark = pytest.mark.usefixtures("nobody_stays_behind")

TIMEOUT = 3.0
"""Seconds given as `--timeout`: the machine that runs tests has nothing to swap."""
NOTICED = TIMEOUT + bounds.ACCORD + bounds.DEATH + 40
"""Seconds until a run that hangs has ended, its start on a busy machine included."""
ROOT = Path(__file__).parents[3]
HANGING_LEAD = """
import crew_functions as functions
from bridge.crew.launch import crew_of

with crew_of(2, timeout=3) as crew:
    crew.run(functions.hang, 0)
"""
STOPPING_LEAD = """
import sys
import crew_functions as functions
from bridge.crew.launch import crew_of

with crew_of(2, timeout=3) as crew:
    crew.run(functions.stop_lead, sys.argv[1])
"""
TORCHRUNS = "torchelastic_"
"""Of the name of the directory that torchrun itself leaves when it is ended."""
ORPHANED = 20.0
"""Seconds until the processes of a killed command have ended, on a busy machine."""


def test_a_stopped_worker_is_named_and_ends_the_run() -> None:
    """Nothing in it could say so; the others end."""
    started = time.monotonic()
    with (
        pytest.raises(
            WorkerLostError,
            match="worker 1 of 3 has given no sign of life for 3 s: it is stopped; the target was",
        ) as caught,
        crew_of(3, timeout=TIMEOUT) as crew,
    ):
        crew.run(functions.stop, 1)
    assert time.monotonic() - started < NOTICED
    assert "SIGSTOP" in (caught.value.hint or "")


def test_a_hung_worker_is_named_with_where_it_hangs() -> None:
    """It lives, and says it itself; the one that waits for it in turn is not taken for hung."""
    started = time.monotonic()
    with (
        pytest.raises(
            WorkerLostError, match="worker 2 of 3 has made no progress for 3 s"
        ) as caught,
        crew_of(3, timeout=TIMEOUT) as crew,
    ):
        crew.run(functions.hang, 2)
    assert time.monotonic() - started < NOTICED
    process, main, *_ = caught.value.where
    assert process.startswith("process ")
    assert main.startswith("MainThread at ")
    assert "crew_functions.py" in main
    assert " in hang" in main


def test_a_stopped_worker_is_named_before_those_that_wait_for_it() -> None:
    """They seem to hang, in a library that waits for it, before it has been silent for as long."""
    with (
        pytest.raises(WorkerLostError, match=r"worker 1 of 3 .*: it is stopped"),
        crew_of(3, timeout=TIMEOUT) as crew,
    ):
        crew.run(functions.stop_while_another_hangs)


def lead(script: str, where: Path) -> subprocess.Popen[str]:
    """A command of its own, which leads one other process."""
    paths = os.pathsep.join(map(str, [ROOT, Path(__file__).parent]))
    return subprocess.Popen(  # noqa: S603 (our own interpreter)
        [sys.executable, "-c", script, str(where)],
        env=os.environ | {"PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_lead_that_hangs_is_named_like_any_other(tmp_path: Path) -> None:
    """Nobody else would say so; its process ends, and the others with it."""
    process = lead(HANGING_LEAD, tmp_path)
    _, err = process.communicate(timeout=NOTICED + bounds.LEAVE)
    assert process.returncode == WorkerLostError.exit_code, err
    assert "BR501 worker 0 of 2 has made no progress for 3 s" in err
    assert " in hang" in err


def test_workers_end_when_the_lead_is_stopped(
    tmp_path: Path,
) -> None:
    """It may never be woken; where it is, it says who has ended."""
    process = lead(STOPPING_LEAD, tmp_path)
    try:
        deadline = time.monotonic() + NOTICED
        while not list(tmp_path.glob("worker-*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        (worker,) = [int(path.name.partition("-")[2]) for path in tmp_path.glob("worker-*")]
        while psutil.pid_exists(worker) and time.monotonic() < deadline:
            if psutil.Process(worker).status() == psutil.STATUS_ZOMBIE:
                break
            time.sleep(0.1)
        assert time.monotonic() < deadline
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "the process that leads has given no sign of life for 3 s" in err
    assert "worker 1 of 2 ended with exit code 3" in err


def test_who_is_slow_or_waits_for_the_lead_does_not_hang() -> None:
    """Twice the limit, in small steps; then rank 0 for as long."""
    with crew_of(2, timeout=TIMEOUT) as crew:
        assert crew.run(functions.work_slowly, 2 * TIMEOUT) == 2


def test_a_worker_that_calls_exit_shows_where() -> None:
    """Instead of an exit code alone."""
    with pytest.raises(RuntimeError, match="in leave_by_exit") as caught, crew_of(2) as crew:
        crew.run(functions.leave_by_exit, 1)
    assert "SystemExit: 7" in str(caught.value)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("when", ["start", "middle", "end"])
def test_a_bug_in_a_worker_is_its_own_error_whenever_it_comes(when: str, rank: int) -> None:
    """Not what the others then failed of."""
    with pytest.raises((RuntimeError, ZeroDivisionError), match=when), crew_of(3) as crew:
        crew.run(functions.throw, rank, when)


@pytest.fixture
def command(tmp_path: Path, session: leftovers.Session) -> Iterator[Command]:
    """It runs."""
    found = Command(tmp_path, session)
    yield found
    found.process.kill()
    found.process.communicate()


@pytest.mark.parametrize(
    ("number", "to_all", "code", "said"),
    [
        (signal.SIGTERM, False, 143, "Terminated (SIGTERM).\n"),
        (signal.SIGTERM, True, 143, "Terminated (SIGTERM).\n"),
        (signal.SIGINT, True, 130, ""),
    ],
)
def test_a_command_that_is_told_to_end_clears_up(
    command: Command, session: leftovers.Session, number: int, code: int, said: str, *, to_all: bool
) -> None:
    """By the terminal, or by a scheduler that takes the machine away, of one process or of all."""
    for pid in command.pids() if to_all else [command.process.pid]:
        psutil.Process(pid).send_signal(number)
    _, err = command.process.communicate(timeout=60)
    assert said in err
    assert "Traceback" not in err
    assert command.process.returncode == code
    assert session.leftovers(seconds=0) == []
    assert command.left() <= {".m.partial"}  # where something was complete, to go on with


def test_workers_of_a_killed_command_end_though_one_is_stopped(
    command: Command, session: leftovers.Session
) -> None:
    """The kernel does it: no thread of a stopped process could."""
    command.workers()[0].suspend()
    command.process.kill()
    assert session.leftovers(seconds=ORPHANED) == []


@pytest.mark.ranks
@pytest.mark.cluster
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_end_with_torchrun(tmp_path: Path, session: leftovers.Session, number: int) -> None:
    """Which serves the store, and is no parent whose death the kernel tells."""
    found = Command(tmp_path, session, torchrun=True)
    found.process.send_signal(number)
    found.process.communicate(timeout=120)
    assert session.leftovers(seconds=ORPHANED + bounds.LEAVE, apart_from=[TORCHRUNS]) == []


def test_patience_counts_only_the_time_in_which_somebody_looked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pause of an hour between two looks was this process's own."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    patience = bounds.Patience(3 * bounds.BEAT)
    clock[0] += 3600
    assert not patience.is_over()
    for _ in range(2):
        clock[0] += bounds.BEAT
        found = patience.is_over()
    assert found
    patience.renew()
    assert not patience.is_over()
