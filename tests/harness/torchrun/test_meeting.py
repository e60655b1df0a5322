"""How torchrun's processes find each other, whom they let in, and what they refuse."""

from __future__ import annotations

import contextlib
import json
import pickle
import socket
import struct
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import pytest

from bridge.errors import UsageError
from harness.errors import BackendUnavailableError
from harness.ranks import Place
from harness.torchrun import lead, meeting
from harness.torchrun.ranks import TorchrunRanks
from harness.workbench import Workbench


class Store:
    """What the meeting needs of torchrun's store."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._written = threading.Event()

    def set(self, key: str, value: str) -> None:
        """Write a value, once."""
        self._values[key] = value.encode()
        self._written.set()

    def get(self, key: str) -> bytes:
        """Wait for it."""
        assert self._written.wait(10)
        return self._values[key]


def member(rank: int) -> meeting.Member:
    """A process of torchrun, the first on host a and all others on b."""
    return meeting.Member(
        rank=rank,
        host="ab"[min(rank, 1)],
        local_rank=0,
        local_world_size=1,
        software={"torch": "2.9"},
    )


def test_a_stranger_at_the_door_is_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port of a cluster is found by all sorts of programs; who has read the store knows more."""
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(meeting, "_INTRODUCE", 0.5)
    store = Store()
    found: list[dict[int, meeting.Link]] = []
    thread = threading.Thread(
        target=lambda: found.append(meeting.gather(store, member(0)))  # type: ignore[arg-type]  # two methods suffice
    )
    thread.start()
    address, port, _ = json.loads(store.get("nemotron_bridge/harness"))
    with socket.create_connection((address, port), timeout=30) as stammerer:
        stammerer.sendall(b"\0")  # the first byte of a length, and then not a word
        assert stammerer.recv(1) == b""
    hello = pickle.dumps(member(1))
    guess = struct.pack("!i", 32) + bytes(32) + struct.pack("!i", len(hello)) + hello
    for said in (b"", guess, struct.pack("!i", 1 << 20)):
        with socket.create_connection((address, port), timeout=5) as stranger:
            stranger.sendall(said)
            with contextlib.suppress(OSError):  # it may have been shown the door by now
                stranger.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):  # closed with words left unread
                assert stranger.recv(1) == b""
    friend = meeting.join(store, member(1))  # type: ignore[arg-type]  # as above
    thread.join(10)
    assert [link.member for link in found[0].values()] == [member(1)]
    threading.Timer(1.0, friend.send, ["at leisure"]).start()  # the limit was for strangers
    assert found[0][1].connection.recv() == "at leisure"
    friend.close()
    found[0][1].connection.close()


def test_processes_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A WORLD_SIZE left over in the environment is no reason to hang."""
    for name, value in {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(meeting, "_JOIN", 0.2)
    with pytest.raises(BackendUnavailableError) as caught:
        meeting.gather(Store(), member(0))  # type: ignore[arg-type]  # as above
    assert caught.value.where == ("ranks [1, 2] have not come to 127.0.0.1",)


def test_other_software_on_another_machine_is_refused() -> None:
    """What one version proves says nothing of another."""
    other = replace(member(1), software={"torch": "2.8"})
    ours, theirs = Pipe()
    with ours, theirs:
        with pytest.raises(UsageError, match="other software") as caught:
            TorchrunRanks(member(0), {1: meeting.Link(ours, other)})
        TorchrunRanks(member(0), {1: meeting.Link(ours, member(1))})
    assert caught.value.where == ("rank 1 on b: torch 2.8, not 2.9",)


def test_ranks_know_their_place_on_their_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight and four on two hosts: the fullest decides whether each has a GPU of its own."""
    monkeypatch.setenv("MASTER_ADDR", "head")
    monkeypatch.setenv("MASTER_PORT", "29500")
    members = [
        replace(
            member(rank), host="a" if rank < 8 else "b", local_rank=rank % 8,
            local_world_size=8 if rank < 8 else 4,
        )
        for rank in range(12)
    ]  # fmt: skip
    ours, theirs = Pipe()
    with ours, theirs:
        found = TorchrunRanks(
            members[0], {one.rank: meeting.Link(ours, one) for one in members[1:]}
        )
    assert found._place(9) == Place(
        store=("head", 29500), local_rank=1, local_world_size=8, one_host=False
    )
    assert found.per_host == [8, 4]
    assert found.capacity == 12


def test_a_process_that_torchrun_has_not_started_is_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """RANK and WORLD_SIZE alone come from other launchers, which leave out what is needed."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(BackendUnavailableError, match="do not come together") as caught:
        meeting.Member.here()
    assert caught.value.where == ("not as torchrun sets it: 'LOCAL_RANK'",)


@pytest.mark.parametrize("led", [True, False])
def test_a_bench_keeps_one_pool_where_processes_keep_one_rank(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, led: bool
) -> None:
    """On this host alone the ranks of the CPU stay while a GPU's work."""
    if led:
        monkeypatch.setattr(lead, "_led", TorchrunRanks(member(0), {}))
    with Workbench(tmp_path) as bench:
        first = bench.pool("cpu")
        second = bench.pool("cuda")
        assert bench.pool("cuda") is second
        assert (bench.pool("cpu") is first) is not led


def test_the_word_to_end_is_repeated_until_it_is_heard_and_not_after() -> None:
    """Lost once, as in a weakref's callback; then clearing up takes longer than a repetition."""
    code = textwrap.dedent("""
        import contextlib, os, signal, time
        from bridge.crew import interrupts
        from harness.torchrun import lead

        interrupts._AGAIN = 0.2
        with lead.ending():
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), signal.SIGTERM)
            try:
                time.sleep(30)
            finally:
                time.sleep(1)
                print("cleared up")
    """)
    done = subprocess.run(  # noqa: S603 - our own
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "cleared up\n"), done.stderr
    assert done.stderr.startswith("HN202 torchrun ends this run")
