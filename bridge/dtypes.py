"""The element types a checkpoint may hold, under their torch names.

The bridge moves bytes: an element is a *word* of 1, 2, 4 or 8 bytes that nobody computes with, so
numpy handles bfloat16 and float8 as unsigned integers and nothing is ever rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Never

import numpy as np

from bridge.errors import DtypeMismatchError

Words = np.ndarray[Any, np.dtype[Any]]
"""An array of unsigned integers, one per tensor element, holding its bit pattern."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dtype:
    """One element type: torch's name, safetensors' code and the size in bytes."""

    name: str
    safetensors: str
    itemsize: int

    @property
    def is_floating(self) -> bool:
        """Whether parameters can be held and trained in it; float8 and integers cannot."""
        return self.name in {"float64", "float32", "float16", "bfloat16"}

    def __str__(self) -> str:
        """Torch's name."""
        return self.name

    def __reduce__(self) -> tuple[Callable[[str], Dtype], tuple[str]]:
        """For pickles of ours: there are these dtypes and no others."""
        return dtype_named, (self.name,)

    def __setstate__(self, state: object) -> Never:
        """No pickle of others makes another of one of them."""
        raise ValueError(f"a state for {self.name}: {state!r:.99}")

    @property
    def word(self) -> np.dtype[Any]:
        """The little-endian unsigned integer of the same size."""
        return np.dtype(f"<u{self.itemsize}")


_ALL: Final = (
    Dtype(name="float64", safetensors="F64", itemsize=8),
    Dtype(name="float32", safetensors="F32", itemsize=4),
    Dtype(name="float16", safetensors="F16", itemsize=2),
    Dtype(name="bfloat16", safetensors="BF16", itemsize=2),
    Dtype(name="float8_e4m3fn", safetensors="F8_E4M3", itemsize=1),
    Dtype(name="float8_e5m2", safetensors="F8_E5M2", itemsize=1),
    Dtype(name="int64", safetensors="I64", itemsize=8),
    Dtype(name="int32", safetensors="I32", itemsize=4),
    Dtype(name="int16", safetensors="I16", itemsize=2),
    Dtype(name="int8", safetensors="I8", itemsize=1),
    Dtype(name="uint8", safetensors="U8", itemsize=1),
    Dtype(name="bool", safetensors="BOOL", itemsize=1),
)
_BY_NAME: Final = {dtype.name: dtype for dtype in _ALL}
_BY_SAFETENSORS: Final = {dtype.safetensors: dtype for dtype in _ALL}


def dtype_named(name: str, *, where: str = "") -> Dtype:
    """Look a dtype up by torch's name, `torch.` prefix allowed.

    Raises:
        DtypeMismatchError: BR303, no such dtype.
    """
    try:
        return _BY_NAME[name.removeprefix("torch.")]
    except KeyError:
        raise DtypeMismatchError(
            f"unknown dtype {name!r}", where=where, hint=f"known: {', '.join(_BY_NAME)}"
        ) from None


def dtype_from_safetensors(code: str, *, where: str = "") -> Dtype:
    """Look a dtype up by the code safetensors headers use.

    Raises:
        DtypeMismatchError: BR303, no such code.
    """
    try:
        return _BY_SAFETENSORS[code]
    except KeyError:
        raise DtypeMismatchError(
            f"unknown safetensors dtype {code!r}",
            where=where,
            hint=f"known: {', '.join(_BY_SAFETENSORS)}",
        ) from None
