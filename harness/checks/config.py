"""The configuration: read by two independent readers, and through Megatron's words and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from bridge import hf_config
from bridge.megatron_args import checkpoint_args, spec_from_checkpoint_args
from bridge.megatron_config import blocks_from_heterogeneous_json, heterogeneous_layers_json
from bridge.parameters import num_parameters
from bridge.spec import GroupedQueryAttention, Linear, ModelSpec, NoOp, SwiGLU
from harness import oracle
from harness.bench import BASE_LAYOUT, Bench
from harness.compare import Finding, exact
from harness.config_forms import ROPE_STYLES, SCHEMAS, write_config
from harness.suite import Case


def run(case: Case, bench: Bench) -> Finding:
    """Compare every value the model depends on, however it was read."""
    spec = bench.spec(case)
    with bench.fault.changed_code():
        found = [
            *_against_oracle(spec, oracle.read_config(bench.config(case))),
            *_between(
                "after a way through a Hugging Face config",
                spec,
                hf_config.spec_from_hf_config(hf_config.hf_config_from_spec(spec)),
            ),
            *_respelled(spec),
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
        stored = sum(bench.stored_sizes(case))
        found.append(("number of parameters, the other being the files'",
                      num_parameters(spec), stored))  # fmt: skip
    problems = [
        f"config.json: {name}: {ours!r} is not {theirs!r}"
        for name, ours, theirs in found
        if ours != theirs
    ]
    return exact(problems, compared=len(found), what="values")


Pair = tuple[str, object, object]


def _respelled(spec: ModelSpec) -> Iterator[Pair]:
    """The same model in every other spelling that there is: block schemas, transformers 4 and 5.

    The spellings are written by a writer of the harness, which shares nothing with the bridge's.
    """
    schemas: Sequence[str | None] = (None,)
    if spec.heterogeneous_block_specs:
        schemas = [schema for schema in SCHEMAS if schema != "released" or _is_released(spec)]
    for schema in schemas:
        for style in ROPE_STYLES:
            config = write_config(spec, schema=schema, rope_style=style, state_head_dim=True)
            found = hf_config.spec_from_hf_config(config)
            name = "as a Llama" if schema is None else f"in the {schema} schema"
            yield f"the model {name} with RoPE in the keys of {style}", spec, found


def _is_released(spec: ModelSpec) -> bool:
    """Whether `ffn_mult` can say the widths, and hidden_size // heads the size of a head."""
    widths = [block.ffn.ffn_hidden_size for block in spec.blocks if isinstance(block.ffn, SwiGLU)]
    return (
        all(width % 256 == 0 for width in widths)
        and spec.num_attention_heads * spec.kv_channels == spec.hidden_size
    )


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
