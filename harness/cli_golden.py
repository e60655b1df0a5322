"""The command `golden`: hold the bridge to what is on record, or record it anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from bridge.cli import app
from bridge.cli_options import Json
from bridge.scratch import held_directory

if TYPE_CHECKING:
    from harness.bench import Bench

golden = typer.Typer(
    no_args_is_help=True, help="Outputs on record: check them, or record them for a reason."
)
app.add_typer(golden, name="golden")

Select = Annotated[
    list[str] | None,
    typer.Option("--select", help="Only goldens whose name has this in it, or fits this glob."),
]


@contextmanager
def _bench() -> Iterator[Bench]:
    from harness.bench import Bench

    with (
        held_directory() as workdir,
        Bench(workdir) as bench,
    ):
        yield bench


@golden.command()
def check(select: Select = None, json_: Json = False) -> None:
    """Make every golden model again and compare; stale, missing and unused records fail.

    With --select only those are looked at, and records that nothing uses are not looked for.
    """
    from bridge.console import print_json
    from harness import locations
    from harness.golden.work import check as check_goldens

    with _bench() as bench:
        found = check_goldens(locations.golden_dir(), bench, select or ())
    failed = [one for one in found if not one.passed]
    if json_:
        print_json(
            {
                "passed": not failed,
                "goldens": [
                    {"name": one.name, "passed": one.passed, "problems": list(one.problems)}
                    for one in found
                ],
            }
        )
    else:
        for one in failed:
            typer.echo(f"{one.name}: failed")
            for problem in one.problems:
                typer.echo(f"  {problem}")
        typer.echo(f"{len(found) - len(failed)} goldens hold, {len(failed)} do not")
        if failed:
            typer.echo(
                "If the change is meant: nemotron-bridge golden record --reason '...', "
                "and an entry under Changed numerics in the CHANGELOG."
            )
    if failed:
        raise typer.Exit(1)


@golden.command()
def record(
    reason: Annotated[
        str, typer.Option("--reason", help="Why the values may change; kept beside them.")
    ] = "",
    select: Select = None,
    json_: Json = False,
) -> None:
    """Put on record what the bridge makes of the golden models now. Never in CI."""
    from bridge.console import print_json
    from harness import locations
    from harness.golden.work import record as record_goldens
    from harness.golden.work import refuse_recording

    refuse_recording(reason)
    with _bench() as bench:
        found = record_goldens(locations.golden_dir(), bench, reason=reason, patterns=select or ())
    if json_:
        print_json(
            {
                "written": list(found.written),
                "unchanged": list(found.unchanged),
                "removed": list(found.removed),
            }
        )
        return
    for what, names in (("written", found.written), ("removed", found.removed)):
        for name in names:
            typer.echo(f"{what}: {name}")
    typer.echo(
        f"{len(found.written)} written, {len(found.unchanged)} unchanged, "
        f"{len(found.removed)} removed"
    )
