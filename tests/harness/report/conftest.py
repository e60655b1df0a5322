"""Runs that nobody ran, with every kind of outcome."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from harness.compare import Finding
from harness.report.evidence import Provenance, evidence
from harness.runner import Result, RunReport
from harness.suite import Case
from harness.thresholds import load_thresholds

POSITIONS = [0, 1, 64, 8192, 131071]
HOSTILE = '<script>alert("x")</script> & `code` | {{ 7 * 7 }}'
"""What must come out of every report as text."""


def result(case: Case, status: str = "passed", **fields: Any) -> Result:  # noqa: ANN401 - see Finding
    """A case with a finding."""
    finding = {"passed": status == "passed", "summary": f"{case.id} {status}", **fields}
    return Result(case=case, status=status, finding=Finding(**finding), seconds=0.25)  # type: ignore[arg-type]  # a Status


def logits_case(model: str, layout: str, status: str, value: float) -> Result:
    """A judged logits case, with what the report draws."""
    by_position: dict[str, list[float]] = {
        "positions": list(POSITIONS),
        "candidate_error": [value * 1e-7 * (1 + place) for place in range(5)],
        "reference_error": [1e-7 * (1 + place) for place in range(5)],
        "max_abs_diff": [0.0, 1e-7, 2e-7, 3e-7, 5e-7],
        "kl": [0.0, 1e-14, 2e-14, 1e-13, 1e-12],
        "top1": [1.0, 1.0, 1.0, 1.0, 0.5],
        "top5": [1.0, 1.0, 0.8, 1.0, 0.6],
    }
    return result(
        Case(check="logits", model=model, dtype="float32", layout=layout, probe="long"),
        status,
        value=value,
        limit=2.0,
        unit="times the reference's own error",
        places=("token 4",) if status == "failed" else (),
        details={
            "by_position": by_position,
            "ulp_histogram": {"0": 10, "0.5": 0, "1": 420, "inf": 3},
        },
    )


def blocks_case(model: str) -> Result:
    """Every kind of block."""
    kinds = ["embedding", "attention + mlp", "no-op + mlp", "linear + mlp", "no-op + no-op"]
    rows = [
        {"layer_idx": n - 1, "kind": kind, "teacher_excess": 0.9 + n / 10, "free_excess": 1.0 + n}
        for n, kind in enumerate(kinds)
    ]
    return result(
        Case(check="blocks", model=model, dtype="float32", layout="tp1-pp1", probe="short"),
        value=1.3, limit=2.0, unit="times", details={"blocks": rows},
    )  # fmt: skip


def results() -> list[Result]:
    """Passed, failed, NaN, error and not run."""
    config = Case(check="config", model="tied", dtype="float32")
    return [
        result(config),
        logits_case("tied", "tp1-pp1", "passed", 0.97),
        logits_case("tied", "tp2-pp1", "failed", 37.5),
        logits_case("puzzle", "tp1-pp1", "passed", 1.2),
        logits_case("puzzle", "tp2-pp1", "failed", math.nan),
        blocks_case("tied"),
        Result(
            case=Case(check="config", model="puzzle", dtype="float32"), status="error",
            reason=f"ValueError: {HOSTILE}", traceback=f"Traceback\n\x1b[31m{HOSTILE}", seconds=2.0,
        ),
        Result(
            case=Case(check="config", model="tied", dtype="float32", device="cuda"),
            status="not run", reason="gpu",
        ),
    ]  # fmt: skip


def evidence_of(found: list[Result], **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - Provenance's
    """Evidence of a run with these results."""
    provenance: dict[str, Any] = {
        "command": ["nemotron-bridge", "parity", "--select", HOSTILE],
        "suite": "parity",
        "started": "2026-01-02T03:04:05+00:00",
        "inputs": {
            "tied/float32": {
                "config_sha256": "0" * 64,
                "weight_files": {"model.safetensors": {"bytes": 12345, "sha256": "a" * 64}},
            }
        },
        "environment": {"nemotron-bridge": "1", "python": "3.11", "versions": {"torch": "2.6"}},
        "hardware": {"cpu": "A CPU", "cores": 2, "memory_bytes": 8 << 30, "gpus": []},
        "code_sha256": "b" * 64,
        "thresholds": load_thresholds(),
        "memory": {"main_bytes": 1 << 30, "largest_rank_bytes": 3 << 29},
        **changes,
    }
    report = RunReport(results=found, seconds=12.5)
    return evidence(report, Provenance(**provenance))


@pytest.fixture
def run_results() -> list[Result]:
    """Results of every status."""
    return results()


@pytest.fixture
def make_evidence() -> Callable[..., dict[str, Any]]:
    """Evidence of given results, or of those of every status."""

    def make(found: list[Result] | None = None, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - Provenance's
        return evidence_of(results() if found is None else found, **changes)

    return make


@pytest.fixture
def kill_matrix() -> dict[str, Any]:
    """As `nemotron-bridge faults --json` prints it; one survivor, one idle check."""
    return {
        "faults": ["swapped-heads", "wrong-eps", "no-scaling"],
        "checks": ["placement", "logits", "golden"],
        "killed_by": {"swapped-heads": ["placement", "logits"], "wrong-eps": ["logits"]},
        "survivors": ["no-scaling"],
        "families": {"swapped-heads": "mapping", "wrong-eps": "norms", "no-scaling": "rope"},
        "stands_for": {"wrong-eps": HOSTILE},
    }
