"""Moving tensors from files to files: runs of bytes, copied by the system and checksummed."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest

from bridge import hashing, reading, transfer
from bridge.errors import CheckpointError, CorruptFileError
from bridge.manifest import FileEntry
from bridge.storage.files import FileRanges
from bridge.storage.new_files import NewFile
from bridge.storage.safetensors import SafetensorsSource
from bridge.storage.source import FileLayout, Payload
from bridge.tiling import Box, Tile, Tiling
from bridge.transfer import TransferLimits, write_files

Array = np.ndarray[Any, np.dtype[Any]]
TINY = TransferLimits(memory_budget=1, threads=2)
COLUMNS = 700
HEADS = 40  # rows of one head: 56,000 bytes, less than the smallest window


@pytest.fixture
def arrays() -> dict[str, Array]:
    """Queries of six heads, keys and values of two, as 16-bit words that tell where they belong."""
    sizes = {"q": 6 * HEADS, "k": 2 * HEADS, "v": 2 * HEADS}
    random = np.random.default_rng(3)
    return {
        name: random.integers(0, 1 << 16, (rows, COLUMNS)).astype("<u2")
        for name, rows in sizes.items()
    }


@pytest.fixture
def source(tmp_path: Path, arrays: Mapping[str, Array]) -> Iterator[SafetensorsSource]:
    """The same in a file."""
    header, position = [], 0
    for name, array in arrays.items():
        span = f"{position},{position + array.nbytes}"
        shape = f"{array.shape[0]},{array.shape[1]}"
        header.append(f'"{name}":{{"dtype":"BF16","shape":[{shape}],"data_offsets":[{span}]}}')
        position += array.nbytes
    body = ("{" + ",".join(header) + "}").encode()
    directory = tmp_path / "source"
    directory.mkdir()
    data = b"".join(array.tobytes() for array in arrays.values())
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(body)) + body + data)
    with SafetensorsSource(directory) as opened:
        yield opened


def grouped(padding: int = 0) -> Tiling:
    """Two groups, each of three query heads, a key head and a value head; then rows of zeros."""
    parts: list[tuple[str | None, Box]] = []
    for group in range(2):
        for name, heads in (("q", 3), ("k", 1), ("v", 1)):
            rows = heads * HEADS
            parts.append((name, Box.rows(group * rows, (group + 1) * rows, (COLUMNS,))))
    if padding:
        parts.append((None, Box.rows(0, padding, (COLUMNS,))))
    return Tiling.concatenate(parts)


def placed(arrays: Mapping[str, Array], padding: int = 0) -> bytes:
    """The bytes of the grouped tensor, by plain slices."""
    rows = []
    for group in range(2):
        for name, heads in (("q", 3), ("k", 1), ("v", 1)):
            size = heads * HEADS
            rows.append(arrays[name][group * size : (group + 1) * size])
    return np.concatenate([*rows, np.zeros((padding, COLUMNS), "<u2")]).tobytes()


def layout_of(tiling: Tiling, path: str = "f") -> FileLayout:
    """A file of the tensor, its CRC-32 before it and behind it."""
    box = Box.whole(tiling.shape)
    nbytes = 2 * box.volume
    payload = Payload(tensor="t", box=box, offset=5, nbytes=nbytes, crc32_at=(1, 5 + nbytes))
    return FileLayout(path=path, size=9 + nbytes, literals=((0, b"!"),), payloads=(payload,))


def file_of(data: bytes) -> bytes:
    """The same file, in other words."""
    crc = zlib.crc32(data).to_bytes(4, "little")
    return b"!" + crc + data + crc


def refuse(*_: object, **__: object) -> None:
    """What must not be called."""
    raise AssertionError


@pytest.mark.parametrize("segment", [1 << 26, 100_000], ids=["one segment", "many"])
def test_runs_are_moved_without_a_buffer(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: SafetensorsSource,
    arrays: Mapping[str, Array],
    segment: int,
) -> None:
    """Several files at once, each tensor in pieces, the checksums put together from theirs."""
    monkeypatch.setattr(reading, "read_bands", refuse)
    monkeypatch.setattr(transfer, "SEGMENT_NBYTES", segment)
    done: list[int] = []
    layouts = [layout_of(grouped(), f"sub/f{n}") for n in range(5)]
    write_files(layouts, tmp_path, source, {"t": grouped()}, limits=TINY, advance=done.append)
    expected = placed(arrays)
    for layout in layouts:
        assert (tmp_path / layout.path).read_bytes() == file_of(expected)
    assert sum(done) == 5 * len(expected)


@pytest.mark.parametrize("segment", [1 << 26, 100_000], ids=["one segment", "many"])
def test_files_are_hashed_behind_the_writing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: SafetensorsSource,
    segment: int,
) -> None:
    """With the checksum in front of the tensor, which is known last; slow writers are awaited."""
    monkeypatch.setattr(transfer, "SEGMENT_NBYTES", segment)
    copy = NewFile.copy

    def slowly(file: NewFile, *args: Any) -> None:  # noqa: ANN401
        time.sleep(0.01)
        copy(file, *args)

    monkeypatch.setattr(NewFile, "copy", slowly)
    done: list[int] = []
    layouts = [layout_of(grouped(), f"sub/f{n}") for n in range(5)]
    found = write_files(
        layouts, tmp_path, source, {"t": grouped()},
        limits=TINY, advance=done.append, hashed=True,
    )  # fmt: skip
    assert found.keys() == {layout.path for layout in layouts}
    for name, entry in found.items():
        data = (tmp_path / name).read_bytes()
        assert (entry.nbytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        (part,) = entry.parts
        assert part.sha256 == hashlib.sha256(data[5:-4]).hexdigest()
    assert sum(done) == sum(layout.payload_nbytes + layout.size for layout in layouts)


@pytest.mark.parametrize("what", ["write", "hash"])
def test_a_failure_of_either_is_the_error_and_ends_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: SafetensorsSource, what: str
) -> None:
    """Not that somebody else was stopped for it, who waits for a file that is not written now."""
    monkeypatch.setattr(transfer, "SEGMENT_NBYTES", 100_000)
    copy, hash_file = NewFile.copy, hashing.hash_file

    def broken(file: NewFile, *args: Any) -> None:  # noqa: ANN401
        if what == "hash":
            time.sleep(0.2)
        elif file.path.name == "f1":
            raise CheckpointError("no room")
        copy(file, *args)

    def failing(ranges: FileRanges, name: str, *args: Any, **how: Any) -> FileEntry:  # noqa: ANN401
        if name == "f1" and what == "hash":
            raise CheckpointError("no reading")
        return hash_file(ranges, name, *args, **how)

    monkeypatch.setattr(NewFile, "copy", broken)
    monkeypatch.setattr(transfer, "hash_file", failing)
    before = threading.active_count()
    with pytest.raises(CheckpointError, match="no room" if what == "write" else "no reading"):
        write_files(
            [layout_of(grouped(), f"f{n}") for n in range(3)], tmp_path, source, {"t": grouped()},
            limits=TINY, advance=lambda _: None, hashed=True,
        )  # fmt: skip
    assert threading.active_count() == before


def test_padding_and_runs_make_one_payload(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: SafetensorsSource,
    arrays: Mapping[str, Array],
) -> None:
    """Segments with padding in them go through a buffer, the others do not."""
    monkeypatch.setattr(transfer, "SEGMENT_NBYTES", 100_000)
    tiling = grouped(padding=3)
    layout = layout_of(tiling)
    write_files([layout], tmp_path, source, {"t": tiling}, limits=TINY, advance=lambda _: None)
    assert (tmp_path / "f").read_bytes() == file_of(placed(arrays, padding=3))


def test_slices_by_columns_go_through_buffers(
    tmp_path: Path, source: SafetensorsSource, arrays: Mapping[str, Array]
) -> None:
    """A shard of a row-parallel tensor is no run of bytes."""
    box = Box((0, 0), (2 * HEADS, COLUMNS))
    tiling = Tiling(box.shape, (Tile("k", box, box),))
    part = Box((0, 100), (2 * HEADS, 450))
    assert reading.byte_ranges(source, tiling, part, nbytes=2 * part.volume) is None
    payload = Payload(tensor="t", box=part, offset=0, nbytes=2 * part.volume)
    layout = FileLayout(path="f", size=payload.nbytes, literals=(), payloads=(payload,))
    write_files([layout], tmp_path, source, {"t": tiling}, limits=TINY, advance=lambda _: None)
    assert (tmp_path / "f").read_bytes() == arrays["k"][:, 100:450].tobytes()


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EOPNOTSUPP])
def test_a_system_that_does_not_copy_leaves_it_to_us(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: SafetensorsSource,
    arrays: Mapping[str, Array],
    code: int,
) -> None:
    """Another file system, or one that cannot: the same file."""

    def fail(*_: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", fail)
    layout, tilings = layout_of(grouped()), {"t": grouped()}
    write_files([layout], tmp_path, source, tilings, limits=TINY, advance=lambda _: None)
    assert (tmp_path / "f").read_bytes() == file_of(placed(arrays))


def test_a_source_that_ends_early_is_named(tmp_path: Path, source: SafetensorsSource) -> None:
    """Cut after it was opened: the kernel copies less without a word, the bridge does not."""
    path = tmp_path / "source" / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1000)
    layout, tilings = layout_of(grouped()), {"t": grouped()}
    with pytest.raises(CorruptFileError, match="1000 bytes early") as error:
        write_files([layout], tmp_path, source, tilings, limits=TINY, advance=lambda _: None)
    assert error.value.where == (str(path),)


def test_a_full_disk_is_the_targets_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: SafetensorsSource
) -> None:
    """Found in the middle of a copy where space cannot be reserved."""
    monkeypatch.delattr(os, "posix_fallocate")
    layout, tilings = layout_of(grouped()), {"t": grouped()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (layout.size // 2, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large") as error:
            write_files([layout], tmp_path, source, tilings, limits=TINY, advance=lambda _: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert type(error.value) is CheckpointError
    assert error.value.where == (str(tmp_path / "f"),)


def test_flushing_begins_before_a_file_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: SafetensorsSource
) -> None:
    """Or all waiting for the disk would come at the end."""
    flushed: list[str] = []
    flush = NewFile.flush

    def watched(self: NewFile) -> None:
        flushed.append(self.path.name)
        flush(self)

    monkeypatch.setattr(NewFile, "flush", watched)
    layouts = [layout_of(grouped(), f"f{n}") for n in range(3)]
    write_files(layouts, tmp_path, source, {"t": grouped()}, limits=TINY, advance=lambda _: None)
    assert {"f0", "f1", "f2"} == set(flushed)


@pytest.mark.parametrize("kernel", [True, False])
def test_windows_stay_within_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: SafetensorsSource, *, kernel: bool
) -> None:
    """Mapped pages are memory too: what is looked at at once is counted here."""
    lock, held, most = Lock(), 0, 0
    window = FileRanges.window

    @contextmanager
    def counted(self: FileRanges, name: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        nonlocal held, most
        with lock:
            held += nbytes
            most = max(most, held)
        with window(self, name, offset, nbytes) as view:
            yield view
        with lock:
            held -= nbytes

    monkeypatch.setattr(FileRanges, "window", counted)
    if not kernel:
        monkeypatch.delattr(os, "copy_file_range")
    # One run of 336,000 bytes, so that it has to be cut; one thread, so that no race decides.
    box = Box.whole((6 * HEADS, COLUMNS))
    tiling = Tiling(box.shape, (Tile("q", box, box),))
    limits = TransferLimits(memory_budget=300_000, threads=1)
    layouts = [layout_of(tiling, f"f{n}") for n in range(2)]
    write_files(layouts, tmp_path, source, {"t": tiling}, limits=limits, advance=lambda _: None)
    assert 0 < most <= 300_000
    assert held == 0
