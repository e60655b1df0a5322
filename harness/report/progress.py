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
