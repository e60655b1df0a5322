"""Names for what a model, a configuration or a layout has, to tell what a test has met.

A strategy that quietly never draws a no-op block 0 makes every test built on it weaker than its
name. So a test that draws gathers the features of its draws and asserts, at its end, that none of
those it stands for is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from bridge.spec import (
    BlockSpec,
    GroupedQueryAttention,
    Linear,
    ModelSpec,
    NoOp,
    ParallelLayout,
    SwiGLU,
)
from harness.config_forms import ROPE_STYLES, SCHEMAS
from harness.strategies import TENSOR_PARALLEL_SIZES, DrawnConfig

_ATTENTION_KINDS: Final[Mapping[type, str]] = {
    GroupedQueryAttention: "grouped",
    Linear: "linear",
    NoOp: "no-op",
}
_FFN_KINDS: Final[Mapping[type, str]] = {SwiGLU: "swiglu", Linear: "linear", NoOp: "no-op"}

SPEC_FEATURES: Final = frozenset(
    {
        "homogeneous", "heterogeneous", "one layer", "several layers",
        *(f"{a} attention" for a in _ATTENTION_KINDS.values()),
        *(f"{f} ffn" for f in _FFN_KINDS.values()),
        *(f"{a}+{f}" for a in _ATTENTION_KINDS.values() for f in _FFN_KINDS.values()),
        "no-op block 0", "all no-op", "one query group", "one query head per group",
        "unequal query groups", "heads x kv_channels != hidden", "unequal widths", "odd width",
        "odd vocab", "tied", "untied", "plain rope", "llama3 rope", "other llama3 values",
    }
)  # fmt: skip
CONFIG_FEATURES: Final = frozenset(
    {"LlamaForCausalLM", "DeciLMForCausalLM", "head_dim given", "head_dim absent"}
    | {f"schema {name}" for name in SCHEMAS}
    | {f"rope {name}" for name in ROPE_STYLES}
)
LAYOUT_FEATURES: Final = frozenset(
    {f"tp{tp}" for tp in TENSOR_PARALLEL_SIZES}
    | {
        "pp1", "pp above 1", "vpp", "sequence parallel", "padded vocab", "unpadded vocab",
        "groups below tp", "uneven stages", "empty stage", "all no-op stage",
    }
)  # fmt: skip


def _groups(spec: ModelSpec) -> set[int]:
    return {
        block.attention.num_query_groups
        for block in spec.blocks
        if isinstance(block.attention, GroupedQueryAttention)
    }


def features_of_spec(spec: ModelSpec) -> frozenset[str]:
    """Which of `SPEC_FEATURES` this model has."""
    nothing = BlockSpec(attention=NoOp(), ffn=NoOp())
    widths = {b.ffn.ffn_hidden_size for b in spec.blocks if isinstance(b.ffn, SwiGLU)}
    groups, scaling = _groups(spec), spec.rope.scaling
    other_values = scaling is not None and (
        scaling.low_freq_factor != 1
        and scaling.high_freq_factor != 4
        and scaling.original_max_position_embeddings != 8192
    )
    kinds = {
        (_ATTENTION_KINDS[type(block.attention)], _FFN_KINDS[type(block.ffn)])
        for block in spec.blocks
    }
    found = {
        "heterogeneous" if spec.heterogeneous_block_specs else "homogeneous",
        "one layer" if spec.num_layers == 1 else "several layers",
        "tied" if spec.share_embeddings_and_output_weights else "untied",
        "plain rope" if scaling is None else "llama3 rope",
        *(f"{attention} attention" for attention, _ in kinds),
        *(f"{ffn} ffn" for _, ffn in kinds),
        *(f"{attention}+{ffn}" for attention, ffn in kinds),
    }
    return frozenset(found) | _present(
        {
            "no-op block 0": spec.blocks[0] == nothing,
            "all no-op": set(spec.blocks) == {nothing},
            "one query group": 1 in groups,
            "one query head per group": spec.num_attention_heads in groups,
            "unequal query groups": len(groups) > 1,
            "heads x kv_channels != hidden": (
                spec.num_attention_heads * spec.kv_channels != spec.hidden_size
            ),
            "unequal widths": len(widths) > 1,
            "odd width": any(width % 2 for width in widths),
            "odd vocab": spec.vocab_size % 2 == 1,
            "other llama3 values": other_values,
        }
    )


def features_of_config(drawn: DrawnConfig) -> frozenset[str]:
    """Which of `CONFIG_FEATURES` this configuration has."""
    schema = set() if drawn.schema is None else {f"schema {drawn.schema}"}
    head_dim = "given" if "head_dim" in drawn.config else "absent"
    return frozenset(
        {*drawn.config["architectures"], f"rope {drawn.rope_style}", f"head_dim {head_dim}"}
        | schema
    )


def features_of_layout(spec: ModelSpec, layout: ParallelLayout) -> frozenset[str]:
    """Which of `LAYOUT_FEATURES` this model has in this layout."""
    tp, stages = layout.tensor_model_parallel_size, layout.num_layers_per_stage
    nothing = BlockSpec(attention=NoOp(), ffn=NoOp())
    padded = spec.padded_vocab_size(
        tp, make_vocab_size_divisible_by=layout.make_vocab_size_divisible_by
    )
    return frozenset({f"tp{tp}"}) | _present(
        {
            "pp1": layout.pipeline_model_parallel_size == 1,
            "pp above 1": layout.pipeline_model_parallel_size > 1,
            "vpp": layout.virtual_pipeline_model_parallel_size is not None,
            "sequence parallel": layout.sequence_parallel,
            "padded vocab": padded > spec.vocab_size,
            "unpadded vocab": padded == spec.vocab_size,
            "groups below tp": any(groups < tp for groups in _groups(spec)),
            "uneven stages": len(set(stages)) > 1,
            "empty stage": 0 in stages,
            "all no-op stage": any(
                stage.layers and {spec.blocks[layer] for layer in stage.layers} == {nothing}
                for stage in layout.stages()
                if len(stages) > 1
            ),
        }
    )


def _present(facts: Mapping[str, bool]) -> frozenset[str]:
    return frozenset(name for name, true in facts.items() if true)
