"""Laid-out checkpoints, once filled, are loaded by torch and by Megatron-Core, bit for bit."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from bridge.dtypes import Words, dtype_named
from bridge.errors import PlanError
from bridge.storage.source import FileLayout
from bridge.storage.torch_dist_write import (
    CheckpointLayout,
    Chunk,
    empty_extra_state,
    extra_state_key,
    iteration_directory,
    layout_checkpoint,
)
from bridge.tiling import Box

BF16, F32 = dtype_named("bfloat16"), dtype_named("float32")
STACKED = "decoder.layers.mlp.linear_fc1.weight"
SINGLE = "decoder.layers.1.mlp.linear_fc2.weight"
RANKS = Path(__file__).with_name("megatron_ranks.py")


def words() -> dict[str, Words]:
    """Key to elements: every bit pattern of the stacked tensor is different."""
    return {
        STACKED: np.arange(2 * 6 * 4, dtype="<u2").reshape(2, 6, 4) + 0x3F00,
        SINGLE: np.arange(40, dtype="<f4").reshape(4, 10).view("<u4"),
    }


def chunks() -> list[Chunk]:
    """Gate and up of two stacked layers apart, and one matrix cut by columns."""
    stacked = [
        Chunk(
            key=STACKED,
            global_shape=(2, 6, 4),
            dtype=BF16,
            box=Box((layer, half, 0), (layer + 1, half + 3, 4)),
        )
        for layer in range(2)
        for half in (0, 3)
    ]
    single = [
        Chunk(
            key=SINGLE,
            global_shape=(4, 10),
            dtype=F32,
            box=Box((0, start), (4, stop)),
            file_group="1",
        )
        for start, stop in ((0, 3), (3, 10))
    ]
    return [*stacked, *single]


def objects() -> dict[str, bytes]:
    """The `_extra_state` of both layers."""
    module = "decoder.layers.mlp.linear_fc1"
    return {extra_state_key(module, shard=n, num_shards=2): empty_extra_state() for n in range(2)}


ARGS: Mapping[str, object] = {"hidden_size": 4, "params_dtype": BF16, "load": None, "eps": 1e-5}


def fill(root: Path, layout: CheckpointLayout, source: Mapping[str, Words]) -> Path:
    """Write the files as the converter will: literals, payloads, then their CRC-32s."""
    for file in layout.files:
        path = root / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            stream.truncate(file.size)
            for offset, data in file.literals:
                stream.seek(offset)
                stream.write(data)
            for payload in file.payloads:
                data = source[payload.tensor][payload.box.slices].tobytes()
                assert payload.nbytes == len(data)
                for offset, part in (
                    (payload.offset, data),
                    *((at, struct.pack("<I", zlib.crc32(data))) for at in payload.crc32_at),
                ):
                    stream.seek(offset)
                    stream.write(part)
    for name, data in layout.small_files.items():
        (root / name).write_bytes(data)
    return root / iteration_directory(0)


def bits(tensor: torch.Tensor) -> list[int]:
    """The elements' bit patterns."""
    word = {2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
    return [int(value) for value in tensor.contiguous().view(word).flatten()]


def assert_covers(file: FileLayout) -> None:
    """Every byte of a file is in one literal or one payload."""
    pieces = [(offset, len(data)) for offset, data in file.literals]
    pieces += [(payload.offset, payload.nbytes) for payload in file.payloads]
    position = 0
    for offset, size in sorted(pieces):
        assert position == offset
        position += size
    assert file.size == position


def test_plain_torch_loads_the_checkpoint_bitwise(tmp_path: Path) -> None:
    """`torch.distributed.checkpoint.load` without any process group, into plain tensors."""
    iteration = fill(tmp_path, layout_checkpoint(chunks(), objects(), args=ARGS), words())
    state = {
        STACKED: torch.zeros(2, 6, 4, dtype=torch.bfloat16),
        SINGLE: torch.zeros(4, 10),
    }
    dcp_load(state, checkpoint_id=iteration, no_dist=True)
    for key, tensor in state.items():
        assert words()[key].astype(f"<i{tensor.dtype.itemsize}").flatten().tolist() == bits(tensor)


@pytest.mark.ranks
def test_megatron_core_loads_the_checkpoint_bitwise(tmp_path: Path) -> None:
    """`dist_checkpointing.load`, strict both ways: stacked and per-layer keys, objects, args."""
    iteration = fill(tmp_path, layout_checkpoint(chunks(), objects(), args=ARGS), words())
    run = subprocess.run(  # noqa: S603 - our own script
        [sys.executable, str(RANKS), "load", str(iteration), "0", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    loaded = torch.load(iteration / "loaded.pt", weights_only=False)
    stacked, single = words()[STACKED], words()[SINGLE]
    for layer in range(2):
        assert stacked[layer].flatten().tolist() == bits(loaded["stacked"][str(layer)])
    assert single.flatten().tolist() == bits(loaded["single"])
    assert [tuple(tensor.shape) for tensor in loaded["extra"]] == [(0,)] * 2
    assert loaded["args"] == Namespace(
        hidden_size=4, params_dtype=torch.bfloat16, load=None, eps=1e-5
    )
    assert (loaded["checkpoint_version"], loaded["iteration"]) == (3.0, 0)
    assert loaded["content_metadata"] == {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def test_small_files_say_what_megatron_looks_for(tmp_path: Path) -> None:
    """The tracker, the four fields of metadata.json, and a common.pt that is safe to load."""
    layout = layout_checkpoint(chunks(), objects(), args=ARGS, iteration=12, common={"x": [1]})
    assert list(layout.small_files)[-1] == "latest_checkpointed_iteration.txt"
    assert layout.small_files["latest_checkpointed_iteration.txt"] == b"12"
    assert json.loads(layout.small_files["iter_0000012/metadata.json"]) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    path = tmp_path / "common.pt"
    path.write_bytes(layout.small_files["iter_0000012/common.pt"])
    with torch.serialization.safe_globals([Namespace]):
        common = torch.load(path, weights_only=True)
    assert (common["iteration"], common["x"]) == (12, [1])
    assert common["args"].params_dtype is torch.bfloat16
    assert all(file.path.startswith("iter_0000012/__") for file in layout.files)


def test_metadata_equals_what_torch_would_have_built(tmp_path: Path) -> None:
    """Read by torch's own reader: shapes, offsets, properties, and one record for each index."""
    layout = layout_checkpoint(chunks(), objects(), args=ARGS)
    metadata = FileSystemReader(fill(tmp_path, layout, words())).read_metadata()
    stacked = metadata.state_dict_metadata[STACKED]
    assert isinstance(stacked, dcp.TensorStorageMetadata)
    assert torch.Size([2, 6, 4]) == stacked.size
    assert stacked.properties == dcp.TensorProperties(torch.bfloat16)
    assert [torch.Size([1, 3, 4])] * 4 == [chunk.sizes for chunk in stacked.chunks]
    assert metadata.storage_data is not None
    for chunk in chunks():
        index = dcp.MetadataIndex(chunk.key, chunk.box.starts)
        assert metadata.storage_data[index].relative_path == f"__{chunk.file_group}_0.distcp"
    for key in objects():
        assert isinstance(metadata.state_dict_metadata[key], dcp.BytesStorageMetadata)
        assert metadata.storage_data[dcp.MetadataIndex(key)].length == len(empty_extra_state())
    assert len(metadata.storage_data) == 8


def test_every_byte_of_every_file_is_laid_out_once() -> None:
    """Literals and payloads cover each file without gap or overlap, payloads aligned to 64."""
    layout = layout_checkpoint(chunks(), objects(), args=ARGS)
    for file in layout.files:
        assert_covers(file)
        assert all(payload.offset % 64 == 0 for payload in file.payloads)
    payloads = [(p.tensor, p.box) for file in layout.files for p in file.payloads]
    assert [(chunk.key, chunk.box) for chunk in chunks()] == payloads


def test_every_record_is_a_valid_zip_archive(tmp_path: Path) -> None:
    """The CRC-32s land where they belong in files of many records."""
    iteration = fill(tmp_path, layout_checkpoint(chunks(), objects(), args=ARGS), words())
    metadata = FileSystemReader(iteration).read_metadata()
    assert metadata.storage_data is not None
    for info in metadata.storage_data.values():
        record = tmp_path / "record.zip"
        data = (iteration / info.relative_path).read_bytes()
        record.write_bytes(data[info.offset : info.offset + info.length])
        with zipfile.ZipFile(record) as archive:
            assert archive.testzip() is None


@pytest.mark.parametrize("max_file_size", [1, 2500, 4000, 1 << 30])
def test_files_are_cut_between_records(max_file_size: int, tmp_path: Path) -> None:
    """No file is longer than allowed unless one record is, and all of them still load."""
    layout = layout_checkpoint(chunks(), objects(), args=ARGS, max_file_size=max_file_size)
    for file in layout.files:
        assert_covers(file)
        assert file.size <= max_file_size or len(file.payloads) <= 1
    names = [file.path for file in layout.files]
    assert len(names) == len(set(names)) >= 2
    if max_file_size == 1:
        assert len(names) == len(chunks()) + len(objects())
    state = {STACKED: torch.zeros(2, 6, 4, dtype=torch.bfloat16)}
    dcp_load(state, checkpoint_id=fill(tmp_path, layout, words()), no_dist=True)
    assert words()[STACKED].flatten().tolist() == bits(state[STACKED])


def test_scalars_and_empty_tensors_are_stored(tmp_path: Path) -> None:
    """A tensor of no dimension has one element; one of no element has no payload."""
    source = {"scalar": np.array(0x3F80, "<u2"), "empty": np.zeros((0, 4), "<u4")}
    some = [
        Chunk(key="scalar", global_shape=(), dtype=BF16, box=Box((), ())),
        Chunk(key="empty", global_shape=(0, 4), dtype=F32, box=Box.whole((0, 4))),
    ]
    layout = layout_checkpoint(some, {}, args={})
    assert [payload.tensor for payload in layout.files[0].payloads] == ["scalar"]
    state = {"scalar": torch.zeros((), dtype=torch.bfloat16), "empty": torch.ones(0, 4)}
    dcp_load(state, checkpoint_id=fill(tmp_path, layout, source), no_dist=True)
    assert state["scalar"].item() == 1.0


def test_the_same_input_gives_the_same_bytes() -> None:
    """Every file, `.metadata` included."""
    one, two = (layout_checkpoint(chunks(), objects(), args=dict(ARGS)) for _ in range(2))
    assert one == two


def bad(first: Box, second: Box) -> list[Chunk]:
    """Two chunks of a (4, 4) tensor."""
    return [Chunk(key="w", global_shape=(4, 4), dtype=F32, box=box) for box in (first, second)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (bad(Box((0, 0), (3, 4)), Box((2, 0), (4, 4))), "overlap"),
        (bad(Box((0, 0), (2, 4)), Box((3, 0), (4, 4))), "do not make up"),
        (bad(Box((0, 0), (2, 4)), Box((4, 0), (6, 4))), "sticks out"),
        (bad(Box((0, 0), (4, 4)), Box((0, 0), (4, 4))), "overlap"),
        (
            [
                Chunk(key="w", global_shape=(2,), dtype=F32, box=Box((0,), (1,))),
                Chunk(key="w", global_shape=(2,), dtype=BF16, box=Box((1,), (2,))),
            ],
            "disagree",
        ),
    ],
)
def test_chunks_that_do_not_partition_their_tensor_are_refused(
    wrong: Sequence[Chunk], message: str
) -> None:
    """Nothing is laid out for a plan that leaves holes, overlaps or contradicts itself."""
    with pytest.raises(PlanError, match=message):
        layout_checkpoint(wrong, {}, args={})


def test_a_key_cannot_be_both_tensor_and_object() -> None:
    """`.metadata` has one entry per key."""
    with pytest.raises(PlanError, match="both"):
        layout_checkpoint(chunks(), {SINGLE: b""}, args={})
