"""`diff`: two runs against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bridge.cli import app
from bridge.cli_options import Json
from bridge.errors import UsageError


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="evidence.json or --report directory.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The run to hold against it.")],
    ratio: Annotated[
        float, typer.Option("--ratio", help="Factor by which a value may move untold.")
    ] = 1.5,
    json_: Json = False,
) -> None:
    """Compare two runs: cases, verdicts, values, and what the runs were made from.

    Exits with 1 if B proves less than A: a worse verdict, a case gone, a value grown beyond the
    ratio, a limit raised. What B was made from may change without that.
    """
    from bridge.console import print_json, stdout
    from harness.report.diff import as_data, as_text, compare_runs
    from harness.report.evidence import read_evidence

    if not 1 <= ratio < float("inf"):
        raise UsageError(f"--ratio {ratio} is no factor", hint="give a number of 1 or more")
    changes = compare_runs(read_evidence(a), read_evidence(b), ratio=ratio)
    if json_:
        print_json(as_data(changes))
    else:
        stdout().print(as_text(changes))
    if any(change.regression for change in changes):
        raise typer.Exit(1)
