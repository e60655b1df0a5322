"""Digests that say when two checkpoints are one model, and two files one input."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge.convert import import_checkpoint, read_spec
from bridge.spec import BlockSpec, Linear, ModelSpec, NoOp
from bridge.storage.megatron import MegatronSource
from bridge.storage.safetensors import SafetensorsSource
from bridge.transfer import TransferLimits
from harness.identity import (
    config_sha256,
    hf_weights_sha256,
    inputs_sha256,
    megatron_weights_sha256,
    spec_sha256,
)
from harness.toys import toy_named, write_checkpoint


def hf_digest(directory: Path, *, limits: TransferLimits | None = None) -> str:
    """Of a Hugging Face directory."""
    with SafetensorsSource(directory) as source:
        return hf_weights_sha256(source, limits=limits)


def megatron_digest(directory: Path, spec: ModelSpec) -> str:
    """Of a Megatron checkpoint."""
    with MegatronSource(directory) as source:
        return megatron_weights_sha256(source, spec)


def by_the_definition(directory: Path) -> str:
    """Name, dtype, shape and sha256 of the bytes of every tensor, as safetensors reads them."""
    entries = []
    for path in directory.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            raw = tensor.numpy().tobytes()
            dtype = str(tensor.dtype).removeprefix("torch.")
            entries.append([name, dtype, list(tensor.shape), hashlib.sha256(raw).hexdigest()])
    text = json.dumps(sorted(entries), separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("name", ["super-49b-v1_5", "nano-4b", "tied"])
def test_both_sides_of_a_conversion_have_one_digest_however_they_are_cut(
    name: str, tmp_path: Path
) -> None:
    """Heterogeneous, homogeneous and stacked, tied; few shards or many; TP and PP."""
    write_checkpoint(toy_named(name), tmp_path / "hf")
    write_checkpoint(toy_named(name), tmp_path / "many", max_shard_size=100_000)
    import_checkpoint(tmp_path / "hf", tmp_path / "one")
    import_checkpoint(
        tmp_path / "hf", tmp_path / "four",
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2,
    )  # fmt: skip
    spec = read_spec(tmp_path / "hf")
    expected = by_the_definition(tmp_path / "hf")
    assert expected == hf_digest(tmp_path / "hf")
    assert expected == hf_digest(tmp_path / "hf", limits=TransferLimits(memory_budget=1))
    assert expected == hf_digest(tmp_path / "many")
    assert expected == megatron_digest(tmp_path / "one", spec)
    assert expected == megatron_digest(tmp_path / "four", spec)


def test_one_bit_or_one_name_makes_other_weights(tmp_path: Path) -> None:
    """And so do equal bytes in another shape."""
    write_checkpoint(toy_named("nano-4b"), tmp_path / "hf", max_shard_size=1 << 30)
    (shard,) = (tmp_path / "hf").glob("*.safetensors")
    healthy, tensors = hf_digest(tmp_path / "hf"), load_file(shard)
    found = {healthy}
    name = "model.norm.weight"
    words = tensors[name].clone()
    words.view(torch.int32)[3] ^= 1
    for changed in (
        tensors | {name: words},
        tensors | {name: tensors[name].reshape(2, -1)},
        {key.replace("norm", "form"): tensor for key, tensor in tensors.items()},
    ):
        save_file(changed, shard)
        found.add(hf_digest(tmp_path / "hf"))
    assert len(found) == 4


def test_a_model_is_its_blocks_by_kind_and_not_the_dtype_it_is_stored_in() -> None:
    """A no-op and a linear replacement have no fields, and are not the same."""
    variants = Path(__file__).parents[2] / "suites" / "variants"
    spec = read_spec(variants / "Llama-3_3-Nemotron-Super-49B-v1.json")
    first = spec.blocks[0]
    others = [
        dataclasses.replace(
            spec, blocks=(BlockSpec(attention=one, ffn=first.ffn), *spec.blocks[1:])
        )
        for one in (NoOp(), Linear())
    ]
    assert len({spec_sha256(one) for one in (spec, *others)}) == 3
    assert spec_sha256(spec) == spec_sha256(dataclasses.replace(spec, params_dtype="float32"))


def test_a_configuration_is_its_values_in_any_order() -> None:
    """The file's own order and spacing say nothing."""
    assert config_sha256({"a": 1, "b": {"c": 2, "d": 3}}) == config_sha256(
        {"b": {"d": 3, "c": 2}, "a": 1}
    )
    assert config_sha256({"a": 1}) != config_sha256({"a": 2})


def test_positions_given_once_stand_for_every_sequence() -> None:
    """(seq,) and (batch, seq), of any integer type, are one input; other positions another."""
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    once = inputs_sha256(ids, np.arange(3))
    assert once == inputs_sha256(ids.astype(np.int32), np.array([[0, 1, 2], [0, 1, 2]]))
    assert once != inputs_sha256(ids, np.array([0, 1, 3]))
    assert once != inputs_sha256(ids.reshape(3, 2), np.arange(2))
