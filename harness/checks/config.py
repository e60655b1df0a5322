"""The configuration: read by two independent readers, and through Megatron's words and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from bridge.hf_config import hf_config_from_spec, spec_from_hf_config
from bridge.megatron_args import checkpoint_args, spec_from_checkpoint_args
from bridge.megatron_config import blocks_from_heterogeneous_json, heterogeneous_layers_json
from bridge.parameters import num_parameters
from bridge.spec import GroupedQueryAttention, Linear, ModelSpec, NoOp, SwiGLU
from harness import oracle
from harness.bench import BASE_LAYOUT, Bench
from harness.coded import codes_of
from harness.compare import Finding, exact
from harness.suite import Case


def run(case: Case, bench: Bench) -> Finding:
    """Compare every value the model depends on, however it was read."""
    spec = bench.spec(case)
    with bench.fault.changed_code():
        found = [
            *_against_oracle(spec, oracle.read_config(bench.config(case))),
            *_between("after a way through a Hugging Face config", spec, _through_hf(spec)),
            *_between(
                "after a way through Megatron's args",
                spec,
                spec_from_checkpoint_args(
                    checkpoint_args(spec, bench.layout(case, BASE_LAYOUT)), where="args"
                ),
            ),
        ]
        if spec.heterogeneous_block_specs:
            blocks = blocks_from_heterogeneous_json(
                heterogeneous_layers_json(spec),
                hidden_size=spec.hidden_size,
                num_attention_heads=spec.num_attention_heads,
                num_layers=spec.num_layers,
            )
            found.append(("blocks after a way through Megatron's JSON", spec.blocks, blocks))
        stored = sum(codes_of(bench.checkpoint(case)).sizes())
        found.append(("number of parameters, the other being the files'",
                      num_parameters(spec), stored))  # fmt: skip
    problems = [
        f"config.json: {name}: {ours!r} is not {theirs!r}"
        for name, ours, theirs in found
        if ours != theirs
    ]
    return exact(problems, compared=len(found), what="values")


Pair = tuple[str, object, object]


def _through_hf(spec: ModelSpec) -> ModelSpec:
    return spec_from_hf_config(hf_config_from_spec(spec))


def _between(how: str, ours: ModelSpec, theirs: ModelSpec) -> Iterator[Pair]:
    for field in dataclasses.fields(ours):
        yield f"{field.name} {how}", getattr(ours, field.name), getattr(theirs, field.name)


def _against_oracle(spec: ModelSpec, model: oracle.Architecture) -> Iterator[Pair]:
    for name in (
        "hidden_size",
        "num_attention_heads",
        "kv_channels",
        "vocab_size",
        "layernorm_epsilon",
    ):
        yield f"{name} as the oracle reads it", getattr(spec, name), getattr(model, name)
    tied = spec.share_embeddings_and_output_weights
    yield "share_embeddings_and_output_weights as the oracle reads it", tied, model.tied
    scaling = spec.rope.scaling
    yield "rotary_base as the oracle reads it", spec.rope.rotary_base, model.rope.base
    yield (
        "llama3 RoPE scaling as the oracle reads it",
        None
        if scaling is None
        else (
            scaling.factor,
            scaling.low_freq_factor,
            scaling.high_freq_factor,
            scaling.original_max_position_embeddings,
        ),
        model.rope.llama3,
    )
    yield "num_layers as the oracle reads it", spec.num_layers, len(model.blocks)
    for layer_idx, (ours, theirs) in enumerate(zip(spec.blocks, model.blocks, strict=False)):
        yield (
            f"block {layer_idx} as the oracle reads it",
            (_say(ours.attention), _say(ours.ffn)),
            (_say(theirs[0]), _say(theirs[1])),
        )


def _say(part: object) -> str:
    match part:
        case NoOp() | oracle.Absent():
            return "no-op"
        case Linear() | oracle.Replaced():
            return "linear"
        case (
            GroupedQueryAttention(num_query_groups=groups)
            | oracle.Attention(num_query_groups=groups)
        ):
            return f"attention with {groups} query groups"
        case SwiGLU(ffn_hidden_size=width) | oracle.Mlp(ffn_hidden_size=width):
            return f"SwiGLU of width {width}"
        case _:
            return repr(part)
