"""What the Markdown and the HTML report both show of a run, taken from its evidence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from harness.report.evidence import number

_JUDGED: Final = "logits"
"""The check whose value is shown by layout: the excess error."""
_RANK: Final = {"failed": 3, "error": 2, "not run": 1, "passed": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The worst of the cases at one place of a table.

    Args:
        status: Of the worst; None where there is no case.
        value: The largest, NaN being larger than any number; None without one.
        limit: What it is held to.
        cases: How many.
        passed: How many of them passed.
    """

    status: str | None = None
    value: float | None = None
    limit: float | None = None
    cases: int = 0
    passed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Cells by row and column."""

    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[Cell]]


def limit_unit(threshold: Mapping[str, Any]) -> str:
    """The unit of a limit, and up to which width of a model it holds as it stands."""
    unit, width = str(threshold["unit"]), threshold.get("hidden_size")
    return unit if width is None else f"{unit} up to hidden_size {width}"


def cell_of(cases: Sequence[Mapping[str, Any]]) -> Cell:
    """Sum cases up; the worst one is what counts."""
    if not cases:
        return Cell()
    worst = max(cases, key=badness)
    return Cell(
        status=worst["status"],
        value=max((one for case in cases if (one := value_of(case)) is not None), key=_size,
                  default=None),
        limit=number(worst.get("limit")),
        cases=len(cases),
        passed=sum(case["status"] == "passed" for case in cases),
    )  # fmt: skip


def badness(case: Mapping[str, Any]) -> tuple[int, float]:
    """A key that sorts the worst case last: by status, then by value."""
    value = value_of(case)
    return _RANK[case["status"]], -math.inf if value is None else _size(value)


def value_of(case: Mapping[str, Any]) -> float | None:
    """A case's value as a number, NaN included; None where it has none."""
    return number(case.get("value"))


def _size(value: float) -> float:
    return math.inf if math.isnan(value) else value


def grid(cases: Sequence[Mapping[str, Any]], *, columns: str) -> Grid:
    """Models by a field of their cases, in the order in which they come."""
    rows = _distinct(case["model"] for case in cases)
    names = _distinct(case[columns] for case in cases if case[columns] is not None)
    return Grid(
        rows=rows,
        columns=names,
        cells=[
            [
                cell_of([one for one in cases if (one["model"], one[columns]) == (row, name)])
                for name in names
            ]
            for row in rows
        ],
    )


def by_layout(data: Mapping[str, Any]) -> Grid:
    """The worst excess error of the logits, models by layouts; no rows where none was judged."""
    return grid(
        [one for one in data["cases"] if one["check"] == _JUDGED and one["layout"]],
        columns="layout",
    )


def by_check(data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of counts, models by checks."""
    found = grid(data["cases"], columns="check")
    rows = [
        [name, *(counted(cell) for cell in row)]
        for name, row in zip(found.rows, found.cells, strict=True)
    ]
    return ["model", *found.columns], rows


def counted(cell: Cell) -> str:
    """`7/7`, `6/7 FAILED`, or a dash."""
    if cell.status is None:
        return "-"
    text = f"{cell.passed}/{cell.cases}"
    return text if cell.status == "passed" else f"{text} {cell.status.upper()}"


def failures(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Cases that failed, then those that could not be carried out."""
    return [
        case for status in ("failed", "error") for case in data["cases"] if case["status"] == status
    ]


def worst_by_model(
    data: Mapping[str, Any], check: str, detail: str
) -> list[Mapping[str, Any]]:  # fmt: skip
    """For each model the worst case of a check that has a detail: the one worth a picture."""
    cases = [
        one for one in data["cases"] if one["check"] == check and one.get("details", {}).get(detail)
    ]
    return [
        max((one for one in cases if one["model"] == model), key=badness)
        for model in _distinct(one["model"] for one in cases)
    ]


def matrix_rows(data: Mapping[str, Any]) -> list[tuple[str, list[bool]]]:
    """The kill matrix: each fault, and for each check whether it killed it."""
    return [
        (fault, [check in data["killed_by"].get(fault, ()) for check in data["checks"]])
        for fault in data["faults"]
    ]


def short(value: float | None) -> str:
    """Three digits; words for what is none."""
    if value is None:
        return "-"
    return "not measured" if math.isnan(value) else f"{value:.3g}"


def gib(nbytes: float) -> str:
    """Bytes for people."""
    return f"{nbytes / (1 << 30):.2f} GiB"


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
