"""Rotary position embedding, with frequencies that no loader can lose and no cast can round.

transformers keeps `inv_freq` in a buffer that is not saved. Loading through the meta device leaves
such a buffer uninitialised in some versions, and `model.to(torch.bfloat16)` rounds it: one unit in
the last place of a frequency is 0.008 rad at position 131,071. Here it is a plain float32 tensor,
computed on the CPU from the configuration alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bridge.spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, kv_channels: int) -> Tensor:
    """The rotary frequencies of half a head, (kv_channels / 2,), float32, on the CPU.

    With llama3 scaling, wavelengths above original / low_freq_factor are slowed by the factor,
    those below original / high_freq_factor are kept, and the band between is interpolated in
    original / wavelength. The order of operations is that of transformers 5.23
    `modeling_rope_utils._compute_llama3_parameters`, because the last bit counts.
    """
    steps = torch.arange(0, kv_channels, 2, dtype=torch.int64, device="cpu").to(torch.float32)
    plain = 1.0 / (rope.rotary_base ** (steps / kv_channels))
    if rope.scaling is None:
        return plain
    scaling = rope.scaling
    original = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / plain
    share = (original / wavelength - low) / (high - low)
    between = (1 - share) * plain / scaling.factor + share * plain
    slowed_or_kept = torch.where(wavelength > original / low, plain / scaling.factor, plain)
    outside = (wavelength < original / high) | (wavelength > original / low)
    return torch.where(outside, slowed_or_kept, between)


class DeciLMRotaryEmbedding(nn.Module):
    """Cosines and sines of position times frequency, in float32, cast to the activations' dtype.

    Attributes:
        inv_freq: (kv_channels / 2,), float32. Neither a parameter nor a buffer, so that loaders
            and `.to(dtype)` leave it alone; it follows the activations' device by itself.
    """

    def __init__(self, rope: RopeSpec, kv_channels: int) -> None:
        super().__init__()
        self.inv_freq = inverse_frequencies(rope, kv_channels)

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each (batch, length, kv_channels), for `position_ids` (batch, length).

        `hidden_states` gives the dtype and the device.
        """
        inv_freq = self.inv_freq.to(device=hidden_states.device, dtype=torch.float32)
        if not inv_freq.is_meta:
            self.inv_freq = inv_freq
        angles = position_ids[..., None].float() * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + kv_channels / 2) of every head.

    Args:
        states: (batch, heads, length, kv_channels).
        cos: (batch, length, kv_channels).
        sin: Same shape as `cos`.
    """
    first, second = states.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (states * cos.unsqueeze(1)) + (turned * sin.unsqueeze(1))
