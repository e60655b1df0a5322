"""Mistakes of the rotary embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from harness import oracle
from harness.mistakes.attention import windowed_attention
from harness.mistakes.setup import Mistake, Setup, with_, with_model
from harness.mistakes.weights import rows_in_order
from harness.oracle import Array


def of_rope(setup: Setup) -> Iterator[Mistake]:
    """Values of llama3 scaling, positions, pairs and precision."""
    rope = setup.model.rope

    def with_rope(base: float, llama3: tuple[float, float, float, int] | None) -> Setup:
        return with_model(setup, rope=oracle.Rope(base, llama3))

    for base in (1e4, 5e5, 1e6):
        yield "rope-theta", f"theta {base:g}", with_rope(base, rope.llama3)
    yield "rope-plain", "llama3 scaling left out", with_rope(rope.base, None)
    factor, low, high, length = rope.llama3 or (8.0, 1.0, 4.0, 8192)
    for value in (factor / 2, factor * 2, 1.0, 4.0, 8.0, 16.0, 32.0):
        yield "rope-factor", f"factor {value:g}", with_rope(rope.base, (value, low, high, length))
    for value in (low / 2, low * 2, 1.0, 2.0, 3.0):
        if value < high:
            yield (
                "rope-low-freq-factor",
                f"low_freq_factor {value:g}",
                with_rope(rope.base, (factor, value, high, length)),
            )
    for value in (high / 2, high * 2, 2.0, 3.0, 4.0, 8.0):
        if value > low:
            yield (
                "rope-high-freq-factor",
                f"high_freq_factor {value:g}",
                with_rope(rope.base, (factor, low, value, length)),
            )
    for size in (length // 2, length * 2, 2048, 4096, 8192, 131072):
        yield (
            "rope-original-length",
            f"original length {size}",
            with_rope(rope.base, (factor, low, high, size)),
        )
    yield (
        "rope-defaults",
        "factor alone, the other three values at their defaults",
        with_rope(rope.base, (factor, 1.0, 4.0, 8192)),
    )
    turns: Mapping[str, tuple[str, Callable[[Array, Any, Any], Array]]] = {
        "rope-positions-ignored": ("positions 0, 1, 2, ... whatever was asked", _from_zero),
        "rope-positions-from-one": ("positions off by one", _from_one),
        "rope-positions-twice": ("positions twice as far apart", lambda a, _p, _f: 2 * a),
        "rope-backwards": ("rotation by minus theta", lambda a, _p, _f: -a),
        "rope-missing": ("no rotation", lambda a, _p, _f: 0 * a),
        "rope-half-the-channels": ("the slower half of the channels not rotated", _half),
        "rope-angles-bfloat16": ("angles rounded to bfloat16", lambda a, _p, _f: _coarse(a)),
        "rope-frequencies-bfloat16": ("frequencies rounded to bfloat16", _coarse_frequencies),
        "rope-table-in-pieces": ("a table that repeats a row every 6000", _pieces),
    }
    for name, (says, turn) in turns.items():
        yield name, says, with_(setup, turn=turn)
    yield (
        "rope-interleaved",
        "neighbours turned together, by the angles of halves",
        with_(setup, attention=partial(windowed_attention, 0, _turn_neighbours)),
    )
    channels = setup.model.kv_channels
    pairs = [*range(0, channels, 2), *range(1, channels, 2)]
    halves = [channel // 2 + channels // 2 * (channel % 2) for channel in range(channels)]
    for name, says, order in (
        ("rope-interleaved", "neighbouring channels turned together: GPT-J's pairs", pairs),
        ("rope-rows-permuted", "query and key rows in the order of interleaved RoPE", halves),
    ):
        yield (
            name,
            says,
            with_(
                setup,
                weight=rows_in_order(
                    setup.weight, {"q_proj": order, "k_proj": order}, within=channels
                ),
            ),
        )


def _turn_neighbours(x: Array, angles: Array) -> Array:
    """`rotary_interleaved` in one place only: neighbours turn, by the angles of halves."""
    both = np.concatenate([angles, angles], axis=-1)
    partner = np.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
    found: Array = x * np.cos(both) + partner * np.sin(both)
    return found


def _from_zero(angles: Array, _positions: Any, frequencies: Any) -> Array:  # noqa: ANN401 - arrays
    counted = np.arange(angles.shape[-2], dtype=np.float32)[:, None] * frequencies
    return np.broadcast_to(counted.astype(np.float64), angles.shape)


def _from_one(_angles: Array, positions: Any, frequencies: Any) -> Array:  # noqa: ANN401 - arrays
    moved = (positions + 1).astype(np.float32)[..., None] * frequencies
    found: Array = moved.astype(np.float64)
    return found


def _pieces(_angles: Array, positions: Any, frequencies: Any) -> Array:  # noqa: ANN401 - arrays
    repeated = (positions % 6000 == 0) & (positions > 0)
    return _from_one(_angles, positions - repeated - 1, frequencies)


def _half(angles: Array, _positions: Any, _frequencies: Any) -> Array:  # noqa: ANN401 - arrays
    size = angles.shape[-1]
    kept: Array = np.where(np.arange(size) < size - size // 2, angles, 0.0)
    return kept


def _coarse(values: Any) -> Array:  # noqa: ANN401 - an array
    """Rounded to the nearest bfloat16, ties to even."""
    words = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (words + 0x7FFF + ((words >> 16) & 1)) & 0xFFFF0000
    found: Array = rounded.astype(np.uint32).view(np.float32).astype(np.float64)
    return found


def _coarse_frequencies(_angles: Array, positions: Any, frequencies: Any) -> Array:  # noqa: ANN401 - arrays
    return _from_one(_angles, positions - 1, _coarse(frequencies).astype(np.float32))
