"""Reading ahead: the right words, in order, and never more bytes than the buffer has."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from bridge.dtypes import Words
from bridge.errors import CorruptFileError
from bridge.tiling import Box, Tile, Tiling
from harness.streaming.reading import HeldRows, HeldSource, ReadAhead, fill
from tests.conftest import ArraySource

WHOLE = Box.whole((8, 16))


def source_of(num_tensors: int = 6, rows: int = 8, columns: int = 16) -> ArraySource:
    """Tensors t0, t1, ... whose elements are all different."""
    size = rows * columns
    return ArraySource(
        {
            f"t{number}": (np.arange(size, dtype=np.int32) + number * size).reshape(rows, columns)
            for number in range(num_tensors)
        }
    )


def wholes(source: ArraySource) -> list[list[tuple[str, Box]]]:
    """One segment for each tensor."""
    return [[(name, Box.whole(info.shape))] for name, info in source.tensors.items()]


@pytest.mark.parametrize("room", [512, 1000, 1024, 4096])
def test_segments_come_in_order_and_within_the_buffer(room: int) -> None:
    """With room for one, for one and a half, for two, for all."""
    source = source_of()
    with ReadAhead(source, wholes(source), max_nbytes=room, threads=2) as ahead:
        for number, held in enumerate(ahead):
            name = f"t{number}"
            box = Box((1, 2), (5, 9))
            assert np.array_equal(source.arrays[name][1:5, 2:9], held.words(name, box))
            assert held.nbytes == 512
        assert 512 <= ahead.most_held <= room


def test_the_next_segment_is_read_while_one_is_in_use() -> None:
    """Where there is room for both."""
    source = source_of(3)
    with ReadAhead(source, wholes(source), max_nbytes=1024, threads=1) as ahead:
        segments = iter(ahead)
        next(segments)
        ahead.wait()
        assert {name for name, _ in source.reads} == {"t0", "t1"}


def test_segments_of_unequal_size_share_the_buffer() -> None:
    """A large one waits until the one before it is given up; none overwrites another in use."""
    source = source_of(6)
    rows = [2, 8, 1, 8, 3, 5]
    wanted = [[(f"t{number}", Box.rows(0, count, (16,)))] for number, count in enumerate(rows)]
    with ReadAhead(source, wanted, max_nbytes=10 * 64, threads=2) as ahead:
        for number, held in enumerate(ahead):
            ahead.wait()
            words = held.words(f"t{number}", Box.rows(0, rows[number], (16,)))
            assert np.array_equal(source.arrays[f"t{number}"][: rows[number]], words)


def test_each_element_is_read_once() -> None:
    """However a segment is cut for the threads."""
    source = source_of(2, rows=1 << 13, columns=1 << 10)
    with ReadAhead(source, wholes(source), max_nbytes=1 << 26, threads=2) as ahead:
        for _ in ahead:
            pass
    counts = {name: np.zeros(info.shape, int) for name, info in source.tensors.items()}
    for name, box in source.reads:
        counts[name][box.slices] += 1
    assert all((count == 1).all() for count in counts.values())
    assert len(source.reads) > 2


class FailingSource(ArraySource):
    """Fails at the third tensor."""

    def read_into(self, name: str, box: Box, out: Words) -> None:
        """Fill `out`, or fail."""
        if name == "t2":
            raise CorruptFileError("the file ends early", where=name)
        super().read_into(name, box, out)


def test_an_error_comes_with_its_segment_and_ends_the_threads() -> None:
    """Segments before it are served; nothing hangs."""
    whole = source_of()
    source = FailingSource({name: array.view(np.int32) for name, array in whole.arrays.items()})
    with ReadAhead(source, wholes(source), max_nbytes=1024, threads=2) as ahead:
        segments = iter(ahead)
        for served in ("t0", "t1"):
            assert np.array_equal(source.arrays[served], next(segments).words(served, WHOLE))
        with pytest.raises(CorruptFileError, match="ends early"):
            next(segments)
    assert not [one for one in threading.enumerate() if one.name.startswith("read-ahead")]


def test_what_is_not_held_is_read_from_the_source() -> None:
    """A wrong plan may ask for anything, and is to be caught by its numbers."""
    source = source_of(2)
    held = HeldSource(source, [("t0", Box.whole((8, 16)), source.arrays["t0"])])
    box = Box((0, 0), (2, 16))
    assert np.array_equal(source.arrays["t1"][:2], held.words("t1", box))
    assert [("t1", box)] == source.reads


def test_a_tensor_is_filled_by_its_tiling() -> None:
    """Tiles of held boxes land where the tiling says, padding is zero, bfloat16 is exact."""
    words = np.arange(0x3F80, 0x3F80 + 12, dtype=np.uint16).reshape(3, 4)
    source = ArraySource({"a": words}, {"a": "bfloat16"})
    box = Box((0, 1), (3, 4))
    held = HeldSource(source, [("a", box, words[:, 1:])])
    tiling = Tiling(
        (3, 3),
        (
            Tile("a", Box((1, 1), (3, 4)), Box((0, 0), (2, 3))),
            Tile(None, Box((0, 0), (1, 3)), Box((2, 0), (3, 3))),
        ),
    )
    tensor = torch.full((3, 3), torch.nan)
    fill(tensor, tiling, held)
    expected = (words[1:, 1:].astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(np.concatenate([expected, np.zeros((1, 3))]), tensor.numpy())
    assert not source.reads


def test_rows_are_those_of_the_box() -> None:
    """The oracle counts from the box's corner."""
    numbers = np.arange(24, dtype=np.float32).reshape(6, 4)
    source = ArraySource({"a": numbers})
    rows = HeldRows(HeldSource(source, []), "a", Box((2, 1), (6, 3)))
    assert rows.shape == (4, 2)
    assert np.array_equal(numbers[3:5, 1:3], rows[1:3])


@pytest.mark.parametrize(
    ("dtype", "word", "expected"),
    [
        ("bfloat16", 0xC049, -3.140625),
        ("float16", 0x3555, 0.333251953125),
        ("float32", 0x40490FDB, np.float32(np.pi)),
        ("float64", 0x400921FB54442D18, np.pi),
    ],
)
def test_rows_are_numbers_exactly(dtype: str, word: int, expected: float) -> None:
    """Of every floating dtype, in one that holds them."""
    size = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}[dtype]
    source = ArraySource({"a": np.full((2, 3), word, f"<u{size}")}, {"a": dtype})
    found = HeldRows(HeldSource(source, []), "a", Box.whole((2, 3)))[0:2]
    assert found.dtype.kind == "f"
    assert (found.astype(np.float64) == float(expected)).all()
