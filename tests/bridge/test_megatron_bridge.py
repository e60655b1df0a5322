"""An import holds what Megatron-Bridge's loader reads beside the weights.

The class names and fields below were copied from megatron-bridge 0.3.1, which is not needed here:
`models/gpt_provider.py`, `models/llama_nemotron/llama_nemotron_provider.py`, `training/state.py`.
"""

from __future__ import annotations

import importlib
import io
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bridge.convert import import_checkpoint, read_spec
from bridge.megatron_bridge import train_state
from harness.toys import toy_named, write_checkpoint

PROVIDERS = {
    "nano-8b": "megatron.bridge.models.gpt_provider.GPTModelProvider",
    "ultra-253b": "megatron.bridge.models.llama_nemotron.llama_nemotron_provider."
    "LlamaNemotronHeterogeneousProvider",
}
# Fields of GPTModelProvider itself; all others must be TransformerConfig's, which it extends.
PROVIDER_FIELDS: dict[str, tuple[type, ...]] = {
    "share_embeddings_and_output_weights": (bool,),
    "position_embedding_type": (str,),
    "rotary_base": (int, float),
    "rotary_percent": (float,),
    "rope_scaling": (bool,),
    "rope_scaling_factor": (float,),
    "seq_length": (int,),
    "vocab_size": (int,),
    "should_pad_vocab": (bool,),
}


def instantiated(value: Any) -> Any:  # noqa: ANN401 - anything YAML holds
    """What Megatron-Bridge's `instantiate_utils.instantiate` makes of an object by its name."""
    if not isinstance(value, dict):
        return value
    assert value["_call_"] is False
    module, _, name = value["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def model_section(toy: str, directory: Path) -> dict[str, Any]:
    """The `model` section of an import's run_config.yaml, its objects resolved."""
    write_checkpoint(toy_named(toy), directory / "hf", dtype="bfloat16")
    import_checkpoint(directory / "hf", directory / "megatron", tensor_model_parallel_size=2)
    path = directory / "megatron" / "iter_0000000" / "run_config.yaml"
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {
        name: value if name == "_target_" else instantiated(value)
        for name, value in loaded["model"].items()
    }


@pytest.mark.parametrize("toy", PROVIDERS)
def test_the_model_section_builds_the_models_own_transformer_config(
    toy: str, tmp_path: Path
) -> None:
    """Every field exists, and Megatron-Core makes of them what the bridge's own model has."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.heterogeneous.heterogeneous_config import (
        HeterogeneousTransformerConfig,
    )

    from bridge.megatron_config import transformer_config
    from bridge.pipeline import parse_layout

    section = model_section(toy, tmp_path)
    assert section.pop("_target_") == PROVIDERS[toy]
    own = {name: section.pop(name) for name in PROVIDER_FIELDS}
    section.pop("activation_func")  # compared below, by what it is
    spec = read_spec(tmp_path / "hf", carry=())
    kind = HeterogeneousTransformerConfig if spec.heterogeneous_block_specs else TransformerConfig
    assert section.keys() <= {field.name for field in fields(kind)}
    expected = transformer_config(spec, parse_layout("tp1-pp1", spec), params_dtype="bfloat16")
    built = kind(**section, activation_func=torch.nn.functional.silu)
    for name in section:
        if name != "autocast_dtype":
            assert getattr(expected, name) == getattr(built, name), name
    for name, types in PROVIDER_FIELDS.items():
        assert isinstance(own[name], types), name
    assert own["vocab_size"] == 768  # 517 and 525 rows, padded to a multiple of 128 x TP 2
    assert own["rope_scaling_factor"] == spec.rope.scaling.factor if spec.rope.scaling else 1.0
    assert own["rotary_base"] == spec.rope.rotary_base
    assert own["should_pad_vocab"] is False
    assert torch.bfloat16 is section["params_dtype"] is section["autocast_dtype"]


def test_a_model_that_it_would_run_with_another_rope_gets_no_run_config(tmp_path: Path) -> None:
    """Megatron-Core takes llama3's factor only; low_freq_factor 2 would be lost without a word."""
    write_checkpoint(toy_named("nano-8b"), tmp_path / "hf", dtype="bfloat16")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    config["rope_scaling"]["low_freq_factor"] = 2.0
    path.write_text(json.dumps(config))
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    assert not list((tmp_path / "megatron").rglob("run_config.yaml"))
    assert not list((tmp_path / "megatron").rglob("*train_state.pt"))


def test_the_train_state_is_the_one_of_a_run_that_has_not_begun(tmp_path: Path) -> None:
    """Names and dtypes of `TrainState.state_dict`, all zero; loadable without running code."""
    expected = {
        "step": torch.int32,
        "consumed_train_samples": torch.int32,
        "skipped_train_samples": torch.int32,
        "consumed_valid_samples": torch.int32,
        "floating_point_operations_so_far": torch.float64,
        "do_train": torch.bool,
        "do_valid": torch.bool,
        "do_test": torch.bool,
    }
    found = torch.load(io.BytesIO(train_state()), weights_only=True)
    assert expected == {name: value.dtype for name, value in found.items()}
    assert all(value.shape == () and value.item() == 0 for value in found.values())
    write_checkpoint(toy_named("nano-8b"), tmp_path / "hf", dtype="bfloat16")
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    for name in ("latest_train_state.pt", "iter_0000000/train_state.pt"):
        assert (tmp_path / "megatron" / name).read_bytes() == train_state()
