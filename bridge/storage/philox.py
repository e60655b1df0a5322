"""Portable pseudo-random tensors: any element range of any tensor, from (seed, name) alone.

The stream is defined here once, so that a toy written to disk, a synthetic source that generates
Ultra's 14 GB tensors piece by piece, and a golden recorded years ago all hold the same bits:

    key      first 16 bytes of sha256(f"{seed}/{name}"), little-endian
    word[i]  word i % 4 of Philox4x64-10(key, counter = i // 4 + 1), as numpy.random.Philox counts
    noise[i] the sum of the four 16-bit fields of word[i], minus its mean 131070
    value[i] mean + float32(noise[i]) * float32(std / DEVIATION), two float32 operations

`noise` is a sum of four uniforms: close to normal (its tails end at 3.46 standard deviations), an
18-bit integer and hence exact in float32. Everything after it is one IEEE multiplication and one
addition, so the bits depend on no library's idea of a normal distribution.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from bridge.dtypes import Dtype, Words
from bridge.errors import DtypeMismatchError
from bridge.tiling import Shape

Float32s = np.ndarray[Any, np.dtype[np.float32]]

CHUNK: Final = 1 << 15
"""Elements made at a time: 256 KiB of words, which stays in a core's cache."""
DEVIATION: Final = math.sqrt((2**32 - 1) / 3)
"""Standard deviation of `noise`: four uniforms on 0..65535 have variance (2**32 - 1) / 12 each."""
NOISE_MEAN: Final = 2 * 0xFFFF
_LANES: Final = np.uint64(0x0000FFFF0000FFFF)
_NOISY_NORM: Final = 0.2


def stream_key(seed: int, name: str) -> int:
    """The 128-bit Philox key of one tensor's stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")


def mean_and_std(name: str, shape: Shape) -> tuple[float, float]:
    """How a parameter of this HF name is drawn.

    Activations keep a size near one through any depth, and no norm can be left out unnoticed:
    vectors are norms, 1 + 0.2 x noise; embeddings have std 1; a matrix has std 1/sqrt(fan_in).
    """
    if len(shape) == 1:
        return 1.0, _NOISY_NORM
    if "embed_tokens" in name:
        return 0.0, 1.0
    return 0.0, 1.0 / math.sqrt(shape[-1])


def word_stream(seed: int, name: str, start: int) -> np.random.Philox:
    """A generator whose next word is word `start` of the stream; none before it is generated."""
    block, skip = divmod(start, 4)
    words = np.random.Philox(key=stream_key(seed, name), counter=block)
    words.random_raw(skip, output=False)
    return words


def raw_words(seed: int, name: str, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Words `start` to `stop` of the stream, one per element."""
    return np.asarray(word_stream(seed, name, start).random_raw(stop - start))


def fill_float32(
    out: Float32s, *, seed: int, name: str, start: int, mean: float, std: float
) -> None:
    """Fill a one-dimensional `out` with elements `start` to `start + len(out)` of the stream."""
    for first, chunk in _float32_chunks(
        seed=seed, name=name, start=start, count=len(out), mean=mean, std=std
    ):
        out[first : first + len(chunk)] = chunk


def fill_words(
    out: Words, dtype: Dtype, *, seed: int, name: str, start: int, mean: float, std: float
) -> None:
    """As `fill_float32`, as the bit patterns of `dtype`: float32, or bfloat16 rounded from it.

    Raises:
        DtypeMismatchError: BR303, the stream is not defined for this dtype.
    """
    if dtype.name not in {"float32", "bfloat16"}:
        raise DtypeMismatchError(
            f"synthetic weights are float32 or bfloat16, not {dtype.name}", where=name
        )
    for first, chunk in _float32_chunks(
        seed=seed, name=name, start=start, count=len(out), mean=mean, std=std
    ):
        words = chunk.view(np.uint32) if dtype.itemsize == 4 else bfloat16_words(chunk)
        out[first : first + len(chunk)] = words


def bfloat16_words(values: Float32s) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Round finite float32 to bfloat16 bit patterns, nearest, ties to even; integers only."""
    bits = values.view(np.uint32)
    odd = bits >> np.uint32(16)
    odd &= np.uint32(1)
    odd += np.uint32(0x7FFF)
    odd += bits
    odd >>= np.uint32(16)
    return odd.astype(np.uint16)


def float32_of_bfloat16(words: np.ndarray[Any, np.dtype[np.uint16]]) -> Float32s:
    """The values of bfloat16 bit patterns: exact, since float32 only adds zero bits."""
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _float32_chunks(
    *, seed: int, name: str, start: int, count: int, mean: float, std: float
) -> Iterator[tuple[int, Float32s]]:
    """Pieces of the stream and where they begin; each array is overwritten by the next piece."""
    scale, centre = np.float32(std / DEVIATION), np.float32(mean)
    stream = word_stream(seed, name, start)
    size = min(count, CHUNK)
    lanes, noise, values = np.empty(size, "<u8"), np.empty(size, "<u4"), np.empty(size, np.float32)
    for first in range(0, count, CHUNK):
        used = slice(min(CHUNK, count - first))
        words = np.asarray(stream.random_raw(used.stop), "<u8")
        low = lanes[used]
        np.right_shift(words, np.uint64(16), out=low)
        low &= _LANES
        words &= _LANES
        low += words  # two sums of two fields, 32 bits apart
        halves = low.view("<u4")
        np.add(halves[0::2], halves[1::2], out=noise[used])
        signed = noise[used].view("<i4")
        signed -= np.int32(NOISE_MEAN)
        chunk = values[used]
        chunk[...] = signed
        chunk *= scale
        if centre:
            chunk += centre
        yield first, chunk
