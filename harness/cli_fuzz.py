"""The command `fuzz`: damaged and hostile bytes for everything that the project reads."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from bridge.cli import app
from bridge.cli_options import Json


@app.command()
def fuzz(
    inputs: Annotated[
        int, typer.Option("--inputs", min=1, help="How many, of all kinds together.")
    ] = 100_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another draws other inputs.")] = 0,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="KIND", help="Only inputs of this kind. Repeatable."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes; by default one per core.")
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds that one input may take.")
    ] = 10.0,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="Directory for fuzz.json and the bytes of each finding."),
    ] = None,
    replay: Annotated[
        str | None,
        typer.Option("--replay", metavar="KIND:SEED:INDEX", help="Read one input again, here."),
    ] = None,
    list_only: Annotated[
        bool, typer.Option("--list", help="Show the kinds of input; run nothing.")
    ] = False,
    json_: Json = False,
) -> None:
    """Mutate the bytes of every kind of input, and see each input read, or refused with a code.

    Anything else is a finding: another exception, an exit, a signal, too much time or memory, a
    payload that ran. Exits with 1 if there is one. The same seed draws the same inputs.
    """
    from bridge.console import print_json, stdout
    from harness.fuzz.report import as_data, as_text, verdict, write
    from harness.fuzz.run import kinds_named, run_fuzz
    from harness.report.files import report_directory
    from harness.report.progress import CountProgress

    kinds = kinds_named(only or ())
    if list_only:
        for kind in kinds:
            typer.echo(f"{kind.name}: {kind.path}")
        return
    if report is not None:
        report_directory(report)
    if replay is not None:
        _replay(replay, report)
        return
    with _world() as root, CountProgress("inputs") as progress:
        found = run_fuzz(
            root, kinds=kinds, inputs=inputs, seed=seed, workers=workers, timeout=timeout,
            advance=lambda count, name, news: progress.advance(inputs, name, news, count=count),
        )  # fmt: skip
    if report is not None:
        write(found, report)
    if json_:
        print_json(as_data(found))
    else:
        stdout().print(as_text(found))
    if found.interrupted:
        raise typer.Exit(130)
    if verdict(found) != "passed":
        raise typer.Exit(1)


@contextmanager
def _world() -> Iterator[Path]:
    """Files to be mutated, in memory where the system has a place for that."""
    from harness.fuzz.world import build_world

    memory = Path("/dev/shm")  # noqa: S108 - a directory of our own is made there
    place = memory if memory.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="nemotron-fuzz-", dir=place) as directory:
        root = Path(directory) / "world"
        build_world(root)
        yield root


def _replay(name: str, report: Path | None) -> None:
    """Read one input in this process: what it raises is shown as any command's."""
    from harness.fuzz.report import save
    from harness.fuzz.results import Finding
    from harness.fuzz.run import input_of, numbers_named
    from harness.fuzz.worker import Outcome, write_input

    kind, seed, index = numbers_named(name)
    with _world() as root:
        data = input_of(kind, root, seed=seed, index=index)
        if report is not None:
            outcome = Outcome(index=index)
            one = Finding(kind=kind.name, seed=seed, outcome=outcome, data=data)
            typer.echo(str(save(one, report)))
        write_input(kind.file(root), data)
        kind.read(root)
    typer.echo(f"{name}: read, {len(data)} bytes")
