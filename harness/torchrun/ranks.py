"""The rank processes of all processes of torchrun, as a pool has them."""

from __future__ import annotations

import contextlib
import itertools
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from bridge.errors import UsageError
from harness.errors import WorkerFailedError
from harness.rank_processes import LocalRanks, LocalWorker, Worker, kill
from harness.ranks import Place, RankSettings
from harness.torchrun.meeting import Link, Member, store_address

_VISIBLE: Final = 20.0
"""Seconds in which a file written on one host is seen on another."""


class RemoteWorker:
    """A `Worker` of a keeper, about to be started."""

    is_here: Final = False

    def __init__(self, link: Link, settings: RankSettings) -> None:
        self.rank = settings.rank
        self.pid = 0
        self._link = link
        self._ended: str | None = None
        self.joined = False
        link.tell("start", settings)

    def wait_until_started(self) -> None:
        """Learn its process id.

        Raises:
            WorkerFailedError: HN202, its keeper is gone, or does not answer.
        """
        self.pid = self._link.wait_for("start")

    @property
    def handles(self) -> Sequence[Connection]:
        """See `Worker`."""
        return (self._link.connection,)

    def is_alive(self) -> bool:
        """See `Worker`; an answer that nobody has fetched is dropped."""
        while self._ended is None and self._link.connection.poll(0):
            self.receive()
        return self._ended is None

    def is_idle(self) -> bool:
        """See `Worker`."""
        return self._ended is None and not self._link.connection.poll(0)

    def is_stopped(self) -> bool:
        """See `Worker`: only its own host could tell."""
        return False

    def send(self, message: bytes) -> None:
        """See `Worker`."""
        self._link.tell("task", message)

    def receive(self) -> bytes | None:
        """See `Worker`."""
        try:
            kind, payload = self._link.connection.recv()
        except (EOFError, OSError):
            kind, payload = "ended", f"is gone with its process of torchrun on {self._host}"
        if kind == "answer":
            answer: bytes = payload
            return answer
        self._ended = payload
        return None

    def death(self) -> str:
        """See `Worker`."""
        return self._ended or "is alive"

    def dump_stacks(self) -> None:
        """See `Worker`."""
        self._link.tell("dump")

    def log_tail(self) -> str:
        """See `Worker`."""
        self._link.tell("tail")
        try:
            return f"{self._link.wait_for('tail')}"
        except WorkerFailedError as error:
            return error.message

    def kill(self) -> None:
        """See `Worker`."""
        self._link.tell("kill")

    def join(self) -> None:
        """See `Worker`; one whose keeper is gone has ended with it."""
        with contextlib.suppress(WorkerFailedError):
            self._link.wait_for("kill")
        self.joined = True

    @property
    def _host(self) -> str:
        return self._link.member.host


class TorchrunRanks:
    """A `WorkerSource`: the lead's own rank process and those of the keepers."""

    def __init__(self, lead: Member, links: Mapping[int, Link]) -> None:
        self._links = dict(links)
        self._members = {lead.rank: lead} | {rank: one.member for rank, one in links.items()}
        self._remote: dict[int, RemoteWorker] = {}
        self._names = itertools.count()
        self._unique = secrets.token_hex(8)  # a store outlives the processes that torchrun restarts
        self._check_alike()

    @property
    def capacity(self) -> int:
        """See `WorkerSource`."""
        return len(self._members)

    @property
    def per_host(self) -> list[int]:
        """How many ranks each host has, first host first."""
        hosts = [self._members[rank].host for rank in sorted(self._members)]
        return [hosts.count(host) for host in dict.fromkeys(hosts)]

    def start(self, settings: Sequence[RankSettings]) -> list[Worker]:
        """See `WorkerSource`."""
        placed = [
            replace(one, place=self._place(one.rank), log=one.log.absolute()) for one in settings
        ]
        remote = [one for one in placed if one.rank in self._links]
        if not all(self._remote[one.rank].joined for one in remote if one.rank in self._remote):
            raise RuntimeError("a process of torchrun keeps one rank; close the other pool first")
        fresh = [RemoteWorker(self._links[one.rank], one) for one in remote]
        self._remote |= {worker.rank: worker for worker in fresh}
        started: list[Worker] = [*fresh]
        try:
            started[:0] = [LocalWorker(one) for one in placed if one.rank not in self._links]
            for worker in fresh:
                worker.wait_until_started()
        except BaseException:
            kill(started)
            raise
        return started

    def rendezvous(self, private: Path, generation: int) -> str:
        """See `WorkerSource`."""
        del private, generation  # of one pool, and several share the store
        return f"nemotron_bridge/{self._unique}/{next(self._names)}"

    def warm_up(self) -> None:
        """See `WorkerSource`."""
        for link in self._links.values():
            link.tell("warm up")
        LocalRanks().warm_up()

    def check_shared(self, written: Sequence[Path], read: Sequence[Path]) -> None:
        """See that all hosts look at the same files.

        Args:
            written: Directories that the lead or ranks write into.
            read: What ranks read.

        Raises:
            UsageError: BR001, a rank does not see one of them.
        """
        with contextlib.ExitStack() as stack:
            tokens = {
                stack.enter_context(
                    tempfile.NamedTemporaryFile(dir=directory.absolute(), prefix=".seen-by-all-")
                ).name: directory
                for directory in written
            }
            wanted = tokens | {str(path): path for path in read}
            for link in self._links.values():
                link.tell("sees", (list(wanted), _VISIBLE))
            unseen = [
                f"rank {rank} on {link.member.host}: {wanted[name]}"
                for rank, link in sorted(self._links.items())
                for name in link.wait_for("sees")
            ]
        if unseen:
            raise UsageError(
                "ranks do not see the files that rank 0 does",
                where=unseen,
                hint="let checkpoints, --workdir and --report lie on a file system that all "
                "machines share",
            )

    def _place(self, rank: int) -> Place:
        sizes = [one.local_world_size for one in self._members.values()]
        return Place(
            store=store_address(),
            local_rank=self._members[rank].local_rank,
            local_world_size=max(sizes),
            one_host=max(sizes) == self.capacity,
        )

    def _check_alike(self) -> None:
        lead = self._members[0].software
        odd = [
            f"rank {rank} on {one.host}: {name} {found}, not {lead.get(name)}"
            for rank, one in sorted(self._members.items())
            for name, found in one.software.items()
            if found != lead.get(name)
        ]
        if odd:
            raise UsageError(
                "ranks run other software than rank 0: what one proves says nothing of the other",
                where=odd,
                hint="install the same on all machines",
            )
