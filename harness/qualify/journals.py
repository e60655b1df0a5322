"""What was written down case by case, and fault by fault, held against what was made of it.

Both journals are part of the bundle where they are in its directory, and say when and in which
order things ended; a value that was altered afterwards is another in them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from harness.faults.journal import FILE_NAME as FAULTS_NAME
from harness.report.digests import digest_of
from harness.report.journal import FILE_NAME as CASES_NAME

Data = Mapping[str, Any]
_OF_A_CASE: Final = (
    "status", "summary", "seconds", "value", "limit", "unit", "places", "details", "traceback",
)  # fmt: skip


def journal_problems(directory: Path, data: Data, matrix: Data) -> Iterator[str]:
    """Everything in which the journals say something else than evidence and kill matrix.

    Args:
        directory: The bundle.
        data: Evidence.
        matrix: The kill matrix.
    """
    cases, units = _records(directory / CASES_NAME), _records(directory / FAULTS_NAME)
    for name, records in ((CASES_NAME, cases), (FAULTS_NAME, units)):
        if records and records[0]["identity"]["code"] != data["code_sha256"]:
            yield f"{name}: of other code than the evidence"
    if cases:
        yield from _header_problems(cases[0], data)
        ended = {one["result"]["id"]: one["result"] for one in cases[1:]}
        for case in data["cases"]:
            noted = ended.get(case["id"], {})
            if any(noted.get(name) != case.get(name) for name in _OF_A_CASE):
                yield f"{CASES_NAME}: {case['id']} did not end as the evidence says"
    if units:
        tried = {one["fault"]: one for one in units[1:]}
        for unit in matrix["units"]:
            if tried.get(unit["fault"]) != unit:
                yield f"{FAULTS_NAME}: {unit['fault']} did not end as the kill matrix says"


def _header_problems(header: Data, data: Data) -> Iterator[str]:
    """When the run began, its limits and its inputs, as they were when it began."""
    identity = header["identity"]
    if header["started"] != data["started"]:
        yield f"{CASES_NAME}: begun at another time than the evidence says"
    if identity["thresholds"] != digest_of(data["thresholds"]):
        yield f"{CASES_NAME}: of other limits than the evidence"
    for name in sorted(identity["inputs"].keys() | data["inputs"].keys()):
        if identity["inputs"].get(name) != data["inputs"].get(name):
            yield f"{CASES_NAME}: {name} is not the input that the evidence names"


def _records(path: Path) -> list[Any]:
    """The lines of a journal; none where there is no journal, or a link in its place."""
    if path.is_symlink() or not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
