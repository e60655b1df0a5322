"""Megatron-Core's own configuration classes accept what we build and mean by it what we mean."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.heterogeneous.heterogeneous_config import (
    HeterogeneousTransformerConfig,
)

from bridge.errors import InconsistentConfigError, UnmappedFieldError, UnsupportedFieldError
from bridge.megatron_config import (
    blocks_from_heterogeneous_json,
    heterogeneous_layers_json,
    pipeline_model_parallel_layout,
    transformer_config,
)
from bridge.pipeline import parse_layout
from bridge.spec import (
    BlockSpec,
    GroupedQueryAttention,
    Linear,
    ModelSpec,
    NoOp,
    ParallelLayout,
    RopeSpec,
    SwiGLU,
)

LLAMA = ModelSpec(
    hidden_size=40,
    num_attention_heads=8,
    kv_channels=6,
    vocab_size=131,
    max_position_embeddings=1024,
    layernorm_epsilon=3e-6,
    rope=RopeSpec(rotary_base=500000.0),
    share_embeddings_and_output_weights=False,
    params_dtype="bfloat16",
    blocks=(
        BlockSpec(
            attention=GroupedQueryAttention(num_query_groups=2), ffn=SwiGLU(ffn_hidden_size=56)
        ),
    )
    * 4,
    heterogeneous_block_specs=False,
)
EVERY_KIND = tuple(
    BlockSpec(attention=attention, ffn=ffn)
    for attention in (
        NoOp(),
        Linear(),
        GroupedQueryAttention(num_query_groups=2),
        GroupedQueryAttention(num_query_groups=8),
    )
    for ffn in (NoOp(), Linear(), SwiGLU(ffn_hidden_size=8), SwiGLU(ffn_hidden_size=96))
)
DECILM = dataclasses.replace(LLAMA, blocks=EVERY_KIND, heterogeneous_block_specs=True)


def config(spec: ModelSpec, layout: str = "tp1", dtype: str = "float32") -> Any:  # noqa: ANN401 - untyped
    """The configuration of a named layout."""
    return transformer_config(spec, parse_layout(layout, spec), params_dtype=dtype)


def test_a_homogeneous_model_is_a_plain_transformer_config() -> None:
    """Field by field, the dimensions and the architecture of Llama."""
    found = config(LLAMA)
    assert type(found) is TransformerConfig
    expected = {
        "num_layers": 4,
        "hidden_size": 40,
        "num_attention_heads": 8,
        "kv_channels": 6,
        "num_query_groups": 2,
        "ffn_hidden_size": 56,
        "layernorm_epsilon": 3e-6,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "rotary_interleaved": False,
        "attention_softmax_in_fp32": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "perform_initialization": False,
        "use_cpu_initialization": True,
        "params_dtype": torch.float32,
        "bf16": False,
    }
    assert expected == {name: getattr(found, name) for name in expected}
    fusions = [
        field.name
        for field in dataclasses.fields(found)
        if field.name.endswith("_fusion") and getattr(found, field.name)
    ]
    assert fusions == []


def test_bfloat16_sets_megatrons_flags() -> None:
    """The dtype of weights, of what pipeline ranks exchange, and the bf16 flag agree."""
    found = config(LLAMA, dtype="bfloat16")
    assert (found.params_dtype, found.pipeline_dtype, found.bf16) == (
        torch.bfloat16,
        torch.bfloat16,
        True,
    )


def test_every_layer_of_a_heterogeneous_model_gets_its_own_sizes() -> None:
    """Megatron's own `get_config_for_layer`, on every mixture of block kinds, block 0 a no-op."""
    found = config(DECILM)
    assert type(found) is HeterogeneousTransformerConfig
    for layer_idx, block in enumerate(EVERY_KIND):
        layer = found.get_config_for_layer(layer_idx + 1)
        if isinstance(block.attention, GroupedQueryAttention):
            assert layer.num_query_groups == block.attention.num_query_groups
        if isinstance(block.ffn, SwiGLU):
            assert layer.ffn_hidden_size == block.ffn.ffn_hidden_size
        theirs = found.per_block_parameters[layer_idx]
        assert theirs.attention.no_op == (block.attention == NoOp())
        assert theirs.attention.replace_with_linear == (block.attention == Linear())
        assert theirs.mlp.no_op == (block.ffn == NoOp())
        assert theirs.mlp.replace_with_linear == (block.ffn == Linear())


@pytest.mark.parametrize("layout", ["tp8", "tp2-pp2", "tp1-pp2-vp2", "tp2-pp3"])
def test_layer_configurations_survive_a_pipeline_layout(layout: str) -> None:
    """`get_config_for_layer` copies the whole configuration, the parsed layout included."""
    spec = dataclasses.replace(DECILM, blocks=EVERY_KIND[8:] + EVERY_KIND[:4])
    found = config(spec, layout)
    for layer_number in range(1, spec.num_layers + 1):
        copied = found.get_config_for_layer(layer_number).pipeline_model_parallel_layout
        own = found.pipeline_model_parallel_layout
        assert (copied is None) == (own is None)
        if own is not None:
            assert copied.layout == own.layout


def test_model_wide_sizes_of_a_heterogeneous_model_are_no_blocks() -> None:
    """Not block 0's, and divisible by any TP that divides the heads."""
    for blocks in (EVERY_KIND, EVERY_KIND[::-1]):
        found = config(dataclasses.replace(DECILM, blocks=blocks), "tp8")
        assert found.num_query_groups == 8
        assert found.ffn_hidden_size == 160


def test_an_even_split_leaves_the_layout_to_megatron() -> None:
    """And so does a single stage."""
    assert pipeline_model_parallel_layout(parse_layout("tp1-pp2", LLAMA)) is None
    assert pipeline_model_parallel_layout(parse_layout("tp2", LLAMA)) is None


def test_an_uneven_or_interleaved_split_is_spelled_out() -> None:
    """Stage by stage in the model's order, empty stages included."""
    uneven = ParallelLayout(pipeline_model_parallel_size=3, num_layers_per_stage=(0, 3, 1))
    assert pipeline_model_parallel_layout(uneven) == [
        ["embedding"],
        ["decoder"] * 3,
        ["decoder", "loss"],
    ]
    interleaved = parse_layout("tp1-pp2-vp2", LLAMA)
    assert pipeline_model_parallel_layout(interleaved) == [
        ["embedding", "decoder"],
        ["decoder"],
        ["decoder"],
        ["decoder", "loss"],
    ]


def test_megatron_places_layers_where_the_layout_says() -> None:
    """Its own parse of our list gives each (pp_rank, vp_stage) the layers of our `Stage`."""
    layout = ParallelLayout(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        num_layers_per_stage=(1, 0, 2, 1),
    )
    found = transformer_config(LLAMA, layout, params_dtype="float32")
    parsed = found.pipeline_model_parallel_layout
    counts = [
        sum(layer.name == "decoder" for layer in parsed.layout[stage.pp_rank][stage.vp_stage])
        for stage in layout.stages()
    ]
    assert counts == [1, 0, 2, 1]


def test_the_blocks_are_written_in_one_canonical_form() -> None:
    """Megatron's words, nulls where there is no count, no spaces."""
    spec = dataclasses.replace(
        DECILM,
        blocks=(
            BlockSpec(attention=NoOp(), ffn=SwiGLU(ffn_hidden_size=8)),
            BlockSpec(attention=GroupedQueryAttention(num_query_groups=2), ffn=Linear()),
        ),
    )
    assert heterogeneous_layers_json(spec) == (
        '{"block_configs":['
        '{"attention":{"num_query_groups":null,"no_op":true,"replace_with_linear":false},'
        '"ffn":{"ffn_hidden_size":8,"no_op":false,"replace_with_linear":false}},'
        '{"attention":{"num_query_groups":2,"no_op":false,"replace_with_linear":false},'
        '"ffn":{"ffn_hidden_size":null,"no_op":false,"replace_with_linear":true}}]}'
    )


def _read(text: str, num_layers: int = 1) -> tuple[BlockSpec, ...]:
    return blocks_from_heterogeneous_json(
        text, hidden_size=384, num_attention_heads=8, num_layers=num_layers
    )


def test_the_blocks_are_read_back() -> None:
    """Writing and reading are inverse, for every kind of block."""
    assert _read(heterogeneous_layers_json(DECILM), len(EVERY_KIND)) == EVERY_KIND


def test_blocks_in_the_words_of_a_published_configuration_are_read_too() -> None:
    """Megatron-LM stores the file it was given, which is usually `config.json`."""
    text = json.dumps(
        {
            "hidden_size": 384,
            "block_configs": [
                {
                    "attention": {"n_heads_in_group": 4, "no_op": False, "window_length": None},
                    "mlp": {"ffn_mult": 1.0, "no_op": False, "replace_with_linear": False},
                }
            ],
        }
    )
    # 2 * 1.0 * 384 / 3 = 256 exactly; 8 heads in groups of 4.
    assert _read(text) == (
        BlockSpec(
            attention=GroupedQueryAttention(num_query_groups=2), ffn=SwiGLU(ffn_hidden_size=256)
        ),
    )


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"window_length": 512}, UnsupportedFieldError, "window_length=512"),
        ({"mystery": 1}, UnmappedFieldError, "mystery"),
        ({"num_query_groups": 3}, InconsistentConfigError, "does not divide"),
        ({"num_query_groups": None}, InconsistentConfigError, "neither"),
    ],
)
def test_fields_that_megatron_would_drop_silently_are_refused(
    change: dict[str, object], error: type[Exception], says: str
) -> None:
    """By block and name; a missing count is not filled in from the model-wide one."""
    attention = {"num_query_groups": 2, "no_op": False, "replace_with_linear": False} | change
    block = {"attention": attention, "ffn": {"ffn_hidden_size": 8}}
    with pytest.raises(error, match=says):
        _read(json.dumps({"block_configs": [block]}))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"blocks": []}', '{"block_configs": 3}'])
def test_text_that_holds_no_blocks_is_refused(text: str) -> None:
    """As an inconsistent configuration, not a traceback."""
    with pytest.raises(InconsistentConfigError):
        _read(text)
