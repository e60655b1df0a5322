"""Run a Megatron model that is spread over ranks, stage by stage, and bring its logits together.

A forward pass needs no pipeline schedule: the stages run one after the other, hidden states go from
rank to rank by plain send and receive, interleaved or not. Every rank of the layout must take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bridge.errors import InconsistentConfigError, LayoutError
from bridge.spec import ModelSpec, ParallelLayout, Stage


def forward(
    model_parts: Sequence[Any],
    spec: ModelSpec,
    layout: ParallelLayout,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    grad: bool = False,
) -> torch.Tensor:
    """Compute the logits of a batch, on every rank.

    Args:
        model_parts: What `bridge.model.build_model` gave this rank.
        spec: The model.
        layout: How it is cut.
        input_ids: (batch, seq), the same on every rank. With sequence parallelism a sequence that
            TP does not divide is padded on the right, which a causal model does not see.
        position_ids: (seq,) or (batch, seq), for RoPE; None for 0..seq-1. Attention stays causal by
            index, wherever the positions lie.
        grad: Record the computation, for `backward` on this rank's parameters. Only without
            pipeline parallelism, because plain send and receive carry no gradient;
            `bridge.backward` takes gradients through any layout.

    Returns:
        (batch, seq, vocab_size), in the dtype the model computes in, gathered over TP, without the
        padding of the vocabulary, and broadcast from the last pipeline rank to all.

    Raises:
        InconsistentConfigError: BR104, shapes that do not fit, or token ids outside the vocabulary.
        LayoutError: BR200, gradients across pipeline ranks.
    """
    if grad and layout.pipeline_model_parallel_size > 1:
        raise LayoutError(
            f"gradients across the pipeline stages of {layout.name}",
            hint="bridge.backward.loss_and_gradients takes them back through the stages",
        )
    done = run_stages(model_parts, spec, layout, input_ids, position_ids, grad=grad)
    shape = (*input_ids.shape, spec.vocab_size)
    return from_last_stage(done.logits, shape, model_parts, layout)


def from_last_stage(
    logits: torch.Tensor | None,
    shape: Sequence[int],
    model_parts: Sequence[Any],
    layout: ParallelLayout,
) -> torch.Tensor:
    """Broadcast logits from the pipeline rank of the last stage to all.

    Args:
        logits: What `run_stages` gave this rank.
        shape: Theirs.
        model_parts: This rank's.
        layout: How the model is cut.
    """
    from megatron.core import parallel_state

    if logits is None:
        logits = torch.empty(*shape, dtype=_dtype(model_parts), device=current_device())
    if layout.pipeline_model_parallel_size > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        ranks = torch.distributed.get_process_group_ranks(group)
        last_rank = ranks[list(layout.stages())[-1].pp_rank]
        torch.distributed.broadcast(logits.contiguous(), last_rank, group=group)
    return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRun:
    """A stage that this rank has run.

    Args:
        stage: Which.
        received: The hidden states it was given; None where it embeds tokens.
        output: What it made of them: hidden states, or this TP rank's share of the logits.
    """

    stage: Stage
    received: torch.Tensor | None
    output: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A batch that has gone through all stages, as one rank has seen it.

    Args:
        runs: What this rank ran, in order; kept only for a backward pass.
        logits: (batch, seq, vocab_size), gathered and without padding, on the last stage's rank.
        group: The ranks of this pipeline.
        ranks: Their global ranks by pipeline rank.
        last_rank: Global rank of the one that has the logits.
    """

    runs: Sequence[StageRun]
    logits: torch.Tensor | None
    group: Any
    ranks: Sequence[int]
    last_rank: int


def run_stages(
    model_parts: Sequence[Any],
    spec: ModelSpec,
    layout: ParallelLayout,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    *,
    grad: bool,
    cache: Any = None,  # noqa: ANN401 - StaticInferenceContext, which ships no types
) -> Passage:
    """Take a batch through all stages; arguments and errors are those of `forward`.

    With `grad` each stage records its own computation, from what it received to what it sent; what
    lies between two ranks is for `bridge.backward` to bridge. With a `cache`, Megatron's
    `StaticInferenceContext`, the batch goes on behind the tokens that it holds, `position_ids` is
    None, and the logits are those of the last token; see `bridge.generation.decoder`.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    device, dtype = current_device(), _dtype(model_parts)
    input_ids = input_ids.to(device)
    if position_ids is not None:
        position_ids = position_ids.to(device)
    _check(spec, input_ids, position_ids)
    batch, num_tokens = input_ids.shape
    if layout.sequence_parallel:
        input_ids, position_ids = _pad(input_ids, position_ids, layout)
    length = input_ids.shape[1]
    if layout.sequence_parallel:
        length //= layout.tensor_model_parallel_size
    # One token behind a cache may look at everything, and a mask for what lies before is not its.
    is_behind = cache is not None and cache.sequence_len_offset > 0
    mask = None if is_behind else _causal_mask(model_parts, input_ids)
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks = torch.distributed.get_process_group_ranks(group)
    stages = list(layout.stages())
    runs: list[StageRun] = []
    hidden: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    with torch.set_grad_enabled(grad):
        for stage, following in zip(stages, [*stages[1:], None], strict=True):
            if stage.pp_rank == pp_rank:
                part = model_parts[stage.vp_stage]
                output = _run(part, hidden, input_ids, position_ids, mask, cache)
                if grad:
                    runs.append(StageRun(stage=stage, received=hidden, output=output))
                hidden = output
                if following is not None:
                    send(output.detach(), ranks[following.pp_rank], group)
            elif following is not None and following.pp_rank == pp_rank:
                hidden = torch.empty(length, batch, spec.hidden_size, dtype=dtype, device=device)
                receive(hidden, ranks[stage.pp_rank], group)
                hidden.requires_grad_(grad)
        if hidden is not None and stages[-1].pp_rank == pp_rank:
            if cache is None:  # otherwise Megatron has gathered them
                hidden = gather_from_tensor_model_parallel_region(hidden)
            logits = hidden[:, :num_tokens, : spec.vocab_size].contiguous()
    last_rank = ranks[stages[-1].pp_rank]
    return Passage(runs=runs, logits=logits, group=group, ranks=ranks, last_rank=last_rank)


def forward_part(
    part: Any,  # noqa: ANN401 - GPTModel, which ships no types
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    *,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run one model part alone, as `forward` runs each stage, without gradients.

    Args:
        part: From `bridge.model`, without tensor parallelism.
        input_ids: (batch, seq), on the part's device; read where the part embeds.
        position_ids: (seq,) or (batch, seq), there too, for RoPE.
        hidden: (seq, batch, hidden_size), what a part that does not embed starts from.

    Returns:
        (seq, batch, hidden_size); logits, (batch, seq, vocab_size), from one with an output layer.
    """
    with torch.no_grad():
        mask = _causal_mask([part], input_ids)
        return _run(part, hidden, input_ids, position_ids, mask, None)


def _run(
    part: Any,  # noqa: ANN401 - GPTModel, which ships no types
    hidden: torch.Tensor | None,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    cache: Any,  # noqa: ANN401 - StaticInferenceContext, which ships no types
) -> torch.Tensor:
    if hidden is not None:
        part.set_input_tensor(hidden)
    part.rotary_pos_emb.position_ids = position_ids
    try:
        output: torch.Tensor = part(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask,
            inference_context=cache, runtime_gather_output=None if cache is None else True,
        )  # fmt: skip
    finally:
        part.rotary_pos_emb.position_ids = None
        part.set_input_tensor(None)
    return output


def _check(spec: ModelSpec, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> None:
    wrong = []
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        wrong.append(f"input_ids of shape {tuple(input_ids.shape)} must be (batch, seq)")
    elif not 0 <= int(input_ids.min()) <= int(input_ids.max()) < spec.vocab_size:
        # Megatron's sharded embedding masks unknown ids to zero vectors, or reads padding rows.
        wrong.append(f"input_ids must lie in [0, {spec.vocab_size})")
    if position_ids is not None and tuple(position_ids.shape) not in {
        tuple(input_ids.shape),
        tuple(input_ids.shape[1:]),
    }:
        wrong.append(
            f"position_ids of shape {tuple(position_ids.shape)} for input_ids of shape "
            f"{tuple(input_ids.shape)}"
        )
    if wrong:
        raise InconsistentConfigError("the model cannot run on this input", where=wrong)


def _pad(
    input_ids: torch.Tensor, position_ids: torch.Tensor | None, layout: ParallelLayout
) -> tuple[torch.Tensor, torch.Tensor | None]:
    missing = -input_ids.shape[1] % layout.tensor_model_parallel_size
    if position_ids is not None:
        position_ids = torch.nn.functional.pad(position_ids, (0, missing))
    return torch.nn.functional.pad(input_ids, (0, missing)), position_ids


def _causal_mask(model_parts: Sequence[Any], input_ids: torch.Tensor) -> torch.Tensor | None:
    """True where attention must not look, (1, 1, seq, seq); None where no layer reads it."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    if not any(
        isinstance(module, DotProductAttention) for part in model_parts for module in part.modules()
    ):
        return None  # Transformer Engine masks by itself
    length = input_ids.shape[1]
    ones = torch.ones(length, length, dtype=torch.bool, device=input_ids.device)
    return ones.triu(1)[None, None]


def current_device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if _on_gpu() else torch.device("cpu")


def _on_gpu() -> bool:
    # Not `torch.cuda.is_available`: a CPU run may be asked for beside a GPU, see bridge.platform.
    return not isinstance(torch.cuda.current_device(), torch.device)


def _dtype(model_parts: Sequence[Any]) -> torch.dtype:
    dtype: torch.dtype = model_parts[0].config.params_dtype
    return dtype


def send(hidden: torch.Tensor, rank: int, group: Any) -> None:  # noqa: ANN401 - ProcessGroup, untyped here
    """Send a stage's hidden states, or their gradient, to a global rank; see `receive`."""
    torch.distributed.send(_for_wire(hidden.contiguous(), group), rank, group=group)


def receive(hidden: torch.Tensor, rank: int, group: Any) -> None:  # noqa: ANN401 - ProcessGroup, untyped here
    """Fill a tensor with what a global rank sends."""
    wire = _for_wire(hidden, group)
    torch.distributed.recv(wire, rank, group=group)
    if wire is not hidden:
        hidden.copy_(wire)


def _for_wire(hidden: torch.Tensor, group: Any) -> torch.Tensor:  # noqa: ANN401 - ProcessGroup, untyped here
    # gloo sends host memory only; it serves GPUs where several ranks share one.
    return hidden.cpu() if torch.distributed.get_backend(group) == "gloo" else hidden
