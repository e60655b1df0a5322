"""`parity`: a suite of toys against real Megatron-Core."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import typer

from bridge.cli import app
from bridge.cli_options import Json, LayersChoice
from harness.cli_run import (
    Format,
    ListOnly,
    Report,
    Resume,
    Select,
    Workdir,
    finish,
    print_ids,
    run_and_report,
)
from harness.cli_tools import Timeout


@app.command()
def parity(
    suite: Annotated[str, typer.Option("--suite", help="Name, or path of a TOML file.")] = "parity",
    select: Select = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option("--device", help="Run every case there, whatever the suite says."),
    ] = None,
    layers: Annotated[
        LayersChoice | None,
        typer.Option("--layers", help="Build every live model of these, whatever the suite says."),
    ] = None,
    timeout: Timeout = 300.0,
    allow_not_run: Annotated[
        list[str] | None,
        typer.Option("--allow-not-run", help="Reason that is no failure, such as gpu."),
    ] = None,
    list_only: ListOnly = False,
    json_: Json = False,
    workdir: Workdir = None,
    report: Report = None,
    resume: Resume = False,
    form: Format = "text",
) -> None:
    """Run a suite: toys of the whole family against real Megatron-Core ranks."""
    from harness.suite import forms_ranks, layers_named, load_suite
    from harness.suite import select as select_cases

    loaded = load_suite(suite)
    cases = loaded.cases
    if device is not None:
        cases = tuple(replace(case, device=device) for case in cases)
    if layers is not None:
        cases = tuple(
            replace(case, layers=layers_named(layers, case.device))
            if forms_ranks(case.check)
            else case
            for case in cases
        )
    cases = tuple(dict.fromkeys(cases))  # what differed in this alone is one case now
    chosen = select_cases(cases, select or ())
    if list_only:
        print_ids(chosen, json_=json_ or form == "json")
        return
    finish(
        run_and_report(
            chosen, {}, timeout=timeout, workdir=workdir, report_dir=report, suite=loaded.name,
            resume=resume, form="json" if json_ else form, allow_not_run=allow_not_run or (),
        )
    )  # fmt: skip
