"""Checkpoints whose every element says which element it is.

Element k of all tensors together, in the order of their names, is the float32 whose bit pattern is
the integer k + 1. All patterns are finite and none is zero, so padding stands out, a copy changes
nothing, and whatever a rank holds can be read back as "row 17, column 3 of that tensor".
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from bridge.dtypes import Words, dtype_named
from bridge.storage.source import TensorInfo
from bridge.tiling import Box, Shape

Codes32 = np.ndarray[Any, np.dtype[np.uint32]]
MAX_ELEMENTS: Final = 0x7F7FFFFF
"""Float32 bit patterns from 1 up to the largest finite number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """The code of every element of these tensors; models beyond 2.1e9 elements repeat codes."""

    shapes: Mapping[str, Shape]
    starts: Mapping[str, int]
    """Elements before each tensor."""

    def of(self, name: str, rows: Words, columns: range | None) -> Codes32:
        """Codes of some rows of a tensor.

        Args:
            name: The tensor.
            rows: Row numbers, or element numbers of a vector.
            columns: Of a matrix; None for a vector.

        Returns:
            (rows, columns), or (rows,) for a vector.
        """
        rows = rows.astype(np.int64)
        if columns is None:
            numbers = rows
        else:
            width = self.shapes[name][1]
            numbers = rows[:, None] * width + np.arange(columns.start, columns.stop)
        return ((numbers + self.starts[name]) % MAX_ELEMENTS + 1).astype(np.uint32)

    def sizes(self) -> list[int]:
        """Elements of each tensor."""
        return [math.prod(shape) for shape in self.shapes.values()]

    def say(self, code: int) -> str:
        """Which element a code stands for, in words."""
        if not 0 < code <= MAX_ELEMENTS:
            return "zero" if code == 0 else f"bits {code:#010x}, which no element has"
        names = list(self.starts)
        position = bisect.bisect_right(list(self.starts.values()), code - 1) - 1
        name = names[position]
        inside = code - 1 - self.starts[name]
        if inside >= math.prod(self.shapes[name]):
            return f"bits {code:#010x}, which no element has"
        index = np.unravel_index(inside, self.shapes[name])
        return f"{name}[{', '.join(str(int(i)) for i in index)}]"


def codes_for(shapes: Mapping[str, Shape]) -> Codes:
    """Number the elements of tensors of these shapes."""
    ordered = dict(sorted(shapes.items()))
    sizes = [math.prod(shape) for shape in ordered.values()]
    starts = dict(zip(ordered, itertools.accumulate([0, *sizes[:-1]]), strict=True))
    return Codes(shapes=ordered, starts=starts)


def codes_of(directory: Path) -> Codes:
    """Number the elements of a checkpoint, as its safetensors files declare them."""
    from safetensors import safe_open

    shapes: dict[str, Shape] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="np") as handle:
            shapes |= {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118 - not a mapping
    return codes_for(shapes)


def write_checkpoint(codes: Codes, directory: Path, *, config: Mapping[str, Any]) -> None:
    """Write codes as a Hugging Face checkpoint of one float32 file."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    (directory / "config.json").write_text(json.dumps({**config, key: "float32"}), "utf-8")
    arrays = {}
    for name, shape in codes.shapes.items():
        columns = range(shape[1]) if len(shape) == 2 else None
        arrays[name] = codes.of(name, np.arange(shape[0]), columns).view(np.float32)
    save_file(arrays, directory / "model.safetensors", metadata={"format": "pt"})


class CodedSource:
    """The same as a `TensorSource`, computed on the fly: no files, no memory."""

    def __init__(self, codes: Codes) -> None:
        self._codes = codes
        self.tensors = {
            name: TensorInfo(shape=shape, dtype=dtype_named("float32"))
            for name, shape in codes.shapes.items()
        }

    def read_into(self, name: str, box: Box, out: Words) -> None:
        """Fill `out` with a box; see `TensorSource`."""
        rows = np.arange(box.starts[0], box.stops[0])
        columns = range(box.starts[1], box.stops[1]) if len(box.starts) == 2 else None
        out[...] = self._codes.of(name, rows, columns)

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""
