"""Live tensors are filled in place, every element once, from exactly the tensors named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bridge.loading
from bridge.dtypes import Words, dtype_named
from bridge.errors import AccountingError, DtypeMismatchError
from bridge.loading import fill
from bridge.storage.source import TensorInfo
from bridge.tiling import Box, Tile, Tiling

SHAPE = (6, 4)
TILING = Tiling(
    (5, 4),
    (
        Tile("a", Box((4, 0), (6, 4)), Box((0, 0), (2, 4))),
        Tile("a", Box((0, 1), (2, 3)), Box((2, 2), (4, 4))),
        Tile("a", Box((2, 0), (4, 2)), Box((2, 0), (4, 2))),
        Tile(None, Box((0, 0), (1, 4)), Box((4, 0), (5, 4))),
    ),
)


class _Source:
    """One tensor "a" of these words."""

    def __init__(self, tensor: torch.Tensor, dtype: str) -> None:
        signed = tensor.view(getattr(torch, f"int{8 * tensor.element_size()}"))
        self.words: Words = signed.numpy().view(f"<u{tensor.element_size()}")
        info = TensorInfo(shape=tuple(tensor.shape), dtype=dtype_named(dtype))
        self.tensors = {"a": info}
        self.boxes: list[Box] = []

    def read_into(self, name: str, box: Box, out: Words) -> None:
        assert name == "a"
        assert out.dtype == self.tensors["a"].dtype.word
        out[...] = self.words[box.slices]
        self.boxes.append(box)


def expected(a: torch.Tensor) -> torch.Tensor:
    """The tiling above, by hand."""
    whole = torch.zeros(5, 4, dtype=a.dtype)
    whole[0:2] = a[4:6]
    whole[2:4, 2:4] = a[0:2, 1:3]
    whole[2:4, 0:2] = a[2:4, 0:2]
    return whole


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_bits_are_moved_and_not_computed_with(dtype: str) -> None:
    """NaN payloads, negative zeros and subnormals arrive as they were."""
    bits = np.arange(24, dtype=np.int64).reshape(SHAPE) * 2731 + 1
    width = dtype_named(dtype).itemsize
    words = torch.from_numpy(bits.astype(f"<i{width}") - 2**14)
    source = _Source(words.view(getattr(torch, dtype)), dtype)
    target = torch.full((5, 4), torch.nan, dtype=getattr(torch, dtype))
    fill([("t", target, TILING)], source, {"a": SHAPE})  # type: ignore[arg-type]  # all `fill` uses of a source
    assert torch.equal(expected(words), target.view(words.dtype))


@pytest.mark.parametrize("band", [1, 3, 4, 9, 1000])
def test_another_dtype_is_rounded_once_in_bands(band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of the buffer, the result is torch's own cast of the whole."""
    monkeypatch.setattr(bridge.loading, "_BAND", band)
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    source = _Source(values, "float32")
    target = torch.full((5, 4), torch.nan, dtype=torch.bfloat16)
    fill([("t", target, TILING)], source, {"a": SHAPE})  # type: ignore[arg-type]  # all `fill` uses of a source
    assert torch.equal(expected(values.bfloat16()), target)
    assert max(box.volume for box in source.boxes) <= max(band, 1)


def test_nothing_is_read_when_something_is_wrong() -> None:
    """A tensor that is larger than it should be is refused though every tile would fit."""
    source = _Source(torch.zeros(7, 4), "float32")
    target = torch.ones(5, 4)
    with pytest.raises(
        AccountingError, match="1 tensors are not as the model needs them"
    ) as caught:
        fill([("t", target, TILING)], source, {"a": SHAPE})  # type: ignore[arg-type]  # all `fill` uses of a source
    assert caught.value.where == ("a: shape (7, 4), the model's is (6, 4)",)
    assert source.boxes == []
    assert torch.equal(torch.ones(5, 4), target)


def test_integers_are_not_weights() -> None:
    """A quantized tensor has a scale somewhere; casting its codes would be wrong."""
    source = _Source(torch.zeros(SHAPE, dtype=torch.int8), "float8_e4m3fn")
    with pytest.raises(DtypeMismatchError, match="only floating-point"):
        fill([("t", torch.ones(5, 4), TILING)], source, {"a": SHAPE})  # type: ignore[arg-type]  # all `fill` uses of a source
