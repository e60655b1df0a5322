"""Exports carry the names that their consumers read, and who cannot read one is named.

The tables below were copied from the consumers' own code, which is not needed to run this; each
says where it stands and in which version it was read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.consumers import consumer_notes, consumer_refusals
from bridge.conversion import ConversionOptions
from bridge.convert import export_checkpoint, import_checkpoint
from bridge.hf_config import spec_from_hf_config
from bridge.parameters import hf_tensors
from bridge.spec import ModelSpec
from harness.toys import TOYS, Toy, toy_named, write_checkpoint

# gguf 0.19.0, gguf/tensor_mapping.py: TensorNameMap.mappings_cfg and block_mappings_cfg, the lines
# marked llama-hf and deci. convert_hf_to_gguf.py drops ".weight" before it looks a name up.
GGUF = {
    "model.embed_tokens": "TOKEN_EMBD",
    "lm_head": "OUTPUT",
    "model.norm": "OUTPUT_NORM",
    "model.layers.{bid}.input_layernorm": "ATTN_NORM",
    "model.layers.{bid}.self_attn.q_proj": "ATTN_Q",
    "model.layers.{bid}.self_attn.k_proj": "ATTN_K",
    "model.layers.{bid}.self_attn.v_proj": "ATTN_V",
    "model.layers.{bid}.self_attn.o_proj": "ATTN_OUT",
    "model.layers.{bid}.self_attn.linear_attn": "ATTN_OUT",
    "model.layers.{bid}.post_attention_layernorm": "FFN_NORM",
    "model.layers.{bid}.mlp.gate_proj": "FFN_GATE",
    "model.layers.{bid}.mlp.up_proj": "FFN_UP",
    "model.layers.{bid}.mlp.down_proj": "FFN_DOWN",
}
# sglang 0.5.23, srt/models/nemotron_nas.py: what DeciLMDecoderLayer makes of a block that is no
# no-op, under the names of load_weights before its stacked_params_mapping. vLLM's file of the same
# name is the one it was adapted from.
SGLANG_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
SGLANG_FFN = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
# mlx-lm 0.32.2, models/nemotron-nas.py: the same, but LinearSubblockReplacement holds `linear`.
MLX_LINEAR = {"attention": ("self_attn.linear",), "ffn": ("mlp.linear",)}


def deci_names(config: dict[str, Any], *, linear: Mapping[str, tuple[str, ...]]) -> set[str]:
    """What a DeciLM of this configuration holds in a consumer, read as its loader reads it."""
    found = {"model.embed_tokens", "model.norm"}
    found |= set() if config.get("tie_word_embeddings") else {"lm_head"}
    blocks = config.get("block_configs") or [{"attention": {}, "ffn": {}}] * int(
        config["num_hidden_layers"]
    )
    halves = {
        "attention": ("input_layernorm", SGLANG_ATTENTION),
        "ffn": ("post_attention_layernorm", SGLANG_FFN),
    }
    for index, block in enumerate(blocks):
        for half, (norm, names) in halves.items():
            if block[half].get("no_op"):
                continue
            held = linear[half] if block[half].get("replace_with_linear") and linear else names
            found |= {f"model.layers.{index}.{name}" for name in (norm, *held)}
    return found


def names_of(spec: ModelSpec) -> set[str]:
    """What our exports hold, without `.weight`."""
    return {name.removesuffix(".weight") for name in hf_tensors(spec)}


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_whoever_is_not_warned_of_finds_every_name(toy: Toy) -> None:
    """By each consumer's own table: no tensor it does not look for, none it looks for in vain."""
    spec = spec_from_hf_config(toy.config)
    refused = consumer_refusals(spec, toy.config)
    names = names_of(spec)
    unmapped = {re.sub(r"(?<=layers\.)\d+", "{bid}", name) for name in names} - GGUF.keys()
    assert "llama.cpp" in refused or not unmapped
    by_sglang = deci_names(toy.config, linear={})
    assert ("vLLM" not in refused) == (names == by_sglang)
    assert "SGLang" in refused or names == by_sglang
    assert "mlx-lm" in refused or names == deci_names(toy.config, linear=MLX_LINEAR)


def refused(name: str, **changes: object) -> dict[str, list[str]]:
    """What is said of a toy whose first block's FFN is changed."""
    config = json.loads(json.dumps(toy_named(name).config))
    if changes:
        config["block_configs"][0]["ffn"] |= changes
    return consumer_refusals(spec_from_hf_config(config), config)


def test_each_obstacle_is_named_with_its_blocks() -> None:
    """Linear layers, an attention that would be lost, a schema, a number's form."""
    assert refused("nano-8b") == {}
    assert refused("super-49b-v1") == {}
    linear = refused("51b")
    assert linear["vLLM"] == [
        "no linear layer in place of attention (blocks 1,3,6)",
        "no linear layer in place of an FFN (blocks 2-3,7)",
    ]
    assert linear["llama.cpp"] == [
        "no linear layer in place of an FFN (blocks 2-3,7)",
        "it loses the attention of blocks without an FFN (blocks 5)",
    ]
    newer = refused("puzzle")
    for consumer in ("SGLang", "mlx-lm"):
        assert any("n_heads_in_group and ffn_mult" in reason for reason in newer[consumer])
    assert refused("super-49b-v1", ffn_mult=6) == {
        "llama.cpp": ["it wants the first ffn_mult written as 6.0, not 6"]
    }


def test_an_export_says_who_cannot_take_it(tmp_path: Path) -> None:
    """In its report, of the configuration that it wrote."""
    write_checkpoint(toy_named("51b"), tmp_path / "hf", dtype="bfloat16")
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    report = export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    config = toy_named("51b").config
    assert set(consumer_notes(spec_from_hf_config(config), config)) <= set(report.notes)
    assert any(note.startswith("vLLM cannot take this model") for note in report.notes)


@pytest.mark.parametrize("toy", ["nano-8b", "tied", "51b", "puzzle"])
def test_transformers_loads_an_export_in_another_dtype_and_in_one_file(
    toy: str, tmp_path: Path
) -> None:
    """Its own Llama, or our DeciLM: nothing missing, nothing left over, the dtype as stated."""
    from transformers import AutoModelForCausalLM

    import bridge.decilm  # noqa: F401 - registers DeciLM

    write_checkpoint(toy_named(toy), tmp_path / "hf", dtype="float32")
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    options = ConversionOptions(dtype="bfloat16")
    export_checkpoint(
        tmp_path / "megatron", tmp_path / "back", max_shard_size=1 << 60, options=options
    )
    models = {}
    for name in ("hf", "back"):
        models[name], info = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, dtype="auto", output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
    expected = {name: one.to(torch.bfloat16) for name, one in models["hf"].state_dict().items()}
    found = models["back"].state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert found["model.norm.weight"].dtype is torch.bfloat16
