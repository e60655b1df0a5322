"""What a campaign came to: tables for people, one document for machines."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bridge.console import table
from harness.torture.campaign import Campaign, num_kills
from harness.torture.faults import Fault
from harness.torture.scenarios import State
from harness.torture.soak import RSS_LIMIT, Soak
from harness.torture.trials import Outcome, role

SCHEMA_VERSION: Final = 1
_SHOWN: Final = 3
"""Trials that are named for one thing that is wrong."""
_STATES: Final[Sequence[State]] = ("absent", "old", "complete", "wrong")


class _Hit(NamedTuple):
    """One fault that happened, and what came of it."""

    fault: Fault
    call: str
    state: State
    outcome: Outcome


def document(campaign: Campaign, **about: Any) -> dict[str, Any]:  # noqa: ANN401 - plain data
    """Everything, as plain data; `about` says how and where it was run."""
    order = campaign.order
    return {
        "schema_version": SCHEMA_VERSION,
        **about,
        "passed": campaign.passed,
        "order": {
            "parts": list(order.parts), "seed": order.seed, "kills": order.kills,
            "errors": order.errors, "conversions": order.conversions,
            "scenarios": list(order.scenarios),
        },
        "summary": summary(campaign),
        "problems": list(campaign.problems),
        "left_out": list(campaign.left_out),
        "trials": [one.to_dict() for one in campaign.outcomes],
        "soak": None if campaign.soak is None else campaign.soak.to_dict(),
    }  # fmt: skip


def summary(campaign: Campaign) -> dict[str, Any]:
    """The figures that the promises are about."""
    hits = _hits(campaign.outcomes)
    killed = [hit for hit in hits if hit.fault.kills]
    failed = [hit for hit in hits if not hit.fault.kills]
    ended = [one for one in campaign.outcomes if one.trial.faults]
    return {
        "kills": num_kills(campaign.outcomes),
        "killed_runs_by_state": dict(Counter(hit.state for hit in killed)),
        "errors": len(failed),
        "errors_told": sum(bool(hit.outcome.errors) for hit in failed),
        "errors_survived": sum(_code_of(hit) == 0 for hit in failed),
        "codes": dict(Counter(code for one in campaign.outcomes for code in one.errors)),
        "trials": len(campaign.outcomes),
        "not_reached": sum(not struck for one in campaign.outcomes for struck in one.struck),
        "resumed": len(ended),
        "resumed_to_identical_bytes": sum(
            one.states[-1] == "complete" and one.codes[-1] == 0 for one in ended
        ),
        "trials_with_problems": sum(bool(one.problems) for one in campaign.outcomes),
    }


def render(campaign: Campaign) -> RenderableType:
    """The tables, what was found, and one line that counts."""
    hits = _hits(campaign.outcomes)
    killed = [hit for hit in hits if hit.fault.kills]
    failed = [hit for hit in hits if not hit.fault.kills]
    parts: list[RenderableType] = []
    if killed:
        parts += [_by_call(killed), ""]
    if failed:
        parts += [_by_error(failed), ""]
    if campaign.soak is not None:
        parts += [_soak(campaign.soak), ""]
    parts += [Text(f"left out: {what}") for what in campaign.left_out]
    parts += _problems(campaign)
    style = "bold green" if campaign.passed else "bold red"
    parts.append(Text(count_line(campaign), style=style))
    return Group(*parts)


def count_line(campaign: Campaign) -> str:
    """All of it in a line."""
    figures = summary(campaign)
    found = []
    if figures["kills"]:
        wrong = figures["killed_runs_by_state"].get("wrong", 0)
        found.append(f"{figures['kills']} kills, {wrong} wrong or half-valid targets")
    if figures["errors"]:
        found.append(f"{figures['errors']} errors, {figures['errors_told']} told with a code, "
                     f"{figures['errors_survived']} survived")  # fmt: skip
    if figures["resumed"]:
        found.append(f"{figures['resumed_to_identical_bytes']} of {figures['resumed']} trials "
                     "resumed to identical bytes")  # fmt: skip
    if campaign.soak is not None:
        found.append(f"{campaign.soak.conversions} conversions in one process")
    bad = figures["trials_with_problems"]
    problems = len(campaign.problems) + (len(campaign.soak.problems) if campaign.soak else 0)
    found.append(f"{bad} trials with problems" + (f", {problems} others" if problems else ""))
    return "; ".join(found)


def _hits(outcomes: Iterable[Outcome]) -> list[_Hit]:
    return [
        _Hit(fault, call, state, one)
        for one in outcomes
        for fault, call, state in zip(one.trial.faults, one.struck, one.states, strict=False)
        if call
    ]


def _code_of(hit: _Hit) -> int | None:
    return hit.outcome.codes[hit.outcome.trial.faults.index(hit.fault)]


def _by_call(hits: Sequence[_Hit]) -> Table:
    """A row for each call that processes were killed at, or word for who was."""
    found = table("killed at", "kills", *_STATES, "resumed", right=("kills", *_STATES, "resumed"))
    groups: dict[str, list[_Hit]] = {}
    for hit in hits:
        name = hit.call if hit.fault.on == "t" else hit.call.partition(" ")[0]
        groups.setdefault(name, []).append(hit)
    rows = sorted(groups.items(), key=lambda row: (row[0].startswith("SIGKILL"), -len(row[1])))
    for name, mine in (*rows, ("all", hits)):
        states = Counter(hit.state for hit in mine)
        resumed = sum(hit.outcome.states[-1] == "complete" for hit in mine)
        found.add_row(name, str(len(mine)), *(str(states[state]) for state in _STATES),
                      str(resumed))  # fmt: skip
    return found


def _by_error(hits: Sequence[_Hit]) -> Table:
    """A row for each error: how often, in how many calls, and what came of it."""
    columns = ("times", "calls", "told", "survived", *_STATES)
    found = table("error", *columns, "codes", right=columns)
    groups: dict[str, list[_Hit]] = {}
    for hit in hits:
        name = hit.call if hit.fault.on == "d" else hit.fault.how
        name += " from then on" if hit.fault.lasting else ""
        groups.setdefault(name, []).append(hit)
    for name, mine in (*sorted(groups.items()), ("all", hits)):
        states = Counter(hit.state for hit in mine)
        codes = Counter(code for hit in mine for code in hit.outcome.errors)
        survived = sum(_code_of(hit) == 0 for hit in mine)
        found.add_row(
            name, str(len(mine)), str(len({hit.call for hit in mine})), str(len(mine) - survived),
            str(survived), *(str(states[state]) for state in _STATES), _counted(codes),
        )  # fmt: skip
    return found


def _counted(codes: Mapping[str, int]) -> str:
    return ", ".join(f"{code} x {count}" for code, count in sorted(codes.items()))


def _soak(soak: Soak) -> Table:
    found = table("soak", "found", "limit", right=("found", "limit"))
    slope = "too short to say" if soak.rss_slope is None else f"{soak.rss_slope / 1024:.1f}"
    found.add_row("KiB of memory left per conversion", slope, f"{RSS_LIMIT / 1024:.0f}")
    for name, count in soak.growth.items():
        found.add_row(f"{name}, last less settled", str(count), "0")
    return found


def _problems(campaign: Campaign) -> list[RenderableType]:
    """Each thing that is wrong, once, with the trials that show it."""
    groups: dict[str, list[tuple[str, Outcome]]] = {}
    for one in campaign.outcomes:
        for what in one.problems:
            groups.setdefault(role(what), []).append((what, one))
    lines: list[RenderableType] = []
    for found in groups.values():
        lines.append(Text(f"WRONG in {len(found)} trials: {found[0][0]}", style="bold red"))
        for _, one in found[:_SHOWN]:
            lines += [Text(f"  at {call}") for call in one.struck if call]
            lines.append(Text(f"  nemotron-bridge torture --replay {shlex.quote(one.trial.id)}"))
        if len(found) > _SHOWN:
            lines.append(Text(f"  ... and {len(found) - _SHOWN} more"))
    others = [*campaign.problems, *(campaign.soak.problems if campaign.soak else ())]
    lines += [Text(f"WRONG {what}", style="bold red") for what in others]
    return [*lines, ""] if lines else []
