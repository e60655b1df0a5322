"""Two runs against each other: what is new, what changed its verdict, what moved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from rich.console import Group, RenderableType
from rich.text import Text

from bridge.console import table
from bridge.visible import visible
from harness.report.evidence import number, strict
from harness.report.summary import short

Kind = Literal["worse", "better", "moved", "only in a", "only in b", "changed"]
_LEVEL: Final = {"passed": 0, "not run": 1, "error": 2, "failed": 3}
_CONTEXT: Final = ("suite", "code_sha256", "environment", "hardware", "inputs", "thresholds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One difference.

    Args:
        kind: "worse" and "better" are verdicts; "moved" is a value; "only in a" and "only in b" are
            cases; "changed" is what the runs were made from.
        what: Case id, or the name of what the runs were made from.
        a: There.
        b: Here.
        regression: Whether the second run proves less than the first did.
    """

    kind: Kind
    what: str
    a: str
    b: str
    regression: bool = False


def compare_runs(a: Mapping[str, Any], b: Mapping[str, Any], *, ratio: float = 1.5) -> list[Change]:
    """Every difference between two runs, the gravest first.

    A regression is a case whose verdict is worse, one that is no longer there, a value that has
    grown beyond `ratio`, or a limit that was raised: a check that was loosened passes as well.

    Args:
        a: Evidence of the run that is the standard.
        b: Evidence of the run that is held against it.
        ratio: Factor, above 1, by which a value may move before it is told.
    """
    cases_a = {case["id"]: case for case in a["cases"]}
    cases_b = {case["id"]: case for case in b["cases"]}
    found = [
        change
        for name in cases_a.keys() & cases_b.keys()
        if (change := _case(cases_a[name], cases_b[name], ratio)) is not None
    ]
    found += [
        Change(kind="only in a", what=name, a=cases_a[name]["status"], b="-", regression=True)
        for name in cases_a.keys() - cases_b.keys()
    ]
    found += [
        Change(
            kind="only in b", what=name, a="-", b=cases_b[name]["status"],
            regression=cases_b[name]["status"] in ("failed", "error"),
        )
        for name in cases_b.keys() - cases_a.keys()
    ]  # fmt: skip
    found += _context(a, b)
    order = ("worse", "only in a", "moved", "changed", "only in b", "better")
    return sorted(found, key=lambda one: (not one.regression, order.index(one.kind), one.what))


def _case(a: Mapping[str, Any], b: Mapping[str, Any], ratio: float) -> Change | None:
    if a["status"] != b["status"]:
        worse = _LEVEL[b["status"]] > _LEVEL[a["status"]]
        return Change(
            kind="worse" if worse else "better",
            what=a["id"],
            a=a["status"],
            b=f"{b['status']}: {b['summary']}",
            regression=worse,
        )
    before, after = number(a.get("value")), number(b.get("value"))
    if before == after or (_nan(before) and _nan(after)):
        return None
    if before is None or after is None or not _within(before, after, ratio):
        grown = after is not None and (before is None or _nan(after) or after > before)
        return Change(
            kind="moved", what=a["id"], a=short(before),
            b=f"{short(after)} {b.get('unit', '')}".strip(),
            regression=grown,
        )  # fmt: skip
    return None


def _nan(value: float | None) -> bool:
    return value is not None and math.isnan(value)


def _within(before: float, after: float, ratio: float) -> bool:
    """Whether two values are within a factor of each other; a sign or a zero is no factor."""
    if _nan(before) or _nan(after) or before * after <= 0:
        return False
    return 1 / ratio <= after / before <= ratio


def _context(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterable[Change]:
    for name in _CONTEXT:
        flat_a, flat_b = (_flat(name, _keyed(name, one[name])) for one in (a, b))
        for key in {**flat_a, **flat_b}:
            before, after = flat_a.get(key), flat_b.get(key)
            if before != after:
                yield Change(
                    kind="changed", what=key, a=_word(before), b=_word(after),
                    regression=_loosened(key, before, after),
                )  # fmt: skip


def _keyed(name: str, value: Any) -> Any:  # noqa: ANN401 - JSON
    """Limits by name, so that a new one does not shift all others."""
    if name != "thresholds":
        return value
    return {f"{one['name']} ({one['dtype']})": one for one in value}


def _flat(name: str, value: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    """Leaves by path: `inputs > tied/float32 > config_sha256`."""
    if not isinstance(value, Mapping):
        return {name: value}
    found: dict[str, Any] = {}
    for key, one in value.items():
        found |= _flat(f"{name} > {key}", one)
    return found


def _loosened(key: str, before: object, after: object) -> bool:
    """Whether a limit holds less than it did.

    The limit itself or the floor under the error that it is a multiple of was raised, or the width
    from which on it grows was lowered; without one it does not grow.
    """
    if not key.startswith("thresholds > "):
        return False
    was, now = number(before), number(after)
    if key.endswith(" > hidden_size"):
        return now is not None and (was is None or now < was)
    raised = was is not None and now is not None and now > was
    return raised and key.endswith((" > limit", " > floor_ulp"))


def _word(value: object) -> str:
    return "-" if value is None else str(value)


def as_data(changes: Iterable[Change]) -> dict[str, Any]:
    """For machines."""
    listed = list(changes)
    data: dict[str, Any] = strict(
        {
            "verdict": "regressed" if any(one.regression for one in listed) else "no regression",
            "changes": [
                {
                    "kind": one.kind,
                    "what": one.what,
                    "a": one.a,
                    "b": one.b,
                    "regression": one.regression,
                }
                for one in listed
            ],
        }
    )
    return data


def as_text(changes: Iterable[Change]) -> RenderableType:
    """For people: a table, the regressions first, then the count."""
    listed = list(changes)
    if not listed:
        return Text("no difference", style="bold green")
    rows = table("", "what", "a", "b")
    for one in listed:
        style = "bold red" if one.regression else ""
        rows.add_row(
            Text(one.kind, style=style), *(Text(visible(cell)) for cell in (one.what, one.a, one.b))
        )
    regressions = sum(one.regression for one in listed)
    last = Text(
        f"{len(listed)} differences, {regressions} regressions",
        style="bold red" if regressions else "bold green",
    )
    return Group(rows, "", last)
