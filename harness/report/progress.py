"""What the terminal sees while cases run: on stderr, results having stdout to themselves."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
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
    """A bar of things of one kind, whose number may be known only once the first has ended."""

    def __init__(self, what: str) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
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

    def advance(self, total: int, description: str, news: str = "") -> None:
        """Count one; `news` is a line that stays."""
        self._progress.update(self._task, advance=1, total=total, description=description)
        if news:
            self._progress.console.print(Text(news), soft_wrap=True)
