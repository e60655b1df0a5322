"""Runs of bytes: which boxes are one, how they line up, how they are cut."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.storage.extents import Extent, aligned, flat_index, in_order, is_contiguous, pieces
from bridge.tiling import Box

FILE, OTHER = Path("a"), Path("b")


@st.composite
def shapes_and_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    """An array of up to three dimensions and a box of it that is not empty."""
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    starts = tuple(draw(st.integers(0, n - 1)) for n in shape)
    stops = tuple(draw(st.integers(a + 1, n)) for a, n in zip(starts, shape, strict=True))
    return shape, Box(starts, stops)


@given(shapes_and_boxes())
def test_a_run_is_a_box_whose_elements_follow_each_other(
    drawn: tuple[tuple[int, ...], Box],
) -> None:
    """Said of exactly the boxes whose numbers count up without a gap, from their first element."""
    shape, box = drawn
    numbers = np.arange(math.prod(shape)).reshape(shape)[box.slices].reshape(-1)
    assert is_contiguous(box, shape) == bool((np.diff(numbers) == 1).all())
    assert flat_index(box.starts, shape) == numbers[0]


def rows(start: int, stop: int) -> Box:
    """Rows of an array of two columns."""
    return Box.rows(start, stop, (2,))


def test_runs_come_in_the_order_of_the_array_and_neighbours_are_joined() -> None:
    """Two that follow each other in one file are one; those of two files are not."""
    parts = [
        (rows(3, 4), [Extent(OTHER, 16, 2)]),
        (rows(1, 3), [Extent(FILE, 12, 4)]),
        (rows(0, 1), [Extent(FILE, 10, 2)]),
    ]
    assert in_order((4, 2), parts) == [Extent(FILE, 10, 6), Extent(OTHER, 16, 2)]


@pytest.mark.parametrize(
    "boxes",
    [
        [Box((0, 0), (2, 1)), Box((0, 1), (2, 2))],
        [rows(0, 1)],
        [rows(1, 2)],
    ],
    ids=["columns", "the end is missing", "the start is missing"],
)
def test_boxes_that_are_no_runs_of_the_array_have_no_order(boxes: list[Box]) -> None:
    """Columns interleave; a hole is nobody's run."""
    parts = [(box, [Extent(FILE, 0, box.volume)]) for box in boxes]
    assert in_order((2, 2), parts) is None


def test_empty_boxes_hold_nothing_up() -> None:
    """An array without elements has no runs, which is not the same as having no order."""
    assert in_order((0, 2), [(rows(0, 0), [])]) == []


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=5),
    st.lists(st.integers(0, 60), max_size=4),
    st.integers(1, 9),
)
def test_pairs_of_pieces_cover_both_sides_in_step(
    lengths: list[int], cuts: list[int], max_nbytes: int
) -> None:
    """Cut anywhere on either side, byte n of one is paired with byte n of the other."""
    total = sum(lengths)
    borders = sorted({0, total, *(cut for cut in cuts if cut < total)})
    one, other, position = [], [], 0
    for number, length in enumerate(lengths):
        one.append(Extent(Path(f"one{number}"), 100 + position, length))
        position += length
    for start, stop in pairwise(borders):
        other.append(Extent(Path(f"other{start}"), 500 + start, stop - start))
    left, right = [], []
    for a, b in aligned(one, other, max_nbytes=max_nbytes):
        assert 0 < a.nbytes == b.nbytes <= max_nbytes
        left += [(a.path, n) for n in range(a.offset, a.offset + a.nbytes)]
        right += [(b.path, n) for n in range(b.offset, b.offset + b.nbytes)]
    assert left == [(e.path, n) for e in one for n in range(e.offset, e.offset + e.nbytes)]
    assert right == [(e.path, n) for e in other for n in range(e.offset, e.offset + e.nbytes)]


def test_pieces_are_as_long_as_allowed() -> None:
    """Only the last of a run is shorter."""
    found = list(pieces([Extent(FILE, 5, 7), Extent(OTHER, 0, 2)], max_nbytes=3))
    assert found == [
        Extent(FILE, 5, 3),
        Extent(FILE, 8, 3),
        Extent(FILE, 11, 1),
        Extent(OTHER, 0, 2),
    ]
