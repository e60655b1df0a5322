"""`torture`: conversions killed and failed at chosen calls of the system, and a soak."""

from __future__ import annotations

import datetime as dt
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bridge.cli import app
from bridge.cli_options import Json
from bridge.errors import EnvironmentMissingError, UsageError

if TYPE_CHECKING:
    from harness.torture.campaign import Campaign, Order

_FILE = "torture.json"


@app.command()
def torture(
    kills: Annotated[int, typer.Option("--kills", min=0, help="Processes to kill.")] = 200,
    errors: Annotated[int, typer.Option("--errors", min=0, help="Errors to make.")] = 200,
    conversions: Annotated[
        int, typer.Option("--conversions", min=1, help="Of the soak, in one process.")
    ] = 200,
    only: Annotated[
        str | None,
        typer.Option("--only", help="Comma-separated of kills,errors,soak; all by default."),
    ] = None,
    scenarios: Annotated[
        str | None,
        typer.Option("--scenarios", help="Comma-separated, such as import,export-over."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn.")] = 0,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", min=1, show_default="a core each, up to 4", help="Trials at a time."
        ),
    ] = None,
    replay: Annotated[
        list[str] | None,
        typer.Option("--replay", help="Only this trial, by its id. Repeatable."),
    ] = None,
    workdir: Annotated[
        Path | None,
        typer.Option(
            "--workdir",
            help="An empty directory to work in, which keeps what is found wrong; by default a "
            "temporary one that is removed.",
        ),
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", help=f"Directory for {_FILE}.")] = None,
    json_: Json = False,
) -> None:
    """Kill conversions at chosen calls of the system, make calls fail, and hold them to promises.

    After each kill or error the target is absent, the old one, or complete; nothing beside it looks
    like a checkpoint; an error is told once, with a code; and --resume gives the same bytes.
    """
    from bridge.console import print_json, stdout
    from harness.report.files import report_directory
    from harness.torture.campaign import Order, parts_named, scenarios_named
    from harness.torture.results import document, render
    from harness.torture.trials import parse_trial

    if sys.platform != "linux":
        raise EnvironmentMissingError(
            "torture needs Linux: it looks at a process's files in /proc",
            hint="run it in a container",
        )
    order = Order(
        parts=parts_named(only), kills=kills, errors=errors, conversions=conversions, seed=seed,
        workers=workers or min(4, os.cpu_count() or 1), scenarios=scenarios_named(scenarios),
    )  # fmt: skip
    trials = [parse_trial(text) for text in replay or ()]
    if report is not None:
        report_directory(report)
    started, clock = dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), time.monotonic()
    with _directory(workdir) as root:
        if trials:
            from harness.torture.campaign import replay as replay_all

            campaign = replay_all(trials, root)
        else:
            campaign = _run(order, root)
    data = document(campaign, **_about(started, time.monotonic() - clock))
    if report is not None:
        _write(report, data)
    if json_:
        print_json(data)
    else:
        console = stdout()
        for one in campaign.outcomes if trials else ():
            console.print(f"{one.trial.id}: {', '.join(one.states)}; exit {one.codes}")
            console.print(one.said)
        console.print(render(campaign))
    if not campaign.passed:
        raise typer.Exit(1)


def _run(order: Order, root: Path) -> Campaign:
    from harness.report.progress import CountProgress
    from harness.torture.campaign import run
    from harness.torture.trials import Outcome

    with CountProgress("trials") as trials, CountProgress("conversions") as conversions:

        def advance(total: int, one: object) -> None:
            if isinstance(one, Outcome):
                news = f"WRONG {one.trial.id}: {'; '.join(one.problems)}" if one.problems else ""
                trials.advance(total, one.trial.id, news)
            else:
                conversions.advance(total, "")

        return run(order, root, advance=advance)


@contextmanager
def _directory(workdir: Path | None) -> Iterator[Path]:
    if workdir is None:
        with tempfile.TemporaryDirectory(prefix="nemotron-bridge-torture-") as name:
            yield Path(name).resolve()
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        occupied = any(workdir.iterdir())
    except OSError as error:
        raise UsageError(
            f"cannot work there: {error.strerror}",
            where=str(workdir),
            hint="give another --workdir",
        ) from None
    if occupied:
        raise UsageError(
            "the directory is not empty", where=str(workdir), hint="give another --workdir"
        )
    yield workdir.resolve()


def _about(started: str, seconds: float) -> dict[str, Any]:
    from harness.report.digests import code_sha256
    from harness.report.evidence import versions

    return {
        "started": started,
        "seconds": seconds,
        "command": ["nemotron-bridge", *sys.argv[1:]],
        "environment": versions(),
        "code_sha256": code_sha256(),
    }


def _write(report: Path, data: dict[str, Any]) -> None:
    from bridge.outputs import write_atomically
    from harness.report.evidence import to_json
    from harness.report.files import writing_into

    with writing_into(report):
        write_atomically(report / _FILE, to_json(data))
