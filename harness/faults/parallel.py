"""Ranks that hold, send, sum or start with the wrong thing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from bridge.parameters import Parameter
from bridge.spec import ModelSpec, ParallelLayout
from harness.faults import traits
from harness.faults.arithmetic import norm_weights
from harness.faults.seams import AfterBuild, AfterLoad, Replaced
from harness.hooks import Fault
from harness.ranks import RankContext

Function = Callable[..., Any]


def ranks_reversed(healthy: Function) -> Function:
    """TP rank 0 reads the last shard."""

    def ranks(layout: ParallelLayout) -> tuple[int, int]:
        rank, size = healthy(layout)
        return size - 1 - rank, size

    return ranks


def shards_reversed(suffix: str | tuple[str, ...], healthy: Function) -> Function:
    """The shards of some parameters are dealt out backwards."""

    def boxes(self: Parameter, tp_rank: int, size: int) -> Any:  # noqa: ANN401 - boxes
        rank = size - 1 - tp_rank if self.name.endswith(suffix) else tp_rank
        return healthy(self, rank, size)

    return boxes


def not_summed(_healthy: Function) -> Function:
    """Partial sums that stay partial: the identity for an all-reduce."""

    def same(_ctx: Any, tensor: Any, _group: Any) -> Any:  # noqa: ANN401 - torch's own
        return tensor

    return same


def gradient_not_summed(healthy: Function) -> Function:
    """The same in the backward pass, where no logits show it.

    Column-parallel layers sum their input's gradient themselves once TP is above 1; Megatron's
    `_CopyToModelParallelRegion` is then not used.
    """

    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ANN401 - torch's own
        ctx.allreduce_dgrad = False
        return healthy(ctx, *gradients)

    return backward


def tied_apart(_healthy: Function) -> Function:
    """First and last stage each keep their own share of a tied embedding's gradient."""

    def nothing(_model_parts: Any) -> None:  # noqa: ANN401 - model parts
        return None

    return nothing


def gathered_backwards(healthy: Function) -> Function:
    """The vocabulary's shards put together from the last to the first."""

    def gather(tensor: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - Megatron's own
        import torch
        from megatron.core import parallel_state

        found = healthy(tensor, *args, **kwargs)
        size = parallel_state.get_tensor_model_parallel_world_size()
        return torch.cat(found.chunk(size, dim=-1)[::-1], dim=-1)

    return gather


def sent_rounded(healthy: Function) -> Function:
    """Hidden states lose their last two bits on the way to the next stage."""

    def send(hidden: Any, *args: Any) -> None:  # noqa: ANN401 - a tensor
        big = hidden * 5.0
        healthy(big - (big - hidden), *args)

    return send


def unmarked(part: Any, _spec: ModelSpec, _context: RankContext) -> None:  # noqa: ANN401 - a GPTModel
    """Norms whose gradients nobody sums over the ranks that share the sequence."""
    for weight in norm_weights(part):
        weight.sequence_parallel = False


def other_layers(healthy: Function) -> Function:
    """Later stages begin one layer early: they load their predecessor's last layer."""

    def name(part: Any, live_name: str) -> str:  # noqa: ANN401 - a GPTModel
        from megatron.core import parallel_state

        found: str = healthy(part, live_name)
        head, _, rest = found.partition("decoder.layers.")
        if head or not rest or parallel_state.get_pipeline_model_parallel_rank() == 0:
            return found
        number, _, leaf = rest.partition(".")
        return f"decoder.layers.{int(number) - 1}.{leaf}"

    return name


def stale_tie(part: Any, spec: ModelSpec, _context: RankContext) -> None:  # noqa: ANN401 - a GPTModel
    """The last stage's copy of the embedding is an older one."""
    if spec.share_embeddings_and_output_weights and part.post_process and not part.pre_process:
        part.output_layer.weight.mul_(1.01)


def padding_filled(part: Any, spec: ModelSpec, _context: RankContext) -> None:  # noqa: ANN401 - as above
    """Rows of the last stage that no token has are filled: a training step's softmax sees them."""
    from megatron.core import parallel_state

    if part.post_process and not part.pre_process:
        weight = part.output_layer.weight
        first = parallel_state.get_tensor_model_parallel_rank() * weight.shape[0]
        weight[max(0, spec.vocab_size - first) :].fill_(0.5)


def one_rank_halved(part: Any, _spec: ModelSpec, context: RankContext) -> None:  # noqa: ANN401 - as above
    """The last rank computes with other weights than it was given."""
    if context.rank == context.layout.world_size - 1:
        for parameter in list(part.parameters())[:1]:
            parameter.mul_(0.5)


def one_element(part: Any, _spec: ModelSpec, context: RankContext) -> None:  # noqa: ANN401 - as above
    """A cosmic ray: one weight of rank 0 has another sign."""
    if context.rank == 0:
        for parameter in list(part.parameters())[:1]:
            parameter.view(-1)[parameter.numel() // 2] += 1.0


def other_tokens(healthy: Function) -> Function:
    """The last rank is fed the batch one token along."""

    def forward(parts: Any, spec: ModelSpec, layout: ParallelLayout, input_ids: Any,  # noqa: ANN401 - a tensor
                *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the function's own  # fmt: skip
        import torch

        if torch.distributed.get_rank() == layout.world_size - 1:
            input_ids = input_ids.roll(1, dims=-1)
        return healthy(parts, spec, layout, input_ids, *args, **kwargs)

    return forward


def other_positions(healthy: Function) -> Function:
    """The last rank rotates by positions that are twice as far apart."""

    def forward(parts: Any, spec: ModelSpec, layout: ParallelLayout, input_ids: Any,  # noqa: ANN401 - a tensor
                position_ids: Any = None, **kwargs: Any) -> Any:  # noqa: ANN401 - as above  # fmt: skip
        import torch

        if torch.distributed.get_rank() == layout.world_size - 1 and position_ids is not None:
            position_ids = position_ids * 2
        return healthy(parts, spec, layout, input_ids, position_ids, **kwargs)

    return forward


def older_request(healthy: Function) -> Function:
    """A rank that keeps the model of the case before, one norm apart."""

    def model(context: RankContext, request: Any) -> Any:  # noqa: ANN401 - model parts
        import torch

        found = healthy(context, request)
        if context.rank == 0 and not getattr(found[0], "stale", False):
            found[0].stale = True
            with torch.no_grad():
                # More than rounding takes back: half an ulp of bfloat16 is 1.004.
                factor = 1.001 if found[0].config.params_dtype == torch.float32 else 1.01
                for one in found[0].parameters():
                    if one.dim() == 1:
                        one.mul_(factor)
        return found

    return model


_parallel = partial(Fault, family="parallel")
_launch = partial(Fault, family="launch")
_MAPPINGS: Final = "megatron.core.tensor_parallel.mappings"

FAULTS: Final = (
    _parallel(name="tp-ranks-reversed", stands_for="TP shards dealt out in the wrong order",
              needs=("tp",),
              rank=Replaced("bridge.live_parameters", "_tp", ranks_reversed)),
    _parallel(name="fc2-shards-reversed", stands_for="row-parallel columns cut for another rank",
              needs=("tp",), applies=traits.has_swiglu,
              code=Replaced("bridge.parameters", "Parameter.shard_boxes",
                            partial(shards_reversed, "linear_fc2.weight"))),
    _parallel(name="embedding-shards-reversed", stands_for="vocabulary ranges of other ranks",
              needs=("tp",),
              code=Replaced("bridge.parameters", "Parameter.shard_boxes",
                            partial(shards_reversed, "embeddings.weight"))),
    _parallel(name="linear-shards-reversed", stands_for="a linear replacement cut for another rank",
              needs=("tp",), applies=traits.has_linear,
              code=Replaced("bridge.parameters", "Parameter.shard_boxes",
                            partial(shards_reversed, ("mlp.weight", "self_attention.weight")))),
    _parallel(name="all-reduce-missing", stands_for="partial sums of row-parallel layers kept",
              needs=("tp",),
              rank=Replaced(_MAPPINGS, "_ReduceFromModelParallelRegion.forward", not_summed)),
    _parallel(name="backward-all-reduce-missing",
              stands_for="input gradients of column-parallel layers not summed over TP",
              needs=("tp",), applies=traits.has_swiglu,
              rank=Replaced("megatron.core.tensor_parallel.layers",
                            "LinearWithGradAccumulationAndAsyncCommunication.backward",
                            gradient_not_summed)),
    _parallel(name="tied-gradients-not-summed",
              stands_for="an all-reduce left out between the two copies of a tied embedding",
              needs=("pp",), applies=traits.is_tied,
              rank=Replaced("bridge.backward", "_sum_tied_copies", tied_apart)),
    _parallel(name="sequence-parallel-norm-gradients",
              stands_for="norm gradients not summed over ranks that share a sequence",
              needs=("sp",), applies=traits.has_no_linear,
              rank=AfterBuild(unmarked)),
    _parallel(name="logits-gathered-backwards", stands_for="vocabulary shards joined in rank order",
              needs=("tp",),
              rank=Replaced("megatron.core.tensor_parallel",
                            "gather_from_tensor_model_parallel_region", gathered_backwards)),
    _parallel(name="pipeline-rounds", stands_for="pipeline_dtype narrower than params_dtype",
              needs=("pp",),
              rank=Replaced("bridge.forward", "send", sent_rounded)),
    _parallel(name="pipeline-boundary-off-by-one", stands_for="layer offsets of later stages",
              needs=("pp",),
              rank=Replaced("bridge.live_parameters", "_checkpoint_name", other_layers)),
    _parallel(name="tied-copy-stale", stands_for="a tied output layer that was not kept equal",
              needs=("pp",), applies=traits.is_tied, rank=AfterLoad(stale_tie)),
    _parallel(name="last-stage-padding-filled",
              stands_for="padding rows of the output layer initialised like new tokens",
              needs=("pp",), applies=traits.has_padding, rank=AfterLoad(padding_filled)),
    _launch(name="rank-other-weights", stands_for="a rank that was started with other weights",
            rank=AfterLoad(one_rank_halved)),
    _launch(name="rank-one-element", stands_for="one weight of one rank changed in memory",
            rank=AfterLoad(one_element)),
    _launch(name="rank-other-tokens", stands_for="a rank that was sent other input ids",
            rank=Replaced("bridge.forward", "forward", other_tokens)),
    _launch(name="rank-other-positions", stands_for="a rank that was sent other position ids",
            applies=traits.has_attention,
            rank=Replaced("bridge.forward", "forward", other_positions)),
    _launch(name="rank-older-model", stands_for="a rank that still has the model of another case",
            rank=Replaced("harness.live", "model", older_request)),
)  # fmt: skip
