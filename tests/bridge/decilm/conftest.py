"""Small DeciLM models whose weights are large enough for a mistake to show."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bridge.decilm import DeciLMConfig, DeciLMForCausalLM

Block = tuple[int | str | None, int | str | None]
"""(query groups, FFN width); "linear" is a replacement, None a no-op."""

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
HIDDEN, HEADS, VOCAB = 48, 6, 131


def block_config(block: Block) -> dict[str, Any]:
    """One entry of `block_configs` in the schema with head counts and widths."""
    groups, width = block
    return {
        "attention": {
            "no_op": groups is None,
            "replace_with_linear": groups == "linear",
            "num_key_value_heads": groups if isinstance(groups, int) else None,
        },
        "ffn": {
            "no_op": width is None,
            "replace_with_linear": width == "linear",
            "intermediate_size": width if isinstance(width, int) else None,
        },
    }


def config_fields(blocks: Sequence[Block], **changes: object) -> dict[str, Any]:
    """A `config.json` for these blocks, in the keys of transformers 4."""
    return {
        "architectures": ["DeciLMForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        },
        "block_configs": [block_config(block) for block in blocks],
        "bos_token_id": 128,
        "eos_token_id": [129, 130],
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": None,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "nemotron-nas",
        "num_attention_heads": HEADS,
        "num_hidden_layers": len(blocks),
        "num_key_value_heads": None,
        "rms_norm_eps": 1e-5,
        "rope_scaling": dict(LLAMA3_SCALING),
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.48.3",
        "use_cache": True,
        "vocab_size": VOCAB,
        **changes,
    }


def fill(model: nn.Module, *, seed: int = 0) -> None:
    """Give matrices a std of 1/sqrt(fan_in) and norms values around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * drawn if weight.dim() == 1 else drawn * weight.shape[-1] ** -0.5)


def build(
    blocks: Sequence[Block], *, attn_implementation: str = "eager", **changes: object
) -> DeciLMForCausalLM:
    """A filled model of these blocks, for inference."""
    fields = config_fields(blocks, **changes)
    del fields["model_type"]
    config = DeciLMConfig(**fields, attn_implementation=attn_implementation)
    model = DeciLMForCausalLM(config)
    fill(model)
    model.eval()
    return model


@pytest.fixture(name="build")
def build_fixture() -> Callable[..., DeciLMForCausalLM]:
    """`build(blocks, attn_implementation=..., **fields)`: a filled model."""
    return build


@pytest.fixture(name="config_fields")
def config_fields_fixture() -> Callable[..., dict[str, Any]]:
    """`config_fields(blocks, **fields)`: the dictionary of a `config.json`."""
    return config_fields


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`write_checkpoint(blocks, **fields)`: a checkpoint directory as it would be published."""

    def write(blocks: Sequence[Block], **changes: Any) -> Path:  # noqa: ANN401  # any JSON
        build(blocks, **changes).save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(config_fields(blocks, **changes)))
        return tmp_path

    return write


@pytest.fixture
def variants() -> Path:
    """Where the configurations of the published checkpoints are."""
    return Path(__file__).parents[3] / "suites" / "variants"
