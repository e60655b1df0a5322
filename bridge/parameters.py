"""The table: which Megatron parameter is made of which Hugging Face tensors, and how.

One row per Megatron parameter of each block kind. Both directions, the slices of a TP rank,
vocabulary padding, parameter counts and the tensors a checkpoint must hold are all read off this
table; adding a block kind means adding its rows here and nothing else.

Names are those of Megatron's checkpoints, with the layer's index over the whole model. Models
built from Transformer Engine layers use the same names; local layers keep their norms outside the
linear that consumes them, and `bridge.live_parameters` asks Megatron itself how it maps them.
Source: megatron-core 0.16.1 `gpt_layer_specs.get_gpt_layer_local_spec` and
`heterogeneous_layer_specs`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from bridge.spec import (
    AttentionSpec,
    FfnSpec,
    GroupedQueryAttention,
    Linear,
    ModelSpec,
    NoOp,
    SwiGLU,
)
from bridge.tiling import Box, Shape, Tile, Tiling, invert


class Order(enum.Enum):
    """How the rows of several sources make up one parameter."""

    STACKED = "one source after the other; each is sharded over TP on its own"
    GROUPED = "per query group a share of each source; the whole is sharded over TP"


@dataclass(frozen=True, slots=True)
class Source:
    """A Hugging Face tensor and the names of its dimensions, resolved by `_dimensions`."""

    name: str
    dims: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One Megatron parameter.

    Args:
        name: In the checkpoint, relative to its layer for rows of a block.
        sources: What it is made of.
        tp_axis: The axis TP shards; None when every TP rank holds all of it.
        order: How several sources are laid out.
        pad_rows_to: Dimension the rows are padded to with zeros.
    """

    name: str
    sources: tuple[Source, ...]
    tp_axis: int | None = None
    order: Order = Order.STACKED
    pad_rows_to: str | None = None


_HIDDEN_NORM: Final = ("hidden",)
_ATTENTION_NORM: Final = (Source("input_layernorm.weight", _HIDDEN_NORM),)
_FFN_NORM: Final = (Source("post_attention_layernorm.weight", _HIDDEN_NORM),)

ATTENTION_ROWS: Final[Mapping[type[AttentionSpec], tuple[Row, ...]]] = {
    GroupedQueryAttention: (
        Row(
            name="self_attention.linear_qkv.layer_norm_weight",
            sources=_ATTENTION_NORM,
        ),
        # Rows run group by group: the group's query heads, its key head, its value head.
        # Source: megatron-core 0.16.1 SelfAttention.get_query_key_value_tensors.
        Row(
            name="self_attention.linear_qkv.weight",
            sources=(
                Source("self_attn.q_proj.weight", ("query", "hidden")),
                Source("self_attn.k_proj.weight", ("key_value", "hidden")),
                Source("self_attn.v_proj.weight", ("key_value", "hidden")),
            ),
            tp_axis=0,
            order=Order.GROUPED,
        ),
        Row(
            name="self_attention.linear_proj.weight",
            sources=(Source("self_attn.o_proj.weight", ("hidden", "query")),),
            tp_axis=1,
        ),
    ),
    Linear: (
        Row(
            name="self_attention.layer_norm_weight",
            sources=_ATTENTION_NORM,
        ),
        Row(
            name="self_attention.weight",
            sources=(Source("self_attn.linear_attn.weight", ("hidden", "hidden")),),
            tp_axis=0,
        ),
    ),
    NoOp: (),
}

FFN_ROWS: Final[Mapping[type[FfnSpec], tuple[Row, ...]]] = {
    SwiGLU: (
        Row(
            name="mlp.linear_fc1.layer_norm_weight",
            sources=_FFN_NORM,
        ),
        # Gate first, then up. Source: megatron-core 0.16.1 MLP.forward, `glu` chunks in two and
        # activates the first half.
        Row(
            name="mlp.linear_fc1.weight",
            sources=(
                Source("mlp.gate_proj.weight", ("ffn", "hidden")),
                Source("mlp.up_proj.weight", ("ffn", "hidden")),
            ),
            tp_axis=0,
        ),
        Row(
            name="mlp.linear_fc2.weight",
            sources=(Source("mlp.down_proj.weight", ("hidden", "ffn")),),
            tp_axis=1,
        ),
    ),
    Linear: (
        Row(
            name="mlp.layer_norm_weight",
            sources=_FFN_NORM,
        ),
        Row(
            name="mlp.weight",
            sources=(Source("mlp.linear_mlp.weight", ("hidden", "hidden")),),
            tp_axis=0,
        ),
    ),
    NoOp: (),
}

EMBEDDING_ROW: Final = Row(
    name="embedding.word_embeddings.weight",
    sources=(Source("model.embed_tokens.weight", ("vocab", "hidden")),),
    tp_axis=0,
    pad_rows_to="padded_vocab",
)
FINAL_NORM_ROW: Final = Row(
    name="decoder.final_layernorm.weight", sources=(Source("model.norm.weight", _HIDDEN_NORM),)
)
OUTPUT_ROW: Final = Row(
    name="output_layer.weight",
    sources=(Source("lm_head.weight", ("vocab", "hidden")),),
    tp_axis=0,
    pad_rows_to="padded_vocab",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One Megatron parameter of one model, all TP ranks together.

    `tiling` says which HF element each of its elements is. `segments` are the row counts of the
    parts that TP shards one by one; a single one for everything but `linear_fc1`.
    """

    name: str
    layer_idx: int | None
    shape: Shape
    tiling: Tiling
    tp_axis: int | None
    segments: tuple[int, ...]

    @property
    def segment_boxes(self) -> tuple[Box, ...]:
        """The parts that are sharded one by one; Megatron stores each as its own chunk."""
        boxes, start = [], 0
        for size in self.segments:
            boxes.append(Box.rows(start, start + size, self.shape[1:]))
            start += size
        return tuple(boxes)

    def shard_boxes(self, tp_rank: int, tensor_model_parallel_size: int) -> tuple[Box, ...]:
        """What a TP rank holds, in order along `tp_axis`: one box per segment.

        Sizes must be divisible; `ParallelLayout.validate_for` has checked the model.
        """
        if self.tp_axis is None:
            return (Box.whole(self.shape),)
        axis = self.tp_axis
        boxes = []
        for segment in self.segment_boxes:
            extent = segment.shape[axis] // tensor_model_parallel_size
            starts, stops = list(segment.starts), list(segment.stops)
            starts[axis] += tp_rank * extent
            stops[axis] = starts[axis] + extent
            boxes.append(Box(tuple(starts), tuple(stops)))
        return tuple(boxes)

    def shard(self, tp_rank: int, tensor_model_parallel_size: int) -> Tiling:
        """The HF elements of a TP rank's own tensor: what it reads, and nothing else."""
        boxes = self.shard_boxes(tp_rank, tensor_model_parallel_size)
        return self.tiling.restrict(boxes, axis=self.tp_axis or 0)


def parameters(spec: ModelSpec, *, padded_vocab_size: int) -> Mapping[str, Parameter]:
    """Every parameter of the Megatron model, by checkpoint name, in the order the model runs.

    Args:
        spec: The model.
        padded_vocab_size: Rows of the embedding and the output layer; at least `vocab_size`.
    """
    return _parameters(spec, padded_vocab_size)


@lru_cache(maxsize=16)
def _parameters(spec: ModelSpec, padded_vocab_size: int) -> Mapping[str, Parameter]:
    found = [_resolve(row, spec, padded_vocab_size, idx) for row, idx in _rows(spec)]
    return {parameter.name: parameter for parameter in found}


def _rows(spec: ModelSpec) -> Iterator[tuple[Row, int | None]]:
    """Every row of the model with its block, in the order the model runs."""
    yield EMBEDDING_ROW, None
    for layer_idx in range(spec.num_layers):
        for row in block_rows(spec, layer_idx):
            yield row, layer_idx
    yield FINAL_NORM_ROW, None
    if not spec.share_embeddings_and_output_weights:
        yield OUTPUT_ROW, None


def block_rows(spec: ModelSpec, layer_idx: int) -> tuple[Row, ...]:
    """The rows of one block, attention first."""
    block = spec.blocks[layer_idx]
    return ATTENTION_ROWS[type(block.attention)] + FFN_ROWS[type(block.ffn)]


def hf_tensors(spec: ModelSpec) -> Mapping[str, Shape]:
    """Exactly the tensors a Hugging Face checkpoint of this model holds, in the model's order."""
    return {
        _hf_name(source, layer_idx): shape
        for row, layer_idx in _rows(spec)
        for source, shape in _source_shapes(row, spec, layer_idx)
    }


def hf_tilings(spec: ModelSpec, *, padded_vocab_size: int) -> Mapping[str, Tiling]:
    """The way back: each HF tensor tiled by Megatron parameters.

    Raises:
        PlanError: BR400, an element of HF is read twice or never: the table is wrong.
    """
    table = parameters(spec, padded_vocab_size=padded_vocab_size)
    return invert({name: parameter.tiling for name, parameter in table.items()}, hf_tensors(spec))


def num_parameters(spec: ModelSpec) -> int:
    """Number of parameters as published: tied weights once, no padding."""
    return sum(math.prod(shape) for shape in hf_tensors(spec).values())


def block_num_parameters(spec: ModelSpec, layer_idx: int) -> int:
    """Number of parameters of one block, its norms included."""
    return sum(
        math.prod(shape)
        for row in block_rows(spec, layer_idx)
        for _, shape in _source_shapes(row, spec, layer_idx)
    )


def embedding_num_parameters(spec: ModelSpec) -> int:
    """Number of parameters of the word embedding."""
    return spec.vocab_size * spec.hidden_size


def output_num_parameters(spec: ModelSpec) -> int:
    """Number of parameters after the last block: final norm and, unless tied, output layer."""
    tied = spec.share_embeddings_and_output_weights
    return spec.hidden_size + (0 if tied else spec.vocab_size * spec.hidden_size)


def _dimensions(spec: ModelSpec, layer_idx: int | None) -> dict[str, int]:
    dims = {"hidden": spec.hidden_size, "vocab": spec.vocab_size}
    if layer_idx is None:
        return dims
    block = spec.blocks[layer_idx]
    match block.attention:
        case GroupedQueryAttention(num_query_groups=groups):
            dims["query"] = spec.num_attention_heads * spec.kv_channels
            dims["key_value"] = groups * spec.kv_channels
            dims["groups"] = groups
        case Linear() | NoOp():
            pass
    match block.ffn:
        case SwiGLU(ffn_hidden_size=width):
            dims["ffn"] = width
        case Linear() | NoOp():
            pass
    return dims


def _hf_name(source: Source, layer_idx: int | None) -> str:
    return source.name if layer_idx is None else f"model.layers.{layer_idx}.{source.name}"


def _source_shapes(
    row: Row, spec: ModelSpec, layer_idx: int | None
) -> Iterator[tuple[Source, Shape]]:
    dims = _dimensions(spec, layer_idx)
    for source in row.sources:
        yield source, tuple(dims[dim] for dim in source.dims)


def _resolve(
    row: Row, spec: ModelSpec, padded_vocab_size: int, layer_idx: int | None = None
) -> Parameter:
    wholes = [
        (_hf_name(source, layer_idx), Box.whole(shape))
        for source, shape in _source_shapes(row, spec, layer_idx)
    ]
    parts: Sequence[tuple[str | None, Box]] = wholes
    if row.order is Order.GROUPED:
        parts = list(_by_group(wholes, _dimensions(spec, layer_idx)["groups"]))
        segments: tuple[int, ...] = (sum(box.shape[0] for _, box in wholes),)
    else:
        segments = tuple(box.shape[0] for _, box in wholes)
    tiling = Tiling.concatenate(parts)
    if row.pad_rows_to is not None:
        tiling = _pad_rows(tiling, padded_vocab_size)
        segments = (padded_vocab_size,)
    prefix = "" if layer_idx is None else f"decoder.layers.{layer_idx}."
    return Parameter(
        name=prefix + row.name,
        layer_idx=layer_idx,
        shape=tiling.shape,
        tiling=tiling,
        tp_axis=row.tp_axis,
        segments=segments,
    )


def _by_group(wholes: Sequence[tuple[str, Box]], groups: int) -> Iterator[tuple[str | None, Box]]:
    for group in range(groups):
        for name, box in wholes:
            share = box.shape[0] // groups
            yield name, Box.rows(group * share, (group + 1) * share, box.shape[1:])


def _pad_rows(tiling: Tiling, rows: int) -> Tiling:
    used, *rest = tiling.shape
    if rows == used:
        return tiling
    zeros = Box.rows(0, rows - used, tuple(rest))
    padding = Tile(None, zeros, zeros.shift((used, *(0 for _ in rest))))
    return Tiling((rows, *rest), (*tiling.tiles, padding))
