"""`bench`: what conversion and proof cost on this machine, beside what `cp` costs."""

from __future__ import annotations

import datetime as dt
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bridge.cli import app
from bridge.cli_options import DeviceName, Json
from bridge.errors import UsageError

if TYPE_CHECKING:
    from harness.benchmarks.results import Measurement
    from harness.benchmarks.workspace import Workspace


@app.command()
def bench(
    quick: Annotated[
        bool, typer.Option("--quick/--full", help="Up to 2 GB, minutes; or up to 8 GB, an hour.")
    ] = True,
    only: Annotated[
        str | None,
        typer.Option("--only", help="Comma-separated, such as startup,import; all by default."),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option("--repeats", min=1, help="Runs of each conversion; 3 by default.")
    ] = None,
    workdir: Annotated[
        Path | None,
        typer.Option(
            "--workdir",
            help="Where checkpoints are made and removed again; its file system is what is "
            "measured. By default ./out.",
        ),
    ] = None,
    device: DeviceName = "cpu",
    peer_python: Annotated[
        str | None,
        typer.Option(
            "--peer-python",
            help="Interpreter that Megatron-Bridge is installed in; by default this one.",
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds that one command may take.")
    ] = 900.0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 when a limit is not met.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="Directory for bench.json, bench.md and figures as SVG."),
    ] = None,
    json_: Json = False,
) -> None:
    """Measure time and memory of conversion, loading and proof; ratios are to `cp -r`.

    With --device cuda models are loaded, run and proved on a GPU, beside what the card can do.

    Every command runs in a process of its own, in turns with `cp`. A measurement that fails is
    reported, the rest runs, and the command exits with 3.
    """
    from bridge.console import print_json, stdout
    from harness.benchmarks.groups import measure
    from harness.benchmarks.profile import FULL, QUICK
    from harness.benchmarks.tables import print_results
    from harness.benchmarks.workspace import Workspace, check_space
    from harness.report.files import report_directory

    names = _groups(only)
    profile = replace(QUICK if quick else FULL, device=device, timeout=timeout)
    if repeats is not None:
        profile = replace(profile, repeats=repeats)
    if report is not None:
        report_directory(report)
    parent = _writable(workdir or Path("out"))
    if set(names) - _WITHOUT_CHECKPOINTS:
        check_space(parent, profile.disk_bytes)
    started, clock = dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), time.monotonic()
    with _ending_tidily(), tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as directory:
        work = Workspace(
            directory=Path(directory).resolve(), profile=profile,
            say=lambda line: typer.echo(f"{time.monotonic() - clock:7.1f} s  {line}", err=True),
            peer_python=peer_python or sys.executable,
        )  # fmt: skip
        found = measure(work, names)
        data = _results(found, work, started=started, seconds=time.monotonic() - clock)
    if report is not None:
        _write(report, data)
    if json_:
        print_json(data)
    else:
        print_results(data, stdout())
    if data["counts"]["failed"]:
        raise typer.Exit(3)
    if strict and data["counts"]["limits_not_met"]:
        raise typer.Exit(1)


_WITHOUT_CHECKPOINTS = frozenset({"startup", "parity", "oracle", "stream"})


def _groups(only: str | None) -> list[str]:
    from harness.benchmarks.groups import GROUPS

    if only is None:
        return list(GROUPS)
    asked = [part.strip() for part in only.split(",") if part.strip()]
    unknown = [name for name in asked if name not in GROUPS]
    if unknown or not asked:
        raise UsageError(
            f"nothing to measure is called {', '.join(unknown) or 'nothing'}",
            where="--only",
            hint=f"known: {', '.join(GROUPS)}",
        )
    return [name for name in GROUPS if name in asked]


def _writable(parent: Path) -> Path:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent):
            return parent
    except OSError as error:
        raise UsageError(
            f"cannot work there: {error.strerror}",
            where=str(parent),
            hint="give --workdir a directory that can be written to",
        ) from None


@contextmanager
def _ending_tidily() -> Iterator[None]:
    """Ended by a time limit, leave no gigabytes and no running command behind."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _results(
    found: Sequence[Measurement], work: Workspace, *, started: str, seconds: float
) -> dict[str, Any]:
    from harness.benchmarks.machine import describe
    from harness.benchmarks.results import results
    from harness.report.digests import code_sha256
    from harness.report.evidence import versions

    return results(
        found,
        started=started,
        seconds=seconds,
        command=["nemotron-bridge", *sys.argv[1:]],
        profile=asdict(work.profile),
        machine=describe(work.directory),
        environment=versions(),
        code_sha256=code_sha256(),
    )


def _write(report: Path, data: Mapping[str, Any]) -> None:
    from bridge.outputs import write_atomically
    from harness.benchmarks.plots import plots
    from harness.benchmarks.tables import markdown
    from harness.report.evidence import to_json
    from harness.report.files import writing_into

    figures = plots(data)
    with writing_into(report):
        write_atomically(report / "bench.json", to_json(data))
        write_atomically(
            report / "bench.md", markdown(data, [(one.title, one.file) for one in figures])
        )
        for one in figures:
            write_atomically(report / one.file, one.svg())
