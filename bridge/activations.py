"""Bytes of activations that a rank holds: an estimate, by counting what a backward pass reads.

The method is that of Korthikanti et al. 2022, "Reducing Activation Recomputation in Large
Transformer Models", section 4: list the tensors that each operation keeps, add up their bytes.
Their list is for GeLU, dropout and as many key heads as query heads; these are the tensors of this
family's blocks, with tokens s b, TP size t, and e bytes per element:

    before each sub-block  residual and its normalized form, 2 s b h e; the norm's scale, 4 s b
    attention              q and what comes out, 2 s b a d e / t; k and v, 2 s b g d e / t;
                           the softmax's normalizers, 4 s b a / t
    SwiGLU                 gate, up, and their product, 3 s b f e / t
    linear, no-op          nothing of their own
    loss                   float32 probabilities, 4 s b v / t; targets, 9 s b

Under sequence parallelism the first row is divided by t. Left out: everything short-lived (the
gradients of activations, communication buffers, workspaces), dropout, which this family has none
of, and what the allocator loses to fragmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from bridge.dtypes import dtype_named
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
from bridge.workload import Workload

_NOTHING: Final = BlockSpec(attention=NoOp(), ffn=NoOp())
_FLOAT32: Final = 4
_TARGETS: Final = 9
"""Of each token an int64 index and a bool: megatron-core 0.16.1 `_VocabParallelCrossEntropy`."""


def saved_by_block(
    spec: ModelSpec, layout: ParallelLayout, work: Workload, block: BlockSpec
) -> int:
    """Bytes that one rank keeps of a block for the backward pass of one micro batch."""
    found = 0
    if not isinstance(block.attention, NoOp):
        found += _norm(spec, layout, work)
    if not isinstance(block.ffn, NoOp):
        found += _norm(spec, layout, work)
    match block.attention:
        case GroupedQueryAttention(num_query_groups=groups):
            found += _attention(spec, layout, work, groups)
        case Linear() | NoOp():
            pass
    match block.ffn:
        case SwiGLU(ffn_hidden_size=width):
            # Unfused, SiLU's input and output are kept besides.
            copies = 3 if work.layers == "te" else 5
            found += copies * work.tokens * width * _size(work) // layout.tensor_model_parallel_size
        case Linear() | NoOp():
            pass
    return found


def saved_by_stage(spec: ModelSpec, layout: ParallelLayout, work: Workload, stage: Stage) -> int:
    """Bytes that one rank keeps of a model part for the backward pass of one micro batch."""
    blocks = [spec.blocks[layer_idx] for layer_idx in stage.layers]
    if work.recompute == "full":
        found = sum(block != _NOTHING for block in blocks) * _hidden(spec, layout, work)
    else:
        found = sum(saved_by_block(spec, layout, work, block) for block in blocks)
    if stage.pre_process:
        found += 8 * work.tokens  # token ids
    if stage.post_process:
        rows = spec.padded_vocab_size(
            layout.tensor_model_parallel_size,
            make_vocab_size_divisible_by=layout.make_vocab_size_divisible_by,
        )
        found += _norm(spec, layout, work) + work.tokens * (
            _FLOAT32 * rows // layout.tensor_model_parallel_size + _TARGETS
        )
    return found


def training_activations(
    spec: ModelSpec, layout: ParallelLayout, work: Workload, stages: Sequence[Stage]
) -> int:
    """Bytes at the fullest moment of a step, on one rank of the pipeline rank that has `stages`.

    Counts the micro batches that 1F1B, interleaved or not, has in flight; there are at least
    2 x PP micro batches in a step.
    """
    parts = [saved_by_stage(spec, layout, work, stage) for stage in stages]
    blocks = {spec.blocks[layer_idx] for stage in stages for layer_idx in stage.layers}
    again = max((saved_by_block(spec, layout, work, one) for one in blocks), default=0)
    pp = layout.pipeline_model_parallel_size
    return most_in_flight(parts, stages[0].pp_rank, pp) + (again if work.recompute == "full" else 0)


def most_in_flight(parts: Sequence[int], pp_rank: int, pp: int) -> int:
    """The largest sum of what is held at once, if part `c` holds `parts[c]` per micro batch.

    Plays the schedule: some forward passes to warm up, then one forward, one backward.
    Source: megatron-core 0.16.1 `schedules.get_pp_rank_microbatches` and `get_schedule_table`, with
    groups of PP micro batches.
    """
    vpp = len(parts)
    warm_up = pp - pp_rank - 1 if vpp == 1 else 2 * (pp - pp_rank - 1) + (vpp - 1) * pp
    held = most = 0
    for step in range(2 * pp * vpp):
        held += parts[step // pp % vpp]
        most = max(most, held)
        if step >= warm_up:
            held -= parts[vpp - 1 - (step - warm_up) // pp % vpp]
    return most


def inference_activations(
    spec: ModelSpec, layout: ParallelLayout, work: Workload, stages: Sequence[Stage]
) -> int:
    """Bytes while a whole prompt goes through the widest block: nothing outlives its use.

    The residual, its normalized form and the sub-block's output, beside what lies between its
    two matrices. Logits are those of the last position, which is what generation needs.
    """
    tp, tokens = layout.tensor_model_parallel_size, work.tokens
    inner = [0]
    for block in {spec.blocks[layer_idx] for stage in stages for layer_idx in stage.layers}:
        match block.attention:
            case GroupedQueryAttention(num_query_groups=groups):
                heads = 2 * spec.num_attention_heads // tp + 2 * groups_per_rank(groups, tp)
                inner.append(heads * spec.kv_channels)
            case Linear() | NoOp():
                pass
        match block.ffn:
            case SwiGLU(ffn_hidden_size=width):
                inner.append(3 * width // tp)
            case Linear() | NoOp():
                pass
    return tokens * (3 * spec.hidden_size + max(inner)) * _size(work)


def kv_cache(
    spec: ModelSpec, layout: ParallelLayout, work: Workload, stages: Sequence[Stage]
) -> int:
    """Bytes of keys and values of all tokens, of the blocks that have attention."""
    groups = 0
    for layer_idx in (layer_idx for stage in stages for layer_idx in stage.layers):
        match spec.blocks[layer_idx].attention:
            case GroupedQueryAttention(num_query_groups=count):
                groups += groups_per_rank(count, layout.tensor_model_parallel_size)
            case Linear() | NoOp():
                pass
    return 2 * groups * spec.kv_channels * work.tokens * _size(work)


def groups_per_rank(num_query_groups: int, tp: int) -> int:
    """Key heads that one rank computes with; where there are fewer than ranks, each has a copy.

    Source: megatron-core 0.16.1 `Attention.num_query_groups_per_partition`.
    """
    return max(1, num_query_groups // tp)


def _size(work: Workload) -> int:
    return dtype_named(work.params_dtype).itemsize


def _hidden(spec: ModelSpec, layout: ParallelLayout, work: Workload) -> int:
    """Bytes of one tensor of hidden states between sub-blocks."""
    return work.tokens * spec.hidden_size * _size(work) // _ranks_outside(layout)


def _ranks_outside(layout: ParallelLayout) -> int:
    return layout.tensor_model_parallel_size if layout.sequence_parallel else 1


def _norm(spec: ModelSpec, layout: ParallelLayout, work: Workload) -> int:
    """A norm's input, its output, which the linear behind it keeps, and a scale per token."""
    scale = _FLOAT32 * work.tokens // _ranks_outside(layout)
    if work.layers == "te":
        return 2 * _hidden(spec, layout, work) + scale
    # PyTorch's own computes in float32 and keeps that input and the normalized one.
    copies = 2 * _FLOAT32 * work.tokens * spec.hidden_size // _ranks_outside(layout)
    return copies + _hidden(spec, layout, work) + scale


def _attention(spec: ModelSpec, layout: ParallelLayout, work: Workload, groups: int) -> int:
    tp, size = layout.tensor_model_parallel_size, _size(work)
    heads = spec.num_attention_heads // tp
    if work.layers == "te":
        kept = 2 * (heads + groups_per_rank(groups, tp)) * spec.kv_channels * size
        return work.tokens * (kept + _FLOAT32 * heads)
    # Keys and values repeated for every head, but where each head has its own: values are then a
    # view into all that linear_qkv gave. The softmax in float32, and again as it is used; four
    # tables of RoPE.
    copies = 6 if groups == spec.num_attention_heads else 4
    scores = _FLOAT32 + (size if size < _FLOAT32 else 0)
    return (
        work.tokens * copies * heads * spec.kv_channels * size
        + work.tokens * work.sequence_length * heads * scores
        + 4 * work.sequence_length * spec.kv_channels * size
    )
