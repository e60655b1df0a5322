"""Commands measured in turns, so that a machine's moods fall on all of them alike."""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

from harness.benchmarks import page_cache
from harness.benchmarks.process import Run
from harness.benchmarks.results import Limit, Measurement
from harness.benchmarks.workspace import Workspace

Cache = Literal["warm", "cold"]

_STILL_CACHED: Final = 0.05
"""Share of the pages that may still be there for a cache to be called cold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One command that is run several times.

    Args:
        name: For the tables.
        command: Program and arguments.
        source: Directory it reads; the page cache is put in order for it.
        target: What it makes; removed before and after each run.
        tree: It works in several processes.
        details: Figures that it printed itself.
        counted: Which of these is its time, in seconds; none for that of the whole process.
    """

    name: str
    command: Sequence[str | Path]
    source: Path | None = None
    target: Path | None = None
    tree: bool = False
    details: Callable[[Run], Mapping[str, float]] = lambda _run: {}
    counted: str = ""


@dataclass(slots=True)
class Outcome:
    """The runs of a trial so far; `problem` ends them. `counted` is the trial's."""

    counted: str = ""
    runs: list[Run] = field(default_factory=list)
    details: list[Mapping[str, float]] = field(default_factory=list)
    problem: str = ""
    could_run: bool = True

    @property
    def samples(self) -> list[float]:
        """Seconds of each run."""
        if self.counted:
            return [found[self.counted] for found in self.details]
        return [run.seconds for run in self.runs]

    @property
    def median(self) -> float | None:
        """Seconds; None without a run."""
        return statistics.median(self.samples) if self.runs else None


def in_turns(
    work: Workspace, trials: Sequence[Trial], *, repeats: int, cache: Cache = "warm"
) -> dict[str, Outcome]:
    """Run each trial once, then each again; one that fails is not tried again.

    Args:
        work: Where.
        trials: What, in order.
        repeats: How often.
        cache: Whether the sources' bytes are in the page cache when a command starts.
    """
    outcomes = {trial.name: Outcome(counted=trial.counted) for trial in trials}
    for _ in range(repeats):
        for trial in trials:
            outcome = outcomes[trial.name]
            if not outcome.problem:
                _once(work, trial, outcome, cache)
    for trial in trials:
        outcome = outcomes[trial.name]
        found = f"median {outcome.median:.2f} s" if outcome.median is not None else ""
        work.say(f"{trial.name} ({cache} cache): {outcome.problem or found}")
    return outcomes


def _once(work: Workspace, trial: Trial, outcome: Outcome, cache: Cache) -> None:
    _remove(trial.target)
    if trial.source is not None:
        outcome.problem = _prepare(trial.source, cache)
        if outcome.problem:
            outcome.could_run = False
            return
    os.sync()  # what earlier commands left to be written must not be written at this one's cost
    run = work.run(trial.command, tree=trial.tree)
    outcome.problem = run.failure
    if not outcome.problem:
        details = trial.details(run)
        if trial.counted and trial.counted not in details:
            outcome.problem = f"it did not print {trial.counted}"
        else:
            outcome.runs.append(run)
            outcome.details.append(details)
    _remove(trial.target)


def _prepare(source: Path, cache: Cache) -> str:
    """Put the page cache in order; why that cannot be done, or nothing."""
    if cache == "warm":
        page_cache.warm(source)
        return ""
    if not page_cache.drop(source):
        return "this system has no way to empty the page cache without being root"
    share = page_cache.cached_share(source)
    if share is not None and share > _STILL_CACHED:
        return f"{share:.0%} of the source stayed in the page cache: another process uses it"
    return ""


def _remove(target: Path | None) -> None:
    if target is not None:
        shutil.rmtree(target, ignore_errors=True)


def measurement(
    group: str,
    trial: Trial,
    outcome: Outcome,
    *,
    conditions: Mapping[str, str | int | float],
    size: int | None = None,
    references: Mapping[str, Outcome | None] = MappingProxyType({}),
    plain: Outcome | None = None,
    limits: Mapping[str, float] = MappingProxyType({}),
) -> Measurement:
    """Sum up the runs of a trial.

    Args:
        group: What `--only` calls it.
        trial: What ran.
        outcome: How it went.
        conditions: What it ran under.
        size: Bytes that it moved, for a rate.
        references: The runs that it is held against, such as those of `cp`, by name.
        plain: The runs of the same without something: what that adds is held against them, too.
        limits: What values may be at most; `median_seconds` is one. Those it has not have none.
    """
    if outcome.problem:
        return Measurement(
            group=group, name=trial.name, conditions=conditions, reason=outcome.problem,
            status="failed" if outcome.could_run else "not run",
        )  # fmt: skip
    samples = outcome.samples
    middle = statistics.median(samples)
    values = {"peak_rss_bytes": float(max(run.peak_rss for run in outcome.runs))}
    for name in outcome.details[0].keys() - {trial.counted}:
        values[name] = statistics.median(found[name] for found in outcome.details)
    if size is not None and middle:
        values["gb_per_second"] = size / middle / 1e9
    for called, reference in references.items():
        if reference is None or not reference.median:
            continue
        values[f"ratio_to_{called}"] = middle / reference.median
        if plain is not None and plain.median:
            values[f"added_ratio_to_{called}"] = (middle - plain.median) / reference.median
        for name in ("verify", "load"):
            if f"{name}_seconds" in values:
                values[f"{name}_ratio_to_{called}"] = values[f"{name}_seconds"] / reference.median
    has = {"median_seconds": middle, **values}
    return Measurement(
        group=group, name=trial.name, conditions=conditions, samples=samples, values=values,
        limits=[
            Limit(name=name, value=has[name], limit=limit)
            for name, limit in limits.items()
            if name in has
        ],
    )  # fmt: skip


def failed(group: str, name: str, run: Run) -> Measurement:
    """A run that is no measurement, or whose output is no JSON."""
    reason = run.failure or "its output is no JSON"
    return Measurement(group=group, name=name, status="failed", reason=reason)
