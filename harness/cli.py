"""`nemotron-bridge`: the conversion commands of `bridge.cli`, and those that verify.

Importing this module imports no torch: `--help` is instant.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
import traceback
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import bridge.cli
from bridge.cli import app
from bridge.cli_options import (
    CarryField,
    HfModel,
    Json,
    Revision,
    TrustRemoteCode,
)
from bridge.errors import BridgeError, LayoutError, UsageError
from harness.cli_tools import DeviceName, DtypeName, Timeout

if TYPE_CHECKING:
    from bridge.spec import ModelSpec
    from harness.bench import Subject
    from harness.runner import RunReport
    from harness.suite import Case

Select = Annotated[
    list[str] | None,
    typer.Option("--select", help="Only cases whose id has this in it, or fits this glob."),
]
ListOnly = Annotated[
    bool, typer.Option("--list", "--dry-run", help="Print the ids of the cases; run nothing.")
]
_CUT_FOR = ("tp1-pp1",)
_DEFAULT_LAYOUTS = ("tp1-pp1", "tp2-pp1", "tp1-pp2")


@app.command()
def verify(
    hf_model: HfModel,
    megatron_path: Annotated[
        Path | None,
        typer.Option("--megatron-path", help="A Megatron checkpoint to hold against it."),
    ] = None,
    layouts: Annotated[
        str | None,
        typer.Option(
            "--layouts",
            help="Comma-separated, such as tp2-pp1,tp1-pp2; by default whichever of "
            f"{','.join(_DEFAULT_LAYOUTS)} the model can be cut into.",
        ),
    ] = None,
    dtype: DtypeName = "float32",
    device: DeviceName = "cpu",
    select: Select = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    carry: CarryField = None,
    timeout: Timeout = 1800.0,
    list_only: ListOnly = False,
    json_: Json = False,
    report: Annotated[
        Path | None, typer.Option("--report", help="Directory for the evidence and rank logs.")
    ] = None,
) -> None:
    """Prove a conversion: configuration, weights, placement, RoPE and logits against the reference.

    Without --megatron-path the checkpoint is converted there and back and compared; with it, that
    checkpoint is compared bit by bit and is what the ranks load.
    """
    from bridge.convert import read_spec
    from bridge.hub import resolve_model
    from harness.suite import select as select_cases

    path = resolve_model(hf_model, weights=True, revision=revision)
    names = _layout_names(read_spec(path, carry=carry or ()), layouts)
    _account_for(path, megatron_path, carry=carry or ())
    cases = _verification_cases(path, names, dtype, device, imported=megatron_path is not None)
    chosen = select_cases(cases, select or ())
    if list_only:
        _print_ids(chosen, json_=json_)
        return
    subjects = _subjects(
        path, megatron_path, trust_remote_code=trust_remote_code, carry=carry or ()
    )
    _finish(_run(chosen, subjects, timeout, report, suite=None, json_=json_))


def _account_for(hf: Path, megatron: Path | None, *, carry: Collection[str]) -> None:
    """Refuse checkpoints that no case could be run on, with one error."""
    from harness.inputs import account_for_hf, account_for_megatron

    spec = account_for_hf(hf, carry=carry)
    if megatron is not None:
        account_for_megatron(megatron, spec)


def _verification_cases(
    path: Path, layouts: Sequence[str], dtype: str, device: str, *, imported: bool
) -> list[Case]:
    """Every check that applies to one checkpoint; `imported` if its Megatron twin is given."""
    from harness.suite import Case

    model = path.resolve().name
    first: list[tuple[str, Sequence[str | None]]] = [("config", (None,))]
    first.append(("round_trip", _CUT_FOR))
    cases = [
        Case(check=check, model=model, dtype=dtype, layout=layout, device=device)
        for check, places in (*first, ("placement", layouts), ("rope", layouts))
        for layout in places
    ]
    return cases + [
        Case(check="logits", model=model, dtype=dtype, layout=layout, probe=probe, device=device)
        for layout in layouts
        for probe in ("short", "long")
    ]


def _layout_names(spec: ModelSpec, given: str | None) -> tuple[str, ...]:
    """The layouts asked for, which must fit the model, or those of the default ones that do."""
    from harness.layouts import resolve_layout

    if given is not None:
        names = tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
        if not names:
            raise UsageError(
                "--layouts names no layout, and no ranks would be looked at",
                hint="leave it away, or give for instance tp1-pp1,tp2-pp1",
            )
        for name in names:
            resolve_layout(name, spec)  # bad usage, said before any work
        return names
    fitting = []
    for name in _DEFAULT_LAYOUTS:
        with contextlib.suppress(LayoutError):
            resolve_layout(name, spec)
            fitting.append(name)
    return tuple(fitting)


def _subjects(
    path: Path, megatron: Path | None, *, trust_remote_code: bool, carry: Collection[str]
) -> dict[str, Subject]:
    from harness.bench import Subject

    subject = Subject(
        name=path.resolve().name,
        hf=path,
        megatron=megatron,
        trust_remote_code=trust_remote_code,
        carry=tuple(carry),
    )
    return {subject.name: subject}


def _verify_conversion(
    hf: Path,
    megatron: Path,
    *,
    trust_remote_code: bool,
    carry: Collection[str],
    quiet: bool,
) -> None:
    """What `--verify full` adds to import and export; with `quiet` the report is on stderr."""
    from bridge.convert import read_spec

    names = _layout_names(read_spec(hf, carry=carry), None)
    _account_for(hf, megatron, carry=carry)
    cases = _verification_cases(hf, names, "float32", "cpu", imported=True)
    subjects = _subjects(hf, megatron, trust_remote_code=trust_remote_code, carry=carry)
    _finish(_run(cases, subjects, 1800.0, None, suite=None, on_stderr=quiet))


bridge.cli.full_verification = _verify_conversion


@app.command()
def parity(
    suite: Annotated[str, typer.Option("--suite", help="Name, or path of a TOML file.")] = "parity",
    select: Select = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option("--device", help="Run every case there, whatever the suite says."),
    ] = None,
    timeout: Timeout = 300.0,
    allow_not_run: Annotated[
        list[str] | None,
        typer.Option("--allow-not-run", help="Reason that is no failure, such as gpu."),
    ] = None,
    list_only: ListOnly = False,
    json_: Json = False,
    report: Annotated[
        Path | None, typer.Option("--report", help="Directory for the evidence and rank logs.")
    ] = None,
) -> None:
    """Run a suite: toys of the whole family against real Megatron-Core ranks."""
    from harness.suite import load_suite
    from harness.suite import select as select_cases

    loaded = load_suite(suite)
    cases = loaded.cases
    if device is not None:
        cases = tuple(replace(case, device=device) for case in cases)
    chosen = select_cases(cases, select or ())
    if list_only:
        _print_ids(chosen, json_=json_)
        return
    _finish(
        _run(
            chosen, {}, timeout, report, suite=loaded.name, json_=json_,
            allow_not_run=allow_not_run or (),
        )
    )  # fmt: skip


def _print_ids(cases: Sequence[Case], *, json_: bool) -> None:
    from bridge.console import print_json

    if json_:
        print_json([case.id for case in cases])
        return
    for case in cases:
        typer.echo(case.id)


def _run(
    cases: Sequence[Case],
    subjects: dict[str, Subject],
    timeout: float,
    report_dir: Path | None,
    *,
    suite: str | None,
    json_: bool = False,
    allow_not_run: Sequence[str] = (),
    on_stderr: bool = False,
) -> RunReport:
    from bridge.console import stdout
    from harness.bench import Bench
    from harness.report.evidence import evidence, identity, to_json, versions
    from harness.report.progress import CaseProgress
    from harness.report.text import print_report
    from harness.runner import run_cases

    if report_dir is not None:
        report_dir.mkdir(parents=True, exist_ok=True)
    log_dir = None if report_dir is None else report_dir / "ranks"
    inputs = {}
    with (
        tempfile.TemporaryDirectory(prefix="nemotron-bridge-") as workdir,
        Bench(Path(workdir), subjects=subjects, timeout=timeout, log_dir=log_dir) as bench,
        CaseProgress(len(cases)) as progress,
    ):
        found = run_cases(
            cases, bench, on_result=progress.advance, allowed_not_run=set(allow_not_run)
        )
        for case in cases:
            if case.model not in inputs:
                inputs[case.model] = identity(bench.checkpoint(case))
    data = evidence(found, command=sys.argv, suite=suite, inputs=inputs, versions=versions())
    if report_dir is not None:
        (report_dir / "evidence.json").write_text(to_json(data), "utf-8")
    if json_:
        sys.stdout.write(to_json(data))
    else:
        print_report(found, stdout(stderr=on_stderr))
    return found


def _finish(report: RunReport) -> None:
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def main() -> None:
    """Run the command line; the entry point.

    Exits with 0 (passed), 1 (a check failed), 2 (bad usage or input), 3 (could not run) or 130
    (interrupted, which is typer's own doing). Errors a user can act on are printed without a
    traceback; any other is our bug, exits with 3 and keeps its own.
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")
    try:
        app()
    except BridgeError as error:
        sys.stderr.write(f"{error}\n")
        for note in getattr(error, "__notes__", ()):
            sys.stderr.write(f"note: {note}\n")
        sys.exit(error.exit_code)
    except Exception:  # noqa: BLE001 - 1 says that a check failed, which a crash does not
        traceback.print_exc()
        sys.exit(3)


if __name__ == "__main__":
    main()
