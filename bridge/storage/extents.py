"""Boxes that are runs of bytes of local files: what the system can move without a buffer of ours.

Every tile of a whole-tensor conversion is a block of complete rows, so it is one run of bytes on
both sides. Slices by columns are not, nor is anything that is generated or lies behind a URL.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from bridge.storage.source import TensorSource
from bridge.tiling import Box, Shape


class Extent(NamedTuple):
    """A run of bytes of one file."""

    path: Path
    offset: int
    nbytes: int


@runtime_checkable
class FileSource(TensorSource, Protocol):
    """A source that can say where the bytes of a box lie."""

    def extents(self, name: str, box: Box) -> list[Extent] | None:
        """The runs of bytes that are the box in row-major order, each in a file here.

        Returns:
            Runs without a gap between their elements; None when the box is not made of runs.

        Raises:
            CorruptFileError: BR302, a record that is not what the metadata says.
        """
        ...


def is_contiguous(part: Box, shape: Shape) -> bool:
    """Whether a box of a row-major array of this shape is one run of elements."""
    varies = False
    for extent, whole in zip(part.shape, shape, strict=True):
        if varies and extent != whole:
            return False
        varies = varies or extent != 1
    return True


def flat_index(index: Shape, shape: Shape) -> int:
    """The position of an element in a row-major array of this shape."""
    return sum(at * math.prod(shape[axis + 1 :]) for axis, at in enumerate(index))


def in_order(shape: Shape, parts: Iterable[tuple[Box, Sequence[Extent]]]) -> list[Extent] | None:
    """Line up the runs of the boxes that partition an array.

    Args:
        shape: Of the array.
        parts: Each box of it, with the runs that hold the box.

    Returns:
        The runs in the array's row-major order, neighbours in a file joined to one; None when a box
        is not one run of the array's elements.
    """
    position = 0
    found: list[Extent] = []
    for box, extents in sorted(parts, key=lambda part: part[0].starts):
        if not box.volume:
            continue
        if not is_contiguous(box, shape) or flat_index(box.starts, shape) != position:
            return None
        position += box.volume
        for extent in extents:
            last = found[-1] if found else None
            if last and (last.path, last.offset + last.nbytes) == (extent.path, extent.offset):
                found[-1] = last._replace(nbytes=last.nbytes + extent.nbytes)
            else:
                found.append(extent)
    return found if position == math.prod(shape) else None


def pieces(extents: Iterable[Extent], *, max_nbytes: int) -> Iterator[Extent]:
    """Cut runs into runs of at most `max_nbytes`."""
    for extent in extents:
        for start in range(0, extent.nbytes, max_nbytes):
            nbytes = min(max_nbytes, extent.nbytes - start)
            yield Extent(extent.path, extent.offset + start, nbytes)


def aligned(
    one: Iterable[Extent], other: Iterable[Extent], *, max_nbytes: int
) -> Iterator[tuple[Extent, Extent]]:
    """Cut two series of runs, as long as each other together, into pairs of equally long ones."""
    cut = iter(pieces(one, max_nbytes=max_nbytes))
    rest: Extent | None = None
    for right in other:
        start = 0
        while start < right.nbytes:
            left = rest or next(cut)
            nbytes = min(left.nbytes, right.nbytes - start)
            yield left._replace(nbytes=nbytes), Extent(right.path, right.offset + start, nbytes)
            start += nbytes
            rest = None
            if nbytes < left.nbytes:
                rest = Extent(left.path, left.offset + nbytes, left.nbytes - nbytes)
