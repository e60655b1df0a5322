"""Functions for rank processes to run in tests; a module, because ranks import them by name."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bridge.errors import CheckpointError
from harness.ranks import RankContext


def describe(context: RankContext) -> tuple[int, int, int, int]:
    """Global rank, and TP rank, PP rank and world size as Megatron-Core has them."""
    import torch
    from megatron.core import parallel_state

    return (
        context.rank,
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        torch.distributed.get_world_size(),
    )


def total(context: RankContext, value: float) -> float:
    """The sum of `value * (rank + 1)` over all ranks."""
    import torch

    tensor = torch.tensor([value * (context.rank + 1)])
    torch.distributed.all_reduce(tensor)
    return float(tensor)


def pid(_context: RankContext) -> int:
    """Process id."""
    return os.getpid()


def throw_on(context: RankContext, rank: int) -> None:
    """One rank throws while the others wait for it."""
    import torch

    print("about to fail", flush=True)  # noqa: T201 - what a rank prints belongs to its log
    if context.rank == rank:
        raise ValueError("thrown on purpose")
    torch.distributed.barrier()


def refuse(_context: RankContext) -> None:
    """An error that a user can act on."""
    raise CheckpointError("no such checkpoint", where="/there", hint="look elsewhere")


def die_on(context: RankContext, rank: int) -> None:
    """One rank is killed while the others wait for it."""
    import torch

    if context.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def hang_on(context: RankContext, rank: int) -> str:
    """One rank never returns."""
    if context.rank == rank:
        time.sleep(600)
    return "done"


def unpicklable(_context: RankContext) -> object:
    """A result that cannot travel."""
    return lambda: None


def spawn_child(_context: RankContext) -> int:
    """Leave a grandchild running; its process id."""
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid


def environment(_context: RankContext, name: str) -> str | None:
    """One environment variable."""
    return os.environ.get(name)


def counted(context: RankContext, key: str) -> int:
    """How often the cached value of this key has been built in this rank."""
    context.cached(key, lambda: COUNTS.append(key))
    return COUNTS.count(key)


COUNTS: list[str] = []


@contextlib.contextmanager
def lie_about_rank(context: RankContext) -> Iterator[None]:
    """A hook: rank 1 believes it is rank 7."""
    true_rank = context.rank
    if true_rank == 1:
        context.rank = 7
    yield
    context.rank = true_rank


def is_alive(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone(pids: list[int]) -> bool:
    """Whether all processes end within ten seconds."""
    for _ in range(100):
        if not any(is_alive(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def wait_for(context: RankContext, rank: int, how: str) -> None:
    """One rank is stopped, sleeps or leaves, while the others wait for it inside a collective."""
    import torch

    torch.distributed.barrier()
    if context.rank == rank and how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if context.rank == rank and how == "sleep":
        time.sleep(600)
    if context.rank == rank and how == "exit":
        sys.exit(7)
    torch.distributed.barrier()


def double(_bench: object, number: int) -> int:
    """For `over_benches`: its process is stopped at 3, and killed at 5."""
    if number in {3, 5}:
        os.kill(os.getpid(), signal.SIGSTOP if number == 3 else signal.SIGKILL)
    return 2 * number


def say_and_sleep(_bench: object, directory: str) -> None:
    """For `over_benches`: say the process id, and go on for ever."""
    (Path(directory) / f"{os.getpid()}").touch()
    time.sleep(600)
