"""The oracle's rotary angles: bit-equal with transformers, float32 by definition."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from harness import oracle
from harness.toys import TOYS

Config = dict[str, Any]


@pytest.mark.parametrize("head_dim", [8, 10, 12, 16, 20, 24, 32, 64, 80, 128, 256])
@pytest.mark.parametrize(
    "llama3",
    [
        None,
        (8.0, 1.0, 4.0, 8192),
        (16.0, 1.0, 4.0, 8192),
        (7.3, 1.7, 3.9, 5003),
        (32.0, 2.0, 5.0, 4096),
    ],
)
def test_inv_freq_is_bit_equal_with_transformers(
    head_dim: int, llama3: tuple[float, float, float, int] | None
) -> None:
    """The family's frequencies, and others, equal transformers' to the last bit."""
    config: Config = {
        "hidden_size": 2 * head_dim,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 4,
        "vocab_size": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }
    if llama3:
        keys = ("factor", "low_freq_factor", "high_freq_factor")
        config["rope_scaling"] = dict(zip(keys, llama3[:3], strict=True)) | {
            "rope_type": "llama3",
            "original_max_position_embeddings": llama3[3],
        }
    expected = LlamaRotaryEmbedding(LlamaConfig(**copy.deepcopy(config))).inv_freq.numpy()
    found = oracle.inverse_frequencies(oracle.read_config(config))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(expected.view(np.uint32), found.view(np.uint32))


def test_angles_are_float32_products_and_their_cosine_is_not() -> None:
    """At position 131,071 the angle is the float32 product; it is then held in float64."""
    model = oracle.read_config(TOYS["nano-8b"].config)
    frequencies = oracle.inverse_frequencies(model)
    angles = oracle.rotary_angles(model, np.array([131071]))
    expected = [float(np.float32(131071) * f) for f in frequencies]
    exact = [131071 * float(f) for f in frequencies]
    assert angles.dtype == np.float64
    assert angles.tolist() == [expected]
    assert expected != exact


def test_rotate_turns_halves_against_each_other() -> None:
    """Channel i pairs with channel i + half, anticlockwise: (1, 0) by 90 degrees is (0, 1)."""
    x = np.array([1.0, 2.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    turned = oracle.rotate(x, np.array([math.pi / 2, math.pi]).reshape(1, 1, 1, 2))
    np.testing.assert_allclose(turned.ravel(), [0.0, -2.0, 1.0, 0.0], atol=1e-15)


def test_powers_that_are_given_count_and_none_changes_nothing() -> None:
    """The frequencies follow the powers, one by one; equal powers give equal frequencies."""
    config = TOYS["nano-4b"].config
    model = oracle.read_config(config)
    plain = oracle.inverse_frequencies(model)
    exponents = np.arange(0, model.kv_channels, 2) / np.float32(model.kv_channels)
    powers = (np.float64(model.rope.base) ** exponents.astype(np.float64)).astype(np.float32)
    same = oracle.read_config(config | {oracle.POWERS: tuple(powers.tolist())})
    assert plain.tolist() == oracle.inverse_frequencies(same).tolist()
    powers[0] = np.nextafter(powers[0], np.float32(2))
    moved = oracle.read_config(config | {oracle.POWERS: tuple(powers.tolist())})
    different = plain != oracle.inverse_frequencies(moved)
    assert different.tolist() == [True] + [False] * (len(plain) - 1)
