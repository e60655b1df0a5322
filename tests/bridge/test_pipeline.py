"""Layers are dealt out over pipeline stages so that no rank holds more than it must."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import BridgeError, LayoutError, PipelineParallelError, TensorParallelError
from bridge.pipeline import parse_layout, plan_layout, stage_num_parameters
from bridge.spec import (
    BlockSpec,
    GroupedQueryAttention,
    Linear,
    ModelSpec,
    NoOp,
    RopeSpec,
    SwiGLU,
)

ATTENTION = GroupedQueryAttention(num_query_groups=2)
EMPTY = BlockSpec(attention=NoOp(), ffn=NoOp())


def model(*blocks: BlockSpec, heterogeneous: bool = True, vocab_size: int = 96) -> ModelSpec:
    """A small model of these blocks."""
    return ModelSpec(
        hidden_size=32,
        num_attention_heads=4,
        kv_channels=8,
        vocab_size=vocab_size,
        max_position_embeddings=64,
        layernorm_epsilon=1e-5,
        rope=RopeSpec(rotary_base=10000.0),
        share_embeddings_and_output_weights=False,
        params_dtype="bfloat16",
        blocks=blocks,
        heterogeneous_block_specs=heterogeneous,
    )


def plain(num_layers: int) -> ModelSpec:
    """A Llama of this many layers."""
    block = BlockSpec(attention=ATTENTION, ffn=SwiGLU(ffn_hidden_size=48))
    return model(*(block,) * num_layers, heterogeneous=False)


def only_ffn(*widths: int) -> ModelSpec:
    """Blocks of (3 * width + 1) * 32 parameters each; width 0 is an empty block."""
    return model(
        *(
            BlockSpec(attention=NoOp(), ffn=SwiGLU(ffn_hidden_size=width)) if width else EMPTY
            for width in widths
        )
    )


def splits(num_layers: int, num_stages: int) -> list[tuple[int, ...]]:
    """Every way to cut layers into that many stages of at least one."""
    return [
        tuple(b - a for a, b in itertools.pairwise((0, *cuts, num_layers)))
        for cuts in itertools.combinations(range(1, num_layers), num_stages - 1)
    ]


def test_a_homogeneous_model_that_divides_is_split_evenly() -> None:
    """As Megatron splits it, whatever the embedding weighs."""
    assert plan_layout(plain(8), pipeline_model_parallel_size=4).num_layers_per_stage == (2,) * 4
    interleaved = plan_layout(
        plain(8), pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    )
    assert interleaved.num_layers_per_stage == (2, 2, 2, 2)


def test_a_homogeneous_model_that_does_not_divide_is_balanced() -> None:
    """Five layers over two stages: the odd one goes where there is less, the final norm counted."""
    spec = dataclasses.replace(plain(5), vocab_size=20000)
    tied = dataclasses.replace(spec, share_embeddings_and_output_weights=True)
    assert plan_layout(spec, pipeline_model_parallel_size=2).num_layers_per_stage == (3, 2)
    assert plan_layout(tied, pipeline_model_parallel_size=2).num_layers_per_stage == (1, 4)


def test_a_heavy_block_gets_a_stage_with_little_else() -> None:
    """A very wide FFN in the middle, as Ultra's fused ones, does not share its rank evenly."""
    layout = plan_layout(only_ffn(8, 8, 8, 8, 800, 8, 8, 8), pipeline_model_parallel_size=3)
    assert layout.num_layers_per_stage == (4, 1, 3)


def test_the_embedding_counts_on_the_first_stage_and_the_output_on_the_last() -> None:
    """Parameters of a stage, by hand: 96 x 32 of vocabulary at either end, 32 of final norm."""
    layout = plan_layout(only_ffn(10, 20, 30), pipeline_model_parallel_size=3)
    assert layout.num_layers_per_stage == (1, 1, 1)
    assert stage_num_parameters(only_ffn(10, 20, 30), layout) == (
        31 * 32 + 96 * 32,
        61 * 32,
        91 * 32 + 96 * 32 + 32,
    )


@given(
    widths=st.lists(st.sampled_from([0, 0, 1, 2, 3, 50, 300]), min_size=2, max_size=9),
    data=st.data(),
)
def test_no_split_has_a_smaller_largest_stage(widths: list[int], data: st.DataObject) -> None:
    """Against every split there is, and the most even one of those that tie."""
    num_stages = data.draw(st.integers(1, len(widths)))
    spec = only_ffn(*widths)
    layout = plan_layout(spec, pipeline_model_parallel_size=num_stages)

    def cost(stages: tuple[int, ...]) -> tuple[int, int]:
        chosen = dataclasses.replace(layout, num_layers_per_stage=stages)
        sizes = stage_num_parameters(spec, chosen)
        return max(sizes), sum(size * size for size in sizes)

    best = min(cost(stages) for stages in splits(len(widths), num_stages))
    assert cost(layout.num_layers_per_stage) == best


@given(
    widths=st.lists(st.sampled_from([0, 1, 3, 50, 300]), min_size=4, max_size=10),
    pp=st.sampled_from([2, 3]),
)
def test_interleaved_ranks_are_no_heavier_than_stage_balancing_leaves_them(
    widths: list[int], pp: int
) -> None:
    """Every stage keeps a layer, and moving boundaries never made the heaviest rank heavier."""
    spec = only_ffn(*widths)
    if 2 * pp > len(widths):
        pp = 2
    layout = plan_layout(
        spec, pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=2
    )
    assert min(layout.num_layers_per_stage) >= 1
    assert sum(layout.num_layers_per_stage) == len(widths)

    def heaviest_rank(stages: tuple[int, ...]) -> int:
        sizes = stage_num_parameters(spec, dataclasses.replace(layout, num_layers_per_stage=stages))
        return max(sum(sizes[rank::pp]) for rank in range(pp))

    by_stage = plan_layout(spec, pipeline_model_parallel_size=2 * pp).num_layers_per_stage
    assert heaviest_rank(layout.num_layers_per_stage) <= heaviest_rank(by_stage)


def test_interleaving_evens_out_the_ranks_and_not_only_the_stages() -> None:
    """The split with the smallest largest stage puts both heavy blocks on one rank of two.

    Its ranks are 42,528 and 19,616 parameters. Of all splits into four stages the best has
    28,128 on its heavier rank, found here by trying every one.
    """
    spec = only_ffn(10, 200, 50, 200, 30)
    layout = plan_layout(
        spec, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    )

    def heaviest_rank(stages: tuple[int, ...]) -> int:
        sizes = stage_num_parameters(spec, dataclasses.replace(layout, num_layers_per_stage=stages))
        return max(sizes[0] + sizes[2], sizes[1] + sizes[3])

    assert plan_layout(spec, pipeline_model_parallel_size=4).num_layers_per_stage == (2, 1, 1, 1)
    assert heaviest_rank((2, 1, 1, 1)) == 42528
    assert min(map(heaviest_rank, splits(5, 4))) == 28128
    assert heaviest_rank(layout.num_layers_per_stage) == 28128


def test_the_largest_stage_comes_before_evenness() -> None:
    """Here the smallest sum of squares, (1, 4, 2), would leave a stage of 27,168 parameters."""
    spec = only_ffn(200, 20, 10, 50, 10, 200, 50)
    layout = plan_layout(spec, pipeline_model_parallel_size=3)
    assert layout.num_layers_per_stage == (3, 3, 1)
    assert max(stage_num_parameters(spec, layout)) == 25248


def test_stages_given_are_taken_as_they_are() -> None:
    """Empty stages included: one for the embedding alone is a choice of the user's."""
    layout = plan_layout(plain(4), pipeline_model_parallel_size=3, num_layers_per_stage=[0, 3, 1])
    assert layout.num_layers_per_stage == (0, 3, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"pipeline_model_parallel_size": 5}, PipelineParallelError, "5 pipeline stages for 4"),
        (
            {"pipeline_model_parallel_size": 2, "num_layers_per_stage": [1, 2]},
            PipelineParallelError,
            "hold 3 layers, the model has 4",
        ),
        (
            {"pipeline_model_parallel_size": 2, "num_layers_per_stage": [4]},
            PipelineParallelError,
            "1 stages given",
        ),
        (
            {"pipeline_model_parallel_size": 2, "num_layers_per_stage": [5, -1]},
            PipelineParallelError,
            "negative",
        ),
        (
            {"virtual_pipeline_model_parallel_size": 2},
            PipelineParallelError,
            "with pipeline_model_parallel_size=1",
        ),
        ({"sequence_parallel": True}, TensorParallelError, "sequence_parallel"),
        ({"tensor_model_parallel_size": 3}, TensorParallelError, "does not divide"),
        ({"tensor_model_parallel_size": 0}, LayoutError, "positive"),
        ({"make_vocab_size_divisible_by": 0}, LayoutError, "positive"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(
    arguments: dict[str, object], error: type[BridgeError], says: str
) -> None:
    """Each with its own class, code and words."""
    with pytest.raises(error, match=says):
        plan_layout(plain(4), **arguments)  # type: ignore[arg-type]  # drawn from the table above


def test_too_many_stages_says_how_many_fit() -> None:
    """The hint is a number that works."""
    with pytest.raises(PipelineParallelError) as caught:
        plan_layout(
            plain(5), pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2
        )
    assert caught.value.code == "BR202"
    assert "pipeline_model_parallel_size 2 or less" in str(caught.value)
    plan_layout(plain(5), pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)


def test_linear_replacements_refuse_sequence_parallelism_by_block() -> None:
    """Megatron-Core builds such a model and then fails on shapes; the blocks are named."""
    spec = model(
        BlockSpec(attention=ATTENTION, ffn=SwiGLU(ffn_hidden_size=48)),
        BlockSpec(attention=Linear(), ffn=NoOp()),
        BlockSpec(attention=ATTENTION, ffn=Linear()),
    )
    with pytest.raises(LayoutError) as caught:
        parse_layout("tp2-sp", spec)
    assert caught.value.where == ("block 1", "block 2")
    parse_layout("tp2", spec)


@pytest.mark.parametrize(
    "name", ["tp1-pp1", "tp2-pp1", "tp1-pp2", "tp2-pp2-vp2", "tp2-pp1-sp", "tp2-pp4-sp"]
)
def test_a_layout_name_is_read_back(name: str) -> None:
    """`parse_layout` and `ParallelLayout.name` are inverse."""
    assert parse_layout(name, plain(8)).name == name


def test_parts_left_out_of_a_name_are_one() -> None:
    """`pp2` is `tp1-pp2`."""
    assert parse_layout("pp2", plain(8)) == parse_layout("tp1-pp2", plain(8))


@pytest.mark.parametrize("name", ["", "tp", "tp2pp2", "tp0", "tp2-tp4", "ep2", "tp2-pp2-", "TP2"])
def test_a_name_that_is_no_layout_is_refused(name: str) -> None:
    """With an example of one that is."""
    with pytest.raises(LayoutError, match="is not a parallel layout"):
        parse_layout(name, plain(8))


def test_a_name_may_give_the_layers_of_each_stage() -> None:
    """Empty stages included; counts that do not add up are refused."""
    layout = parse_layout("tp1-pp3-l5.0.3", plain(8))
    assert layout.num_layers_per_stage == (5, 0, 3)
    with pytest.raises(PipelineParallelError, match="hold 7 layers"):
        parse_layout("tp1-pp2-l5.2", plain(8))
