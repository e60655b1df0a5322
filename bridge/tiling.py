"""The one primitive: a target tensor cut into rectangles of source tensors.

    Box    half-open ranges, one per dimension
    Tile   (source tensor, source Box, target Box), equal shapes; source None is zero padding
    Tiling the tiles of one target tensor; they partition it, checked when it is built

Inverting the tilings of a model gives the export; intersecting one with a rank's Box gives what
that rank reads; walking one in bands of rows gives the streaming schedule. None of it touches a
byte: everything here is arithmetic on ranges.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bridge.errors import PlanError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of a tensor: one half-open range per dimension."""

    starts: Shape
    stops: Shape

    def __post_init__(self) -> None:
        """Ranges must be paired and not inverted."""
        if len(self.starts) != len(self.stops) or any(
            not 0 <= start <= stop for start, stop in zip(self.starts, self.stops, strict=True)
        ):
            raise PlanError(f"not a box: {self.starts} to {self.stops}")

    @classmethod
    def whole(cls, shape: Shape) -> Box:
        """The box that covers a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @classmethod
    def rows(cls, start: int, stop: int, rest: Shape) -> Box:
        """Complete rows `start` to `stop` of a tensor whose further dimensions are `rest`."""
        return cls((start, *(0,) * len(rest)), (stop, *rest))

    @property
    def shape(self) -> Shape:
        """Extent per dimension."""
        return tuple(stop - start for start, stop in zip(self.starts, self.stops, strict=True))

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index of an array."""
        return tuple(slice(a, b) for a, b in zip(self.starts, self.stops, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The common part, None when there is none."""
        starts = tuple(map(max, self.starts, other.starts))
        stops = tuple(map(min, self.stops, other.stops))
        if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
            return None
        return Box(starts, stops)

    def shift(self, offset: Sequence[int]) -> Box:
        """The box moved by `offset`."""
        return Box(
            tuple(a + by for a, by in zip(self.starts, offset, strict=True)),
            tuple(b + by for b, by in zip(self.stops, offset, strict=True)),
        )

    def relative_to(self, origin: Box) -> Box:
        """The same box, counted from `origin`'s corner."""
        return self.shift(tuple(-start for start in origin.starts))

    def __str__(self) -> str:
        """As numpy would index it: `[0:128, 0:4096]`."""
        return (
            "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.starts, self.stops, strict=True)) + "]"
        )


@dataclass(frozen=True, slots=True)
class Tile:
    """One rectangle of the target and where it comes from; `source` None is zero padding."""

    source: str | None
    source_box: Box
    target_box: Box

    def __post_init__(self) -> None:
        """A tile moves elements; it neither stretches nor drops any."""
        if self.source_box.shape != self.target_box.shape:
            raise PlanError(
                f"tile of {self.source}: {self.source_box} and {self.target_box} differ in shape"
            )


@dataclass(frozen=True, slots=True)
class Tiling:
    """The tiles of one target tensor of this shape.

    Raises:
        PlanError: BR400, the tiles leave a hole, overlap or stick out.
    """

    shape: Shape
    tiles: tuple[Tile, ...]

    def __post_init__(self) -> None:
        """Prove that every element of the target is written exactly once."""
        boxes = [tile.target_box for tile in self.tiles]
        whole = Box.whole(self.shape)
        for box in boxes:
            if len(box.starts) != len(self.shape) or (box.volume and box.intersect(whole) != box):
                raise PlanError(f"{box} sticks out of a tensor of shape {self.shape}")
        if sum(box.volume for box in boxes) != whole.volume:
            raise PlanError(
                f"tiles cover {sum(box.volume for box in boxes)} of {whole.volume} elements "
                f"of a tensor of shape {self.shape}"
            )
        overlap = find_overlap(boxes)
        if overlap is not None:
            raise PlanError(f"{overlap[0]} and {overlap[1]} overlap")

    @classmethod
    def concatenate(cls, parts: Iterable[tuple[str | None, Box]]) -> Tiling:
        """Stack source boxes along the first dimension, in order."""
        tiles, row = [], 0
        rest: Shape = ()
        for source, box in parts:
            rest = box.shape[1:]
            tiles.append(Tile(source, box, Box.rows(row, row + box.shape[0], rest)))
            row += box.shape[0]
        return cls((row, *rest), tuple(tiles))

    def restrict(self, boxes: Sequence[Box], *, axis: int = 0) -> Tiling:
        """The tiling of `boxes` of this target, put one after the other along `axis`.

        One box is a slice; several are what a TP rank holds of a tensor that is sharded part by
        part, as `linear_fc1` is: its gate rows, then its up rows.
        """
        if not self.shape:  # a scalar has one box, itself, and no axis
            return self
        tiles: list[Tile] = []
        position = 0
        for box in boxes:
            place = [0] * len(self.shape)
            place[axis] = position
            for tile in self.tiles:
                common = tile.target_box.intersect(box)
                if common is None:
                    continue
                inside = common.relative_to(tile.target_box)
                tiles.append(
                    Tile(
                        tile.source,
                        inside.shift(tile.source_box.starts),
                        common.relative_to(box).shift(place),
                    )
                )
            position += box.shape[axis]
        shape = list(boxes[0].shape)
        shape[axis] = position
        return Tiling(tuple(shape), tuple(tiles))

    def locate(self, index: Sequence[int]) -> tuple[str | None, Shape]:
        """Which source element this target element is: (tensor name or None, its index)."""
        point = Box(tuple(index), tuple(i + 1 for i in index))
        for tile in self.tiles:
            if tile.target_box.intersect(point) is not None:
                inside = point.relative_to(tile.target_box).shift(tile.source_box.starts)
                return tile.source, inside.starts
        raise IndexError(f"{tuple(index)} is outside a tensor of shape {self.shape}")


def invert(tilings: Mapping[str, Tiling], sources: Mapping[str, Shape]) -> dict[str, Tiling]:
    """Turn tilings of targets by sources into tilings of the sources by the targets.

    Args:
        tilings: Target name to its tiling. Zero tiles have no source and drop out.
        sources: Source name to shape; must be exactly the sources the tilings use.

    Returns:
        Source name to its tiling. Building it proves that every source element is read exactly
        once: `Tiling` refuses holes and overlaps.

    Raises:
        PlanError: BR400, the sources used and the sources given differ, or are not read once.
    """
    tiles: defaultdict[str, list[Tile]] = defaultdict(list)
    for name, tiling in tilings.items():
        for tile in tiling.tiles:
            if tile.source is not None:
                tiles[tile.source].append(Tile(name, tile.target_box, tile.source_box))
    if tiles.keys() != sources.keys():
        odd = sorted(tiles.keys() ^ sources.keys())
        raise PlanError(
            f"{len(odd)} tensors are read and unknown, or known and not read", where=odd
        )
    return {
        name: Tiling(shape, tuple(sorted(tiles[name], key=lambda tile: tile.target_box.starts)))
        for name, shape in sources.items()
    }


def find_overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share an element, or None. A sweep along the first dimension."""
    ordered = sorted((box for box in boxes if box.volume), key=lambda box: box.starts)
    active: list[Box] = []
    for box in ordered:
        if not box.starts:  # scalars: any two boxes are the same element
            if active:
                return active[0], box
            active.append(box)
            continue
        active = [other for other in active if other.stops[0] > box.starts[0]]
        for other in active:
            if other.intersect(box) is not None:
                return other, box
        active.append(box)
    return None


def bands(box: Box, *, max_elements: int) -> Iterator[Box]:
    """Cut a box into boxes of at most `max_elements`, in the order of its elements in memory.

    Complete rows while they fit; a row that alone is too long is cut in turn.
    """
    if box.volume <= max_elements or not box.starts:
        if box.volume:
            yield box
        return
    row = math.prod(box.shape[1:])
    if row > max_elements:
        for start in range(box.starts[0], box.stops[0]):
            inner = Box(box.starts[1:], box.stops[1:])
            for part in bands(inner, max_elements=max_elements):
                yield Box((start, *part.starts), (start + 1, *part.stops))
        return
    step = max(1, max_elements // row)
    for start in range(box.starts[0], box.stops[0], step):
        stop = min(start + step, box.stops[0])
        yield Box((start, *box.starts[1:]), (stop, *box.stops[1:]))
