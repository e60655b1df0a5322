"""A rank that ends another has said why: torchrun ends it as well, as soon as it sees that."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from bridge.crew import bounds, lookout
from bridge.crew.board import Board
from bridge.crew.protocol import Brake
from bridge.crew.torchrun import TorchrunCrew
from bridge.errors import WorkerLostError
from harness import cli
from tests import leftovers

SILENT = 0.5
"""Seconds without a sign of life after which a rank is given up."""


@pytest.fixture
def stopped() -> Iterator[int]:
    """The id of a process that is stopped, and ended after the test."""
    code = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
    with subprocess.Popen([sys.executable, "-c", code]) as process:  # noqa: S603 - our own
        watched = psutil.Process(process.pid)
        assert leftovers.until(lambda: watched.status() == psutil.STATUS_STOPPED)
        yield process.pid
        process.kill()


class Store:
    """A board on which rank 0 gives always the same sign, or that answers to nobody."""

    rank = 1
    size = 2

    def __init__(self, stopped: int, *, answers: bool) -> None:
        self._stopped = psutil.Process(stopped)
        self._answers = answers

    def beat(self, _sign: bytes) -> None:
        """Wait for the one who serves the store, where it is rank 0."""
        if not self._answers:
            leftovers.until(lambda: not leftovers.is_running(self._stopped))

    def has(self, *_names: str) -> bool:
        """Nobody has said anything."""
        return False

    def beats(self, _ranks: Sequence[int]) -> list[bytes]:
        """The same as before."""
        return [b"0"]

    def stop(self, _error: Exception | None) -> None:
        """Heard."""


@pytest.mark.parametrize("answers", [True, False], ids=["store elsewhere", "store of rank 0"])
def test_a_rank_that_ends_rank_0_has_said_so_before(
    *,
    answers: bool,
    stopped: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Once, though its main thread raises the same error afterwards."""
    said: list[str] = []

    def kill(pid: int, number: int) -> None:
        assert (pid, number) == (stopped, signal.SIGKILL)
        said.append(capsys.readouterr().err)
        os.kill(pid, number)

    monkeypatch.setattr(lookout, "os", SimpleNamespace(kill=kill))
    monkeypatch.setattr(bounds, "BEAT", 0.2)
    watching = lookout.Lookout(
        cast("Board", Store(stopped, answers=answers)),
        [(socket.gethostname(), one) for one in (stopped, os.getpid())],
        Brake(), SILENT, "; the target was not created", lambda: None,
    )  # fmt: skip
    watching.start()
    leftovers.until(lambda: said, seconds=20)
    watching.close()
    assert len(said) == 1
    assert said[0] == (
        "BR501 rank 0 of 2 has given no sign of life for 0.5 s: it is stopped; the target was not "
        f"created\n  --> process {stopped} on {socket.gethostname()}\n"
        "help: somebody has stopped it (SIGSTOP); run it again\n"
    )
    failure = watching.failure
    assert failure is not None
    monkeypatch.setattr(cli, "_run", _raising(failure))
    with pytest.raises(SystemExit, match="3"):
        cli.main()
    assert capsys.readouterr().err == ""


def test_of_two_ranks_that_give_up_rank_0_the_second_says_what_the_first_has_seen(
    stopped: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By then it is no longer stopped: the first has ended it."""
    known = WorkerLostError("rank 0 of 2 has given no sign of life for 6 s: it is stopped")
    monkeypatch.setattr(lookout, "os", SimpleNamespace(kill=lambda *_: None))
    watching = lookout.Lookout(
        cast("Board", Store(stopped, answers=True)),
        [(socket.gethostname(), one) for one in (stopped, os.getpid())],
        Brake(), SILENT, "; the target was not created", lambda: None,
    )  # fmt: skip
    watching.lose(known)
    watching.start()
    leftovers.until(lambda: known.is_said, seconds=5)
    watching.close()
    assert capsys.readouterr().err == f"{known}\n"


def test_rank_0_that_torchrun_ends_names_the_rank_that_it_has_ended_itself() -> None:
    """As it was lost, not as one that has died: rank 0 has killed it."""
    known = WorkerLostError("rank 1 of 2 has given no sign of life for 120 s: it is stopped")
    crew = TorchrunCrew.__new__(TorchrunCrew)
    crew.brake, crew._settled = Brake(), False
    crew._lookout = cast(
        "lookout.Lookout",
        SimpleNamespace(failure=known, loss=WorkerLostError, gone=lambda: [1]),
    )
    with pytest.raises(WorkerLostError) as caught:
        crew.terminated(None)(signal.SIGTERM, None)
    assert caught.value is known


def _raising(error: WorkerLostError) -> Any:  # noqa: ANN401 - a function of no arguments
    def run() -> None:
        raise error

    return run
