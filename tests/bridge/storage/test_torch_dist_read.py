"""What Megatron-Core and torch write is read back bit for bit; what is damaged is named."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from bridge.dtypes import Words, dtype_named
from bridge.errors import CheckpointError, CorruptFileError, DtypeMismatchError
from bridge.storage.pickle_objects import Inert
from bridge.storage.torch_dist_iteration import open_checkpoint
from bridge.storage.torch_dist_read import TorchDistReader
from bridge.tiling import Box

RANKS = Path(__file__).with_name("megatron_ranks.py")
CONFIG = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


def expected() -> dict[str, torch.Tensor]:
    """What `megatron_ranks.py` saves, said once more: key to global tensor."""
    layer = torch.arange(24 * 16, dtype=torch.float32).reshape(24, 16)
    return {
        "decoder.columns.weight": layer,
        "decoder.rows.weight": (layer % 256).to(torch.bfloat16),
        "decoder.norm.weight": torch.linspace(0, 1, 5, dtype=torch.float64),
        "decoder.layers.weight": torch.stack([layer, layer + 1000, layer + 2000]),
        "decoder.layers.norm": torch.arange(15).reshape(3, 5),
    }


def as_words(tensor: torch.Tensor) -> Words:
    """The bit patterns of a tensor."""
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return tensor.contiguous().view(word).numpy().view(f"<u{tensor.dtype.itemsize}")


@pytest.fixture(scope="session")
def megatron_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of checkpoints that two real Megatron-Core ranks wrote over gloo."""
    directory = tmp_path_factory.mktemp("megatron")
    ranks = [
        subprocess.Popen(  # noqa: S603 - our own script
            [sys.executable, str(RANKS), "save", str(directory), str(rank), "2"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=240)
            assert rank.returncode == 0, errors[-3000:]
    finally:
        for rank in ranks:
            rank.kill()
    return directory


@pytest.fixture(params=["tp1", "tp2"])
def megatron_checkpoint(request: pytest.FixtureRequest, megatron_checkpoints: Path) -> Path:
    """The iteration's directory, saved whole and saved cut over two ranks."""
    return megatron_checkpoints / str(request.param) / "iter_0000007"


def read(reader: TorchDistReader, key: str, box: Box | None = None) -> Words:
    """Read a box into a fresh array."""
    info = reader.tensors[key]
    box = box or Box.whole(info.shape)
    out = np.full(box.shape, 0xAB, info.dtype.word)
    reader.read_into(key, box, out)
    return out


@pytest.mark.ranks
def test_what_megatron_saved_is_read_bitwise(megatron_checkpoint: Path) -> None:
    """Keys, shapes, dtypes and elements, from one rank and from two cut by rows and columns."""
    with TorchDistReader(megatron_checkpoint) as reader:
        assert expected().keys() == reader.tensors.keys()
        for key, tensor in expected().items():
            info = reader.tensors[key]
            assert tuple(tensor.shape) == info.shape
            assert dtype_named(str(tensor.dtype)) == info.dtype
            np.testing.assert_array_equal(as_words(tensor), read(reader, key))


@pytest.mark.ranks
def test_common_state_and_objects_of_megatron_are_read(megatron_checkpoint: Path) -> None:
    """`args` with dtype and enum, the iteration, the content metadata, the `_extra_state`."""
    with TorchDistReader(megatron_checkpoint) as reader:
        common = reader.common()
        objects = {key: reader.read_object(key) for key in reader.objects}
    args = common["args"]
    assert isinstance(args, Namespace)
    assert args.hidden_size == 16
    assert dtype_named("bfloat16") == args.params_dtype
    assert isinstance(args.attention_backend, Inert)
    assert args.attention_backend.qualname == "AttnBackend"
    assert (common["iteration"], common["checkpoint_version"]) == (7, 3.0)
    assert common["content_metadata"] == {"singleton_local_shards": False}
    assert objects == {"decoder._extra_state/shard_0_1": [{"scale": 1.5}]}
    assert (megatron_checkpoint, 7) == open_checkpoint(megatron_checkpoint)


@pytest.mark.ranks
@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_box_of_a_megatron_tensor_is_read_bitwise(
    megatron_checkpoint: Path, data: st.DataObject
) -> None:
    """Boxes across the ranks' chunks, into contiguous and into strided arrays."""
    key = data.draw(st.sampled_from(sorted(expected())))
    whole = as_words(expected()[key])
    box = data.draw(boxes(whole.shape))
    with TorchDistReader(megatron_checkpoint) as reader:
        np.testing.assert_array_equal(whole[box.slices], read(reader, key, box))
        frame = np.zeros(tuple(2 * extent + 1 for extent in box.shape), whole.dtype)
        out = frame[tuple(slice(1, None, 2) for _ in box.shape)]
        reader.read_into(key, box, out)
    np.testing.assert_array_equal(whole[box.slices], out)
    assert np.count_nonzero(frame) == np.count_nonzero(out)


def boxes(shape: Sequence[int]) -> st.SearchStrategy[Box]:
    """Any box of a tensor, empty ones included."""
    ranges = st.tuples(
        *(st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted) for n in shape)
    )
    return ranges.map(lambda pairs: Box(tuple(a for a, _ in pairs), tuple(b for _, b in pairs)))


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, tuple[torch.Tensor, Sequence[Sequence[int]]]],
    objects: Mapping[str, object] | None = None,
    change: Callable[[dcp.Metadata], None] = lambda _: None,
) -> Path:
    """Write a checkpoint with torch's own classes: key to tensor and the cuts of each axis."""
    directory.mkdir(parents=True, exist_ok=True)
    entries: dict[str, Any] = {}
    storage: dict[dcp.MetadataIndex, _StorageInfo] = {}
    with (directory / "__0_0.distcp").open("wb") as stream:

        def store(index: dcp.MetadataIndex, value: object) -> None:
            offset = stream.tell()
            torch.save(value, stream)
            storage[index] = _StorageInfo("__0_0.distcp", offset, stream.tell() - offset)

        for key, (tensor, cuts) in tensors.items():
            chunks = []
            for ranges in product(*map(pairwise, cuts)):
                part = tensor[tuple(slice(a, b) for a, b in ranges)].clone()
                offsets = torch.Size([a for a, _ in ranges])
                chunks.append(dcp.ChunkStorageMetadata(offsets, part.shape))
                store(dcp.MetadataIndex(key, offsets), part)
            properties = dcp.TensorProperties(tensor.dtype)
            entries[key] = dcp.TensorStorageMetadata(properties, tensor.shape, chunks)
        for key, value in (objects or {}).items():
            store(dcp.MetadataIndex(key), value)
            entries[key] = dcp.BytesStorageMetadata()
    metadata = dcp.Metadata(entries, None, storage)
    change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    (directory / "metadata.json").write_text(json.dumps(CONFIG))
    torch.save({"iteration": 3}, directory / "common.pt")
    return directory


def plain(directory: Path, change: Callable[[dcp.Metadata], None] = lambda _: None) -> Path:
    """A checkpoint of one (6, 4) tensor cut by rows, and one that is whole."""
    tensors: dict[str, tuple[torch.Tensor, list[tuple[int, ...]]]] = {
        "w": (torch.arange(24.0).reshape(6, 4), [(0, 2, 6), (0, 4)]),
        "v": (torch.arange(3), [(0, 3)]),
    }
    return write_checkpoint(directory, tensors, {"w._extra_state/shard_0_1": [None]}, change)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_box_is_assembled_from_any_grid(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Shapes of no to four dimensions, cut anywhere along every axis."""
    shape = data.draw(st.lists(st.integers(1, 7), max_size=4))
    cuts: list[list[int]] = [sorted({0, n, *data.draw(st.sets(st.integers(0, n)))}) for n in shape]
    tensor = torch.arange(int(np.prod(shape)), dtype=torch.int32).reshape(shape)
    directory = write_checkpoint(tmp_path_factory.mktemp("grid"), {"t": (tensor, cuts)})
    box = data.draw(boxes(shape))
    with TorchDistReader(directory) as reader:
        assert len(reader.chunks("t")) == np.prod([len(cut) - 1 for cut in cuts])
        np.testing.assert_array_equal(as_words(tensor)[box.slices], read(reader, "t", box))


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_extent_is_exactly_the_bytes_of_its_box(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A lone extent's bytes are the box's; it is alone whenever whole rows lie in one chunk."""
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    cuts: list[list[int]] = [sorted({0, data.draw(st.integers(0, n)), n}) for n in shape]
    tensor = torch.arange(int(np.prod(shape)), dtype=torch.int16).reshape(shape)
    directory = write_checkpoint(tmp_path_factory.mktemp("extent"), {"t": (tensor, cuts)})
    box = data.draw(boxes(shape).filter(lambda box: box.volume > 0))
    with TorchDistReader(directory) as reader:
        extents = reader.extents("t", box)
        one_chunk = any(chunk.intersect(box) == box for chunk in reader.chunks("t"))
    rows = box.shape[1:] == tuple(shape[1:])
    if extents is None or len(extents) != 1:
        assert not (one_chunk and rows)
    else:
        assert one_chunk
        path, offset, nbytes = extents[0]
        data_there = path.read_bytes()[offset : offset + nbytes]
        assert as_words(tensor)[box.slices].tobytes() == data_there


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_extents_are_the_bytes_of_their_box_one_after_the_other(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Across chunks too, and there are some whenever the chunks are blocks of complete rows."""
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    by_rows = data.draw(st.booleans())
    cuts: list[list[int]] = [
        sorted({0, data.draw(st.integers(0, n)), n}) if not axis or not by_rows else [0, n]
        for axis, n in enumerate(shape)
    ]
    tensor = torch.arange(int(np.prod(shape)), dtype=torch.int16).reshape(shape)
    directory = write_checkpoint(tmp_path_factory.mktemp("extents"), {"t": (tensor, cuts)})
    box = data.draw(boxes(shape).filter(lambda box: box.volume > 0))
    with TorchDistReader(directory) as reader:
        extents = reader.extents("t", box)
    if extents is None:
        assert not (by_rows and box.shape[1:] == tuple(shape[1:]))
        return
    there = b"".join(
        path.read_bytes()[offset : offset + nbytes] for path, offset, nbytes in extents
    )
    assert as_words(tensor)[box.slices].tobytes() == there


def test_wide_and_narrow_column_slices_are_read(tmp_path: Path) -> None:
    """Rows above and below the size from which they are read one by one."""
    tensor = torch.arange(6 * 5000, dtype=torch.int32).reshape(2, 3, 5000)
    directory = write_checkpoint(tmp_path / "wide", {"t": (tensor, [(0, 2), (0, 3), (0, 5000)])})
    with TorchDistReader(directory) as reader:
        for box in (Box((0, 1, 7), (2, 3, 4990)), Box((1, 0, 4990), (2, 3, 4999))):
            np.testing.assert_array_equal(as_words(tensor)[box.slices], read(reader, "t", box))


def test_threads_read_at_once(tmp_path: Path) -> None:
    """Eight threads on one reader see the same bytes as one."""
    tensor = torch.arange(64 * 50, dtype=torch.int32).reshape(64, 50)
    directory = write_checkpoint(
        tmp_path / "threads", {"t": (tensor, [tuple(range(65)), (0, 20, 50)])}
    )
    with TorchDistReader(directory) as reader, ThreadPoolExecutor(8) as pool:
        rows = pool.map(lambda n: read(reader, "t", Box((n % 64, 0), (n % 64 + 1, 50))), range(512))
        for number, row in enumerate(rows):
            np.testing.assert_array_equal(as_words(tensor)[number % 64][None], row)


def test_common_state_stored_as_an_object_is_found(tmp_path: Path) -> None:
    """Megatron-Core 0.17 and later write no common.pt, and two fields of metadata.json."""
    tensors = {"w": (torch.zeros(2), [(0, 2)])}
    common = {"iteration": 5, "args": Namespace(num_layers=2)}
    directory = write_checkpoint(tmp_path / "new", tensors, {"common_state/shard_0_1": [common]})
    (directory / "common.pt").unlink()
    with TorchDistReader(directory) as reader:
        assert common == reader.common()
    assert (directory, 5) == open_checkpoint(directory)


def test_no_common_state_at_all_is_corrupt(tmp_path: Path) -> None:
    """Neither of the two places."""
    directory = plain(tmp_path / "c")
    (directory / "common.pt").unlink()
    with (
        TorchDistReader(directory) as reader,
        pytest.raises(CorruptFileError, match=r"neither common\.pt"),
    ):
        reader.common()


def overlap(metadata: dcp.Metadata) -> None:
    """Make the second chunk begin inside the first, record moved along."""
    chunk = metadata.state_dict_metadata["w"].chunks[1]  # type: ignore[union-attr] # a tensor
    info = metadata.storage_data.pop(dcp.MetadataIndex("w", chunk.offsets))
    chunk.offsets = torch.Size([1, 0])
    metadata.storage_data[dcp.MetadataIndex("w", chunk.offsets)] = info


def hole(metadata: dcp.Metadata) -> None:
    """Claim a taller tensor."""
    metadata.state_dict_metadata["w"].size = torch.Size([7, 4])  # type: ignore[union-attr] # a tensor


def outside(metadata: dcp.Metadata) -> None:
    """Claim a smaller tensor."""
    metadata.state_dict_metadata["w"].size = torch.Size([5, 4])  # type: ignore[union-attr] # a tensor


def info_of(metadata: dcp.Metadata, key: str) -> _StorageInfo:
    """The record of a key's first chunk."""
    storage: dict[dcp.MetadataIndex, _StorageInfo] = metadata.storage_data
    return next(info for index, info in storage.items() if index.fqn == key)


def elsewhere(path: str) -> Callable[[dcp.Metadata], None]:
    """Move a record to another file."""

    def change(metadata: dcp.Metadata) -> None:
        info_of(metadata, "w").relative_path = path

    return change


def moved(**fields: int) -> Callable[[dcp.Metadata], None]:
    """Move or resize a record within its file."""

    def change(metadata: dcp.Metadata) -> None:
        for name, value in fields.items():
            setattr(info_of(metadata, "w"), name, value)

    return change


def lost(metadata: dcp.Metadata) -> None:
    """Forget where a chunk is."""
    metadata.storage_data.pop(dcp.MetadataIndex("w", [2, 0]))


def forgotten(metadata: dcp.Metadata) -> None:
    """Forget a key and keep its record."""
    metadata.state_dict_metadata.pop("v")


def shared(metadata: dcp.Metadata) -> None:
    """Let two chunks share a record."""
    info = info_of(metadata, "v")
    metadata.storage_data[dcp.MetadataIndex("w", [0, 0])] = info


def compressed(metadata: dcp.Metadata) -> None:
    """Say that a record went through an extension."""
    info_of(metadata, "w").transform_descriptors = ["zstd"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (overlap, "overlap"),
        (hole, "hold 24 of 28 elements"),
        (outside, "sticks out"),
        (elsewhere("../../etc/passwd"), "outside the checkpoint"),
        (elsewhere("/etc/passwd"), "outside the checkpoint"),
        (elsewhere("a/../../b"), "outside the checkpoint"),
        (elsewhere(""), "outside the checkpoint"),
        (elsewhere("__9_9.distcp"), "__9_9.distcp is missing"),
        (moved(length=1 << 40), "which ends at"),
        (moved(offset=1 << 40), "which ends at"),
        (moved(offset=-1), "expected sizes"),
        (lost, "no record"),
        (forgotten, "a record and no chunk"),
        (shared, "share bytes"),
        (compressed, "compressed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_metadata_that_contradicts_the_files_is_refused_at_once(
    change: Callable[[dcp.Metadata], None], message: str, tmp_path: Path
) -> None:
    """Opening raises BR302 and names the key and the trouble, before any tensor is read."""
    directory = plain(tmp_path / "iter_0000001", change)
    with pytest.raises(CorruptFileError) as caught:
        TorchDistReader(directory)
    assert message in str(caught.value)
    assert str(directory) in str(caught.value)


def test_several_contradictions_are_reported_together(tmp_path: Path) -> None:
    """One error for all of them."""
    directory = plain(tmp_path / "c", hole)
    (directory / "__0_0.distcp").unlink()
    with pytest.raises(CorruptFileError) as caught:
        TorchDistReader(directory)
    assert len(caught.value.where) == 5  # four records without a file, and the hole


def test_ignored_keys_are_reported_only_when_read(tmp_path: Path) -> None:
    """Damaged optimizer state does not stand in the way of weights."""
    directory = plain(tmp_path / "c", hole)
    with TorchDistReader(directory, ignore=lambda key: key == "w") as reader:
        assert read(reader, "v").tolist() == [0, 1, 2]
        with pytest.raises(CorruptFileError, match="w is damaged"):
            read(reader, "w")
        with pytest.raises(CorruptFileError, match="w is damaged"):
            reader.extents("w", Box((0, 0), (1, 4)))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    """An interrupted copy ends before its last record does."""
    directory = plain(tmp_path / "c")
    path = directory / "__0_0.distcp"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptFileError, match="do not agree"):
        TorchDistReader(directory)


def test_a_file_that_shrinks_after_opening_is_refused(tmp_path: Path) -> None:
    """The bytes are not there when they are asked for."""
    directory = plain(tmp_path / "c")
    with TorchDistReader(directory) as reader:
        os.truncate(directory / "__0_0.distcp", 100)
        with pytest.raises(CorruptFileError, match="ends at byte"):
            read(reader, "w")


def test_a_record_of_another_shape_or_dtype_is_refused(tmp_path: Path) -> None:
    """A record that is fine in itself, and not what the metadata says."""

    def change(metadata: dcp.Metadata) -> None:
        metadata.state_dict_metadata["v"].properties.dtype = torch.float64  # type: ignore[union-attr] # a tensor

    with (
        TorchDistReader(plain(tmp_path / "c", change)) as reader,
        pytest.raises(CorruptFileError, match=r"holds int64 \(3,\), the metadata says float64"),
    ):
        read(reader, "v")


def test_a_tensor_of_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    """Complex numbers are BR303."""
    tensors = {"z": (torch.zeros(2, dtype=torch.complex64), [(0, 2)])}
    with pytest.raises(DtypeMismatchError) as caught:
        TorchDistReader(write_checkpoint(tmp_path / "c", tensors))
    assert "z" in caught.value.where


def test_flipped_bytes_of_metadata_are_refused_or_harmless(tmp_path: Path) -> None:
    """Each damaged byte of `.metadata` raises one of our errors, or moves no element."""
    directory = plain(tmp_path / "c")
    data = (directory / ".metadata").read_bytes()
    with TorchDistReader(directory) as reader:
        weights, keys = read(reader, "w"), reader.tensors.keys()
    refused = 0
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        (directory / ".metadata").write_bytes(damaged)
        try:
            with TorchDistReader(directory) as reader:
                for key in keys & reader.tensors.keys():
                    if key == "w":
                        np.testing.assert_array_equal(weights, read(reader, key))
                    else:
                        read(reader, key)
        except CheckpointError:
            refused += 1
    assert refused > len(data) // 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sharded_backend": "zarr", "sharded_backend_version": 1}, "'zarr'"),
        ({"sharded_backend": "fsdp_dtensor", "sharded_backend_version": 1}, "'fsdp_dtensor'"),
        ({"sharded_backend": "torch_dist", "sharded_backend_version": 2}, "version=2"),
        ({**CONFIG, "common_backend": "zarr"}, "zarr"),
        ([], "only 'torch_dist'"),
        ({}, "only 'torch_dist'"),
    ],
)
def test_other_backends_are_refused_by_name(config: object, message: str, tmp_path: Path) -> None:
    """`metadata.json` decides which format this is."""
    directory = plain(tmp_path / "c")
    (directory / "metadata.json").write_text(json.dumps(config))
    with pytest.raises(CorruptFileError, match=message):
        TorchDistReader(directory)


def test_a_broken_metadata_json_is_corrupt(tmp_path: Path) -> None:
    """Half a file is no JSON."""
    directory = plain(tmp_path / "c")
    (directory / "metadata.json").write_text('{"sharded_ba')
    with pytest.raises(CorruptFileError, match="not JSON"):
        TorchDistReader(directory)


@pytest.mark.parametrize("name", ["metadata.json", ".metadata"])
def test_a_directory_without_its_metadata_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    """An interrupted save leaves them out: Megatron writes them last."""
    directory = plain(tmp_path / "c")
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        TorchDistReader(directory)
