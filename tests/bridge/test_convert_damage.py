"""Conversion of what is damaged, or is damaged on its way: each difference is found and named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from bridge import comparison, transfer
from bridge.convert import export_checkpoint, import_checkpoint
from bridge.errors import (
    AccountingError,
    BridgeError,
    CheckpointError,
    CorruptFileError,
    DtypeMismatchError,
    VerificationError,
)
from bridge.record import RECORD_NAME, SIDE_DIRECTORY
from harness.toys import toy_named, write_checkpoint
from tests.directories import flip_one_bit


def test_a_missing_and_an_unexpected_tensor_are_named_before_anything_is_written(
    tmp_path: Path,
) -> None:
    """The accounting lists every difference; the target does not appear."""
    write_checkpoint(toy_named("super-49b-v1"), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    active = [block for block in config["block_configs"] if not block["attention"]["no_op"]]
    active[0]["attention"] |= {"no_op": True, "n_heads_in_group": None}
    config["vocab_size"] += 1
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(AccountingError) as caught:
        import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    places = "\n".join(caught.value.where)
    assert "unexpected: " in places
    assert "q_proj" in places
    assert "mis-shaped: lm_head.weight" in places
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_changed_side_file_is_noticed(super_checkpoint: Path, tmp_path: Path) -> None:
    """The tokenizer that comes back is the one that went in, or the export says which is not."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    flip_one_bit(tmp_path / "megatron" / SIDE_DIRECTORY / "tokenizer.json", 5)
    with pytest.raises(VerificationError) as caught:
        export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert "tokenizer.json" in caught.value.where[0]


@pytest.mark.parametrize("position", [0, 5])
def test_a_damaged_configuration_is_told_from_one_of_another_model(
    position: int, super_checkpoint: Path, tmp_path: Path
) -> None:
    """Its hash is compared before it is parsed: no JSON, or a field that nobody knows."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    flip_one_bit(tmp_path / "megatron" / SIDE_DIRECTORY / "config.json", position)
    with pytest.raises(VerificationError, match="side files are not those") as caught:
        export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert [Path(place).name for place in caught.value.where] == ["config.json"]


def test_a_record_without_hashes_is_said_and_one_that_lacks_some_is_refused(
    super_checkpoint: Path, tmp_path: Path
) -> None:
    """No comparison is passed over in silence."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    path = tmp_path / "megatron" / RECORD_NAME
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"tensor_sha256": {}}))
    report = export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert any("holds no hashes" in note for note in report.notes)
    del record["tensor_sha256"]["lm_head.weight"]
    path.write_text(json.dumps(record))
    with pytest.raises(CorruptFileError, match="lacks the hashes of 1 of") as caught:
        export_checkpoint(tmp_path / "megatron", tmp_path / "other")
    assert caught.value.where == ("lm_head.weight",)
    assert not (tmp_path / "other").exists()


def test_side_files_that_are_away_for_a_moment_are_not_taken_for_none(
    super_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a mount comes and goes: another configuration would be written in their place."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    is_dir = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda path: path.name != SIDE_DIRECTORY and is_dir(path))
    with pytest.raises(VerificationError, match="side files are not those") as caught:
        export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert f"{SIDE_DIRECTORY}/tokenizer.json" in caught.value.where
    assert not (tmp_path / "back").exists()
    monkeypatch.undo()
    export_checkpoint(
        tmp_path / "megatron", tmp_path / "back", hf_model=super_checkpoint / "config.json"
    )


@pytest.mark.parametrize(
    ("break_it", "kind"),
    [
        (lambda root: (root / "latest_checkpointed_iteration.txt").unlink(), CheckpointError),
        (lambda root: (root / "iter_0000000" / ".metadata").unlink(), CheckpointError),
        (lambda root: (root / "iter_0000000" / "__0_0.distcp").unlink(), CheckpointError),
        (lambda root: (root / RECORD_NAME).write_text("{}"), CorruptFileError),
        (lambda root: (root / SIDE_DIRECTORY / "config.json").unlink(), VerificationError),
        (lambda root: shutil.rmtree(root / SIDE_DIRECTORY), VerificationError),
    ],
    ids=["tracker", "metadata", "weights", "record", "config", "side files"],
)
def test_a_damaged_checkpoint_is_one_clear_error_and_no_target(
    super_checkpoint: Path,
    tmp_path: Path,
    break_it: object,
    kind: type[BridgeError],
) -> None:
    """Each names a place; nothing is half-written."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    assert callable(break_it)
    break_it(tmp_path / "megatron")
    with pytest.raises(kind) as caught:
        export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert caught.value.where
    assert not (tmp_path / "back").exists()


def test_hostile_names_in_the_record_write_nothing_outside_the_target(
    super_checkpoint: Path, tmp_path: Path
) -> None:
    """A shard named `../evil` in the record is refused."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    path = tmp_path / "megatron" / RECORD_NAME
    record = json.loads(path.read_text())
    record["shards"] = {f"../evil-{name}": header for name, header in record["shards"].items()}
    path.write_text(json.dumps(record))
    with pytest.raises(CorruptFileError):
        export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert not list(tmp_path.glob("evil*"))


def test_a_record_of_shards_without_their_index_is_refused(
    super_checkpoint: Path, tmp_path: Path
) -> None:
    """The export would lack it, and nobody could load those shards."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    path = tmp_path / "megatron" / RECORD_NAME
    record = json.loads(path.read_text())
    shards = {f"model-{name}": header for name, header in record["shards"].items()}
    path.write_text(json.dumps(record | {"shards": shards, "index": None}))
    with pytest.raises(CorruptFileError, match="no index"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "back")


@pytest.mark.parametrize("index", ["!!!", "", "e30=junk", "W10=", "e30="], ids=repr)
def test_an_index_in_the_record_that_is_none_is_refused(
    super_checkpoint: Path, tmp_path: Path, index: str
) -> None:
    """Before anything is written: no base64, nothing, more than that, a list, no weights."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    path = tmp_path / "megatron" / RECORD_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"index": index}))
    with pytest.raises(CorruptFileError) as caught:
        export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert [Path(place).name for place in caught.value.where] == [RECORD_NAME]


def damage_payload(root: Path, tensor: str, *, last_row: bool) -> None:
    """Overwrite two bytes of a stored parameter, in its first or its last row."""
    from bridge.storage.torch_dist_read import TorchDistReader
    from bridge.tiling import Box

    with TorchDistReader(root / "iter_0000000") as reader:
        rows, columns = reader.tensors[tensor].shape
        row = rows - 1 if last_row else 0
        extents = reader.extents(tensor, Box((row, 0), (row + 1, columns)))
    assert extents is not None
    (extent,) = extents
    data = bytearray(extent.path.read_bytes())
    data[extent.offset : extent.offset + 2] = b"\x01\x41"
    extent.path.write_bytes(data)


def test_a_checkpoint_damaged_since_its_import_is_not_exported_as_if_nothing_were(
    super_checkpoint: Path, tmp_path: Path
) -> None:
    """The hashes of the import name the tensor; --hf-model exports it all the same."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    damage_payload(tmp_path / "megatron", "decoder.layers.0.mlp.linear_fc2.weight", last_row=False)
    with pytest.raises(VerificationError) as caught:
        export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert caught.value.where == ("model.layers.0.mlp.down_proj.weight",)
    assert not (tmp_path / "back").exists()
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", hf_model=super_checkpoint)


def test_a_stale_index_and_other_differences_are_reported_together(
    super_checkpoint: Path, tmp_path: Path
) -> None:
    """Missing, mis-shaped and not where the index says: one error."""
    index = super_checkpoint / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.ghost.weight"] = content["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(content))
    config = json.loads((super_checkpoint / "config.json").read_text())
    config["vocab_size"] += 1
    (super_checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(AccountingError) as caught:
        import_checkpoint(super_checkpoint, tmp_path / "megatron")
    places = "\n".join(caught.value.where)
    assert "mis-shaped: lm_head.weight" in places
    assert "index: model.ghost.weight should be in" in places


def test_layers_of_unequal_dtype_cannot_be_stacked_and_are_named(tmp_path: Path) -> None:
    """Megatron holds a homogeneous model's layers as one tensor: refused before any work."""
    from safetensors.torch import load_file, save_file

    write_checkpoint(toy_named("nano-8b"), tmp_path / "hf", dtype="bfloat16", max_shard_size=10**12)
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    name = "model.layers.2.input_layernorm.weight"
    weights[name] = weights[name].float()
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(DtypeMismatchError) as caught:
        import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    (place,) = caught.value.where
    assert place.startswith(
        "decoder.layers.2.self_attention.linear_qkv.layer_norm_weight is float32"
    )


def test_a_parameter_stored_under_two_keys_is_refused(
    super_checkpoint: Path, tmp_path: Path
) -> None:
    """With the `model.` prefix and without it: neither is taken over the other."""
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    twice = tmp_path / "twice" / "iter_0000000"
    twice.parent.mkdir()
    name = "decoder.final_layernorm.weight"
    save(
        {name: torch.ones(4), f"model.{name}": torch.zeros(4)},
        storage_writer=FileSystemWriter(twice),
        no_dist=True,
    )
    for file in ("metadata.json", "common.pt"):
        shutil.copy(tmp_path / "megatron" / "iter_0000000" / file, twice / file)
    with pytest.raises(CorruptFileError, match="is stored as"):
        export_checkpoint(twice, tmp_path / "back", hf_model=super_checkpoint)


@pytest.mark.parametrize("stage", ["copied", "compared"])
def test_a_source_cut_short_meanwhile_is_named(
    super_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """While its bytes are looked at: an error as at any other time, and no signal."""
    room = transfer if stage == "copied" else comparison
    name = "crc32" if stage == "copied" else "first_and_count"
    look = getattr(room, name)
    shards = sorted(map(str, super_checkpoint.glob("*.safetensors")))

    def cut(*args: object, **kwargs: object) -> object:
        for shard in shards:
            os.truncate(shard, 0)
        return look(*args, **kwargs)

    monkeypatch.setattr(room, name, cut)
    with pytest.raises(CorruptFileError, match="the file ends at byte") as caught:
        import_checkpoint(super_checkpoint, tmp_path / "megatron")
    assert caught.value.where[0] in shards
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
