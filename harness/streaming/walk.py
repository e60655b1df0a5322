"""One pass over the weights: three implementations move every probe through the model.

Each block is judged as soon as it is done, and only the states that the next one needs are kept.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from harness.block_states import judge_block, kind_of, part_kind
from harness.live_blocks import EMBEDDING
from harness.oracle import Architecture
from harness.probes import Probe
from harness.streaming.reading import HeldSource
from harness.streaming.record import PartError, Record, Store, relative_error
from harness.streaming.segments import Segment
from harness.streaming.sides import Key, Side
from harness.thresholds import Thresholds

Array = np.ndarray[Any, np.dtype[Any]]
Held = Iterable[tuple[HeldSource, HeldSource]]
"""Per segment the Hugging Face weights, and those that Megatron is filled from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """The three implementations."""

    truth: Side
    reference: Side
    ours: Side


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProbeLogits:
    """Logits on one probe, (batch, seq, vocab_size): free-running, and of the reference's state.

    Attributes:
        reference: The reference's.
        ours: Megatron's.
        truth: The oracle's, float64.
        ours_forced: Megatron's head on the reference's last state.
        truth_forced: The oracle's.
    """

    reference: Array
    ours: Array
    truth: Array
    ours_forced: Array
    truth_forced: Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What a walk has found.

    Attributes:
        record: Judgements of every probe.
        logits: By probe; empty where the head was left out.
        seconds: Reading, as far as it was waited for, judging, and each implementation; the oracle
            computes while the others do.
        suspects: By probe, where a block has failed by itself.
    """

    record: Record
    logits: Mapping[str, ProbeLogits]
    seconds: Mapping[str, float]
    suspects: Mapping[str, Suspected]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Suspected:
    """The first block of a probe that fails by itself: what it was given, what it made of it."""

    layer_idx: int
    given: Array
    made: Array


@dataclass(slots=True, kw_only=True)
class Walk:
    """A walk that can be taken up where an earlier one ended.

    Args:
        model: The architecture.
        segments: All of them, in order.
        probes: What is carried through.
        sides: The implementations, at the beginning.
        dtype: What the two models compute in.
        thresholds: Limits.
        store: Where states are kept after each block; None keeps none.
        advance: Told what is being done and how many parameters have been.
    """

    model: Architecture
    segments: Sequence[Segment]
    probes: Sequence[Probe]
    sides: Sides
    dtype: str
    thresholds: Thresholds
    store: Store | None = None
    advance: Callable[[Segment, int], None] = lambda _segment, _count: None
    record: Record = field(default_factory=Record)
    _seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _given: list[Array] = field(default_factory=list)
    _suspects: dict[str, Suspected] = field(default_factory=dict)

    def begin(self) -> int:
        """The first segment to do: after what the store holds, or the very first."""
        kept = None
        if self.store is not None:
            kept = self.store.load(dtype=self.dtype, thresholds=self.thresholds)
        if kept is None:
            self.record = Record(
                judgements={one.name: [] for one in self.probes},
                parts={one.name: {} for one in self.probes},
            )
            return 0
        first, self.record, states = kept
        for name, side in self._by_name().items():
            for number in range(len(self.probes)):
                state = side.backend.taken(states[f"{name}-{number}"])
                side.states[number, "free"] = state
        return first

    def run(self, held: Held, *, first: int = 0) -> Outcome:
        """Do the segments from `first` on.

        Args:
            held: Their weights, in order.
            first: What `begin` has said.
        """
        began = time.monotonic()
        # The oracle computes beside the two models, which take turns in one module's memory: each
        # with few threads does better than one after the other with many.
        with ThreadPoolExecutor(1, thread_name_prefix="oracle") as beside:
            for number, (weights, theirs) in enumerate(held, start=first):
                segment = self.segments[number]
                self._seconds["reading"] += time.monotonic() - began
                if segment.part in {"attention", "head"} and segment.is_first:
                    self._force()
                truth = beside.submit(self._step, "oracle", segment, weights)
                self._step("reference", segment, weights)
                self._step("megatron", segment, theirs)
                truth.result()
                began = time.monotonic()
                if segment.layer_idx is not None:
                    self._compare_part(number, segment, segment.layer_idx)
                if segment.ends_block:
                    self._judge(segment)
                    if self.store is not None:
                        self.store.save(number + 1, self.record, self._kept())
                self.advance(segment, segment.num_parameters)
                self._seconds["judging"] += time.monotonic() - began
                began = time.monotonic()
        return Outcome(
            record=self.record,
            logits={
                one.name: self._logits(number)
                for number, one in enumerate(self.probes)
                if self.sides.ours.logits
            },
            seconds=dict(self._seconds),
            suspects=self._suspects,
        )

    def _step(self, name: str, segment: Segment, source: HeldSource) -> None:
        began = time.monotonic()
        self._by_name()[name].step(segment, source)
        self._seconds[name] += time.monotonic() - began

    def _by_name(self) -> dict[str, Side]:
        sides = self.sides
        return {"oracle": sides.truth, "reference": sides.reference, "megatron": sides.ours}

    def _kept(self) -> dict[str, Array]:
        return {
            f"{name}-{number}": side.backend.plain(side.states[number, "free"])
            for name, side in self._by_name().items()
            for number in range(len(self.probes))
        }

    def _force(self) -> None:
        """Give the reference's states to what comes."""
        self._given = [self._reference(number, "free") for number in range(len(self.probes))]
        for number, state in enumerate(self._given):
            self.sides.truth.force(number, state)
            self.sides.ours.force(number, state)

    def _reference(self, number: int, mode: Any) -> Array:  # noqa: ANN401 - a Mode
        side = self.sides.reference
        return side.backend.plain(side.states[number, mode])

    def _compare_part(self, number: int, segment: Segment, layer_idx: int) -> None:
        sides, part = self.sides, self.model.blocks[layer_idx][segment.part == "ffn"]
        for idx, probe in enumerate(self.probes):
            forced: Key = (idx, "forced")
            truth = sides.truth.changes[forced]
            found = PartError(
                name=str(segment),
                kind=part_kind(part),
                segment_idx=number,
                candidate=relative_error(sides.ours.changes[forced], truth),
                reference=relative_error(sides.reference.changes[idx, "free"], truth),
            )
            self.record.parts[probe.name].setdefault(layer_idx, []).append(found)

    def _judge(self, segment: Segment) -> None:
        layer_idx = EMBEDDING if segment.layer_idx is None else segment.layer_idx
        truth, ours = self.sides.truth, self.sides.ours
        for idx, probe in enumerate(self.probes):
            free: Key = (idx, "free")
            # The embedding is given ids, so free and forced are one.
            forced: Key = free if layer_idx == EMBEDDING else (idx, "forced")
            made = ours.backend.plain(ours.states[forced])
            found = judge_block(
                layer_idx,
                kind_of(self.model, layer_idx),
                reference=self._reference(idx, "free"),
                forced=([(0, made)], truth.states[forced]),
                free=([(0, ours.backend.plain(ours.states[free]))], truth.states[free]),
                dtype=self.dtype,
                thresholds=self.thresholds,
            )
            self.record.judgements[probe.name].append(found)
            own = [one.passed for one in found.verdicts[:2]]
            if not all(own) and layer_idx != EMBEDDING and probe.name not in self._suspects:
                self._suspects[probe.name] = Suspected(
                    layer_idx=layer_idx, given=self._given[idx], made=made
                )

    def _logits(self, idx: int) -> ProbeLogits:
        sides = self.sides
        return ProbeLogits(
            reference=sides.reference.logits[idx, "free"],
            ours=sides.ours.logits[idx, "free"],
            truth=sides.truth.logits[idx, "free"],
            ours_forced=sides.ours.logits[idx, "forced"],
            truth_forced=sides.truth.logits[idx, "forced"],
        )
