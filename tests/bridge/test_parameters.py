"""The table: rows written out by hand, names, shards, and the published counts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge.errors import PlanError
from bridge.hf_config import load_hf_config, spec_from_hf_config
from bridge.parameters import (
    Parameter,
    block_num_parameters,
    embedding_num_parameters,
    hf_tensors,
    hf_tilings,
    num_parameters,
    output_num_parameters,
    parameters,
)
from bridge.pipeline import plan_layout, stage_num_parameters
from bridge.spec import (
    BlockSpec,
    GroupedQueryAttention,
    Linear,
    ModelSpec,
    NoOp,
    RopeSpec,
    SwiGLU,
)

VARIANTS = Path(__file__).parents[2] / "suites" / "variants"


def model(
    *blocks: BlockSpec, heads: int = 4, hidden: int = 6, vocab: int = 5, **changes: object
) -> ModelSpec:
    """A model small enough to write its rows down; two channels a head."""
    values: dict[str, Any] = {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "kv_channels": 2,
        "vocab_size": vocab,
        "max_position_embeddings": 64,
        "layernorm_epsilon": 1e-5,
        "rope": RopeSpec(rotary_base=10000.0),
        "share_embeddings_and_output_weights": False,
        "params_dtype": "float32",
        "blocks": blocks,
        "heterogeneous_block_specs": True,
    }
    return ModelSpec(**values | changes)


def attention(groups: int) -> BlockSpec:
    """A block of attention alone."""
    return BlockSpec(attention=GroupedQueryAttention(num_query_groups=groups), ffn=NoOp())


def ffn(width: int) -> BlockSpec:
    """A block of feed-forward alone."""
    return BlockSpec(attention=NoOp(), ffn=SwiGLU(ffn_hidden_size=width))


def row_names(parameter: Parameter, *, rank: int = 0, tp: int = 1) -> list[str]:
    """Where each row of a shard comes from: `q3` is row 3 of `q_proj`, `-` is padding."""
    tiling = parameter.shard(rank, tp)
    found = []
    for row in range(tiling.shape[0]):
        source, index = tiling.locate((row, *(0,) * (len(tiling.shape) - 1)))
        found.append("-" if source is None else f"{source.split('.')[-2].split('_')[0]}{index[0]}")
    return found


QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.0.mlp.linear_fc1.weight"

# Four query heads of two channels: head h is rows 2h and 2h + 1 of q_proj, and so for keys and
# values. Megatron keeps, for each query group, its query heads, then its key head, its value head.
MHA = [
    "q0", "q1", "k0", "k1", "v0", "v1",
    "q2", "q3", "k2", "k3", "v2", "v3",
    "q4", "q5", "k4", "k5", "v4", "v5",
    "q6", "q7", "k6", "k7", "v6", "v7",
]  # fmt: skip
GQA = [
    "q0", "q1", "q2", "q3", "k0", "k1", "v0", "v1",
    "q4", "q5", "q6", "q7", "k2", "k3", "v2", "v3",
]  # fmt: skip
MQA = [
    "q0", "q1", "q2", "q3", "q4", "q5", "q6", "q7", "k0", "k1", "v0", "v1",
]  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "rows"), [(4, MHA), (2, GQA), (1, MQA)], ids=["mha", "gqa", "mqa"]
)
def test_linear_qkv_runs_group_by_group(groups: int, rows: list[str]) -> None:
    """Multi-head, grouped and multi-query attention have the rows written out above."""
    table = parameters(model(attention(groups)), padded_vocab_size=5)
    assert row_names(table[QKV]) == rows


@pytest.mark.parametrize(
    ("groups", "tp", "shards"),
    [
        (4, 2, [MHA[:12], MHA[12:]]),
        (2, 2, [GQA[:8], GQA[8:]]),
        # Fewer groups than ranks: Megatron deals out the rows as they stand.
        (2, 4, [GQA[:4], GQA[4:8], GQA[8:12], GQA[12:]]),
        (1, 4, [MQA[:3], MQA[3:6], MQA[6:9], MQA[9:]]),
    ],
    ids=["mha-tp2", "gqa-tp2", "gqa-tp4", "mqa-tp4"],
)
def test_linear_qkv_is_cut_into_even_runs_of_rows(
    groups: int, tp: int, shards: list[list[str]]
) -> None:
    """TP rank r holds the r-th run of the grouped rows, whole groups or not."""
    parameter = parameters(model(attention(groups)), padded_vocab_size=5)[QKV]
    assert [row_names(parameter, rank=rank, tp=tp) for rank in range(tp)] == shards


@pytest.mark.parametrize(
    ("tp", "shards"),
    [
        (1, [["gate0", "gate1", "gate2", "gate3", "up0", "up1", "up2", "up3"]]),
        (2, [["gate0", "gate1", "up0", "up1"], ["gate2", "gate3", "up2", "up3"]]),
        (4, [["gate0", "up0"], ["gate1", "up1"], ["gate2", "up2"], ["gate3", "up3"]]),
    ],
)
def test_linear_fc1_holds_gate_then_up_on_every_rank(tp: int, shards: list[list[str]]) -> None:
    """Each rank activates its first half and multiplies by its second: gate, then up."""
    parameter = parameters(model(ffn(4)), padded_vocab_size=5)[FC1]
    assert [row_names(parameter, rank=rank, tp=tp) for rank in range(tp)] == shards


def test_row_parallel_linears_are_cut_by_columns() -> None:
    """`linear_proj` and `linear_fc2` shard what they read, so that each rank keeps every row."""
    block = BlockSpec(
        attention=GroupedQueryAttention(num_query_groups=2), ffn=SwiGLU(ffn_hidden_size=12)
    )
    table = parameters(model(block), padded_vocab_size=5)
    proj = table["decoder.layers.0.self_attention.linear_proj.weight"]
    assert proj.shape == (6, 8)
    assert proj.shard(1, 2).locate((5, 0)) == ("model.layers.0.self_attn.o_proj.weight", (5, 4))
    fc2 = table["decoder.layers.0.mlp.linear_fc2.weight"]
    assert fc2.shard(2, 4).shape == (6, 3)
    assert fc2.shard(2, 4).locate((1, 2)) == ("model.layers.0.mlp.down_proj.weight", (1, 8))


def test_linears_are_cut_by_rows_and_norms_not_at_all() -> None:
    """A linear replacement is column parallel; every rank keeps the whole norm."""
    table = parameters(model(BlockSpec(attention=Linear(), ffn=Linear())), padded_vocab_size=5)
    for name, source in (
        ("self_attention", "self_attn.linear_attn"),
        ("mlp", "mlp.linear_mlp"),
    ):
        weight = table[f"decoder.layers.0.{name}.weight"]
        assert weight.shard(1, 2).shape == (3, 6)
        assert weight.shard(1, 2).locate((0, 4)) == (f"model.layers.0.{source}.weight", (3, 4))
        norm = table[f"decoder.layers.0.{name}.layer_norm_weight"]
        assert norm.shard(1, 2).shape == (6,)


def test_vocabulary_padding_is_zeros_after_the_last_row() -> None:
    """Rows beyond the vocabulary come last and have no source; the last rank holds them."""
    table = parameters(model(ffn(4)), padded_vocab_size=8)
    for name, source in (
        ("embedding.word_embeddings.weight", "embed"),
        ("output_layer.weight", "lm"),
    ):
        rows = [f"{source}{row}" for row in range(5)] + ["-"] * 3
        if source == "lm":
            rows = [f"lm{row}" for row in range(5)] + ["-"] * 3
        assert row_names(table[name]) == rows
        assert row_names(table[name], rank=1, tp=2) == rows[4:]


def test_less_room_than_vocabulary_is_refused() -> None:
    """Fewer rows than tokens would drop embeddings."""
    with pytest.raises(PlanError):
        parameters(model(ffn(4)), padded_vocab_size=4)


def test_a_tied_model_has_no_output_layer() -> None:
    """Tied embeddings are one tensor on both sides, counted once."""
    tied = model(ffn(4), share_embeddings_and_output_weights=True)
    assert "output_layer.weight" not in parameters(tied, padded_vocab_size=5)
    assert "lm_head.weight" not in hf_tensors(tied)
    assert num_parameters(model(ffn(4))) - num_parameters(tied) == 5 * 6
    assert output_num_parameters(tied) == 6


def test_head_size_is_its_own_when_hidden_is_not_heads_times_it() -> None:
    """Nano-4B's trait: projections have heads x kv_channels rows, whatever the hidden size."""
    shapes = hf_tensors(model(attention(2), hidden=10))
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (8, 10)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (4, 10)
    assert shapes["model.layers.0.self_attn.v_proj.weight"] == (4, 10)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (10, 8)


def test_names_shapes_and_order_are_those_of_both_checkpoints() -> None:
    """One model of each kind of sub-block, its tensors written out on both sides."""
    spec = model(
        BlockSpec(attention=GroupedQueryAttention(num_query_groups=2), ffn=Linear()),
        BlockSpec(attention=NoOp(), ffn=NoOp()),
        BlockSpec(attention=Linear(), ffn=SwiGLU(ffn_hidden_size=3)),
    )
    assert dict(hf_tensors(spec)) == {
        "model.embed_tokens.weight": (5, 6),
        "model.layers.0.input_layernorm.weight": (6,),
        "model.layers.0.self_attn.q_proj.weight": (8, 6),
        "model.layers.0.self_attn.k_proj.weight": (4, 6),
        "model.layers.0.self_attn.v_proj.weight": (4, 6),
        "model.layers.0.self_attn.o_proj.weight": (6, 8),
        "model.layers.0.post_attention_layernorm.weight": (6,),
        "model.layers.0.mlp.linear_mlp.weight": (6, 6),
        "model.layers.2.input_layernorm.weight": (6,),
        "model.layers.2.self_attn.linear_attn.weight": (6, 6),
        "model.layers.2.post_attention_layernorm.weight": (6,),
        "model.layers.2.mlp.gate_proj.weight": (3, 6),
        "model.layers.2.mlp.up_proj.weight": (3, 6),
        "model.layers.2.mlp.down_proj.weight": (6, 3),
        "model.norm.weight": (6,),
        "lm_head.weight": (5, 6),
    }
    table = parameters(spec, padded_vocab_size=8)
    assert {name: (p.shape, p.layer_idx) for name, p in table.items()} == {
        "embedding.word_embeddings.weight": ((8, 6), None),
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": ((6,), 0,
        ),
        "decoder.layers.0.self_attention.linear_qkv.weight": ((16, 6), 0,
        ),
        "decoder.layers.0.self_attention.linear_proj.weight": ((6, 8), 0,
        ),
        "decoder.layers.0.mlp.layer_norm_weight": ((6,), 0,
        ),
        "decoder.layers.0.mlp.weight": ((6, 6), 0),
        "decoder.layers.2.self_attention.layer_norm_weight": ((6,), 2,
        ),
        "decoder.layers.2.self_attention.weight": ((6, 6), 2,
        ),
        "decoder.layers.2.mlp.linear_fc1.layer_norm_weight": ((6,), 2,
        ),
        "decoder.layers.2.mlp.linear_fc1.weight": ((6, 6), 2,
        ),
        "decoder.layers.2.mlp.linear_fc2.weight": ((6, 3), 2,
        ),
        "decoder.final_layernorm.weight": ((6,), None),
        "output_layer.weight": ((8, 6), None),
    }  # fmt: skip


def test_segments_are_the_chunks_megatron_stores() -> None:
    """Gate and up are two chunks, `linear_qkv` and everything else one."""
    block = BlockSpec(
        attention=GroupedQueryAttention(num_query_groups=2), ffn=SwiGLU(ffn_hidden_size=3)
    )
    table = parameters(model(block), padded_vocab_size=8)
    assert {name: p.segments for name, p in table.items() if len(p.segments) > 1} == {FC1: (3, 3)}
    assert [box.slices for box in table[FC1].segment_boxes] == [
        (slice(0, 3), slice(0, 6)),
        (slice(3, 6), slice(0, 6)),
    ]
    assert all(sum(p.segments) == p.shape[0] for p in table.values())


# The published counts, not ours: from the checkpoints' own pages and index files.
PUBLISHED = {
    "Llama-3.1-Nemotron-Nano-4B-v1.1": (4_512_746_496, 291, 32),
    "Llama-3.1-Nemotron-Nano-8B-v1": (8_030_261_248, 291, 32),
    "Llama-3.1-Nemotron-70B-Instruct-HF": (70_553_706_496, 723, 80),
    "Llama-3_3-Nemotron-Super-49B-v1": (49_867_145_216, 568, 80),
    "Llama-3_3-Nemotron-Super-49B-v1_5": (49_867_145_216, 568, 80),
    "Llama-3_1-Nemotron-Ultra-253B-v1": (253_401_268_224, 647, 162),
}


def published(name: str) -> ModelSpec:
    """The model of a published configuration."""
    return spec_from_hf_config(load_hf_config(VARIANTS / f"{name}.json"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_counts(name: str) -> None:
    """Parameters, tensors and layers of the real configurations, to the last one."""
    spec = published(name)
    count, num_tensors, num_layers = PUBLISHED[name]
    assert num_parameters(spec) == count
    assert len(hf_tensors(spec)) == num_tensors
    assert spec.num_layers == num_layers
    blocks = sum(block_num_parameters(spec, layer_idx) for layer_idx in range(num_layers))
    assert embedding_num_parameters(spec) + blocks + output_num_parameters(spec) == count
    assert all(tiling.tiles for tiling in hf_tilings(spec, padded_vocab_size=129024).values())


def test_every_published_configuration_is_counted() -> None:
    """No variant is left out of the table above."""
    configs = {
        path.stem
        for path in VARIANTS.glob("*.json")
        if "architectures" in json.loads(path.read_text())
    }
    assert configs >= set(PUBLISHED)
    stray = [name for name in configs - set(PUBLISHED) if "51B" not in name]
    assert stray == []


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(("pp", "vpp"), [(2, None), (8, None), (4, 2)])
def test_stages_of_published_models_add_up(name: str, pp: int, vpp: int | None) -> None:
    """However the pipeline is cut, its stages hold the published number of parameters."""
    spec = published(name)
    layout = plan_layout(
        spec, pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp
    )
    sizes = stage_num_parameters(spec, layout)
    assert len(sizes) == pp * (vpp or 1)
    assert sum(sizes) == PUBLISHED[name][0]


def test_ultra_is_as_heterogeneous_as_published() -> None:
    """98 attention no-ops, 81 blocks of nothing, four fused FFNs, one block of 20.9 billion."""
    spec = published("Llama-3_1-Nemotron-Ultra-253B-v1")
    nothing = BlockSpec(attention=NoOp(), ffn=NoOp())
    assert sum(isinstance(block.attention, NoOp) for block in spec.blocks) == 98
    assert sum(isinstance(block.ffn, NoOp) for block in spec.blocks) == 81
    assert sum(block == nothing for block in spec.blocks) == 81
    widths = {b.ffn.ffn_hidden_size for b in spec.blocks if isinstance(b.ffn, SwiGLU)}
    assert sorted(widths)[-5:] == [53248, 301056, 343040, 399360, 425984]
    assert min(widths) == 5376
    largest = max(block_num_parameters(spec, layer_idx) for layer_idx in range(162))
    assert largest == 3 * 425984 * 16384 + 16384
    groups = {
        b.attention.num_query_groups
        for b in spec.blocks
        if isinstance(b.attention, GroupedQueryAttention)
    }
    assert groups == {8}


def test_super_has_its_published_widths() -> None:
    """31 attention no-ops, no FFN no-op, six widths."""
    spec = published("Llama-3_3-Nemotron-Super-49B-v1")
    assert sum(isinstance(block.attention, NoOp) for block in spec.blocks) == 31
    widths = {b.ffn.ffn_hidden_size for b in spec.blocks if isinstance(b.ffn, SwiGLU)}
    assert widths == {2816, 5632, 7168, 14336, 17920, 28672}
    assert all(isinstance(block.ffn, SwiGLU) for block in spec.blocks)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_rank_of_ultra_reads_its_share_once(tp: int) -> None:
    """All ranks together read each HF tensor of Ultra once, and each norm TP times."""
    spec = published("Llama-3_1-Nemotron-Ultra-253B-v1")
    blocks = tuple(dict.fromkeys(spec.blocks))  # each kind of block once: the others are its like
    spec = replace(spec, blocks=blocks)
    read: dict[str, int] = {}
    table = parameters(spec, padded_vocab_size=spec.padded_vocab_size(tp))
    for parameter in table.values():
        for rank in range(tp):
            for tile in parameter.shard(rank, tp).tiles:
                if tile.source:
                    read[tile.source] = read.get(tile.source, 0) + tile.source_box.volume
    expected = {
        name: math.prod(shape) * (tp if len(shape) == 1 else 1)
        for name, shape in hf_tensors(spec).items()
    }
    assert read == expected


def test_grouped_rows_are_those_megatron_takes_apart() -> None:
    """Seen as (groups, heads per group + 2, channels), q comes first, then k, then v."""
    groups, heads, channels = 2, 4, 2
    rows = np.array(row_names(parameters(model(attention(groups)), padded_vocab_size=5)[QKV]))
    mixed = rows.reshape(groups, heads // groups + 2, channels)
    assert mixed[:, :-2].reshape(-1).tolist() == [f"q{row}" for row in range(8)]
    assert mixed[:, -2].reshape(-1).tolist() == [f"k{row}" for row in range(4)]
    assert mixed[:, -1].reshape(-1).tolist() == [f"v{row}" for row in range(4)]
