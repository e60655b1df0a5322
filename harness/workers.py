"""Several benches side by side: processes that each keep a healthy bench and its ranks."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Final

from harness.bench import Bench, Subject
from harness.errors import WorkerFailedError

_MOST: Final = 8

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
        WorkerFailedError: HN202, a process was killed.
    """
    count = workers or min(_MOST, os.cpu_count() or 1)
    with (
        # Processes that are ended on Ctrl-C may still write there: no reason for another error.
        tempfile.TemporaryDirectory(prefix="nemotron-bridge-", ignore_cleanup_errors=True) as root,
        ProcessPoolExecutor(
            max(1, min(count, len(arguments))),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_enter,
            initargs=(root, timeout, dict(subjects or {})),
        ) as pool,
    ):
        futures: dict[Future[Any], int] = {
            pool.submit(_call, function, one): number for number, one in enumerate(arguments)
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise WorkerFailedError(
                "a process that ran cases was ended: somebody killed it, or memory ran out",
                hint="use fewer --workers",
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _enter(root: str, timeout: float, subjects: Mapping[str, Subject]) -> None:
    global _bench  # noqa: PLW0603 - a process of a pool has nowhere else to keep things
    import torch

    torch.set_num_threads(1)
    workdir = Path(tempfile.mkdtemp(prefix="worker-", dir=root))
    _bench = Bench(workdir, subjects=subjects, timeout=timeout)
    # A process of a pool runs no atexit handlers, and joins its children: end the ranks before.
    multiprocessing.util.Finalize(None, _bench.close, exitpriority=100)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:  # noqa: ANN401 - the function's own
    if _bench is None:
        raise RuntimeError("not a process of `over_benches`")
    return function(_bench, *arguments)
