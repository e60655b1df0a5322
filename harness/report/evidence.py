"""A run as data: inputs, versions, and every case with value, limit and verdict."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from harness.runner import Result, RunReport

SCHEMA_VERSION: Final = 1


def evidence(
    report: RunReport,
    *,
    command: Sequence[str],
    suite: str | None,
    inputs: Mapping[str, Mapping[str, Any]],
    versions: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything a reader needs to believe, or repeat, a run.

    Args:
        report: The results.
        command: As it was typed.
        suite: Name of the suite, if one was run.
        inputs: Model name to what identifies it.
        versions: Of packages and of the machine.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": {0: "passed", 1: "failed"}.get(report.exit_code, "incomplete"),
        "counts": report.count_line,
        "seconds": round(report.seconds, 3),
        "command": list(command),
        "suite": suite,
        "environment": dict(versions),
        "inputs": {name: dict(found) for name, found in inputs.items()},
        "cases": [_case(result) for result in report.results],
    }


def _case(result: Result) -> dict[str, Any]:
    case, finding = result.case, result.finding
    found: dict[str, Any] = {
        "id": case.id,
        "check": case.check,
        "model": case.model,
        "layout": case.layout,
        "dtype": case.dtype,
        "probe": case.probe,
        "device": case.device,
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


def to_json(data: Mapping[str, Any]) -> str:
    """Evidence as one strict JSON document; NaN and infinity become strings."""
    return json.dumps(_strict(data), indent=2, allow_nan=False, default=str) + "\n"


def _strict(value: Any) -> Any:  # noqa: ANN401 - JSON in, JSON out
    if isinstance(value, Mapping):
        return {str(key): _strict(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def identity(checkpoint: Path) -> dict[str, Any]:
    """What identifies a checkpoint directory: sha256 of `config.json`, sizes of its weight files.

    Weights are compared element by element by the checks; hashing them all here would read a
    500 GB model once more.
    """
    config = (checkpoint / "config.json").read_bytes()
    return {
        "config_sha256": hashlib.sha256(config).hexdigest(),
        "weight_files": {
            path.name: path.stat().st_size for path in sorted(checkpoint.glob("*.safetensors"))
        },
    }


def versions() -> dict[str, Any]:
    """What a run was made with, for the evidence."""
    from bridge import __version__
    from bridge.platform import describe

    return {"nemotron-bridge": __version__, **describe()}
