"""Several benches side by side: processes that each keep a healthy bench and its ranks."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Final

import psutil

from bridge.crew import bounds, fates
from bridge.crew.interrupts import signal_at_parents_death
from bridge.scratch import held_directory
from harness.bench import Bench, Subject
from harness.errors import WorkerFailedError

_MOST: Final = 8
_ALIVE: Final = "alive-"

_bench: Bench | None = None


def over_benches(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    *,
    workers: int | None = None,
    timeout: float,
    subjects: Mapping[str, Subject] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Call `function(bench, *arguments[i])` for every i, several at a time.

    Args:
        function: Importable by name, like its arguments and results picklable.
        arguments: One tuple per call.
        workers: Processes; None for one per core, at most eight.
        timeout: Seconds that one case may keep ranks busy.
        subjects: Models under test besides the toys, by name.

    Yields:
        (i, result), in the order in which calls end.

    Raises:
        WorkerFailedError: HN202, a process was killed, or gave no sign of life for
            `bounds.FROZEN`.
    """
    count = workers or min(_MOST, os.cpu_count() or 1)
    with (
        held_directory() as root,
        ProcessPoolExecutor(
            max(1, min(count, len(arguments))),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_enter,
            initargs=(str(root), timeout, dict(subjects or {})),
        ) as pool,
    ):
        futures: dict[Future[Any], int] = {
            pool.submit(_call, function, one): number for number, one in enumerate(arguments)
        }
        signs = _Signs(root)
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, timeout=bounds.BEAT, return_when=FIRST_COMPLETED)
                for future in done:
                    yield futures[future], future.result()
                signs.end_the_silent()
        except BrokenProcessPool as error:
            raise signs.silence or WorkerFailedError(
                "a process that ran cases was ended: somebody killed it, or memory ran out",
                hint="use fewer --workers",
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Signs:
    """Signs of life of the processes of a pool: the time of a file that each touches."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: dict[Path, tuple[int, bounds.Patience]] = {}
        self.silence: WorkerFailedError | None = None

    def end_the_silent(self) -> None:
        """Kill a process that gives none; its pool then fails."""
        for path in self._root.glob(f"{_ALIVE}*"):
            at = path.stat().st_mtime_ns
            before, patience = self._seen.get(path, (0, bounds.Patience(bounds.FROZEN)))
            self._seen[path] = at, patience
            if at != before:
                patience.renew()
            elif patience.is_over():
                pid = int(path.name.removeprefix(_ALIVE))
                how, hint = fates.silence(pid, patience.limit)
                self.silence = WorkerFailedError(
                    f"a process that ran cases {how}", where=f"process {pid}", hint=hint
                )
                with contextlib.suppress(psutil.Error):
                    psutil.Process(pid).kill()


def _enter(root: str, timeout: float, subjects: Mapping[str, Subject]) -> None:
    global _bench  # noqa: PLW0603 - a process of a pool has nowhere else to keep things
    import torch

    # A process that somebody has stopped goes on then, and ends with the one that started it.
    signal_at_parents_death(signal.SIGCONT)
    threading.Thread(target=_live, args=(Path(root),), daemon=True).start()
    torch.set_num_threads(1)
    workdir = Path(tempfile.mkdtemp(prefix="worker-", dir=root))
    _bench = Bench(workdir, subjects=subjects, timeout=timeout)
    # A process of a pool runs no atexit handlers, and joins its children: end the ranks before.
    multiprocessing.util.Finalize(None, _bench.close, exitpriority=100)


def _live(root: Path) -> None:
    """Give signs of life; end, and take the scratch along, when nobody is there to see them."""
    parent = multiprocessing.parent_process()
    sign = root / f"{_ALIVE}{os.getpid()}"
    while parent is not None and not multiprocessing.connection.wait(
        [parent.sentinel], timeout=bounds.BEAT
    ):
        with contextlib.suppress(OSError):
            sign.touch()
    shutil.rmtree(root, ignore_errors=True)
    os._exit(1)  # the ranks of this process see that, and end


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:  # noqa: ANN401 - the function's own
    if _bench is None:
        raise RuntimeError("not a process of `over_benches`")
    return function(_bench, *arguments)
