"""`qualify`: everything that is to be proved of a new variant, and the bundle that says it was."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bridge.cli import app
from bridge.cli_options import DeviceName, Json, Revision
from bridge.errors import UsageError
from harness.cli_faults import Workers
from harness.cli_run import Resume, Workdir, run_and_report
from harness.cli_stream import Seed, StreamBudget
from harness.cli_tools import DtypeName, Timeout

if TYPE_CHECKING:
    from harness.qualify.job import Job
    from harness.qualify.scope import Scope


@app.command()
def qualify(
    context: typer.Context,
    hf_model: Annotated[
        str | None, typer.Option("--hf-model", help="Checkpoint directory or Hub id.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="In place of --hf-model: a config.json, whose model gets pseudo-random weights.",
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            help="A published variant, by the name of its file in suites/variants, or such a file; "
            "its configuration is taken where no other is given.",
        ),
    ] = None,
    megatron_path: Annotated[
        Path | None,
        typer.Option(
            "--megatron-path",
            help="A Megatron checkpoint to compare bit by bit; by default --hf-model is converted "
            "there and back, which takes room for two copies under --workdir.",
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Directory of the bundle to write.")
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option("--check", help="Run nothing: hold the bundle in this directory to itself."),
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="Every block at real dimensions, not one of each kind."),
    ] = False,
    faults: Annotated[
        list[str] | None,
        typer.Option(
            "--faults",
            help="Only faults whose name has this in it, or fits this glob: a trial, whose verdict "
            "is `incomplete`. Repeatable.",
        ),
    ] = None,
    seed: Seed = 0,
    memory_budget: StreamBudget = "4GiB",
    dtype: DtypeName = "float32",
    device: DeviceName = "cpu",
    workers: Workers = None,
    timeout: Timeout = 1800.0,
    hf_id: Annotated[
        str | None, typer.Option("--hf-id", help="For the card: org/name of the model on the Hub.")
    ] = None,
    hf_revision: Annotated[
        str | None,
        typer.Option("--hf-revision", help="For the card: the model's commit there, 40 digits."),
    ] = None,
    base_container: Annotated[
        str | None,
        typer.Option("--base-container", help="For the card: name and tag of the image."),
    ] = None,
    revision: Revision = None,
    workdir: Workdir = None,
    resume: Resume = False,
    list_only: Annotated[
        bool, typer.Option("--list", "--dry-run", help="Print what would be run; run nothing.")
    ] = False,
    json_: Json = False,
) -> None:
    """Qualify a variant never seen before: prove all of it, and write a bundle of evidence.

    What cannot be proved is refused, field by field. One block of each kind is walked through at
    real dimensions; a shrunk twin with the same traits goes through every check, in every layout
    that it fits, and through every fault of the catalogue. --check looks at such a bundle again.
    """
    if check is not None:
        _refuse_others(context)
        _check(check, json_=json_)
        return
    if list_only and resume:
        raise UsageError("--list runs nothing that --resume could go on with")
    from bridge.platform import refuse_missing_gpu
    from harness.conditions import scratch
    from harness.qualify.bundle import refuse_foreign, refuse_other_config
    from harness.qualify.job import Request, job_of, look

    if report is not None and not list_only:
        refuse_foreign(report, resume=resume)
    with scratch(workdir) as directory:
        job = job_of(
            Request(
                hf_model=hf_model, config=config, suite=suite, revision=revision,
                megatron=megatron_path, full=full, seed=seed, dtype=dtype, device=device,
                faults=tuple(faults or ()), hf_id=hf_id, hf_revision=hf_revision,
                base_container=base_container,
            ),
            directory,
        )  # fmt: skip
        if not list_only:
            refuse_missing_gpu(device)
        work = look(job, memory_budget=memory_budget, workdir=workdir)
        if list_only:
            _list(job.scope, json_=json_)
            return
        if report is None:
            raise UsageError("the evidence needs a place", hint="give --report DIR")
        refuse_other_config(report, job.config)
        sys.stderr.write(f"{work}\n")
        code = _run(
            job, directory, report, memory_budget=memory_budget, workers=workers, timeout=timeout,
            workdir=workdir, resume=resume, json_=json_,
        )  # fmt: skip
    if code:
        raise typer.Exit(code)


def _refuse_others(context: typer.Context) -> None:
    """Refuse what was typed beside --check: it would be thought to count."""
    others = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in ("check", "json_")
        and getattr(context.get_parameter_source(parameter.name or ""), "name", "") == "COMMANDLINE"
    ]
    if others:
        raise UsageError(
            "--check takes a bundle and nothing else",
            where=others,
            hint="leave the rest away; --json may stay",
        )


def _run(
    job: Job,
    directory: Path,
    report: Path,
    *,
    memory_budget: str,
    workers: int | None,
    timeout: float,
    workdir: Path | None,
    resume: bool,
    json_: bool,
) -> int:
    """Run the cases, then the faults, and write the bundle; the exit code.

    Args:
        job: What is run.
        directory: For the twin's checkpoint.
        report: Of the bundle.
        memory_budget: For weights that are walked through.
        workers: Processes for the faults.
        timeout: Seconds that one case may keep ranks busy.
        workdir: Where conversions are made.
        resume: Go on with what `report` holds.
        json_: Print the evidence on stdout.
    """
    from bridge.console import parse_size, stdout
    from harness.qualify.bench import QualifyingBench
    from harness.qualify.bundle import write_bundle
    from harness.qualify.scope import TWIN_DTYPE
    from harness.qualify.trial import run_trial
    from harness.qualify.verdict import overall
    from harness.report.evidence import to_json
    from harness.report.files import writing_into
    from harness.streaming.walking import Streaming
    from harness.toys import write_checkpoint

    scope = job.scope
    twin = directory / "twin"
    write_checkpoint(scope.twin.toy, twin, dtype=TWIN_DTYPE)
    subjects = job.subjects(twin)
    streaming = Streaming(memory_budget=parse_size(memory_budget), keep=report, resume=resume)
    run_and_report(
        scope.cases, subjects, timeout=timeout, workdir=workdir, report_dir=report, resume=resume,
        on_stderr=json_, make_bench=partial(QualifyingBench, streaming=streaming),
    )  # fmt: skip
    matrix = run_trial(
        scope, subjects, report, resume=resume, workers=workers, timeout=min(timeout, 300.0)
    )
    with writing_into(report):
        data = write_bundle(report, scope, job.origin, matrix, config=job.config)
    verdict, code = overall(data, matrix)
    if json_:
        sys.stdout.write(to_json(data))
        return code
    console = stdout()
    console.print("", *matrix["problems"], sep="\n", markup=False)
    counts = data["qualification"]["faults"]
    console.print(
        f"{counts['killed']} of {counts['tried']} faults killed on a twin of "
        f"{len(scope.twin.layer_idx)} blocks; {len(scope.nothing_to_spoil)} others have nothing "
        "to spoil there",
        markup=False,
    )
    console.print(
        f"{scope.choices.name}: {verdict}\n"
        f"nemotron-bridge qualify --check {report}   # looks at the bundle again",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    return code


def _list(scope: Scope, *, json_: bool) -> None:
    """Print what would be run: cases, faults, and what the twin has in common with the model."""
    from bridge.console import print_json

    if json_:
        cases = [case.id for case in scope.cases]
        print_json(scope.as_data() | {"cases": cases, "faults": list(scope.faults)})
        return
    for case in scope.cases:
        typer.echo(case.id)
    for name in scope.faults:
        typer.echo(f"faults/{scope.twin.toy.name}/{name}")


def _check(directory: Path, *, json_: bool) -> None:
    """Hold a bundle to itself; exit with 0 where it validates and has passed."""
    from bridge.console import print_json
    from harness.qualify.audit import audit

    found = audit(directory)
    if json_:
        print_json(
            {
                "valid": not found.problems,
                "verdict": found.verdict,
                "other_code": found.other_code,
                "problems": list(found.problems),
            }
        )
    else:
        for problem in found.problems:
            typer.echo(problem)
        if found.other_code is not None:
            typer.echo(
                f"made by other code, {found.other_code[:16]}: sums, verdicts, counts and limits "
                "were looked at; check the rest with that code"
            )
        word = "does NOT validate" if found.problems else "validates"
        typer.echo(f"{directory} {word}; its verdict: {found.verdict}")
    if found.exit_code:
        raise typer.Exit(found.exit_code)
