"""Rotary frequencies: bit-equal to transformers' own, and out of reach of loaders and casts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from bridge.decilm import DeciLMForCausalLM
from bridge.decilm.rotary import DeciLMRotaryEmbedding
from bridge.rotary import inv_freq
from bridge.spec import Llama3Scaling, RopeSpec


def _rope(factor: float | None) -> RopeSpec:
    if factor is None:
        return RopeSpec(rotary_base=10000.0)
    scaling = Llama3Scaling(
        factor=factor,
        low_freq_factor=1.5,
        high_freq_factor=3.0,
        original_max_position_embeddings=4096,
    )
    return RopeSpec(rotary_base=500000.0, scaling=scaling)


def _of_transformers(rope: RopeSpec, head_dim: int) -> LlamaRotaryEmbedding:
    scaling = None
    if rope.scaling is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": rope.scaling.factor,
            "low_freq_factor": rope.scaling.low_freq_factor,
            "high_freq_factor": rope.scaling.high_freq_factor,
            "original_max_position_embeddings": rope.scaling.original_max_position_embeddings,
        }
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_theta=rope.rotary_base,
        rope_scaling=scaling,
    )
    return LlamaRotaryEmbedding(config=config)


@pytest.mark.parametrize("factor", [None, 8.0, 16.0])
@pytest.mark.parametrize("head_dim", [8, 32, 128])
def test_frequencies_equal_those_of_transformers_bit_for_bit(
    factor: float | None, head_dim: int
) -> None:
    """Scaled with values other than the usual 1, 4 and 8192, and plain."""
    rope = _rope(factor)
    expected = _of_transformers(rope, head_dim).inv_freq
    assert torch.equal(expected, inv_freq(rope, head_dim))


def test_cosines_at_the_far_end_equal_those_of_transformers() -> None:
    """Positions up to 131,071, in float32 and cast to bfloat16."""
    positions = torch.tensor([[0, 1, 8191, 8192, 65537, 131071]])
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.zeros(1, 6, 1, dtype=dtype)
        expected = _of_transformers(_rope(16.0), 128)(hidden, positions)
        found = DeciLMRotaryEmbedding(_rope(16.0), 128)(hidden, positions)
        for want, have in zip(expected, found, strict=True):
            assert have.dtype == dtype
            assert torch.equal(want, have)


def _expected(model: DeciLMForCausalLM) -> Tensor:
    rope = model.config.spec.rope
    fresh: Tensor = _of_transformers(rope, model.config.spec.kv_channels).inv_freq
    return fresh


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frequencies_survive_from_pretrained(
    dtype: torch.dtype, write_checkpoint: Callable[..., Path]
) -> None:
    """Loading goes through the meta device; the frequencies are still those of the config."""
    directory = write_checkpoint([(2, 64), (None, 32)])
    with warnings.catch_warnings():  # transformers 4.56 on calls the argument dtype
        warnings.simplefilter("ignore", FutureWarning)
        model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=dtype)
    assert model.dtype == dtype
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(_expected(model), model.model.rotary_emb.inv_freq)


def test_frequencies_survive_a_cast_of_the_whole_model(
    build: Callable[..., DeciLMForCausalLM],
) -> None:
    """`.to(bfloat16)`, `.half()` and `.double()` leave them float32, bit for bit."""
    model = build([(2, 64)])
    expected = _expected(model)
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        model.to(cast)
        assert torch.equal(expected, model.model.rotary_emb.inv_freq)
        assert model(torch.tensor([[1, 2, 3]])).logits.dtype == cast
        assert torch.equal(expected, model.model.rotary_emb.inv_freq)


def test_frequencies_are_real_in_a_model_built_on_the_meta_device(
    build: Callable[..., DeciLMForCausalLM],
) -> None:
    """Shapes can be computed there, and do not cost the frequencies their values."""
    config = build([(2, 64)]).config
    with torch.device("meta"):
        model = DeciLMForCausalLM(config)
        assert model(torch.zeros(1, 4, dtype=torch.long)).logits.is_meta
    assert torch.equal(_expected(model), model.model.rotary_emb.inv_freq)
