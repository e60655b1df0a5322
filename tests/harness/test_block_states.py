"""Blocks by their kinds, in words."""

from __future__ import annotations

import pytest

from harness.block_states import kind_of
from harness.oracle import Absent, Architecture, Attention, Mlp, Replaced, Rope

MODEL = Architecture(
    hidden_size=8,
    num_attention_heads=4,
    kv_channels=2,
    vocab_size=16,
    layernorm_epsilon=1e-5,
    tied=False,
    rope=Rope(base=10000.0, llama3=None),
    blocks=((Attention(2), Mlp(512)), (Attention(1), Replaced()), (Replaced(), Absent()),
            (Absent(), Mlp(24))),
)  # fmt: skip


@pytest.mark.parametrize(
    ("layer_idx", "expected"),
    [
        (-1, "embedding"),
        (0, "attention with 2 query groups + SwiGLU 512"),
        (1, "attention with 1 query group + linear"),
        (2, "linear + no-op"),
        (3, "no-op + SwiGLU 24"),
        (4, "final norm + output layer"),
    ],
)
def test_every_kind_of_block_has_its_words(layer_idx: int, expected: str) -> None:
    """The first of the two parts, then the second."""
    assert kind_of(MODEL, layer_idx) == expected
