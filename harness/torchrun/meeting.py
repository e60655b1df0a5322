"""How the processes of torchrun find each other, and what the lead and a keeper say."""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Final

from harness.errors import BackendUnavailableError, WorkerFailedError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_JOIN: Final = 300.0
"""Seconds in which all processes of torchrun must have come."""
_CONNECT: Final = 60.0
"""Seconds in which a keeper must reach the lead."""
_INTRODUCE: Final = 10.0
"""Seconds in which whoever has connected must say who it is."""
_ANSWER: Final = 300.0
"""Seconds in which a keeper answers: at most it imports Megatron-Core, from a slow disk."""
_NUMBERS: Final = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_KEY: Final = "nemotron_bridge/harness"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A process of torchrun, as it introduces itself."""

    rank: int
    host: str
    local_rank: int
    local_world_size: int
    software: Mapping[str, str | None]
    """Versions of packages, the sha256 of this one's code as installed there, and GPUs."""

    @classmethod
    def here(cls) -> Member:
        """This process.

        Raises:
            BackendUnavailableError: HN201, it is none of torchrun's.
        """
        import torch

        from bridge.platform import describe
        from harness.report.digests import code_sha256

        try:
            rank, local_rank, size = (int(os.environ[name]) for name in _NUMBERS)
        except (KeyError, ValueError) as error:
            raise _apart(f"not as torchrun sets it: {error}") from None
        return cls(
            rank=rank,
            host=socket.gethostname(),
            local_rank=local_rank,
            local_world_size=size,
            software={
                "nemotron-bridge": code_sha256(),
                **describe()["versions"],
                # Each rank decides by its own host's between NCCL and gloo.
                "number of GPUs": str(torch.cuda.device_count()),
            },
        )


class Link:
    """The lead's end of a connection to a keeper."""

    def __init__(self, connection: Connection, member: Member) -> None:
        self.connection = connection
        self.member = member

    def tell(self, what: str, payload: object = None) -> None:
        """Ask for something; a keeper that is gone is noticed by `wait_for`."""
        with contextlib.suppress(OSError):
            self.connection.send((what, payload))

    def wait_for(self, what: str) -> Any:  # noqa: ANN401 - as many kinds as questions
        """The answer to a question; what a rank has said before is out of date by then.

        Raises:
            WorkerFailedError: HN202, the keeper is gone, or does not answer.
        """
        deadline = time.monotonic() + _ANSWER
        with contextlib.suppress(EOFError, OSError):
            while self.connection.poll(max(0.0, deadline - time.monotonic())):
                kind, answer = self.connection.recv()
                if kind == what:
                    return answer
        self.connection.close()  # nobody is to wait for it again
        raise WorkerFailedError(
            f"rank {self.member.rank}'s process of torchrun is gone, or does not answer",
            where=f"host {self.member.host}",
            hint="torchrun's report says how it ended; start again, with --resume if there is a "
            "--report",
            rank=self.member.rank,
        )


def meet() -> Store:
    """The store that all processes of torchrun see.

    Raises:
        BackendUnavailableError: HN201, it cannot be reached.
    """
    from torch.distributed.rendezvous import rendezvous

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store: Store = next(rendezvous("env://", rank, size, timeout=timedelta(seconds=_JOIN)))[0]
    except (RuntimeError, ValueError) as error:
        raise _apart(str(error).partition("\n")[0]) from error
    return store


def join(store: Store, member: Member) -> Connection:
    """A keeper's connection to the lead.

    Raises:
        BackendUnavailableError: HN201, the lead cannot be reached.
    """
    try:
        address, port, token = json.loads(store.get(_KEY))
        connection = _connection(socket.create_connection((address, port), timeout=_CONNECT))
        connection.send_bytes(bytes.fromhex(token))
        connection.send(member)
    except (RuntimeError, OSError) as error:
        raise _apart(f"rank {member.rank} on {member.host}: {error}") from error
    return connection


def gather(store: Store, lead: Member) -> dict[int, Link]:
    """The lead's connections to all keepers, by rank.

    Raises:
        BackendUnavailableError: HN201, some have not come in time.
    """
    size, token = int(os.environ["WORLD_SIZE"]), secrets.token_bytes(32)
    family, address = _own_address()
    links: dict[int, Link] = {}
    deadline = time.monotonic() + _JOIN
    with socket.create_server(("", 0), family=family, backlog=size) as server:
        store.set(_KEY, json.dumps([address, server.getsockname()[1], token.hex()]))
        while len(links) < size - 1:
            server.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                connection = _connection(server.accept()[0])
            except TimeoutError:
                missing = set(range(size)) - {lead.rank, *links}
                raise _apart(f"ranks {sorted(missing)} have not come to {address}") from None
            member = _introduced(connection, token)
            if member is None:
                connection.close()
            else:
                links[member.rank] = Link(connection, member)
    return links


def _introduced(connection: Connection, token: bytes) -> Member | None:
    """Who has connected; None for anybody who has not read the store."""
    with contextlib.suppress(EOFError, OSError), _limited(connection, _INTRODUCE):
        if hmac.compare_digest(connection.recv_bytes(len(token)), token):
            found: Member = connection.recv()
            return found
    return None


@contextlib.contextmanager
def _limited(connection: Connection, seconds: float) -> Iterator[None]:
    """Let no read of a connection take longer: half a message is as good as none."""
    with socket.socket(fileno=os.dup(connection.fileno())) as one:  # the same socket
        _let_wait(one, seconds)
        try:
            yield
        finally:
            _let_wait(one, 0.0)


def _let_wait(one: socket.socket, seconds: float) -> None:
    """Let a read wait so long at most; 0 is for ever."""
    whole = int(seconds)
    value = struct.pack("ll", whole, int((seconds - whole) * 1e6))
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)


def _connection(one: socket.socket) -> Connection:
    one.settimeout(None)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return Connection(one.detach())


def store_address() -> tuple[str, int]:
    """Host and port of torchrun's store."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _own_address() -> tuple[socket.AddressFamily, str]:
    """Where the others reach this process: by the network on which it sees torchrun's store.

    If the store is on this very host, they know it by the store's name.
    """
    host, port = store_address()
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # of a datagram socket: nothing is sent
        found: str = probe.getsockname()[0]
    return family, host if ipaddress.ip_address(found).is_loopback else found


def _apart(where: str) -> BackendUnavailableError:
    return BackendUnavailableError(
        "the processes of torchrun do not come together",
        where=where,
        hint="start all of them with torchrun, where they reach each other over TCP; to run on "
        "this host alone, unset RANK and WORLD_SIZE",
    )
