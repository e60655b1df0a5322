"""What a run leaves on the machine: processes, ports, shared memory, files.

Processes are found by a variable that only this run's have, so it does not matter whose children
they have become. One that has ended is no process left behind, whether or not its parent has
fetched its exit status yet.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

MARK: Final = "NEMOTRON_BRIDGE_TEST_RUN"
SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - looked at, never written


def is_running(process: psutil.Process) -> bool:
    """Whether it has not ended: a zombie has, and waits for nobody but its parent."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # a ZombieProcess is one, too
        return False


def words_of(process: psutil.Process) -> str:
    """Its command line, empty once it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def workers_below(parent: psutil.Process) -> set[int]:
    """Ids of the live processes that multiprocessing has spawned somewhere below this one."""
    return {
        child.pid
        for child in parent.children(recursive=True)
        if "multiprocessing.spawn" in words_of(child) and is_running(child)
    }


def until(condition: Callable[[], object], *, seconds: float = 60) -> bool:
    """Wait for it; whether it came true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class Session:
    """One run that is to leave nothing.

    Args:
        scratch: An empty directory for its temporary files.
    """

    def __init__(self, scratch: Path) -> None:
        self.name = uuid.uuid4().hex
        self.scratch = scratch
        self._shared = _shared_memory()

    def variables(self) -> dict[str, str]:
        """For the environment of its first process; whatever that starts inherits them."""
        return {MARK: self.name, "TMPDIR": str(self.scratch), "OMP_NUM_THREADS": "1"}

    def processes(self) -> list[psutil.Process]:
        """Those that have not ended."""
        return [one for one in psutil.process_iter() if self._is_ours(one) and is_running(one)]

    def kill(self) -> None:
        """End whatever is left, so that a test that fails leaves nothing either."""
        for process in self.processes():
            process.kill()

    def ports(self) -> set[int]:
        """That its processes listen on."""
        found = set()
        for process in self.processes():
            found |= {
                one.laddr.port
                for one in process.net_connections()
                if one.status == psutil.CONN_LISTEN
            }
        return found

    def leftovers(self, *, seconds: float, apart_from: Iterable[str] = ()) -> list[str]:
        """What is still there so long after the run's end, in words; nothing is as it should be.

        Args:
            seconds: In which it must have gone.
            apart_from: Beginnings of names in `scratch` that may stay.
        """
        kept = tuple(apart_from)

        def found() -> list[str]:
            return [
                *(f"process {one.pid}: {words_of(one)}" for one in self.processes()),
                *(f"shared memory {name}" for name in self._orphaned_memory()),
                *(
                    f"file {path.name}"
                    for path in self.scratch.iterdir()
                    if not path.name.startswith(kept)
                ),
            ]

        until(lambda: not found(), seconds=seconds)
        return found()

    def _orphaned_memory(self) -> list[str]:
        """New segments that no process maps: others on this machine have segments of their own."""
        new = _shared_memory() - self._shared
        return sorted(new - _mapped()) if new else []

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.pid != os.getpid() and process.environ().get(MARK) == self.name
        except psutil.Error:
            return False


def _shared_memory() -> set[str]:
    """Segments of torch, of multiprocessing, and semaphores."""
    if not SHARED_MEMORY.is_dir():
        return set()
    return {
        path.name
        for path in SHARED_MEMORY.iterdir()
        if path.name.startswith(("torch_", "psm_", "sem.", "nccl-"))
    }


def _mapped() -> set[str]:
    """Names of the segments that some process has mapped."""
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # it has just ended, or is not ours to look at
            found |= set(re.findall(rf"{SHARED_MEMORY}/(\S+)", maps.read_text(errors="replace")))
    return found
