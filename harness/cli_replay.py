"""`nemotron-bridge replay`: run a case again that a test has found, shrunk and written down."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bridge.cli import app
from bridge.cli_options import Json
from bridge.scratch import held_directory
from harness.cli_tools import Timeout


@app.command()
def replay(
    directory: Annotated[
        Path, typer.Argument(help="Holds config.json and replay.json, as a failed test left them.")
    ],
    timeout: Timeout = 300.0,
    json_: Json = False,
) -> None:
    """Run a failing case again: draw its weights anew, convert, check; exit 1 if it still fails."""
    from bridge.console import print_json, stdout
    from harness.bench import Bench
    from harness.replay import load_replay, run_replay
    from harness.report.text import print_report
    from harness.runner import RunReport

    config, what = load_replay(directory)
    with (
        held_directory() as workdir,
        Bench(workdir, timeout=timeout) as bench,
    ):
        result = run_replay(config, what, bench)
    report = RunReport(results=[result], seconds=result.seconds)
    if json_:
        places = [] if result.finding is None else list(result.finding.places)
        print_json(
            {
                "id": result.case.id,
                "seed": what.seed,
                "status": result.status,
                "summary": result.summary,
                "places": places,
            }
        )
    else:
        print_report(report, stdout())
    if report.exit_code:
        raise typer.Exit(report.exit_code)
