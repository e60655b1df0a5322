"""What `inspect` and `plan` say about a model: plain data first, text second."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import groupby
from typing import Any

from bridge.dtypes import dtype_named
from bridge.parameters import (
    Parameter,
    block_num_parameters,
    embedding_num_parameters,
    hf_tensors,
    num_parameters,
    output_num_parameters,
    parameters,
)
from bridge.spec import (
    BlockSpec,
    GroupedQueryAttention,
    Linear,
    ModelSpec,
    NoOp,
    ParallelLayout,
    Stage,
    SwiGLU,
)


def describe(spec: ModelSpec, layout: ParallelLayout) -> dict[str, Any]:
    """Architecture, exact parameters, and what each rank of a layout holds.

    Returns:
        Plain data. Sizes in bytes are of the weights alone, in `spec.params_dtype`.
    """
    stages = [_stage(spec, layout, stage) for stage in layout.stages()]
    return {
        "architecture": "heterogeneous" if spec.heterogeneous_block_specs else "homogeneous",
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "kv_channels": spec.kv_channels,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "layernorm_epsilon": spec.layernorm_epsilon,
        "share_embeddings_and_output_weights": spec.share_embeddings_and_output_weights,
        "params_dtype": spec.params_dtype,
        "rope": _rope(spec),
        "num_parameters": num_parameters(spec),
        "num_tensors": len(hf_tensors(spec)),
        "nbytes": num_parameters(spec) * dtype_named(spec.params_dtype).itemsize,
        "embedding_parameters": embedding_num_parameters(spec),
        "output_parameters": output_num_parameters(spec),
        "blocks": list(_runs(spec)),
        "block_kinds": _kinds(spec),
        "layout": layout.name,
        "padded_vocab_size": _padded(spec, layout),
        "stages": stages,
        "pp_ranks": [
            {
                "pp_rank": pp_rank,
                "parameters_per_rank": sum(one["parameters_per_rank"] for one in held),
                "nbytes_per_rank": sum(one["nbytes_per_rank"] for one in held),
            }
            for pp_rank in range(layout.pipeline_model_parallel_size)
            for held in [[one for one in stages if one["pp_rank"] == pp_rank]]
        ],
    }


def _rope(spec: ModelSpec) -> dict[str, Any]:
    found: dict[str, Any] = {"rotary_base": spec.rope.rotary_base}
    if spec.rope.scaling is not None:
        scaling = spec.rope.scaling
        found |= {name: getattr(scaling, name) for name in scaling.__dataclass_fields__}
    return found


def block_label(block: BlockSpec) -> tuple[str, str]:
    """How a block's two halves are called in tables."""
    match block.attention:
        case GroupedQueryAttention(num_query_groups=groups):
            attention = f"GQA, {groups} group{'s' if groups > 1 else ''}"
        case Linear():
            attention = "linear"
        case NoOp():
            attention = "-"
    match block.ffn:
        case SwiGLU(ffn_hidden_size=width):
            ffn = f"SwiGLU {width}"
        case Linear():
            ffn = "linear"
        case NoOp():
            ffn = "-"
    return attention, ffn


def _runs(spec: ModelSpec) -> Iterator[dict[str, Any]]:
    """Equal neighbours as one row."""
    for block, members in groupby(range(spec.num_layers), key=lambda index: spec.blocks[index]):
        layers = list(members)
        attention, ffn = block_label(block)
        yield {
            "layers": str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}",
            "attention": attention,
            "ffn": ffn,
            "parameters_per_block": block_num_parameters(spec, layers[0]),
        }


def _kinds(spec: ModelSpec) -> list[dict[str, Any]]:
    counts: dict[BlockSpec, list[int]] = {}
    for layer_idx, block in enumerate(spec.blocks):
        counts.setdefault(block, []).append(layer_idx)
    rows = []
    for block, layers in counts.items():
        attention, ffn = block_label(block)
        rows.append(
            {
                "attention": attention,
                "ffn": ffn,
                "num_blocks": len(layers),
                "first_layer": layers[0],
                "parameters_per_block": block_num_parameters(spec, layers[0]),
            }
        )
    return sorted(rows, key=lambda row: -row["parameters_per_block"])


def _padded(spec: ModelSpec, layout: ParallelLayout) -> int:
    return spec.padded_vocab_size(
        layout.tensor_model_parallel_size,
        make_vocab_size_divisible_by=layout.make_vocab_size_divisible_by,
    )


def stage_parameters(spec: ModelSpec, layout: ParallelLayout, stage: Stage) -> Iterator[Parameter]:
    """The Megatron parameters one model part holds, whole. A tied last stage holds a copy."""
    for parameter in parameters(spec, padded_vocab_size=_padded(spec, layout)).values():
        if parameter.layer_idx is not None:
            if parameter.layer_idx in stage.layers:
                yield parameter
        elif parameter.name.startswith("embedding."):
            tied_copy = spec.share_embeddings_and_output_weights and stage.post_process
            if stage.pre_process or tied_copy:
                yield parameter
        elif stage.post_process:
            yield parameter


def rank_num_parameters(spec: ModelSpec, layout: ParallelLayout, stage: Stage) -> int:
    """Parameters of one model part on each of its TP ranks, padding and copies included."""
    sizes = _rank_sizes(spec, _padded(spec, layout), layout.tensor_model_parallel_size)
    return sum(sizes[parameter.name] for parameter in stage_parameters(spec, layout, stage))


@lru_cache(maxsize=16)
def _rank_sizes(spec: ModelSpec, padded_vocab_size: int, tp: int) -> Mapping[str, int]:
    """Elements of each parameter that one TP rank has; TP divides evenly, so all have as many."""
    return {
        name: sum(box.volume for box in parameter.shard_boxes(0, tp))
        for name, parameter in parameters(spec, padded_vocab_size=padded_vocab_size).items()
    }


def _stage(spec: ModelSpec, layout: ParallelLayout, stage: Stage) -> dict[str, Any]:
    held = list(stage_parameters(spec, layout, stage))
    per_rank = rank_num_parameters(spec, layout, stage)
    return {
        "pp_rank": stage.pp_rank,
        "vp_stage": stage.vp_stage,
        "first_layer": stage.layers.start,
        "num_layers": len(stage.layers),
        "embedding": stage.pre_process,
        "output_layer": stage.post_process,
        "parameters": sum(math.prod(parameter.shape) for parameter in held),
        "parameters_per_rank": per_rank,
        "nbytes_per_rank": per_rank * dtype_named(spec.params_dtype).itemsize,
    }
