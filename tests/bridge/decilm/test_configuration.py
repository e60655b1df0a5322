"""The configuration keeps every field of its `config.json` and reads it through one parser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.decilm import DeciLMConfig, DeciLMForCausalLM
from bridge.errors import UnmappedFieldError, UnsupportedFieldError
from bridge.spec import GroupedQueryAttention, Linear, Llama3Scaling, NoOp, RopeSpec, SwiGLU

PUBLISHED = (
    "Llama-3_3-Nemotron-Super-49B-v1.json",
    "Llama-3_3-Nemotron-Super-49B-v1_5.json",
    "Llama-3_1-Nemotron-Ultra-253B-v1.json",
)
Fields = Callable[..., dict[str, Any]]


def _save(config: DeciLMConfig, directory: Path) -> dict[str, Any]:
    config.save_pretrained(directory)
    saved: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return saved


@pytest.mark.parametrize("name", PUBLISHED)
def test_saving_gives_back_every_field_of_a_published_configuration(
    name: str, variants: Path, tmp_path: Path
) -> None:
    """No field is added, dropped, renamed or given another value, nulls included."""
    source = json.loads((variants / name).read_text())
    config = DeciLMConfig.from_pretrained(variants / name)
    assert source == _save(config, tmp_path)
    assert source.items() <= config.to_dict().items()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 500000.0}},
        {"torch_dtype": None},
        {"id2label": {"0": "one", "1": "other"}, "output_attentions": False},
    ],
)
def test_saving_what_was_saved_changes_nothing(
    change: dict[str, object], config_fields: Fields, tmp_path: Path
) -> None:
    """Loading and saving again and again is the identity, odd and obsolete fields included."""
    source = config_fields([(2, 64)], **change)
    first = _save(DeciLMConfig(**source), tmp_path)
    assert first == source
    assert first == _save(DeciLMConfig.from_pretrained(tmp_path), tmp_path)
    assert DeciLMConfig(**source).spec.rope.rotary_base == 500000.0


def test_rope_parameters_stay_in_the_form_they_came_in(
    config_fields: Fields, tmp_path: Path
) -> None:
    """A file in the keys of transformers 5 is not rewritten into those of 4."""
    source = config_fields([(2, 64)])
    rope = {**source.pop("rope_scaling"), "rope_theta": source.pop("rope_theta")}
    source["rope_parameters"] = rope
    source["dtype"] = source.pop("torch_dtype")
    config = DeciLMConfig(**source)
    assert source == _save(config, tmp_path)
    assert config.rope_theta == 500000.0
    assert config.spec.rope.scaling is not None


def test_a_changed_attribute_is_saved_under_the_key_of_the_source(
    config_fields: Fields, tmp_path: Path
) -> None:
    """What somebody changes on purpose does arrive, and nothing else moves."""
    source = config_fields([(2, 64)])
    config = DeciLMConfig(**source)
    config.rope_theta = 10000.0
    config.use_cache = False
    config.pad_token_id = 7
    config.block_configs[0]["ffn"]["intermediate_size"] = 128
    changed = _save(config, tmp_path)
    assert changed.pop("pad_token_id") == 7
    assert {key for key in source if source[key] != changed[key]} == {
        "rope_theta",
        "use_cache",
        "block_configs",
    }
    assert changed["rope_theta"] == 10000.0
    assert config.spec.rope.rotary_base == 10000.0
    assert config.spec.blocks[0].ffn == SwiGLU(ffn_hidden_size=128)


def test_scaling_taken_away_is_saved_as_null(config_fields: Fields, tmp_path: Path) -> None:
    """Plain RoPE is written as `rope_scaling: null` with its theta."""
    config = DeciLMConfig(**config_fields([(2, 64)]))
    config.rope_scaling = None
    saved = _save(config, tmp_path)
    assert saved["rope_scaling"] is None
    assert saved["rope_theta"] == 500000.0
    assert RopeSpec(rotary_base=500000.0) == DeciLMConfig(**saved).spec.rope


def test_the_dtype_asked_for_is_the_one_of_the_configuration(
    config_fields: Fields, tmp_path: Path
) -> None:
    """A dtype given on loading outranks the file's, and is saved under the file's key."""
    (tmp_path / "config.json").write_text(json.dumps(config_fields([(2, 64)])))
    config = DeciLMConfig.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert _save(config, tmp_path)["torch_dtype"] == "bfloat16"
    assert "dtype" not in _save(config, tmp_path)


def test_spec_reads_every_kind_of_block(config_fields: Fields) -> None:
    """No-ops, linears and unequal widths arrive in the specification, each in its block."""
    config = DeciLMConfig(**config_fields([(None, 64), ("linear", None), (3, "linear")]))
    spec = config.spec
    assert [NoOp(), Linear(), GroupedQueryAttention(num_query_groups=3)] == [
        block.attention for block in spec.blocks
    ]
    assert [SwiGLU(ffn_hidden_size=64), NoOp(), Linear()] == [block.ffn for block in spec.blocks]
    assert spec.rope.scaling == Llama3Scaling(
        factor=16.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_a_model_that_cannot_be_honoured_is_refused_by_the_name_of_the_field(
    change: dict[str, object], named: str, config_fields: Fields
) -> None:
    """Building the model raises BR103 rather than computing something else."""
    config = DeciLMConfig(**config_fields([(2, 64)], **change))
    with pytest.raises(UnsupportedFieldError, match=named):
        DeciLMForCausalLM(config)


def test_a_sliding_window_in_one_block_is_refused(config_fields: Fields) -> None:
    """The block is named, too."""
    fields = config_fields([(2, 64), (2, 64)])
    fields["block_configs"][1]["attention"]["window_length"] = 512
    with pytest.raises(UnsupportedFieldError, match=r"block_configs\[1\].attention.window_length"):
        DeciLMForCausalLM(DeciLMConfig(**fields))


def test_an_unknown_field_passes_only_by_name(config_fields: Fields) -> None:
    """`carry_fields` lets a field through; without it the field is refused."""
    config = DeciLMConfig(**config_fields([(2, 64)], something_new=3))
    with pytest.raises(UnmappedFieldError, match="something_new"):
        _ = config.spec
    config.carry_fields(["something_new"])
    assert config.spec.num_layers == 1
