"""`ModelSpec` and `ParallelLayout`: what they refuse, and how they count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bridge.errors import InconsistentConfigError, LayoutError, TensorParallelError
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


def block(attention: AttentionSpec | int, ffn: FfnSpec | int) -> BlockSpec:
    """A block; numbers stand for query groups and width."""
    return BlockSpec(
        attention=(
            GroupedQueryAttention(num_query_groups=attention)
            if isinstance(attention, int)
            else attention
        ),
        ffn=SwiGLU(ffn_hidden_size=ffn) if isinstance(ffn, int) else ffn,
    )


SPEC = ModelSpec(
    hidden_size=48,
    num_attention_heads=12,
    kv_channels=4,
    vocab_size=1000,
    max_position_embeddings=8192,
    layernorm_epsilon=1e-5,
    rope=RopeSpec(rotary_base=10000.0),
    share_embeddings_and_output_weights=False,
    params_dtype="bfloat16",
    blocks=(block(4, 32), block(NoOp(), Linear()), block(Linear(), NoOp()), block(12, 64)),
    heterogeneous_block_specs=True,
)
EVEN: dict[str, Any] = {"num_layers_per_stage": (4,)}


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("hidden_size", 0, "hidden_size=0"),
        ("num_attention_heads", -12, "num_attention_heads=-12"),
        ("kv_channels", 0, "kv_channels=0"),
        ("kv_channels", 5, "kv_channels=5 must be even"),
        ("vocab_size", 0, "vocab_size=0"),
        ("max_position_embeddings", 0, "max_position_embeddings=0"),
        ("layernorm_epsilon", 0.0, "layernorm_epsilon=0.0"),
        ("layernorm_epsilon", 1.0, "layernorm_epsilon=1.0"),
        ("layernorm_epsilon", float("nan"), "layernorm_epsilon=nan"),
        ("rope", RopeSpec(rotary_base=1.0), "rotary_base=1.0"),
        ("rope", RopeSpec(rotary_base=float("inf")), "rotary_base=inf"),
        ("blocks", (), "num_layers=0"),
        ("blocks", (block(5, 32),), "block 0: num_query_groups=5"),
        ("blocks", (block(4, 32), block(0, 32)), "block 1: num_query_groups=0"),
        ("blocks", (block(4, 32), block(24, 32)), "block 1: num_query_groups=24"),
        ("blocks", (block(NoOp(), 0),), "block 0: ffn_hidden_size=0"),
        ("heterogeneous_block_specs", False, "homogeneous"),
    ],
)
def test_contradictory_dimensions_are_refused_by_name(
    field: str, value: object, complaint: str
) -> None:
    """Each impossible value of each field is named in the error."""
    changes: dict[str, Any] = {field: value}
    with pytest.raises(InconsistentConfigError) as error:
        replace(SPEC, **changes)
    assert any(complaint in place for place in error.value.where), error.value


@pytest.mark.parametrize(
    "blocks",
    [
        (block(4, 32), block(4, 48)),
        (block(4, 32), block(2, 32)),
        (block(NoOp(), 32),) * 2,
        (block(4, Linear()),) * 2,
    ],
    ids=["widths", "groups", "no-op", "linear"],
)
def test_a_homogeneous_model_has_equal_plain_blocks(blocks: tuple[BlockSpec, ...]) -> None:
    """A Llama holds neither unequal blocks nor no-ops nor linears, even if all are equal."""
    with pytest.raises(InconsistentConfigError):
        replace(SPEC, blocks=blocks, heterogeneous_block_specs=False)
    assert replace(SPEC, blocks=blocks).num_layers == 2


def test_no_blocks_are_refused_in_a_homogeneous_model_too() -> None:
    """A model without layers is an error that says so, of either class."""
    with pytest.raises(InconsistentConfigError, match="num_layers=0"):
        replace(SPEC, blocks=(), heterogeneous_block_specs=False)


def test_every_contradiction_is_in_one_error() -> None:
    """Nobody mends a configuration one error at a time."""
    with pytest.raises(InconsistentConfigError) as error:
        replace(SPEC, hidden_size=0, kv_channels=3, layernorm_epsilon=-1.0, blocks=(block(5, 0),))
    assert len(error.value.where) == 5


@pytest.mark.parametrize(
    "changed",
    [
        {"factor": 0.5},
        {"factor": float("nan")},
        {"low_freq_factor": 0.0},
        {"low_freq_factor": 4.0},
        {"low_freq_factor": 5.0},
        {"original_max_position_embeddings": 0},
    ],
    ids=str,
)
def test_an_empty_smoothing_band_is_refused(changed: dict[str, Any]) -> None:
    """llama3 scaling divides by high - low and by the factor: both must make sense."""  # a name
    values: dict[str, Any] = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    Llama3Scaling(**values)
    with pytest.raises(InconsistentConfigError, match="llama3"):
        Llama3Scaling(**values | changed)


@pytest.mark.parametrize(
    ("vocab_size", "tp", "divisor", "padded"),
    [
        (128256, 1, 128, 128256),
        (128256, 4, 128, 128512),
        (128256, 8, 128, 129024),
        (1000, 1, 128, 1024),
        (1024, 8, 128, 1024),
        (1025, 8, 128, 2048),
        (7, 2, 1, 8),
        (1, 1, 1, 1),
    ],
)
def test_vocabulary_is_padded_to_a_multiple_of_divisor_times_tp(
    vocab_size: int, tp: int, divisor: int, padded: int
) -> None:
    """Megatron's rule; 128256 is 1002 x 128 and so needs padding from TP 4 on."""
    spec = replace(SPEC, vocab_size=vocab_size)
    assert spec.padded_vocab_size(tp, make_vocab_size_divisible_by=divisor) == padded


@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor_model_parallel_size": 0},
        {"pipeline_model_parallel_size": 0, "num_layers_per_stage": ()},
        {"virtual_pipeline_model_parallel_size": 2, "num_layers_per_stage": (2, 2)},
        {"virtual_pipeline_model_parallel_size": 0},
        {"pipeline_model_parallel_size": 2},
        {"num_layers_per_stage": (2, 2)},
        {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "num_layers_per_stage": (2, 2),
        },
        {"pipeline_model_parallel_size": 2, "num_layers_per_stage": (5, -1)},
        {"make_vocab_size_divisible_by": 0},
    ],
    ids=str,
)
def test_layouts_that_contradict_themselves_are_refused(sizes: dict[str, Any]) -> None:
    """Sizes below one, VPP without PP, stages of another number: refused before any model."""
    with pytest.raises(LayoutError):
        ParallelLayout(**EVEN | sizes)


def test_stages_go_round_the_pipeline_ranks() -> None:
    """Stage s is virtual stage s // PP of rank s % PP, layers dealt in the order the model runs."""
    layout = ParallelLayout(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        num_layers_per_stage=(1, 0, 2, 4),
    )
    found = [
        (s.pp_rank, s.vp_stage, s.layers, s.pre_process, s.post_process) for s in layout.stages()
    ]
    assert found == [
        (0, 0, range(1), True, False),
        (1, 0, range(1, 1), False, False),
        (0, 1, range(1, 3), False, False),
        (1, 1, range(3, 7), False, True),
    ]
    assert [stage.layers for stage in layout.stages_of(1)] == [range(1, 1), range(3, 7)]
    assert layout.num_layers == 7


@pytest.mark.parametrize(
    ("sizes", "name", "world_size"),
    [
        ({}, "tp1-pp1", 1),
        ({"tensor_model_parallel_size": 4, "sequence_parallel": True}, "tp4-pp1-sp", 4),
        (
            {
                "tensor_model_parallel_size": 2,
                "pipeline_model_parallel_size": 3,
                "virtual_pipeline_model_parallel_size": 2,
                "num_layers_per_stage": (1,) * 6,
            },
            "tp2-pp3-vp2",
            6,
        ),
    ],
)
def test_a_layout_has_a_name_and_a_world_size(
    sizes: dict[str, Any], name: str, world_size: int
) -> None:
    """The id says every size; VPP and sequence parallelism only where they are."""
    layout = ParallelLayout(**EVEN | sizes)
    assert (layout.name, layout.world_size) == (name, world_size)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_tp_sizes_that_divide_everything_are_allowed(tp: int) -> None:
    """12 heads, 4 and 12 groups, widths 32 and 64, hidden 48: 1, 2 and 4 divide them all."""
    assert tensor_parallel_problems(SPEC, tp) == []
    ParallelLayout(**EVEN, tensor_model_parallel_size=tp).validate_for(SPEC)


@pytest.mark.parametrize(
    ("spec", "tp", "problems"),
    [
        (SPEC, 8, ["num_attention_heads=12", "block 3: num_query_groups=12"]),
        (
            SPEC,
            3,
            ["block 0: num_query_groups=4", "block 0: ffn_hidden_size=32",
             "block 3: ffn_hidden_size=64"],
        ),
        (
            replace(SPEC, hidden_size=50),
            4,
            ["block 1: linear FFN of 50", "block 2: linear attention of 50"],
        ),
        (replace(SPEC, hidden_size=50, blocks=(block(NoOp(), NoOp()),)), 4, []),
        (replace(SPEC, kv_channels=6, blocks=(block(2, 36),)), 12, []),
        (replace(SPEC, blocks=(block(6, 36),)), 4, ["block 0: num_query_groups=6"]),
        (replace(SPEC, blocks=(block(3, 36),)), 2, ["block 0: num_query_groups=3"]),
        # 66 rows of linear_fc1 divide by 2, yet gate and up are sharded one by one.
        (replace(SPEC, blocks=(block(4, 33),)), 2, ["block 0: ffn_hidden_size=33"]),
        # 8 heads of 2 channels and one group: linear_qkv has 20 rows, which 8 ranks cannot share.
        (
            replace(SPEC, num_attention_heads=8, kv_channels=2, blocks=(block(1, 64),)),
            8,
            ["block 0: num_query_groups=1 x kv_channels=2"],
        ),
        (replace(SPEC, num_attention_heads=8, kv_channels=4, blocks=(block(1, 64),)), 8, []),
    ],
    ids=[
        "heads", "widths", "linears", "no-ops", "groups below tp", "neither way", "odd groups",
        "odd width", "rows", "enough rows",
    ],
)  # fmt: skip
def test_what_tp_does_not_divide_is_named(spec: ModelSpec, tp: int, problems: list[str]) -> None:
    """Heads, groups, widths and linears are named block by block; groups may go either way."""
    found = tensor_parallel_problems(spec, tp)
    assert len(found) == len(problems)
    assert all(one.startswith(problem) for one, problem in zip(found, problems, strict=True)), found


def test_a_layout_that_does_not_fit_says_which_would() -> None:
    """The error lists every problem and the TP sizes that have none."""
    layout = ParallelLayout(**EVEN, tensor_model_parallel_size=8)
    with pytest.raises(TensorParallelError) as error:
        layout.validate_for(SPEC)
    assert error.value.hint == "choose tensor_model_parallel_size from {1, 2, 4}"
    assert len(error.value.where) == 2


@pytest.mark.parametrize("depth", [3, 5])
def test_a_layout_of_another_depth_is_refused(depth: int) -> None:
    """Stages must hold exactly the model's layers, no fewer and no more."""
    with pytest.raises(LayoutError, match=f"hold {depth} layers, the model has 4"):
        ParallelLayout(num_layers_per_stage=(depth,)).validate_for(SPEC)
