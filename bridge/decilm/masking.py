"""The causal mask, by transformers' own helper where it has one (from 4.53 on)."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from bridge.decilm.configuration import DeciLMConfig

try:
    from transformers.masking_utils import create_causal_mask
except ImportError:  # transformers before 4.53
    create_causal_mask = None
    _PARAMETERS: frozenset[str] = frozenset()
else:
    _PARAMETERS = frozenset(inspect.signature(create_causal_mask).parameters)


def causal_mask(
    config: DeciLMConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    *,
    cache_position: Tensor,
    past_key_values: Cache | None,
    position_ids: Tensor,
) -> object:
    """The mask in the form that the configured attention function takes.

    Args:
        config: Says which attention function that is.
        inputs_embeds: (batch, length, hidden_size).
        attention_mask: (batch, past + length), 0 at padding; None without padding.
        cache_position: (length,), the index of every position in the cache.
        past_key_values: The cache.
        position_ids: (batch, length), each position as RoPE counts it.

    Returns:
        What `create_causal_mask` makes; before transformers 4.53 a mask to be added, of shape
        (batch, 1, length, kv_length), or for flash attention the padding mask itself.
    """
    if create_causal_mask is None:
        return _added_mask(config, inputs_embeds, attention_mask, cache_position, past_key_values)
    arguments = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "input_embeds": inputs_embeds,  # its name before 5.1
        "attention_mask": attention_mask,
        "cache_position": cache_position,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
    }
    mask: object = create_causal_mask(
        **{name: value for name, value in arguments.items() if name in _PARAMETERS}
    )
    return mask


def _added_mask(
    config: DeciLMConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    cache_position: Tensor,
    past_key_values: Cache | None,
) -> Tensor | None:
    implementation = config._attn_implementation  # noqa: SLF001  # no public name exists
    if implementation == "flash_attention_2":
        padded = attention_mask is not None and bool((attention_mask == 0).any())
        return attention_mask if padded else None
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    batch, length = inputs_embeds.shape[:2]
    kv_length = length
    if past_key_values is not None:
        capacity = past_key_values.get_max_cache_shape()
        kv_length = past_key_values.get_seq_length() + length if capacity is None else int(capacity)
    slots = torch.arange(kv_length, device=inputs_embeds.device)
    hidden = (slots > cache_position[:, None]).expand(batch, 1, -1, -1)
    if attention_mask is not None:
        unseen = torch.ones_like(slots, dtype=torch.bool).repeat(batch, 1)
        width = min(kv_length, attention_mask.shape[1])
        unseen[:, :width] = attention_mask[:, :width] == 0
        hidden = hidden | unseen[:, None, None, :]
    lowest = torch.finfo(inputs_embeds.dtype).min
    return torch.zeros_like(hidden, dtype=inputs_embeds.dtype).masked_fill(hidden, lowest)
