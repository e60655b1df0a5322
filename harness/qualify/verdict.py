"""What evidence comes to, recomputed from what was measured and from the shipped limits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, get_args

from harness.block_states import FORCED_EXCESS, FREE_EXCESS, REFERENCE_ERROR
from harness.metrics import ulp_of_one
from harness.report.evidence import number, result_from_data
from harness.runner import RunReport, Status
from harness.thresholds import EXCESS, Thresholds
from harness.thresholds import REFERENCE_ERROR as LOGITS_REFERENCE

Data = Mapping[str, Any]
_CLOSE: Final = 1e-9
"""Relative; evidence keeps doubles, and a quotient may be taken in another order."""


def overall(data: Data, matrix: Data) -> tuple[str, int]:
    """The verdict on cases and faults together, and the exit code that says it.

    Args:
        data: Evidence; its own verdict is not looked at.
        matrix: The kill matrix.
    """
    code = report_of(data).exit_code
    if matrix["problems"] or code == 1:
        return "failed", 1
    if code or data["qualification"]["scope"]["fault_patterns"] or not matrix["faults"]:
        return "incomplete", 3
    return "passed", 0


def report_of(data: Data) -> RunReport:
    """The run again, from its cases."""
    return RunReport(
        results=[result_from_data(case) for case in data["cases"]],
        seconds=data["seconds"],
        allowed_not_run=set(data["allowed_not_run"]),
    )


def fault_counts(matrix: Data) -> dict[str, Any]:
    """What the evidence says of the kill matrix."""
    return {
        "tried": len(matrix["faults"]),
        "killed": len(matrix["faults"]) - len(matrix["survivors"]),
        "survivors": matrix["survivors"],
        "alarms": matrix["alarms"],
        "seconds": matrix["seconds"],
    }


def total_problems(data: Data) -> Iterator[str]:
    """Counts that are not those of the cases."""
    report = report_of(data)
    if data["counts"] != report.count_line:
        yield f"counts: {data['counts']!r}, the cases say {report.count_line!r}"
    for status in get_args(Status):
        said, found = data["totals"][status], report.count(status)
        if said != found:
            yield f"totals: {said} {status}, the cases say {found}"


def case_problems(case: Data, limits: Thresholds, blocks: Sequence[int]) -> Iterator[str]:
    """Everything about a case that its own numbers, or the shipped limits, contradict.

    Args:
        case: Of the evidence.
        limits: Those that are shipped, for the width of the case's model.
        blocks: Layer indices of which a check of blocks has to say something.
    """
    place = case["id"]
    if case["status"] not in ("passed", "failed"):
        return
    value, limit = number(case["value"]), number(case["limit"])
    passes = value is not None and limit is not None and math.isfinite(value) and value <= limit
    if case["status"] == "passed" and not passes:
        yield f"{place}: passed with a value of {case['value']} and a limit of {case['limit']}"
    if limit is not None and limit not in _shipped(case, limits):
        yield f"{place}: the limit {limit:g} is not what is shipped for {case['check']}"
    if case["status"] != "passed":
        return
    if case["places"]:
        yield f"{place}: passed, and says where it failed"
    match case["check"]:
        case "blocks":
            yield from _block_problems(case, limits, blocks)
        case "logits":
            yield from _logit_problems(case, limits)
        case _:
            pass


def _shipped(case: Data, limits: Thresholds) -> set[float]:
    """What a check may be held to: zero where it is exact, else limits of its own name."""
    dtype, check = case["dtype"], case["check"]
    excess = limits.get(EXCESS, dtype).limit
    match check:
        case "logits":
            return {excess}
        case "blocks":
            return {limits.get(FORCED_EXCESS, dtype).limit} | (
                set() if case["status"] == "passed" else _named("blocks.", limits, dtype)
            )
        case "layouts":
            return {0, 2 * excess}  # two sums are compared, each of which may be that far off
        case _:
            return {0, *_named(f"{check}.", limits, dtype)}


def _named(prefix: str, limits: Thresholds, dtype: str) -> set[float]:
    return {
        one.limit
        for (name, kind), one in limits.by_key.items()
        if kind == dtype and name.startswith(prefix)
    }


def _block_problems(case: Data, limits: Thresholds, blocks: Sequence[int]) -> Iterator[str]:
    rows = case["details"].get("blocks", ())
    found = [row["layer_idx"] for row in rows]
    if found != [-1, *blocks]:
        yield f"{case['id']}: the embedding and {len(blocks)} blocks are wanted, not {found}"
    for key, name in (
        ("teacher_excess", FORCED_EXCESS),
        ("free_excess", FREE_EXCESS),
        ("reference_error", REFERENCE_ERROR),
    ):
        most = limits.get(name, case["dtype"]).limit
        for row in rows:
            value = row[key]
            if not isinstance(value, int | float) or not value <= most:
                yield f"{case['id']}: block {row['layer_idx']} has {key} {value}, limit {most:g}"
    measured = [row["teacher_excess"] for row in rows]
    worst = max((math.inf if one is None else one for one in measured), default=math.inf)
    if not _close(worst, case["value"]):
        yield f"{case['id']}: the value is {case['value']}, the worst of its blocks {worst}"


def _logit_problems(case: Data, limits: Thresholds) -> Iterator[str]:
    details, dtype = case["details"], case["dtype"]
    ours, theirs, scale = (
        number(details.get(name)) for name in ("candidate_error", "reference_error", "oracle_rms")
    )
    if ours is None or theirs is None or scale is None or not scale > 0:
        yield f"{case['id']}: the errors that its value is made of are missing"
        return
    excess = limits.get(EXCESS, dtype)
    value = ours / max(theirs, excess.floor * scale)
    if not _close(value, case["value"]):
        yield f"{case['id']}: the value is {case['value']}, its errors make it {value}"
    on_reference = limits.get(LOGITS_REFERENCE, dtype)
    if not theirs / scale / ulp_of_one(dtype) <= on_reference.limit:
        yield f"{case['id']}: the reference itself is beyond its limit {on_reference.limit:g}"
    if excess.verdict(float(case["value"])).describe() not in case["summary"]:
        yield f"{case['id']}: the summary does not say value and limit"


def _close(a: float, b: object) -> bool:
    value = number(b)
    return value is not None and math.isclose(a, value, rel_tol=_CLOSE)
