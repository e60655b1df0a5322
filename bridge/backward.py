"""The backward pass of a Megatron model that is spread over ranks, and its gradients in HF's terms.

As `bridge.forward` does, without a schedule: the stages run one after the other, and gradients of
hidden states go back from rank to rank by plain send and receive. What Megatron-LM's training step
adds between backward pass and optimizer is done here too, so that each rank ends with the complete
gradient of every element it holds. Source: megatron-core 0.16.1 `finalize_model_grads`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bridge.errors import InconsistentConfigError
from bridge.forward import Passage, current_device, receive, run_stages, send
from bridge.live_parameters import local_parameters
from bridge.parameters import parameters
from bridge.spec import ModelSpec, ParallelLayout
from bridge.tiling import Box

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


def loss_and_gradients(
    model_parts: Sequence[GPTModel],
    spec: ModelSpec,
    layout: ParallelLayout,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the loss of a batch, and leave its gradient in `grad` of this rank's parameters.

    Every rank of the layout must take part. Gradients that were there are replaced.

    Args:
        model_parts: What `bridge.model.build_model` gave this rank.
        spec: The model.
        layout: How it is cut; any.
        input_ids: (batch, seq), the same on every rank, seq at least 2.
        position_ids: As `bridge.forward.forward`.

    Returns:
        The mean cross-entropy of each token given the ones before it in its sequence, in nats per
        token: a scalar, the same on every rank, float32 unless the model computes in float64.
        Rows that only pad the vocabulary take no part, unlike in Megatron's own loss.

    Raises:
        InconsistentConfigError: BR104, as `bridge.forward.forward`, or sequences of one token.
    """
    from megatron.core import parallel_state

    if input_ids.dim() == 2 and input_ids.shape[1] < 2:
        raise InconsistentConfigError(
            "a sequence of one token has no next token to predict",
            where=f"input_ids of shape {tuple(input_ids.shape)}",
        )
    for part in model_parts:
        part.zero_grad(set_to_none=True)
    done = run_stages(model_parts, spec, layout, input_ids, position_ids, grad=True)
    loss = _cross_entropy(done.logits, input_ids, like=model_parts[0].config.params_dtype)
    _run_back(done, loss, layout, parallel_state.get_pipeline_model_parallel_rank())
    if layout.sequence_parallel:
        _sum_shares_of_the_sequence(model_parts)
    if spec.share_embeddings_and_output_weights and layout.pipeline_model_parallel_size > 1:
        _sum_tied_copies(model_parts)
    loss = loss.detach()
    if layout.pipeline_model_parallel_size > 1:
        torch.distributed.broadcast(loss, done.last_rank, group=done.group)
    return loss


def _cross_entropy(
    logits: torch.Tensor | None, input_ids: torch.Tensor, *, like: torch.dtype
) -> torch.Tensor:
    """The loss where the logits are; elsewhere a scalar to be overwritten."""
    dtype = torch.float64 if like == torch.float64 else torch.float32
    if logits is None:
        # The device that hidden states are on, for the broadcast to come.
        return torch.zeros((), dtype=dtype, device=current_device())
    labels = input_ids.to(logits.device)[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).to(dtype), labels)


def _run_back(done: Passage, loss: torch.Tensor, layout: ParallelLayout, pp_rank: int) -> None:
    """Every stage's backward pass, last stage first."""
    stages = list(layout.stages())
    runs = {run.stage: run for run in done.runs}
    gradient: torch.Tensor | None = None
    for stage, previous in zip(stages[::-1], [*stages[-2::-1], None], strict=True):
        if stage.pp_rank == pp_rank:
            run = runs[stage]
            start = loss if stage is stages[-1] else run.output
            torch.autograd.backward(start, gradient)
            if previous is not None:
                send(_gradient_of(run.received), done.ranks[previous.pp_rank], done.group)
            gradient = None
        elif previous is not None and previous.pp_rank == pp_rank:
            gradient = torch.empty_like(runs[previous].output)
            receive(gradient, done.ranks[stage.pp_rank], done.group)


def _gradient_of(received: torch.Tensor | None) -> torch.Tensor:
    if received is None or received.grad is None:  # the rank that waits for it would wait for ever
        raise InconsistentConfigError("a pipeline stage passed back no gradient")
    return received.grad


def _sum_shares_of_the_sequence(model_parts: Sequence[GPTModel]) -> None:
    """Add up over TP what each rank's tokens give to the norms that all ranks hold.

    Megatron marks such parameters `sequence_parallel`. Source: megatron-core 0.16.1
    `_allreduce_non_tensor_model_parallel_grads`.
    """
    from megatron.core import parallel_state

    shares = [
        parameter.grad
        for part in model_parts
        for parameter in part.parameters()
        if getattr(parameter, "sequence_parallel", False) and parameter.grad is not None
    ]
    if not shares:
        return
    # One all-reduce for all: they are small and many.
    together = torch.cat([share.flatten() for share in shares])
    torch.distributed.all_reduce(together, group=parallel_state.get_tensor_model_parallel_group())
    start = 0
    for share in shares:
        share.copy_(together[start : start + share.numel()].view_as(share))
        start += share.numel()


def _sum_tied_copies(model_parts: Sequence[GPTModel]) -> None:
    """Add up what the first and the last pipeline rank have for the embedding that both hold.

    Source: megatron-core 0.16.1 `_allreduce_word_embedding_grads`.
    """
    from megatron.core import parallel_state

    for part in model_parts:
        if part.pre_process or part.post_process:
            gradient = part.shared_embedding_or_output_weight().grad
            torch.distributed.all_reduce(gradient, group=parallel_state.get_embedding_group())


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientTile:
    """A rectangle of a Hugging Face tensor's gradient, as one rank holds it.

    Args:
        hf_name: The tensor; None for rows that only pad the vocabulary.
        box: Which elements of it; for padding, which elements of the rank's own shard.
        parameter: The Megatron parameter it comes from.
        gradient: Its values, of the shape of `box`.
    """

    hf_name: str | None
    box: Box
    parameter: str
    gradient: torch.Tensor


def hf_gradient_tiles(
    model_parts: Sequence[GPTModel], spec: ModelSpec, layout: ParallelLayout
) -> Iterator[GradientTile]:
    """Map this rank's gradients back to Hugging Face tensors, by the tilings that filled them.

    All ranks together cover every tensor. What several ranks hold, norms over TP and both copies
    of a tied embedding, comes from each of them, and is to be equal.

    Yields:
        Every tile of every parameter that has a gradient.
    """
    from megatron.core import parallel_state

    tp = layout.tensor_model_parallel_size
    padded = spec.padded_vocab_size(
        tp, make_vocab_size_divisible_by=layout.make_vocab_size_divisible_by
    )
    table = parameters(spec, padded_vocab_size=padded)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    for one in local_parameters(model_parts, layout):
        if one.tensor.grad is None:
            continue
        for tile in table[one.name].shard(tp_rank, tp).tiles:
            yield GradientTile(
                hf_name=tile.source,
                box=tile.target_box if tile.source is None else tile.source_box,
                parameter=one.name,
                gradient=one.tensor.grad[tile.target_box.slices],
            )
