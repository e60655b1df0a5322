"""The three implementations as the walk sees them: each has its states, and moves them on.

A `Backend` knows how one of them computes a segment; a `Side` keeps its states of every probe, free
and forced, and adds up what the slices of a feed-forward give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np

from harness.probes import Probe
from harness.streaming.reading import HeldSource
from harness.streaming.segments import Segment

Array = np.ndarray[Any, np.dtype[Any]]
State = Any
"""(batch, seq, hidden_size): a float64 array of the oracle's, or a tensor on its device."""
Mode = Literal["free", "forced"]
Key = tuple[int, Mode]
"""Which probe, and how it came here."""


class Backend(Protocol):
    """How one implementation computes. Lists run over states; `probes` over the same."""

    def load(self, segment: Segment, source: HeldSource) -> None:
        """Take the weights of a segment; those of the one before are gone."""
        ...

    def embed(self, probes: Sequence[Probe]) -> list[State]:
        """Embed the tokens of each probe."""
        ...

    def attention(self, states: Sequence[State], probes: Sequence[Probe], /) -> list[State]:
        """The states after the attention sub-block."""
        ...

    def ffn(self, states: Sequence[State], probes: Sequence[Probe], /) -> list[State]:
        """The states after the feed-forward sub-block, all of it at once."""
        ...

    def ffn_slice(self, states: Sequence[State]) -> list[State]:
        """What one slice of the width adds to each state, in at least float32."""
        ...

    def added(self, state: State, change: State) -> State:
        """A state and what the slices together add to it, in the state's own dtype."""
        ...

    def head(self, states: Sequence[State], probes: Sequence[Probe], /) -> list[Array]:
        """Logits of a slice of the vocabulary, (batch, seq, stop - start)."""
        ...

    def plain(self, state: State) -> Array:
        """A state as numbers: float64, or float32 that holds it exactly."""
        ...

    def taken(self, state: Array) -> State:
        """Inverse of `plain`, for a state of another implementation's."""
        ...


class Side:
    """One implementation on its way through the model.

    Args:
        backend: How it computes.
        probes: What is fed to it.
        vocab_size: Width of the logits.
        logits_dtype: Of the logits that are kept.
    """

    def __init__(
        self,
        backend: Backend,
        probes: Sequence[Probe],
        *,
        vocab_size: int,
        logits_dtype: type[np.floating[Any]],
    ) -> None:
        self.backend = backend
        self._probes = probes
        self._vocab_size, self._logits_dtype = vocab_size, logits_dtype
        self.states: dict[Key, State] = {}
        self.changes: dict[Key, Array] = {}
        """What the last segment added to each state."""
        self.logits: dict[Key, Array] = {}
        self._sums: dict[Key, State] = {}

    def force(self, probe_idx: int, state: Array) -> None:
        """Give the reference's state to what comes next."""
        self.states[probe_idx, "forced"] = self.backend.taken(state)

    def step(self, segment: Segment, source: HeldSource) -> None:
        """Move every state through a segment."""
        self.backend.load(segment, source)
        if segment.part == "embedding":
            found = self.backend.embed(self._probes)
            self.states = {(number, "free"): state for number, state in enumerate(found)}
            self.changes = {}
            return
        keys, states = list(self.states), list(self.states.values())
        probes = [self._probes[number] for number, _ in keys]
        if segment.part == "head":
            for key, piece in zip(keys, self.backend.head(states, probes), strict=True):
                self._keep_logits(key, segment, piece)
            return
        if segment.part == "ffn" and segment.num_slices > 1:
            self._slice(segment, dict(zip(keys, states, strict=True)))
            return
        run = self.backend.attention if segment.part == "attention" else self.backend.ffn
        self.states = dict(zip(keys, run(states, probes), strict=True))
        plain = self.backend.plain
        self.changes = {
            key: plain(self.states[key]).astype(np.float64) - plain(before)
            for key, before in zip(keys, states, strict=True)
        }

    def _slice(self, segment: Segment, states: dict[Key, State]) -> None:
        pieces = self.backend.ffn_slice(list(states.values()))
        for key, piece in zip(states, pieces, strict=True):
            self._sums[key] = piece if segment.is_first else self._sums[key] + piece
            self.changes[key] = self.backend.plain(piece)
        if segment.is_last:
            self.states = {
                key: self.backend.added(state, self._sums.pop(key)) for key, state in states.items()
            }

    def _keep_logits(self, key: Key, segment: Segment, piece: Array) -> None:
        if key not in self.logits:
            shape = (*self._probes[key[0]].input_ids.shape, self._vocab_size)
            self.logits[key] = np.full(shape, np.nan, self._logits_dtype)
        self.logits[key][..., segment.start : segment.stop] = piece
