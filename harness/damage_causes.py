"""Which mistake of a mapping puts exactly these lines into a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from harness.tiles import LAYER, Line

Pairs = frozenset[tuple[str, str]]
_QKV: Final = ("q_proj", "k_proj", "v_proj")
_NORMS: Final = ("input_layernorm", "post_attention_layernorm")


def _both(one: str, other: str) -> Pairs:
    return frozenset({(one, other), (other, one)})


_BY_PAIRS: Final[dict[Pairs, str]] = {
    frozenset({("k_proj", "k_proj")}): "k-heads-swapped",
    frozenset({("v_proj", "v_proj")}): "v-heads-swapped",
    frozenset({("q_proj", "q_proj")}): "q-heads-reversed",
    _both("k_proj", "v_proj"): "k-v-swapped",
    _both("gate_proj", "up_proj"): "gate-up-swapped",
    frozenset({_NORMS}): "norms-swapped",
    frozenset({_NORMS[::-1]}): "norms-swapped",
    frozenset({("embed_tokens", "lm_head")}): "embedding-for-output",
    frozenset({("lm_head", "embed_tokens")}): "embedding-for-output",
    frozenset({("embed_tokens", "embed_tokens")}): "embedding-shifted",
    frozenset({("down_proj", "down_proj")}): "fc2-halves-swapped",
    frozenset({("o_proj", "o_proj")}): "proj-one-head-along",
}
"""What is wanted and what is there, of every wrong line, to the name in the catalogue of faults."""
_BY_SHARD: Final = {
    "embed_tokens": "embedding-shards-reversed",
    "down_proj": "fc2-shards-reversed",
    "linear_attn": "linear-shards-reversed",
    "linear_mlp": "linear-shards-reversed",
}


def cause_of(lines: Sequence[Line], held: Sequence[Line | None]) -> str:
    """Name the mistake; "" when some lines are nowhere else, or no mistake does this.

    Args:
        lines: What each line should be.
        held: What each line is.
    """
    wrong: list[tuple[Line, Line]] = []
    for want, got in zip(lines, held, strict=True):
        if got is None:
            return ""
        if want != got:
            wrong.append((want, got))
    if not wrong:
        return ""
    if all(layer_of_line(want) is not None for want, _ in wrong) and all(
        layer_of_line(want) != layer_of_line(got) for want, got in wrong
    ):
        return "layers-swapped"
    pairs = frozenset((kind_of_line(want), kind_of_line(got)) for want, got in wrong)
    if all(want == got for want, got in pairs) and not {w for w, _ in wrong} & {
        g for _, g in wrong
    }:
        kinds = {kind for kind, _ in pairs}
        if len(kinds) > 1:
            return "tp-ranks-reversed"
        if kinds <= _BY_SHARD.keys():
            return _BY_SHARD[kinds.pop()]
    if pairs not in _BY_PAIRS and _is_stacked([got for got in held if got is not None]):
        return "qkv-stacked"
    return _BY_PAIRS.get(pairs, "")


def _is_stacked(held: Sequence[Line]) -> bool:
    if not {kind_of_line(one) for one in held} <= set(_QKV):
        return False
    return list(held) == sorted(held, key=lambda one: (_QKV.index(kind_of_line(one)), one[1]))


def kind_of_line(line: Line) -> str:
    """`k_proj` of `model.layers.3.self_attn.k_proj.weight`."""
    return (line[0] or "padding").removesuffix(".weight").rpartition(".")[2]


def layer_of_line(line: Line) -> int | None:
    """The layer a line belongs to."""
    match = LAYER.fullmatch(line[0] or "")
    return int(match[1]) if match else None
