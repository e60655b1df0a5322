"""What is promised of a conversion that is killed or fails, held against what it left."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from harness.torture.faults import Fault
from harness.torture.scenarios import Prepared, State, contents
from harness.torture.store import BUCKET
from harness.torture.warm import Ended

_TOLD: Final = re.compile(r"^((?:BR|HN)\d{3}) ", re.MULTILINE)
_FLUSHES: Final = ("fsync ", "fdatasync ")
_SEEN_FILES: Final = frozenset({".nemotron_bridge.partial"})
"""What an object store may hold beside a checkpoint until the next attempt."""


@dataclass(slots=True)
class Judge:
    """Looks at the target after each run of one trial.

    Args:
        prepared: What is right.
        place: The directory that the target is in.
    """

    prepared: Prepared
    place: Path
    problems: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def after(self, ended: Ended, fault: Fault) -> State:
        """Judge a run that something happened to."""
        state = self._target("after it")
        self._beside(hidden_too=False)
        self._processes(ended)
        hit = bool(ended.seen.get("struck")) or fault.on in "td"
        if fault.kills:
            self._ended_by_kill(ended, fault)
        elif ended.code == 0:
            if state != "complete":
                self._wrong(f"it exits with 0, and the target is {state}")
            if hit and self._was_flush(ended):
                self._wrong("a flush failed, and it exits with 0")
        else:
            self._told_once(ended)
        return state

    def at_the_end(self, ended: Ended) -> State:
        """Judge the run that nothing happened to: all is to be as if nothing ever had."""
        state = self._target("at the end")
        self._processes(ended)
        if ended.code != 0:
            said = ended.err.strip().splitlines()
            self._wrong(f"taken up again, it exits with {ended.code}: {' | '.join(said[-3:])}")
        if state != "complete":
            self._wrong(f"taken up again, the target is {state}")
        self._beside(hidden_too=True)
        if self.prepared.scenario.where != "store":
            for what in ended.seen.get("unsynced", ()):
                self._wrong(f"it exits with 0, and {what} would not outlive a loss of power")
        return state

    def _target(self, when: str) -> State:
        """What the target is, which may be nothing in between."""
        scenario = self.prepared.scenario
        found = contents(scenario.target(self.place))
        if scenario.where == "store":
            found = {name: what for name, what in found.items() if name not in _SEEN_FILES}
        if found == dict(self.prepared.right):
            return "complete"
        if scenario.overwrites:
            if found == dict(self.prepared.old):
                return "old"
            self._wrong(f"{when} the target is neither the old one nor the new: {self._how(found)}")
            return "wrong"
        is_checkpoint = scenario.where != "store" or any(one in found for one in scenario.last)
        if found and is_checkpoint:
            self._wrong(f"{when} the target is there and is not right: {self._how(found)}")
            return "wrong"
        return "absent"

    def _how(self, found: dict[str, str]) -> str:
        right = self.prepared.right
        if not found:
            return "it is absent"
        missing = [name for name in right if name not in found]
        more = [name for name in found if name not in right]
        differ = [name for name in found if name in right and found[name] != right[name]]
        parts = (("without", missing), ("beside it", more), ("other bytes in", differ))
        return "; ".join(
            f"{word} {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for word, names in parts
            if names
        )

    def _beside(self, *, hidden_too: bool) -> None:
        """See that nothing beside it looks like a checkpoint; at the end, that nothing is there."""
        target = self.prepared.scenario.target(self.place)
        allowed = {self.place / BUCKET, self.place / "uploads", target}
        for path in sorted({*self.place.iterdir(), *target.parent.iterdir()} - allowed):
            if hidden_too or not path.name.startswith("."):
                self._wrong(f"{path.name} is left beside the target")
        if hidden_too:
            temporary = self.place.parent / "tmp"
            for path in sorted(temporary.iterdir()):
                self._wrong(f"{path.name} is left in TMPDIR")

    def _processes(self, ended: Ended) -> None:
        if ended.code is None:
            self._wrong(f"it hangs: killed after {ended.seconds:.0f} s")
        if ended.orphans:
            self._wrong(f"{len(ended.orphans)} of its processes outlive it")

    def _ended_by_kill(self, ended: Ended, fault: Fault) -> None:
        if fault.how == "hand" and ended.code not in (0, None):
            self._told_once(ended)
        elif ended.code not in (0, -9, None):
            self._wrong(f"it exits with {ended.code} before it is killed")

    def _told_once(self, ended: Ended) -> None:
        told = _TOLD.findall(ended.err)
        self.errors += told
        if "Traceback (most recent call last)" in ended.err:
            last = ended.err.strip().splitlines()[-1]
            self._wrong(f"it fails with a traceback: {last}")
        elif len(told) != 1:
            self._wrong(f"it tells of {len(told)} errors with a code, not of one")
        # A source that is not what was imported any more is a check that failed.
        if ended.code not in ((1,) if told == ["BR305"] else (2, 3, None)):
            self._wrong(f"it exits with {ended.code}, where it is to be 2 or 3")

    @staticmethod
    def _was_flush(ended: Ended) -> bool:
        struck = str(ended.seen.get("struck", ""))
        return struck.startswith(_FLUSHES) and not Path(struck.partition(" ")[2]).is_dir()

    def _wrong(self, what: str) -> None:
        if what not in self.problems:
            self.problems.append(what)
