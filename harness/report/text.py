"""A run as text: one row per model, then every failure with its place, then the count."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from bridge.console import table
from bridge.visible import visible
from harness.checks import CHECKS
from harness.runner import Result, RunReport

_JUDGED = "logits"
"""The check whose value is worth a table of its own: the excess error."""


def render(report: RunReport) -> RenderableType:
    """The tables, the failures and the count line."""
    parts: list[RenderableType] = [_by_check(report.results)]
    excess = _by_layout(report.results)
    if excess is not None:
        parts += ["", "worst excess error of the logits, by layout (reference = 1)", excess]
    parts += ["", *_failures(report.results)]
    style = "bold green" if report.exit_code == 0 else "bold red"
    parts.append(Text(f"{report.count_line} in {report.seconds:.0f} s", style=style))
    return Group(*parts)


def print_report(report: RunReport, console: Console) -> None:
    """Write it to a console; plain text where that is not a terminal."""
    console.print(render(report))


def progress_line(result: Result) -> str:
    """One line for a case that has just ended."""
    return visible(
        f"{result.status:>7} {result.case.id}: {result.summary} ({result.seconds:.1f} s)"
    )


def _by_check(results: Sequence[Result]) -> Table:
    checks = [name for name in CHECKS if any(result.case.check == name for result in results)]
    found = table("model", *checks)
    for model in _models(results):
        cells = []
        for check in checks:
            mine = [one for one in results if (one.case.model, one.case.check) == (model, check)]
            cells.append(_cell(mine))
        # A name is no markup and no emoji code, whatever it looks like.
        found.add_row(Text(model), *cells)
    return found


def _cell(results: Sequence[Result]) -> Text:
    """`7/7`, or how it went wrong."""
    if not results:
        return Text("-", style="dim")
    passed = sum(result.status == "passed" for result in results)
    text = f"{passed}/{len(results)}"
    if any(result.status in ("failed", "error") for result in results):
        word = "FAILED" if any(result.status == "failed" for result in results) else "ERROR"
        return Text(f"{text} {word}", style="bold red")
    if passed < len(results):
        return Text(f"{text} not run", style="yellow")
    return Text(text, style="green")


def _by_layout(results: Sequence[Result]) -> Table | None:
    judged = [one for one in results if one.case.check == _JUDGED and one.case.layout]
    if not judged:
        return None
    layouts = list(dict.fromkeys(one.case.layout for one in judged))
    found = table("model", *(str(layout) for layout in layouts))
    for model in _models(judged):
        cells = []
        for layout in layouts:
            mine = [one for one in judged if (one.case.model, one.case.layout) == (model, layout)]
            cells.append(_worst(mine))
        found.add_row(Text(model), *cells)
    return found


def _worst(results: Sequence[Result]) -> Text:
    values = [one.finding.value for one in results if one.finding and one.finding.value is not None]
    if not values:
        return Text("-", style="dim")
    worst = max(values, key=lambda value: math.inf if math.isnan(value) else value)
    text = "not measured" if math.isnan(worst) else f"{worst:.3g}"
    good = all(result.status == "passed" for result in results)
    return Text(text, style="green" if good else "bold red")


def _failures(results: Sequence[Result]) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for result in results:
        if result.status == "failed" and result.finding is not None:
            lines.append(Text(f"FAILED {result.case.id}", style="bold red"))
            lines.append(f"  {result.finding.summary}")
            lines += [
                f"  --> {place}"
                for place in result.finding.places
                if place not in result.finding.summary
            ]
        elif result.status == "error":
            lines.append(Text(f"ERROR {result.case.id}", style="bold red"))
            lines += [f"  {line}" for line in (result.traceback or result.reason).splitlines()]
    lines += _left_out(results)
    if lines:
        lines.append("")
    # A tensor's name in one of them is one line, whatever is in it.
    return [line if isinstance(line, Text) else Text(visible(str(line))) for line in lines]


def _left_out(results: Iterable[Result]) -> list[RenderableType]:
    """Each explanation of why cases did not run, once, with the checks that it is for."""
    told: dict[str, list[str]] = {}
    for result in results:
        if result.status == "not run" and result.traceback:
            told.setdefault(result.traceback, []).append(result.case.check)
    lines: list[RenderableType] = []
    for text, checks in told.items():
        first, *rest = text.splitlines()
        lines.append(f"not run: {', '.join(dict.fromkeys(checks))}: {first}")
        lines += [f"  {line}" for line in rest]
    return lines


def _models(results: Iterable[Result]) -> list[str]:
    return list(dict.fromkeys(result.case.model for result in results))
