"""Seconds of work, as the device that does it counts them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """Run something once.

    Args:
        work: What.
        device: On a GPU its own events are taken, from an idle GPU on: the time to ask for the
            work counts only where the GPU has to wait for it.
    """
    if device == "cpu":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    import torch

    first, last = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for _ in range(2)
    )
    torch.cuda.synchronize()
    first.record()
    work()
    last.record()
    torch.cuda.synchronize()
    milliseconds: float = first.elapsed_time(last)
    return milliseconds / 1e3


def in_turns(
    works: Mapping[str, Callable[[], object]], *, repeats: int, warm_up: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Samples of several kinds of work by name, each run once, then each again.

    Args:
        works: What, in order.
        repeats: Samples of each.
        warm_up: Runs of each before the first that counts.
        device: See `seconds`.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(warm_up + repeats):
        for name, work in works.items():
            sample = seconds(work, device)
            if number >= warm_up:
                found[name].append(sample)
    return found
