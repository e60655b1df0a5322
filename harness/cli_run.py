"""What `verify` and `parity` share: running cases, resuming, and every form of the report."""

from __future__ import annotations

import dataclasses
import datetime as dt
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bridge.errors import UsageError

if TYPE_CHECKING:
    from harness.bench import Bench, Subject
    from harness.report.evidence import Provenance
    from harness.report.journal import Journal
    from harness.runner import Result, RunReport
    from harness.suite import Case
    from harness.thresholds import Thresholds

FormatName = Literal["text", "json", "junit"]

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
_ROUGH = 100.0
"""Error of a product, in ulp of float32, that only TF32 reaches: it makes some 4,000."""


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
    from harness.report.evidence import evidence, to_json
    from harness.report.files import RANK_LOGS, report_directory, writing_into
    from harness.report.junit import junit
    from harness.report.machine import MemoryWatch
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
    products = _float32_products(cases)
    thresholds, memory = load_thresholds(), MemoryWatch()
    inputs = _hashed(subjects) if wanted else {}
    with ExitStack() as stack:
        journal = None
        started = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        if report_dir is not None:
            from harness.report.journal import Journal

            identity = _identity(cases, subjects, suite, inputs, thresholds)
            journal = stack.enter_context(
                Journal.resume(report_dir, identity)
                if resume
                else Journal.begin(report_dir, identity, started=started)
            )
            started = journal.earlier.started
        directory = stack.enter_context(_scratch(workdir))
        _check_shared(directory, report_dir, subjects)
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
        inputs |= _toys(cases, bench)
    resumed = 0 if journal is None else len(journal.earlier.results)
    data = evidence(
        found,
        _provenance(
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


@contextmanager
def _scratch(parent: Path | None) -> Iterator[Path]:
    try:
        if parent is not None:
            parent = parent.absolute()  # for ranks, wherever they are
            parent.mkdir(parents=True, exist_ok=True)
        # A network's file system keeps what is still mapped: no reason to lose the results.
        made = tempfile.TemporaryDirectory(
            prefix="nemotron-bridge-", dir=parent, ignore_cleanup_errors=True
        )
    except OSError as error:
        raise UsageError(
            f"cannot work there: {error.strerror}",
            where=str(parent or tempfile.gettempdir()),
            hint="give --workdir a directory that can be written to",
        ) from None
    with made as directory:
        yield Path(directory)


def _check_shared(
    directory: Path, report_dir: Path | None, subjects: Mapping[str, Subject]
) -> None:
    """See that all machines of torchrun look at the same files, where there are several."""
    from harness.torchrun.lead import torchrun_ranks

    ranks = torchrun_ranks()
    if ranks is not None:
        models = [path for one in subjects.values() for path in (one.hf, one.megatron) if path]
        ranks.check_shared([directory, *([report_dir] if report_dir else [])], models)


def _float32_products(cases: Sequence[Case]) -> dict[str, float]:
    """See that products on a GPU are float32's in this process and those it will start.

    Raises:
        EnvironmentMissingError: BR500, they are TF32's; or Transformer Engine does not load.
    """
    import importlib.util

    import torch

    from bridge.errors import EnvironmentMissingError
    from bridge.platform import float32_product_error, forbid_tf32

    used = {case.layers for case in cases if case.device == "cuda"}
    if not used:
        return {}
    forbid_tf32()
    if not torch.cuda.is_available():
        return {}
    if used != {"local"} and importlib.util.find_spec("transformer_engine") is not None:
        try:
            import transformer_engine.pytorch  # noqa: F401 - to be measured, too
        except (ImportError, OSError) as error:
            raise EnvironmentMissingError(
                "Transformer Engine is installed and does not load",
                where=str(error).partition("\n")[0],
                hint="install one that was built for this torch, or run with --layers local",
            ) from error
    found = float32_product_error()
    rough = [f"{name}: {error:.0f} ulp" for name, error in found.items() if error > _ROUGH]
    if rough:
        raise EnvironmentMissingError(
            "float32 products on this GPU are rounded to TF32",
            where=rough,
            hint="set NVIDIA_TF32_OVERRIDE=0 before anything starts CUDA",
        )
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


def _hashed(subjects: Mapping[str, Subject]) -> dict[str, dict[str, Any]]:
    """What identifies the user's checkpoints; reading a big one takes time, so it is shown."""
    from bridge.console import RichProgress
    from harness.report.digests import identity, megatron_files, weight_files

    found = {}
    for name, subject in subjects.items():
        if subject.hf is None:
            continue
        paths = [*weight_files(subject.hf), *megatron_files(subject.megatron)]
        total = sum(path.stat().st_size for path in paths)
        with RichProgress().phase(f"hashing {name}", total) as advance:
            found[name] = identity(subject.hf, subject.megatron, advance=advance)
    return found


def _toys(cases: Sequence[Case], bench: Bench) -> dict[str, dict[str, Any]]:
    """What identifies the toys that were written, by name and dtype."""
    from harness.report.digests import identity

    toys = {f"{one.model}/{one.dtype}": one for one in cases if one.model not in bench.subjects}
    return {name: identity(bench.checkpoint(case)) for name, case in toys.items()}


def _identity(
    cases: Sequence[Case],
    subjects: Mapping[str, Subject],
    suite: str | None,
    inputs: Mapping[str, Any],
    thresholds: Thresholds,
) -> dict[str, Any]:
    """What a run must share with the one it resumes. Toys are code."""
    from harness.report.digests import code_sha256, digest_of
    from harness.report.evidence import thresholds_as_data, versions

    return {
        "suite": suite,
        "cases": sorted(case.id for case in cases),
        "code": code_sha256(),
        "thresholds": digest_of(thresholds_as_data(thresholds)),
        "inputs": inputs,
        "options": {name: _options(subject) for name, subject in subjects.items()},
        "gpus": _gpus(cases),
        # How many threads there are moves the order of sums, not what is judged.
        "versions": {name: one for name, one in versions().items() if name != "num_threads"},
    }


def _gpus(cases: Sequence[Case]) -> list[str]:
    """The kinds of card that cases are run on, if any is."""
    from harness.report.machine import hardware

    if all(case.device == "cpu" for case in cases):
        return []
    return sorted(set(hardware()["gpus"]))


def _options(subject: Subject) -> dict[str, Any]:
    """How a model is looked at: its fields but for the checkpoints, which have digests."""
    from harness.report.digests import sha256_of

    found: dict[str, Any] = {}
    for field in dataclasses.fields(subject):
        value = getattr(subject, field.name)
        if field.name in ("hf", "megatron"):
            continue
        is_file = isinstance(value, Path) and value.is_file()
        found[field.name] = sha256_of(value) if is_file else str(value)
    return found


def _provenance(
    *,
    suite: str | None,
    started: str,
    inputs: Mapping[str, Mapping[str, Any]],
    thresholds: Thresholds,
    memory: Mapping[str, int],
    resumed_cases: int,
    products: Mapping[str, float],
) -> Provenance:
    from harness.report.digests import code_sha256
    from harness.report.evidence import Provenance, versions
    from harness.report.machine import hardware
    from harness.torchrun.lead import torchrun_ranks

    ranks = torchrun_ranks()
    return Provenance(
        command=["nemotron-bridge", *sys.argv[1:]],  # what can be typed again, wherever it lies
        suite=suite,
        started=started,
        inputs=inputs,
        environment=versions(),
        hardware=hardware()
        | ({"float32_product_ulp": dict(products)} if products else {})
        | ({} if ranks is None else {"ranks_per_host": ranks.per_host}),
        code_sha256=code_sha256(),
        thresholds=thresholds,
        memory=memory,
        resumed_cases=resumed_cases,
    )
