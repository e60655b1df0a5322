"""Rows that pad the vocabulary: no tensor of the other side holds them, and they must be zero."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from bridge.plan import Plan
from bridge.reading import TransferLimits
from bridge.storage.source import TensorSource
from bridge.tiling import Box, bands


def nonzero_padding(
    plan: Plan,
    megatron: TensorSource,
    names: Collection[str] | None = None,
    *,
    limits: TransferLimits | None = None,
) -> list[str]:
    """Every stretch of vocabulary padding that holds something other than zeros.

    Args:
        plan: Says where the padding is.
        megatron: The checkpoint.
        names: Look at these parameters only.
        limits: Padding of any size is read through one buffer of `band_nbytes`.
    """
    band_nbytes = (limits or TransferLimits()).band_nbytes
    wrong = []
    for name in plan.hf_to_mcore if names is None else names:
        for tile in plan.hf_to_mcore[name].tiles:
            if tile.source is None:
                count, first = _nonzero_rows(megatron, name, tile.target_box, band_nbytes)
                if count:
                    wrong.append(f"{name}: {count} padding rows, {first} the first")
    return wrong


def _nonzero_rows(
    source: TensorSource, name: str, box: Box, band_nbytes: int
) -> tuple[int, int | None]:
    """How many rows of a box hold something other than zeros, and the first of them."""
    word = source.tensors[name].dtype.word
    buffer = np.empty(min(box.volume, max(1, band_nbytes // word.itemsize)), word)
    count, first, last = 0, None, None
    for band in bands(box, max_elements=buffer.size):
        words = buffer[: band.volume].reshape(band.shape)
        source.read_into(name, band, words)
        rows = np.flatnonzero(words.any(axis=1)) + band.starts[0]
        if not rows.size:
            continue
        # A row wider than the buffer comes in several bands, and is one row all the same.
        count += rows.size - int(rows[0] == last)
        first = int(rows[0]) if first is None else first
        last = int(rows[-1])
    return count, first
