"""Safetensors held against the `safetensors` library, and against files that lie."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bridge.dtypes import dtype_named
from bridge.errors import CheckpointError, CorruptFileError, DtypeMismatchError
from bridge.storage.safetensors import SafetensorsSource, read_header
from bridge.storage.safetensors_layout import (
    layout_from_header,
    layout_shard,
    layout_shards,
    total_nbytes,
)
from bridge.storage.source import FileLayout, TensorInfo, TensorSource
from bridge.tiling import Box, Tile, Tiling
from bridge.transfer import TransferLimits, write_files

DTYPES = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32",
    "int16", "int8", "uint8", "bool",
)  # fmt: skip
INDEX = "model.safetensors.index.json"
Tensors = Mapping[str, torch.Tensor]


def words(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor's bit patterns."""
    word = dtype_named(str(tensor.dtype)).word
    flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.view(word).reshape(tensor.shape)


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bits of a dtype, NaN patterns and all; 0 or 1 for bool."""
    raw = np.random.default_rng(seed).integers(
        0, 2 if dtype == "bool" else 256, (*shape, dtype_named(dtype).itemsize), np.uint8
    )
    flat = torch.from_numpy(raw.reshape(-1))
    return flat.view(getattr(torch, dtype)).reshape(shape)


def sample() -> dict[str, torch.Tensor]:
    """One tensor of every dtype and of every awkward shape."""
    found = {f"t.{dtype}": random_tensor(dtype, (3, 5), n) for n, dtype in enumerate(DTYPES)}
    found["scalar"] = random_tensor("float32", ())
    found["empty"] = random_tensor("bfloat16", (0, 4))
    found["empty.too"] = random_tensor("float32", (3, 0))
    found["deep"] = random_tensor("bfloat16", (2, 3, 4, 5))
    return found


def save_sharded(directory: Path, *shards: Tensors) -> None:
    """Write shards and their index with the library, as transformers does."""
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(dict(shard), directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def whole(source: TensorSource, name: str) -> np.ndarray[Any, Any]:
    """Everything of one tensor."""
    info = source.tensors[name]
    out = np.empty(info.shape, info.dtype.word)
    source.read_into(name, Box.whole(info.shape), out)
    return out


def identity(tensors: Mapping[str, TensorInfo]) -> dict[str, Tiling]:
    """Each tensor tiled by itself."""
    boxes = {name: Box.whole(info.shape) for name, info in tensors.items()}
    return {name: Tiling(box.shape, (Tile(name, box, box),)) for name, box in boxes.items()}


def write_layouts(layouts: list[FileLayout], directory: Path, source: TensorSource) -> None:
    """Write files whose tensors are the source's own."""
    write_files(
        layouts,
        directory,
        source,
        identity(source.tensors),
        limits=TransferLimits(threads=2),
        advance=lambda _: None,
    )


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_every_dtype_and_shape_is_read_as_the_library_reads_it(
    tmp_path: Path, *, sharded: bool
) -> None:
    """Names, shapes, dtypes and bits of one file or several, scalars and empty tensors included."""
    tensors = sample()
    if sharded:
        names = list(tensors)
        save_sharded(tmp_path, *({n: tensors[n] for n in names[k::3]} for k in range(3)))
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    with SafetensorsSource(tmp_path) as source:
        assert source.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            info = source.tensors[name]
            assert (info.shape, f"torch.{info.dtype.name}") == (tensor.shape, str(tensor.dtype))
            assert info.nbytes == tensor.nbytes
            np.testing.assert_array_equal(whole(source, name), words(tensor), err_msg=name)


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> tuple[SafetensorsSource, Tensors]:
    """A source with a wide, a narrow and a deep tensor, and the tensors."""
    directory = tmp_path_factory.mktemp("boxed")
    tensors = {
        "wide": random_tensor("bfloat16", (4, 6000)),
        "narrow": random_tensor("float32", (90, 7), 1),
        "deep": random_tensor("int64", (3, 5, 4, 6), 2),
        "vector": random_tensor("float16", (50,), 3),
    }
    save_file(tensors, directory / "model.safetensors")
    return SafetensorsSource(directory), tensors


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_box_is_that_slice_of_the_tensor(
    boxed: tuple[SafetensorsSource, Tensors], data: st.DataObject
) -> None:
    """Any box of any tensor, into a contiguous array or into part of another."""
    source, tensors = boxed
    name = data.draw(st.sampled_from(sorted(tensors)))
    expected = words(tensors[name])
    spans = [
        sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in expected.shape
    ]
    box = Box(tuple(a for a, _ in spans), tuple(b for _, b in spans))
    frame = np.zeros([n + data.draw(st.integers(0, 2)) for n in box.shape], expected.dtype)
    target = frame[tuple(slice(0, n) for n in box.shape)]
    source.read_into(name, box, target)
    np.testing.assert_array_equal(target, expected[box.slices])


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_extent_is_the_bytes_of_its_box(
    boxed: tuple[SafetensorsSource, Tensors], data: st.DataObject
) -> None:
    """Of any box that is one run; complete rows always are."""
    source, tensors = boxed
    name = data.draw(st.sampled_from(sorted(tensors)))
    expected = words(tensors[name])
    starts = [data.draw(st.integers(0, n - 1)) for n in expected.shape]
    stops = [data.draw(st.integers(a + 1, n)) for a, n in zip(starts, expected.shape, strict=True)]
    if data.draw(st.booleans()):
        starts[1:], stops[1:] = [0] * (len(starts) - 1), expected.shape[1:]
    box = Box(tuple(starts), tuple(stops))
    extents = source.extents(name, box)
    if extents is None:
        assert box.shape[1:] != expected.shape[1:]
        return
    ((path, offset, nbytes),) = extents
    assert expected[box.slices].tobytes() == path.read_bytes()[offset : offset + nbytes]


def test_our_files_are_the_librarys_byte_for_byte(tmp_path: Path) -> None:
    """Header, padding, order and data of every dtype equal what the library writes."""
    tensors = sample()
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    save_file(tensors, theirs / "model.safetensors", metadata={"format": "pt"})
    with SafetensorsSource(theirs) as source:
        in_other_order = dict(sorted(source.tensors.items(), reverse=True))
        write_layouts([layout_shard("model.safetensors", in_other_order)], ours, source)
    expected = (theirs / "model.safetensors").read_bytes()
    assert (ours / "model.safetensors").read_bytes() == expected


def test_a_header_can_be_written_again_byte_for_byte(tmp_path: Path) -> None:
    """An odd but legal header, spaces, other metadata and key order, comes back as it was."""
    body = (
        b'{ "b":{"shape":[2],"data_offsets":[0,4],"dtype":"BF16"},\n"__metadata__":{"x":"\\u00e9"},'
        b'"e":{"dtype":"F32","data_offsets":[4,4],"shape":[0]},'
        b'"a":{"dtype":"F32","shape":[1,1],"data_offsets":[4,8]}  }   '
    )
    raw = struct.pack("<Q", len(body)) + body + b"\x01\x02\x03\x04\x05\x06\x07\x08"
    source_dir, copy = tmp_path / "source", tmp_path / "copy"
    source_dir.mkdir()
    copy.mkdir()
    (source_dir / "model.safetensors").write_bytes(raw)
    with SafetensorsSource(source_dir) as source:
        layout = layout_from_header(source.headers["model.safetensors"])
        write_layouts([layout], copy, source)
    assert layout.size == len(raw)
    assert (copy / "model.safetensors").read_bytes() == raw


def test_an_empty_tensor_may_follow_its_neighbour_in_the_header(tmp_path: Path) -> None:
    """Empty and full tensors at one offset are in order whatever order the header names them in."""
    entries = {
        "full": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        "empty": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},
    }
    body = json.dumps(entries).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(body)) + body + b"1234")
    assert load_file(path)["full"].tolist() == [*b"1234"]
    with SafetensorsSource(tmp_path) as source:
        assert whole(source, "full").tolist() == [*b"1234"]
        assert source.tensors["empty"].shape == (0,)


@pytest.mark.parametrize("limit", [1, 200, 500, 10**9])
def test_shards_are_filled_in_order_and_read_by_the_library(tmp_path: Path, limit: int) -> None:
    """Shards hold whole tensors, in order, within the limit, and the library opens each."""
    tensors = {f"layers.{n}.w": random_tensor("bfloat16", (n + 1, 10), n) for n in range(8)}
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    save_file(tensors, theirs / "model.safetensors")
    with SafetensorsSource(theirs) as source:
        infos = {name: source.tensors[name] for name in tensors}
        layouts, index = layout_shards(infos, max_shard_size=limit)
        write_layouts(layouts, ours, source)
        total = total_nbytes(infos.values())
    assert total == sum(tensor.nbytes for tensor in tensors.values())
    order = []
    for layout in layouts:
        with safetensors.safe_open(ours / layout.path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118  # no mapping: it has no __iter__
                np.testing.assert_array_equal(words(opened.get_tensor(name)), words(tensors[name]))
            held = sorted(opened.keys())
        order += held
        assert len(held) == 1 or sum(tensors[name].nbytes for name in held) <= limit
    assert order == list(tensors)
    for first, second in pairwise(layouts):
        together = sum(p.nbytes for p in first.payloads) + second.payloads[0].nbytes
        assert together > limit
    names = [layout.path for layout in layouts]
    if limit == 10**9:
        assert (names, index) == (["model.safetensors"], None)
        return
    assert names == [
        f"model-{n:05}-of-{len(names):05}.safetensors" for n in range(1, len(names) + 1)
    ]
    assert index is not None
    assert json.loads(index) == {
        "metadata": {"total_size": total},
        "weight_map": {p.tensor: layout.path for layout in layouts for p in layout.payloads},
    }
    (ours / INDEX).write_bytes(index)
    with SafetensorsSource(ours) as again:
        assert again.tensors == infos


def test_a_layout_says_where_every_byte_goes() -> None:
    """Literals and payloads cover the file without hole or overlap."""
    infos = {
        name: TensorInfo(shape=shape, dtype=dtype_named(dtype))
        for name, shape, dtype in (
            ("b", (3, 5), "bfloat16"), ("a", (), "float32"), ("c", (0, 2), "int8"),
            ("d", (7,), "int8"),
        )
    }  # fmt: skip
    layout = layout_shard("x.safetensors", infos)
    spans = [(offset, len(data)) for offset, data in layout.literals]
    spans += [(payload.offset, payload.nbytes) for payload in layout.payloads]
    position = 0
    for offset, nbytes in sorted(spans):
        assert offset == position
        position += nbytes
    assert position == layout.size
    assert layout.literals[0][1][:8] == struct.pack("<Q", len(layout.literals[0][1]) - 8)
    assert len(layout.literals[0][1]) % 8 == 0


def entry(**changes: object) -> dict[str, object]:
    """A header entry of 8 bytes."""
    return {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8], **changes}


BAD_HEADERS: dict[str, object] = {
    "not an object": [],
    "a string": "w",
    "entry is a list": {"w": [1]},
    "entry is null": {"w": None},
    "no dtype": {"w": {"shape": [2, 2], "data_offsets": [0, 8]}},
    "no shape": {"w": {"dtype": "BF16", "data_offsets": [0, 8]}},
    "no offsets": {"w": {"dtype": "BF16", "shape": [2, 2]}},
    "dtype is a list": {"w": entry(dtype=["BF16"])},
    "shape is a number": {"w": entry(shape=4)},
    "shape is a string": {"w": entry(shape="22")},
    "shape of floats": {"w": entry(shape=[2.0, 2])},
    "shape of truths": {"w": entry(shape=[True, 4])},
    "negative shape": {"w": entry(shape=[-2, -2])},
    "larger shape": {"w": entry(shape=[2, 3])},
    "smaller shape": {"w": entry(shape=[2, 1])},
    "absurd shape": {"w": entry(shape=[2**62, 2**62])},
    "endless shape": {"w": entry(shape=[10**300] * 10)},
    "many dimensions": {"w": entry(shape=[2] * 100_000)},
    "more dimensions than an array": {"w": entry(shape=[2, 2, *[1] * 40])},
    "three offsets": {"w": entry(data_offsets=[0, 4, 8])},
    "negative offset": {"w": entry(data_offsets=[-8, 0])},
    "reversed offsets": {"w": entry(data_offsets=[8, 0])},
    "offset not a number": {"w": entry(data_offsets=[None, 8])},
    "hole at the front": {"w": entry(data_offsets=[4, 12])},
    "overlap": {"v": entry(), "w": entry(data_offsets=[4, 12])},
    "same bytes twice": {"v": entry(), "w": entry()},
    "beyond the file": {"v": entry(), "w": entry(data_offsets=[8, 16])},
    "bytes left over": {"w": entry(shape=[3], data_offsets=[0, 6])},
    "nothing for the bytes": {},
}


def put(directory: Path, body: bytes, data: bytes = bytes(8), length: int | None = None) -> Path:
    """Write a model.safetensors from raw parts."""
    path = directory / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(body) if length is None else length) + body + data)
    return path


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, header: object) -> None:
    """Wrong types, sizes, holes, overlaps: one error that names the file, never a crash."""
    path = put(tmp_path, json.dumps(header).encode())
    with pytest.raises(CorruptFileError) as error:
        SafetensorsSource(tmp_path)
    assert str(path) in error.value.where[0]


def test_the_healthy_header_of_these_tests_is_read(tmp_path: Path) -> None:
    """The entry that the bad headers vary is good."""
    put(tmp_path, json.dumps({"w": entry()}).encode())
    with SafetensorsSource(tmp_path) as source:
        assert source.tensors == {"w": TensorInfo(shape=(2, 2), dtype=dtype_named("bfloat16"))}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x08\x00\x00",
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        struct.pack("<Q", 2) + b"{]",
        struct.pack("<Q", 4) + b"\xff\xfe\x00\x01",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
    ids=["empty", "short prefix", "huge", "too long", "one too long", "no JSON", "no text", "deep"],
)
def test_bytes_that_are_no_safetensors_are_refused(tmp_path: Path, raw: bytes) -> None:
    """Cut, random and over-deep files are one clear error."""
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(CorruptFileError):
        SafetensorsSource(tmp_path)


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    """JSON would silently keep the second."""
    one = json.dumps(entry())
    put(tmp_path, f'{{"w": {one}, "w": {one}}}'.encode())
    with pytest.raises(CorruptFileError, match="twice"):
        SafetensorsSource(tmp_path)


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    """A dtype of the future is not guessed from its size."""
    put(tmp_path, json.dumps({"w": entry(dtype="F4")}).encode())
    with pytest.raises(DtypeMismatchError, match="F4") as error:
        SafetensorsSource(tmp_path)
    assert error.value.where[0].endswith("model.safetensors: w")


def test_a_truncated_shard_is_found_before_anything_is_read(tmp_path: Path) -> None:
    """One byte less than the header says is enough."""
    save_sharded(tmp_path, {"a": torch.ones(100)}, {"b": torch.ones(100)})
    path = tmp_path / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match=r"describes \d+ bytes, the file has") as error:
        SafetensorsSource(tmp_path)
    assert str(path) in error.value.where[0]


def test_a_file_truncated_afterwards_is_corrupt_when_read(tmp_path: Path) -> None:
    """A file that shrinks while it is open ends in the same kind of error."""
    save_file({"a": torch.ones(1000)}, tmp_path / "model.safetensors")
    with SafetensorsSource(tmp_path) as source:
        with (tmp_path / "model.safetensors").open("r+b") as stream:
            stream.truncate(500)
        with pytest.raises(CorruptFileError, match="ends at byte 500"):
            whole(source, "a")


def test_bytes_after_the_data_are_refused(tmp_path: Path) -> None:
    """The header must account for the whole file."""
    save_file({"a": torch.ones(10)}, tmp_path / "model.safetensors")
    with (tmp_path / "model.safetensors").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(CorruptFileError):
        SafetensorsSource(tmp_path)


def reindex(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    """Change the index of a checkpoint in place."""

    def apply(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        change(index["weight_map"])
        (directory / INDEX).write_text(json.dumps(index))

    return apply


def rewrite(text: str) -> Callable[[Path], object]:
    """Put something else in the index's place."""
    return lambda directory: (directory / INDEX).write_text(text)


def add(file: str, *names: str) -> Callable[[Path], None]:
    """Write a file of small tensors beside, or over, the others."""
    return lambda directory: save_file({name: torch.ones(2) for name in names}, directory / file)


FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (reindex(lambda index: index.pop("a")), f"a is in {FIRST}, which the"),
        (reindex(lambda index: index.update(ghost=FIRST)), "ghost should be in"),
        (reindex(lambda index: index.update(a=SECOND)), "a should be in"),
        (reindex(lambda index: index.update(a=7)), ""),
        (reindex(lambda index: index.update(a="../secret.safetensors")), INDEX),
        (reindex(lambda index: index.update(a="/etc/passwd")), INDEX),
        (reindex(lambda index: index.update(a="sub/x.safetensors")), INDEX),
        (reindex(lambda index: index.update(a="..\\x.safetensors")), INDEX),
        (reindex(lambda index: index.update(a="..")), INDEX),
        (reindex(lambda index: index.update(a="")), ""),
        (rewrite("{"), INDEX),
        (rewrite("[]"), INDEX),
        (rewrite('{"weight_map": []}'), INDEX),
        (rewrite('{"weight_map": 1, "weight_map": 2}'), INDEX),
        (rewrite("[" * 100_000), INDEX),
        (lambda directory: (directory / SECOND).unlink(), SECOND),
        (lambda directory: (directory / SECOND).rename(directory / "x.safetensors"), SECOND),
        (add("model.safetensors", "x"), ""),
        (add(SECOND, "b", "a"), ""),
    ],
    ids=[
        "tensor missing", "tensor not there", "wrong file", "number", "traversal", "absolute",
        "subdirectory", "backslash", "parent", "no name", "no JSON", "list", "map is a list",
        "twice", "deep", "file missing", "file renamed", "a second checkpoint", "tensor in both",
    ],
)  # fmt: skip
def test_an_index_that_lies_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], complaint: str
) -> None:
    """Stale, escaping, unreadable and ambiguous indices: refused, and the place named."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"")
    save_sharded(directory, {"a": torch.ones(2), "c": torch.ones(1)}, {"b": torch.ones(3)})
    SafetensorsSource(directory).close()
    damage(directory)
    with pytest.raises(CheckpointError) as error:
        SafetensorsSource(directory)
    assert any(complaint in place for place in error.value.where), error.value


def test_every_missing_shard_is_named_at_once(tmp_path: Path) -> None:
    """An interrupted download lacks several files: all of them are listed."""
    save_sharded(tmp_path, *({f"t{n}": torch.ones(1)} for n in range(5)))
    gone = [tmp_path / f"model-{n:05}-of-00005.safetensors" for n in (2, 3, 5)]
    for path in gone:
        path.unlink()
    with pytest.raises(CheckpointError, match="3 of 5 weight files") as error:
        SafetensorsSource(tmp_path)
    assert error.value.where == tuple(map(str, gone))


@pytest.mark.parametrize("file", [FIRST, SECOND])
def test_a_tensor_in_two_files_is_refused_whichever_the_index_names(
    tmp_path: Path, file: str
) -> None:
    """Two tensors of one name are two candidates; the index does not settle which is meant."""
    save_sharded(tmp_path, {"a": torch.ones(2)}, {"b": torch.ones(3)})
    add(SECOND, "b", "a")(tmp_path)
    reindex(lambda index: index.update(a=file, c=FIRST))(tmp_path)
    with pytest.raises(CorruptFileError, match=f"a is in {FIRST} and in {SECOND}"):
        SafetensorsSource(tmp_path)


def test_a_stale_index_of_many_tensors_is_reported_briefly(tmp_path: Path) -> None:
    """The count is exact, the list is not endless."""
    save_sharded(tmp_path, {f"t{n}": torch.ones(1) for n in range(100)}, {"b": torch.ones(1)})
    reindex(lambda index: index.update({f"t{n}": SECOND for n in range(100)}))(tmp_path)
    with pytest.raises(CorruptFileError, match="100 tensors") as error:
        SafetensorsSource(tmp_path)
    assert len(error.value.where) == 100
    assert len(str(error.value).splitlines()) < 60


def test_other_safetensors_beside_the_model_are_left_alone(tmp_path: Path) -> None:
    """An adapter beside model.safetensors, or files the index does not name, are not the model."""
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"lora": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    with SafetensorsSource(tmp_path) as source:
        assert list(source.tensors) == ["a"]


@pytest.mark.parametrize("kind", ["empty", "missing", "file", "bin"])
def test_a_directory_without_weights_is_refused(tmp_path: Path, kind: str) -> None:
    """The error says what is expected, and what to do about .bin weights."""
    if kind == "bin":
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
    if kind == "file":
        (tmp_path / "x").write_bytes(b"")
    place = {"missing": tmp_path / "gone", "file": tmp_path / "x"}.get(kind, tmp_path)
    with pytest.raises(CheckpointError) as error:
        SafetensorsSource(place)
    assert str(place) in error.value.where[0]


def test_a_missing_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    """`read_header` of nothing is no traceback."""
    with pytest.raises(CheckpointError):
        read_header(tmp_path, "gone.safetensors")


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    """The Hub's cache is made of links."""
    cache = tmp_path / "models--org--name"
    store, snapshot = cache / "blobs", cache / "snapshots" / "89abcdef"
    store.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"a": torch.arange(4)}, store / "0123abcd")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123abcd")
    with SafetensorsSource(snapshot) as source:
        assert whole(source, "a").tolist() == [0, 1, 2, 3]


def test_a_configuration_alone_has_no_weights(tmp_path: Path) -> None:
    """Commands take it for a model; whoever wants tensors says so."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a configuration alone has no weights") as caught:
        SafetensorsSource(tmp_path / "config.json")
    assert caught.value.where == (str(tmp_path / "config.json"),)
