"""Checkpoints under other names and in other places: wrappers' prefixes, local norms, NeMo 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from bridge.convert import export_checkpoint, import_checkpoint
from bridge.errors import AccountingError, CheckpointError, ConfigError
from harness.toys import toy_named, write_checkpoint

Rename = Callable[[str], str]


def as_local(key: str) -> str:
    """Norms as local layers hold them: of ordinary blocks and of linear replacements."""
    for half, norm in {"self_attention": "input", "mlp": "pre_mlp"}.items():
        for module in (f"{half}.linear_qkv", f"{half}.linear_fc1", half):
            key = key.replace(f".{module}.layer_norm_weight", f".{norm}_layernorm.weight")
    return key


def module(key: str) -> str:
    """As NeMo 2 wraps a model."""
    return f"module.{key}"


def wrapped_twice(key: str) -> str:
    """As DistributedDataParallel around Float16Module does."""
    return f"module.module.{key}"


def rewrite(iteration: Path, target: Path, rename: Rename, **extra: torch.Tensor) -> None:
    """Save an import's tensors once more, by torch alone, under other keys."""
    reader = FileSystemReader(iteration)
    state: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    target.parent.mkdir(parents=True)
    renamed = {rename(key): tensor for key, tensor in state.items()} | extra
    save(renamed, storage_writer=FileSystemWriter(target), no_dist=True)
    for name in ("metadata.json", "common.pt"):
        shutil.copy(iteration / name, target / name)


@pytest.fixture(scope="module", params=["51b", "nano-8b"])
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `hf` and its import, of a model that is stacked and of one that is not."""
    root = tmp_path_factory.mktemp(request.param)
    write_checkpoint(toy_named(request.param), root / "hf", dtype="bfloat16")
    import_checkpoint(root / "hf", root / "megatron")
    return root


@pytest.mark.parametrize("rename", [as_local, module, wrapped_twice])
def test_other_names_of_the_same_parameters_are_understood(
    imported: Path, rename: Rename, tmp_path: Path
) -> None:
    """The tensors are the source's whatever the layers and the wrappers were."""
    rewrite(imported / "megatron" / "iter_0000000", tmp_path / "t" / "iter_0000005", rename)
    report = export_checkpoint(
        tmp_path / "t" / "iter_0000005", tmp_path / "back", hf_model=imported / "hf"
    )
    again = export_checkpoint(imported / "megatron", tmp_path / "again")
    assert again.tensor_sha256 == report.tensor_sha256


def test_a_nemo_2_checkpoint_is_found_in_its_weights(imported: Path, tmp_path: Path) -> None:
    """`weights/` beside `context/`, no tracker, Lightning's words for the iteration."""
    nemo = tmp_path / "nemo"
    extra = {"optimizer.state.exp_avg.module.decoder.w": torch.zeros(3)}
    rewrite(imported / "megatron" / "iter_0000000", nemo / "weights", module, **extra)
    (nemo / "context").mkdir()
    torch.save({"global_step": 7, "loops": {}}, nemo / "weights" / "common.pt")
    report = export_checkpoint(nemo, tmp_path / "back", hf_model=imported / "hf")
    again = export_checkpoint(imported / "megatron", tmp_path / "again")
    assert again.tensor_sha256 == report.tensor_sha256
    assert any("optimizer" in note for note in report.notes)
    with pytest.raises(ConfigError, match="says nothing of its model"):
        export_checkpoint(nemo, tmp_path / "other")


def test_a_nemo_1_archive_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """It is a tar of another layout; no guess is made."""
    (tmp_path / "model.nemo").write_bytes(b"tar")
    with pytest.raises(CheckpointError, match="NeMo 1") as caught:
        export_checkpoint(tmp_path / "model.nemo", tmp_path / "back")
    assert "weights/" in str(caught.value.hint)


def test_a_parameter_of_no_known_name_is_not_dropped(imported: Path, tmp_path: Path) -> None:
    """An adapter's weight, or a bias, is part of the model: the accounting names it."""
    extra = {"module.decoder.final_layernorm.bias": torch.zeros(3)}
    rewrite(imported / "megatron" / "iter_0000000", tmp_path / "t" / "iter_1", module, **extra)
    with pytest.raises(AccountingError, match="1 unexpected"):
        export_checkpoint(tmp_path / "t" / "iter_1", tmp_path / "back", hf_model=imported / "hf")


def test_an_import_keeps_what_it_says_to_megatron_lm(imported: Path) -> None:
    """Prefixes are of reading only: an import's own keys have none, and json stays json."""
    reader = FileSystemReader(imported / "megatron" / "iter_0000000")
    keys = reader.read_metadata().state_dict_metadata
    assert not [key for key in keys if key.startswith(("module.", "model."))]
    config = (imported / "megatron" / "iter_0000000" / "metadata.json").read_text()
    assert json.loads(config)["sharded_backend"] == "torch_dist"
