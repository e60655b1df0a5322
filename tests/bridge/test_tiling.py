"""The tiling: what it refuses, and that its arithmetic is that of array slices."""

from __future__ import annotations

import pytest

from bridge.errors import PlanError
from bridge.tiling import Box, Tile, Tiling, bands, find_overlap, invert


def part(rows: tuple[int, int], columns: tuple[int, int]) -> Tile:
    """A tile of "s" that covers these rows and columns of its target."""
    box = Box((rows[0], columns[0]), (rows[1], columns[1]))
    return Tile("s", box, box)


@pytest.mark.parametrize(
    ("starts", "stops"),
    [((2,), (1,)), ((-1,), (3,)), ((0, 0), (1,)), ((), (1,)), ((0, 5), (2, 4))],
    ids=["inverted", "negative", "short", "none", "inverted column"],
)
def test_ranges_that_are_no_box_are_refused(
    starts: tuple[int, ...], stops: tuple[int, ...]
) -> None:
    """A box has as many starts as stops, none negative, none after its stop."""
    with pytest.raises(PlanError, match="not a box"):
        Box(starts, stops)


def test_a_box_knows_its_shape_volume_and_slices() -> None:
    """Extents, their product, and the numpy index of the same elements."""
    box = Box((2, 0, 1), (5, 4, 2))
    assert box.shape == (3, 4, 1)
    assert box.volume == 12
    assert box.slices == (slice(2, 5), slice(0, 4), slice(1, 2))
    assert str(box) == "[2:5, 0:4, 1:2]"
    assert Box((), ()).volume == 1
    assert Box.whole((3, 0)).volume == 0


def test_intersections_are_the_common_elements() -> None:
    """Overlap, touch and distance in one dimension decide; touching shares nothing."""
    box = Box((0, 0), (4, 4))
    assert box.intersect(Box((2, 1), (6, 3))) == Box((2, 1), (4, 3))
    assert box.intersect(Box((4, 0), (6, 4))) is None
    assert box.intersect(Box((0, 7), (4, 9))) is None
    assert box.intersect(Box((3, 3), (4, 4))) == Box((3, 3), (4, 4))


def test_a_box_moves_and_is_counted_from_another_corner() -> None:
    """`shift` adds, `relative_to` subtracts the corner."""
    assert Box((1, 2), (3, 5)).shift((10, 20)) == Box((11, 22), (13, 25))
    assert Box((11, 22), (13, 25)).relative_to(Box((10, 20), (99, 99))) == Box((1, 2), (3, 5))


def test_a_tile_neither_stretches_nor_drops() -> None:
    """Source and target box of unequal shape are refused, equal volume or not."""
    with pytest.raises(PlanError, match="differ in shape"):
        Tile("s", Box((0, 0), (2, 3)), Box((0, 0), (3, 2)))


@pytest.mark.parametrize(
    ("tiles", "complaint"),
    [
        ((part((0, 2), (0, 4)), part((3, 4), (0, 4))), "12 of 16"),
        ((part((0, 4), (0, 3)),), "12 of 16"),
        ((), "0 of 16"),
        ((part((0, 2), (0, 4)), part((1, 3), (0, 4))), "overlap"),
        ((part((0, 3), (0, 4)), part((2, 4), (0, 2))), "overlap"),
        ((part((0, 4), (0, 3)), part((0, 2), (2, 4))), "overlap"),
        ((part((0, 4), (0, 4)), part((0, 1), (0, 1))), "17 of 16"),
        ((part((0, 3), (0, 4)), part((4, 5), (0, 4))), "sticks out"),
        ((part((0, 2), (0, 8)),), "sticks out"),
    ],
    ids=[
        "hole", "missing column", "empty", "equal volume", "equal volume, uneven",
        "overlap in columns", "one twice", "below", "right",
    ],
)  # fmt: skip
def test_tiles_that_are_no_partition_are_refused(tiles: tuple[Tile, ...], complaint: str) -> None:
    """Holes, overlaps and tiles beyond the edge are refused when the tiling is built."""
    with pytest.raises(PlanError, match=complaint):
        Tiling((4, 4), tiles)


def test_tiles_with_fewer_dimensions_are_refused() -> None:
    """Four elements in a row are not a (4, 1) matrix, equal volume or not."""
    row = Box((0,), (4,))
    with pytest.raises(PlanError):
        Tiling((4, 1), (Tile("s", row, row),))


def test_two_scalars_on_one_place_are_refused() -> None:
    """A scalar tensor has one element; a second tile has nowhere to go."""
    point = Box((), ())
    Tiling((), (Tile("a", point, point),))
    assert find_overlap([point, point]) == (point, point)
    with pytest.raises(PlanError):
        Tiling((), (Tile("a", point, point), Tile("b", point, point)))


def test_tiles_may_come_in_any_order_and_cut_any_way() -> None:
    """A pinwheel of five rectangles, in no order, is a partition."""
    pinwheel = (
        part((1, 2), (1, 2)), part((2, 3), (0, 2)), part((0, 1), (1, 3)),
        part((1, 3), (2, 3)), part((0, 2), (0, 1)),
    )  # fmt: skip
    assert Tiling((3, 3), pinwheel).tiles == pinwheel


def test_overlap_is_found_behind_a_long_box() -> None:
    """A box that began long before is still there when a later one begins."""
    long, short, late = Box((0, 0), (9, 1)), Box((1, 1), (2, 2)), Box((8, 0), (9, 2))
    assert find_overlap([short, late, long]) == (long, late)
    assert find_overlap([short, long, Box((8, 1), (9, 2))]) is None


def test_empty_boxes_overlap_nothing() -> None:
    """A box without elements can be anywhere."""
    assert find_overlap([Box((0, 0), (4, 4)), Box((2, 2), (2, 3))]) is None


def test_concatenate_stacks_in_the_order_given() -> None:
    """Rows of several sources, one after the other, partial boxes included."""
    tiling = Tiling.concatenate([("b", Box((2, 0), (4, 3))), (None, Box((0, 0), (1, 3)))])
    assert tiling == Tiling(
        (3, 3),
        (
            Tile("b", Box((2, 0), (4, 3)), Box((0, 0), (2, 3))),
            Tile(None, Box((0, 0), (1, 3)), Box((2, 0), (3, 3))),
        ),
    )


def test_concatenate_passes_over_empty_parts() -> None:
    """A part without rows takes no room."""
    empty, full = Box((3, 0), (3, 2)), Box.whole((2, 2))
    assert Tiling.concatenate([("a", empty), ("b", full)]).shape == (2, 2)


def test_concatenate_refuses_rows_of_unequal_length() -> None:
    """Sources of other widths cannot be stacked."""
    with pytest.raises(PlanError):
        Tiling.concatenate([("a", Box.whole((2, 3))), ("b", Box.whole((2, 4)))])


def test_restrict_cuts_tiles_and_moves_both_sides() -> None:
    """A slice across a tile's border takes the matching part of each source."""
    tiling = Tiling.concatenate([("a", Box((10, 0), (12, 4))), ("b", Box((5, 0), (8, 4)))])
    cut = tiling.restrict([Box((1, 1), (4, 3))])
    assert cut == Tiling(
        (3, 2),
        (
            Tile("a", Box((11, 1), (12, 3)), Box((0, 0), (1, 2))),
            Tile("b", Box((5, 1), (7, 3)), Box((1, 0), (3, 2))),
        ),
    )


def test_restrict_joins_boxes_along_the_axis_asked_for() -> None:
    """Two column blocks put side by side keep their rows."""
    whole = Tiling.concatenate([("a", Box.whole((2, 6)))])
    joined = whole.restrict([Box((0, 4), (2, 6)), Box((0, 0), (2, 1))], axis=1)
    assert joined == Tiling(
        (2, 3),
        (
            Tile("a", Box((0, 4), (2, 6)), Box((0, 0), (2, 2))),
            Tile("a", Box((0, 0), (2, 1)), Box((0, 2), (2, 3))),
        ),
    )


def test_restrict_beyond_the_tensor_is_refused() -> None:
    """A box that sticks out leaves a hole, and a hole is refused."""
    with pytest.raises(PlanError):
        Tiling.concatenate([("a", Box.whole((2, 6)))]).restrict([Box((0, 0), (3, 6))])


def test_a_scalar_can_be_restricted_to_itself() -> None:
    """A tensor without dimensions has one slice."""
    point = Box((), ())
    scalar = Tiling((), (Tile("a", point, point),))
    assert scalar.restrict([point]) == scalar


def test_locate_names_source_and_index_or_padding() -> None:
    """An element is found through its tile; padding has no source; outside there is nothing."""
    tiling = Tiling.concatenate([("b", Box((2, 0), (4, 3))), (None, Box((0, 0), (1, 3)))])
    assert tiling.locate((1, 2)) == ("b", (3, 2))
    assert tiling.locate((2, 1)) == (None, (0, 1))
    with pytest.raises(IndexError, match="outside"):
        tiling.locate((3, 0))


def test_invert_swaps_the_sides_and_drops_zeros() -> None:
    """Each source is tiled by the targets that read it; padding is nobody's."""
    tilings = {
        "t": Tiling.concatenate([("b", Box((1, 0), (3, 2))), (None, Box((0, 0), (4, 2)))]),
        "u": Tiling.concatenate([("b", Box((0, 0), (1, 2))), ("a", Box.whole((1, 2)))]),
    }
    assert invert(tilings, {"a": (1, 2), "b": (3, 2)}) == {
        "a": Tiling((1, 2), (Tile("u", Box((1, 0), (2, 2)), Box((0, 0), (1, 2))),)),
        "b": Tiling(
            (3, 2),
            (
                Tile("u", Box((0, 0), (1, 2)), Box((0, 0), (1, 2))),
                Tile("t", Box((0, 0), (2, 2)), Box((1, 0), (3, 2))),
            ),
        ),
    }


def test_invert_refuses_a_source_that_is_read_twice() -> None:
    """Two targets that read one element cannot be turned round."""
    twice = {name: Tiling.concatenate([("a", Box.whole((2, 2)))]) for name in "tu"}
    with pytest.raises(PlanError, match="8 of 4"):
        invert(twice, {"a": (2, 2)})


def test_invert_refuses_a_source_that_is_read_in_part() -> None:
    """An element that no target reads would be lost on the way back."""
    some = {"t": Tiling.concatenate([("a", Box((0, 0), (1, 2)))])}
    with pytest.raises(PlanError, match="2 of 4"):
        invert(some, {"a": (2, 2)})


@pytest.mark.parametrize("sources", [{}, {"a": (2, 2), "b": (1,)}], ids=["unknown", "not read"])
def test_invert_refuses_sources_that_do_not_match(sources: dict[str, tuple[int, ...]]) -> None:
    """What is read and what is there are the same names, or the odd ones are named."""
    tilings = {"t": Tiling.concatenate([("a", Box.whole((2, 2)))])}
    with pytest.raises(PlanError, match="1 tensors") as error:
        invert(tilings, sources)
    assert error.value.where == (("a",) if not sources else ("b",))


def test_bands_are_as_tall_as_the_limit_allows() -> None:
    """Complete rows while they fit: three rows of five at most sixteen elements."""
    assert list(bands(Box.whole((7, 5)), max_elements=16)) == [
        Box((0, 0), (3, 5)),
        Box((3, 0), (6, 5)),
        Box((6, 0), (7, 5)),
    ]


def test_bands_cut_a_row_that_is_too_long() -> None:
    """A row beyond the limit is cut in turn, in order."""
    assert list(bands(Box((1, 2), (3, 7)), max_elements=3)) == [
        Box((1, 2), (2, 5)),
        Box((1, 5), (2, 7)),
        Box((2, 2), (3, 5)),
        Box((2, 5), (3, 7)),
    ]
