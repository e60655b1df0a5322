"""Checkpoints under other names and in other places: wrappers' prefixes, local norms, NeMo 2."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from bridge.convert import export_checkpoint, import_checkpoint
from bridge.dtypes import Dtype
from bridge.errors import (
    AccountingError,
    BridgeError,
    CheckpointError,
    ConfigError,
    CorruptFileError,
)
from bridge.storage.chunks import ChunkReader
from bridge.storage.megatron import MegatronSource
from bridge.tiling import Box
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


def save_legacy(imported: Path, target: Path, **state: Any) -> None:  # noqa: ANN401 - a pickle
    """Save an import's tensors as Megatron-LM's `torch` format does, for one rank."""
    model = {}
    with MegatronSource(imported / "megatron") as source:
        for name, info in source.tensors.items():
            words = np.empty(info.shape, info.dtype.word)
            source.read_into(name, Box.whole(info.shape), words)
            model[name] = torch.from_numpy(words.view("<i2")).view(torch.bfloat16)
        args = {
            name: getattr(torch, value.name) if isinstance(value, Dtype) else value
            for name, value in (source.args or {}).items()
        }
    (target / "mp_rank_00").mkdir(parents=True)
    args |= state.pop("args", {})
    model |= state.pop("model", {})
    common = {"args": argparse.Namespace(**args), "checkpoint_version": 3.0, "iteration": 5}
    torch.save({"model": model, **common, **state}, target / "mp_rank_00" / "model_optim_rng.pt")


@pytest.mark.parametrize("format_", ["torch", "torch_dist"])
def test_a_parameter_of_another_module_is_not_dropped(
    imported: Path, format_: str, tmp_path: Path
) -> None:
    """What stands beside embedding, decoder and output layer was trained, too."""
    extra = {"module.adapter.lora_A.weight": torch.zeros(3, dtype=torch.bfloat16)}
    if format_ == "torch":
        save_legacy(imported, tmp_path / "run" / "iter_0000005", model=extra)
    else:
        iteration = imported / "megatron" / "iter_0000000"
        rewrite(iteration, tmp_path / "run" / "iter_0000005", module, **extra)
    with pytest.raises(AccountingError, match="1 unexpected") as caught:
        export_checkpoint(
            tmp_path / "run" / "iter_0000005", tmp_path / "back", hf_model=imported / "hf"
        )
    assert caught.value.where == ("unexpected: adapter.lora_A.weight",)


@pytest.mark.parametrize(
    ("state", "error", "word"),
    [
        ({"model": {"module.embedding.word_embeddings.weight": torch.zeros(2)}}, 302, "as module."),
        ({"checkpoint_version": float("nan")}, 302, "nan is not a number"),
        ({"checkpoint_version": "3.0"}, 302, "'3.0' is not a number"),
        ({"args": {"tensor_model_parallel_size": 2}}, 300, "1 of 2 x 1 ranks are missing"),
        ({"args": {"vocab_size": None, "padded_vocab_size": 1 << 20}}, 104, "not that of"),
        ({"model": {"decoder.layers.x.weight": torch.zeros(10**11, 0)}}, 302, "no stack of layers"),
    ],
)
def test_a_legacy_file_that_contradicts_itself_is_refused(
    imported: Path, state: dict[str, Any], error: int, word: str, tmp_path: Path
) -> None:
    """One parameter under two names, no version, a rank of several, a vocabulary of no run."""
    save_legacy(imported, tmp_path / "iter_0000005", **state)
    with pytest.raises(BridgeError, match=word) as caught:
        export_checkpoint(tmp_path / "iter_0000005", tmp_path / "back", hf_model=imported / "hf")
    assert caught.value.code == f"BR{error}"


@pytest.mark.parametrize("state", [{"args": 3}, {"model": {"decoder.layers.x": torch.zeros(0)}}])
def test_a_legacy_checkpoint_that_is_refused_is_closed(
    imported: Path, state: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its reader, or by what looks at the reader's tensors."""
    save_legacy(imported, tmp_path / "iter_0000005", model=state.get("model", {}))
    path = tmp_path / "iter_0000005" / "mp_rank_00" / "model_optim_rng.pt"
    if "args" in state:
        torch.save({"model": {}, "args": state["args"]}, path)
    closed = []
    close = ChunkReader.close

    def counted(self: ChunkReader) -> None:
        closed.append(self)
        close(self)

    monkeypatch.setattr(ChunkReader, "close", counted)
    with pytest.raises(CorruptFileError):
        MegatronSource(tmp_path / "iter_0000005")
    assert closed


def test_what_is_odd_and_readable_is_read_with_a_note(imported: Path, tmp_path: Path) -> None:
    """A renamed directory; args without the vocabulary's own size; rows that are dropped."""
    save_legacy(imported, tmp_path / "iter_0000007", args={"vocab_size": None})
    report = export_checkpoint(
        tmp_path / "iter_0000007", tmp_path / "back", hf_model=imported / "hf"
    )
    again = export_checkpoint(imported / "megatron", tmp_path / "again")
    assert again.tensor_sha256 == report.tensor_sha256
    assert any("of itself that it is of iteration 5" in note for note in report.notes)
    assert any("rows were dropped as padding" in note for note in report.notes)


def test_a_tracker_of_endless_digits_is_refused(tmp_path: Path) -> None:
    """No number that Python reads, no name that a directory can have."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("9" * 5000)
    with pytest.raises(CorruptFileError, match="neither an iteration nor"):
        export_checkpoint(tmp_path / "run", tmp_path / "back")


def test_an_import_keeps_what_it_says_to_megatron_lm(imported: Path) -> None:
    """Prefixes are of reading only: an import's own keys have none, and json stays json."""
    reader = FileSystemReader(imported / "megatron" / "iter_0000000")
    keys = reader.read_metadata().state_dict_metadata
    assert not [key for key in keys if key.startswith(("module.", "model."))]
    config = (imported / "megatron" / "iter_0000000" / "metadata.json").read_text()
    assert json.loads(config)["sharded_backend"] == "torch_dist"
