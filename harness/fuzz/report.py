"""What a run has found, for people, for machines, and for whoever mends it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Group, RenderableType
from rich.text import Text

from bridge.console import table
from bridge.outputs import write_atomically
from harness.fuzz.results import Finding, FuzzReport
from harness.report.files import writing_into

if TYPE_CHECKING:
    from rich.table import Table

DIRECTORY: Final = "findings"
FILE_NAME: Final = "fuzz.json"


def as_data(report: FuzzReport) -> dict[str, Any]:
    """For machines."""
    return {
        "verdict": verdict(report),
        "seed": report.seed,
        "inputs": report.inputs,
        "payloads": report.payloads,
        "payloads_ran": report.payloads_ran,
        "num_findings": report.num_findings,
        "seconds": round(report.seconds, 1),
        "kinds": {
            name: {
                "inputs": tally.inputs,
                "accepted": tally.accepted,
                "refused": dict(sorted(tally.refused.items())),
                "payloads": tally.payloads,
                "findings": tally.findings,
                "worst_seconds": round(tally.worst_seconds, 3),
                "seconds": round(tally.seconds, 1),
                "peak_bytes": tally.peak_bytes,
            }
            for name, tally in report.by_kind.items()
        },
        "findings": [
            {
                "id": one.id,
                "problem": one.outcome.problem,
                "place": one.outcome.place,
                "seconds": round(one.outcome.seconds, 3),
                "nbytes": len(one.data),
                "details": one.outcome.details,
            }
            for one in report.findings
        ],
    }


def verdict(report: FuzzReport) -> str:
    """One word."""
    if report.num_findings:
        return "failed"
    whole = all(tally.inputs == tally.wanted for tally in report.by_kind.values())
    return "passed" if whole and not report.interrupted else "incomplete"


def as_text(report: FuzzReport) -> RenderableType:
    """For people: a row for each kind, then what was found."""
    rows = _rows(report)
    found = [
        Text(f"{one.id}: {one.outcome.problem} at {one.outcome.place}", style="red")
        for one in report.findings
    ]
    ended = ", ended early" if report.interrupted else ""
    last = (
        f"{report.inputs:,} inputs of {len(report.by_kind)} kinds in {report.seconds:.0f} s"
        f"{ended}: {report.num_findings} findings; {report.payloads:,} held a payload, "
        f"{report.payloads_ran or 'none'} ran"
    )
    style = {"passed": "bold green", "failed": "bold red"}.get(verdict(report), "bold")
    return Group(rows, *found, Text(""), Text(last, style=style))


def _rows(report: FuzzReport) -> Table:
    right = ("inputs", "accepted", "refused", "findings", "worst", "peak")
    rows = table("kind", *right[:3], "by code", *right[3:], right=right)
    for name, tally in report.by_kind.items():
        codes = sorted(tally.refused.items(), key=lambda pair: -pair[1])
        rows.add_row(
            Text(name),
            f"{tally.inputs:,}",
            f"{tally.accepted:,}",
            f"{sum(tally.refused.values()):,}",
            " ".join(f"{code} {count}" for code, count in codes),
            Text(str(tally.findings), style="bold red" if tally.findings else ""),
            f"{tally.worst_seconds:.2f} s",
            f"{tally.peak_bytes >> 20} MiB",
        )
    return rows


def write(report: FuzzReport, directory: Path) -> None:
    """Write the results as JSON, and the bytes of each finding.

    Raises:
        UsageError: BR001, the system refuses.
    """
    with writing_into(directory):
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / FILE_NAME, json.dumps(as_data(report), indent=1) + "\n")
        for one in report.findings:
            save(one, directory)


def save(finding: Finding, directory: Path) -> Path:
    """Keep an input; where it is."""
    place = directory / DIRECTORY
    place.mkdir(exist_ok=True, parents=True)
    path = place / finding.id.replace(":", "-")
    path.write_bytes(finding.data)
    return path
