"""`faults` and `alarms`: does every check see what it should, and nothing that is not there?"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bridge.cli import app
from bridge.cli_options import DeviceName, Json, LayersName
from bridge.errors import UsageError
from harness.cli_tools import DtypeName

if TYPE_CHECKING:
    from rich.table import Table

    from harness.faults.units import Matrix, Unit

Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Processes; by default one per core, at most eight."),
]
CaseTimeout = Annotated[
    float, typer.Option("--timeout", min=1, help="Seconds that one case may keep ranks busy.")
]
Checks = Annotated[
    str | None, typer.Option("--checks", help="Comma-separated; by default every check.")
]
Report = Annotated[
    Path | None, typer.Option("--report", help="Directory for the results as files.")
]


@app.command()
def faults(
    select: Annotated[
        list[str] | None,
        typer.Option("--select", help="Only faults whose name has this in it, or fits this glob."),
    ] = None,
    toys: Annotated[
        str | None, typer.Option("--toys", help="Comma-separated toys to try them on.")
    ] = None,
    checks: Checks = None,
    dtypes: Annotated[
        str,
        typer.Option("--dtypes", help="Comma-separated: a fault that dies in one of them is dead."),
    ] = "float32",
    device: DeviceName = "cpu",
    layers: LayersName = "auto",
    workers: Workers = None,
    timeout: CaseTimeout = 120.0,
    full: Annotated[
        bool, typer.Option("--full", help="Let every check look on every toy, not on one only.")
    ] = False,
    list_only: Annotated[
        bool, typer.Option("--list", "--dry-run", help="Show the catalogue; run nothing.")
    ] = False,
    json_: Json = False,
    report: Report = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the matrix that --report holds: its units stand."
        ),
    ] = False,
) -> None:
    """Break the bridge in every way of the catalogue, and see every break noticed.

    Exits with 1 if a fault survives, if a check kills nothing or could be left away, or if a check
    fails without any fault.
    """
    from bridge.console import print_json, stdout
    from harness.faults import CATALOGUE
    from harness.faults.journal import UnitJournal
    from harness.faults.matrix import DEFAULT_TOYS, run_matrix
    from harness.report.digests import code_sha256, digest_of
    from harness.report.evidence import thresholds_as_data
    from harness.report.files import report_directory, writing_into
    from harness.report.progress import CountProgress
    from harness.suite import Compute, layers_named
    from harness.thresholds import load_thresholds
    from harness.toys import toy_named

    names = _chosen(list(CATALOGUE), select or ())
    if resume and report is None:
        raise UsageError(
            "there is nothing to resume without the report of the earlier run",
            hint="give --report the directory that it had",
        )
    if report is not None:
        report_directory(report)
    if list_only:
        _list(names, as_json=json_)
        return
    chosen = tuple(toy_named(one).name for one in _split(toys)) or DEFAULT_TOYS
    looking = known_checks(checks)
    computes = [
        Compute(dtype=one, device=device, layers=layers_named(layers, device))
        for one in _known_dtypes(dtypes)
    ]
    identity = {
        "code": code_sha256(),
        "thresholds": digest_of(thresholds_as_data(load_thresholds())),
        "faults": list(names),
        "toys": list(chosen),
        "checks": list(looking),
        "computes": [asdict(one) for one in computes],
        "full": full,
    }
    with ExitStack() as stack:
        journal = None
        if report is not None:
            begin = UnitJournal.resume if resume else UnitJournal.begin
            journal = stack.enter_context(begin(report, identity))
        earlier = [] if journal is None else list(journal.earlier)
        progress = stack.enter_context(CountProgress("faults"))

        def on_unit(unit: Unit, total: int) -> None:
            if journal is not None:
                journal.add(unit)
            alive = f"SURVIVED {unit.fault} on {unit.toy} in {unit.dtype}"
            progress.advance(
                total - len(earlier), f"{unit.fault} on {unit.toy}", "" if unit.killed_by else alive
            )

        matrix, alarms = run_matrix(
            faults=names, toys=chosen, checks=looking, workers=workers, computes=computes,
            timeout=timeout, full=full, earlier=earlier, on_unit=on_unit,
        )  # fmt: skip
    # Whether a check is needed shows only where every fault and every check took part.
    whole = not select and not checks and not toys
    left_out = [name for name in names if name not in matrix.faults]
    wrong = [f"survived: {name}" for name in matrix.survivors]
    wrong += [f"failed without a fault: {alarm}" for alarm in alarms]
    if whole:
        wrong += [f"kills nothing: {name}" for name in matrix.idle_checks]
        wrong += [
            f"could be left away: {name}"
            for name in matrix.redundant_checks
            if name not in matrix.idle_checks
        ]
    data = matrix.to_dict() | {"alarms": alarms, "problems": wrong, "left_out": left_out}
    if json_:
        print_json(data)
    else:
        console = stdout()
        for one in matrix.dtypes:
            console.print(_as_table(matrix, one))
        if left_out:
            console.print(f"left out, for they come in at local layers: {', '.join(left_out)}")
        _say(console, matrix, wrong)
    if report is not None:
        with writing_into(report):
            _write(report, "faults.json", data)
            _write_matrix(report, data)
    if wrong:
        raise typer.Exit(1)


def _list(names: Sequence[str], *, as_json: bool) -> None:
    from bridge.console import print_json, stdout, table
    from harness.faults import CATALOGUE

    if as_json:
        print_json([_about(name) for name in names])
        return
    rows = table("fault", "family", "stands for")
    for name in names:
        rows.add_row(name, CATALOGUE[name].family, CATALOGUE[name].stands_for)
    stdout().print(rows)


def _about(name: str) -> dict[str, str]:
    from harness.faults import CATALOGUE

    fault = CATALOGUE[name]
    return {"name": name, "family": fault.family, "stands_for": fault.stands_for}


def _chosen(known: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    found = tuple(
        name
        for name in known
        if not patterns or any(one in name or fnmatch.fnmatchcase(name, one) for one in patterns)
    )
    if not found:
        raise UsageError(
            f"no fault is selected by {', '.join(patterns)}", hint="--list shows the catalogue"
        )
    return found


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _known_dtypes(text: str) -> tuple[str, ...]:
    from harness.suite import DTYPES

    return _known(text, DTYPES, "dtype of ours", "--dtypes")


def known_checks(text: str | None) -> tuple[str, ...]:
    """Names of checks, comma-separated; refuse unknown ones with UsageError BR001."""
    from harness.checks import CHECKS

    return () if text is None else _known(text, tuple(CHECKS), "check", "--checks")


def _known(text: str, known: Sequence[str], what: str, flag: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(_split(text)))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UsageError(
            f"no {what} is called {', '.join(unknown) or 'nothing'}",
            where=flag,
            hint=f"known: {', '.join(known)}",
        )
    return names


def _as_table(matrix: Matrix, dtype: str) -> Table:
    """Faults down, checks across: X killed wherever it looked, x on some toys, . looked in vain."""
    from rich.text import Text

    from bridge.console import table

    rows = table("fault" if len(matrix.dtypes) == 1 else f"in {dtype}", *matrix.checks, "toys")
    for fault in matrix.faults:
        units = [unit for unit in matrix.units if (unit.fault, unit.dtype) == (fault, dtype)]
        cells: list[Text | str] = []
        for check in matrix.checks:
            looked = [unit for unit in units if check in unit.checks]
            kills = [unit for unit in looked if check in unit.killed_by]
            if not looked:
                cells.append("")
            elif not kills:
                cells.append(Text(".", style="dim"))
            else:
                cells.append(Text("X" if len(kills) == len(looked) else "x", style="green"))
        alive = [unit for unit in units if not unit.killed_by]
        count = Text(f"{len(units) - len(alive)}/{len(units)}")
        if alive or not units:
            count = Text(f"{count} SURVIVED", style="bold red")
        rows.add_row(fault, *cells, count)
    return rows


def _say(console: Any, matrix: Matrix, wrong: Sequence[str]) -> None:  # noqa: ANN401 - a rich Console
    from rich.text import Text

    console.print(
        "\nX killed on every toy, x on some, . looked and passed; a check sees a fault only where "
        "it comes in"
    )
    for check, names in matrix.indispensable.items():
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            console.print(f"only {check} kills {shown}")
    for line in wrong:
        console.print(Text(line, style="bold red"))
    killed = len(matrix.faults) - len(matrix.survivors)
    toys = len({unit.toy for unit in matrix.units})
    console.print(
        Text(
            f"{killed} of {len(matrix.faults)} faults killed by {len(matrix.checks)} checks on "
            f"{toys} toys, {len(matrix.units)} units, {len(wrong)} problems in "
            f"{matrix.seconds:.0f} s",
            style="bold red" if wrong else "bold green",
        )
    )


def _write(directory: Path, name: str, data: dict[str, Any]) -> None:
    from bridge.outputs import write_atomically

    write_atomically(directory / name, json.dumps(data, indent=1) + "\n")


def _write_matrix(directory: Path, data: dict[str, Any]) -> None:
    """A page of its own, and a section of the report that lies there already."""
    from bridge.outputs import write_atomically
    from harness.report.evidence import FILE_NAME, read_evidence
    from harness.report.html import render_kill_matrix
    from harness.report.write import write_reports

    write_atomically(directory / "faults.html", render_kill_matrix(data))
    if (directory / FILE_NAME).is_file():
        write_reports(read_evidence(directory), directory)


@app.command()
def alarms(
    count: Annotated[int, typer.Option("--count", min=1, help="How many random models.")] = 200,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which ones.")] = 0,
    checks: Checks = None,
    dtype: DtypeName = "float32",
    device: DeviceName = "cpu",
    layers: LayersName = "auto",
    workers: Workers = None,
    timeout: CaseTimeout = 120.0,
    json_: Json = False,
    report: Report = None,
) -> None:
    """Run random healthy models through every check: any failure is a false alarm, exit code 1."""
    from bridge.console import print_json, stdout
    from harness.alarms import run_alarms, write_down
    from harness.report.files import report_directory, writing_into
    from harness.report.progress import CountProgress
    from harness.suite import Compute, layers_named

    looking = known_checks(checks)
    if "golden" in looking:
        raise UsageError("random models have no golden", where="--checks")
    directory = report_directory(report or Path("out") / "alarms")
    with CountProgress("models") as progress:
        found = run_alarms(
            count, start=seed, checks=looking, workers=workers, timeout=timeout,
            compute=Compute(dtype=dtype, device=device, layers=layers_named(layers, device)),
            on_model=lambda _done, new: progress.advance(
                count, "", "; ".join(f"ALARM {one.replay.case.id}: {one.summary}" for one in new)
            ),
        )  # fmt: skip
    commands = [write_down(alarm, directory) for alarm in found.alarms]
    data = found.to_dict() | {"replay": commands}
    with writing_into(directory):
        _write(directory, "alarms.json", data)
    if json_:
        print_json(data)
    else:
        console = stdout()
        for alarm, command in zip(found.alarms, commands, strict=True):
            console.print(f"{alarm.replay.case.id}: {alarm.summary.splitlines()[0]}\n  {command}")
        console.print(
            f"{found.models} healthy models, {found.cases} cases, {len(found.alarms)} alarms, "
            f"{len(found.features)} features met, in {found.seconds:.0f} s"
        )
    if found.alarms:
        raise typer.Exit(1)
