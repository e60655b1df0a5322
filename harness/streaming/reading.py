"""Weights read ahead: the next segment is read, or generated, while the present one is in use.

What is read lies in one buffer of fixed size, so no more bytes are held than it has, whatever the
model. A segment stays until the one after it is asked for.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from bridge.dtypes import Dtype, Words
from bridge.errors import AccountingError, UsageError
from bridge.storage.source import TensorInfo, TensorSource
from bridge.tiling import Box, Tile, Tiling, bands
from harness.compare import bfloat16_numbers

Wanted = Sequence[tuple[str, Box]]

_BAND: Final = 1 << 22
"""Elements that one thread reads at a time."""
_ALIGNMENT: Final = 64


class HeldSource:
    """A `TensorSource` of which some boxes are in memory; whatever else is asked for is read.

    Args:
        source: Where the tensors are.
        held: Name, box and words of each box in memory.
    """

    def __init__(self, source: TensorSource, held: Sequence[tuple[str, Box, Words]]) -> None:
        self._source = source
        self._held = held

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Everything the source holds, in memory or not."""
        return self._source.tensors

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(words.nbytes for _, _, words in self._held)

    def find(self, name: str, box: Box) -> Words | None:
        """A view of a box that is in memory; None for one that is not, or not in one piece."""
        for held_name, held_box, words in self._held:
            if held_name == name and held_box.intersect(box) == box:
                found: Words = words[box.relative_to(held_box).slices]
                return found
        return None

    def words(self, name: str, box: Box) -> Words:
        """The words of a box: a view where it is in memory, or else read now.

        Raises:
            AccountingError: BR301, a tensor that is not there, or smaller than the box.
        """
        found = self.find(name, box)
        if found is None:
            info = self.tensors.get(name)
            if info is None or Box.whole(info.shape).intersect(box) != box:
                shape = "missing" if info is None else f"of shape {info.shape}"
                raise AccountingError(
                    f"the plan reads {box} of a tensor that is {shape}",
                    where=name,
                    hint="the configuration and the weights describe different models",
                )
            found = np.empty(box.shape, self.tensors[name].dtype.word)
            self._source.read_into(name, box, found)
        return found

    def read_into(self, name: str, box: Box, out: Words) -> None:
        """Fill `out`; see `TensorSource`."""
        out[...] = self.words(name, box)

    def close(self) -> None:
        """Nothing to release: the source belongs to its maker."""


class HeldRows:
    """A box of a tensor as the oracle wants it: rows on demand, as numbers."""

    def __init__(self, source: HeldSource, name: str, box: Box) -> None:
        self._source, self._name, self._box = source, name, box
        self._dtype = source.tensors[name].dtype
        self.shape: tuple[int, ...] = box.shape

    def __getitem__(self, rows: slice) -> np.ndarray[Any, np.dtype[np.floating[Any]]]:
        """Rows, exact: bfloat16 as float32, any other dtype as it is.

        By NumPy, in the calling thread: the oracle's threads would each start as many of torch's.
        """
        first, (start, stop, _) = self._box.starts[0], rows.indices(self.shape[0])
        box = Box((first + start, *self._box.starts[1:]), (first + stop, *self._box.stops[1:]))
        words = self._source.words(self._name, box)
        if self._dtype.name == "bfloat16":
            return bfloat16_numbers(words)
        found: np.ndarray[Any, np.dtype[np.floating[Any]]] = words.view(f"<f{self._dtype.itemsize}")
        return found


def as_numbers(words: Words, dtype: Dtype) -> Any:  # noqa: ANN401 - a torch tensor
    """Words as a tensor of their dtype, on the CPU, sharing memory."""
    import torch

    # torch knows few operations on unsigned words, and needs none: the bits are only renamed.
    signed = torch.from_numpy(words.view(f"<i{dtype.itemsize}"))
    return signed.view(getattr(torch, dtype.name))


def fill(tensor: Any, tiling: Tiling, source: HeldSource) -> None:  # noqa: ANN401 - a torch tensor
    """Fill a tensor by its tiling, each element rounded once where its dtype is narrower."""
    for tile in tiling.tiles:
        target = tensor[tile.target_box.slices]
        if tile.source is None:
            target.zero_()
        elif source.find(tile.source, tile.source_box) is not None:
            _copy(target, tile, source)
        else:
            for band in bands(tile.source_box, max_elements=_BAND):
                inner = band.relative_to(tile.source_box)
                _copy(target[inner.slices], Tile(tile.source, band, inner), source)


def _copy(target: Any, tile: Tile, source: HeldSource) -> None:  # noqa: ANN401 - a torch tensor
    name = tile.source or ""
    numbers = as_numbers(source.words(name, tile.source_box), source.tensors[name].dtype)
    # Moved first and widened there: half the bytes, and no wide copy of a tile in host memory.
    target.copy_(numbers.to(target.device))


class ReadAhead:
    """Segments' boxes, read by threads one segment ahead of their use.

    Args:
        source: Where the tensors are.
        wanted: The boxes of each segment, in the order of use.
        max_nbytes: Of the buffer; no segment may need more.
        threads: That read.
        pinned: Whether a GPU reads the buffer, which then is page-locked.

    Attributes:
        most_held: The largest number of bytes that were in use at once.
    """

    def __init__(
        self,
        source: TensorSource,
        wanted: Sequence[Wanted],
        *,
        max_nbytes: int,
        threads: int,
        pinned: bool = False,
    ) -> None:
        self._source, self._wanted = source, wanted
        largest = max((self._nbytes(one) for one in wanted), default=0)
        two = max(
            (self._nbytes(a) + self._nbytes(b) for a, b in itertools.pairwise(wanted)),
            default=largest,
        )
        if largest > max_nbytes:
            raise UsageError(
                f"the memory budget leaves {max(0, max_nbytes)} bytes for weights, and what "
                f"cannot be cut takes {largest}",
                hint="give --memory-budget more",
            )
        self._buffer = _buffer(min(max_nbytes, max(two, largest)), pinned=pinned)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")
        self._in_use: dict[int, tuple[int, int]] = {}
        self._reads: list[Future[None]] = []
        self._stopping = threading.Event()
        self.most_held = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[HeldSource]:
        """Each segment once it is read. Asking for the next gives up the one before."""
        upcoming: tuple[HeldSource, list[Future[None]]] | None = None
        for number in range(len(self._wanted)):
            if upcoming is None:
                upcoming = self._begin(number)
            if upcoming is None:
                raise AssertionError("an empty buffer has room for any segment")
            held, reads = upcoming
            for read in reads:
                read.result()
            upcoming = self._begin(number + 1) if number + 1 < len(self._wanted) else None
            yield held
            del self._in_use[number]

    def wait(self) -> None:
        """Return once everything that was begun is read."""
        for read in self._reads:
            read.exception()

    def _nbytes(self, wanted: Wanted) -> int:
        return sum(_padded(self._info(name, box).nbytes) for name, box in wanted)

    def _info(self, name: str, box: Box) -> TensorInfo:
        return TensorInfo(shape=box.shape, dtype=self._source.tensors[name].dtype)

    def _begin(self, number: int) -> tuple[HeldSource, list[Future[None]]] | None:
        """Start to read a segment where there is room for it beside the one in use."""
        wanted = self._wanted[number]
        need = self._nbytes(wanted)
        place = self._place(need)
        if place is None:
            return None
        self._in_use[number] = (place, place + need)
        self.most_held = max(self.most_held, sum(b - a for a, b in self._in_use.values()))
        held: list[tuple[str, Box, Words]] = []
        for name, box in wanted:
            info = self._info(name, box)
            raw = self._buffer[place : place + info.nbytes]
            held.append((name, box, raw.view(info.dtype.word).reshape(box.shape)))
            place += _padded(info.nbytes)
        self._reads = [
            self._pool.submit(self._read, name, band, words[band.relative_to(box).slices])
            for name, box, words in held
            for band in bands(box, max_elements=_BAND)
        ]
        return HeldSource(self._source, held), self._reads

    def _place(self, need: int) -> int | None:
        """Where a segment goes: behind the one in use, or before it; None without room."""
        used = list(self._in_use.values())
        if not used:
            return 0
        if len(used) > 1:
            return None
        start, stop = used[0]
        if stop + need <= len(self._buffer):
            return stop
        return 0 if need <= start else None

    def _read(self, name: str, band: Box, out: Words) -> None:
        if not self._stopping.is_set():
            self._source.read_into(name, band, out)


def _buffer(nbytes: int, *, pinned: bool) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if not pinned:
        return np.empty(nbytes, np.uint8)
    import torch

    found: np.ndarray[Any, np.dtype[np.uint8]] = torch.empty(
        nbytes, dtype=torch.uint8, pin_memory=True
    ).numpy()
    return found


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
