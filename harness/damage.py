"""Which tile of a live tensor is damaged, and what it holds instead.

A tensor is looked at in lines: rows where outputs are dealt out to ranks, columns where inputs are,
and a norm is one line. `harness.checks.placement` says by hand which line of which Hugging Face
tensor each must be; a line that is another one is recognised by its bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from harness import oracle
from harness.compare import Words
from harness.damage_causes import cause_of
from harness.tiles import (
    ENDLESS,
    LAYER,
    Line,
    Source,
    as_numbers,
    numbers_of,
    one_element,
    short_name,
)

Mask = np.ndarray[Any, np.dtype[np.bool_]]
_BY_COLUMN: Final = ("linear_proj.weight", "linear_fc2.weight")
_MAX_TILES: Final = 6
"""Tiles of one tensor that are told one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveWords:
    """A live parameter as bit patterns; `dtype` is torch's, in words."""

    name: str
    words: Words
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A damaged tile, or tensor.

    Args:
        tensor: As in "layer 7 linear_qkv".
        lines: Which rows or columns, or "".
        tile: What should be there, "query group 2's K"; "" for all of a tensor.
        whole: Whether the lines are all of the tile.
        holds: What is there instead.
        cause: The typical mistake that does this, "" when none is known.
        share: Of the tensor's elements that are wrong.
    """

    tensor: str
    lines: str
    tile: str
    whole: bool
    holds: str
    cause: str
    share: float

    def say(self) -> str:
        """One line."""
        if not self.tile:
            return f"{self.tensor}{', ' if self.lines else ''}{self.lines} ({self.holds})"
        relation = "=" if self.whole else "in"
        return f"{self.tensor} {self.lines} {relation} {self.tile} ({self.holds})"

    def to_dict(self, rank: int) -> dict[str, Any]:
        """Plain data, for the parent process and the evidence."""
        return {
            "rank": rank,
            "text": self.say(),
            "tensor": self.tensor,
            "lines": self.lines,
            "tile": self.tile,
            "holds": self.holds,
            "cause": self.cause,
            "share": self.share,
        }


def look_for_damage(
    tensors: Sequence[LiveWords], hf: Path, model: oracle.Architecture, *, tp_rank: int, tp: int
) -> tuple[list[Damage], list[str]]:
    """Hold a rank's tensors against what Megatron should read there.

    Returns:
        Every damaged tile, and the Hugging Face tensors that this rank holds some of.
    """
    from harness.checks.placement import expected_rows

    source = Source(hf, model)
    found: list[Damage] = []
    held: set[str] = set()
    for one in tensors:
        tensor = short_name(one.name)
        try:
            rows, columns = expected_rows(one.name, one.words.shape, model, tp_rank, tp)
        except (KeyError, IndexError):
            rows, columns = [], None
        if not rows:
            found.append(_odd(tensor, "the architecture has no such parameter"))
            continue
        held |= {name for name, _ in rows if name is not None}
        wanted_shape = (len(rows),) if columns is None else (len(rows), len(columns))
        if one.words.shape != wanted_shape:
            found.append(_odd(tensor, f"shape {one.words.shape}, Megatron reads {wanted_shape}"))
            continue
        whole = one.words if one.words.ndim == 2 else one.words[None]
        if one.name.endswith(_BY_COLUMN) and columns is not None:
            name = rows[0][0]
            lines: list[Line] = [(name, column) for column in columns]
            view = TensorView(tensor, "column", one.dtype, whole.T, lines, source)
        elif columns is None:
            view = TensorView(tensor, "element", one.dtype, whole, [(rows[0][0], 0)], source)
        else:
            view = TensorView(tensor, "row", one.dtype, whole, list(rows), source)
        found += view.damage()
    return found, sorted(held)


def _odd(tensor: str, holds: str) -> Damage:
    return Damage(tensor=tensor, lines="", tile="", whole=True, holds=holds, cause="", share=1.0)


@dataclass(frozen=True, slots=True)
class TensorView:
    """One live tensor as lines, with what each should be."""

    tensor: str
    unit: str
    dtype: str
    actual: Words
    lines: Sequence[Line]
    source: Source

    @property
    def _layer_idx(self) -> int | None:
        match = LAYER.fullmatch(self.lines[0][0] or "")
        return int(match[1]) if match else None

    @property
    def _by_column(self) -> bool:
        return self.unit == "column"

    def damage(self) -> list[Damage]:
        """Every damaged tile; neighbours with one and the same trouble are told together."""
        wanted = self._wanted()
        different = self.actual != wanted
        if not different.any():
            return []
        held = self._held(different.any(axis=1))
        all_of_it = self._all_of_it(different, wanted, held)
        if all_of_it is not None:
            return [all_of_it]
        found = []
        cause = cause_of(self.lines, held)
        for start, stop, name, whole in self._tiles():
            wrong = np.flatnonzero(different[start:stop].any(axis=1)) + start
            if not len(wrong):
                continue
            first, last = int(wrong[0]), int(wrong[-1])
            complete = len(wrong) == stop - start and whole
            if name in ("tokens", "output rows"):  # which is what a user knows them by
                name = f"{name} {self.lines[first][1]}-{self.lines[last][1]}"  # noqa: PLW2901
                complete = True
            holds, own = self._holds(first, last + 1, different, wanted, held)
            found.append(
                Damage(
                    tensor=self.tensor, lines=self._say_lines(first, last, different), tile=name,
                    whole=complete, holds=holds, cause=cause or own,
                    share=float(different[start:stop].sum()) / different.size,
                )
            )  # fmt: skip
        if len(found) > _MAX_TILES:
            rest = sum(one.share for one in found[_MAX_TILES:])
            more = f"and {len(found) - _MAX_TILES} more tiles"
            found = [*found[:_MAX_TILES], Damage(
                tensor=self.tensor, lines="", tile="", whole=True, holds=more, cause=cause,
                share=rest,
            )]  # fmt: skip
        return found

    def _say_lines(self, first: int, last: int, different: Mask) -> str:
        if self.unit == "element":
            elements = np.flatnonzero(different[0])
            return f"elements {elements[0]}-{elements[-1]}"
        return f"{self.unit}s {first}-{last}"

    def _wanted(self) -> Words:
        wanted = np.zeros_like(self.actual)
        start = 0
        for name, run in itertools.groupby(self.lines, key=lambda line: line[0]):
            numbers = [number for _, number in run]
            if name is not None:
                whole = self.source.lines(name, self.dtype, by_column=self._by_column)
                wanted[start : start + len(numbers)] = whole[numbers]
            start += len(numbers)
        return wanted

    def _tiles(self) -> list[tuple[int, int, str, bool]]:
        """(first line, the one after the last, name, whether the rank holds all of the tile)."""
        found: list[tuple[int, int, str, bool]] = []
        start = 0
        while start < len(self.lines):
            name, first, last = self.source.tile(self.lines[start], from_layer=self._layer_idx)
            hf, number = self.lines[start]
            stop = start + 1
            while (
                stop < len(self.lines)
                and self.lines[stop] == (hf, number + stop - start)
                and number + stop - start < last
            ):
                stop += 1
            if self.lines[start][0] is None:
                stop = len(self.lines)
            found.append((start, stop, name, number == first or last == ENDLESS))
            start = stop
        return found

    def _held(self, wrong: Mask) -> list[Line | None]:
        """Which line each line really is, as far as its bits tell."""
        held: list[Line | None] = list(self.lines)
        known: dict[bytes, Line] = {}
        for name in dict.fromkeys(name for name, _ in self.lines):
            if name is not None:
                whole = self.source.lines(name, self.dtype, by_column=self._by_column)
                known |= {line.tobytes(): (name, n) for n, line in reversed(list(enumerate(whole)))}
        missing = []
        for index in np.flatnonzero(wrong).tolist():
            held[index] = known.get(self.actual[index].tobytes())
            if held[index] is None:
                missing.append(index)
        if missing:
            self._look_elsewhere(missing, held)
        return held

    def _look_elsewhere(self, missing: Sequence[int], held: list[Line | None]) -> None:
        """Look for lines of the same number in other layers: read one before reading all."""
        for name in dict.fromkeys(self.lines[index][0] for index in missing):
            mine = [index for index in missing if self.lines[index][0] == name]
            if name is None:
                continue
            for other in self.source.others(name):
                whole = self.source.lines(other, self.dtype, by_column=self._by_column)
                if whole.shape[1] != self.actual.shape[1]:
                    continue
                number = self.lines[mine[0]][1]
                line = self.actual[mine[0]]
                if number >= len(whole) or not np.array_equal(whole[number], line):
                    continue
                for index in mine:
                    number = self.lines[index][1]
                    if number < len(whole) and np.array_equal(whole[number], self.actual[index]):
                        held[index] = other, number
                break

    def _all_of_it(
        self,
        different: Mask,
        wanted: Words,
        held: Sequence[Line | None],
    ) -> Damage | None:
        """One sentence for the whole tensor, where one says it."""
        if self.actual.size == 1 or not different.any(axis=1).all():
            return None
        said = as_numbers(self.actual, wanted, self.dtype) or self._transposed()
        if said is None:
            ranges = self._ranges(held, 0, len(self.lines))
            if len(self._tiles()) == 1 and ranges is not None:
                said = f"holds {ranges}", cause_of(self.lines, held)
            elif self._shifted(held):
                said = f"holds layer {self._shifted(held)}'s", "layers-swapped"
        if said is None:
            return None
        return Damage(
            tensor=self.tensor, lines="all of it", tile="", whole=True, holds=said[0],
            cause=said[1], share=1.0,
        )  # fmt: skip

    def _shifted(self, held: Sequence[Line | None]) -> str:
        """The layer whose tensor this is, as a whole."""
        layers = set()
        for line, want in zip(held, self.lines, strict=True):
            match = LAYER.fullmatch(line[0] or "") if line is not None else None
            own = LAYER.fullmatch(want[0] or "")
            if line is None or match is None or own is None:
                return ""
            if match[2] != own[2] or line[1] != want[1]:
                return ""
            layers.add(match[1])
        return layers.pop() if len(layers) == 1 else ""

    def _transposed(self) -> tuple[str, str] | None:
        name, _ = self.lines[0]
        if name is None or {one for one, _ in self.lines} != {name} or self.unit == "element":
            return None
        other = self.source.lines(name, self.dtype, by_column=not self._by_column)
        numbers = [number for _, number in self.lines]
        if other.shape[1] != self.actual.shape[1] or max(numbers) >= len(other):
            return None
        if np.array_equal(other[numbers], self.actual):
            return "transposed", "linear-transposed"
        return None

    def _holds(
        self,
        start: int,
        stop: int,
        different: Mask,
        wanted: Words,
        held: Sequence[Line | None],
    ) -> tuple[str, str]:
        """What some lines hold, and the mistake that does this."""
        actual, right, wrong = self.actual[start:stop], wanted[start:stop], different[start:stop]
        count = int(wrong.sum())
        if count == 1:
            line, place = (int(i) for i in np.argwhere(wrong)[0])
            index = [place] if self.unit == "element" else [start + line, place]
            if self._by_column:
                index.reverse()
            return one_element(index, int(actual[line, place]), int(right[line, place]),
                                self.dtype)  # fmt: skip
        said = as_numbers(actual[wrong], right[wrong], self.dtype)
        if said is not None:
            return said
        ranges = self._ranges(held, start, stop)
        if ranges is not None:
            return f"holds {ranges}", ""
        mine, theirs = self.lines[start:stop], list(held[start:stop])
        if None not in theirs and sorted(map(str, theirs)) == sorted(map(str, mine)):
            return f"its own {self.unit}s in another order", self._order(mine, theirs)
        ours, true = numbers_of(actual, self.dtype), numbers_of(right, self.dtype)
        with np.errstate(all="ignore"):
            gap = float(np.nanmax(np.abs(ours - true)))
        return f"{count} elements differ, by up to {gap:.3g}", ""

    def _order(self, mine: Sequence[Line], theirs: Sequence[Line | None]) -> str:
        size = self.source.model.kv_channels
        half = size // 2
        inner = [mine[0][1] + channel // 2 + half * (channel % 2) for channel in range(len(mine))]
        numbers = [line[1] for line in theirs if line is not None]
        return "rope-rows-permuted" if len(mine) == size and numbers == inner else ""

    def _ranges(self, held: Sequence[Line | None], start: int, stop: int) -> str | None:
        """Name what consecutive lines hold, where they are a run of one tensor."""
        first = held[start]
        if first is None or first[0] is None:
            return None
        run = [(first[0], first[1] + n) for n in range(stop - start)]
        if list(held[start:stop]) != run:
            return None
        name, low, high = self.source.tile(first, from_layer=self._layer_idx)
        if first[1] >= low and first[1] + stop - start <= high:
            elsewhere = first[1] != self.lines[start][1] or len(run) < len(self.lines)
            if high != ENDLESS or self.unit == "element" or not elsewhere:
                return name
            numbers = f"{first[1]}-{first[1] + stop - start - 1}"
            return f"{name} {numbers}" if name.endswith("s") else f"{name} {self.unit}s {numbers}"
        return f"{short_name(first[0])} {self.unit}s {first[1]}-{first[1] + stop - start - 1}"
