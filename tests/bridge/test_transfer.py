"""Moving and comparing: any tiling, any budget, checksums, full disks, single bits."""

from __future__ import annotations

import hashlib
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.comparison import compare
from bridge.dtypes import Words, dtype_named
from bridge.errors import BridgeError, CheckpointError, CorruptFileError
from bridge.storage.source import FileLayout, Payload, TensorInfo, TensorSource
from bridge.tiling import Box, Tile, Tiling
from bridge.transfer import TransferLimits, read_bands, write_files

MakeSource = Callable[..., Any]
Array = np.ndarray[Any, Any]
LIMITS = TransferLimits(threads=2)


def ignore(_: int) -> None:
    """No progress."""


def words(shape: tuple[int, ...], *, start: int = 0) -> Array:
    """Counting 16-bit words."""
    return np.arange(start, start + math.prod(shape), dtype=np.uint16).reshape(shape)


def whole(name: str, shape: tuple[int, ...]) -> Tiling:
    """A tensor that is one source."""
    box = Box.whole(shape)
    return Tiling(shape, (Tile(name, box, box),))


@st.composite
def tiled_tensors(draw: st.DrawFn) -> tuple[Tiling, dict[str, Array], Array]:
    """A random grid of tiles, the sources they read, and the tensor they make, by plain slices.

    Some tiles are padding, some sources serve several tiles, each tile sits anywhere in its source.
    """
    cuts = [
        [0, *sorted(draw(st.sets(st.integers(1, size - 1), max_size=3))), size]
        for size in draw(st.lists(st.integers(2, 40), min_size=1, max_size=3))
    ]
    shape = tuple(cut[-1] for cut in cuts)
    boxes = [Box((), ())]
    for cut in cuts:
        boxes = [Box((*box.starts, a), (*box.stops, b)) for box in boxes for a, b in pairwise(cut)]
    margin = draw(st.integers(0, 3))
    sources: dict[str, Array] = {}
    expected = np.zeros(shape, np.uint16)
    tiles = []
    for number, box in enumerate(draw(st.permutations(boxes))):
        if number and draw(st.integers(0, 5)) == 0:
            tiles.append(Tile(None, Box.whole(box.shape), box))
            continue
        name = f"s{number}"
        sources[name] = words(tuple(n + 2 * margin for n in box.shape), start=1000 * number + 1)
        inner = Box.whole(box.shape).shift((margin,) * len(shape))
        tiles.append(Tile(name, inner, box))
        expected[box.slices] = sources[name][inner.slices]
    return Tiling(shape, tuple(tiles)), sources, expected


@given(tiled_tensors(), st.integers(1, 500))
def test_bands_of_any_tiling_are_the_tensor(
    array_source: MakeSource, drawn: tuple[Tiling, dict[str, Array], Array], band_nbytes: int
) -> None:
    """Whatever the tiles and however short the bands, the words come in row-major order."""
    tiling, sources, expected = drawn
    source = array_source(sources)
    found = [
        band.copy().reshape(-1)
        for band in read_bands(
            source, tiling, Box.whole(tiling.shape), word=np.dtype("<u2"), band_nbytes=band_nbytes
        )
    ]
    assert max(len(band) for band in found) <= max(1, band_nbytes // 2)
    np.testing.assert_array_equal(np.concatenate(found), expected.reshape(-1))


@given(tiled_tensors(), st.data())
def test_files_of_any_tiling_hold_the_boxes_asked_for(
    array_source: MakeSource,
    drawn: tuple[Tiling, dict[str, Array], Array],
    data: st.DataObject,
) -> None:
    """Literals, boxes of tensors and both places of their CRC-32 end up where the layout says."""
    tiling, sources, expected = drawn
    split = data.draw(st.integers(0, tiling.shape[0]))
    rest = tiling.shape[1:]
    parts = [Box.rows(0, split, rest), Box.rows(split, tiling.shape[0], rest)]
    file, literals, payloads = b"", [], []
    for number, box in enumerate(parts):
        bits = expected[box.slices].tobytes()
        crc = zlib.crc32(bits).to_bytes(4, "little")
        head = f"<{number}>".encode()
        at = len(file)
        literals.append((at, head))
        payloads.append(
            Payload(
                tensor="t",
                box=box,
                offset=at + len(head) + 4,
                nbytes=len(bits),
                crc32_at=(at + len(head), at + len(head) + 4 + len(bits)),
            )
        )
        file += head + crc + bits + crc
    layout = FileLayout(
        path="sub/f", size=len(file), literals=tuple(literals), payloads=tuple(payloads[::-1])
    )
    done: list[int] = []
    with tempfile.TemporaryDirectory() as directory:
        write_files(
            [layout],
            Path(directory),
            array_source(sources),
            {"t": tiling},
            limits=LIMITS,
            advance=done.append,
        )
        assert (Path(directory) / "sub/f").read_bytes() == file
    assert sum(done) == expected.nbytes


def test_a_payload_of_many_bands_and_short_writes_is_whole(
    tmp_path: Path, array_source: MakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bands follow each other in file and checksum, however little the system takes at a time."""
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[:10_007], at))
    source = array_source({"a": words((300, 250)), "b": words((200, 250), start=7)})
    tiling = Tiling.concatenate([("b", Box.whole((200, 250))), ("a", Box.whole((300, 250)))])
    bits = np.vstack([words((200, 250), start=7), words((300, 250))]).tobytes()
    payload = Payload(
        tensor="t", box=Box.whole(tiling.shape), offset=8, nbytes=len(bits), crc32_at=(0, 4)
    )
    layout = FileLayout(path="f", size=8 + len(bits), literals=(), payloads=(payload,))
    done: list[int] = []
    limits = TransferLimits(memory_budget=1, threads=1)
    write_files([layout], tmp_path, source, {"t": tiling}, limits=limits, advance=done.append)
    crc = zlib.crc32(bits).to_bytes(4, "little")
    assert (tmp_path / "f").read_bytes() == crc + crc + bits
    assert len(done) > 3
    assert max(done) <= 64 << 10


@given(tiled_tensors(), st.data())
def test_one_flipped_bit_is_found_at_its_index(
    array_source: MakeSource,
    drawn: tuple[Tiling, dict[str, Array], Array],
    data: st.DataObject,
) -> None:
    """Equal tensors have no difference; one bit turned in one source is one, at that element."""
    tiling, sources, expected = drawn
    good = array_source({"t": expected})
    tilings = {"t": tiling}
    (digest,) = compare(good, array_source(sources), tilings, limits=LIMITS, advance=ignore)
    assert digest.name == "t"
    assert digest.sha256 == hashlib.sha256(expected.tobytes()).hexdigest()
    assert (digest.first_difference, digest.num_different) == (None, 0)

    tile = data.draw(st.sampled_from([tile for tile in tiling.tiles if tile.source]))
    inside = [data.draw(st.integers(0, n - 1)) for n in tile.target_box.shape]
    assert tile.source is not None
    place = tuple(a + b for a, b in zip(tile.source_box.starts, inside, strict=True))
    damaged = {name: array.copy() for name, array in sources.items()}
    damaged[tile.source][place] ^= 1 << data.draw(st.integers(0, 15))
    (digest,) = compare(good, array_source(damaged), tilings, limits=LIMITS, advance=ignore)
    index = tuple(a + b for a, b in zip(tile.target_box.starts, inside, strict=True))
    assert (digest.first_difference, digest.num_different) == (index, 1)
    assert digest.sha256 == hashlib.sha256(expected.tobytes()).hexdigest()


def test_padding_that_is_not_zero_is_a_difference(array_source: MakeSource) -> None:
    """Stale rows beyond the vocabulary are found, the first of them named, all counted."""
    box, zeros = Box.whole((2, 3)), Box.whole((1, 3))
    tiling = Tiling((3, 3), (Tile("s", box, box), Tile(None, zeros, zeros.shift((2, 0)))))
    expected = np.vstack([words((2, 3)), [[0, 5, 6]]]).astype(np.uint16)
    (digest,) = compare(
        array_source({"t": expected}),
        array_source({"s": words((2, 3))}),
        {"t": tiling},
        limits=LIMITS,
        advance=ignore,
    )
    assert (digest.first_difference, digest.num_different) == ((2, 1), 2)


@pytest.mark.parametrize("first", [(3, 299), (250, 7), (498, 0)])
def test_differences_far_apart_are_all_counted(
    array_source: MakeSource, first: tuple[int, int]
) -> None:
    """The first is the first in memory order, in whichever band; the count is over all bands."""
    shape = (500, 300)
    expected = words(shape)
    actual = expected.copy()
    for row, column in (first, (first[0] + 1, 0), (499, 299)):
        actual[row, column] ^= 1
    (digest,) = compare(
        array_source({"t": expected}),
        array_source({"s": actual}),
        {"t": whole("s", shape)},
        limits=TransferLimits(memory_budget=1, threads=1),
        advance=ignore,
    )
    assert (digest.first_difference, digest.num_different) == (first, 3)


@pytest.mark.parametrize("other", ["float16", "int16", "uint8"])
def test_equal_bits_of_another_dtype_are_not_equal(array_source: MakeSource, other: str) -> None:
    """bfloat16 bits labelled float16 are other numbers: every element differs."""  # a name
    expected = array_source({"t": words((4, 5))}, {"t": "bfloat16"})
    bits = words((4, 5)) if other != "uint8" else np.zeros((4, 5), np.uint8)
    actual = array_source({"s": bits}, {"s": other})
    (digest,) = compare(expected, actual, {"t": whole("s", (4, 5))}, limits=LIMITS, advance=ignore)
    assert (digest.first_difference, digest.num_different) == ((0, 0), 20)


def test_digests_come_in_the_order_of_the_tensors(array_source: MakeSource) -> None:
    """However the threads run, each digest is of the tensor it names; progress adds up."""
    arrays = {f"t{n}": words((n + 1, 700), start=n) for n in range(12)}
    source = array_source(arrays)
    expected = {name: hashlib.sha256(one.tobytes()).hexdigest() for name, one in arrays.items()}
    done: list[int] = []
    digests = compare(
        source,
        source,
        {name: whole(name, one.shape) for name, one in arrays.items()},
        limits=TransferLimits(threads=4),
        advance=done.append,
    )
    assert {digest.name: digest.sha256 for digest in digests} == expected
    assert [digest.name for digest in digests] == list(arrays)
    assert sum(done) == sum(one.nbytes for one in arrays.values())


def test_scalars_and_empty_tensors_are_moved_and_hashed(
    tmp_path: Path, array_source: MakeSource
) -> None:
    """A tensor without dimensions has one element; one without elements has a hash too."""
    arrays = {"scalar": np.array(0x1234, np.uint16), "empty": np.empty((0, 4), np.uint16)}
    source = array_source(arrays)
    tilings = {name: whole(name, one.shape) for name, one in arrays.items()}
    digests = compare(source, source, tilings, limits=LIMITS, advance=ignore)
    assert {digest.name: digest.sha256 for digest in digests} == {
        name: hashlib.sha256(one.tobytes()).hexdigest() for name, one in arrays.items()
    }
    payload = Payload(tensor="scalar", box=Box((), ()), offset=1, nbytes=2)
    layout = FileLayout(path="f", size=3, literals=((0, b"!"),), payloads=(payload,))
    write_files(
        [layout], tmp_path, source, {"scalar": whole("scalar", ())}, limits=LIMITS, advance=ignore
    )
    assert (tmp_path / "f").read_bytes() == b"!\x34\x12"


def one_file(size: int, name: str = "f") -> tuple[list[FileLayout], dict[str, Tiling]]:
    """The layout of one file that is one tensor of `size` bytes."""
    shape = (size // 256, 128)
    payload = Payload(tensor="t", box=Box.whole(shape), offset=0, nbytes=size)
    layout = FileLayout(path=name, size=size, literals=(), payloads=(payload,))
    return [layout], {"t": whole("t", shape)}


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path, array_source: MakeSource) -> None:
    """An existing file is an error, and stays as it was."""
    (tmp_path / "f").write_bytes(b"precious")
    layouts, tilings = one_file(1024)
    source = array_source({"t": words((4, 128))})
    with pytest.raises(CheckpointError, match="exists") as error:
        write_files(layouts, tmp_path, source, tilings, limits=LIMITS, advance=ignore)
    assert error.value.where == (str(tmp_path / "f"),)
    assert (tmp_path / "f").read_bytes() == b"precious"


def test_every_file_is_synced_before_it_is_closed(
    tmp_path: Path, array_source: MakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a conversion calls done survives a power cut: its bytes are on the disk, complete."""
    synced: dict[str, int] = {}
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced[path.name] = sum(path.read_bytes())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    layouts = [one_file(1024, name)[0][0] for name in ("f", "g")]
    source = array_source({"t": words((4, 128))})
    tilings = {"t": whole("t", (4, 128))}
    write_files(layouts, tmp_path, source, tilings, limits=LIMITS, advance=ignore)
    assert synced == dict.fromkeys("fg", sum(words((4, 128)).tobytes()))


@pytest.mark.parametrize("preallocate", [True, False], ids=["at once", "half way"])
def test_a_full_disk_is_one_error_that_names_the_file(
    tmp_path: Path,
    array_source: MakeSource,
    monkeypatch: pytest.MonkeyPatch,
    *,
    preallocate: bool,
) -> None:
    """Noticed before any work where the system can reserve space, in mid-write where it cannot."""
    if not preallocate:
        monkeypatch.delattr(os, "posix_fallocate")
    size = 1 << 20
    layouts, tilings = one_file(size)
    source = array_source({"t": words((size // 256, 128))})
    done: list[int] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        with pytest.raises(BridgeError) as error:
            write_files(
                layouts,
                tmp_path,
                source,
                tilings,
                limits=TransferLimits(memory_budget=1, threads=1),
                advance=done.append,
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert type(error.value) is CheckpointError
    assert error.value.message == "cannot write the file: File too large"
    assert error.value.where == (str(tmp_path / "f"),)
    assert bool(done) != preallocate


class ZeroSource:
    """A tensor of zeros of any size that is nowhere; fails, or waits, where told to."""

    def __init__(self, shape: tuple[int, ...], names: tuple[str, ...] = ("t",)) -> None:
        self.tensors = {name: TensorInfo(shape=shape, dtype=dtype_named("int16")) for name in names}
        self.failing: dict[str, BaseException] = {}
        self.slow = threading.Event()
        self.reading = 0

    def read_into(self, name: str, box: Box, out: Words) -> None:
        """Zeros."""
        assert out.shape == box.shape
        if name in self.failing:
            raise self.failing[name]
        self.reading += 1
        if name == "slow":
            self.slow.set()
            time.sleep(0.2)
        out[...] = 0
        self.reading -= 1

    def close(self) -> None:
        """Nothing to do."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return


def test_an_error_of_the_source_is_the_error(tmp_path: Path) -> None:
    """A shard that ends early is reported as that, not as a failed write."""
    layouts, tilings = one_file(1024)
    source = ZeroSource((4, 128))
    source.failing["t"] = CorruptFileError("the file ends", where="shard")
    with pytest.raises(CorruptFileError, match="the file ends"):
        write_files(layouts, tmp_path, source, tilings, limits=LIMITS, advance=ignore)


def test_no_thread_writes_after_the_file_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an error the file stays open until its other writers are done.

    A descriptor closed under a running write may by then be another file's.
    """
    shape = (4, 128)
    source = ZeroSource(shape, ("slow", "bad"))

    class LateError(CorruptFileError):
        """Raised once the other thread is in the middle of its work."""

    def fail(name: str, box: Box, out: Words) -> None:
        if name == "bad":
            source.slow.wait(10)
            raise LateError("bad")
        ZeroSource.read_into(source, name, box, out)

    monkeypatch.setattr(source, "read_into", fail)
    close, open_reads = os.close, []

    def watched(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink() == tmp_path / "f":
            open_reads.append(source.reading)
        close(descriptor)

    monkeypatch.setattr(os, "close", watched)
    payloads = tuple(
        Payload(tensor=name, box=Box.whole(shape), offset=at, nbytes=1024)
        for name, at in (("bad", 0), ("slow", 1024))
    )
    layout = FileLayout(path="f", size=2048, literals=(), payloads=payloads[::-1])
    tilings = {name: whole(name, shape) for name in ("slow", "bad")}
    with pytest.raises(LateError):
        write_files([layout], tmp_path, source, tilings, limits=LIMITS, advance=ignore)
    assert open_reads == [0]


def test_what_has_not_begun_is_dropped_on_an_error(tmp_path: Path) -> None:
    """After a failure no further payload is started: a long conversion ends at once."""
    shape = (4, 128)
    names = tuple(f"t{n}" for n in range(2000))
    source = ZeroSource(shape, names)
    source.failing[names[0]] = CorruptFileError("bad")
    started = []

    def advance(nbytes: int) -> None:
        started.append(nbytes)
        time.sleep(0.002)

    payloads = tuple(
        Payload(tensor=name, box=Box.whole(shape), offset=1024 * n, nbytes=1024)
        for n, name in enumerate(names)
    )
    layout = FileLayout(path="f", size=1024 * 2000, literals=(), payloads=payloads)
    tilings = {name: whole(name, shape) for name in names}
    with pytest.raises(CorruptFileError):
        write_files([layout], tmp_path, source, tilings, limits=LIMITS, advance=advance)
    assert len(started) < 1900


@pytest.mark.parametrize("job", ["write", "compare"])
def test_buffers_stay_within_the_budget(tmp_path: Path, job: str) -> None:
    """A 64 MiB tensor moves through a budget of 2 MiB: tracemalloc sees every numpy buffer."""
    shape = (1 << 10, 1 << 15)
    size = 2 * math.prod(shape)
    source = ZeroSource(shape)
    tilings = {"t": whole("t", shape)}
    budget = 2 << 20
    limits = TransferLimits(memory_budget=budget, threads=2)
    payload = Payload(tensor="t", box=Box.whole(shape), offset=0, nbytes=size, crc32_at=(size,))
    layout = FileLayout(path="f", size=size + 4, literals=(), payloads=(payload,))
    tracemalloc.start()
    try:
        if job == "write":
            write_files([layout], tmp_path, source, tilings, limits=limits, advance=ignore)
        else:
            (digest,) = compare(source, source, tilings, limits=limits, advance=ignore)
            assert digest.num_different == 0
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < budget


@pytest.mark.parametrize(
    ("memory_budget", "threads", "expected"),
    [
        (1 << 30, 4, 16 << 20),
        (32 << 20, 4, 2 << 20),
        (32 << 20, 1, 8 << 20),
        (1, 8, 64 << 10),
    ],
)
def test_a_band_is_a_quarter_of_a_threads_share(
    memory_budget: int, threads: int, expected: int
) -> None:
    """Four buffers a thread fit the budget, within 64 KiB and 16 MiB each."""
    limits = TransferLimits(memory_budget=memory_budget, threads=threads)
    assert limits.band_nbytes == expected


# A process of its own, so that nothing but the conversion is in its peak. The tensor is 192 MiB in
# a sparse file; target and source are read back and compared in the same budget of 8 MiB.
_PEAK = """
import json, resource, struct, sys
from pathlib import Path
from bridge.storage.safetensors import SafetensorsSource
from bridge.storage.safetensors_layout import layout_from_header
from bridge.tiling import Box, Tile, Tiling
from bridge.comparison import compare
from bridge.transfer import TransferLimits, write_files

top = Path(sys.argv[1])
shape = (3 << 13, 1 << 12)
size = 2 * shape[0] * shape[1]
header = {"t": {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}
body = json.dumps(header).encode()
(top / "a").mkdir()
with (top / "a/model.safetensors").open("wb") as stream:
    stream.write(struct.pack("<Q", len(body)) + body)
    stream.truncate(8 + len(body) + size)
box = Box.whole(shape)
cut = shape[0] // 3
parts = [Box((a, 0), (b, shape[1])) for a, b in ((2 * cut, shape[0]), (0, cut), (cut, 2 * cut))]
tiling = Tiling.concatenate([("t", part) for part in parts])
back = Tiling(shape, tuple(Tile("t", t.target_box, t.source_box) for t in tiling.tiles))
limits = TransferLimits(memory_budget=8 << 20, threads=2)
with SafetensorsSource(top / "a") as source:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layout = layout_from_header(source.headers["model.safetensors"])
    (top / "b").mkdir()
    write_files([layout], top / "b", source, {"t": tiling}, limits=limits, advance=lambda _: None)
    with SafetensorsSource(top / "b") as target:
        (digest,) = compare(source, target, {"t": back}, limits=limits, advance=lambda _: None)
    assert digest.num_different == 0
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_process_grows_by_its_budget_not_by_the_tensor(tmp_path: Path) -> None:
    """Writing and comparing a 192 MiB tensor in 8 MiB adds less than 24 MiB to the peak RSS."""
    done = subprocess.run(  # noqa: S603  # our own interpreter and program
        [sys.executable, "-c", _PEAK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+\n", done.stdout)
    assert int(done.stdout) * 1024 < 24 << 20


def test_the_sources_of_these_tests_are_sources(array_source: MakeSource) -> None:
    """What stands in for files here has the shape of the real thing."""
    sources: Mapping[str, TensorSource] = {
        "arrays": array_source({"t": words((2, 2))}),
        "zeros": ZeroSource((2, 2)),
    }
    for source in sources.values():
        out = np.empty((1, 2), np.uint16)
        source.read_into("t", Box((1, 0), (2, 2)), out)
        source.close()
    assert sources["arrays"].closed  # type: ignore[attr-defined]  # the array source's own
