"""Comparing files with files: every bit, exact counts, where pieces and tiles meet."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest

from bridge import comparison
from bridge.comparison import Digest, compare, compare_files
from bridge.errors import CorruptFileError
from bridge.manifest import FileEntry, Part
from bridge.storage.files import FileRanges
from bridge.storage.safetensors import SafetensorsSource
from bridge.tiling import Box, Tile, Tiling
from bridge.transfer import TransferLimits

Array = np.ndarray[Any, np.dtype[Any]]
SHAPE = (900, 500)
WINDOW = 64 << 10  # bytes, the smallest there is
TINY = TransferLimits(memory_budget=1, threads=2)
LAST = SHAPE[0] * SHAPE[1] - 1


def write_source(directory: Path, arrays: Mapping[str, Array], *, skew: int = 0) -> Path:
    """A checkpoint of one file of 16-bit words; `skew` spaces pad its header."""
    directory.mkdir()
    header, position = [], 0
    for name, array in arrays.items():
        shape = ",".join(map(str, array.shape))
        span = f"{position},{position + array.nbytes}"
        header.append(f'"{name}":{{"dtype":"I16","shape":[{shape}],"data_offsets":[{span}]}}')
        position += array.nbytes
    body = ("{" + ",".join(header) + "}").encode()
    body += b" " * (-len(body) % 8 + skew)
    data = b"".join(array.tobytes() for array in arrays.values())
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(body)) + body + data)
    return directory


def counting() -> Array:
    """Words that tell where they belong."""
    return np.arange(SHAPE[0] * SHAPE[1]).astype("<u2").reshape(SHAPE)


def in_three(array: Array) -> tuple[dict[str, Array], Tiling]:
    """The tensor as two files' tensors hold it: the middle rows in one, the outer in another."""
    sources = {"middle": array[200:650], "outer": np.concatenate([array[:200], array[650:]])}
    parts = [
        ("outer", Box.rows(0, 200, SHAPE[1:])),
        ("middle", Box.rows(0, 450, SHAPE[1:])),
        ("outer", Box.rows(200, 450, SHAPE[1:])),
    ]
    return sources, Tiling.concatenate(parts)


def compared(
    tmp_path: Path, actual: Array, *, limits: TransferLimits = TINY, skew: int = 0
) -> Digest:
    """What comparing the counting tensor with `actual`, both in files, finds."""
    sources, tiling = in_three(actual)
    with (
        SafetensorsSource(write_source(tmp_path / "expected", {"t": counting()})) as expected,
        SafetensorsSource(write_source(tmp_path / "actual", sources, skew=skew)) as found,
    ):
        done: list[int] = []
        (digest,) = compare(expected, found, {"t": tiling}, limits=limits, advance=done.append)
    assert sum(done) == actual.nbytes
    assert digest.sha256 == hashlib.sha256(counting().tobytes()).hexdigest()
    return digest


@pytest.fixture
def no_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if anything goes through a buffer: these tests are about runs of bytes."""

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(comparison._Comparison, "_bands", refuse)


@pytest.mark.parametrize("skew", [0, 1], ids=["aligned", "at an odd byte"])
@pytest.mark.parametrize(
    "places",
    [
        (),
        (0,),
        (LAST,),
        (WINDOW // 2 - 1,),
        (WINDOW // 2,),
        (WINDOW // 2 - 1, WINDOW // 2),
        (200 * 500 - 1, 200 * 500),
        (650 * 500, LAST),
        (7, 8, 9, 123_456, LAST),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_buffers")
def test_each_difference_counts_and_the_first_is_named(
    tmp_path: Path, places: tuple[int, ...], skew: int
) -> None:
    """One bit each, at the borders of pieces and of tiles and inside them."""
    actual = counting()
    for place in places:
        actual.reshape(-1)[place] ^= 0x8000
    digest = compared(tmp_path, actual, skew=skew)
    first = divmod(places[0], SHAPE[1]) if places else None
    assert (digest.first_difference, digest.num_different) == (first, len(places))


@pytest.mark.usefixtures("no_buffers")
def test_no_window_ends_within_an_element(tmp_path: Path) -> None:
    """A budget that divides to an odd number of bytes still names the exact place."""
    limits = TransferLimits(memory_budget=(1 << 30) // 48, threads=4)
    share = (1 << 30) // 48 // 16  # bytes: of each of four buffers of each thread
    assert share % 2
    place = share // 2  # the element that such a cut would go through
    words = np.arange(800_000).astype("<u2")
    assert words.nbytes > share
    flipped = words.copy()
    flipped[place] ^= 0x0100
    tiling = Tiling.concatenate([("t", Box.whole(words.shape))])
    with (
        SafetensorsSource(write_source(tmp_path / "expected", {"t": words})) as expected,
        SafetensorsSource(write_source(tmp_path / "actual", {"t": flipped})) as actual,
    ):
        (digest,) = compare(expected, actual, {"t": tiling}, limits=limits, advance=lambda _: None)
    assert (digest.first_difference, digest.num_different) == ((place,), 1)


@pytest.mark.usefixtures("no_buffers")
def test_every_element_may_differ(tmp_path: Path) -> None:
    """All are counted, piece after piece."""
    digest = compared(tmp_path, counting() ^ np.uint16(1))
    assert (digest.first_difference, digest.num_different) == ((0, 0), LAST + 1)


@pytest.mark.usefixtures("no_buffers")
def test_a_tensor_of_many_segments_is_one_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions go on counting where one segment ends."""
    monkeypatch.setattr(comparison, "SEGMENT_NBYTES", 100_000)
    actual = counting()
    actual[899, 3] ^= 1
    digest = compared(tmp_path, actual)
    assert (digest.first_difference, digest.num_different) == ((899, 3), 1)


def test_windows_of_all_threads_stay_within_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped pages are memory too: what is looked at at once is counted here, over all threads."""
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
    arrays = {f"t{n}": counting() for n in range(4)}
    source = write_source(tmp_path / "a", arrays)
    box = Box.whole(SHAPE)
    tilings = {name: Tiling(SHAPE, (Tile(name, box, box),)) for name in arrays}
    limits = TransferLimits(memory_budget=1 << 20, threads=2)
    with SafetensorsSource(source) as one:
        compare(one, one, tilings, limits=limits, advance=lambda _: None)
    assert 0 < most <= 1 << 20


def test_a_file_cut_after_it_was_opened_is_corrupt(tmp_path: Path) -> None:
    """Both sides are read to the end, and the one that ends early is named."""
    sources, tiling = in_three(counting())
    with (
        SafetensorsSource(write_source(tmp_path / "expected", {"t": counting()})) as expected,
        SafetensorsSource(write_source(tmp_path / "actual", sources)) as actual,
    ):
        path = tmp_path / "actual" / "model.safetensors"
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 1000)
        with pytest.raises(CorruptFileError, match="bytes early") as error:
            compare(expected, actual, {"t": tiling}, limits=TINY, advance=lambda _: None)
    assert error.value.where == (str(path),)


def test_what_has_no_files_is_compared_with_what_has(
    tmp_path: Path, array_source: Callable[..., Any]
) -> None:
    """On either side."""
    actual = counting()
    actual[5, 6] ^= 1
    box = Box.whole(SHAPE)
    tilings = {"t": Tiling(SHAPE, (Tile("t", box, box),))}
    with SafetensorsSource(write_source(tmp_path / "a", {"t": actual})) as files:
        for one, other in (
            (array_source({"t": counting()}), files),
            (files, array_source({"t": counting()})),
        ):
            (digest,) = compare(one, other, tilings, limits=TINY, advance=lambda _: None)
            assert (digest.first_difference, digest.num_different) == ((5, 6), 1)


def test_a_file_is_open_as_long_as_it_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of a thousand shards may be compared where a thousand files may be open."""
    arrays = {f"t{n}": counting()[:40] for n in range(30)}
    expected = tmp_path / "expected"
    write_source(tmp_path / "actual", arrays)
    for number, (name, array) in enumerate(arrays.items()):
        shard = write_source(tmp_path / f"{number}", {name: array}) / "model.safetensors"
        expected.mkdir(exist_ok=True)
        shard.rename(expected / f"{number}.safetensors")
    index = {"weight_map": {name: f"{number}.safetensors" for number, name in enumerate(arrays)}}
    (expected / "model.safetensors.index.json").write_text(json.dumps(index))
    tilings = {}
    for name, array in arrays.items():
        whole = Box.whole(array.shape)
        tilings[name] = Tiling(array.shape, (Tile(name, whole, whole),))
    most, lock, first_and_count = 0, Lock(), comparison.first_and_count

    def watched(*args: Any, **how: Any) -> tuple[int, int]:  # noqa: ANN401
        nonlocal most
        with lock:
            most = max(most, len(list(Path("/proc/self/fd").iterdir())))
        return first_and_count(*args, **how)

    monkeypatch.setattr(comparison, "first_and_count", watched)
    with (
        SafetensorsSource(expected) as one,
        SafetensorsSource(tmp_path / "actual") as other,
    ):
        before = len(list(Path("/proc/self/fd").iterdir()))
        files = {
            header.file: FileEntry(
                nbytes=(expected / header.file).stat().st_size,
                parts=tuple(
                    Part(tensor=name, starts=(0, 0), offset=found.offset, nbytes=found.info.nbytes)
                    for name, found in header.tensors.items()
                ),
            )
            for header in one.headers.values()
        }
        digests, hashed = compare_files(
            one, other, tilings, expected, files, limits=TINY, advance=lambda _: None
        )
    assert len(digests) == len(hashed) == 30
    assert not any(digest.num_different for digest in digests)
    assert most - before <= 1 + TINY.threads + 1  # of the other side, of this one, and the listing
