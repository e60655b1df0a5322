"""The traits of an architecture: what a shrunk twin has in common with its original.

Blocks of what kinds in what order, and of sizes whatever does not depend on their being large: what
divides or equals what, what is padded, which rank is which.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from harness.oracle import Absent, Architecture, Attention, Mlp, Replaced
from harness.toys.properties import padded_vocab_sizes


def traits_of(model: Architecture) -> dict[str, object]:
    """What a twin shares with its original, in words, and what it is.

    Each is a plain value; equal traits mean equal values. Sizes appear as ratios, as ranks or by
    what they divide, never as themselves.
    """
    groups = [one.num_query_groups for one, _ in model.blocks if isinstance(one, Attention)]
    widths = [one.ffn_hidden_size for _, one in model.blocks if isinstance(one, Mlp)]
    kinds = [(type(one).__name__, type(other).__name__) for one, other in model.blocks]
    heads, rows = model.num_attention_heads, model.num_attention_heads * model.kv_channels
    ranks = _ranked(model)
    padded = padded_vocab_sizes(model)
    return {
        "the kinds of blocks, by first appearance": list(dict.fromkeys(kinds)),
        "which kind of block follows which": sorted(set(itertools.pairwise(kinds))),
        "the first block and the last": [kinds[0], kinds[-1]],
        "distinct blocks by first appearance, sizes by rank": list(dict.fromkeys(ranks)),
        "one distinct block or several, one layer or more": [
            len(set(ranks)) > 1, len(ranks) > 1,
        ],
        "two blocks share a feed-forward width": len(set(widths)) < len(widths),
        "query heads that share a key head, by first appearance": list(
            dict.fromkeys(heads // count for count in groups)
        ),
        "blocks with one query group, with several": [
            1 in groups, any(count > 1 for count in groups),
        ],
        "heads x head_dim against hidden_size": int(np.sign(rows - model.hidden_size)),
        "what TP 2 and 4 divide: heads, hidden_size, every width": [
            size % tp == 0
            for tp in (2, 4)
            for size in (heads, model.hidden_size, math.gcd(*widths, 0))
        ],
        "whether TP 2 divides the query groups": [
            bool(groups) and count % 2 == 0 for count in dict.fromkeys(groups)
        ],
        "vocabulary rows are padded at TP 1, 2 and 4": [
            size > model.vocab_size for size in padded
        ],
        "output layer tied to the embedding": model.tied,
        "norm epsilon": model.layernorm_epsilon,
        "RoPE base and scaling": [model.rope.base, model.rope.llama3],
        "which bands of frequencies llama3 scaling reaches": _bands(model),
        "which dimensions coincide": _coincidences(model),
    }  # fmt: skip


def _ranked(model: Architecture) -> list[tuple[str, str]]:
    """Each block with its sizes as ranks: `("attention 0", "ffn 2")`."""
    counts = sorted({a.num_query_groups for a, _ in model.blocks if isinstance(a, Attention)})
    widths = sorted({f.ffn_hidden_size for _, f in model.blocks if isinstance(f, Mlp)})

    def said(part: Attention | Mlp | Replaced | Absent) -> str:
        match part:
            case Attention(num_query_groups=count):
                return f"attention {counts.index(count)}"
            case Mlp(ffn_hidden_size=width):
                return f"ffn {widths.index(width)}"
            case Replaced():
                return "linear"
            case Absent():
                return "no-op"

    return [(said(attention), said(ffn)) for attention, ffn in model.blocks]


def _bands(model: Architecture) -> list[bool]:
    """Whether llama3 scaling keeps, blends and divides some frequency."""
    if model.rope.llama3 is None:
        return []
    _, low, high, old_length = model.rope.llama3
    exponents = np.arange(0, model.kv_channels, 2) / model.kv_channels
    turns = old_length / (2 * np.pi * model.rope.base**exponents)
    return [
        bool((turns > high).any()),
        bool(((turns > low) & (turns < high)).any()),
        bool((turns < low).any()),
    ]


def _coincidences(model: Architecture) -> list[int]:
    """For each dimension, in order, the first that has its size: a tensor fits there by luck."""
    counts = sorted({a.num_query_groups for a, _ in model.blocks if isinstance(a, Attention)})
    widths = sorted({f.ffn_hidden_size for _, f in model.blocks if isinstance(f, Mlp)})
    sizes = [
        model.hidden_size,
        model.num_attention_heads * model.kv_channels,
        *(count * model.kv_channels for count in counts),
        *widths,
        model.vocab_size,
    ]
    return [sizes.index(size) for size in sizes]
