"""What the backward pass refuses before any rank is asked; tests of gradients need ranks."""

from __future__ import annotations

import pytest
import torch

from bridge.backward import loss_and_gradients
from bridge.errors import InconsistentConfigError
from bridge.spec import BlockSpec, ModelSpec, NoOp, ParallelLayout, RopeSpec

SPEC = ModelSpec(
    hidden_size=4,
    num_attention_heads=2,
    kv_channels=2,
    vocab_size=3,
    max_position_embeddings=64,
    layernorm_epsilon=1e-5,
    rope=RopeSpec(rotary_base=10000.0, scaling=None),
    share_embeddings_and_output_weights=False,
    params_dtype="float32",
    blocks=(BlockSpec(attention=NoOp(), ffn=NoOp()),),
    heterogeneous_block_specs=True,
)


def test_a_sequence_of_one_token_has_no_loss() -> None:
    """There is no next token: refused by name, not a loss of NaN."""
    layout = ParallelLayout(num_layers_per_stage=(1,))
    with pytest.raises(InconsistentConfigError, match="one token"):
        loss_and_gradients([], SPEC, layout, torch.zeros((2, 1), dtype=torch.int64))
