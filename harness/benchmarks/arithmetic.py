"""Medians, spreads, and the straight line through times by size."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


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
