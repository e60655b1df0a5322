"""What was written is read back: any bit of it that differs is found before the target appears."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from bridge.convert import export_checkpoint, import_checkpoint
from bridge.errors import (
    VerificationError,
)
from tests.directories import flip_one_bit


def test_one_flipped_bit_in_the_written_checkpoint_is_found_and_named(
    super_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read-back compares every bit and says which element of which tensor differs."""
    from bridge.storage import new_checkpoint
    from bridge.transfer import write_files

    def write_and_damage(layouts, directory, *args, **kwargs):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN003, ANN202 (a wrapper of any signature)
        written = write_files(layouts, directory, *args, **kwargs)
        payload = layouts[0].payloads[3]
        flip_one_bit(directory / layouts[0].path, payload.offset + payload.nbytes // 2)
        return written

    monkeypatch.setattr(new_checkpoint, "write_files", write_and_damage)
    with pytest.raises(VerificationError) as caught:
        import_checkpoint(super_checkpoint, tmp_path / "megatron")
    assert len(caught.value.where) == 1
    assert "1 elements differ" in caught.value.where[0]
    assert not (tmp_path / "megatron").exists()


@pytest.mark.parametrize(
    ("what", "marker", "skip"),
    [("import", b"PK\3\4", 12), ("import", b"archive/data/0", 14 - 30), ("export", b'"pt"', 1)],
    ids=["date", "checksum", "format"],
)
def test_a_flipped_bit_around_the_tensors_is_found_though_no_reader_minds(
    super_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    marker: bytes,
    skip: int,
) -> None:
    """The date of an entry of an archive, a tensor's checksum, safetensors' metadata."""
    from bridge.storage import new_checkpoint
    from bridge.transfer import write_files

    def write_and_damage(layouts, directory, *args, **kwargs):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN003, ANN202 (a wrapper of any signature)
        written = write_files(layouts, directory, *args, **kwargs)
        file = directory / layouts[0].path
        places.append(file.read_bytes().index(marker) + skip)
        flip_one_bit(file, places[0])
        return written

    places: list[int] = []
    convert: Callable[..., object] = import_checkpoint
    source = super_checkpoint
    if what == "export":
        import_checkpoint(super_checkpoint, tmp_path / "megatron")
        convert = partial(export_checkpoint, max_shard_size=1 << 20)
        source = tmp_path / "megatron"
    monkeypatch.setattr(new_checkpoint, "write_files", write_and_damage)
    with pytest.raises(VerificationError, match="around their tensors") as caught:
        convert(source, tmp_path / "target")
    (place,) = caught.value.where
    assert place.endswith(f": byte {places[0]}")
    assert not (tmp_path / "target").exists()


def test_padding_that_is_not_zero_is_found_when_reading_back(
    super_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows no HF tensor holds are looked at too."""
    from bridge.storage import new_checkpoint
    from bridge.transfer import write_files

    def write_and_damage(layouts, directory, *args, **kwargs):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN003, ANN202 (a wrapper of any signature)
        written = write_files(layouts, directory, *args, **kwargs)
        for payload in layouts[0].payloads:
            if payload.tensor == "embedding.word_embeddings.weight":
                flip_one_bit(directory / layouts[0].path, payload.offset + payload.nbytes - 1)
        return written

    monkeypatch.setattr(new_checkpoint, "write_files", write_and_damage)
    with pytest.raises(VerificationError) as caught:
        import_checkpoint(super_checkpoint, tmp_path / "megatron")
    assert "embedding.word_embeddings.weight: 1 padding rows" in caught.value.where[0]
    assert not (tmp_path / "megatron").exists()
