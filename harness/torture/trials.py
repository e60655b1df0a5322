"""Trials: which there are, and what becomes of one."""

from __future__ import annotations

import math
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from bridge.errors import UsageError
from harness.torture.disk import plenty, room, small_disk
from harness.torture.faults import (
    ERRORS,
    KILLS,
    LASTING,
    SIGNALS,
    TAKES_BYTES,
    Fault,
    answers,
    parse_fault,
)
from harness.torture.judge import Judge
from harness.torture.scenarios import (
    SCENARIOS,
    Ground,
    Prepared,
    Scenario,
    State,
    contents,
)
from harness.torture.store import BUCKET
from harness.torture.warm import Ended, Warm, session_of

Kind = Literal["kill", "error"]

_CHAINED: Final = 0.15
"""The part of the kills after which the next run is killed, too."""
_SIGNALLED: Final = 0.15
"""The part of them that come from outside, at any time."""
_READ: Final = 0.35
"""The part of the errors that reading meets."""
_SETTLED: Final = 0.8
"""Up to which part of a command's time it is killed from outside."""
_ROOMS: Final = (0.02, 0.6, 0.97)
"""Parts of what a target takes that a small disk has room for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A scenario, and what happens to each run of it but the last, which nothing happens to.

    Args:
        scenario: The conversion.
        faults: One for each run. Nothing but a clean run with none.
    """

    scenario: Scenario
    faults: tuple[Fault, ...]

    @property
    def id(self) -> str:
        """What `--replay` takes."""
        return f"{self.scenario.name}/{'+'.join(map(str, self.faults)) or 'clean'}"

    @property
    def kind(self) -> Kind:
        """What its first fault is."""
        return "error" if self.faults and not self.faults[0].kills else "kill"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a trial.

    Args:
        trial: Which.
        struck: The calls that the faults happened to, `fsync out/iter_N/__N_N.distcp`; empty where
            a run ended before its fault.
        states: Of the target, after each run.
        codes: Exit codes of the runs, negative for signals.
        errors: Codes of the errors that were told, `BR300`.
        problems: What is not as promised; none is what we want.
        seconds: It took.
        said: What the runs said on stderr, where there are problems.
    """

    trial: Trial
    struck: tuple[str, ...]
    states: tuple[State, ...]
    codes: tuple[int | None, ...]
    errors: tuple[str, ...]
    problems: tuple[str, ...]
    seconds: float
    said: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "id": self.trial.id,
            "kind": self.trial.kind,
            **{
                name: getattr(self, name)
                for name in ("struck", "states", "codes", "errors", "problems", "seconds", "said")
            },
        }


def parse_trial(text: str) -> Trial:
    """The trial with this id.

    Raises:
        UsageError: BR001, there is none.
    """
    name, _, faults = text.partition("/")
    if name not in SCENARIOS:
        raise UsageError(
            f"no scenario is called {name[:80]!r}",
            where="--replay",
            hint=f"known: {', '.join(SCENARIOS)}",
        )
    parts = [] if faults == "clean" else faults.split("+")
    return Trial(scenario=SCENARIOS[name], faults=tuple(map(parse_fault, parts)))


def kills(prepared: Mapping[str, Prepared], count: int, chance: random.Random) -> list[Trial]:
    """`count` trials that are killed: at calls, at any time, and again while they are resumed."""
    alone = [one for one in prepared.values() if one.scenario.workers == 1]
    several = [one for one in prepared.values() if one.scenario.workers > 1]
    num_signalled = round(count * _SIGNALLED) if several else 0
    num_chained = round(count * _CHAINED)
    found = []
    for number in range(num_signalled):
        one = several[number % len(several)]
        how = SIGNALS[number // len(several) % len(SIGNALS)]
        at = round(chance.uniform(0.05, _SETTLED), 2)
        found.append(Trial(scenario=one.scenario, faults=(Fault(on="t", at=at, how=how),)))
    for one, share in shares(alone, count - num_signalled - num_chained):
        for number, at in enumerate(_spread(one, "w", share, chance)):
            name = [name for kind, name, _ in one.calls if kind == "w"][at - 1]
            hows = [how for how in KILLS if how != "half" or name in TAKES_BYTES]
            fault = Fault(on="w", at=at, how=hows[number % len(hows)])
            found.append(Trial(scenario=one.scenario, faults=(fault,)))
    for one, share in shares(alone, num_chained):
        total = sum(kind == "w" for kind, _, _ in one.calls)
        for number in range(share):
            faults = tuple(
                Fault(on="w", at=chance.randint(1, total), how=chance.choice(KILLS))
                for _ in range(2 + number % 3)
            )
            found.append(Trial(scenario=one.scenario, faults=faults))
    return found


def errors(prepared: Mapping[str, Prepared], count: int, chance: random.Random) -> list[Trial]:
    """`count` trials that are told of an error, each error in turn, at calls that can meet it."""
    alone = [one for one in prepared.values() if one.scenario.workers == 1]
    turns = [(error, lasting) for error in ERRORS for lasting in (False, True)]
    turns = [turn for turn in turns if turn[0] in LASTING or not turn[1]]
    found: list[Trial] = []
    for one, share in shares(alone, count):
        num_read = round(share * _READ)
        places = [("r", at) for at in _spread(one, "r", num_read, chance)]
        places += [("w", at) for at in _spread(one, "w", share - num_read, chance)]
        for kind, at in places:
            name = [name for other, name, _ in one.calls if other == kind][at - 1]
            able = [
                turn for turn in turns
                if answers(name, turn[0]) and not (kind == "r" and turn[0] in {"ENOSPC", "EDQUOT"})
            ]  # fmt: skip
            error, lasting = able[len(found) % len(able)]
            fault = Fault(on="r" if kind == "r" else "w", at=at, how=error, lasting=lasting)
            found.append(Trial(scenario=one.scenario, faults=(fault,)))
    return found


def disks(prepared: Mapping[str, Prepared]) -> list[Trial]:
    """Trials on disks that are too small, by a lot and by a little, for one process and a path."""
    return [
        Trial(scenario=one.scenario, faults=(Fault(on="d", at=part, how="disk"),))
        for one in prepared.values()
        if one.scenario.where == "path" and one.scenario.workers == 1
        for part in _ROOMS
    ]


def shares(among: Sequence[Prepared], count: int) -> Iterable[tuple[Prepared, int]]:
    """Deal a count out evenly."""
    for index, one in enumerate(among):
        yield one, count * (index + 1) // len(among) - count * index // len(among)


def _spread(one: Prepared, kind: str, count: int, chance: random.Random) -> list[int]:
    """Numbers of calls: one of each kind of place first, then evenly over all; all, if they fit."""
    places = [f"{name} {role(path)}" for other, name, path in one.calls if other == kind]
    total = len(places)
    if count >= total:
        return list(range(1, total + 1))
    first: dict[str, list[int]] = {}
    for at, place in enumerate(places, start=1):
        first.setdefault(place, []).append(at)
    chosen = {chance.choice(numbers) for numbers in first.values()}
    most = count * 3 // 4
    if len(chosen) > most:
        chosen = set(chance.sample(sorted(chosen), most))
    others = [at for at in range(1, total + 1) if at not in chosen]
    left = count - len(chosen)
    chosen |= {others[math.floor((turn + chance.random()) * len(others) / left)]
               for turn in range(left)}  # fmt: skip
    return sorted(chosen)


def role(path: str) -> str:
    """A path without what tells one file of a kind from another."""
    return re.sub(r"[0-9a-f]{32}|\d+", "N", re.sub(r"tmp/[^/]+", "tmp/X", path))


def run_trial(trial: Trial, prepared: Prepared, ground: Ground, warm: Warm, name: str) -> Outcome:
    """Run it, and judge what it leaves after each run, and at its end.

    Args:
        trial: What happens.
        prepared: What is right.
        ground: Where.
        warm: Who forks.
        name: Of the trial's directory, which is removed when all went well.

    Raises:
        OSError: The trial is about a small disk, and none can be mounted.
    """
    directory = ground.trial(name)
    parts = [fault.at for fault in trial.faults if fault.on == "d"]
    with ExitStack() as stack:
        make_room = None
        if parts:
            size = room(prepared.old_nbytes, prepared.nbytes, parts[0])
            make_room = stack.enter_context(small_disk(directory / "place", size))
        outcome = _run_on(trial, prepared, ground, warm, directory, make_room)
    if not outcome.problems:
        shutil.rmtree(directory)
    return outcome


def _run_on(
    trial: Trial,
    prepared: Prepared,
    ground: Ground,
    warm: Warm,
    directory: Path,
    make_room: Callable[[int], None] | None,
) -> Outcome:
    started = time.monotonic()
    scenario = trial.scenario
    place = directory / "place"
    (place / BUCKET).mkdir(exist_ok=True)  # a disk that was mounted there is empty
    ground.lay_old(scenario, place)
    judge = Judge(prepared, place)
    struck, runs, states = [], [], []
    for number, fault in enumerate((*trial.faults, None)):
        if fault is None and make_room is not None:
            make_room(plenty(prepared.old_nbytes, prepared.nbytes))
        spelt = str(fault) if fault is not None and fault.on in "rwc" else ""
        job = ground.job(scenario, directory, number, fault=spelt, resume=number > 0)
        meanwhile = None
        if fault is not None and fault.on == "t":
            meanwhile = _signalling(fault, prepared.seconds, scenario.workers)
        ended = warm.run(job, meanwhile=meanwhile)
        runs.append(ended)
        if fault is None:
            states.append(judge.at_the_end(ended))
        else:
            struck.append(_struck(fault, ended, str(directory)))
            states.append(judge.after(ended, fault))
    said = "\n".join(f"$ run {number}\n{ended.err}" for number, ended in enumerate(runs))
    return Outcome(
        trial=trial,
        struck=tuple(struck),
        states=tuple(states),
        codes=tuple(ended.code for ended in runs),
        errors=tuple(judge.errors),
        problems=tuple(judge.problems),
        seconds=time.monotonic() - started,
        said=said if judge.problems else "",
    )


def _struck(fault: Fault, ended: Ended, directory: str) -> str:
    if fault.on == "d":
        return "a disk that is too small" if ended.code != 0 else ""
    if fault.on == "t":
        return f"SIGKILL to the {fault.how}" if ended.code != 0 else ""
    name, _, path = str(ended.seen.get("struck", "")).partition(" ")
    return f"{name} {role(os.path.relpath(path, directory))}" if name else ""


def _signalling(fault: Fault, seconds: float, workers: int) -> Callable[[int], None]:
    """What kills from outside, so far into a command of so many processes."""

    def kill(leader: int) -> None:
        time.sleep(fault.at * seconds)
        members = session_of(leader)
        # The last of the others is a hand: multiprocessing's resource tracker starts first.
        targets = {"group": members, "lead": [leader], "hand": members[workers:][-1:]}[fault.how]
        for pid in targets:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    return kill


def same(before: Mapping[str, str], ground: Ground) -> list[str]:
    """How the sources differ from what they were."""
    now = contents(ground.sources)
    return sorted(
        f"the source {name} is not what it was"
        for name in before.keys() | now.keys()
        if before.get(name) != now.get(name)
    )
