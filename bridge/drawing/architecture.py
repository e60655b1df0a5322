"""What every picture of a model shows, as plain data that a report can keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bridge.parameters import (
    block_num_parameters,
    embedding_num_parameters,
    num_parameters,
    output_num_parameters,
)
from bridge.pipeline import stage_num_parameters
from bridge.spec import (
    AttentionSpec,
    FfnSpec,
    GroupedQueryAttention,
    Linear,
    ModelSpec,
    NoOp,
    ParallelLayout,
    SwiGLU,
)

Kind = Literal["full", "linear", "no_op"]


@dataclass(frozen=True, slots=True)
class SubBlock:
    """Attention with this many query groups, or a feed-forward of this width, or less than that."""

    kind: Kind
    size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnBlock:
    """One transformer block."""

    attention: SubBlock
    ffn: SubBlock
    num_parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnStage:
    """One model part of a layout; `num_parameters` over all TP ranks, without padding."""

    pp_rank: int
    vp_stage: int
    first_layer: int
    num_layers: int
    num_parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model, and how a layout cuts it.

    Args:
        name: For the title.
        facts: One line of dimensions.
        num_parameters: As published.
        embedding_parameters: Of the word embedding.
        output_parameters: Of the final norm and, unless tied, the output layer.
        blocks: In the model's order.
        layout: Its name; empty without one.
        tensor_model_parallel_size: Ranks that share each stage.
        stages: In the model's order; none without a layout.
    """

    name: str
    facts: str
    num_parameters: int
    embedding_parameters: int
    output_parameters: int
    blocks: tuple[DrawnBlock, ...]
    layout: str = ""
    tensor_model_parallel_size: int = 1
    stages: tuple[DrawnStage, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """Plain data for evidence: a model by itself, each block its halves and its parameters."""
        return {
            "facts": self.facts,
            "num_parameters": self.num_parameters,
            "embedding_parameters": self.embedding_parameters,
            "output_parameters": self.output_parameters,
            "blocks": [
                {
                    "attention": one.attention.kind,
                    "num_query_groups": one.attention.size,
                    "ffn": one.ffn.kind,
                    "ffn_hidden_size": one.ffn.size,
                    "num_parameters": one.num_parameters,
                }
                for one in self.blocks
            ],
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any], *, name: str) -> Architecture:
        """The inverse of `as_data`."""
        blocks = tuple(
            DrawnBlock(
                attention=SubBlock(one["attention"], one["num_query_groups"]),
                ffn=SubBlock(one["ffn"], one["ffn_hidden_size"]),
                num_parameters=one["num_parameters"],
            )
            for one in data["blocks"]
        )
        return cls(**{**data, "name": name, "blocks": blocks})


def architecture(spec: ModelSpec, layout: ParallelLayout | None, *, name: str) -> Architecture:
    """Gather what is drawn of a model; with a layout, its stages too."""
    tied = "tied" if spec.share_embeddings_and_output_weights else "untied"
    return Architecture(
        name=name,
        facts=f"hidden size {spec.hidden_size:,}; {spec.num_attention_heads} query heads of "
        f"{spec.kv_channels} channels; vocabulary {spec.vocab_size:,}, {tied}; {spec.params_dtype}",
        num_parameters=num_parameters(spec),
        embedding_parameters=embedding_num_parameters(spec),
        output_parameters=output_num_parameters(spec),
        blocks=tuple(
            DrawnBlock(
                attention=_attention(block.attention),
                ffn=_ffn(block.ffn),
                num_parameters=block_num_parameters(spec, layer_idx),
            )
            for layer_idx, block in enumerate(spec.blocks)
        ),
        layout="" if layout is None else layout.name,
        tensor_model_parallel_size=1 if layout is None else layout.tensor_model_parallel_size,
        stages=() if layout is None else _stages(spec, layout),
    )


def _stages(spec: ModelSpec, layout: ParallelLayout) -> tuple[DrawnStage, ...]:
    sizes = stage_num_parameters(spec, layout)
    return tuple(
        DrawnStage(
            pp_rank=stage.pp_rank,
            vp_stage=stage.vp_stage,
            first_layer=stage.layers.start,
            num_layers=len(stage.layers),
            num_parameters=size,
        )
        for stage, size in zip(layout.stages(), sizes, strict=True)
    )


def _attention(attention: AttentionSpec) -> SubBlock:
    match attention:
        case GroupedQueryAttention(num_query_groups=groups):
            return SubBlock("full", groups)
        case Linear():
            return SubBlock("linear")
        case NoOp():
            return SubBlock("no_op")


def _ffn(ffn: FfnSpec) -> SubBlock:
    match ffn:
        case SwiGLU(ffn_hidden_size=width):
            return SubBlock("full", width)
        case Linear():
            return SubBlock("linear")
        case NoOp():
            return SubBlock("no_op")
