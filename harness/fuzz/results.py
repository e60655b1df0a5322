"""What became of mutated inputs, kind by kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from harness.fuzz.worker import ACCEPTED, PAYLOAD_RAN, Outcome

_KEPT: Final = 3
"""Findings of one problem in one place whose bytes are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """An input that was neither read nor refused.

    Args:
        kind: Of the input.
        seed: Of the run.
        outcome: What happened.
        data: The input.
    """

    kind: str
    seed: int
    outcome: Outcome
    data: bytes

    @property
    def id(self) -> str:
        """As `--replay` takes it."""
        return f"{self.kind}:{self.seed}:{self.outcome.index}"


@dataclass(slots=True, kw_only=True)
class Tally:
    """What became of the inputs of a kind.

    Attributes:
        wanted: How many there are to be.
        inputs: How many there were.
        accepted: How many were read.
        refused: By code.
        payloads: How many had something to run in them.
        payloads_ran: How many of those ran.
        findings: How many were neither.
        worst_seconds: For one input.
        peak_bytes: Of a process, more than what it began with.
        seconds: All inputs together.
    """

    wanted: int = 0
    inputs: int = 0
    accepted: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    payloads: int = 0
    payloads_ran: int = 0
    findings: int = 0
    worst_seconds: float = 0.0
    peak_bytes: int = 0
    seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count one; an original that is not read as it should be is a finding and no input."""
        if outcome.index < 0:
            self.findings += 1
            return
        self.inputs += 1
        self.payloads += outcome.has_payload
        self.payloads_ran += outcome.problem == PAYLOAD_RAN
        self.worst_seconds = max(self.worst_seconds, outcome.seconds)
        self.peak_bytes = max(self.peak_bytes, outcome.peak_bytes)
        self.seconds += outcome.seconds
        if outcome.problem:
            self.findings += 1
        elif outcome.code == ACCEPTED:
            self.accepted += 1
        else:
            self.refused[outcome.code] = self.refused.get(outcome.code, 0) + 1


@dataclass(slots=True, kw_only=True)
class FuzzReport:
    """A run.

    Attributes:
        seed: Which inputs.
        by_kind: What became of them.
        findings: The first of each problem in each place.
        seconds: Of all of it.
        interrupted: Whether somebody has ended it early.
    """

    seed: int
    by_kind: dict[str, Tally]
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def inputs(self) -> int:
        """How many were read, or refused, or found something."""
        return sum(tally.inputs for tally in self.by_kind.values())

    @property
    def num_findings(self) -> int:
        """All of them, those that are not kept included."""
        return sum(tally.findings for tally in self.by_kind.values())

    @property
    def payloads(self) -> int:
        """Inputs with something to run in them."""
        return sum(tally.payloads for tally in self.by_kind.values())

    @property
    def payloads_ran(self) -> int:
        """How many of them ran."""
        return sum(tally.payloads_ran for tally in self.by_kind.values())

    def is_new(self, kind: str, outcome: Outcome) -> bool:
        """Whether there is no other like it, or only few."""
        same = [
            one
            for one in self.findings
            if (one.kind, one.outcome.problem, one.outcome.place)
            == (kind, outcome.problem, outcome.place)
        ]
        return len(same) < _KEPT
