"""What evidence comes to, recomputed from what was measured and from the shipped limits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, get_args

from harness.block_states import FORCED_EXCESS, FREE_EXCESS, REFERENCE_ERROR
from harness.checks.generation import LOG_PROBABILITY
from harness.checks.gradients import EXCESS as GRADIENTS_EXCESS
from harness.checks.rope import ROTATION
from harness.metrics import ulp_of_one
from harness.report.evidence import result_from_data
from harness.runner import RunReport, Status
from harness.thresholds import EXCESS, Thresholds
from harness.thresholds import REFERENCE_ERROR as LOGITS_REFERENCE

Data = Mapping[str, Any]
_MEASURED: Final = {
    "logits": EXCESS,
    "blocks": FORCED_EXCESS,
    "gradients": GRADIENTS_EXCESS,
    "generation": LOG_PROBABILITY,
    "rope": ROTATION,
}
"""The quantity whose value a passed case states; all other checks are exact."""
_CLOSE: Final = 1e-9
"""Relative; evidence keeps doubles, and a quotient may be taken in another order."""


def overall(data: Data, matrix: Data) -> tuple[str, int]:
    """The verdict on cases and faults together, and the exit code that says it.

    Args:
        data: Evidence; its own verdict is not looked at.
        matrix: The kill matrix.
    """
    report = report_of(data)
    code = report.exit_code
    if report.count("passed") < len(report.results):
        code = code or 3  # whatever was allowed to be left out: what was not run is not proved
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
    value, limit = measured(case.get("value")), measured(case.get("limit"))
    passes = value is not None and limit is not None and value <= limit
    if case["status"] == "passed" and not passes:
        yield (
            f"{place}: passed with a value of {case.get('value')} and a limit of "
            f"{case.get('limit')}"
        )
    if case["status"] == "passed" and "FAILED" in case["summary"]:
        yield f"{place}: passed, and its summary says otherwise"
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
    """What a check may be held to: zero where it is exact, else the limit of what it measures.

    A failed one says which of its quantities was beyond a limit, or that something was not exact.
    """
    dtype, check = case["dtype"], case["check"]
    if case["status"] == "failed":
        return {0, 2 * limits.get(EXCESS, dtype).limit} | _named(f"{check}.", limits, dtype)
    match check:
        case "layouts" if "-pp1" not in case["layout"]:
            return {0}  # a pipeline changes no bit
        case "layouts":
            return {2 * limits.get(EXCESS, dtype).limit}  # two sums, each as far off as that
        case _ if check in _MEASURED:
            return {limits.get(_MEASURED[check], dtype).limit}
        case _:
            return {0}


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
            value = measured(row[key])
            if value is None or not value <= most:
                yield f"{case['id']}: block {row['layer_idx']} has {key} {row[key]}, limit {most:g}"
    forced = [measured(row["teacher_excess"]) for row in rows]
    worst = max((math.inf if one is None else one for one in forced), default=math.inf)
    if not _close(worst, case["value"]):
        yield f"{case['id']}: the value is {case['value']}, the worst of its blocks {worst}"


def _logit_problems(case: Data, limits: Thresholds) -> Iterator[str]:
    details, dtype = case["details"], case["dtype"]
    ours, theirs, scale = (
        measured(details.get(name)) for name in ("candidate_error", "reference_error", "oracle_rms")
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


def measured(value: object) -> float | None:
    """A value as a check measures one: a number, finite, zero or more; None of anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and value >= 0 else None


def _close(a: float, b: object) -> bool:
    value = measured(b)
    return value is not None and math.isclose(a, value, rel_tol=_CLOSE)
