"""A run as data: inputs, versions, and every case with value, limit and verdict.

The other reports are made from this alone, so nothing can be in one of them that is not here.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np

from bridge.errors import BridgeError, CheckpointError
from bridge.storage.input_files import read_input
from bridge.strict_json import parse_json
from harness.compare import Finding
from harness.errors import EvidenceError
from harness.runner import Result, RunReport, Status
from harness.suite import Case
from harness.thresholds import Thresholds

SCHEMA_VERSION: Final = 2
FILE_NAME: Final = "evidence.json"
_SCHEMA: Final = Path(__file__).with_name("evidence.schema.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a run was made from and on.

    Args:
        command: As it was typed.
        suite: Name of the suite, if one was run.
        started: Time the run began, ISO 8601 with a zone; of the first part of a resumed one.
        inputs: Model name to what identifies it, see `harness.report.digests.identity`.
        environment: Versions of the packages and of the system.
        hardware: See `harness.report.machine.hardware`.
        code_sha256: See `harness.report.digests.code_sha256`.
        thresholds: The limits that were in force.
        memory: See `harness.report.machine.MemoryWatch.peaks`.
        resumed_cases: How many results an earlier, unfinished part of the run had left.
    """

    command: Sequence[str]
    suite: str | None
    started: str
    inputs: Mapping[str, Mapping[str, Any]]
    environment: Mapping[str, Any]
    hardware: Mapping[str, Any]
    code_sha256: str
    thresholds: Thresholds
    memory: Mapping[str, int] = field(default_factory=dict)
    resumed_cases: int = 0


def evidence(report: RunReport, provenance: Provenance) -> dict[str, Any]:
    """Everything a reader needs to believe, or repeat, a run; valid by the published schema."""
    data = {
        "schema_version": SCHEMA_VERSION,
        "verdict": {0: "passed", 1: "failed"}.get(report.exit_code, "incomplete"),
        "counts": report.count_line,
        "totals": {status: report.count(status) for status in get_args(Status)},
        "allowed_not_run": sorted(report.allowed_not_run),
        "started": provenance.started,
        "seconds": round(report.seconds, 3),
        "resumed_cases": provenance.resumed_cases,
        "command": list(provenance.command),
        "suite": provenance.suite,
        "code_sha256": provenance.code_sha256,
        "environment": dict(provenance.environment),
        "hardware": dict(provenance.hardware),
        "memory": dict(provenance.memory),
        "inputs": {name: dict(found) for name, found in provenance.inputs.items()},
        "thresholds": thresholds_as_data(provenance.thresholds),
        "cases": [case_as_data(result) for result in report.results],
    }
    found: dict[str, Any] = strict(data)
    validate(found)
    return found


def thresholds_as_data(thresholds: Thresholds) -> list[dict[str, Any]]:
    """Every limit with the measurement it came from."""
    return [asdict(one) for _, one in sorted(thresholds.by_key.items())]


def case_as_data(result: Result) -> dict[str, Any]:
    """One case, as evidence and journal have it."""
    case, finding = result.case, result.finding
    found: dict[str, Any] = {
        "id": case.id,
        **asdict(case),
        "status": result.status,
        "summary": result.summary,
        "seconds": round(result.seconds, 3),
    }
    if finding is not None:
        found |= {
            "value": finding.value,
            "limit": finding.limit,
            "unit": finding.unit,
            "places": list(finding.places),
            "details": dict(finding.details),
        }
    if result.traceback:
        found["traceback"] = result.traceback
    return found


def result_from_data(data: Mapping[str, Any]) -> Result:
    """The inverse of `case_as_data`, but for NaN in details, which stays a word."""
    finding = None
    if "details" in data:
        finding = Finding(
            passed=data["status"] == "passed",
            summary=data["summary"],
            value=number(data["value"]),
            limit=number(data["limit"]),
            unit=data["unit"],
            places=tuple(data["places"]),
            details=data["details"],
        )
    return Result(
        case=Case(**{name: data[name] for name in Case.__slots__ if name in data}),
        status=data["status"],
        finding=finding,
        reason="" if finding is not None else data["summary"],
        traceback=data.get("traceback", ""),
        seconds=data["seconds"],
    )


def number(value: object) -> float | None:
    """A number of the evidence as one of Python's: "nan" and "inf" are words in strict JSON."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # of an integer beyond any float, as 1e400 is
        return -math.inf if isinstance(value, int) and value < 0 else math.inf


def to_json(data: Mapping[str, Any]) -> str:
    """Evidence as one strict JSON document; NaN and infinity become strings."""
    return json.dumps(strict(data), indent=2, allow_nan=False, default=str) + "\n"


def strict(value: Any) -> Any:  # noqa: ANN401 - JSON in, JSON out
    """The same in what JSON has: string keys, lists, finite numbers."""
    if isinstance(value, Mapping):
        return {str(key): strict(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [strict(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(float(value))
    if isinstance(value, np.generic):
        return strict(value.item())
    return value if isinstance(value, str | int | float | None) else str(value)


@functools.cache
def _validator() -> Any:  # noqa: ANN401 - jsonschema's validators are made at run time
    from jsonschema import Draft202012Validator

    schema = json.loads(_SCHEMA.read_text("utf-8"))
    return Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)


def validate(data: object, *, where: str = "") -> None:
    """Hold evidence against the published schema.

    Raises:
        EvidenceError: HN103, every way in which it does not fit.
    """
    problems = [
        f"{error.json_path}: {error.message[:200]}" for error in _validator().iter_errors(data)
    ]
    if problems:
        raise EvidenceError(
            f"no evidence by schema version {SCHEMA_VERSION}", where=[where, *problems]
        )


def read_evidence(path: Path) -> dict[str, Any]:
    """Read an evidence file, or the one of a report directory.

    Raises:
        EvidenceError: HN103, there is none, or what is there is something else.
    """
    file = path / FILE_NAME if path.is_dir() else path
    try:
        data = parse_json(read_input(file))
    except (OSError, ValueError, RecursionError, CheckpointError) as error:
        raise EvidenceError(
            f"cannot read evidence: {error.message if isinstance(error, BridgeError) else error}",
            where=str(file),
            hint="give an evidence.json, or the directory that --report named",
        ) from None
    validate(data, where=str(file))
    found: dict[str, Any] = data
    return found


def versions() -> dict[str, Any]:
    """What a run was made with, for the evidence."""
    from bridge import __version__
    from bridge.platform import describe

    return {"nemotron-bridge": __version__, **describe()}
