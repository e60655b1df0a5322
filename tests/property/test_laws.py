"""Laws that hold for every model of the family, in every layout it can be cut into."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import numpy as np
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from bridge.hf_blocks import BLOCK_SCHEMAS, width_to_ffn_mult
from bridge.hf_config import hf_config_from_spec, spec_from_hf_config
from bridge.parameters import (
    block_num_parameters,
    embedding_num_parameters,
    hf_tensors,
    hf_tilings,
    num_parameters,
    output_num_parameters,
    parameters,
)
from bridge.pipeline import stage_num_parameters
from bridge.plan import Plan
from bridge.spec import GroupedQueryAttention, Linear, ModelSpec, NoOp, ParallelLayout, SwiGLU
from bridge.tiling import Box, Tiling, bands
from harness.features import (
    CONFIG_FEATURES,
    LAYOUT_FEATURES,
    SPEC_FEATURES,
    features_of_config,
    features_of_layout,
    features_of_spec,
)
from harness.strategies import (
    DrawnConfig,
    hf_configs,
    model_specs,
    models_with_layouts,
    parallel_layouts,
    tensor_parallel_sizes_of,
)

Array = np.ndarray[Any, np.dtype[np.int64]]

ZERO = 0
"""What padding holds; index-coded sources count from 1."""


def index_coded(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Tensors whose every element is a number that occurs nowhere else, from 1 on."""
    ends = list(accumulate((math.prod(shape) for shape in shapes.values()), initial=1))
    return {
        name: np.arange(start, start + math.prod(shape)).reshape(shape)
        for (name, shape), start in zip(shapes.items(), ends[:-1], strict=True)
    }


def apply(tiling: Tiling, sources: Mapping[str, Array]) -> Array:
    """Fill a tensor through its tiling; elements no tile reaches stay -1."""
    out = np.full(tiling.shape, -1, np.int64)
    for tile in tiling.tiles:
        out[tile.target_box.slices] = (
            ZERO if tile.source is None else sources[tile.source][tile.source_box.slices]
        )
    return out


def expected_whole(spec: ModelSpec, hf: Mapping[str, Array], padded: int) -> dict[str, Array]:
    """Megatron's parameters written out from their description, head by head, by no tiling."""

    def pad(rows: Array) -> Array:
        return np.concatenate([rows, np.zeros((padded - len(rows), rows.shape[1]), np.int64)])

    out = {"embedding.word_embeddings.weight": pad(hf["model.embed_tokens.weight"])}
    for layer_idx, block in enumerate(spec.blocks):
        ours, theirs = f"decoder.layers.{layer_idx}.", f"model.layers.{layer_idx}."
        norm = hf.get(theirs + "input_layernorm.weight")
        match block.attention:
            case GroupedQueryAttention(num_query_groups=groups):
                assert norm is not None
                size, per_group = spec.kv_channels, spec.num_attention_heads // groups
                q, k, v = (
                    list(
                        hf[f"{theirs}self_attn.{which}_proj.weight"].reshape(
                            -1, size, spec.hidden_size
                        )
                    )
                    for which in "qkv"
                )
                heads = []
                for group in range(groups):
                    heads += q[group * per_group : (group + 1) * per_group]
                    heads += [k[group], v[group]]
                out[ours + "self_attention.linear_qkv.layer_norm_weight"] = norm
                out[ours + "self_attention.linear_qkv.weight"] = np.concatenate(heads)
                out[ours + "self_attention.linear_proj.weight"] = hf[
                    theirs + "self_attn.o_proj.weight"
                ]
            case Linear():
                assert norm is not None
                out[ours + "self_attention.layer_norm_weight"] = norm
                out[ours + "self_attention.weight"] = hf[theirs + "self_attn.linear_attn.weight"]
            case NoOp():
                assert norm is None
        norm = hf.get(theirs + "post_attention_layernorm.weight")
        match block.ffn:
            case SwiGLU():
                assert norm is not None
                gate, up = hf[theirs + "mlp.gate_proj.weight"], hf[theirs + "mlp.up_proj.weight"]
                out[ours + "mlp.linear_fc1.layer_norm_weight"] = norm
                out[ours + "mlp.linear_fc1.weight"] = np.concatenate([gate, up])
                out[ours + "mlp.linear_fc2.weight"] = hf[theirs + "mlp.down_proj.weight"]
            case Linear():
                assert norm is not None
                out[ours + "mlp.layer_norm_weight"] = norm
                out[ours + "mlp.weight"] = hf[theirs + "mlp.linear_mlp.weight"]
            case NoOp():
                assert norm is None
    out["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
    if not spec.share_embeddings_and_output_weights:
        out["output_layer.weight"] = pad(hf["lm_head.weight"])
    return out


def expected_shard(name: str, whole: Array, rank: int, tp: int) -> Array:
    """A TP rank's part of a Megatron parameter, from the names of column and row parallel ones."""
    if name.endswith(("layer_norm_weight", "layernorm.weight")):
        return whole
    if name.endswith("linear_fc1.weight"):
        gate, up = np.split(whole, 2)
        return np.concatenate([np.split(gate, tp)[rank], np.split(up, tp)[rank]])
    axis = 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0
    return np.split(whole, tp, axis=axis)[rank]


def padded_vocab_sizes(spec: ModelSpec) -> st.SearchStrategy[int]:
    """None, one row of padding, or more."""
    return st.sampled_from((0, 1, 13)).map(lambda extra: spec.vocab_size + extra)


specs_with_padding = model_specs(max_layers=4).flatmap(
    lambda spec: st.tuples(st.just(spec), padded_vocab_sizes(spec))
)


@given(specs_with_padding)
def test_every_megatron_parameter_holds_what_its_description_says(
    drawn: tuple[ModelSpec, int],
) -> None:
    """Index-coded HF tensors arrive where a head-by-head description puts them, and no others."""
    spec, padded = drawn
    hf = index_coded(hf_tensors(spec))
    expected = expected_whole(spec, hf, padded)
    table = parameters(spec, padded_vocab_size=padded)
    assert list(expected) == list(table)
    for name, parameter in table.items():
        assert parameter.shape == expected[name].shape
        np.testing.assert_array_equal(apply(parameter.tiling, hf), expected[name], err_msg=name)


@given(specs_with_padding)
def test_inverting_the_tilings_gives_every_tensor_back(drawn: tuple[ModelSpec, int]) -> None:
    """HF to Megatron to HF is the identity, for every element of every tensor."""
    spec, padded = drawn
    hf = index_coded(hf_tensors(spec))
    table = parameters(spec, padded_vocab_size=padded)
    mcore = {name: apply(parameter.tiling, hf) for name, parameter in table.items()}
    back = hf_tilings(spec, padded_vocab_size=padded)
    assert list(back) == list(hf)
    for name, tiling in back.items():
        assert all(tile.source is not None for tile in tiling.tiles)
        np.testing.assert_array_equal(apply(tiling, mcore), hf[name], err_msg=name)


@given(specs_with_padding)
def test_inverting_the_other_way_changes_padding_only(drawn: tuple[ModelSpec, int]) -> None:
    """Megatron to HF to Megatron is the identity, padding rows read as zero."""
    spec, padded = drawn
    table = parameters(spec, padded_vocab_size=padded)
    mcore = index_coded({name: parameter.shape for name, parameter in table.items()})
    hf = {
        name: apply(tiling, mcore)
        for name, tiling in hf_tilings(spec, padded_vocab_size=padded).items()
    }
    for name, parameter in table.items():
        expected = mcore[name].copy()
        if name in {"embedding.word_embeddings.weight", "output_layer.weight"}:
            expected[spec.vocab_size :] = ZERO
        np.testing.assert_array_equal(apply(parameter.tiling, hf), expected, err_msg=name)


@given(model_specs(max_layers=3), st.data())
def test_the_shards_of_all_ranks_are_the_whole_parameter(
    spec: ModelSpec, data: st.DataObject
) -> None:
    """Every TP rank reads exactly the rows and columns that Megatron's linear layers keep there."""
    tp = data.draw(st.sampled_from(tensor_parallel_sizes_of(spec)))
    padded = spec.padded_vocab_size(tp, make_vocab_size_divisible_by=1)
    hf = index_coded(hf_tensors(spec))
    for name, parameter in parameters(spec, padded_vocab_size=padded).items():
        whole = apply(parameter.tiling, hf)
        merged = np.full_like(whole, -1)
        for rank in range(tp):
            shard = apply(parameter.shard(rank, tp), hf)
            np.testing.assert_array_equal(
                shard, expected_shard(name, whole, rank, tp), err_msg=f"{name} rank {rank}"
            )
            start = 0
            for box in parameter.shard_boxes(rank, tp):
                axis = parameter.tp_axis or 0
                stop = start + box.shape[axis]
                merged[box.slices] = shard.take(range(start, stop), axis=axis)
                start = stop
        np.testing.assert_array_equal(merged, whole, err_msg=name)


@given(models_with_layouts())
def test_stages_partition_layers_and_parameters(
    drawn: tuple[ModelSpec, ParallelLayout],
) -> None:
    """Each layer is in one stage, in order, and the stages' parameters add up to the model's."""
    spec, layout = drawn
    layout.validate_for(spec)
    stages = list(layout.stages())
    assert [layer for stage in stages for layer in stage.layers] == list(range(spec.num_layers))
    assert [stage.pre_process for stage in stages] == [True, *[False] * (len(stages) - 1)]
    assert [stage.post_process for stage in stages] == [*[False] * (len(stages) - 1), True]
    by_rank = [
        stage
        for rank in range(layout.pipeline_model_parallel_size)
        for stage in layout.stages_of(rank)
    ]
    assert sorted(by_rank, key=stages.index) == stages
    for rank in range(layout.pipeline_model_parallel_size):
        virtual = [stage.vp_stage for stage in layout.stages_of(rank)]
        assert virtual == list(range(layout.virtual_pipeline_model_parallel_size or 1))
    sizes = stage_num_parameters(spec, layout)
    assert sum(sizes) == num_parameters(spec)
    assert sizes[0] >= embedding_num_parameters(spec)
    assert sizes[-1] >= output_num_parameters(spec)


@given(model_specs())
def test_parameter_counts_add_up(spec: ModelSpec) -> None:
    """Embedding, blocks and output are all there is, and equal the tensors' sizes."""
    total = (
        embedding_num_parameters(spec)
        + sum(block_num_parameters(spec, layer_idx) for layer_idx in range(spec.num_layers))
        + output_num_parameters(spec)
    )
    assert total == num_parameters(spec)
    stored = parameters(spec, padded_vocab_size=spec.vocab_size).values()
    assert total == sum(math.prod(parameter.shape) for parameter in stored)


@given(hf_configs())
def test_a_configuration_is_read_as_the_model_it_states(drawn: DrawnConfig) -> None:
    """Every block schema and RoPE style gives the model it was written from."""
    assert spec_from_hf_config(drawn.config) == drawn.spec


@given(model_specs(), st.sampled_from((None, *BLOCK_SCHEMAS)))
def test_a_written_configuration_reads_as_the_same_model(
    spec: ModelSpec, schema: str | None
) -> None:
    """`hf_config_from_spec` is the inverse of `spec_from_hf_config`, in every schema it may use."""
    sayable = spec.kv_channels * spec.num_attention_heads == spec.hidden_size and all(
        width_to_ffn_mult(block.ffn.ffn_hidden_size, spec.hidden_size)
        for block in spec.blocks
        if isinstance(block.ffn, SwiGLU)
    )
    if schema == "released" and not sayable:
        schema = None
    event(f"schema {schema}")
    assert spec_from_hf_config(hf_config_from_spec(spec, schema=schema)) == spec


@given(specs_with_padding)
def test_plan_lines_name_every_tile_once(drawn: tuple[ModelSpec, int]) -> None:
    """The plan as text is complete and has no line twice, so equal digests mean equal plans."""
    spec, padded = drawn
    plan = Plan(spec, padded)
    lines = list(plan.lines())
    assert len(lines) == len(set(lines))
    assert len(lines) == sum(len(tiling.tiles) for tiling in plan.hf_to_mcore.values())
    assert plan.digest() != Plan(spec, padded + 1).digest()


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    """A box of up to four dimensions, empty ones included."""
    starts = draw(st.lists(st.integers(0, 5), max_size=4))
    return Box(tuple(starts), tuple(start + draw(st.integers(0, 7)) for start in starts))


@given(boxes(), st.integers(1, 60))
def test_bands_cover_a_box_in_memory_order(box: Box, max_elements: int) -> None:
    """Bands are within the limit and, read one after the other, are the box element by element."""
    shape = tuple(stop + 1 for stop in box.stops)
    whole = np.arange(math.prod(shape)).reshape(shape)
    pieces = list(bands(box, max_elements=max_elements))
    assert all(0 < piece.volume <= max_elements for piece in pieces)
    found = [whole[piece.slices].reshape(-1) for piece in pieces]
    expected = whole[box.slices].reshape(-1)
    np.testing.assert_array_equal(np.concatenate([*found, expected[:0]]), expected)


@given(specs_with_padding, st.data())
def test_any_slice_of_a_parameter_restricts_like_the_array(
    drawn: tuple[ModelSpec, int], data: st.DataObject
) -> None:
    """Restricting a tiling, then filling it, is filling it and slicing; joining two boxes too."""
    spec, padded = drawn
    table = parameters(spec, padded_vocab_size=padded)
    parameter = table[data.draw(st.sampled_from(sorted(table)))]
    hf = index_coded(hf_tensors(spec))
    whole = apply(parameter.tiling, hf)
    spans = [
        sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))
        for size in parameter.shape
    ]
    box = Box(tuple(a for a, _ in spans), tuple(b for _, b in spans))
    np.testing.assert_array_equal(apply(parameter.tiling.restrict([box]), hf), whole[box.slices])
    axis = data.draw(st.integers(0, len(parameter.shape) - 1))
    other = box.shift([-start if dim == axis else 0 for dim, start in enumerate(box.starts)])
    np.testing.assert_array_equal(
        apply(parameter.tiling.restrict([box, other], axis=axis), hf),
        np.concatenate([whole[box.slices], whole[other.slices]], axis=axis),
    )


@given(specs_with_padding, st.data())
def test_locate_names_the_source_element(drawn: tuple[ModelSpec, int], data: st.DataObject) -> None:
    """`locate` says of any Megatron element the HF tensor and index its value came from."""
    spec, padded = drawn
    table = parameters(spec, padded_vocab_size=padded)
    parameter = table[data.draw(st.sampled_from(sorted(table)))]
    hf = index_coded(hf_tensors(spec))
    index = tuple(data.draw(st.integers(0, size - 1)) for size in parameter.shape)
    source, place = parameter.tiling.locate(index)
    value = apply(parameter.tiling, hf)[index]
    assert value == (ZERO if source is None else hf[source][place])
    assert (source is None) == (value == ZERO)


_ENOUGH = settings(
    max_examples=250,  # three times what the rarest feature takes
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_drawn_models_reach_every_feature() -> None:
    """The strategy for models draws each kind of block, and each oddity, that it stands for."""
    met: set[str] = set()

    @_ENOUGH
    @given(model_specs())
    def draw(spec: ModelSpec) -> None:
        met.update(features_of_spec(spec))

    draw()
    assert met == SPEC_FEATURES


def test_drawn_configurations_reach_every_feature() -> None:
    """The strategy for configurations draws each class, block schema and RoPE style."""
    met: set[str] = set()

    @_ENOUGH
    @given(hf_configs())
    def draw(drawn: DrawnConfig) -> None:
        met.update(features_of_config(drawn) | features_of_spec(drawn.spec))

    draw()
    assert met == CONFIG_FEATURES | SPEC_FEATURES


def test_drawn_layouts_reach_every_feature() -> None:
    """The strategy for layouts draws TP above the groups, uneven and empty stages, VPP."""
    met: set[str] = set()

    @_ENOUGH
    @given(models_with_layouts())
    def draw(drawn: tuple[ModelSpec, ParallelLayout]) -> None:
        met.update(features_of_layout(*drawn))

    draw()
    assert met == LAYOUT_FEATURES


@given(
    model_specs().flatmap(
        lambda s: st.tuples(
            st.just(s), parallel_layouts(s, max_world_size=8, allow_empty_stages=False)
        )
    )
)
def test_layouts_keep_to_their_limits(drawn: tuple[ModelSpec, ParallelLayout]) -> None:
    """Asked for no empty stage and at most eight ranks, the strategy draws neither."""
    _, layout = drawn
    assert min(layout.num_layers_per_stage) >= 1
    assert layout.world_size <= 8
