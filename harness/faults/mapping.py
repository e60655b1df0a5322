"""Wrong mappings: a row, a head or a layer of one tensor taken for another's.

All but a few are bijections, so that they undo themselves in a round trip.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Final

from bridge.parameters import Parameter
from bridge.spec import GroupedQueryAttention, ModelSpec
from bridge.tiling import Tiling
from harness.faults import traits
from harness.faults.seams import (
    Reshaped,
    Retiled,
    Together,
    permute_columns,
    permute_rows,
    rename_sources,
)
from harness.hooks import Fault

_QKV: Final = ("linear_qkv.weight",)
_PROJ: Final = ("linear_proj.weight",)
_FC1: Final = ("linear_fc1.weight",)
_FC2: Final = ("linear_fc2.weight",)
_NORMS: Final = ("layer_norm_weight",)
_EMBEDDING: Final = ("embedding.word_embeddings.weight",)


def _groups(spec: ModelSpec, layer_idx: int | None) -> int:
    attention = spec.blocks[layer_idx or 0].attention
    if not isinstance(attention, GroupedQueryAttention):
        raise TypeError(f"block {layer_idx} has no attention")  # and no linear_qkv to ask about
    return attention.num_query_groups


def _heads(spec: ModelSpec, layer_idx: int | None) -> list[list[tuple[str, int]]]:
    """Heads of `linear_qkv` in order, group by group: (kind, number in the group)."""
    groups = _groups(spec, layer_idx)
    queries = spec.num_attention_heads // groups
    one = [*(("q", n) for n in range(queries)), ("k", 0), ("v", 0)]
    return [one] * groups


def _by_head(tiling: Tiling, spec: ModelSpec, order: list[int]) -> Tiling:
    """Heads of `linear_qkv` in another order."""
    size = spec.kv_channels
    rows = [head * size + channel for head in order for channel in range(size)]
    return permute_rows(tiling, rows)


def _numbered(spec: ModelSpec, layer_idx: int | None) -> Iterator[tuple[int, int, str, int]]:
    """(head in the whole, group, kind, number in the group)."""
    position = 0
    for group, heads in enumerate(_heads(spec, layer_idx)):
        for kind, number in heads:
            yield position, group, kind, number
            position += 1


def stacked(tiling: Tiling, spec: ModelSpec, layer_idx: int | None) -> Tiling:
    """All queries, then all keys, then all values."""
    heads = list(_numbered(spec, layer_idx))
    order = [one[0] for kind in "qkv" for one in heads if one[2] == kind]
    return _by_head(tiling, spec, order)


def swapped(kind: str, tiling: Tiling, spec: ModelSpec, layer_idx: int | None) -> Tiling:
    """The first two groups have each other's key (or value) head."""
    heads = list(_numbered(spec, layer_idx))
    order = [one[0] for one in heads]
    mine = [one[0] for one in heads if one[2] == kind]
    if len(mine) > 1:
        order[mine[0]], order[mine[1]] = order[mine[1]], order[mine[0]]
    return _by_head(tiling, spec, order)


def key_for_value(tiling: Tiling, spec: ModelSpec, layer_idx: int | None) -> Tiling:
    """Each group's value stands before its key."""
    order = [one[0] for one in _numbered(spec, layer_idx)]
    per_group = len(order) // _groups(spec, layer_idx)
    for last in range(per_group - 1, len(order), per_group):
        order[last - 1], order[last] = order[last], order[last - 1]
    return _by_head(tiling, spec, order)


def queries_reversed(tiling: Tiling, spec: ModelSpec, layer_idx: int | None) -> Tiling:
    """Within a group the query heads run backwards."""
    heads = list(_numbered(spec, layer_idx))
    per_group = len(heads) // _groups(spec, layer_idx)
    order = []
    for start in range(0, len(heads), per_group):
        order += [*range(start + per_group - 3, start - 1, -1), start + per_group - 2]
        order.append(start + per_group - 1)
    return _by_head(tiling, spec, order)


def proj_reversed(tiling: Tiling, spec: ModelSpec, layer_idx: int | None) -> Tiling:
    """The columns of `linear_proj` that go with `queries_reversed`."""
    size, heads = spec.kv_channels, spec.num_attention_heads
    per_group = heads // _groups(spec, layer_idx)
    order = [
        head * size + channel
        for start in range(0, heads, per_group)
        for head in range(start + per_group - 1, start - 1, -1)
        for channel in range(size)
    ]
    return permute_columns(tiling, order)


def rope_order(tiling: Tiling, spec: ModelSpec, layer_idx: int | None) -> Tiling:
    """Query and key rows permuted as for interleaved RoPE: 0, n/2, 1, n/2 + 1 ..."""
    size = spec.kv_channels
    half = size // 2
    inner = [channel // 2 + half * (channel % 2) for channel in range(size)]
    rows: list[int] = []
    for head, _, kind, _ in _numbered(spec, layer_idx):
        rows += [head * size + (i if kind == "v" else inner[i]) for i in range(size)]
    return permute_rows(tiling, rows)


def gate_and_up(tiling: Tiling, _spec: ModelSpec, _layer_idx: int | None) -> Tiling:
    """Up before gate."""
    rows = tiling.shape[0]
    return permute_rows(tiling, [*range(rows // 2, rows), *range(rows // 2)])


def interleaved(tiling: Tiling, _spec: ModelSpec, _layer_idx: int | None) -> Tiling:
    """Half of gate, half of up, half of gate, half of up: as two ranks would lay it out."""
    width = tiling.shape[0] // 2
    half = width // 2
    order = [
        *range(half), *range(width, width + half),
        *range(half, width), *range(width + half, 2 * width),
    ]  # fmt: skip
    return permute_rows(tiling, order)


def other_units_first(tiling: Tiling, _spec: ModelSpec, _layer_idx: int | None) -> Tiling:
    """The second half of the feed-forward's hidden units first, in gate and up alike."""
    width = tiling.shape[0] // 2
    half = width // 2
    order = [
        *range(half, width), *range(half),
        *range(width + half, 2 * width), *range(width, width + half),
    ]  # fmt: skip
    return permute_rows(tiling, order)


def halves_of_columns(tiling: Tiling, _spec: ModelSpec, _layer_idx: int | None) -> Tiling:
    """The second half of the inputs first."""
    columns = tiling.shape[1]
    return permute_columns(tiling, [*range(columns // 2, columns), *range(columns // 2)])


def one_head_along(tiling: Tiling, spec: ModelSpec, _layer_idx: int | None) -> Tiling:
    """`linear_proj` reads each head's neighbour."""
    columns, size = tiling.shape[1], spec.kv_channels
    return permute_columns(tiling, [*range(size, columns), *range(size)])


def one_row_along(tiling: Tiling, spec: ModelSpec, _layer_idx: int | None) -> Tiling:
    """Every token has its neighbour's row."""
    rows, vocab = tiling.shape[0], spec.vocab_size
    return permute_rows(tiling, [*range(1, vocab), 0, *range(vocab, rows)])


def other_norm(tiling: Tiling, spec: ModelSpec, layer_idx: int | None) -> Tiling:
    """Where a block has two norms, each is the other."""
    layer = f"model.layers.{layer_idx}"
    first, second = f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight"
    block = spec.blocks[layer_idx or 0]
    if type(block.attention).__name__ == "NoOp" or type(block.ffn).__name__ == "NoOp":
        return tiling
    return rename_sources(tiling, {first: second, second: first})


def other_layer(tiling: Tiling, spec: ModelSpec, layer_idx: int | None) -> Tiling:
    """Two blocks of one FFN width have each other's feed-forward."""
    pair = traits.twins(spec)
    if pair is None or layer_idx not in pair:
        return tiling
    other = pair[1] if layer_idx == pair[0] else pair[0]
    names = {
        f"model.layers.{layer_idx}.mlp.{part}_proj.weight": (
            f"model.layers.{other}.mlp.{part}_proj.weight"
        )
        for part in ("gate", "up", "down")
    }
    return rename_sources(tiling, names)


def embedding_for_output(tiling: Tiling, _spec: ModelSpec, _layer_idx: int | None) -> Tiling:
    """Embedding and output layer exchanged: they have one shape."""
    one, other = "model.embed_tokens.weight", "lm_head.weight"
    return rename_sources(tiling, {one: other, other: one})


def left_out(one: Parameter, _spec: ModelSpec) -> Parameter | None:
    """The parameter is not in the table."""
    return None if one.layer_idx in (None, 0, 1, 2) else one


def whole_shards(one: Parameter, _spec: ModelSpec) -> Parameter:
    """Sharded as one piece."""
    return dataclasses.replace(one, segments=(sum(one.segments),))


def shards_of_each(one: Parameter, spec: ModelSpec) -> Parameter:
    """Queries, keys and values sharded one by one, as if they were stacked."""
    groups = _groups(spec, one.layer_idx)
    size, heads = spec.kv_channels, spec.num_attention_heads
    return dataclasses.replace(one, segments=(heads * size, groups * size, groups * size))


_mapping = partial(Fault, family="mapping")
_layout = partial(Fault, family="layout")

FAULTS: Final = (
    _mapping(name="gate-up-swapped",
             stands_for="a SwiGLU whose halves are stacked the other way, as in some other "
             "frameworks",
             applies=traits.has_swiglu, code=Retiled(_FC1, gate_and_up)),
    _mapping(name="gate-up-interleaved",
             stands_for="fc1 of a TP=2 training run taken for that of one rank: old Megatron "
             "checkpoints",
             applies=traits.has_swiglu, code=Retiled(_FC1, interleaved)),
    _mapping(name="qkv-stacked",
             stands_for="all queries, all keys, all values: the order of Hugging Face's fused "
             "checkpoints",
             applies=traits.has_groups, code=Retiled(_QKV, stacked)),
    _mapping(name="k-heads-swapped", stands_for="an off-by-one over the query groups",
             applies=traits.has_groups, code=Retiled(_QKV, partial(swapped, "k"))),
    _mapping(name="v-heads-swapped", stands_for="an off-by-one over the query groups",
             applies=traits.has_groups, code=Retiled(_QKV, partial(swapped, "v"))),
    _mapping(name="k-v-swapped", stands_for="[q; v; k] in place of [q; k; v]",
             applies=traits.has_attention, code=Retiled(_QKV, key_for_value)),
    _mapping(name="q-heads-reversed",
             stands_for="a reshape of (heads, groups) in place of (groups, heads)",
             applies=traits.has_queries_to_share, code=Retiled(_QKV, queries_reversed)),
    _mapping(name="q-heads-and-proj-reversed",
             stands_for="a consistent renumbering of heads: the function is the same, the "
             "checkpoint is not",
             applies=traits.has_queries_to_share,
             code=Together((Retiled(_QKV, queries_reversed), Retiled(_PROJ, proj_reversed)))),
    _mapping(name="ffn-units-renumbered",
             stands_for="a consistent renumbering of FFN units, as width pruning does: same "
             "function",
             applies=traits.has_swiglu,
             code=Together((Retiled(_FC1, other_units_first), Retiled(_FC2, halves_of_columns)))),
    _mapping(name="rope-rows-permuted",
             stands_for="the permutation of Meta's original Llama weights, applied a second time",
             applies=traits.has_attention, code=Retiled(_QKV, rope_order)),
    _mapping(name="fc2-halves-swapped",
             stands_for="down_proj whose input shards were joined in the wrong order",
             applies=traits.has_swiglu, code=Retiled(_FC2, halves_of_columns)),
    _mapping(name="proj-one-head-along", stands_for="o_proj sliced one head off",
             applies=traits.has_attention, code=Retiled(_PROJ, one_head_along)),
    _mapping(name="norms-swapped",
             stands_for="input_layernorm and post_attention_layernorm exchanged",
             applies=traits.has_full_block, code=Retiled(_NORMS, other_norm)),
    _mapping(name="layers-swapped", stands_for="layer numbers sorted as text: 10 before 2",
             applies=traits.has_twins, code=Retiled((*_FC1, *_FC2), other_layer)),
    _mapping(name="embedding-shifted",
             stands_for="a special token added in front of the vocabulary",
             code=Retiled(_EMBEDDING, one_row_along)),
    _mapping(name="embedding-for-output", stands_for="embed_tokens and lm_head exchanged",
             applies=traits.is_untied,
             code=Retiled(("embeddings.weight", "output_layer.weight"), embedding_for_output)),
    _mapping(name="norm-dropped",
             stands_for="a norm that the mapping table forgot, silently left at ones",
             code=Reshaped(_NORMS, left_out)),
    _mapping(name="proj-dropped", stands_for="an o_proj that the mapping table forgot",
             applies=traits.has_attention, code=Reshaped(_PROJ, left_out)),
    _layout(name="fc1-sharded-whole",
            stands_for="TP ranks that get rows of the stacked fc1: rank 0 all gate, rank 1 all up",
            needs=("tp",), applies=traits.has_swiglu, code=Reshaped(_FC1, whole_shards)),
    _layout(name="qkv-sharded-by-kind", stands_for="TP shards cut from q, k and v one by one",
            needs=("tp",), applies=traits.has_groups, code=Reshaped(_QKV, shards_of_each)),
)  # fmt: skip
