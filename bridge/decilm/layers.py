"""The parts of a DeciLM block, in the arithmetic of the published model.

The order of operations is transformers' Llama's, which the published code was derived from; a
reordering that is equal in exact arithmetic would still move the last bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bridge.decilm.configuration import DeciLMConfig
from bridge.decilm.rotary import rotate
from bridge.spec import BlockSpec, GroupedQueryAttention, Linear, ModelSpec, NoOp, SwiGLU

# Without it, a static cache of those versions silently writes every step to its first slot.
_CACHE_TAKES_POSITION: Final = "cache_kwargs" in inspect.signature(Cache.update).parameters


class DeciLMRMSNorm(nn.Module):
    """Normalise in float32, cast down, then multiply by the weight."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size) to the same shape and dtype."""
        wide = hidden_states.to(torch.float32)
        variance = wide.pow(2).mean(-1, keepdim=True)
        normed = wide * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * normed.to(hidden_states.dtype)


def _repeat_heads(states: Tensor, times: int) -> Tensor:
    """(batch, groups, length, channels) to (batch, groups * times, length, channels)."""
    return states if times == 1 else states.repeat_interleave(times, dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Attention written out, with the softmax in float32; transformers' attention interface.

    Args:
        module: The attention module.
        query: (batch, heads, length, channels).
        key: (batch, groups, kv_length, channels).
        value: Same shape as `key`.
        attention_mask: Added to the scores; broadcast to (batch, heads, length, kv_length).
        scaling: Factor of the scores.
        dropout: Probability with which a weight is dropped in training.

    Returns:
        (batch, length, heads, channels), and the weights (batch, heads, length, kv_length).
    """
    times = query.shape[1] // key.shape[1]
    key, value = _repeat_heads(key, times), _repeat_heads(value, times)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class DeciLMAttention(nn.Module):
    """Causal attention with this block's own number of key and value heads.

    `layer_idx` counts blocks. `cache_layer_idx` counts only blocks with attention: caches ask
    their layer 0 how long the past is, so layer 0 has to be one that is filled.
    """

    def __init__(
        self,
        config: DeciLMConfig,
        spec: ModelSpec,
        attention: GroupedQueryAttention,
        *,
        layer_idx: int,
        cache_layer_idx: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.cache_layer_idx = cache_layer_idx
        self.head_dim = spec.kv_channels
        self.num_key_value_groups = spec.num_attention_heads // attention.num_query_groups
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        rows, kv_rows = (
            heads * self.head_dim
            for heads in (spec.num_attention_heads, attention.num_query_groups)
        )
        self.q_proj = nn.Linear(spec.hidden_size, rows, bias=False)
        self.k_proj = nn.Linear(spec.hidden_size, kv_rows, bias=False)
        self.v_proj = nn.Linear(spec.hidden_size, kv_rows, bias=False)
        self.o_proj = nn.Linear(rows, spec.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        cache_position: Tensor,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, length, hidden_size) to the same, and the weights where they are to be had."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        query, key = (rotate(states, *position_embeddings) for states in (query, key))
        if past_key_values is not None:
            extra = ({"cache_position": cache_position},) if _CACHE_TAKES_POSITION else ()
            key, value = past_key_values.update(key, value, self.cache_layer_idx, *extra)

        implementation = self.config._attn_implementation  # noqa: SLF001  # no public name exists
        attend: Callable[..., tuple[Tensor, Tensor | None]] = (
            eager_attention_forward
            if implementation in (None, "eager")
            else ALL_ATTENTION_FUNCTIONS[implementation]
        )
        attended, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        attended = attended.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self.o_proj(attended), weights


class DeciLMLinearAttention(nn.Module):
    """An attention replaced by one matrix."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        """(batch, length, hidden_size) to the same; there are no attention weights."""
        return self.linear_attn(hidden_states), None


class DeciLMGatedMLP(nn.Module):
    """SwiGLU of this block's own width."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(ffn_hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch, length, hidden_size) to the same."""
        gate = functional.silu(self.gate_proj(hidden_states))
        down: Tensor = self.down_proj(gate * self.up_proj(hidden_states))
        return down


class DeciLMLinearMLP(nn.Module):
    """A feed-forward replaced by one matrix."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch, length, hidden_size) to the same."""
        out: Tensor = self.linear_mlp(hidden_states)
        return out


class DeciLMDecoderLayer(nn.Module):
    """One block. A no-op sub-block is None, and so is its norm."""

    def __init__(
        self,
        config: DeciLMConfig,
        spec: ModelSpec,
        block: BlockSpec,
        *,
        layer_idx: int,
        cache_layer_idx: int,
    ) -> None:
        super().__init__()
        size, eps = spec.hidden_size, spec.layernorm_epsilon
        self.self_attn: nn.Module | None
        match block.attention:
            case GroupedQueryAttention() as attention:
                self.self_attn = DeciLMAttention(
                    config, spec, attention, layer_idx=layer_idx, cache_layer_idx=cache_layer_idx
                )
            case Linear():
                self.self_attn = DeciLMLinearAttention(size)
            case NoOp():
                self.self_attn = None
        self.mlp: nn.Module | None
        match block.ffn:
            case SwiGLU(ffn_hidden_size=width):
                self.mlp = DeciLMGatedMLP(size, width)
            case Linear():
                self.mlp = DeciLMLinearMLP(size)
            case NoOp():
                self.mlp = None
        self.input_layernorm = None if self.self_attn is None else DeciLMRMSNorm(size, eps)
        self.post_attention_layernorm = None if self.mlp is None else DeciLMRMSNorm(size, eps)

    def forward(self, hidden_states: Tensor, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """(batch, length, hidden_size) to the same, and the attention weights if any."""
        weights = None
        if self.self_attn is not None and self.input_layernorm is not None:
            change, weights = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + change
        if self.mlp is not None and self.post_attention_layernorm is not None:
            change = self.mlp(self.post_attention_layernorm(hidden_states))
            hidden_states = hidden_states + change
        return hidden_states, weights
