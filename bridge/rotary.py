"""Rotary position embedding for a live Megatron model, at any position and with any llama3 values.

GPTModel takes only the factor of llama3 scaling and rotates by 0..S-1 whatever `position_ids` say.
Here the frequencies come from the model's own `RopeSpec` and the positions can be given. Angles are
float32 whatever the model computes in: that is how these models are defined.
"""

from __future__ import annotations

import math

import torch

from bridge.errors import InconsistentConfigError
from bridge.spec import RopeSpec


def inv_freq(rope: RopeSpec, kv_channels: int) -> torch.Tensor:
    """Compute the rotary frequencies of a model.

    Args:
        rope: Base and llama3 scaling, all four values of it.
        kv_channels: Size of a head.

    Returns:
        (kv_channels / 2,), float32, on the CPU. The operations and their order are those of
        transformers' `ROPE_INIT_FUNCTIONS` and megatron-core 0.16.1's `RotaryEmbedding`, so the
        result is bit-equal to both: one ulp here is 0.008 rad at position 131,071.
    """
    exponents = torch.arange(0, kv_channels, 2, dtype=torch.float32, device="cpu") / kv_channels
    plain = 1.0 / (rope.rotary_base**exponents)
    scaling = rope.scaling
    if scaling is None:
        return plain
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / plain
    # Long waves are slowed down by the factor, short ones kept, those between blended.
    is_long = wavelength > original / low
    is_between = ~(wavelength < original / high) & ~is_long
    slowed = torch.where(is_long, plain / scaling.factor, plain)
    share = (original / wavelength - low) / (high - low)
    blended = (1 - share) * slowed / scaling.factor + share * slowed
    return torch.where(is_between, blended, slowed)


class PositionedRotaryEmbedding(torch.nn.Module):
    """Stands in for the `rotary_pos_emb` that GPTModel has built.

    Set `position_ids`, (seq,) or (batch, seq), before a forward pass and every attention of that
    model part rotates by them; None restores 0..S-1. The frequencies are a plain attribute,
    neither parameter nor buffer, so casting a model to bfloat16 leaves them alone.

    Args:
        replaced: Megatron's own module, which still answers for sequence lengths.
        frequencies: (kv_channels / 2,), float32, from `inv_freq`, on the model's device.
    """

    def __init__(self, replaced: torch.nn.Module, frequencies: torch.Tensor) -> None:
        super().__init__()
        self.replaced = replaced
        self.inv_freq = frequencies
        self.position_ids: torch.Tensor | None = None

    def get_rotary_seq_len(self, *args: object, **kwargs: object) -> int:
        """Length of the whole sequence, over all ranks that share it."""
        answer = self.replaced.get_rotary_seq_len
        length: int = answer(*args, **kwargs)  # type: ignore[operator]  # torch types it a tensor
        return length

    def get_cos_sin(self, max_seq_len: int, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, (max_seq_len, [batch,] kv_channels / 2)."""
        angles = self._angles(max_seq_len, offset)
        return torch.cos(angles), torch.sin(angles)

    def forward(
        self,
        max_seq_len: int,
        offset: int = 0,
        packed_seq: bool = False,  # noqa: FBT001, FBT002 - GPTModel's own call
        cp_group: object = None,  # noqa: ARG002 - context parallelism is refused at initialize
    ) -> torch.Tensor:
        """Angles of each position, (max_seq_len, batch or 1, 1, kv_channels), halves repeated.

        Raises:
            InconsistentConfigError: BR104, packed sequences, or another number of positions.
        """
        if packed_seq:
            raise InconsistentConfigError("packed sequences are not supported")
        angles = self._angles(max_seq_len, offset)
        if angles.dim() == 2:
            angles = angles.unsqueeze(1)
        return torch.cat((angles, angles), dim=-1).unsqueeze(2)

    def _angles(self, max_seq_len: int, offset: int) -> torch.Tensor:
        positions = self.position_ids
        if positions is None:
            positions = torch.arange(offset, offset + max_seq_len, device=self.inv_freq.device)
        elif positions.shape[-1] != max_seq_len or positions.dim() > 2:
            raise InconsistentConfigError(
                f"position_ids of shape {tuple(positions.shape)} for {max_seq_len} tokens",
                where="position_ids",
                hint="give one position per token, (seq,) or (batch, seq)",
            )
        return positions.t().to(self.inv_freq).unsqueeze(-1) * self.inv_freq
