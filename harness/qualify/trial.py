"""Every fault of the catalogue on the twin: the kill matrix of this architecture.

A fault is dead when a check has failed over it; two are waited for, and with `--full` every check.
Each unit is on the disk before the next one ends, so a trial that was killed goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.bench import Subject
from harness.errors import ResumeError
from harness.faults.journal import UnitJournal
from harness.faults.matrix import ENOUGH, run_matrix
from harness.faults.units import Matrix, Unit, unit_from_data
from harness.qualify.scope import Scope
from harness.report.digests import code_sha256, digest_of
from harness.report.progress import CountProgress
from harness.verification import CHECK_NAMES


def run_trial(
    scope: Scope,
    subjects: Mapping[str, Subject],
    directory: Path,
    *,
    resume: bool,
    workers: int | None,
    timeout: float,
) -> dict[str, Any]:
    """Try every fault; the matrix as plain data, see `matrix_data`.

    Args:
        scope: What is tried on what.
        subjects: The twin's checkpoint among them, by name.
        directory: Of the report; units are kept there as they end.
        resume: Take over units that are kept there, if they are of the same twin and code.
        workers: Processes; None for one per core, at most eight.
        timeout: Seconds that one case may keep ranks busy.
    """
    twin = scope.twin.toy.name
    identity = {
        "code": code_sha256(),
        "twin": digest_of(scope.twin_config),
        "dtype": scope.choices.dtype,
        "device": scope.choices.device,
    }
    with _journal(directory, identity, resume=resume) as journal:
        earlier = [one for one in journal.earlier if one.fault in scope.faults]
        with CountProgress("faults") as progress:

            def on_unit(unit: Unit, total: int) -> None:
                journal.add(unit)
                alive = f"SURVIVED {unit.fault}, {', '.join(unit.checks) or 'nothing'} looked"
                progress.advance(total - len(earlier), unit.fault, "" if unit.killed_by else alive)

            matrix, alarms = run_matrix(
                faults=scope.faults, toys=(twin,), checks=CHECK_NAMES,
                computes=(scope.choices.compute,), workers=workers, timeout=timeout,
                enough_on_first=None if scope.choices.full else ENOUGH,
                subjects={twin: subjects[twin]}, earlier=earlier, on_unit=on_unit,
            )  # fmt: skip
    return matrix_data([one.to_dict() for one in matrix.units], scope, matrix.seconds, alarms)


def matrix_data(
    units: list[dict[str, Any]], scope: Scope, seconds: float, alarms: list[str]
) -> dict[str, Any]:
    """The kill matrix from its units alone, as `nemotron-bridge faults --json` prints one."""
    matrix = Matrix(
        units=[unit_from_data(one) for one in units],
        checks=CHECK_NAMES,
        faults=scope.faults,
        seconds=round(seconds, 1),
    )
    wrong = [f"survived: {name}" for name in matrix.survivors]
    wrong += [f"failed without a fault: {alarm}" for alarm in alarms]
    return matrix.to_dict() | {"alarms": alarms, "problems": wrong, "left_out": []}


def _journal(directory: Path, identity: Mapping[str, Any], *, resume: bool) -> UnitJournal:
    """Of the run's earlier part, if that was this very trial; else a new one."""
    if resume:
        with contextlib.suppress(ResumeError):
            return UnitJournal.resume(directory, identity)
    return UnitJournal.begin(directory, identity)
