"""A dtype that is asked for: each element rounded once, counted, verified; nothing otherwise."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge import rounding
from bridge.casting import RoundedSource, config_in
from bridge.conversion import ConversionOptions, DtypeName
from bridge.convert import export_checkpoint, import_checkpoint
from bridge.dtypes import Words, dtype_named
from bridge.errors import CorruptFileError, DtypeMismatchError, VerificationError
from bridge.tiling import Box
from bridge.transfer import TransferLimits
from harness.toys import toy_named, write_checkpoint

MakeSource = Callable[..., Any]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small 51B in float32, in several files."""
    write_checkpoint(toy_named("51b"), tmp_path / "hf", dtype="float32")
    return tmp_path / "hf"


def options(dtype: DtypeName, *, allow_overflow: bool = False) -> ConversionOptions:
    """A conversion to a dtype, in bands far smaller than the tensors."""
    return ConversionOptions(
        dtype=dtype, allow_overflow=allow_overflow, limits=TransferLimits(memory_budget=1 << 20)
    )


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory of weights."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_bits(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor.view(torch.int16), found[name].view(torch.int16)), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("side", ["import", "export"])
def test_either_direction_rounds_as_torch_does(
    source: Path, side: str, dtype: DtypeName, tmp_path: Path
) -> None:
    """The source's own files in the new dtype, and a report with torch's counts."""
    wide = tensors_of(source)
    narrow = {name: tensor.to(getattr(torch, dtype)) for name, tensor in wide.items()}
    asked = options(dtype)
    if side == "import":
        report = import_checkpoint(source, tmp_path / "megatron", options=asked)
        after = export_checkpoint(tmp_path / "megatron", tmp_path / "back")
        assert after.rounding is None
        assert any("hashes of the imported checkpoint" in note for note in after.notes)
    else:
        import_checkpoint(source, tmp_path / "megatron")
        report = export_checkpoint(tmp_path / "megatron", tmp_path / "back", options=asked)
    assert_bits(narrow, tensors_of(tmp_path / "back"))
    assert report.rounding is not None
    same = {name: tensor.to(torch.float32) for name, tensor in narrow.items()}
    changed = sum(int((same[name] != wide[name]).sum()) for name in wide)
    errors = [
        ((same[name].double() - wide[name].double()) / wide[name].double()).nan_to_num().abs().max()
        for name in wide  # zero over zero is no error
    ]
    assert changed == report.rounding["changed"] > 0
    assert float(max(errors)) == pytest.approx(report.rounding["largest_relative_error"])
    assert any(f"rounded to {dtype}" in note and f"{changed:,}" in note for note in report.notes)
    assert report.verified


def test_what_else_there_is_comes_along_in_the_new_dtype(source: Path, tmp_path: Path) -> None:
    """Same files, an index with the new size, a configuration that differs in one field."""
    import_checkpoint(source, tmp_path / "megatron", options=options("bfloat16"))
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    name = "model.safetensors.index.json"
    old, new = (json.loads((path / name).read_text()) for path in (source, tmp_path / "back"))
    assert old["weight_map"] == new["weight_map"]
    assert old["metadata"]["total_size"] == 2 * new["metadata"]["total_size"]
    config = json.loads((source / "config.json").read_text())
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config | {"torch_dtype": "bfloat16"} == written
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name not in {name, "config.json"}:
            assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()


def test_a_wider_dtype_is_exact_and_comes_back(tmp_path: Path) -> None:
    """bfloat16 to float32 changes no value, and rounding it again gives the bits it came from."""
    write_checkpoint(toy_named("nano-8b"), tmp_path / "hf", dtype="bfloat16")
    report = import_checkpoint(tmp_path / "hf", tmp_path / "wide", options=options("float32"))
    assert report.rounding is not None
    assert report.rounding["changed"] == 0
    assert any("every element is exact in float32" in note for note in report.notes)
    export_checkpoint(tmp_path / "wide", tmp_path / "back", options=options("bfloat16"))
    assert_bits(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back"))


def test_asking_for_the_dtype_there_is_changes_nothing(source: Path, tmp_path: Path) -> None:
    """Bytes in are bytes out, and the report says nothing of rounding."""
    report = import_checkpoint(source, tmp_path / "megatron", options=options("float32"))
    assert report.rounding is None
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", options=options("float32"))
    for path in source.iterdir():
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()


def test_a_configuration_of_another_dtype_than_the_weights(source: Path, tmp_path: Path) -> None:
    """An import gives it back; --dtype of what is there mends it, and so does another's config."""
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    import_checkpoint(source, tmp_path / "megatron")

    def exported(name: str, **given: Any) -> tuple[bytes, str]:  # noqa: ANN401 - passed on
        report = export_checkpoint(tmp_path / "megatron", tmp_path / name, **given)
        return (tmp_path / name / "config.json").read_bytes(), "; ".join(report.notes)

    assert exported("back")[0] == (source / "config.json").read_bytes()
    for given, word in (
        ({"options": options("float32")}, "every element is exact in float32"),
        ({"hf_model": source}, "config.json says float32, the weights' dtype"),
    ):
        written, notes = exported(next(iter(given)), **given)
        assert json.loads(written)["torch_dtype"] == "float32"
        assert word in notes
    again = tmp_path / "again"
    report = import_checkpoint(source, again, options=options("float32"))
    kept = json.loads((again / "hf_source" / "config.json").read_text())
    assert kept["torch_dtype"] == "float32"
    assert any("every element is exact in float32" in note for note in report.notes)


def put(directory: Path, name: str, value: float) -> None:
    """Set one element of a tensor on the disk."""
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name].view(-1)[3] = value
            save_file(tensors, path, metadata={"format": "pt"})


def test_overflow_is_refused_by_name_or_allowed_by_word(source: Path, tmp_path: Path) -> None:
    """65,520 is the first value that float16 rounds to infinity; what is infinite stays so."""
    wide = ["model.layers.0.mlp.up_proj.weight", "model.layers.4.self_attn.k_proj.weight"]
    for name, value in zip(wide, (65520.0, -1e30), strict=True):
        put(source, name, value)
    put(source, "model.norm.weight", float("inf"))
    put(source, "lm_head.weight", 65519.0)
    with pytest.raises(DtypeMismatchError, match="2 elements of 2 tensors") as caught:
        import_checkpoint(source, tmp_path / "megatron", options=options("float16"))
    assert [f"{name}: 1" for name in wide] == sorted(caught.value.where)
    assert not (tmp_path / "megatron").exists()
    allowed = options("float16", allow_overflow=True)
    report = import_checkpoint(source, tmp_path / "megatron", options=allowed)
    assert report.rounding is not None
    assert report.rounding["overflowed"] == 2
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    found = tensors_of(tmp_path / "back")
    assert float(found[wide[0]].view(-1)[3]) == float("inf")
    assert float(found["lm_head.weight"].view(-1)[3]) == 65504.0


def test_what_becomes_zero_is_counted(source: Path, tmp_path: Path) -> None:
    """A relative error of one says that something vanished; the count says how much."""
    put(source, "lm_head.weight", 1e-30)
    report = import_checkpoint(source, tmp_path / "megatron", options=options("float16"))
    assert report.rounding is not None
    assert report.rounding["underflowed"] == 1
    assert report.rounding["largest_relative_error"] == 1.0


def cut_off(values: np.ndarray[Any, Any]) -> Words:
    """Bfloat16 by truncation, as a shift does it."""
    found: Words = (values.view("<u4") >> np.uint32(16)).astype("<u2")
    return found


def up_at_ties(values: np.ndarray[Any, Any]) -> Words:
    """Bfloat16 with ties away from zero."""
    bits = values.view("<u4").astype("<u8")
    found: Words = ((bits + np.uint64(0x8000)) >> np.uint64(16)).astype("<u2")
    return found


@pytest.mark.parametrize("wrong", [cut_off, up_at_ties])
def test_a_wrong_rounding_does_not_pass_verification(
    source: Path, wrong: Callable[..., Words], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It rounds by another way of its own, so that one mistake is not made twice."""
    put(source, "lm_head.weight", 1 + 2.0**-8)  # a tie; truncation and nearest even agree
    put(source, "model.norm.weight", 1 + 3 * 2.0**-8)  # a tie that goes up
    put(source, "model.embed_tokens.weight", 1 + 2.0**-8)
    monkeypatch.setattr(rounding, "_bfloat16_words", wrong)
    with pytest.raises(VerificationError, match="differ from their source"):
        import_checkpoint(source, tmp_path / "megatron", options=options("bfloat16"))
    assert not (tmp_path / "megatron").exists()


def test_tensors_of_several_dtypes_come_together(source: Path, tmp_path: Path) -> None:
    """What could not be fused for its mixed dtypes can be, once one is asked for."""
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        mixed = {
            name: tensor.to(torch.bfloat16) if "up_proj" in name else tensor
            for name, tensor in tensors.items()
        }
        save_file(mixed, path, metadata={"format": "pt"})
    with pytest.raises(DtypeMismatchError):
        import_checkpoint(source, tmp_path / "megatron")
    import_checkpoint(source, tmp_path / "megatron", options=options("bfloat16"))


def test_rounding_takes_bounded_memory(array_source: MakeSource) -> None:
    """Pieces of a box are rounded one after the other, whatever the box."""
    wide = array_source({"w": np.ones((4096, 1024), np.float32)})
    out = np.empty((4096, 1024), np.uint16)
    one = RoundedSource(wide, dtype_named("bfloat16"), rounding=rounding.round_by_definition)
    tracemalloc.start()
    one.read_into("w", Box.whole(out.shape), out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (out == 0x3F80).all()
    assert peak < 14 << 20


@pytest.mark.parametrize("stated", ["torch_dtype", "dtype"])
def test_the_configuration_keeps_the_key_it_has(stated: str) -> None:
    """Transformers 4 says `torch_dtype`, 5 says `dtype`; numbers keep their form."""
    data = json.dumps({stated: "float32", "ffn_mult": 39.0, "n": 39}).encode()
    found = config_in(data, dtype_named("bfloat16"), where="config.json")
    assert json.loads(found) == {stated: "bfloat16", "ffn_mult": 39.0, "n": 39}
    assert b"39.0" in found
    with pytest.raises(CorruptFileError):
        config_in(b"[]", dtype_named("bfloat16"), where="config.json")


@pytest.mark.parametrize(("size", "files"), [(1 << 60, 1), (400_000, 11)])
def test_files_of_a_size_that_is_asked_for(
    source: Path, size: int, files: int, tmp_path: Path
) -> None:
    """An import's own division gives way; the tensors are those of the import all the same."""
    import_checkpoint(source, tmp_path / "megatron")
    report = export_checkpoint(tmp_path / "megatron", tmp_path / "back", max_shard_size=size)
    written = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    largest = max(tensor.numel() * 4 for tensor in tensors_of(source).values())
    for name in written:
        assert sum(
            tensor.numel() * 4 for tensor in load_file(tmp_path / "back" / name).values()
        ) <= max(size, largest)
    assert (files == 1) == (written == ["model.safetensors"])
    assert (files == 1) == (not (tmp_path / "back" / "model.safetensors.index.json").exists())
    assert any("hashes of the imported checkpoint" in note for note in report.notes)
