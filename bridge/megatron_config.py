"""A model and its layout as Megatron-Core's own configuration objects.

`transformer_config` is what a live model is built from; `heterogeneous_layers_json` and its inverse
are how Megatron-Core and Megatron-LM write down blocks that differ. What Megatron-LM stores beside
a checkpoint is in `bridge.megatron_args`. torch and Megatron-Core are imported by the functions
that need them.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

from bridge.dtypes import dtype_named
from bridge.errors import EnvironmentMissingError, InconsistentConfigError, UsageError
from bridge.hf_blocks import read_blocks
from bridge.hf_fields import Findings
from bridge.spec import (
    BlockSpec,
    GroupedQueryAttention,
    Linear,
    ModelSpec,
    NoOp,
    ParallelLayout,
    SwiGLU,
)
from bridge.strict_json import parse_json

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

Layers = Literal["local", "te"]
"""Megatron-Core's own layers, which run anywhere, or Transformer Engine's."""
AttentionBackend = Literal["auto", "unfused", "fused", "flash"]
"""Transformer Engine's attention: as it chooses, plain PyTorch, cuDNN's kernels, flash-attn's.

In float32 it has plain PyTorch alone. Local layers have one attention, and it is none of these.
"""

# Megatron's names of a block's two counts -> the Hugging Face names of the same counts, so that
# one reader judges the blocks of both.
_BLOCK_KEYS: Final = {
    "num_query_groups": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
}


def choose_layers(layers: Layers | Literal["auto"], device: str) -> Layers:
    """The layers asked for; "auto" are Transformer Engine's where it is installed, on a GPU.

    Raises:
        EnvironmentMissingError: BR500, Transformer Engine is asked for and not there.
    """
    installed = importlib.util.find_spec("transformer_engine") is not None
    if layers == "te" and not (installed and device == "cuda"):
        raise EnvironmentMissingError(
            "Transformer Engine layers need the transformer-engine package and a GPU",
            hint="use local layers, or install nemotron-bridge[te] on a machine with a GPU",
        )
    if layers == "auto":
        return "te" if installed and device == "cuda" else "local"
    return layers


def transformer_config(
    spec: ModelSpec,
    layout: ParallelLayout,
    *,
    params_dtype: str,
    layers: Layers = "local",
    attention_backend: AttentionBackend = "auto",
    device: Literal["cpu", "cuda"] = "cpu",
    further: Mapping[str, object] | None = None,
) -> TransformerConfig:
    """Build Megatron-Core's configuration of a model under a layout.

    Every fusion is off, so that local layers run on a CPU and the arithmetic is the plain one.
    Weights are left uninitialised: they are about to be loaded.

    Args:
        spec: The model.
        layout: Must have passed `ParallelLayout.validate_for(spec)`.
        params_dtype: torch's name of the dtype to hold and compute in.
        layers: Local layers may be asked for sequence parallelism too: `bridge.layer_specs` brings
            the norm that Megatron's local one refuses to be there.
        attention_backend: Of Transformer Engine's layers.
        device: Where the weights will live.
        further: Fields of Megatron-Core's configuration that do not change what the model is, by
            their names; they win over what is set here.

    Returns:
        A `TransformerConfig`, or a `HeterogeneousTransformerConfig` exactly when the model has
        heterogeneous block specs.

    Raises:
        UsageError: BR001, Megatron-Core refuses what `further` says.
    """
    import torch
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.heterogeneous.heterogeneous_config import (
        HeterogeneousTransformerConfig,
    )

    dtype = getattr(torch, dtype_named(params_dtype, where="params_dtype").name)
    fields: dict[str, Any] = {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "kv_channels": spec.kv_channels,
        **model_wide_sizes(spec),
        # architecture
        "normalization": "RMSNorm",
        "layernorm_epsilon": spec.layernorm_epsilon,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "rotary_interleaved": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # precision
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "attention_softmax_in_fp32": True,
        "apply_query_key_layer_scaling": False,
        # parallelism
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline_model_parallel_size,
        "pipeline_model_parallel_layout": pipeline_model_parallel_layout(layout),
        "sequence_parallel": layout.sequence_parallel,
        # initialization
        "perform_initialization": False,
        "use_cpu_initialization": device == "cpu",
        # fusions
        "apply_rope_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "cross_entropy_loss_fusion": False,
    }
    if layers == "te":
        from megatron.core.transformer.enums import AttnBackend

        fields["attention_backend"] = AttnBackend[attention_backend]
    fields |= further or {}
    try:
        if not spec.heterogeneous_block_specs:
            return TransformerConfig(**fields)
        return HeterogeneousTransformerConfig(
            **fields, heterogeneous_layers_config_encoded_json=heterogeneous_layers_json(spec)
        )
    except (AssertionError, TypeError, ValueError) as error:
        if not further:
            raise  # a field of ours: our own bug
        raise UsageError(
            f"Megatron-Core refuses its configuration: {error}",
            where=[f"{name}={value!r:.80}" for name, value in further.items()],
            hint="one of these settings is handed on to it as it was given",
        ) from error


def model_wide_sizes(spec: ModelSpec) -> dict[str, int]:
    """`num_query_groups` and `ffn_hidden_size` as Megatron wants them for the whole model.

    In a heterogeneous model no block reads them: they are stand-ins that pass Megatron's checks
    under any TP that fits (TP divides the heads, so it divides as many groups), never a block's
    own values, for block 0 may be a no-op and the next may differ.
    """
    block = spec.blocks[0]
    if not spec.heterogeneous_block_specs and isinstance(block.attention, GroupedQueryAttention):
        if not isinstance(block.ffn, SwiGLU):
            raise InconsistentConfigError("a homogeneous model without feed-forward")
        return {
            "num_query_groups": block.attention.num_query_groups,
            "ffn_hidden_size": block.ffn.ffn_hidden_size,
        }
    return {
        "num_query_groups": spec.num_attention_heads,
        "ffn_hidden_size": 4 * spec.hidden_size,
    }


def pipeline_model_parallel_layout(layout: ParallelLayout) -> list[list[str]] | None:
    """Megatron's `pipeline_model_parallel_layout`: what each stage holds, in the model's order.

    Returns:
        One list per stage of "embedding", "decoder" and "loss"; None when an even split without
        interleaving says it all. Source: megatron-core 0.16.1 `PipelineParallelLayerLayout`, stage
        `vp_stage * PP + pp_rank`.
    """
    if (
        layout.virtual_pipeline_model_parallel_size is None
        and len(set(layout.num_layers_per_stage)) == 1
    ):
        return None
    return [
        ["embedding"] * stage.pre_process
        + ["decoder"] * len(stage.layers)
        + ["loss"] * stage.post_process
        for stage in layout.stages()
    ]


def heterogeneous_layers_json(spec: ModelSpec) -> str:
    """Write the blocks as Megatron's `heterogeneous_layers_config_encoded_json`, one way only.

    Counts are given in Megatron's words, so nothing is rounded or divided on the way in; they are
    null wherever a sub-block is a no-op or a linear, because `get_config_for_layer` asserts that.

    Inverse: `blocks_from_heterogeneous_json`.
    """
    return json.dumps(
        {"block_configs": [_write_block(block) for block in spec.blocks]}, separators=(",", ":")
    )


def _write_block(block: BlockSpec) -> dict[str, dict[str, object]]:
    groups: int | None = None
    match block.attention:
        case GroupedQueryAttention(num_query_groups=count):
            groups = count
        case Linear() | NoOp():
            pass
    width: int | None = None
    match block.ffn:
        case SwiGLU(ffn_hidden_size=size):
            width = size
        case Linear() | NoOp():
            pass
    return {
        "attention": {
            "num_query_groups": groups,
            "no_op": isinstance(block.attention, NoOp),
            "replace_with_linear": isinstance(block.attention, Linear),
        },
        "ffn": {
            "ffn_hidden_size": width,
            "no_op": isinstance(block.ffn, NoOp),
            "replace_with_linear": isinstance(block.ffn, Linear),
        },
    }


def blocks_from_heterogeneous_json(
    text: str,
    *,
    hidden_size: int,
    num_attention_heads: int,
    num_layers: int,
    where: str = "heterogeneous_layers_config_encoded_json",
) -> tuple[BlockSpec, ...]:
    """Read the blocks back, from our canonical form or from a whole Hugging Face configuration.

    Megatron-LM stores whatever file `--heterogeneous-layers-config-path` named, usually the
    checkpoint's `config.json`. Unlike Megatron, fields that would be dropped silently are refused.

    Raises:
        InconsistentConfigError: BR104, not JSON, no `block_configs`, or contradictory blocks.
        UnsupportedFieldError: BR103, a block that Megatron-Core cannot express.
        UnmappedFieldError: BR102, fields with no known meaning.
    """
    try:
        config = parse_json(text)
    except ValueError as error:
        raise InconsistentConfigError(f"not JSON: {error}", where=where) from None
    if not isinstance(config, Mapping) or "block_configs" not in config:
        raise InconsistentConfigError("block_configs is missing", where=where)
    blocks = config["block_configs"]
    findings = Findings()
    found = read_blocks(
        [_in_hf_words(block) for block in blocks] if isinstance(blocks, list) else blocks,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        num_layers=num_layers,
        findings=findings,
    )
    findings.raise_if_any(where)
    return found


def _in_hf_words(block: object) -> object:
    if not isinstance(block, Mapping):
        return block
    renamed: dict[str, object] = {}
    for key, part in block.items():
        name = "ffn" if key == "mlp" and "ffn" not in block else key
        renamed[name] = (
            {_BLOCK_KEYS.get(field, field): value for field, value in part.items()}
            if isinstance(part, Mapping)
            else part
        )
    return renamed
