"""The manifest has the hashes that other tools compute, and finds any byte that has changed."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from safetensors import safe_open

from bridge.conversion import ConversionOptions
from bridge.conversion_job import ConversionJob
from bridge.convert import export_checkpoint, import_checkpoint
from bridge.dtypes import Words
from bridge.errors import CheckpointError, CorruptFileError, UnsafeFileError, VerificationError
from bridge.manifest import FileEntry, Manifest, Part, read_manifest
from bridge.manifest_check import check_manifest
from bridge.reading import TransferLimits
from bridge.storage.files import FileRanges
from bridge.storage.new_checkpoint import NewDirectory
from bridge.storage.source import TensorSource
from bridge.storage.target import MANIFEST_NAME


@pytest.fixture
def pair(super_checkpoint: Path, tmp_path: Path) -> tuple[Path, Path]:
    """An import over several ranks, and an export of it."""
    import_checkpoint(
        super_checkpoint,
        tmp_path / "megatron",
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
    )
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    return tmp_path / "megatron", tmp_path / "back"


def flip(path: Path, position: int) -> None:
    """Change one bit."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def assert_hashes(directory: Path, source: Path) -> None:
    """Every file of both sides is there, by `sha256sum`'s measure, and so is every part of it."""
    manifest = read_manifest(directory)
    assert manifest is not None
    names = {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}
    assert manifest.target.keys() == names - {MANIFEST_NAME}
    weights = {str(p.relative_to(source)) for p in source.rglob("*") if p.stat().st_size > 50_000}
    assert weights
    assert manifest.source.keys() >= weights
    for root, files in ((directory, manifest.target), (source, manifest.source)):
        for name, entry in files.items():
            data = (root / name).read_bytes()
            assert (entry.nbytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
            for part in entry.parts:
                own = data[part.offset : part.offset + part.nbytes]
                assert part.sha256 == hashlib.sha256(own).hexdigest()


def test_its_hashes_are_those_of_the_files_and_tensors(
    pair: tuple[Path, Path], super_checkpoint: Path
) -> None:
    """Of every file on both sides by `sha256sum`'s measure, of tensors by safetensors' reader."""
    import torch

    for directory, source in zip(pair, (super_checkpoint, pair[0]), strict=True):
        assert_hashes(directory, source)
    imported, exported = (read_manifest(directory) for directory in pair)
    assert imported is not None
    assert exported is not None
    for manifest_files in (imported.source, exported.target):
        found = {part.tensor: part for entry in manifest_files.values() for part in entry.parts}
        for shard in super_checkpoint.glob("*.safetensors"):
            with safe_open(shard, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    data = tensors.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes()
                    assert found.pop(name).sha256 == hashlib.sha256(data).hexdigest()
        assert found == {}
    everything = {part.tensor for entry in imported.target.values() for part in entry.parts}
    assert exported.source_tensors.keys() == everything
    sizes, whole = Counter[str](), set()
    for entry in imported.target.values():
        for part in entry.parts:
            sizes[part.tensor] += part.nbytes
    for entry in imported.target.values():
        for part in entry.parts:
            if part.nbytes == sizes[part.tensor]:
                assert part.sha256 == exported.source_tensors[part.tensor]
                whole.add(part.tensor)
    assert whole
    assert whole != everything


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_they_are_so_whatever_is_rounded_and_however_it_is_cut(
    super_checkpoint: Path,
    tmp_path: Path,
    tp: int,
    dtype: Literal["bfloat16", "float16", "float32"] | None,
) -> None:
    """What is compared is then not what lies in the files, and they are hashed by themselves."""
    options = ConversionOptions(dtype=dtype, limits=TransferLimits(memory_budget=1, threads=3))
    import_checkpoint(
        super_checkpoint,
        tmp_path / "megatron",
        tensor_model_parallel_size=tp,
        options=options,
    )
    assert_hashes(tmp_path / "megatron", super_checkpoint)
    export_checkpoint(
        tmp_path / "megatron",
        tmp_path / "back",
        max_shard_size=100_000,
        options=replace(options, dtype="bfloat16" if dtype else None),
    )
    assert_hashes(tmp_path / "back", tmp_path / "megatron")


def test_the_comparison_reads_each_byte_once_and_nobody_reads_it_again(
    super_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is hashed is what was compared: nothing is read for its hash alone."""
    read = Counter[str]()
    read_into, verify = FileRanges.read_into, ConversionJob.verify

    def counted(ranges: FileRanges, name: str, offset: int, out: Words) -> None:
        read[Path(name).name] += out.nbytes
        read_into(ranges, name, offset, out)

    def watched(job: ConversionJob, *sides: TensorSource, **what: Any) -> dict[str, str]:  # noqa: ANN401
        read.clear()
        digests = verify(job, *sides, **what)
        found.append(read.copy())
        return digests

    found: list[Counter[str]] = []
    monkeypatch.setattr(FileRanges, "read_into", counted)
    monkeypatch.setattr(ConversionJob, "verify", watched)
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    imported, exported = found
    for path in super_checkpoint.glob("*.safetensors"):
        (header,) = struct.unpack("<Q", path.read_bytes()[:8])
        assert imported[path.name] == path.stat().st_size
        assert exported[path.name] == path.stat().st_size + 8 + header  # as it was laid out, too


def test_any_byte_that_changes_is_found_with_its_tensor(pair: tuple[Path, Path]) -> None:
    """In headers, between records and in small files, too; healed again, all is well."""
    for directory in pair:
        manifest = read_manifest(directory)
        assert manifest is not None
        for name, entry in manifest.target.items():
            path = directory / name
            places = dict.fromkeys([0, entry.nbytes // 2, entry.nbytes - 1])
            for part in entry.parts:
                places |= dict.fromkeys([part.offset, part.offset + part.nbytes - 1])
            for position in list(places)[::7] if len(places) > 40 else places:
                flip(path, position)
                (found,) = check_manifest(directory).differences
                flip(path, position)
                owner = next(
                    (p.tensor for p in entry.parts if p.offset <= position < p.offset + p.nbytes),
                    "its bytes",
                )
                assert found.startswith(f"{name}: {owner}")
        assert check_manifest(directory).differences == []


def test_the_offsets_are_those_of_the_safetensors_header(pair: tuple[Path, Path]) -> None:
    """What is called a tensor's bytes is what any reader of the format takes for them."""
    manifest = read_manifest(pair[1])
    assert manifest is not None
    for name, entry in manifest.target.items():
        if name.endswith(".safetensors"):
            data = (pair[1] / name).read_bytes()
            (length,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + length])
            header.pop("__metadata__", None)
            assert {part.tensor: part.offset for part in entry.parts} == {
                tensor: 8 + length + one["data_offsets"][0] for tensor, one in header.items()
            }


def test_a_changed_manifest_is_refused(pair: tuple[Path, Path]) -> None:
    """Whichever of its bytes it is: in a hash of its own, in white space, in a name."""
    path = pair[1] / MANIFEST_NAME
    whole = path.read_bytes()
    for position in [*range(0, len(whole), 101), len(whole) - 1, len(whole) - 20]:
        flip(path, position)
        with pytest.raises(CorruptFileError, match="manifest is damaged"):
            check_manifest(pair[1])
        path.write_bytes(whole)
    path.write_bytes(whole[:-10])
    with pytest.raises(CorruptFileError, match="manifest is damaged"):
        check_manifest(pair[1])


def test_files_that_come_and_go_are_named(pair: tuple[Path, Path]) -> None:
    """One that is lost or cut is wrong; one that was added is told."""
    (pair[1] / "config.json").unlink()
    shard = min(pair[1].glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (pair[1] / "README.md").touch()
    report = check_manifest(pair[1])
    assert [text.partition(":")[0] for text in report.differences] == ["config.json", shard.name]
    assert report.not_listed == ["README.md"]
    with pytest.raises(CheckpointError, match=r"no nemotron_bridge\.manifest\.json"):
        check_manifest(pair[1].parent)


@pytest.mark.parametrize("name", ["../hf/config.json", "/etc/passwd", "a/../../b", ""])
def test_a_manifest_that_points_elsewhere_is_refused(pair: tuple[Path, Path], name: str) -> None:
    """Even one whose own hash is right: it may come from a stranger."""
    path = pair[1] / MANIFEST_NAME
    found = json.loads(path.read_bytes())
    found["target"][name] = {"nbytes": 1, "sha256": "0" * 64}
    found["sha256_of_this_file"] = "0" * 64
    unsigned = json.dumps(found, indent=1).encode() + b"\n"
    signed = json.dumps(
        found | {"sha256_of_this_file": hashlib.sha256(unsigned).hexdigest()}, indent=1
    )
    path.write_text(signed + "\n")
    with pytest.raises(CorruptFileError, match="no file of a checkpoint"):
        check_manifest(pair[1])


def test_a_lying_manifest_has_nothing_read_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever tensors it says are where; each of its files is what is different."""
    part = Part(tensor="t", starts=(0,), offset=0, nbytes=1_000_000, sha256="0" * 64)
    odd = [part, replace(part, offset=-5), replace(part, offset=900_000), replace(part, nbytes=-1)]
    files = {
        f"f{n}": FileEntry(nbytes=1_000_000, sha256="0" * 64, parts=(*[one] * 500, *odd))
        for n, one in enumerate(odd)
    }
    for name in files:
        (tmp_path / name).write_bytes(bytes(1_000_000))
    (tmp_path / MANIFEST_NAME).write_bytes(Manifest(target=files).to_json())
    read = []
    read_into = FileRanges.read_into

    def counted(ranges: FileRanges, name: str, offset: int, out: Words) -> None:
        read.append(out.nbytes)
        read_into(ranges, name, offset, out)

    monkeypatch.setattr(FileRanges, "read_into", counted)
    found = {text.partition(":")[0] for text in check_manifest(tmp_path).differences}
    assert found == set(files)
    assert sum(read) <= len(files) * 2_000_000


def test_equal_conversions_have_equal_manifests(super_checkpoint: Path, tmp_path: Path) -> None:
    """It names no path, no time and no number of workers."""
    (tmp_path / "elsewhere").mkdir()
    for place in (tmp_path / "one", tmp_path / "elsewhere" / "two"):
        import_checkpoint(super_checkpoint, place)
    one, two = (place / MANIFEST_NAME for place in (tmp_path / "one", tmp_path / "elsewhere/two"))
    assert one.read_bytes() == two.read_bytes()
    assert str(tmp_path) not in one.read_text()


def test_nothing_vouches_for_what_was_not_compared(super_checkpoint: Path, tmp_path: Path) -> None:
    """Without verification there is no manifest; an import of an export carries none along."""
    options = ConversionOptions(verify="none")
    import_checkpoint(super_checkpoint, tmp_path / "megatron", options=options)
    assert not (tmp_path / "megatron" / MANIFEST_NAME).exists()
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert (tmp_path / "back" / MANIFEST_NAME).exists()
    import_checkpoint(tmp_path / "back", tmp_path / "again")
    assert not (tmp_path / "again" / "hf_source" / MANIFEST_NAME).exists()


@pytest.mark.parametrize("name", ["model.safetensors", "iter_0000000/__9_0.distcp", "model.py"])
def test_a_file_that_a_loader_would_take_is_not_passed_over(
    pair: tuple[Path, Path], name: str
) -> None:
    """Every byte is as it was written, and yet other weights are loaded."""
    for directory in pair:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"")
        (directory / "notes.md").write_text("mine")
        report = check_manifest(directory)
        assert list(report.differences) == [f"{name}: was not there"]
        assert list(report.not_listed) == ["notes.md"]


def test_links_and_pipes_that_came_are_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """They are no files, and no loader asks."""
    os.mkfifo(pair[1] / "pipe")
    (pair[1] / "more").symlink_to(tmp_path)
    assert list(check_manifest(pair[1]).not_listed) == ["more", "pipe"]


@pytest.mark.parametrize("name", [b"back\\slash.txt", b"\xffnotes.txt"])
def test_a_name_that_no_record_can_hold_is_refused_at_once(
    super_checkpoint: Path, tmp_path: Path, name: bytes
) -> None:
    """Not when the manifest is read again."""
    Path(os.fsdecode(os.fsencode(super_checkpoint) + b"/" + name)).touch()
    with pytest.raises(UnsafeFileError, match="no record can hold"):
        import_checkpoint(super_checkpoint, tmp_path / "megatron")


def test_what_is_hashed_has_been_compared(
    super_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit that flips while the target is looked at is in no manifest."""
    verify = ConversionJob.verify

    def late(job: ConversionJob, *sides: TensorSource, **what: Any) -> dict[str, str]:  # noqa: ANN401
        (file,) = (tmp_path / ".megatron.partial" / "data").rglob("__0_0.distcp")
        before = file.read_bytes()
        found = verify(job, *sides, **what)
        assert file.read_bytes() == before
        flip(file, len(before) // 2)
        return found

    monkeypatch.setattr(ConversionJob, "verify", late)
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    assert check_manifest(tmp_path / "megatron").differences


@pytest.mark.parametrize("what", ["gone", "stray", "manifest"])
def test_small_files_that_change_before_the_end_are_noticed(
    super_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """One that is gone, one that nobody wrote, the manifest itself."""
    write = NewDirectory.write_small_file

    def spoil(new: NewDirectory, name: str, data: bytes) -> None:
        if name == MANIFEST_NAME and what == "gone":
            (new.place / "latest_checkpointed_iteration.txt").unlink()
        if name == MANIFEST_NAME and what == "stray":
            (new.place / "stray.bin").touch()
        write(new, name, data)
        if name == MANIFEST_NAME and what == "manifest":
            flip(new.place / name, 100)

    monkeypatch.setattr(NewDirectory, "write_small_file", spoil)
    with pytest.raises(VerificationError):
        import_checkpoint(super_checkpoint, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()
