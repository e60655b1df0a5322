"""Coded tensors: every element says where it comes from, and nothing else does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from bridge.tiling import Box
from harness.coded import MAX_ELEMENTS, CodedSource, codes_for, codes_of, write_checkpoint

SHAPES = {"b": (2, 3), "a": (4,), "c": (1, 2)}


def test_elements_are_numbered_by_name_then_row_by_row() -> None:
    """Tensor a has 1 to 4, b 5 to 10, c 11 and 12."""
    codes = codes_for(SHAPES)
    assert codes.of("a", np.arange(4), None).tolist() == [1, 2, 3, 4]
    assert codes.of("b", np.arange(2), range(3)).tolist() == [[5, 6, 7], [8, 9, 10]]
    assert codes.of("b", np.array([1, 0]), range(1, 2)).tolist() == [[9], [6]]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (0, "zero"), (1, "a[0]"), (4, "a[3]"), (5, "b[0, 0]"), (10, "b[1, 2]"), (12, "c[0, 1]"),
        (13, "bits 0x0000000d, which no element has"),
        (0x7FC00000, "bits 0x7fc00000, which no element has"),
    ],
)  # fmt: skip
def test_a_code_is_read_back_in_words(code: int, said: str) -> None:
    """Whatever a rank holds can be named; padding and NaN are no elements."""
    assert said == codes_for(SHAPES).say(code)


def test_no_code_is_zero_or_not_finite() -> None:
    """Padding stands out, and no arithmetic unit touches a NaN."""
    last = np.array([1, MAX_ELEMENTS], np.uint32).view(np.float32)
    assert np.isfinite(last).all()
    assert (last != 0).all()
    assert not np.isfinite(np.array([MAX_ELEMENTS + 1], np.uint32).view(np.float32)).any()


def test_the_source_and_the_files_hold_the_same(tmp_path: Path) -> None:
    """Both ways of the placement check start from the same codes."""
    codes = codes_for(SHAPES)
    write_checkpoint(codes, tmp_path / "hf", config={"dtype": "bfloat16"})
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    source = CodedSource(codes)
    for name, shape in SHAPES.items():
        out = np.empty(shape, np.uint32)
        source.read_into(name, Box.whole(shape), out)
        np.testing.assert_array_equal(stored[name].view(np.uint32), out)
    part = np.empty((1, 2), np.uint32)
    source.read_into("b", Box((1, 1), (2, 3)), part)
    assert part.tolist() == [[9, 10]]
    assert codes == codes_of(tmp_path / "hf")
