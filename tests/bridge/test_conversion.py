"""The padding of a vocabulary, read back in bands: exact counts whatever the band."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bridge import reading
from bridge.padding import nonzero_padding
from bridge.plan import Plan
from bridge.spec import BlockSpec, GroupedQueryAttention, ModelSpec, RopeSpec, SwiGLU
from bridge.transfer import TransferLimits

MakeSource = Callable[..., Any]
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
HIDDEN, VOCAB, PADDED = 6, 7, 47
SPEC = ModelSpec(
    hidden_size=HIDDEN,
    num_attention_heads=2,
    kv_channels=4,
    vocab_size=VOCAB,
    max_position_embeddings=64,
    layernorm_epsilon=1e-5,
    rope=RopeSpec(rotary_base=10000.0),
    share_embeddings_and_output_weights=False,
    params_dtype="bfloat16",
    blocks=(
        BlockSpec(
            attention=GroupedQueryAttention(num_query_groups=1), ffn=SwiGLU(ffn_hidden_size=5)
        ),
    ),
    heterogeneous_block_specs=False,
)


@pytest.mark.parametrize("band_nbytes", [2, 4, 10, 12, 30, 60, 1 << 16])
def test_rows_are_counted_once_whatever_the_band(
    array_source: MakeSource, monkeypatch: pytest.MonkeyPatch, band_nbytes: int
) -> None:
    """A row of 12 bytes comes in up to six bands, and a band holds up to all rows."""
    monkeypatch.setattr(reading, "_MIN_BAND", band_nbytes)
    arrays = {name: np.zeros((PADDED, HIDDEN), np.uint16) for name in (EMBEDDING, OUTPUT)}
    arrays[EMBEDDING][:VOCAB] = 1  # the vocabulary itself is none of its business
    arrays[EMBEDDING][9] = 1
    arrays[EMBEDDING][10, [0, 5]] = 1
    arrays[EMBEDDING][46, 5] = 1
    source = array_source(arrays, dict.fromkeys(arrays, "bfloat16"))
    limits = TransferLimits(memory_budget=1, threads=1)
    found = nonzero_padding(Plan(SPEC, PADDED), source, [EMBEDDING, OUTPUT], limits=limits)
    assert found == [f"{EMBEDDING}: 3 padding rows, 9 the first"]
    assert {name for name, _ in source.reads} == {EMBEDDING, OUTPUT}
    assert all(2 * box.volume <= band_nbytes for _, box in source.reads)


def test_padding_of_any_size_takes_one_small_buffer(array_source: MakeSource) -> None:
    """As a huge --make-vocab-size-divisible-by makes it."""
    padded = 1_000_000
    array = np.zeros((padded, HIDDEN), np.uint16)
    array[-2:] = 1
    source = array_source({EMBEDDING: array}, {EMBEDDING: "bfloat16"})
    limits = TransferLimits(memory_budget=1 << 20, threads=1)
    plan = Plan(SPEC, padded)
    tracemalloc.start()
    try:
        found = nonzero_padding(plan, source, [EMBEDDING], limits=limits)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [f"{EMBEDDING}: 2 padding rows, 999998 the first"]
    assert peak < 1 << 20 < array.nbytes
