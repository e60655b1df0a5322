"""The inside of a rank process: a loop that joins layouts and runs functions.

`harness.rank_processes` starts these processes, `harness.launcher` gives them tasks. Rank functions
need only the type of their first argument, `RankContext`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from bridge.crew.interrupts import signal_at_parents_death
from bridge.errors import BridgeError
from bridge.spec import ParallelLayout

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store

_Value = TypeVar("_Value")
_KEPT: Final = 2
"""Values `RankContext.cached` keeps: a model, and the one it is compared with."""

Hook = Callable[["RankContext"], contextlib.AbstractContextManager[None]]
"""Wrapped around a rank function: how a deliberate fault gets into a rank process. Picklable."""


@dataclass(slots=True, kw_only=True)
class RankContext:
    """Where a rank function finds itself.

    Args:
        rank: Of this process, from 0.
        layout: The layout whose groups are formed.
        device: Where tensors go.
    """

    rank: int
    layout: ParallelLayout
    device: torch.device
    _cache: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict)

    def cached(self, key: Hashable, build: Callable[[], _Value]) -> _Value:
        """What `build` gave for this key last time, or gives now; forgotten with the groups.

        A key must name everything the value depends on, the layout's stages included.
        """
        if key not in self._cache:
            while len(self._cache) >= _KEPT:
                self._cache.popitem(last=False)
            self._cache[key] = build()
        self._cache.move_to_end(key)
        found: _Value = self._cache[key]
        return found


RankFunction = Callable[..., Any]
"""`function(context, *args)`, importable by name, with picklable arguments and result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One call of a rank function on every rank of a layout."""

    rendezvous: str
    """Names the groups: the file that ranks meet at, or a prefix in torchrun's store."""
    world_size: int
    layout: ParallelLayout
    function: RankFunction
    args: tuple[Any, ...]
    hook: Hook | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a task on one rank; `at` is CLOCK_MONOTONIC, common to a host's processes."""

    value: Any = None
    traceback: str | None = None
    error: BridgeError | None = None
    """The exception itself when it is one a user can act on."""
    what: str = ""
    """The exception in one line."""
    at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank is among those of torchrun, on one host or several.

    Args:
        store: Host and port of torchrun's store, at which ranks meet.
        local_rank: Of this rank on its host: which GPU it uses.
        local_world_size: Ranks on a host; where hosts differ, on the fullest.
        one_host: Whether there is no other.
    """

    store: tuple[str, int]
    local_rank: int
    local_world_size: int
    one_host: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSettings:
    """What a rank process is started with."""

    rank: int
    device: Literal["cpu", "cuda"]
    log: Path
    start_timeout: float
    """Seconds in which it must have been started."""
    collective_timeout: float
    private: Path
    """The pool's own directory, which is to go if the pool cannot see to it any more."""
    place: Place | None = None
    """None on a host that starts its own ranks: they meet in a file."""


def serve(connection: Connection, settings: RankSettings) -> None:
    """Run tasks until the pool hangs up. The target of a rank process."""
    _settle(settings)
    group: str | None = None
    context: RankContext | None = None
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):  # the pool is gone: take along whatever was started here
            shutil.rmtree(settings.private, ignore_errors=True)
            os.killpg(0, signal.SIGKILL)
        try:
            task: Task | None = pickle.loads(message)  # noqa: S301 - from our own parent process
            if task is None or task.rendezvous != group:
                context = None
                if group is not None:
                    _leave()
                group = None
            if task is None:
                continue
            if context is None:
                context = _join(task, settings)
                group = task.rendezvous
            context.layout = task.layout  # same groups, perhaps other stages
            outcome = Outcome(value=_call(task, context), at=time.monotonic())
            answer = pickle.dumps(outcome, protocol=pickle.HIGHEST_PROTOCOL)
        except BaseException as error:  # noqa: BLE001 - reported to the parent, whatever it is
            answer = pickle.dumps(_failure(error), protocol=pickle.HIGHEST_PROTOCOL)
        with contextlib.suppress(OSError):
            connection.send_bytes(answer)


def _call(task: Task, context: RankContext) -> Any:  # noqa: ANN401 - the function's own
    try:
        with contextlib.nullcontext() if task.hook is None else task.hook(context):
            return task.function(context, *task.args)
    finally:
        if context.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()  # other ranks, and the reference, are other processes


def _failure(error: BaseException) -> Outcome:
    text = "".join(traceback.format_exception(error))
    sys.stderr.write(text)
    sys.stderr.flush()
    return Outcome(
        traceback=text,
        error=error if isinstance(error, BridgeError) else None,
        what=traceback.format_exception_only(error)[-1].strip().splitlines()[0],
        at=time.monotonic(),
    )


def _join(task: Task, settings: RankSettings) -> RankContext:
    from bridge import platform

    place, timeout = settings.place, timedelta(seconds=settings.collective_timeout)
    device = platform.initialize(
        settings.rank,
        task.world_size,
        task.layout,
        init_method=f"file://{task.rendezvous}" if place is None else None,
        store=None if place is None else _store(place, task.rendezvous, timeout),
        device=settings.device,
        timeout=timeout,
        local_rank=None if place is None else place.local_rank,
        local_world_size=None if place is None else place.local_world_size,
    )
    return RankContext(rank=settings.rank, layout=task.layout, device=device)


def _store(place: Place, prefix: str, timeout: timedelta) -> Store:
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # at run time

    host, port = place.store
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return PrefixStore(prefix, store)


def _leave() -> None:
    from bridge import platform

    platform.finalize()


def _settle(settings: RankSettings) -> None:
    """Own process group, output to the log, stacks on demand, and never outlive the parent."""
    os.setsid()  # one signal then ends this rank and whatever it has started
    log = os.open(settings.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - descriptor 1
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 - descriptor 2
    signal.signal(signal.SIGCONT, signal.SIG_DFL)  # the server that it is forked from handles it
    # A rank that somebody has stopped goes on then, and ends as the others do: `_die_with`.
    signal_at_parents_death(signal.SIGCONT)
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(
            target=_die_with, args=(parent.sentinel, settings.private), daemon=True
        ).start()
    # Where all ranks are processes of this host, gloo needs no route to anywhere else.
    one_host = settings.place is None or settings.place.one_host
    if one_host and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch

    if settings.device == "cpu":
        torch.set_num_threads(1)
    else:
        from bridge.platform import forbid_tf32

        forbid_tf32()


def _die_with(sentinel: int, private: Path) -> None:
    """End this rank and its children when the user's process is gone, however it went."""
    multiprocessing.connection.wait([sentinel])
    shutil.rmtree(private, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)
