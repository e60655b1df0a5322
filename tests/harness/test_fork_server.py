"""The process that ranks are forked from is stopped: nobody waits for it for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests import leftovers

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path

from bridge.crew import bounds
from bridge.crew.attendants import attendant
from bridge.errors import WorkerLostError
from harness import rank_processes
from harness.rank_processes import LocalRanks, kill
from harness.ranks import RankSettings

def start(*ranks):
    private = Path(sys.argv[1])
    return LocalRanks().start([
        RankSettings(
            rank=rank, device="cpu", log=private / "log", start_timeout=TIMEOUT,
            collective_timeout=60.0, private=private,
        )
        for rank in ranks
    ])

def stop(name):
    attendant(name).suspend()

TIMEOUT = 240.0
rank_processes._DYING = 1.0
rank_processes._PRELOAD[:] = ["harness.ranks"]  # no model is needed
"""
PATIENCE = 60.0
"""Seconds for a script to end, on a busy machine."""


def _run(body: str, directory: Path, session: leftovers.Session) -> str:
    """What the script prints; it must end by itself, and leave nothing but its own directory."""
    done = subprocess.run(  # noqa: S603 - our own
        [sys.executable, "-c", SCRIPT + body, str(directory)],
        env=os.environ | session.variables() | {"PYTHONPATH": f"{ROOT}{os.pathsep}{directory}"},
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert session.leftovers(seconds=5) == []
    return done.stdout


def test_ranks_of_a_server_that_is_stopped_are_given_up(
    tmp_path: Path, session: leftovers.Session
) -> None:
    """It is ended, as it does not say that they have ended; the next ones have another."""
    body = """
workers = start(0, 1)
server = attendant("forkserver")
server.suspend()
kill(workers)
workers = start(0)
print(server.is_running(), attendant("forkserver").is_running())
kill(workers)
"""
    assert _run(body, tmp_path, session) == "False True\n"


def test_a_rank_that_a_stopped_server_does_not_start_is_an_error_within_the_timeout(
    tmp_path: Path, session: leftovers.Session
) -> None:
    """Of `--timeout`, or `bounds.FROZEN`; the ranks that were there have ended, too."""
    body = """
import harness.ranks

def stopped(settings):
    if settings.rank == 1:
        stop("forkserver")
    return forked(settings)

forked, rank_processes.LocalWorker = rank_processes.LocalWorker, stopped
for bounds.FROZEN, TIMEOUT in [(2.0, 240.0), (240.0, 3.0)]:
    try:
        start(0, 1)
    except WorkerLostError as error:
        print(error)
rank_processes.LocalWorker = forked
kill(start(0, 1))
"""
    said = [line for line in _run(body, tmp_path, session).splitlines() if "-->" not in line]
    who, help_ = "process that ranks are forked from", "help: somebody has stopped it (SIGSTOP)"
    assert said == [
        f"BR501 the {who} has given no sign of life for 2 s: it is stopped",
        f"{help_}; run it again",
        f"BR501 the {who} has given no sign of life for 3 s: it is stopped",
        f"{help_}; run it again",
    ]


def test_a_server_that_never_gets_ready_is_an_error_too(
    tmp_path: Path, session: leftovers.Session
) -> None:
    """It imports from a disk that does not answer."""
    (tmp_path / "endless.py").write_text("import time\n\ntime.sleep(600)\n")
    body = """
rank_processes._PRELOAD[:] = ["endless"]
bounds.JOIN = 2.0
try:
    start(0)
except WorkerLostError as error:
    print(error)
"""
    said = _run(body, tmp_path, session).splitlines()
    assert said[0] == (
        "BR501 the process that ranks are forked from has given no sign of life for 2 s: its state "
        "is sleeping"
    )
    assert said[2].startswith("help: the machine, its memory or its disk may be overloaded")


def test_what_multiprocessing_has_started_ends_with_the_run_though_it_is_stopped(
    tmp_path: Path, session: leftovers.Session
) -> None:
    """The fork server and the resource tracker, after the last rank."""
    body = """
kill(start(0))
stop("forkserver")
stop("resource_tracker")
print("verdict")
"""
    assert _run(body, tmp_path, session) == "verdict\n"


def test_a_server_that_is_killed_while_a_rank_starts_is_an_error_that_says_so(
    tmp_path: Path, session: leftovers.Session
) -> None:
    """Not an EOFError of multiprocessing's."""
    body = """
import threading

LocalRanks().warm_up()
stop("forkserver")
threading.Timer(1.5, attendant("forkserver").kill).start()
try:
    start(0)
except WorkerLostError as error:
    print(error)
"""
    assert _run(body, tmp_path, session) == (
        "BR501 the process that ranks are forked from has ended\n"
        "help: somebody killed it, or memory ran out; run it again\n"
    )
