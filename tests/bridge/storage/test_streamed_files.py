"""Tensors that come one by one end up in files, or one error says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bridge.dtypes import dtype_named
from bridge.errors import CheckpointError
from bridge.hashing import hash_files
from bridge.manifest import Files, entry_of
from bridge.reading import TransferLimits
from bridge.storage.files import write_at
from bridge.storage.safetensors_layout import layout_shards
from bridge.storage.source import TensorInfo
from bridge.storage.streamed_files import StreamedFiles

TENSORS = {
    "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "a": torch.tensor([1.5, -0.0, float("nan")]),
    "empty": torch.zeros(0, 4),
    "c": torch.arange(8, dtype=torch.float32).reshape(2, 4).t(),  # not contiguous
}
LAYOUTS, _ = layout_shards(
    {
        name: TensorInfo(shape=tuple(one.shape), dtype=dtype_named(str(one.dtype)))
        for name, one in TENSORS.items()
    },
    max_shard_size=20,
)


def _read_back(directory: Path) -> Files:
    files = {layout.path: entry_of(layout) for layout in LAYOUTS}
    return hash_files(directory, files, limits=TransferLimits(), advance=lambda _: None)


def test_tensors_may_come_in_any_order(tmp_path: Path) -> None:
    """Safetensors itself reads them back, bit by bit."""
    with StreamedFiles(LAYOUTS, tmp_path) as files:
        for name in sorted(TENSORS):
            files.write(name, TENSORS[name])
    assert files.differences(_read_back(tmp_path)) == []
    found = {
        name: one for layout in LAYOUTS for name, one in load_file(tmp_path / layout.path).items()
    }
    assert len(LAYOUTS) > 1
    assert found.keys() == TENSORS.keys()
    for name, one in TENSORS.items():
        assert found[name].dtype == one.dtype
        assert torch.equal(found[name].nan_to_num(7), one.nan_to_num(7))


def test_a_byte_that_changes_afterwards_is_found(tmp_path: Path) -> None:
    """By the name of its tensor."""
    with StreamedFiles(LAYOUTS, tmp_path) as files:
        for name, one in TENSORS.items():
            files.write(name, one)
    layout = next(one for one in LAYOUTS if any(part.tensor == "c" for part in one.payloads))
    place = next(part for part in layout.payloads if part.tensor == "c").offset
    data = bytearray((tmp_path / layout.path).read_bytes())
    data[place + 2] ^= 1
    (tmp_path / layout.path).write_bytes(data)
    assert files.differences(_read_back(tmp_path)) == ["c"]


@pytest.mark.parametrize("at", ["create", "write"])
def test_a_failure_waits_for_the_end_of_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """The stream is collective: other ranks would wait for ever for one that left it."""
    if at == "create":
        (tmp_path / LAYOUTS[-1].path).write_bytes(b"here already")
    else:

        def full(descriptor: int, data: bytes | memoryview, offset: int) -> None:
            if offset:  # the headers at the start still fit
                raise OSError(28, "No space left on device")
            write_at(descriptor, data, offset)

        monkeypatch.setattr("bridge.storage.new_files.write_at", full)
    seen = []
    with pytest.raises(CheckpointError, match="cannot write the file"):  # noqa: PT012, SIM117 - a stream
        with StreamedFiles(LAYOUTS, tmp_path) as files:
            for name, one in TENSORS.items():
                files.write(name, one)
                seen.append(name)
    assert seen == list(TENSORS)


def test_an_error_of_the_stream_itself_passes(tmp_path: Path) -> None:
    """As it is."""
    with pytest.raises(KeyError, match="mine"), StreamedFiles(LAYOUTS, tmp_path):
        raise KeyError("mine")
