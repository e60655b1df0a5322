"""Mistakes of attention, but for its rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from harness import oracle
from harness.mistakes.setup import Mistake, Setup, with_
from harness.mistakes.weights import (
    columns_in_order,
    renamed,
    rows_in_order,
    scaled,
    stacked,
    transposed,
)
from harness.oracle import Architecture, Array, Weight


def of_attention(setup: Setup, groups: int) -> Iterator[Mistake]:
    """Scale, mask, and heads that are not where they belong."""
    model, weight = setup.model, setup.weight
    heads, channels = model.num_attention_heads, model.kv_channels
    root = math.sqrt(channels)
    for says, scale in (("1 / channels", 1 / root), ("none", root)):
        yield (
            "attention-scale",
            f"scale of scores: {says}",
            with_(setup, weight=scaled(weight, "q_proj", scale)),
        )
    for name, says, ahead in (
        ("mask-off-by-one", "every token sees its successor", 1),
        ("not-causal", "every token sees all others", 1 << 30),
    ):
        yield name, says, with_(setup, attention=partial(windowed_attention, ahead, oracle.rotate))
    yield (
        "k-v-swapped",
        "keys and values exchanged",
        with_(setup, weight=renamed(weight, {"k_proj": "v_proj", "v_proj": "k_proj"})),
    )
    per_group = heads // groups
    if groups > 1:
        swap = [1, 0, *range(2, groups)]
        for part in ("k", "v"):
            yield (
                f"{part}-heads-swapped",
                f"the first two groups' {part.upper()} exchanged",
                with_(
                    setup, weight=rows_in_order(weight, {f"{part}_proj": by_head(swap, channels)})
                ),
            )
            back = list(range(groups))[::-1]
            yield (
                f"{part}-heads-reversed",
                f"{part.upper()} heads run backwards",
                with_(
                    setup, weight=rows_in_order(weight, {f"{part}_proj": by_head(back, channels)})
                ),
            )
        yield (
            "qkv-stacked",
            "queries, keys and values one after the other",
            with_(setup, weight=stacked(setup, groups)),
        )
    if 1 < groups < heads:
        order = sorted(range(heads), key=lambda head: (head % groups, head))
        tiled = rows_in_order(weight, {"q_proj": by_head(order, channels)})
        tiled = columns_in_order(tiled, {"o_proj": by_head(order, channels)})
        yield (
            "groups-tiled",
            "groups repeated 0 1 0 1 in place of 0 0 1 1",
            with_(setup, weight=tiled),
        )
    reversed_heads = [
        head
        for start in range(0, heads, per_group)
        for head in range(start + per_group - 1, start - 1, -1)
    ]
    if per_group > 1:
        yield (
            "q-heads-reversed",
            "within a group the query heads run backwards",
            with_(
                setup, weight=rows_in_order(weight, {"q_proj": by_head(reversed_heads, channels)})
            ),
        )
    along = [*range(1, heads), 0]
    yield (
        "proj-one-head-along",
        "the output projection reads each head's neighbour",
        with_(setup, weight=columns_in_order(weight, {"o_proj": by_head(along, channels)})),
    )
    yield (
        "linear-transposed",
        "the output projection transposed",
        with_(setup, weight=transposed(weight, "o_proj")),
    )


def by_head(order: list[int], channels: int) -> list[int]:
    """Rows of whole heads, the heads in this order."""
    return [head * channels + channel for head in order for channel in range(channels)]


def windowed_attention(
    ahead: int,
    rotate: Callable[[Array, Array], Array],
    x: Array,
    angles: Array,
    weight: Weight,
    *,
    prefix: str,
    model: Architecture,
    groups: int,
) -> Array:
    """Attention that sees `ahead` tokens into the future and turns heads by `rotate`."""
    batch, seq, hidden = x.shape
    heads, channels = model.num_attention_heads, model.kv_channels

    def project(name: str, count: int) -> Array:
        rows = oracle.linear(x, weight, f"{prefix}.{name}.weight", (count * channels, hidden))
        return rows.reshape(batch, seq, count, channels).transpose(0, 2, 1, 3)

    query = rotate(project("q_proj", heads), angles[:, None])
    key = np.repeat(rotate(project("k_proj", groups), angles[:, None]), heads // groups, 1)
    value = np.repeat(project("v_proj", groups), heads // groups, 1)
    scores = np.einsum("bhqc,bhkc->bhqk", query, key) / math.sqrt(channels)
    distance = np.arange(seq)[None, :] - np.arange(seq)[:, None]
    scores = np.where(distance > ahead, -np.inf, scores)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    mixed = np.einsum("bhqk,bhkc->bqhc", shares, value).reshape(batch, seq, heads * channels)
    return oracle.linear(mixed, weight, f"{prefix}.o_proj.weight", (hidden, heads * channels))
