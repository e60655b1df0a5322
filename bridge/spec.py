"""What a model *is*, and how it is cut over ranks: plain frozen data in Megatron's own words.

`hf_config` reads and writes Hugging Face configurations to and from `ModelSpec`;
`megatron_config` does the same for Megatron-Core. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from bridge.errors import InconsistentConfigError, LayoutError, TensorParallelError

MAX_LAYERS: Final = 2048
"""Of any model; Ultra-253B, the deepest of the family, has 162."""
_MAX_WIDTH: Final = 1 << 24
_MAX_BASE: Final = 1 << 53
"""Megatron's arguments have it as an integer; a float is one up to here."""
"""Of any dimension; the widest known, an FFN of Ultra-253B, has 425,984."""
_MAX_GROUPS: Final = 1 << 16
"""Each is three tiles of a plan. 126 layers of 128 heads without grouping have 16,128."""


@dataclass(frozen=True, slots=True)
class NoOp:
    """A sub-block that is not there: no weights, no norm, the residual passes through."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A sub-block replaced by one (hidden_size, hidden_size) matrix behind its norm, no bias."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedQueryAttention:
    """Causal attention; the query heads share `num_query_groups` key and value heads."""

    num_query_groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SwiGLU:
    """A gated feed-forward of this width: `down(silu(gate(x)) * up(x))`."""

    ffn_hidden_size: int


AttentionSpec = GroupedQueryAttention | Linear | NoOp
FfnSpec = SwiGLU | Linear | NoOp


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpec:
    """One transformer block: an attention sub-block, then a feed-forward one."""

    attention: AttentionSpec
    ffn: FfnSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """The four values of llama3 RoPE scaling, all carried, none assumed."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        """Refuse values for which the smoothing band is empty or inverted."""
        if not (
            self.factor >= 1
            and 0 < self.low_freq_factor < self.high_freq_factor
            and self.original_max_position_embeddings > 0
        ):
            raise InconsistentConfigError(
                "llama3 RoPE scaling needs factor >= 1, 0 < low_freq_factor < high_freq_factor and "
                f"original_max_position_embeddings > 0, got {self}",
                where="rope_scaling",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding: Megatron's `rotary_base` and, if any, llama3 scaling."""

    rotary_base: float
    scaling: Llama3Scaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model of the family, every block on its own terms.

    `heterogeneous_block_specs` is Megatron's flag of that name: a DeciLM model has it set even
    when its blocks happen to be equal, because Megatron then builds and stores it per layer.
    """

    hidden_size: int
    num_attention_heads: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    rope: RopeSpec
    share_embeddings_and_output_weights: bool
    params_dtype: str
    blocks: tuple[BlockSpec, ...]
    heterogeneous_block_specs: bool

    def __post_init__(self) -> None:
        """Hold the counts to what attention and RoPE need; every offender in one error."""
        wrong = [
            f"{name}={value} must be a positive integer"
            for name, value in (
                ("hidden_size", self.hidden_size),
                ("num_attention_heads", self.num_attention_heads),
                ("kv_channels", self.kv_channels),
                ("vocab_size", self.vocab_size),
                ("max_position_embeddings", self.max_position_embeddings),
                ("num_layers", len(self.blocks)),
            )
            if value < 1
        ]
        wrong += self._beyond_any_model()
        if self.kv_channels % 2:
            wrong.append(f"kv_channels={self.kv_channels} must be even: RoPE rotates pairs")
        if not 0 < self.layernorm_epsilon < 1:
            wrong.append(f"layernorm_epsilon={self.layernorm_epsilon} must lie in (0, 1)")
        if not (math.isfinite(self.rope.rotary_base) and self.rope.rotary_base > 1):
            wrong.append(f"rotary_base={self.rope.rotary_base} must be a finite number above 1")
        for layer_idx, block in enumerate(self.blocks):
            match block.attention:
                case GroupedQueryAttention(num_query_groups=groups):
                    if groups < 1 or self.num_attention_heads % groups:
                        wrong.append(
                            f"block {layer_idx}: num_query_groups={groups} does not divide "
                            f"num_attention_heads={self.num_attention_heads}"
                        )
                case _:
                    pass
            match block.ffn:
                case SwiGLU(ffn_hidden_size=width) if width < 1:
                    wrong.append(f"block {layer_idx}: ffn_hidden_size={width} must be positive")
                case _:
                    pass
        if not self.heterogeneous_block_specs and not self._is_plain:
            wrong.append("blocks differ, or hold no-ops or linears, in a homogeneous model")
        if wrong:
            raise InconsistentConfigError(
                "the model's dimensions contradict one another", where=wrong
            )

    def _beyond_any_model(self) -> list[str]:
        """Sizes that would cost more time than anyone has before the first byte is read."""
        widest = max(
            (block.ffn.ffn_hidden_size for block in self.blocks if isinstance(block.ffn, SwiGLU)),
            default=0,
        )
        groups = sum(
            block.attention.num_query_groups
            for block in self.blocks
            if isinstance(block.attention, GroupedQueryAttention)
        )
        sizes = {
            "num_layers": (len(self.blocks), MAX_LAYERS),
            "hidden_size": (self.hidden_size, _MAX_WIDTH),
            "num_attention_heads * kv_channels": (
                self.num_attention_heads * self.kv_channels,
                _MAX_WIDTH,
            ),
            "vocab_size": (self.vocab_size, _MAX_WIDTH),
            "max_position_embeddings": (self.max_position_embeddings, _MAX_WIDTH),
            "rotary_base": (self.rope.rotary_base, _MAX_BASE),
            "ffn_hidden_size": (widest, _MAX_WIDTH),
            "num_query_groups of all blocks": (groups, _MAX_GROUPS),
        }
        return [
            f"{name}={value} is beyond any model, the limit is {limit}"
            for name, (value, limit) in sizes.items()
            if value > limit
        ]

    @property
    def _is_plain(self) -> bool:
        if not self.blocks:
            return True  # refused for its number of layers
        first = self.blocks[0]
        return (
            isinstance(first.attention, GroupedQueryAttention)
            and isinstance(first.ffn, SwiGLU)
            and all(block == first for block in self.blocks)
        )

    @property
    def num_layers(self) -> int:
        """Number of transformer blocks."""
        return len(self.blocks)

    def padded_vocab_size(
        self, tensor_model_parallel_size: int, *, make_vocab_size_divisible_by: int = 128
    ) -> int:
        """Rows of the embedding as Megatron stores it: a multiple of divisor x TP.

        Source: Megatron-LM megatron/training/tokenizer, `_vocab_size_with_padding`.
        """
        multiple = make_vocab_size_divisible_by * tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One model part: the layers that one pipeline rank holds in one virtual stage."""

    pp_rank: int
    vp_stage: int
    layers: range
    pre_process: bool
    post_process: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout:
    """How a model is cut over ranks.

    Args:
        tensor_model_parallel_size: TP.
        pipeline_model_parallel_size: PP.
        virtual_pipeline_model_parallel_size: Model parts per pipeline rank; None without
            interleaving.
        num_layers_per_stage: Layers of each of the PP x VPP stages, in the order the model runs:
            stage `s` is virtual stage `s // PP` of pipeline rank `s % PP`, as in Megatron.
        sequence_parallel: Shard activations along the sequence outside the TP regions.
        make_vocab_size_divisible_by: The vocabulary is padded to a multiple of this times TP.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    num_layers_per_stage: tuple[int, ...]
    sequence_parallel: bool = False
    make_vocab_size_divisible_by: int = 128

    def __post_init__(self) -> None:
        """Check the counts against each other; the model is checked by `validate_for`."""
        vpp = self.virtual_pipeline_model_parallel_size
        if self.tensor_model_parallel_size < 1 or self.pipeline_model_parallel_size < 1:
            raise LayoutError(f"parallel sizes must be positive, got {self.name}")
        if self.make_vocab_size_divisible_by < 1:
            raise LayoutError(
                f"make_vocab_size_divisible_by={self.make_vocab_size_divisible_by} must be positive"
            )
        if vpp is not None and (vpp < 1 or self.pipeline_model_parallel_size == 1):
            raise LayoutError(
                f"virtual_pipeline_model_parallel_size={vpp} needs "
                "pipeline_model_parallel_size above 1"
            )
        if len(self.num_layers_per_stage) != self.pipeline_model_parallel_size * (vpp or 1):
            raise LayoutError(
                f"{len(self.num_layers_per_stage)} stages given, layout {self.name} has "
                f"{self.pipeline_model_parallel_size * (vpp or 1)}"
            )
        if any(count < 0 for count in self.num_layers_per_stage):
            raise LayoutError(f"negative layer count in {self.num_layers_per_stage}")

    @property
    def name(self) -> str:
        """The layout's id, as in test ids and reports: `tp2-pp2-vp2`."""
        parts = [f"tp{self.tensor_model_parallel_size}", f"pp{self.pipeline_model_parallel_size}"]
        if self.virtual_pipeline_model_parallel_size is not None:
            parts.append(f"vp{self.virtual_pipeline_model_parallel_size}")
        if self.sequence_parallel:
            parts.append("sp")
        return "-".join(parts)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def num_layers(self) -> int:
        """Layers over all stages."""
        return sum(self.num_layers_per_stage)

    def stages(self) -> Iterator[Stage]:
        """Every model part, in the order the model runs."""
        first = 0
        pp, last = self.pipeline_model_parallel_size, len(self.num_layers_per_stage) - 1
        for index, count in enumerate(self.num_layers_per_stage):
            yield Stage(
                pp_rank=index % pp,
                vp_stage=index // pp,
                layers=range(first, first + count),
                pre_process=index == 0,
                post_process=index == last,
            )
            first += count

    def stages_of(self, pp_rank: int) -> tuple[Stage, ...]:
        """The model parts of one pipeline rank, by virtual stage."""
        return tuple(stage for stage in self.stages() if stage.pp_rank == pp_rank)

    def validate_for(self, spec: ModelSpec) -> None:
        """Refuse a layout that Megatron-Core cannot build for this model, all reasons at once.

        Raises:
            LayoutError: BR200, the stages do not add up to the model's layers.
            TensorParallelError: BR201, heads, groups or widths that TP does not divide.
        """
        if self.num_layers != spec.num_layers:
            raise LayoutError(
                f"the stages of {self.name} hold {self.num_layers} layers, "
                f"the model has {spec.num_layers}"
            )
        tp = self.tensor_model_parallel_size
        wrong = tensor_parallel_problems(spec, tp)
        if wrong:
            fits = [size for size in range(1, 129) if not tensor_parallel_problems(spec, size)]
            raise TensorParallelError(
                f"tensor_model_parallel_size={tp} does not divide this model",
                where=wrong,
                hint=f"choose tensor_model_parallel_size from {{{', '.join(map(str, fits))}}}",
            )


def tensor_parallel_problems(spec: ModelSpec, tp: int) -> list[str]:
    """Say everything about this model that a TP size does not divide; empty when it fits.

    Groups must be a multiple or a divisor of TP: with fewer groups than ranks Megatron shards the
    rows of `linear_qkv` evenly and gathers them again. Source: megatron-core 0.16.1
    `TransformerConfig.__post_init__` and `SelfAttention.get_query_key_value_tensors`.
    """
    wrong = []
    if spec.num_attention_heads % tp:
        wrong.append(f"num_attention_heads={spec.num_attention_heads}")
    for layer_idx, block in enumerate(spec.blocks):
        match block.attention:
            case GroupedQueryAttention(num_query_groups=groups):
                if groups % tp and tp % groups:
                    wrong.append(
                        f"block {layer_idx}: num_query_groups={groups} is neither a multiple nor "
                        f"a divisor of tensor_model_parallel_size={tp}"
                    )
                elif spec.num_attention_heads % tp == 0 and 2 * groups * spec.kv_channels % tp:
                    wrong.append(
                        f"block {layer_idx}: num_query_groups={groups} x kv_channels="
                        f"{spec.kv_channels} give linear_qkv too few rows for an even split"
                    )
            case Linear():
                if spec.hidden_size % tp:
                    wrong.append(f"block {layer_idx}: linear attention of {spec.hidden_size} rows")
            case NoOp():
                pass
        match block.ffn:
            case SwiGLU(ffn_hidden_size=width):
                if width % tp:
                    wrong.append(f"block {layer_idx}: ffn_hidden_size={width}")
            case Linear():
                if spec.hidden_size % tp:
                    wrong.append(f"block {layer_idx}: linear FFN of {spec.hidden_size} rows")
            case NoOp():
                pass
    return wrong
