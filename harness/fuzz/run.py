"""A run: which inputs, in which processes, and what is kept of the outcomes."""

from __future__ import annotations

import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Final

from bridge.errors import UsageError
from harness.fuzz.kinds import KINDS, Kind
from harness.fuzz.mutation import mutate
from harness.fuzz.results import Finding, FuzzReport, Tally
from harness.fuzz.slots import Slot
from harness.fuzz.worker import Outcome, Range

Advance = Callable[[int, str, str], None]
"""Told of progress: how many inputs more, of which kind, and a line where there is news."""

_BATCH: Final = 2500  # inputs; each process imports what it needs anew
_TICK: Final = 0.1  # seconds
_MEMORY: Final = 512 << 20


def kinds_named(names: Iterable[str], kinds: Sequence[Kind] = KINDS) -> list[Kind]:
    """The kinds of these names; all without any.

    Raises:
        UsageError: BR001, there is none of some name.
    """
    by_name = {kind.name: kind for kind in kinds}
    wanted = list(dict.fromkeys(names)) or list(by_name)
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        raise UsageError(
            f"no kind of input is called {', '.join(unknown)}",
            where="--only",
            hint=f"known: {', '.join(by_name)}",
        )
    return [by_name[name] for name in wanted]


def shares(kinds: Sequence[Kind], inputs: int) -> dict[str, int]:
    """How many inputs of each kind: as their shares say, at least one, and as many in all."""
    total = sum(kind.share for kind in kinds)
    found = {kind.name: max(1, int(inputs * kind.share / total)) for kind in kinds}
    for kind in sorted(kinds, key=lambda one: -one.share):  # what rounding has left
        found[kind.name] += max(0, inputs - sum(found.values()))
    return found


def run_fuzz(
    root: Path,
    *,
    kinds: Sequence[Kind] = KINDS,
    inputs: int,
    seed: int = 0,
    workers: int | None = None,
    timeout: float = 10.0,
    memory: int = _MEMORY,
    advance: Advance = lambda _count, _kind, _news: None,
) -> FuzzReport:
    """Mutate, read, and see what happens.

    Args:
        root: A world; see `harness.fuzz.world.build_world`.
        kinds: Of inputs.
        inputs: How many, of all kinds together.
        seed: Another draws others.
        workers: Processes; None for one per core.
        timeout: Seconds that one input may take.
        memory: Bytes that a process may take beyond what it begins with.
        advance: Told of progress.
    """
    counts = shares(kinds, inputs)
    report = FuzzReport(seed=seed, by_kind={name: Tally(wanted=n) for name, n in counts.items()})
    waiting = deque(
        Range(kind=kind, seed=seed, start=start, stop=min(start + _BATCH, counts[kind.name]))
        for kind in sorted(kinds, key=lambda one: one.share)
        for start in range(0, counts[kind.name], _BATCH)
    )
    started = time.monotonic()
    with _slots(root, workers or os.cpu_count() or 1, timeout=timeout, memory=memory) as slots:
        try:
            while waiting or any(slot.is_busy for slot in slots):
                for slot in slots:
                    if not slot.is_busy and waiting:
                        slot.begin(waiting.popleft())
                wait([end for slot in slots for end in slot.ends], timeout=_TICK)
                for slot in slots:
                    batch = slot.batch
                    if batch is None:
                        continue
                    outcomes, rest = slot.look()
                    news = _keep(report, batch, outcomes, root)
                    advance(len(outcomes), batch.kind.name, news)
                    if rest is not None:
                        waiting.appendleft(rest)
        except KeyboardInterrupt:
            report.interrupted = True
    report.seconds = time.monotonic() - started
    return report


@contextmanager
def _slots(root: Path, count: int, *, timeout: float, memory: int) -> Iterator[list[Slot]]:
    """Places for processes; their worlds are removed and nothing of theirs runs on."""
    with (
        tempfile.TemporaryDirectory(prefix="nemotron-fuzz-", dir=root.parent) as directory,
        ExitStack() as stack,
    ):
        slots = []
        for number in range(count):
            slot = Slot(root, Path(directory) / str(number), timeout=timeout, memory=memory)
            stack.callback(slot.close)
            slots.append(slot)
        yield slots


def _keep(report: FuzzReport, batch: Range, outcomes: Sequence[Outcome], root: Path) -> str:
    """Count outcomes, and keep the bytes of what is new; it in words."""
    kind, news = batch.kind, []
    for outcome in outcomes:
        report.by_kind[kind.name].add(outcome)
        if outcome.problem and report.is_new(kind.name, outcome):
            data = input_of(kind, root, seed=batch.seed, index=outcome.index)
            finding = Finding(kind=kind.name, seed=batch.seed, outcome=outcome, data=data)
            report.findings.append(finding)
            news.append(f"{finding.id}: {outcome.problem} at {outcome.place}")
    return "\n".join(news)


def input_of(kind: Kind, root: Path, *, seed: int, index: int) -> bytes:
    """The bytes of an input; of the original for -1."""
    originals = kind.originals(root)
    if index < 0:
        return originals[0]
    return mutate(kind.name, kind.form, originals, seed=seed, index=index).data


def numbers_named(name: str) -> tuple[Kind, int, int]:
    """The kind, the seed and the index that `KIND:SEED:INDEX` names.

    Raises:
        UsageError: BR001, it names none.
    """
    parts = name.rsplit(":", 2)
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts[1:]):
        raise UsageError(f"{name!r} names no input", where="--replay", hint="give KIND:SEED:INDEX")
    (kind,) = kinds_named(parts[:1])
    seed, index = map(int, parts[1:])
    return kind, seed, index
