"""What surrounds a model part for Megatron's schedules, optimizers and mixed precision."""

from __future__ import annotations

from typing import Any

import torch


def prepare_part(part: Any) -> Any:
    """Give a bare part what Megatron's training loops expect of it, in training mode.

    A part without a mask makes the causal one itself: Transformer Engine needs none, local layers
    would ask a GPU for it, which need not be there.
    """
    from megatron.core import tensor_parallel
    from megatron.core.enums import ModelType
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    part.model_type = ModelType.encoder_or_decoder
    for parameter in part.parameters():
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    if any(isinstance(module, DotProductAttention) for module in part.modules()):
        part.register_forward_pre_hook(_with_causal_mask, with_kwargs=True)
    return part.train()


def _with_causal_mask(
    part: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Fill in `attention_mask`, True where attention must not look: (1, 1, seq, seq)."""
    given = args[2] if len(args) > 2 else kwargs.get("attention_mask")
    if given is not None or kwargs.get("inference_context") is not None:
        return None
    input_ids = args[0] if args else kwargs.get("input_ids")
    if input_ids is not None:
        length = input_ids.shape[1]
    else:  # a later stage: (seq, batch, hidden_size), a share of it under sequence parallelism
        shares = part.config.tensor_model_parallel_size if part.config.sequence_parallel else 1
        length = part.decoder.input_tensor.shape[0] * shares
    device = next(part.parameters()).device if input_ids is None else input_ids.device
    mask = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)[None, None]
    if len(args) > 2:
        return (*args[:2], mask, *args[3:]), kwargs
    return args, {**kwargs, "attention_mask": mask}


def wrap(
    parts: list[Any],
    *,
    half: Any,
    is_default: bool,
    ddp_config: Any,
    overlap_param_gather: bool,
    broadcast: bool,
) -> list[Any]:
    """Wrap parts for half precision, then for data parallelism.

    Args:
        parts: Bare.
        half: Called with configuration and part where the model is float16 or bfloat16; None
            leaves it away.
        is_default: Whether that is Megatron's `Float16Module`, whatever `half` is.
        ddp_config: Of Megatron's `DistributedDataParallel`; None leaves it away.
        overlap_param_gather: Whether parameters are gathered while the optimizer steps.
        broadcast: Give all replicas the first one's weights.
    """
    from megatron.core.transformer.module import Float16Module

    config = parts[0].config
    wrapper = Float16Module if is_default else half
    if wrapper is not None and (config.fp16 or config.bf16):
        parts = [wrapper(config, part) for part in parts]
    if ddp_config is None:
        return parts
    from megatron.core.distributed import DistributedDataParallel

    parts = [
        DistributedDataParallel(
            config=config,
            ddp_config=ddp_config,
            module=part,
            # Only the first part's gradients become ready while others are still computed.
            disable_bucketing=index > 0 or overlap_param_gather,
        )
        for index, part in enumerate(parts)
    ]
    if broadcast:
        for part in parts:
            part.broadcast_params()
    return parts
