"""How far a walk is, on stderr: parameters done, at which rate, and what that leaves."""

from __future__ import annotations

import time
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from harness.streaming.segments import Segment

_EVERY: Final = 30.0
"""Seconds between lines where stderr is no terminal."""


class WalkProgress:
    """A bar where stderr is a terminal, a line every half minute where it is not.

    The estimate is what is left to do at the rate of this run so far; what an earlier run has done
    counts as done, not as fast.

    Args:
        total: Parameters of the whole walk.
        done: Of an earlier run.
    """

    def __init__(self, total: int, done: int = 0) -> None:
        console = Console(stderr=True)
        self._total, self._before, self._done = total, done, done
        self._began = self._said = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("", total=total, completed=done)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, segment: Segment, count: int) -> None:
        """Count the parameters of a segment."""
        self._done += count
        now = time.monotonic()
        text = self.describe(segment, now - self._began)
        self._progress.update(self._task, completed=self._done, description=text)
        if self._progress.disable and now - self._said >= _EVERY:
            self._said = now
            self._progress.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def describe(self, segment: Segment, seconds: float) -> str:
        """`block 12: 7.40 of 49.87 billion parameters, 81 million/s, about 9 min left`."""
        rate = (self._done - self._before) / max(seconds, 1e-9)
        left = (self._total - self._done) / rate if rate else 0.0
        where = str(segment) if segment.layer_idx is None else f"block {segment.layer_idx}"
        return (
            f"{where}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} billion parameters, "
            f"{rate / 1e6:.0f} million/s, about {duration(left)} left"
        )


def duration(seconds: float) -> str:
    """For people: `40 s`, `9 min`, `2 h 5 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
