"""Conversion file to file: what comes back is what went in, and what does not is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bridge.conversion import ConversionOptions
from bridge.convert import export_checkpoint, import_checkpoint
from bridge.errors import InconsistentConfigError
from bridge.record import RECORD_NAME, SIDE_DIRECTORY
from bridge.transfer import TransferLimits
from harness.toys import TOYS, Toy, write_checkpoint
from tests.directories import files_of

LAYOUTS = [(1, 1), (2, 1), (1, 2), (4, 2)]


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
    assert {"config.json", "model.safetensors"} == files_of(tmp_path / "back").keys()


def test_an_iteration_directory_given_as_a_dot_finds_the_record(
    super_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path inside the checkpoint is as good as the full one."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    monkeypatch.chdir(tmp_path / "megatron" / "iter_0000000")
    export_checkpoint(Path(), tmp_path / "back")
    assert files_of(super_checkpoint) == files_of(tmp_path / "back")


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
