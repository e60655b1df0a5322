"""Conversion file to file: what comes back is what went in, or nothing appears at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.conversion import ConversionOptions
from bridge.convert import export_checkpoint, import_checkpoint
from bridge.errors import (
    AccountingError,
    BridgeError,
    CheckpointError,
    ConfigError,
    CorruptFileError,
    DtypeMismatchError,
    InconsistentConfigError,
    TargetExistsError,
    UsageError,
    VerificationError,
)
from bridge.record import RECORD_NAME, SIDE_DIRECTORY
from bridge.transfer import TransferLimits
from harness.toys import TOYS, Toy, toy_named, write_checkpoint

LAYOUTS = [(1, 1), (2, 1), (1, 2), (4, 2)]


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, with its bytes."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def super_checkpoint(tmp_path: Path) -> Path:
    """A small Super-49B with every side file."""
    write_checkpoint(toy_named("super-49b-v1"), tmp_path / "hf", dtype="bfloat16")
    return tmp_path / "hf"


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_an_export_of_an_import_is_the_source_directory_file_by_file(
    toy: Toy, tmp_path: Path
) -> None:
    """Weights, index, configuration and side files are byte for byte the same, at any cut."""
    write_checkpoint(toy, tmp_path / "hf", dtype="bfloat16")
    for tp, pp in LAYOUTS:
        megatron, back = tmp_path / f"megatron-{tp}-{pp}", tmp_path / f"back-{tp}-{pp}"
        import_checkpoint(
            tmp_path / "hf",
            megatron,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
        )
        export_checkpoint(megatron, back)
        assert files_of(tmp_path / "hf") == files_of(back)


def test_a_checkpoint_cut_for_other_ranks_holds_the_same_parameters(
    super_checkpoint: Path, tmp_path: Path
) -> None:
    """TP and PP given at import change the files, not what they hold."""
    reports = []
    for tp, pp in LAYOUTS[:3]:
        report = import_checkpoint(
            super_checkpoint,
            tmp_path / f"{tp}{pp}",
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
        )
        reports.append(report)
    assert len({json.dumps(report.tensor_sha256, sort_keys=True) for report in reports}) == 1
    ranks = {path.name.split("_")[2] for path in (tmp_path / "21").rglob("*.distcp")}
    assert {"0", "1"} == ranks


def test_two_imports_write_the_same_bytes(super_checkpoint: Path, tmp_path: Path) -> None:
    """Conversion is deterministic, whatever the number of threads and the budget."""
    one = ConversionOptions(limits=TransferLimits(threads=1, memory_budget=1 << 20))
    two = ConversionOptions(limits=TransferLimits(threads=4))
    import_checkpoint(super_checkpoint, tmp_path / "one", options=one)
    import_checkpoint(super_checkpoint, tmp_path / "two", options=two)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_an_export_without_the_record_needs_only_the_configuration(
    super_checkpoint: Path, tmp_path: Path
) -> None:
    """A checkpoint that remembers nothing takes config and side files from --hf-model."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    shutil.rmtree(tmp_path / "megatron" / SIDE_DIRECTORY)
    (tmp_path / "megatron" / RECORD_NAME).unlink()
    report = export_checkpoint(
        tmp_path / "megatron", tmp_path / "back", hf_model=super_checkpoint, max_shard_size=10**12
    )
    assert (super_checkpoint / "config.json").read_bytes() == (
        tmp_path / "back" / "config.json"
    ).read_bytes()
    assert (tmp_path / "back" / "tokenizer.json").exists()
    again = import_checkpoint(tmp_path / "back", tmp_path / "megatron2")
    assert again.tensor_sha256 == report.tensor_sha256


def test_an_export_without_any_configuration_writes_one_from_the_args_and_says_so(
    super_checkpoint: Path, tmp_path: Path
) -> None:
    """The model is the same, the note says where the configuration came from."""
    imported = import_checkpoint(super_checkpoint, tmp_path / "megatron")
    shutil.rmtree(tmp_path / "megatron" / SIDE_DIRECTORY)
    (tmp_path / "megatron" / RECORD_NAME).unlink()
    report = export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert any("written from the checkpoint's args" in note for note in report.notes)
    again = import_checkpoint(tmp_path / "back", tmp_path / "again")
    assert imported.tensor_sha256 == again.tensor_sha256
    assert imported.plan_sha256 == again.plan_sha256


@pytest.mark.parametrize(
    ("field", "value", "place"),
    [
        ("rms_norm_eps", 1e-6, "layernorm_epsilon"),
        ("rope_scaling", {"factor": 16.0}, "rope"),
        ("rope_scaling", {"low_freq_factor": 2.0}, "rope"),
    ],
)
def test_a_configuration_that_contradicts_the_checkpoint_is_refused(
    super_checkpoint: Path, tmp_path: Path, field: str, value: object, place: str
) -> None:
    """Export with another model's epsilon or RoPE names the field instead of writing it."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    config = json.loads((super_checkpoint / "config.json").read_text())
    config[field] = config[field] | value if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InconsistentConfigError) as caught:
        export_checkpoint(
            tmp_path / "megatron", tmp_path / "back", hf_model=tmp_path / "config.json"
        )
    assert any(entry.startswith(place) for entry in caught.value.where)
    assert not (tmp_path / "back").exists()


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


def test_an_existing_target_is_kept_unless_overwriting_is_asked_for(
    super_checkpoint: Path, tmp_path: Path
) -> None:
    """Nothing of an existing directory is touched; --overwrite replaces it whole."""
    target = tmp_path / "megatron"
    target.mkdir()
    (target / "precious").write_text("mine")
    with pytest.raises(TargetExistsError):
        import_checkpoint(super_checkpoint, target)
    assert [path.name for path in target.iterdir()] == ["precious"]
    import_checkpoint(super_checkpoint, target, options=ConversionOptions(overwrite=True))
    assert not (target / "precious").exists()
    assert (target / "latest_checkpointed_iteration.txt").read_text() == "0"


def test_a_failed_overwrite_keeps_the_old_target(super_checkpoint: Path, tmp_path: Path) -> None:
    """A source that turns out damaged half way does not cost the checkpoint that was there."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    before = files_of(tmp_path / "megatron")
    shard = next(super_checkpoint.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CorruptFileError):
        import_checkpoint(
            super_checkpoint, tmp_path / "megatron", options=ConversionOptions(overwrite=True)
        )
    assert before == files_of(tmp_path / "megatron")
    assert {"hf", "megatron"} == {path.name for path in tmp_path.iterdir()}


def flip_one_bit(path: Path, position: int) -> None:
    """Damage a file the way a disk does."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_one_flipped_bit_in_the_written_checkpoint_is_found_and_named(
    super_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read-back compares every bit and says which element of which tensor differs."""
    from bridge.storage import new_checkpoint
    from bridge.transfer import write_files

    def write_and_damage(layouts, directory, *args, **kwargs):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN003, ANN202 (a wrapper of any signature)
        write_files(layouts, directory, *args, **kwargs)
        payload = layouts[0].payloads[3]
        flip_one_bit(directory / layouts[0].path, payload.offset + payload.nbytes // 2)

    monkeypatch.setattr(new_checkpoint, "write_files", write_and_damage)
    with pytest.raises(VerificationError) as caught:
        import_checkpoint(super_checkpoint, tmp_path / "megatron")
    assert len(caught.value.where) == 1
    assert "1 elements differ" in caught.value.where[0]
    assert not (tmp_path / "megatron").exists()


def test_a_changed_side_file_is_noticed(super_checkpoint: Path, tmp_path: Path) -> None:
    """The tokenizer that comes back is the one that went in, or the export says which is not."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    flip_one_bit(tmp_path / "megatron" / SIDE_DIRECTORY / "tokenizer.json", 5)
    with pytest.raises(VerificationError) as caught:
        export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert "tokenizer.json" in caught.value.where[0]


def test_a_checkpoint_with_optimizer_state_is_exported_and_what_is_ignored_is_said(
    super_checkpoint: Path, tmp_path: Path
) -> None:
    """Keys that are no model parameters are left alone and reported by kind and size."""
    import numpy as np
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    imported = import_checkpoint(super_checkpoint, tmp_path / "megatron")
    iteration = tmp_path / "megatron" / "iter_0000000"
    reader = FileSystemReader(iteration)
    described = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in described.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    for key in list(state):
        state[f"optimizer.state.exp_avg.{key}"] = torch.from_numpy(np.zeros(state[key].shape))
    trained = tmp_path / "trained" / "iter_0000500"
    trained.parent.mkdir()
    save(state, storage_writer=FileSystemWriter(trained), no_dist=True)
    for name in ("metadata.json", "common.pt"):
        shutil.copy(iteration / name, trained / name)
    (trained.parent / "latest_checkpointed_iteration.txt").write_text("500")
    for path in (trained.parent, trained):
        back = tmp_path / f"back-{path.name}"
        report = export_checkpoint(path, back, hf_model=super_checkpoint)
        assert imported.tensor_sha256 == report.tensor_sha256
        assert any("optimizer" in note and "ignored" in note for note in report.notes)


@pytest.mark.parametrize("moment", [0.0, 0.02, 0.05, 0.1])
def test_a_killed_conversion_leaves_no_target(
    super_checkpoint: Path, tmp_path: Path, moment: float
) -> None:
    """SIGKILL at some instant: the target is absent or complete, and the next attempt succeeds."""
    target = tmp_path / "out" / "megatron"
    code = (
        "import sys; from pathlib import Path; from bridge.convert import import_checkpoint;"
        "print('ready', flush=True);"
        "import_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    child = subprocess.Popen(  # noqa: S603 (our own interpreter)
        [sys.executable, "-c", code, str(super_checkpoint), str(target)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(moment)
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=60)
    child.stdout.close()
    if target.exists():
        export_checkpoint(target, tmp_path / "early")
    import_checkpoint(super_checkpoint, target, options=ConversionOptions(overwrite=True))
    assert [path.name for path in target.parent.iterdir()] == ["megatron"]
    export_checkpoint(target, tmp_path / "back")
    assert files_of(super_checkpoint) == files_of(tmp_path / "back")


@pytest.mark.parametrize(
    ("break_it", "kind"),
    [
        (lambda root: (root / "latest_checkpointed_iteration.txt").unlink(), CheckpointError),
        (lambda root: (root / "iter_0000000" / ".metadata").unlink(), CheckpointError),
        (lambda root: (root / "iter_0000000" / "__0_0.distcp").unlink(), CheckpointError),
        (lambda root: (root / RECORD_NAME).write_text("{}"), CorruptFileError),
        (lambda root: (root / SIDE_DIRECTORY / "config.json").unlink(), ConfigError),
    ],
    ids=["tracker", "metadata", "weights", "record", "config"],
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


@pytest.mark.parametrize(
    "place",
    [
        lambda hf: hf,
        lambda hf: hf.parent,
        lambda hf: hf / "megatron",
        lambda hf: hf / "config.json",
        lambda hf: hf.parent / "link",
    ],
    ids=["itself", "its parent", "inside it", "a file of it", "a link to it"],
)
def test_a_target_that_would_cost_the_source_is_refused(
    super_checkpoint: Path, tmp_path: Path, place: Callable[[Path], Path]
) -> None:
    """Even with --overwrite: source and target are never one inside the other."""
    (tmp_path / "link").symlink_to(super_checkpoint)
    before = files_of(super_checkpoint)
    with pytest.raises(UsageError):
        import_checkpoint(
            super_checkpoint, place(super_checkpoint), options=ConversionOptions(overwrite=True)
        )
    assert before == files_of(super_checkpoint)


@pytest.mark.parametrize("inner", [".", SIDE_DIRECTORY])
def test_an_export_into_the_checkpoint_itself_is_refused(
    super_checkpoint: Path, tmp_path: Path, inner: str
) -> None:
    """Nor does an export replace what it reads, or the configuration it takes."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    before = files_of(tmp_path / "megatron")
    options = ConversionOptions(overwrite=True)
    with pytest.raises(UsageError):
        export_checkpoint(tmp_path / "megatron", tmp_path / "megatron" / inner, options=options)
    with pytest.raises(UsageError):
        export_checkpoint(
            tmp_path / "megatron", super_checkpoint, hf_model=super_checkpoint, options=options
        )
    assert before == files_of(tmp_path / "megatron")


def test_a_file_is_no_target(super_checkpoint: Path, tmp_path: Path) -> None:
    """A regular file is not turned into a directory."""
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(TargetExistsError):
        import_checkpoint(
            super_checkpoint, tmp_path / "note.txt", options=ConversionOptions(overwrite=True)
        )
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_overwriting_through_a_link_keeps_the_link(super_checkpoint: Path, tmp_path: Path) -> None:
    """What the link points to is replaced; nothing is left behind."""
    import_checkpoint(super_checkpoint, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    import_checkpoint(
        super_checkpoint, tmp_path / "link", options=ConversionOptions(overwrite=True)
    )
    assert (tmp_path / "link").is_symlink()
    assert {"hf", "real", "link"} == {path.name for path in tmp_path.iterdir()}


def test_a_bare_configuration_becomes_config_json_and_brings_nothing_along(
    super_checkpoint: Path, tmp_path: Path
) -> None:
    """--hf-model FILE takes that file, not its neighbours."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    (tmp_path / "configs").mkdir()
    shutil.copy(super_checkpoint / "config.json", tmp_path / "configs" / "my.json")
    (tmp_path / "configs" / "other.txt").write_text("not part of it")
    export_checkpoint(
        tmp_path / "megatron", tmp_path / "back", hf_model=tmp_path / "configs" / "my.json"
    )
    assert {"config.json", "model.safetensors"} == {p.name for p in (tmp_path / "back").iterdir()}


def test_an_iteration_directory_given_as_a_dot_finds_the_record(
    super_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path inside the checkpoint is as good as the full one."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    monkeypatch.chdir(tmp_path / "megatron" / "iter_0000000")
    export_checkpoint(Path(), tmp_path / "back")
    assert files_of(super_checkpoint) == files_of(tmp_path / "back")


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


def test_padding_that_is_not_zero_is_found_when_reading_back(
    super_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows no HF tensor holds are looked at too."""
    from bridge.storage import new_checkpoint
    from bridge.transfer import write_files

    def write_and_damage(layouts, directory, *args, **kwargs):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN003, ANN202 (a wrapper of any signature)
        write_files(layouts, directory, *args, **kwargs)
        for payload in layouts[0].payloads:
            if payload.tensor == "embedding.word_embeddings.weight":
                flip_one_bit(directory / layouts[0].path, payload.offset + payload.nbytes - 1)

    monkeypatch.setattr(new_checkpoint, "write_files", write_and_damage)
    with pytest.raises(VerificationError) as caught:
        import_checkpoint(super_checkpoint, tmp_path / "megatron")
    assert "embedding.word_embeddings.weight: 1 padding rows" in caught.value.where[0]
    assert not (tmp_path / "megatron").exists()


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


def test_what_is_not_carried_is_said(super_checkpoint: Path, tmp_path: Path) -> None:
    """Weights in other formats and hidden directories stay behind, by name."""
    (super_checkpoint / "original").mkdir()
    (super_checkpoint / "original" / "consolidated.00.pth").write_bytes(b"x")
    (super_checkpoint / ".cache").mkdir()
    (super_checkpoint / ".cache" / "lock").write_text("")
    (super_checkpoint / "adapter.safetensors").write_bytes(b"x")
    report = import_checkpoint(super_checkpoint, tmp_path / "megatron")
    left = {note for note in report.notes if note.startswith("not carried")}
    assert {
        "not carried: original/consolidated.00.pth",
        "not carried: .cache/lock",
        "not carried: adapter.safetensors",
    } == left


def test_a_kill_between_the_two_renames_of_an_overwrite_loses_nothing(
    super_checkpoint: Path, tmp_path: Path
) -> None:
    """The old target, moved aside by a process that is gone, is put back by the next attempt."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    before = files_of(tmp_path / "megatron")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(timeout=60)
    (tmp_path / "megatron").rename(tmp_path / f".megatron.partial-{gone.pid}-old")
    (tmp_path / f".megatron.partial-{gone.pid}").mkdir()
    with pytest.raises(TargetExistsError):
        import_checkpoint(super_checkpoint, tmp_path / "megatron")
    assert before == files_of(tmp_path / "megatron")
    assert {"hf", "megatron"} == {path.name for path in tmp_path.iterdir()}


def test_a_synthetic_checkpoint_does_not_replace_its_own_configuration(
    super_checkpoint: Path,
) -> None:
    """--overwrite onto the directory the configuration is read from is refused."""
    from bridge.storage.synthetic import synthesize

    before = files_of(super_checkpoint)
    with pytest.raises(UsageError):
        synthesize(
            super_checkpoint / "config.json",
            super_checkpoint,
            seed=0,
            max_shard_size=10**9,
            limits=TransferLimits(),
            overwrite=True,
        )
    assert before == files_of(super_checkpoint)


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
