"""What `verify` and `parity` share: running cases, resuming, and every form of the report."""

from __future__ import annotations

import datetime as dt
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bridge.errors import UsageError

if TYPE_CHECKING:
    from harness.bench import Bench, Subject
    from harness.report.journal import Journal
    from harness.runner import Result, RunReport
    from harness.suite import Case

FormatName = Literal["text", "json", "junit"]

Select = Annotated[
    list[str] | None,
    typer.Option("--select", help="Only cases whose id has this in it, or fits this glob."),
]
ListOnly = Annotated[
    bool, typer.Option("--list", "--dry-run", help="Print the ids of the cases; run nothing.")
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report",
        help="Directory for evidence.json, report.html, report.md, junit.xml, the journal and rank "
        "logs.",
    ),
]
Workdir = Annotated[
    Path | None,
    typer.Option(
        "--workdir",
        help="Where toys and conversions are made and removed again; under torchrun, a directory "
        "that all machines see. By default the system's temporary one.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on with the run that --report holds: verdicts stand, errors are rerun."
    ),
]
Format = Annotated[FormatName, typer.Option("--format", help="What to print on stdout.")]


def print_ids(cases: Sequence[Case], *, json_: bool) -> None:
    """Print the ids of cases: the dry run."""
    from bridge.console import print_json

    if json_:
        print_json([case.id for case in cases])
        return
    for case in cases:
        typer.echo(case.id)


def finish(report: RunReport) -> None:
    """End the command with the run's exit code."""
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def run_and_report(
    cases: Sequence[Case],
    subjects: Mapping[str, Subject],
    *,
    timeout: float,
    workdir: Path | None = None,
    report_dir: Path | None = None,
    suite: str | None = None,
    form: FormatName = "text",
    resume: bool = False,
    allow_not_run: Collection[str] = (),
    on_stderr: bool = False,
    make_bench: Callable[..., Bench] | None = None,
) -> RunReport:
    """Run cases, print the outcome, and leave every report in a directory, if there is one.

    Args:
        cases: At least one.
        subjects: Models under test besides the toys, by name.
        timeout: Seconds that one case may keep ranks busy.
        workdir: Where toys and conversions are made; None for the system's temporary directory.
        report_dir: Where reports, journal and rank logs go.
        suite: Its name, where one is run.
        form: What goes to stdout.
        resume: Go on with the run that `report_dir` holds.
        allow_not_run: Reasons for which a case may be left out.
        on_stderr: Print text there: stdout belongs to somebody else.
        make_bench: Of `Bench`'s arguments; None for a `Bench`.

    Raises:
        UsageError: BR001, a run to resume without its directory, a directory that cannot be
            worked in, or files that not all machines of torchrun see.
        ResumeError: HN102, a run that cannot be resumed.
    """
    from bridge.console import stdout
    from harness.bench import Bench
    from harness.conditions import check_shared, float32_products, scratch
    from harness.report.evidence import evidence, to_json
    from harness.report.files import RANK_LOGS, report_directory, writing_into
    from harness.report.junit import junit
    from harness.report.machine import MemoryWatch
    from harness.report.provenance import (
        checkpoint_identities,
        provenance,
        run_identity,
        toy_identities,
    )
    from harness.report.text import print_report
    from harness.report.write import write_reports
    from harness.thresholds import load_thresholds

    if resume and report_dir is None:
        raise UsageError(
            "there is nothing to resume without the report of the earlier run",
            hint="give --report the directory that it had",
        )
    if report_dir is not None:
        report_directory(report_dir, rank_logs=True)
    wanted = report_dir is not None or form != "text"
    products = float32_products(cases)
    thresholds, memory = load_thresholds(), MemoryWatch()
    inputs = checkpoint_identities(subjects) if wanted else {}
    with ExitStack() as stack:
        journal = None
        started = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        if report_dir is not None:
            from harness.report.journal import Journal

            identity = run_identity(cases, subjects, suite, inputs, thresholds)
            journal = stack.enter_context(
                Journal.resume(report_dir, identity)
                if resume
                else Journal.begin(report_dir, identity, started=started)
            )
            started = journal.earlier.started
        directory = stack.enter_context(scratch(workdir))
        check_shared(directory, report_dir, subjects)
        bench = stack.enter_context(
            (make_bench or Bench)(
                directory,
                subjects=subjects,
                timeout=timeout,
                log_dir=None if report_dir is None else report_dir / RANK_LOGS,
                thresholds=thresholds,
            )
        )
        found = _run(cases, bench, journal, memory, allow_not_run)
        if not wanted:
            print_report(found, stdout(stderr=on_stderr))
            return found
        memory.look(now=True)
        inputs |= toy_identities(cases, bench)
    resumed = 0 if journal is None else len(journal.earlier.results)
    data = evidence(
        found,
        provenance(
            suite=suite, started=started, inputs=inputs, thresholds=thresholds,
            memory=memory.peaks(), resumed_cases=resumed, products=products,
        ),
    )  # fmt: skip
    # First to the screen: a disk that has filled up since must not cost the results.
    if form == "text":
        print_report(found, stdout(stderr=on_stderr))
    else:
        sys.stdout.write(to_json(data) if form == "json" else junit(data))
    if report_dir is not None:
        with writing_into(report_dir):
            write_reports(data, report_dir)
    return found


def _run(
    cases: Sequence[Case],
    bench: Bench,
    journal: Journal | None,
    memory: Any,  # noqa: ANN401 - harness.report.machine.MemoryWatch, not imported for --help
    allow_not_run: Collection[str],
) -> RunReport:
    """Run what an earlier part has not settled; the report is of all cases."""
    from harness.report.progress import CaseProgress
    from harness.runner import RunReport, in_running_order, run_cases

    earlier = {} if journal is None else dict(journal.earlier.results)
    before = 0.0 if journal is None else journal.earlier.seconds
    left = [case for case in cases if case.id not in earlier]
    began = time.monotonic()
    bench.prepare(left)
    prepared = time.monotonic() - began
    with CaseProgress(len(left)) as progress:

        def on_result(result: Result) -> None:
            progress.advance(result)
            memory.look()
            if journal is not None:
                journal.add(result, seconds=before + time.monotonic() - began)

        fresh = run_cases(left, bench, on_result=on_result)
    results = earlier | {result.case.id: result for result in fresh.results}
    return RunReport(
        results=[results[case.id] for case in in_running_order(cases)],
        seconds=before + prepared + fresh.seconds,
        allowed_not_run=set(allow_not_run),
    )
