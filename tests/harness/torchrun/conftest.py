"""What torchrun does for its processes, without torchrun: a store to meet at, an environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
KEEP = "from harness.torchrun.keeper import keep; keep()"


class Started:
    """Processes of one run; whoever is left is killed at the end.

    Args:
        size: How many there are.
        per_host: How many of them believe to share a host.
    """

    def __init__(self, size: int, per_host: int) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # at run time

        self.size = size
        self.per_host = per_host
        self.processes: dict[int, subprocess.Popen[str]] = {}
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def variables(self, rank: int) -> dict[str, str]:
        """The variables that torchrun sets for a process, and what finds our test functions."""
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(rank % self.per_host),
            "LOCAL_WORLD_SIZE": str(self.per_host),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parents[1])]),
        }

    def start(self, rank: int, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Start a process, by default a keeper."""
        self.processes[rank] = subprocess.Popen(  # noqa: S603 - our own
            [sys.executable, *(arguments or ("-c", KEEP))],
            env=os.environ | self.variables(rank) | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        return self.processes[rank]

    def outputs(self, timeout: float = 150) -> dict[int, tuple[int, str, str]]:
        """Exit status, stdout and stderr of each, by rank, once all have ended."""
        found = {}
        for rank, process in self.processes.items():
            out, err = process.communicate(timeout=timeout)
            found[rank] = (process.returncode, out, err)
        return found

    def kill(self) -> None:
        """End whoever is left."""
        for process in self.processes.values():
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def started() -> Iterator[Callable[[int, int], Started]]:
    """Make the processes of a run: `started(size, per_host)`.

    They are waited for when their module ends: one that nobody waits for stays a zombie, and every
    later test of this process would meet it among its children.
    """
    made: list[Started] = []

    def make(size: int, per_host: int) -> Started:
        made.append(Started(size, per_host))
        return made[-1]

    yield make
    for one in made:
        one.kill()
