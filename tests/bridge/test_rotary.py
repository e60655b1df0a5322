"""Rotary frequencies and positions are those the model was trained with."""

from __future__ import annotations

import itertools

import pytest
import torch

from bridge.errors import InconsistentConfigError
from bridge.rotary import PositionedRotaryEmbedding, inv_freq
from bridge.spec import Llama3Scaling, RopeSpec

LLAMA3 = [
    Llama3Scaling(
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )
    for factor, (low, high), original in itertools.product(
        (8.0, 16.0, 32.0), ((1.0, 4.0), (2.0, 16.0)), (2048, 8192)
    )
]


@pytest.mark.parametrize("kv_channels", [6, 16, 32, 128])
@pytest.mark.parametrize("scaling", [None, *LLAMA3])
def test_frequencies_are_bit_equal_to_transformers(
    scaling: Llama3Scaling | None, kv_channels: int
) -> None:
    """Not close: one ulp of `inv_freq` is 0.008 rad at position 131,071."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "default", "rope_theta": 500000.0}
    if scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    config = LlamaConfig(
        hidden_size=4 * kv_channels,
        num_attention_heads=4,
        head_dim=kv_channels,
        rope_parameters=rope,
        max_position_embeddings=131072,
    )
    if scaling is None:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        theirs = LlamaRotaryEmbedding(config).inv_freq
    else:
        theirs = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")[0]
    ours = inv_freq(RopeSpec(rotary_base=500000.0, scaling=scaling), kv_channels)
    assert ours.dtype == theirs.dtype == torch.float32
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize("factor", [8.0, 16.0])
def test_frequencies_are_bit_equal_to_megatron(factor: float) -> None:
    """With the values Megatron has built in, which are the family's."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    theirs = RotaryEmbedding(
        kv_channels=128,
        rotary_percent=1.0,
        rotary_base=500000,
        rope_scaling=True,
        rope_scaling_factor=factor,
        use_cpu_initialization=True,
    ).inv_freq
    scaling = Llama3Scaling(
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    assert torch.equal(theirs, inv_freq(RopeSpec(rotary_base=500000.0, scaling=scaling), 128))


class _Replaced(torch.nn.Module):
    """Stands for Megatron's module."""

    def get_rotary_seq_len(self, context: object, length: int) -> int:
        assert context is None
        return length


def embedding() -> PositionedRotaryEmbedding:
    """One with frequencies 1 and 0.5."""
    return PositionedRotaryEmbedding(_Replaced(), torch.tensor([1.0, 0.5]))


def test_without_positions_it_counts_from_zero() -> None:
    """0..S-1, or from an offset: (S, 1, 1, kv_channels), both halves the same."""
    expected = torch.tensor([[0, 0, 0, 0], [1, 0.5, 1, 0.5], [2, 1, 2, 1]])
    assert torch.equal(expected[:, None, None], embedding()(3))
    assert torch.equal(expected[1:, None, None], embedding()(2, 1))
    assert embedding().get_rotary_seq_len(None, 5) == 5


def test_positions_given_are_the_ones_rotated_by() -> None:
    """One per token, or one per token and row of the batch."""
    module = embedding()
    module.position_ids = torch.tensor([5, 131071])
    assert torch.equal(torch.tensor([5.0, 131071.0]), module(2)[:, 0, 0, 0])
    module.position_ids = torch.tensor([[5, 6], [8, 9]])
    assert torch.equal(torch.tensor([[5.0, 8.0], [6.0, 9.0]]), module(2)[:, :, 0, 0])
    cos, sin = module.get_cos_sin(2)
    assert torch.equal(torch.tensor([[5.0, 8.0], [6.0, 9.0]]).cos(), cos[..., 0])
    assert torch.equal(torch.tensor([[2.5, 4.0], [3.0, 4.5]]).sin(), sin[..., 1])


def test_a_wrong_number_of_positions_is_refused() -> None:
    """Never cut, never repeated."""
    module = embedding()
    module.position_ids = torch.tensor([5, 6, 7])
    with pytest.raises(InconsistentConfigError, match="for 2 tokens"):
        module(2)


def test_casting_the_model_leaves_the_frequencies_alone() -> None:
    """`.bfloat16()` and `.double()` must not touch them."""
    module = embedding().bfloat16().double()
    assert module.inv_freq.dtype == torch.float32
    assert not list(module.parameters())
    assert not module.state_dict()
