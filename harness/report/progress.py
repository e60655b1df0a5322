"""What the terminal sees while cases run: on stderr, results having stdout to themselves."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from harness.report.text import progress_line
from harness.runner import Result


class CaseProgress:
    """A bar on stderr where that is a terminal, one line per failure where it is not."""

    def __init__(self, total: int) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),  # a name is no markup
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("cases", total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, result: Result) -> None:
        """Count one case."""
        self._progress.update(self._task, advance=1, description=result.case.id)
        if result.status != "passed":
            self._progress.console.print(Text(progress_line(result)), soft_wrap=True)


class CountProgress:
    """A bar of things of one kind on stderr; where that is no terminal, a line for every tenth.

    How many there are may be known only once the first has ended.
    """

    def __init__(self, what: str) -> None:
        console = Console(stderr=True)
        self._what, self._done = what, 0
        self._started = time.monotonic()
        self._progress = Progress(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, total: int, description: str, news: str = "", *, count: int = 1) -> None:
        """Count one, or several; `news` is a line that stays."""
        before, self._done = self._done, self._done + count
        self._progress.update(self._task, advance=count, total=total, description=description)
        lines = [news] if news else []
        if self._progress.disable and self._done * 10 // total > before * 10 // total:
            seconds = time.monotonic() - self._started
            lines.append(f"{self._done} of {total} {self._what} in {seconds:.0f} s")
        for line in lines:
            self._progress.console.print(Text(line), soft_wrap=True)
