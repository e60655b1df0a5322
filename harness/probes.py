"""What is fed to the models: token ids, and positions that reach the end of the context.

A wrong RoPE factor moves logits by 1e-3 at position 64 and overturns them at 100,000. Attention is
causal in sequence order, so a short sequence with far-apart, increasing positions costs nothing
and sees it. What it does not see is attention over many tokens: for that there are probes of a
whole context, which only suites that name them run. Ids come from a portable Philox stream, as the
weights do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import numpy as np

from bridge.errors import ConfigError
from bridge.storage.philox import raw_words

Ids = np.ndarray[Any, np.dtype[np.int64]]

MAX_POSITION_EMBEDDINGS: Final = 131_072
"""Of every published checkpoint of the family."""
INPUT_PROBE: Final = "input"
"""The name of a probe of the user's own."""
SHORT_LENGTH: Final = 24
LONG_LENGTH: Final = 48
CONTEXT_LENGTHS: Final[Mapping[str, int]] = {"context-32k": 32_768, "context-128k": 131_072}
"""Tokens of each probe of a whole context, by its name."""
STRETCHES: Final = 32
"""Into which such a probe is cut, each of other tokens; each is judged by itself."""
_EDGES: Final = (64, 512, 2048, 8192, 32_768, 65_536)
"""Where RoPE tables, rotary bands and the original context of 8192 positions end."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """One input: `input_ids` (batch, seq) and `position_ids` (seq,), both int64."""

    name: str
    input_ids: Ids
    position_ids: Ids

    def __post_init__(self) -> None:
        """A probe has at least one token, and positions that increase from zero or above."""
        positions = self.position_ids
        if (
            self.input_ids.ndim != 2
            or not self.input_ids.size
            or positions.shape != self.input_ids.shape[1:]
            or positions[0] < 0
            or (np.diff(positions) <= 0).any()
        ):
            raise ConfigError(
                f"probe {self.name} needs input_ids (batch, seq) and increasing position_ids (seq,)"
            )


def short_probe(vocab_size: int, *, batch: int = 2, seed: int = 0) -> Probe:
    """Positions 0, 1, 2, ...: what every inference starts with."""
    return Probe(
        name="short",
        input_ids=random_ids(vocab_size, (batch, SHORT_LENGTH), seed=seed, name="short"),
        position_ids=np.arange(SHORT_LENGTH, dtype=np.int64),
    )


def long_probe(
    vocab_size: int,
    *,
    max_position_embeddings: int = MAX_POSITION_EMBEDDINGS,
    batch: int = 1,
    seed: int = 0,
) -> Probe:
    """48 positions over the whole context, the last one included."""
    positions = spread_positions(max_position_embeddings, LONG_LENGTH)
    return Probe(
        name="long",
        input_ids=random_ids(vocab_size, (batch, len(positions)), seed=seed, name="long"),
        position_ids=positions,
    )


def probe_named(
    name: str, vocab_size: int, *, max_position_embeddings: int = MAX_POSITION_EMBEDDINGS
) -> Probe:
    """The `short` or the `long` probe of a model, or one of a whole context.

    Raises:
        ConfigError: BR100, no such probe, or one that is longer than the model's context.
    """
    if name == "short":
        return short_probe(vocab_size)
    if name == "long":
        return long_probe(vocab_size, max_position_embeddings=max_position_embeddings)
    if name not in CONTEXT_LENGTHS:
        known = ", ".join(("short", "long", *CONTEXT_LENGTHS))
        raise ConfigError(f"no probe is called {name!r}", hint=f"known: {known}")
    if CONTEXT_LENGTHS[name] > max_position_embeddings:
        raise ConfigError(
            f"the probe {name} has {CONTEXT_LENGTHS[name]} tokens, the model's context "
            f"{max_position_embeddings}",
            where="max_position_embeddings",
            hint="run it on a model with a context as long, such as toy:context",
        )
    return context_probe(name, vocab_size)


def context_probe(name: str, vocab_size: int) -> Probe:
    """A whole context: one sequence of real length, at positions 0, 1, 2, ...

    Each stretch has tokens of its own, the next 32nd of the vocabulary. Were all alike, attention
    would make the same mean, nearer than bfloat16 can tell, of half of the tokens as of all.
    """
    length = CONTEXT_LENGTHS[name]
    position_ids = np.arange(length, dtype=np.int64)
    stretch = position_ids * STRETCHES // length
    first, end = (edge * vocab_size // STRETCHES for edge in (stretch, stretch + 1))
    words = raw_words(0, f"probe/{name}", 0, length)
    ids = first + (words % np.maximum(end - first, 1).astype(np.uint64)).astype(np.int64)
    ids[0], ids[-1] = 0, vocab_size - 1
    return Probe(name=name, input_ids=ids[None], position_ids=position_ids)


def probes(
    vocab_size: int,
    *,
    max_position_embeddings: int = MAX_POSITION_EMBEDDINGS,
    seed: int = 0,
) -> tuple[Probe, Probe]:
    """The `short` and the `long` probe of a model."""
    return (
        short_probe(vocab_size, seed=seed),
        long_probe(vocab_size, max_position_embeddings=max_position_embeddings, seed=seed),
    )


def random_ids(vocab_size: int, shape: tuple[int, int], *, seed: int, name: str) -> Ids:
    """Token ids, (batch, seq): uniform, but the first and the last token of the vocabulary occur.

    They are the rows that a wrong padding of the vocabulary reaches first.
    """
    words = raw_words(seed, f"probe/{name}", 0, shape[0] * shape[1])
    ids = (words % np.uint64(vocab_size)).astype(np.int64)
    ids[len(ids) // 3] = 0
    ids[len(ids) // 2] = vocab_size - 1
    return ids.reshape(shape)


def spread_positions(max_position_embeddings: int, count: int) -> Ids:
    """Up to `count` increasing positions in [0, max_position_embeddings).

    Both ends and their neighbours, the neighbours of powers of two where tables and bands end,
    then whatever halves the widest gap on a logarithmic scale. Exact arithmetic only, so the same
    on every machine.
    """
    last = max_position_embeddings - 1
    wanted = [0, last, 1, last - 1, 2, last - 2]
    wanted += [edge + step for edge in _EDGES for step in (-1, 0, 1)]
    chosen = sorted(dict.fromkeys(p for p in wanted if 0 <= p <= last))
    while len(chosen) > count:  # a short probe of a long list: thin it out from the middle
        del chosen[len(chosen) // 2]
    while len(chosen) < min(count, max_position_embeddings):
        before, after = max(
            (pair for pair in itertools.pairwise(chosen) if pair[1] - pair[0] > 1),
            key=lambda pair: Fraction(pair[1] + 1, pair[0] + 1),
        )
        middle = math.isqrt((before + 1) * (after + 1)) - 1
        chosen.append(min(max(middle, before + 1), after - 1))
        chosen.sort()
    return np.array(chosen, dtype=np.int64)
