"""Hypothesis strategies for every model and layout of the family: valid by construction.

`model_specs` draws models, `hf_configs` draws one together with a `config.json` that states it,
`parallel_layouts` draws a layout that a given model can be cut into. Divisibility is built in: a
model is drawn around the largest TP size it shall allow, so that no draw is thrown away. The
configurations are written by `harness.config_forms`, not by `bridge.hf_config`, whose reader they
judge.

`harness.features` names what a draw has, so that a test can assert that it met every feature it
stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from bridge.spec import (
    AttentionSpec,
    BlockSpec,
    FfnSpec,
    GroupedQueryAttention,
    Linear,
    Llama3Scaling,
    ModelSpec,
    NoOp,
    ParallelLayout,
    RopeSpec,
    SwiGLU,
    tensor_parallel_problems,
)
from harness.config_forms import ROPE_STYLES, SCHEMAS, WIDTH_STEP, write_config

TENSOR_PARALLEL_SIZES: Final = (1, 2, 4, 8)
_VOCAB_DIVISORS: Final = (1, 2, 16, 128)


def rope_specs() -> SearchStrategy[RopeSpec]:
    """RoPE as published, and with every one of its values off the published one."""
    published = st.builds(
        Llama3Scaling,
        factor=st.sampled_from((8.0, 16.0)),
        low_freq_factor=st.just(1.0),
        high_freq_factor=st.just(4.0),
        original_max_position_embeddings=st.just(8192),
    )
    other = st.builds(
        lambda factor, low, gap, original: Llama3Scaling(
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=low + gap,
            original_max_position_embeddings=original,
        ),
        st.sampled_from((1.0, 2.5, 4.0, 32.0)),
        st.sampled_from((0.5, 1.0, 2.0)),
        st.sampled_from((0.25, 3.0, 7.5)),
        st.sampled_from((64, 4096, 8192, 16384)),
    )
    return st.builds(
        RopeSpec,
        rotary_base=st.sampled_from((500000.0, 10000.0, 1000000.0, 12345.678)),
        scaling=st.none() | published | other,
    )


def model_specs(
    *,
    heterogeneous: bool | None = None,
    expressible_by_ffn_mult: bool | None = None,
    max_layers: int = 5,
    tensor_parallel_sizes: Sequence[int] = TENSOR_PARALLEL_SIZES,
) -> SearchStrategy[ModelSpec]:
    """Small models of the family, each with blocks of any kind in any order.

    Args:
        heterogeneous: True for DeciLM models only, False for Llama only, None for both.
        expressible_by_ffn_mult: True for models that the released block schema can state (widths
            are multiples of 256, hidden_size is heads x kv_channels), False for freely chosen
            sizes, None for both.
        max_layers: Most blocks of one model.
        tensor_parallel_sizes: Each model can be cut by at least one of these.

    Raises:
        ValueError: `max_layers` or a TP size is not positive, or there is no TP size.
    """
    if max_layers < 1:
        raise ValueError(f"max_layers must be positive, got {max_layers}")
    if not tensor_parallel_sizes or min(tensor_parallel_sizes) < 1:
        raise ValueError(f"TP sizes must be positive, got {tensor_parallel_sizes}")
    return _model_specs(
        heterogeneous, expressible_by_ffn_mult, max_layers, tuple(tensor_parallel_sizes)
    )


@st.composite
def _model_specs(
    draw: DrawFn,
    heterogeneous: bool | None,  # noqa: FBT001  # private: always passed by `model_specs`
    expressible: bool | None,  # noqa: FBT001
    max_layers: int,
    sizes: tuple[int, ...],
) -> ModelSpec:
    flags = st.booleans()
    deci = draw(flags) if heterogeneous is None else heterogeneous
    by_mult = draw(flags) if expressible is None else expressible
    tp = draw(st.sampled_from(sizes))
    heads = tp * draw(st.integers(1, 3))
    kv_channels = 2 * draw(st.integers(1, 8))
    hidden = heads * kv_channels
    if not by_mult and draw(flags):
        hidden = tp * draw(st.integers(1, 24))
    # Every linear replacement needs hidden_size % TP == 0: both ways of drawing it give that.
    groups = st.sampled_from(
        [
            n
            for n in range(1, heads + 1)
            if heads % n == 0
            and (n % tp == 0 or tp % n == 0)
            and 2 * n * kv_channels % tp == 0  # an even share of linear_qkv's rows
        ]
    )
    # 256 is a multiple of any TP that is a power of two; others multiply it.
    step = WIDTH_STEP * (1 if WIDTH_STEP % tp == 0 else tp)
    widths = (
        st.integers(1, 3).map(lambda n: n * step)
        if by_mult
        else st.integers(1, 40).map(lambda n: n * tp)
    )
    attention = st.builds(GroupedQueryAttention, num_query_groups=groups)
    ffn = st.builds(SwiGLU, ffn_hidden_size=widths)
    if deci:
        block = st.builds(
            BlockSpec,
            attention=_attention_or(attention),
            ffn=_ffn_or(ffn),
        )
        nothing = st.just(BlockSpec(attention=NoOp(), ffn=NoOp()))
        blocks = tuple(
            draw(
                st.lists(block, min_size=1, max_size=max_layers)
                | st.lists(nothing, min_size=1, max_size=max_layers)
                if draw(st.integers(0, 7)) == 7  # now and then, a model of nothing but no-ops
                else st.lists(block, min_size=1, max_size=max_layers)
            )
        )
    else:
        one = draw(st.builds(BlockSpec, attention=attention, ffn=ffn))
        blocks = (one,) * draw(st.integers(1, max_layers))
    return ModelSpec(
        hidden_size=hidden,
        num_attention_heads=heads,
        kv_channels=kv_channels,
        vocab_size=draw(st.integers(3, 300)),
        max_position_embeddings=draw(st.sampled_from((131072, 2048, 8192))),
        layernorm_epsilon=draw(st.sampled_from((1e-5, 1e-6, 3e-4))),
        rope=draw(rope_specs()),
        share_embeddings_and_output_weights=draw(flags),
        params_dtype=draw(st.sampled_from(("bfloat16", "float32", "float16"))),
        blocks=blocks,
        heterogeneous_block_specs=deci,
    )


def _attention_or(grouped: SearchStrategy[GroupedQueryAttention]) -> SearchStrategy[AttentionSpec]:
    return st.one_of(grouped, st.just(Linear()), st.just(NoOp()))


def _ffn_or(swiglu: SearchStrategy[SwiGLU]) -> SearchStrategy[FfnSpec]:
    return st.one_of(swiglu, st.just(Linear()), st.just(NoOp()))


def tensor_parallel_sizes_of(spec: ModelSpec) -> tuple[int, ...]:
    """The sizes of `TENSOR_PARALLEL_SIZES` that the model can be cut by."""
    return tuple(tp for tp in TENSOR_PARALLEL_SIZES if not tensor_parallel_problems(spec, tp))


def parallel_layouts(
    spec: ModelSpec,
    *,
    max_pipeline_stages: int = 6,
    max_world_size: int = 64,
    allow_empty_stages: bool = True,
) -> SearchStrategy[ParallelLayout]:
    """Layouts this model can be cut into: TP, PP, VPP, uneven stages, sequence parallel.

    Args:
        spec: The model.
        max_pipeline_stages: Most stages, PP x VPP.
        max_world_size: Most ranks, TP x PP.
        allow_empty_stages: Draw stages without layers too; False for what needs a layer in each.

    Raises:
        ValueError: a limit is not positive.
    """
    if min(max_pipeline_stages, max_world_size) < 1:
        raise ValueError("max_pipeline_stages and max_world_size must be positive")
    return _parallel_layouts(spec, max_pipeline_stages, max_world_size, allow_empty_stages)


@st.composite
def _parallel_layouts(
    draw: DrawFn,
    spec: ModelSpec,
    max_stages: int,
    max_world: int,
    allow_empty: bool,  # noqa: FBT001  # private: always passed by `parallel_layouts`
) -> ParallelLayout:
    tp = draw(st.sampled_from([n for n in tensor_parallel_sizes_of(spec) if n <= max_world]))
    most = max_stages if allow_empty else min(max_stages, spec.num_layers)
    pp = draw(st.integers(1, min(most, max_world // tp)))
    vpp = draw(st.none() | st.integers(2, most // pp)) if pp > 1 and most // pp > 1 else None
    num_stages = pp * (vpp or 1)
    spare = spec.num_layers if allow_empty else spec.num_layers - num_stages
    cuts = sorted(
        draw(st.lists(st.integers(0, spare), min_size=num_stages - 1, max_size=num_stages - 1))
    )
    least = 0 if allow_empty else 1
    bounds = [0, *cuts, spare]
    return ParallelLayout(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        num_layers_per_stage=tuple(least + stop - start for start, stop in pairwise(bounds)),
        sequence_parallel=tp > 1 and draw(st.booleans()),
        make_vocab_size_divisible_by=draw(st.sampled_from(_VOCAB_DIVISORS)),
    )


def models_with_layouts(
    *, heterogeneous: bool | None = None, max_layers: int = 5
) -> SearchStrategy[tuple[ModelSpec, ParallelLayout]]:
    """A model and a layout it can be cut into."""
    specs = model_specs(heterogeneous=heterogeneous, max_layers=max_layers)
    return specs.flatmap(lambda spec: st.tuples(st.just(spec), parallel_layouts(spec)))


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnConfig:
    """A configuration, what it says, and how it says it; `schema` is None for a Llama."""

    config: dict[str, Any]
    spec: ModelSpec
    schema: str | None
    rope_style: str


@st.composite
def hf_configs(draw: DrawFn, *, max_layers: int = 5) -> DrawnConfig:
    """A model and a `config.json` that states it, in any block schema and RoPE style."""
    schema = draw(st.sampled_from((None, *SCHEMAS)))
    spec = draw(
        model_specs(
            heterogeneous=schema is not None,
            expressible_by_ffn_mult=True if schema == "released" else None,
            max_layers=max_layers,
        )
    )
    rope_style = draw(st.sampled_from(ROPE_STYLES))
    plain = spec.kv_channels * spec.num_attention_heads == spec.hidden_size
    config = write_config(
        spec,
        schema=schema,
        rope_style=rope_style,
        state_head_dim=not plain
        # The 2025-11 code means 128 by an absent head_dim; the bridge refuses to choose.
        or schema == "2025-11"
        or (schema != "released" and draw(st.booleans())),
    )
    return DrawnConfig(config=config, spec=spec, schema=schema, rope_style=rope_style)
