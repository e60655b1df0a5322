"""A run of the whole thing: trials dealt out over warm processes, and the soak."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bridge.errors import UsageError
from harness.torture.disk import can_mount
from harness.torture.scenarios import SCENARIOS, Ground, Prepared, Scenario, contents
from harness.torture.soak import Sample, Soak, judge, soak
from harness.torture.trials import Outcome, Trial, disks, errors, kills, run_trial, same
from harness.torture.warm import Warm

PARTS: Final = ("kills", "errors", "soak")
_ROUNDS: Final = 5
"""Times that kills which came too late are made up for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to do.

    Args:
        parts: Of `PARTS`.
        kills: Processes to kill.
        errors: Errors to make.
        conversions: Of the soak.
        seed: Of what is drawn.
        workers: Trials at a time.
        scenarios: Their names; all with none.
        load: Modules that the processes import first: a test breaks the product so.
    """

    parts: Sequence[str] = PARTS
    kills: int = 200
    errors: int = 200
    conversions: int = 200
    seed: int = 0
    workers: int = 1
    scenarios: Sequence[str] = ()
    load: Sequence[str] = ()


@dataclass(slots=True, kw_only=True)
class Campaign:
    """What has been done so far.

    Args:
        order: What was to be.
        outcomes: Of the trials.
        soak: If one was run.
        problems: What is wrong and belongs to no trial.
        left_out: What could not be done here, in words.
    """

    order: Order
    outcomes: list[Outcome] = field(default_factory=list)
    soak: Soak | None = None
    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        found = bool(self.problems) or any(one.problems for one in self.outcomes)
        return not found and (self.soak is None or not self.soak.problems)


def run(order: Order, root: Path, *, advance: Callable[[int, Outcome | Sample], None]) -> Campaign:
    """Do all of it.

    Args:
        order: What.
        root: An empty directory; what trials with problems have left stays there.
        advance: Is told of each trial and each conversion, with how many there are of its kind.

    Raises:
        TortureError: HN206, a command fails unhurt, or a process of ours ends.
    """
    campaign = Campaign(order=order)
    if {"kills", "errors"} & set(order.parts):
        _trials(campaign, root / "trials", advance)
    if "soak" in order.parts:
        directory = root / "soak"
        directory.mkdir()
        samples, seconds = soak(
            directory, order.conversions, load=order.load,
            advance=lambda sample: advance(order.conversions, sample),
        )  # fmt: skip
        campaign.soak = judge(samples, seconds)
    return campaign


def replay(trials: Sequence[Trial], root: Path, *, load: Sequence[str] = ()) -> Campaign:
    """Run these trials again, one after the other."""
    campaign = Campaign(order=Order(parts=(), load=load))
    ground = Ground(root=root)
    scenarios = list({trial.scenario.name: trial.scenario for trial in trials}.values())
    with Warm(load) as warm:
        prepared = _prepare(ground, scenarios, [warm])
        for number, trial in enumerate(trials):
            campaign.outcomes.append(
                run_trial(trial, prepared[trial.scenario.name], ground, warm, f"trial-{number}")
            )
    return campaign


def _trials(
    campaign: Campaign, root: Path, advance: Callable[[int, Outcome | Sample], None]
) -> None:
    order = campaign.order
    chance = random.Random(order.seed)  # noqa: S311 - a draw that can be repeated
    root.mkdir()
    ground = Ground(root=root)
    scenarios = [SCENARIOS[name] for name in order.scenarios or SCENARIOS]
    with ExitStack() as stack:
        warms = [stack.enter_context(Warm(order.load)) for _ in range(order.workers)]
        prepared = _prepare(ground, scenarios, warms)
        before = contents(ground.sources)
        trials = [Trial(scenario=one, faults=()) for one in scenarios]
        wanted = order.kills if "kills" in order.parts else 0
        trials += kills(prepared, wanted, chance)
        if "errors" in order.parts:
            trials += errors(prepared, order.errors, chance)
            if can_mount(root / "disk"):
                trials += disks(prepared)
            else:
                campaign.left_out.append("small disks: no right to mount a file system here")
        done = 0
        for _ in range(_ROUNDS):
            for outcome in run_all(trials, prepared, ground, warms, first=done):
                campaign.outcomes.append(outcome)
                advance(done + len(trials), outcome)
            done += len(trials)
            # Threads take turns as they please: a kill may come after the last call.
            short = wanted - num_kills(campaign.outcomes)
            if short <= 0:
                break
            trials = kills(prepared, short, chance)
        else:
            campaign.problems.append(f"{short} of {wanted} kills came too late each time")
        campaign.problems += same(before, ground)


def _prepare(
    ground: Ground, scenarios: Sequence[Scenario], warms: Sequence[Warm]
) -> dict[str, Prepared]:
    ground.make(scenarios, warms[0])
    return {one.name: ground.prepare(one, warms[0]) for one in scenarios}


def num_kills(outcomes: Sequence[Outcome]) -> int:
    """Processes that were killed, those of chains each."""
    return sum(
        bool(struck) and fault.kills
        for one in outcomes
        for struck, fault in zip(one.struck, one.trial.faults, strict=True)
    )


def run_all(
    trials: Sequence[Trial],
    prepared: Mapping[str, Prepared],
    ground: Ground,
    warms: Sequence[Warm],
    *,
    first: int = 0,
) -> Iterator[Outcome]:
    """Run trials on as many warm processes as there are; outcomes as they come."""
    waiting: queue.SimpleQueue[tuple[int, Trial]] = queue.SimpleQueue()
    for number, trial in enumerate(trials, start=first):
        waiting.put((number, trial))
    found: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
    stop = threading.Event()

    def work(warm: Warm) -> None:
        while not stop.is_set():
            try:
                number, trial = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                name = f"trial-{number}"
                found.put(run_trial(trial, prepared[trial.scenario.name], ground, warm, name))
            except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
                found.put(error)
                return

    threads = [threading.Thread(target=work, args=(warm,), daemon=True) for warm in warms]
    for thread in threads:
        thread.start()
    try:
        for _ in trials:
            outcome = found.get()
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome
    finally:
        stop.set()


def parts_named(text: str | None) -> tuple[str, ...]:
    """The parts that a user names.

    Raises:
        UsageError: BR001, one of them is none, or none is named.
    """
    return _named(text, PARTS, "--only")


def scenarios_named(text: str | None) -> tuple[str, ...]:
    """The scenarios that a user names; see `parts_named`."""
    return _named(text, tuple(SCENARIOS), "--scenarios")


def _named(text: str | None, known: Sequence[str], flag: str) -> tuple[str, ...]:
    if text is None:
        return tuple(known)
    asked = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in asked if name not in known]
    if unknown or not asked:
        raise UsageError(
            f"nothing to do is called {', '.join(unknown) or 'nothing'}",
            where=flag,
            hint=f"known: {', '.join(known)}",
        )
    return tuple(name for name in known if name in asked)
