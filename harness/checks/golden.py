"""What the bridge makes of a model, against what it made of it when that was put on record."""

from __future__ import annotations

from harness import locations
from harness.bench import Bench
from harness.compare import Finding, exact
from harness.golden.compare import count_values, differences
from harness.golden.observe import entry_name, fields
from harness.golden.store import load_record
from harness.suite import Case


def run(case: Case, bench: Bench) -> Finding:
    """Hold every field to the record."""
    name = entry_name(case.model, case.dtype)
    record = None
    if bench.subject(case.model).hf is None:  # a user's model may be called like a toy
        record = load_record(locations.golden_dir(), name)
    if record is None or record.header.get("dtype") != case.dtype:
        other = "" if record is None else f", only in {record.header.get('dtype')}"
        problem = f"nothing is on record of {case.model} in {case.dtype}{other}"
        return exact([problem], compared=0, what="recorded values")
    observed = {}
    try:
        for field, make in fields(case, bench).items():
            observed[field] = make()
    except Exception as error:  # noqa: BLE001 - a rule that no longer works is a changed rule
        problem = f"{name}: could not be made again: {type(error).__name__}: {error}"
        return exact([problem.splitlines()[0]], compared=len(observed), what="recorded fields")
    problems = [f"{name}: {one}" for one in differences(record.fields, observed)]
    compared = sum(map(count_values, record.fields.values()))
    return exact(problems, compared=compared, what="recorded values", details={"golden": name})
