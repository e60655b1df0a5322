"""The stream of `bridge.storage.philox` made by torch, on a GPU: the same bits, many at a time.

NumPy makes one word after another; on a machine with a GPU that is what a walk through a model of
250 billion parameters would wait for. Here each of a counter's four words is one element of an
int64 tensor. torch has no unsigned 64-bit arithmetic, and needs none: sums and low halves of
products are the same bits, and the high half of a product is put together from 32-bit halves.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch

from bridge.dtypes import Dtype, Words
from bridge.storage.philox import DEVIATION, NOISE_MEAN, stream_key
from bridge.tiling import Box, Shape, bands

_CHUNK: Final = 1 << 23
"""Elements made at a time: 16 MiB for each of some ten tensors."""
_ROUNDS: Final = 10
_MULTIPLIERS: Final = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL: Final = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_LOW: Final = 0xFFFFFFFF
"""Constants of Philox4x64-10: J. Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011),
the implementation behind `numpy.random.Philox`."""


def fill_box(
    out: Words,
    dtype: Dtype,
    *,
    seed: int,
    name: str,
    shape: Shape,
    box: Box,
    mean: float,
    std: float,
    device: torch.device,
) -> None:
    """Fill `out` with a box of a tensor of the stream, computing on a device.

    Args:
        out: float32 or bfloat16 words of the box's shape, strided or not.
        dtype: Which of the two.
        seed: Which weights.
        name: Whose stream.
        shape: Of the whole tensor, (width,) or (rows, width).
        box: Which part.
        mean: Of the values.
        std: Of the values.
        device: Where to compute.
    """
    width = shape[-1]
    if len(shape) == 1:
        out, box = out[None], Box((0, *box.starts), (1, *box.stops))
    scale = float(np.float32(std / DEVIATION))
    for band in bands(box, max_elements=_CHUNK):
        rows, columns = (range(a, b) for a, b in zip(band.starts, band.stops, strict=True))
        words = box_words(seed, name, width, rows, columns, device)
        noise = sum((words >> shift) & 0xFFFF for shift in (16, 32, 48)) + (words & 0xFFFF)
        values = (noise - NOISE_MEAN).to(torch.float32)
        values *= scale  # two roundings, as in NumPy: torch fuses nothing across operations
        if mean:
            values += mean
        rounded = values.to(getattr(torch, dtype.name))
        target = out[band.relative_to(box).slices].view(f"<i{dtype.itemsize}")
        # Straight into the caller's memory, which may be page-locked.
        torch.from_numpy(target).copy_(rounded.view(getattr(torch, f"int{8 * dtype.itemsize}")))


def box_words(
    seed: int, name: str, width: int, rows: range, columns: range, device: torch.device
) -> torch.Tensor:
    """Words of some rows and columns of a stream in rows of `width`: int64, (rows, columns)."""
    starts = torch.arange(rows.start, rows.stop, dtype=torch.int64, device=device) * width
    starts += columns.start
    # A counter gives four words. Where rows begin within one, some are made and not used.
    counters = torch.arange(-(-(len(columns) + 3) // 4), dtype=torch.int64, device=device)
    words = _philox((starts >> 2)[:, None] + counters, stream_key(seed, name))
    skip = starts & 3
    if not bool((skip != skip[0]).any()):
        first = int(skip[0])
        return words[:, first : first + len(columns)]
    places = skip[:, None] + torch.arange(len(columns), dtype=torch.int64, device=device)
    return words.gather(1, places)


def _philox(blocks: torch.Tensor, key: int) -> torch.Tensor:
    """The words of each block: (rows, blocks) to (rows, 4 x blocks)."""
    zero = torch.zeros_like(blocks)
    state = [blocks + 1, zero, zero, zero]  # numpy.random.Philox counts before it makes a block
    keys = [key & (1 << 64) - 1, key >> 64]
    for _ in range(_ROUNDS):
        state = _round(state, keys)
        keys = [(one + weyl) % (1 << 64) for one, weyl in zip(keys, _WEYL, strict=True)]
    return torch.stack(state, dim=2).reshape(blocks.shape[0], -1)


def _round(state: list[Any], keys: list[int]) -> list[Any]:
    first, second, third, fourth = state
    high0, low0 = _product(first, _MULTIPLIERS[0])
    high1, low1 = _product(third, _MULTIPLIERS[1])
    return [
        high1 ^ second ^ _signed(keys[0]),
        low1,
        high0 ^ fourth ^ _signed(keys[1]),
        low0,
    ]


def _product(words: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 64 bits of unsigned products."""
    high, low = (words >> 32) & _LOW, words & _LOW
    other_high, other_low = multiplier >> 32, multiplier & _LOW
    middle = high * other_low + (((low * other_low) >> 32) & _LOW)
    other_middle = low * other_high + (middle & _LOW)
    carried = ((middle >> 32) & _LOW) + ((other_middle >> 32) & _LOW)
    return high * other_high + carried, words * _signed(multiplier)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
