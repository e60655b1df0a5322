"""The evidence of a pytest run, as `verify --report` writes it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.report.digests import code_sha256, identity
from harness.report.evidence import Provenance, evidence, versions
from harness.report.machine import hardware
from harness.report.write import write_reports
from harness.runner import RunReport
from harness.thresholds import load_thresholds


def write_report(
    report: RunReport, directory: Path, *, inputs: Mapping[str, Path], command: Sequence[str]
) -> None:
    """Write every form of the report.

    Args:
        report: All results, of all workers.
        directory: Must exist.
        inputs: Model name to checkpoint; one that is gone by now is named without its hashes.
        command: As it was typed.
    """
    ended = dt.datetime.now(dt.UTC)
    data = evidence(
        report,
        Provenance(
            command=command,
            suite=None,
            started=(ended - dt.timedelta(seconds=report.seconds)).isoformat(timespec="seconds"),
            inputs={name: identity(path) for name, path in inputs.items() if path.is_dir()},
            environment=versions(),
            hardware=hardware(),
            code_sha256=code_sha256(),
            thresholds=load_thresholds(),
        ),
    )
    write_reports(data, directory)
