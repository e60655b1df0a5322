"""A model as a `config.json`: every architecture, block schema and RoPE style that is read.

Written field by field and not by `bridge.hf_config`, whose reader it judges.
"""

from __future__ import annotations

from typing import Any, Final

from bridge.spec import (
    BlockSpec,
    GroupedQueryAttention,
    Linear,
    ModelSpec,
    NoOp,
    RopeSpec,
    SwiGLU,
)

SCHEMAS: Final = ("released", "2025-11", "puzzletron")
ROPE_STYLES: Final = ("transformers-4", "transformers-5", "both")
WIDTH_STEP: Final = 256
"""The only FFN widths that `ffn_mult` can state are its multiples."""


def write_config(
    spec: ModelSpec, *, schema: str | None, rope_style: str, state_head_dim: bool
) -> dict[str, Any]:
    """State a model in one block schema (None: Llama) and RoPE style, field by field."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM" if schema is None else "DeciLMForCausalLM"],
        "model_type": "llama" if schema is None else "nemotron-nas",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "num_hidden_layers": len(spec.blocks),
        "max_position_embeddings": spec.max_position_embeddings,
        "rms_norm_eps": spec.layernorm_epsilon,
        "tie_word_embeddings": spec.share_embeddings_and_output_weights,
        "vocab_size": spec.vocab_size,
    }
    if state_head_dim:
        config["head_dim"] = spec.kv_channels
    config |= _write_rope(spec.rope, rope_style)
    config["dtype" if rope_style == "transformers-5" else "torch_dtype"] = spec.params_dtype
    if schema is not None:
        config |= {"num_key_value_heads": None, "intermediate_size": None}
        config["block_configs"] = [_write_block(block, spec, schema) for block in spec.blocks]
        return config
    first = spec.blocks[0]
    match first.attention, first.ffn:
        case GroupedQueryAttention(num_query_groups=groups), SwiGLU(ffn_hidden_size=width):
            config |= {"num_key_value_heads": groups, "intermediate_size": width}
        case _:
            raise ValueError(f"a Llama has no such block: {first}")
    return config


def _write_rope(rope: RopeSpec, style: str) -> dict[str, Any]:
    scaling: dict[str, Any] | None = None
    if rope.scaling is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": rope.scaling.factor,
            "low_freq_factor": rope.scaling.low_freq_factor,
            "high_freq_factor": rope.scaling.high_freq_factor,
            "original_max_position_embeddings": rope.scaling.original_max_position_embeddings,
        }
    older = {"rope_theta": rope.rotary_base, "rope_scaling": scaling}
    newer = {
        "rope_parameters": {
            "rope_theta": rope.rotary_base,
            **(scaling or {"rope_type": "default"}),
        }
    }
    styles: dict[str, dict[str, Any]] = {
        "transformers-4": older,
        "transformers-5": newer,
        "both": older | newer,
    }
    return styles[style]


def _write_block(block: BlockSpec, spec: ModelSpec, schema: str) -> dict[str, Any]:
    attention: dict[str, Any] = {"num_sink_tokens": None, "sparsify": None, "window_length": None}
    ffn: dict[str, Any] = {"sparsify": None}
    attention |= {
        "no_op": isinstance(block.attention, NoOp),
        "replace_with_linear": isinstance(block.attention, Linear),
    }
    ffn |= {
        "no_op": isinstance(block.ffn, NoOp),
        "replace_with_linear": isinstance(block.ffn, Linear),
    }
    groups = width = None
    if isinstance(block.attention, GroupedQueryAttention):
        groups = block.attention.num_query_groups
    if isinstance(block.ffn, SwiGLU):
        width = block.ffn.ffn_hidden_size
    if schema == "puzzletron":
        attention |= {"num_key_value_heads": groups, "mamba": None, "llama4": None}
        ffn |= {"moe": None, "gated": True, "hidden_act": "silu"}
    else:
        attention["n_heads_in_group"] = groups and spec.num_attention_heads // groups
    if schema == "released":
        # Half a step below the width: rounded up, it is the width whatever the last digits do.
        middle = width and (width - WIDTH_STEP / 2) * 3 / (2 * spec.hidden_size)
        ffn["ffn_mult"] = middle
    else:
        ffn["intermediate_size"] = width
    block_config: dict[str, Any] = {"attention": attention, "ffn": ffn}
    if schema == "puzzletron":
        block_config["parallel_blocks"] = None
    return block_config
