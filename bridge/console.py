"""What the terminal sees: results on stdout, progress and diagnostics on stderr."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, Final, TextIO, cast

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment
from rich.table import Table

from bridge.errors import EnvironmentMissingError, UsageError
from bridge.visible import visible

_UNITS: Final = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip
_LARGEST: Final = 1 << 63
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)")


def parse_size(text: str) -> int:
    """Bytes of `512MiB`, `5GB`, `1.5 GiB` or a plain number.

    Raises:
        UsageError: BR001, no such size.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].lower()) if match else None
    size = float(match[1]) * unit if match and unit else math.nan
    if not 1 <= size < _LARGEST:  # which NaN is not either
        raise UsageError(f"{text[:80]!r} is not a size", hint="write 512MiB, 1GiB or 5GB")
    return int(size)


def gib(nbytes: float) -> str:
    """Bytes in GiB, or where they are very few in MiB, for people."""
    if 0 < nbytes < (1 << 30) / 200:  # 0.00 GiB says nothing
        return f"{nbytes / (1 << 20):.2f} MiB"
    return f"{nbytes / (1 << 30):.2f} GiB"


def print_json(data: object) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


class _ShowAll(RenderHook):
    """Has everything that is printed pass through `visible`, but for colours and lines of ours."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Shown(one) for one in renderables]


class _Shown:
    def __init__(self, content: ConsoleRenderable) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._content, options):
            if segment.control:
                yield segment
            else:
                yield Segment(visible(segment.text, keep="\n"), segment.style)


def stdout(*, stderr: bool = False) -> Console:
    """Where results go. Not a terminal: no colours, no wrapping at 80 columns.

    With `stderr` they go there instead, for a command whose stdout is one JSON document. Names are
    no markup, and what a terminal would obey in them is written out.
    """
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, stderr=stderr)
    console.push_render_hook(_ShowAll())
    if not console.is_terminal:
        console.width = 200
    return console


class _Stream:
    """A stream of this process whose reader may go: what it would have read is dropped then.

    The command goes on, so that what it writes elsewhere and its exit code are what they would have
    been: `| head` makes no verdict of ours.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever else a stream has
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, as any stream does."""
        with self._told():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, as any stream does."""
        with self._told():
            self._stream.flush()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        """Have the rest go nowhere, what is buffered and what libraries print, too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


class Diagnostics(_Stream):
    """Stderr while a command runs: nobody could be told that it does not take something."""

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._drop()


class Results(_Stream):
    """Stdout while a command runs: what it does not take is an error, and told as one.

    Raises:
        EnvironmentMissingError: BR500, from every method: it cannot be written, now or before.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._error: OSError | None = None

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            if self._error is not None:  # the stream is closed by now
                raise self._error
            yield
        except BrokenPipeError:
            self._drop()
        except OSError as error:
            self._error = error
            with suppress(OSError):  # else the interpreter tries again as it ends, and says so
                self._stream.close()
            raise EnvironmentMissingError(
                f"results cannot be written: {error.strerror}",
                where="stdout",
                hint="make room or let them go elsewhere, and run the command again",
            ) from None


@contextmanager
def results_taken() -> Iterator[None]:
    """Run a command, and see that its results have gone where stdout goes.

    Raises:
        EnvironmentMissingError: BR500, they have not.
    """
    if sys.stdout is None:  # then the next file to be opened would be what libraries print to
        raise EnvironmentMissingError(
            "stdout is closed, and results would be lost", hint="`>/dev/null` discards them"
        )
    results = Results(sys.stdout)
    with redirect_stdout(cast("TextIO", results)):
        try:
            yield
        except SystemExit:
            results.flush()
            raise
        results.flush()


@contextmanager
def diagnostics_taken() -> Iterator[None]:
    """Run a command whatever becomes of stderr, which may be closed."""
    with ExitStack() as stack:
        stderr = sys.stderr or stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        stack.enter_context(redirect_stderr(cast("TextIO", Diagnostics(stderr))))
        yield


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table in the house style."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        found.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return found


class RichProgress:
    """Progress bars on stderr; nothing at all where stderr is not a terminal."""

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show one phase of `total` bytes."""
        columns: tuple[Any, ...] = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task(name, total=total)
            yield lambda nbytes: progress.advance(task, nbytes)


@contextmanager
def counter(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Count what is done of `total`, on stderr, while results go into a file.

    Nothing where stderr is no terminal; nor where stdout is one, and shows results as they come.
    """
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    disable = not console.is_terminal or sys.stdout.isatty()
    # rich would take what is printed meanwhile to stderr, too.
    with Progress(*columns, console=console, disable=disable, redirect_stdout=False) as progress:
        task = progress.add_task(name, total=total)
        yield lambda count: progress.advance(task, count)
