"""Rounding is to the nearest value, ties to even, and both ways of it agree with torch's.

torch is the judge here and takes no part in the bridge's own rounding.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from bridge.dtypes import Dtype, Words, dtype_named
from bridge.rounding import (
    Rounding,
    largest_finite,
    round_by_definition,
    round_words,
    values_of,
)

FLOATS = ("float64", "float32", "float16", "bfloat16")
# From float64 to 16 bits torch rounds twice, by way of float32, and is no judge: a test with exact
# fractions is.
PAIRS = [
    (source, target)
    for source in FLOATS
    for target in FLOATS
    if source != "float64" or target in {"float64", "float32"}
]
ROUNDINGS: dict[str, Rounding] = {"processor": round_words, "definition": round_by_definition}


def every_16_bit_word(source: Dtype) -> Words:
    """All values of a 16-bit dtype, NaNs included."""
    return np.arange(1 << 16, dtype=np.uint16).astype(source.word)


def near_ties(source: Dtype, target: Dtype) -> Words:
    """Values of `source` at, just below and just above the middle between neighbours of `target`.

    All exponents of a 16-bit target, its subnormals, largest value and overflow threshold included.
    """
    infinity = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}[target.name]
    if target.itemsize == 2:
        words = np.arange(infinity, dtype="<u2")
    else:
        words = np.sort(np.random.default_rng(3).integers(0, infinity, 1 << 16, dtype="<u4"))
        words[1::2] = words[::2] + 1
    values = values_of(words, target).astype("<f8")
    middles = (values[:-1] + values[1:]) / 2
    last = values[-1] + (values[-1] - values[-2]) / 2
    with np.errstate(over="ignore"):
        near = np.concatenate([middles, [last], values]).astype(f"<f{source.itemsize}")
    found = near.view(source.word)
    sign = source.word.type(1 << (8 * source.itemsize - 1))
    # Words of non-negative values are in the values' order.
    return np.concatenate([found, np.maximum(found, 1) - 1, found + 1, found | sign])


def noise(source: Dtype) -> Words:
    """Any bits at all."""
    generator = np.random.default_rng(7)
    return np.frombuffer(generator.bytes(source.itemsize << 16), source.word).copy()


def by_torch(words: Words, source: Dtype, target: Dtype) -> Words:
    """What torch's own conversion gives."""
    tensor = torch.from_numpy(words.view(f"<i{source.itemsize}").copy())
    cast = tensor.view(getattr(torch, source.name)).to(getattr(torch, target.name))
    return cast.view(getattr(torch, f"int{8 * target.itemsize}")).numpy().view(target.word)


def assert_same(expected: Words, found: Words, target: Dtype) -> None:
    """Equal bits; a NaN may be any NaN."""
    nans = np.isnan(values_of(expected, target))
    assert np.array_equal(nans, np.isnan(values_of(found, target)))
    assert np.array_equal(expected[~nans], found[~nans])


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_rounding_is_torchs(source: str, target: str, rounding: Rounding) -> None:
    """Random bits, values next to ties, and every value there is of 16-bit dtypes."""
    one, other = dtype_named(source), dtype_named(target)
    words = every_16_bit_word(one) if one.itemsize == 2 else noise(one)
    if one.itemsize > other.itemsize:
        words = np.concatenate([words, near_ties(one, other)])
    assert_same(by_torch(words, one, other), rounding(words, one, other), other)


def nearest(value: float, table: list[float]) -> int:
    """The index of the nearest value, of two equally near the even one: by exact comparison."""
    above = bisect_left(table, value)
    if above == len(table) or table[above] == value:
        return above
    down, up = (
        Fraction(value) - Fraction(table[above - 1]),
        Fraction(table[above]) - Fraction(value),
    )
    if down == up:
        return above if above % 2 == 0 else above - 1
    return above if up < down else above - 1


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)
@pytest.mark.parametrize("target", ["float16", "bfloat16"])
def test_float64_is_rounded_once(target: str, rounding: Rounding) -> None:
    """Values whose float32 would be a tie are not ties: held against exact fractions."""
    one, other = dtype_named("float64"), dtype_named(target)
    infinity = {"float16": 0x7C00, "bfloat16": 0x7F80}[target]
    table = [float(value) for value in values_of(np.arange(infinity, dtype="<u2"), other)]
    # The words of a format's non-negative values are their ranks; the next one is infinity's.
    table.append(2 * table[-1] - table[-2])
    words = near_ties(one, other)
    generator = np.random.default_rng(5)
    for word in generator.choice(words, 4000):
        value = float(np.uint64(word).view("f8"))
        expected = nearest(min(abs(value), table[-1]), table) | (0x8000 if value < 0 else 0)
        found = rounding(np.array([word], one.word), one, other)
        assert expected == int(found[0]), value


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_value_is_torchs(dtype: str) -> None:
    """It is what an error about overflow names."""
    assert torch.finfo(getattr(torch, dtype)).max == largest_finite(dtype_named(dtype))


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)
def test_a_nan_stays_one_and_keeps_its_sign(rounding: Rounding) -> None:
    """Even one whose only mantissa bits are those that are cut off."""
    words = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF], "<u4")
    found = rounding(words, dtype_named("float32"), dtype_named("bfloat16"))
    assert found.tolist() == [0x7FC0, 0xFFC0, 0x7FC0]


@pytest.mark.parametrize("make", [np.asfortranarray, lambda a: a[:, ::2]])
def test_any_memory_order_will_do(make: Callable[[Words], Words]) -> None:
    """A column slice is rounded as its elements are."""
    words = noise(dtype_named("float32"))[:64].reshape(8, 8)
    pair = dtype_named("float32"), dtype_named("bfloat16")
    for rounding in ROUNDINGS.values():
        flat = rounding(make(words).flatten(), *pair)
        assert flat.tolist() == rounding(make(words), *pair).flatten().tolist()
