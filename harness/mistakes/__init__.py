"""Typical mistakes, each as a way to compute one block, the embedding or the head in float64.

Which of them gives what a faulty model has computed? Names are those of the catalogue of faults
where it has the mistake. Most are other weights or another configuration given to the oracle; the
few that need other arithmetic have it here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.mistakes.attention import of_attention
from harness.mistakes.others import (
    of_block,
    of_embedding,
    of_head,
    of_mlp,
    of_norms,
    of_other_blocks,
)
from harness.mistakes.rope import of_rope
from harness.mistakes.setup import Mistake, Setup
from harness.oracle import Array, Attention, Mlp

__all__ = ["Mistake", "Setup", "Suspect", "mistakes", "suspects"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """A mistake and the share of the error it explains: 1 all of it, 0 or less none."""

    name: str
    says: str
    explains: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"name": self.name, "says": self.says, "explains": round(self.explains, 6)}


def suspects(setup: Setup, computed: Array) -> list[Suspect]:
    """Try every mistake; those that explain most of `computed` first, one of each name."""
    truth = setup.compute()
    error = _rms(computed - truth)
    best: dict[str, Suspect] = {}
    if not error or not math.isfinite(error):
        return []
    for name, says, changed in mistakes(setup):
        with np.errstate(all="ignore"):
            try:
                found = changed.compute()
            except (ValueError, KeyError, IndexError, ZeroDivisionError):
                continue  # a mistake that this model cannot make: shapes do not fit
            left = _rms(computed - found) if found.shape == computed.shape else math.inf
        if not math.isfinite(left) or np.array_equal(found, truth):
            continue
        one = Suspect(name=name, says=says, explains=1 - left / error)
        if name not in best or one.explains > best[name].explains:
            best[name] = one
    return sorted(best.values(), key=lambda one: -one.explains)


def _rms(values: Array) -> float:
    return math.sqrt(float(np.mean(np.square(values))))


def mistakes(setup: Setup) -> Iterator[Mistake]:
    """Every mistake that applies: its name, in words, and how it computes."""
    if setup.layer_idx < 0:
        yield from of_embedding(setup)
        return
    yield from of_norms(setup)
    if setup.layer_idx >= len(setup.model.blocks):
        yield from of_head(setup)
        return
    attention, ffn = setup.model.blocks[setup.layer_idx]
    if isinstance(attention, Attention):
        yield from of_rope(setup)
        yield from of_attention(setup, attention.num_query_groups)
    if isinstance(ffn, Mlp):
        yield from of_mlp(setup, ffn.ffn_hidden_size)
    yield from of_block(setup)
    yield from of_other_blocks(setup)
