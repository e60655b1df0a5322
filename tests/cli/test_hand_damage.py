"""A conversion damaged by hand: `verify` fails, exits with 1 and names the place."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader

from bridge.convert import import_checkpoint
from bridge.record import SIDE_DIRECTORY
from harness.toys import toy_named, write_checkpoint

if TYPE_CHECKING:
    from tests.cli.conftest import Outcome, Run

TOY = "super-49b-v1_5"
QKV = "decoder.layers.6.self_attention.linear_qkv"
# 16 query heads of 8 channels in 2 groups: a group's 64 query rows, its 8 key rows, its 8 values.
KEYS = (slice(64, 72), slice(144, 152))
Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and its conversion, which no test changes."""
    root = tmp_path_factory.mktemp("originals")
    write_checkpoint(toy_named(TOY), root / "hf")
    import_checkpoint(root / "hf", root / "m")
    return root


@pytest.fixture
def models(originals: Path, tmp_path: Path) -> Path:
    """Both, of one's own: `hf` and `m`."""
    return Path(shutil.copytree(originals, tmp_path / "models"))


def verify(run: Run, models: Path) -> Outcome:
    """Hold one against the other by the check that looks at files alone."""
    found = run(
        "verify", "--hf-model", models / "hf", "--megatron-path", models / "m",
        "--checks", "round_trip",
    )  # fmt: skip
    assert "Traceback" not in found.err + found.out
    return found


def change_distcp(megatron: Path, name: str, change: Callable[[Array], Array]) -> None:
    """Change a parameter where it lies in the checkpoint's files, as its only chunk."""
    (directory,) = megatron.glob("iter_*")
    (place,) = [
        place
        for index, place in FileSystemReader(directory).read_metadata().storage_data.items()
        if index.fqn == name
    ]
    path = directory / place.relative_path
    data = bytearray(path.read_bytes())
    stored = bytes(data[place.offset : place.offset + place.length])
    values = torch.load(io.BytesIO(stored)).numpy()
    raw = values.tobytes()
    assert stored.count(raw) == 1
    start = place.offset + stored.index(raw)
    data[start : start + len(raw)] = np.ascontiguousarray(change(values.copy())).tobytes()
    path.write_bytes(data)


def change_config(directory: Path, **rope: object) -> None:
    """Give RoPE other values in a `config.json`."""
    file = directory / "config.json"
    config = json.loads(file.read_text("utf-8"))
    config["rope_scaling"] |= rope
    file.write_text(json.dumps(config), "utf-8")


def test_a_healthy_conversion_passes(run: Run, models: Path) -> None:
    """Nothing below fails for a reason of its own; and a rewritten file is the same configuration.

    transformers writes RoPE in other keys, and the keys in another order.
    """
    file = models / "hf" / "config.json"
    config = json.loads(file.read_text("utf-8"))
    rope = config.pop("rope_scaling") | {"rope_theta": config.pop("rope_theta")}
    file.write_text(json.dumps({"rope_parameters": rope} | config, indent=4), "utf-8")
    found = verify(run, models)
    assert found.code == 0, found.out
    assert "1 passed, 0 failed" in found.out


def test_exchanged_key_heads_are_named_by_layer_group_and_rows(run: Run, models: Path) -> None:
    """Two groups' keys, in the bytes of the Megatron checkpoint."""

    def exchange(rows: Array) -> Array:
        rows[KEYS[0]], rows[KEYS[1]] = rows[KEYS[1]].copy(), rows[KEYS[0]].copy()
        return rows

    change_distcp(models / "m", f"{QKV}.weight", exchange)
    found = verify(run, models)
    assert found.code == 1
    assert (
        "model.layers.6.self_attn.k_proj.weight[0, 0]: 2048 elements differ, this one first; in "
        f"{QKV}.weight[64, 0], rows 64-71 = query group 0's key"
    ) in found.out


@pytest.mark.parametrize("side", ["m", "hf"])
def test_a_scaled_norm_is_named(run: Run, models: Path, side: str) -> None:
    """A thousandth more, on either side."""
    name = "model.layers.6.input_layernorm.weight"
    if side == "m":
        change_distcp(
            models / "m", f"{QKV}.layer_norm_weight", lambda norm: norm * np.float32(1.001)
        )
    else:
        (shard,) = [p for p in (models / "hf").glob("*.safetensors") if name in load_file(p)]
        tensors = load_file(shard)
        tensors[name] = tensors[name] * np.float32(1.001)
        save_file(tensors, shard, metadata={"format": "pt"})
    found = verify(run, models)
    assert found.code == 1
    assert f"{name}[0]: " in found.out
    assert f"in {QKV}.layer_norm_weight[0]" in found.out
    assert "1 tensor differs" in found.out


def test_a_rope_value_changed_in_the_configuration_is_named(run: Run, models: Path) -> None:
    """After the import, so that the Megatron checkpoint is of another model now."""
    change_config(models / "hf", low_freq_factor=2.0)
    found = verify(run, models)
    assert found.code == 1
    assert "config.json: rope_scaling.low_freq_factor: 2.0 is not 1.0" in found.out
    assert "0 of 1,991,168 elements differ" in found.out


def test_a_rope_value_changed_in_the_kept_configuration_is_named(run: Run, models: Path) -> None:
    """The weights, the args and the source are right; an export would give a wrong model."""
    change_config(models / "m" / SIDE_DIRECTORY, low_freq_factor=2.0)
    found = verify(run, models)
    assert found.code == 1
    assert "config.json: rope_scaling.low_freq_factor: 1.0 is not 2.0" in found.out
    assert "hf_source/config.json: not the file that was imported, by sha256" in found.out


def test_a_kept_file_that_is_lost_or_another_is_named(run: Run, models: Path) -> None:
    """What an export would not give back."""
    kept = models / "m" / SIDE_DIRECTORY
    (kept / "tokenizer.json").write_bytes(b"{}")
    (kept / "generation_config.json").unlink()
    found = verify(run, models)
    assert found.code == 1
    assert "2 kept files are not the imported ones" in found.out
    assert "hf_source/tokenizer.json: not the file that was imported" in found.out
    assert "hf_source/generation_config.json: lost" in found.out


def test_a_kept_configuration_that_nobody_could_have_trained_is_a_failed_check(
    run: Run, models: Path
) -> None:
    """Damage is a verdict, whatever it makes of the file: not bad usage."""
    change_config(models / "m" / SIDE_DIRECTORY, low_freq_factor=9.0)  # above high_freq_factor
    found = verify(run, models)
    assert found.code == 1
    assert "hf_source/config.json cannot be read" in found.out
