"""Rounding floating-point words to another dtype: to the nearest value, ties to the even one.

Twice, so that one can check the other: `round_words` goes through the processor's own conversions
and is what conversions write; `round_by_definition` counts units in the last place in integers and
is what verifications compare with. Values past the middle between the largest finite one and the
next power of two become infinite; a NaN becomes the quiet NaN of its sign. torch is not asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from bridge.dtypes import Dtype, Words

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
Rounding = Callable[[Words, Dtype, Dtype], Words]
"""Words of the first dtype to words of the second, of the same shape."""


@dataclass(frozen=True, slots=True)
class _Format:
    """A binary format of IEEE 754's kind."""

    itemsize: int
    mantissa: int
    """Bits of it that are stored."""
    smallest: int
    """The smallest positive value is 2 to this power."""

    @property
    def infinity(self) -> int:
        """The word of +inf: all bits of the exponent and none else."""
        return (1 << (8 * self.itemsize - 1)) - (1 << self.mantissa)

    @property
    def sign(self) -> int:
        """The word of -0."""
        return 1 << (8 * self.itemsize - 1)


_FORMATS: Final[Mapping[str, _Format]] = {
    "float64": _Format(8, 52, -1074),
    "float32": _Format(4, 23, -149),
    "float16": _Format(2, 10, -24),
    "bfloat16": _Format(2, 7, -133),
}


def largest_finite(dtype: Dtype) -> float:
    """The largest finite value of a floating-point dtype."""
    found = _FORMATS[dtype.name]
    exponent = found.infinity >> found.mantissa
    return math.ldexp((2 << found.mantissa) - 1, exponent - 2 + found.smallest)


def values_of(words: Words, dtype: Dtype) -> Floats:
    """The values of words, exactly, in a type that numpy computes with."""
    if dtype.name == "bfloat16":
        return (words.astype("<u4") << np.uint32(16)).view("<f4")
    return np.ascontiguousarray(words).view(f"<f{dtype.itemsize}")


def round_words(words: Words, source: Dtype, target: Dtype) -> Words:
    """Round words of `source` to words of `target`, by the processor."""
    values = values_of(words, source)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if target.name == "bfloat16":
            found = _bfloat16_words(_float32_to_odd(values))
        else:
            found = values.astype(f"<f{target.itemsize}").view(target.word)
    return _quiet_nans(found, values, target)


def _float32_to_odd(values: Floats) -> Floats:
    """Float32 that rounds to fewer bits as `values` themselves do.

    What float32 cannot hold is cut off and marked in the last bit, so that it is no tie any more.
    Source: Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008.
    """
    if values.dtype.itemsize <= 4:
        return values.astype("<f4", copy=False)
    found = values.astype("<f4")
    words = found.view("<u4")
    words -= np.abs(found) > np.abs(values)
    words |= found != values
    return found


def _bfloat16_words(values: Floats) -> Words:
    """The upper halves of float32 words, one more where the lower half says so."""
    bits = values.view("<u4").astype("<u8")
    even = (bits >> np.uint64(16)) & np.uint64(1)
    found: Words = ((bits + even + np.uint64(0x7FFF)) >> np.uint64(16)).astype("<u2")
    return found


def round_by_definition(words: Words, source: Dtype, target: Dtype) -> Words:
    """The same by counting: the integer nearest to the value in units of its last place."""
    with np.errstate(invalid="ignore"):  # of a signalling NaN
        values = values_of(words, source).astype("<f8")
    form = _FORMATS[target.name]
    finite = np.isfinite(values) & (values != 0)
    magnitudes = np.where(finite, np.abs(values), 1.0)
    _, exponents = np.frexp(magnitudes)
    units = np.maximum(exponents - 1 - form.mantissa, form.smallest)
    counts = np.rint(np.ldexp(magnitudes, -units)).astype("<i8")
    # Subnormals are their counts. Each exponent up skips one mantissa's worth of words, and a
    # count of twice the mantissa's worth is the next exponent's first word.
    steps = units.astype("<i8") - form.smallest
    found = np.where(finite, (steps << form.mantissa) + counts, 0)
    found = np.where(np.isinf(values), form.infinity, np.minimum(found, form.infinity))
    signs = np.where(np.signbit(values), np.uint64(form.sign), np.uint64(0))
    return _quiet_nans((found.astype("<u8") | signs).astype(target.word), values, target)


def _quiet_nans(words: Words, values: Floats, target: Dtype) -> Words:
    form = _FORMATS[target.name]
    nans = np.isnan(values)
    if nans.any():
        quiet = form.infinity | 1 << (form.mantissa - 1)
        signed = np.where(np.signbit(values[nans]), form.sign | quiet, quiet)
        words[nans] = signed.astype(target.word)
    return words
