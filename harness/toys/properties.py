"""What a toy can promise: predicates on an architecture, and the promises every toy makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from harness.oracle import Architecture, Attention, Mlp

Property = tuple[str, Callable[[Architecture], bool]]
"""A claim in words, and whether a model keeps it."""


def groups_of(model: Architecture) -> list[int]:
    """`num_query_groups` of each block that has attention."""
    return [a.num_query_groups for a, _ in model.blocks if isinstance(a, Attention)]


def widths_of(model: Architecture) -> list[int]:
    """`ffn_hidden_size` of each block that has a feed-forward."""
    return [f.ffn_hidden_size for _, f in model.blocks if isinstance(f, Mlp)]


def padded_vocab_sizes(model: Architecture) -> list[int]:
    """Rows of Megatron's embedding at TP 1, 2 and 4."""
    return [-(-model.vocab_size // (128 * tp)) * 128 * tp for tp in (1, 2, 4)]


def _dimensions(model: Architecture) -> list[int]:
    """Every size a tensor of the checkpoint can have; projected heads equal to hidden once."""
    rows = {model.hidden_size, model.num_attention_heads * model.kv_channels}
    kv_rows = {groups * model.kv_channels for groups in groups_of(model)}
    return [*rows, *kv_rows, *set(widths_of(model)), model.vocab_size]


def _cuts_evenly(model: Architecture) -> bool:
    sizes = [model.hidden_size, model.num_attention_heads, *widths_of(model)]
    groups = groups_of(model)
    return all(size % 4 == 0 for size in sizes) and all(
        count % 4 == 0 or 4 % count == 0 for count in groups
    )


def _reaches_every_band(model: Architecture) -> bool:
    """Some frequencies are kept, some blended, some divided by the factor."""
    if model.rope.llama3 is None:
        return False
    _, low, high, old_length = model.rope.llama3
    exponents = np.arange(0, model.kv_channels, 2) / model.kv_channels
    turns = old_length / (2 * np.pi * model.rope.base**exponents)
    return bool(
        (turns > high).any() and (turns < low).any() and ((turns > low) & (turns < high)).any()
    )


def longest_run(flags: list[bool]) -> int:
    """Length of the longest stretch of true flags."""
    best = run = 0
    for flag in flags:
        run = run + 1 if flag else 0
        best = max(best, run)
    return best


COMMON_PROPERTIES: Final[tuple[Property, ...]] = (
    ("no two dimensions coincide", lambda m: len(set(_dimensions(m))) == len(_dimensions(m))),
    ("TP 1, 2 and 4 divide heads, groups and widths", _cuts_evenly),
    ("6 layers or more: uneven PP=2, VPP=2 over PP=2", lambda m: len(m.blocks) >= 6),
    ("the vocabulary is odd", lambda m: m.vocab_size % 2 == 1),
    ("TP 1, 2 and 4 pad it differently", lambda m: len(set(padded_vocab_sizes(m))) == 3),
    ("llama3 RoPE reaches all three bands", _reaches_every_band),
)
