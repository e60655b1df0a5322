"""Rotary position embedding, with frequencies that no loader can lose and no cast can round.

transformers keeps `inv_freq` in a buffer that is not saved. Loading through the meta device leaves
such a buffer uninitialised in some versions, and `model.to(torch.bfloat16)` rounds it: one unit in
the last place of a frequency is 0.008 rad at position 131,071. Here it is a plain float32 tensor,
computed on the CPU from the configuration alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bridge.rotary import inv_freq
from bridge.spec import RopeSpec


class DeciLMRotaryEmbedding(nn.Module):
    """Cosines and sines of position times frequency, in float32, cast to the activations' dtype.

    Attributes:
        inv_freq: (kv_channels / 2,), float32. Neither a parameter nor a buffer, so that loaders
            and `.to(dtype)` leave it alone; it follows the activations' device by itself.
    """

    def __init__(self, rope: RopeSpec, kv_channels: int) -> None:
        super().__init__()
        self.inv_freq = inv_freq(rope, kv_channels)

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each (batch, length, kv_channels), for `position_ids` (batch, length).

        `hidden_states` gives the dtype and the device.
        """
        frequencies = self.inv_freq.to(device=hidden_states.device, dtype=torch.float32)
        if not frequencies.is_meta:
            self.inv_freq = frequencies
        angles = position_ids[..., None].float() * frequencies
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
