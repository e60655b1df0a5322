"""Spreads, the straight line through times by size, and what work takes at least."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


def spread(samples: Sequence[float]) -> float:
    """Largest minus smallest, as a share of the median; 0 for fewer than two or a median of 0."""
    middle = statistics.median(samples) if samples else 0.0
    return (max(samples) - min(samples)) / middle if middle and len(samples) > 1 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """`seconds = fixed_seconds + seconds_per_gb * size`, by least squares.

    `r_squared` is the share of the variance that the line explains, `worst_deviation` the largest
    distance of a point from it, as a share of what the line says there.
    """

    fixed_seconds: float
    seconds_per_gb: float
    r_squared: float
    worst_deviation: float


def fit(sizes_gb: Sequence[float], seconds: Sequence[float]) -> Line | None:
    """The line through at least three sizes; through two any times lie on one, so None."""
    if len(set(sizes_gb)) < 3:
        return None
    slope, intercept = statistics.linear_regression(sizes_gb, seconds)
    expected = [intercept + slope * size for size in sizes_gb]
    mean = statistics.fmean(seconds)
    total = sum((one - mean) ** 2 for one in seconds)
    left = sum((one - line) ** 2 for one, line in zip(seconds, expected, strict=True))
    return Line(
        fixed_seconds=intercept,
        seconds_per_gb=slope,
        r_squared=1.0 - left / total if total else 1.0,
        worst_deviation=max(
            abs(one - line) / abs(line) if line else float("inf")
            for one, line in zip(seconds, expected, strict=True)
        ),
    )


def forward_flops(
    *, parameters: int, batch: int, sequence: int, attention_width: int, num_layers: int
) -> int:
    """Operations of one forward pass.

    Args:
        parameters: Of the blocks and the output layer: all but the embedding.
        batch: Sequences.
        sequence: Tokens of each.
        attention_width: num_attention_heads * kv_channels.
        num_layers: That have attention, which is causal: half the square of scores, twice.
    """
    weights = 2 * parameters * batch * sequence
    return weights + 2 * batch * sequence * sequence * attention_width * num_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamBounds:
    """Seconds that streaming takes at least, by what could hold it up.

    `memory` is that of the device: each of two models' weights is written there once and read once.
    `products` are those of the device: the reference's, and Megatron's free and forced. `oracle` is
    the host: the oracle's products, free and forced.
    """

    memory: float
    products: float
    oracle: float

    @classmethod
    def of(
        cls,
        *,
        parameters: int,
        tokens: int,
        itemsize: int,
        bytes_per_second: float,
        flop_per_second: float,
        host_flop_per_second: float,
    ) -> Self:
        """Work them out.

        Args:
            parameters: That are walked through.
            tokens: Of all probes.
            itemsize: Bytes of what the models compute in.
            bytes_per_second: Of the device's memory, read and written.
            flop_per_second: Of its matrix products.
            host_flop_per_second: Of the host's, in float64.
        """
        one_pass = 2 * parameters * tokens
        return cls(
            memory=2 * 2 * itemsize * parameters / bytes_per_second,
            products=3 * one_pass / flop_per_second,
            oracle=2 * one_pass / host_flop_per_second,
        )

    @property
    def largest(self) -> float:
        """All three are at work at once, so no run is faster than this."""
        return max(self.memory, self.products, self.oracle)
