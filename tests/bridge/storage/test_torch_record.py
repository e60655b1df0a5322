"""One record: torch reads ours, we read torch's, and nothing is believed that can be checked."""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridge.dtypes import Dtype, dtype_named
from bridge.errors import BridgeError, CorruptFileError
from bridge.storage.torch_record import (
    ALIGNMENT,
    Reader,
    empty_tensors_record,
    locate_tensor,
    object_record,
    read_object,
    record_layout,
)

NAMES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)
SHAPES = [(), (0,), (3,), (2, 3), (1, 5, 7), (4, 0, 2), (1, 1), (129,)]


def tensor_of(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor whose bytes are 0, 1, 0, 1, ...: right for every dtype, bool included."""
    dtype = getattr(torch, name)
    nbytes = math.prod(shape) * dtype.itemsize
    return (torch.arange(nbytes) % 2).to(torch.uint8).view(dtype).reshape(shape)


def raw(tensor: torch.Tensor) -> bytes:
    """The elements, row-major."""
    flat = tensor.contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def build(dtype: Dtype, shape: tuple[int, ...], payload: bytes) -> bytes:
    """A complete record: layout, payload, the two CRC-32s patched in."""
    layout = record_layout(dtype, shape)
    record = bytearray(layout.prefix + payload + layout.suffix)
    for position in layout.crc32_at:
        record[position : position + 4] = struct.pack("<I", zlib.crc32(payload))
    assert layout.size == len(record)
    assert layout.nbytes == len(payload)
    return bytes(record)


def reader(data: bytes) -> Reader:
    """Read from bytes, refusing what a file would refuse."""

    def read(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(data)
        return data[offset : offset + length]

    return read


def saved(value: object) -> bytes:
    """What torch.save writes."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_torch_loads_what_is_laid_out(name: str, shape: tuple[int, ...]) -> None:
    """dtype, shape and every byte, with and without `weights_only`, and the zip is valid."""
    tensor = tensor_of(name, shape)
    record = build(dtype_named(name), shape, raw(tensor))

    archive = zipfile.ZipFile(io.BytesIO(record))
    assert archive.testzip() is None
    for entry in archive.infolist():  # zipfile checks the directory's CRC-32s, this the headers'
        assert struct.unpack_from("<I", record, entry.header_offset + 14) == (entry.CRC,)
    assert raw(tensor) == archive.read("archive/data/0")
    for weights_only in (True, False):
        loaded = torch.load(io.BytesIO(record), weights_only=weights_only)
        assert tensor.dtype == loaded.dtype
        assert tensor.shape == loaded.shape
        assert loaded.is_contiguous()
        assert raw(tensor) == raw(loaded)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_record_of_torch_is_located_inside_a_file(name: str, shape: tuple[int, ...]) -> None:
    """Dtype, shape and place of what torch.save wrote, with other bytes before and after it."""
    tensor = tensor_of(name, shape)
    record = saved(tensor)
    data = b"x" * 37 + record + b"PK\5\6" * 9

    location = locate_tensor(reader(data), 37, len(record), where="w")

    assert (dtype_named(name), shape) == (location.dtype, location.shape)
    assert data[location.offset :].startswith(raw(tensor))


def test_our_own_record_is_located_and_its_payload_is_aligned() -> None:
    """The payload starts at a multiple of 64 bytes for every length of the prefix."""
    for rank in range(1, 9):
        shape = (2,) * rank
        payload = bytes(range(2**rank % 256)) or bytes(256)
        layout = record_layout(dtype_named("uint8"), shape)
        record = build(dtype_named("uint8"), shape, payload)
        location = locate_tensor(reader(record), 0, len(record), where="w")
        assert len(layout.prefix) == location.offset
        assert location.offset % ALIGNMENT == 0


def test_a_slice_of_a_bigger_storage_is_located() -> None:
    """torch.save of a row slice keeps the whole storage; its first element is found."""
    whole = torch.arange(40, dtype=torch.int32).reshape(8, 5)
    record = saved(whole[3:5])
    location = locate_tensor(reader(record), 0, len(record), where="w")
    assert location.shape == (2, 5)
    assert struct.unpack_from("<10i", record, location.offset) == tuple(range(15, 25))


def test_a_parameter_is_located() -> None:
    """torch.save of a Parameter wraps its tensor."""
    record = saved(torch.nn.Parameter(torch.ones(2, 3)))
    location = locate_tensor(reader(record), 0, len(record), where="w")
    assert location.shape == (2, 3)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3, 4).T, torch.zeros(4, 6)[:, :3], torch.zeros(3, 1).expand(3, 4)],
    ids=["transposed", "columns", "expanded"],
)
def test_a_tensor_that_is_not_row_major_is_refused(tensor: torch.Tensor) -> None:
    """The error names shape, strides and the way out."""
    record = saved(tensor)
    with pytest.raises(CorruptFileError, match="strides") as caught:
        locate_tensor(reader(record), 0, len(record), where="a.distcp: w")
    assert "contiguous" in str(caught.value)
    assert "a.distcp: w" in str(caught.value)


def test_size_one_dimensions_may_have_any_stride() -> None:
    """Strides of dimensions of one element say nothing about the order."""
    record = saved(torch.zeros(6, 5).as_strided((1, 5, 1), (99, 1, 42)))
    assert locate_tensor(reader(record), 0, len(record), where="w").shape == (1, 5, 1)


@pytest.mark.parametrize("value", [[torch.zeros(2)], {"a": 1}, "text", None])
def test_a_record_of_something_else_is_no_tensor(value: object) -> None:
    """Objects are BR302 where a tensor is expected."""
    record = saved(value)
    with pytest.raises(CorruptFileError, match="not a tensor"):
        locate_tensor(reader(record), 0, len(record), where="w")


def test_compressed_records_are_refused() -> None:
    """A zip tool that repacks an archive compresses it; its bytes are not elements any more."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(torch.zeros(100)))) as source,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    record = stream.getvalue()
    with pytest.raises(CorruptFileError, match="compressed"):
        locate_tensor(reader(record), 0, len(record), where="w")


def test_a_record_repacked_without_compression_is_read() -> None:
    """Python's zipfile lays archives out differently from torch; both are valid."""
    stream = io.BytesIO()
    tensor = torch.arange(100)
    with (
        zipfile.ZipFile(io.BytesIO(saved(tensor))) as source,
        zipfile.ZipFile(stream, "w") as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    record = stream.getvalue()
    location = locate_tensor(reader(record), 0, len(record), where="w")
    assert record[location.offset :].startswith(raw(tensor))


@pytest.mark.parametrize("writer", ["torch", "ours"])
def test_a_record_cut_anywhere_is_corrupt(writer: str) -> None:
    """Every proper prefix raises BR302; nothing is read beyond the record."""
    tensor = tensor_of("bfloat16", (3, 4))
    record = (
        saved(tensor) if writer == "torch" else build(dtype_named("bfloat16"), (3, 4), raw(tensor))
    )
    for length in range(len(record)):
        with pytest.raises(CorruptFileError):
            locate_tensor(reader(record[:length]), 0, length, where="w")


@given(st.data())
def test_damage_around_the_payload_never_escapes(data: st.DataObject) -> None:
    """Flipped bytes give the true place or one of our errors, never another exception."""
    tensor = tensor_of("float32", (3, 4))
    records = [saved(tensor), build(dtype_named("float32"), (3, 4), raw(tensor))]
    for record in map(bytearray, records):
        at = data.draw(st.integers(0, len(record) - 1))
        record[at] ^= data.draw(st.integers(1, 255))
        try:
            location = locate_tensor(reader(bytes(record)), 0, len(record), where="w")
        except BridgeError as error:
            assert error.code in {"BR302", "BR303"}  # noqa: PT017 - surviving is fine too
        else:
            assert location.offset + 48 <= len(record)


def test_a_flipped_bit_in_the_pickle_is_found_by_its_crc() -> None:
    """A shape that still parses, but is not what was written, is refused."""
    record = bytearray(saved(torch.zeros(2, 3)))
    record[record.index(b"K\x02K\x03") + 1] = 1
    with pytest.raises(CorruptFileError, match="CRC-32"):
        locate_tensor(reader(bytes(record)), 0, len(record), where="w")


@pytest.mark.parametrize("field", ["directory", "data.pkl", "data/0"])
def test_an_entry_outside_its_record_is_refused(field: str) -> None:
    """Positions that lead beyond the record are BR302, though the file may go on there."""
    record = bytearray(saved(torch.zeros(2, 3)))
    if field == "directory":
        at = record.rindex(b"PK\6\6") + 48
    else:
        at = record.rindex(b"archive/" + field.encode()) - 4
    record[at : at + 4] = struct.pack("<I", len(record) + 10)
    with pytest.raises(CorruptFileError, match="points outside itself"):
        locate_tensor(reader(bytes(record) + bytes(99999)), 0, len(record), where="w")


def test_a_storage_smaller_than_its_tensor_is_refused() -> None:
    """A tensor that reaches past its storage would read the bytes behind it."""
    small, big = (
        record_layout(dtype_named("uint8"), (4,)),
        record_layout(dtype_named("uint8"), (9,)),
    )
    # Equally long pickles: swap the bigger tensor's into the smaller record, CRC-32 included.
    length = len(small.prefix)
    assert length == len(big.prefix)
    entry = big.suffix.index(b"archive/data.pkl")
    suffix = small.suffix[: entry - 46] + big.suffix[entry - 46 : entry] + small.suffix[entry:]
    record = big.prefix + bytes(4) + suffix
    with pytest.raises(CorruptFileError, match="4 bytes in 'archive/data/0'"):
        locate_tensor(reader(record), 0, len(record), where="w")


def test_big_endian_records_are_refused() -> None:
    """Swapped elements must not pass for little-endian ones."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(torch.zeros(3)))) as source,
        zipfile.ZipFile(stream, "w") as target,
    ):
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, b"big" if name.endswith("byteorder") else data)
    record = stream.getvalue()
    with pytest.raises(CorruptFileError, match="little-endian"):
        locate_tensor(reader(record), 0, len(record), where="w")


def test_records_above_four_gib_are_mapped_by_torch(tmp_path: Path) -> None:
    """In a sparse file, torch.load(mmap=True) finds first, last and middle element, and we do."""
    rows, columns = 3 << 20, 1 << 10  # 6 GiB of bfloat16, none of it on disk
    layout = record_layout(dtype_named("bfloat16"), (rows, columns))
    assert layout.nbytes == 6 << 30
    path = tmp_path / "big.pt"
    marks = {0: b"\x80\x3f", rows * columns // 2 + 7: b"\x00\x40", rows * columns - 1: b"\x40\x40"}
    with path.open("wb") as stream:
        stream.write(layout.prefix)
        for element, mark in marks.items():
            stream.seek(len(layout.prefix) + 2 * element)
            stream.write(mark)
        stream.seek(len(layout.prefix) + layout.nbytes)
        stream.write(layout.suffix)
    assert layout.size == path.stat().st_size
    assert path.stat().st_blocks * 512 < 1 << 20
    # APPNOTE 4.4.24: where the directory begins, all ones when ZIP64 says it instead.
    assert layout.suffix[-6:-2] == b"\xff" * 4

    tensor = torch.load(path, mmap=True, weights_only=True)

    assert (rows, columns) == tuple(tensor.shape)
    flat = tensor.view(-1)
    found = [flat[element].item() for element in (*marks, rows * columns - 2)]
    assert found == [1.0, 2.0, 3.0, 0.0]
    del tensor, flat
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/0").file_size == layout.nbytes
    with path.open("rb") as file:

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        location = locate_tensor(read, 0, layout.size, where="w")
    assert location.offset == len(layout.prefix)


def test_the_same_arguments_give_the_same_bytes() -> None:
    """No clock, no identity, no random id."""
    one, two = (record_layout(dtype_named("int8"), (5, 6)) for _ in range(2))
    assert one == two


def test_the_empty_object_is_what_megatron_stores() -> None:
    """A list of one empty uint8 tensor, as Transformer Engine's `set_extra_state` takes it."""
    record = empty_tensors_record(dtype_named("uint8"))
    assert zipfile.ZipFile(io.BytesIO(record)).testzip() is None
    (tensor,) = torch.load(io.BytesIO(record), weights_only=True)
    assert (torch.uint8, (0,)) == (tensor.dtype, tuple(tensor.shape))
    ours = read_object(reader(record), 0, len(record), where="w")
    assert isinstance(ours, list)
    assert [tensor.shape for tensor in ours] == [(0,)]


def test_an_object_record_is_loaded_by_torch() -> None:
    """Plain data without any storage, under `weights_only`."""
    value = {"iteration": 3, "content_metadata": {"a": [1, 2.5, None, "x"]}, "empty": []}
    record = object_record(value, archive="common")
    assert value == torch.load(io.BytesIO(record), weights_only=True)
    assert value == read_object(reader(record), 0, len(record), where="w")
    assert value == read_object(reader(saved(value)), 0, len(saved(value)), where="w")
