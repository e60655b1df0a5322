"""Verdicts: a measured value, the limit it is held to, and where the limit comes from.

Every limit is in `suites/thresholds.toml`, beside the measurement it was taken from; nothing else
in the project holds a tolerance for logits. Logits pass when they are as close to the truth as the
reference's own, in two steps:

1. The reference is itself sane: its error against the float64 oracle is of rounding size. A broken
   reference would make any candidate look good.
2. The candidate's error is at most `limit` times the reference's. Where the reference's error is
   smaller than a few ulp it counts as that floor, since an error of zero is luck, not a standard.

`python -m harness.calibrate` repeats the measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from bridge.errors import ConfigError
from harness.locations import suites_dir
from harness.metrics import Comparison, Excess, Logits, compare, excess, ulp_of_one
from harness.toml_files import read_toml

SCHEMA_VERSION: Final = 1
EXCESS: Final = "logits.excess"
REFERENCE_ERROR: Final = "logits.reference_error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One value held to one limit.

    Args:
        name: Of the threshold, `logits.excess`.
        value: What was measured; NaN when it could not be.
        limit: The largest value that passes.
        unit: Of both, in words.
        problems: Why nothing could be measured; with any, the verdict is a failure.
    """

    name: str
    value: float
    limit: float
    unit: str
    problems: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the value is a number within the limit and nothing was in the way."""
        return not self.problems and math.isfinite(self.value) and self.value <= self.limit

    def describe(self) -> str:
        """One line: value, limit, unit and verdict, with as many digits as tell the two apart."""
        word = "passed" if self.passed else "FAILED"
        if self.problems:
            return f"{self.name}: {word}, not measured: {'; '.join(self.problems)}"
        value, limit = _telling_apart(self.value, self.limit)
        relation = "<=" if self.value <= self.limit else ">"
        if math.isnan(self.value):
            relation = "is not within"
        return f"{self.name}: {word}, {value} {relation} {limit} {self.unit}"


def _telling_apart(value: float, limit: float) -> tuple[str, str]:
    for digits in range(3, 18):
        texts = f"{value:.{digits}g}", f"{limit:.{digits}g}"
        if value == limit or texts[0] != texts[1]:
            return texts
    return repr(value), repr(limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """A limit and the measurement behind it, as `suites/thresholds.toml` holds them.

    Args:
        name: What is limited.
        dtype: What the models compute in, `float32` or `bfloat16`.
        limit: The largest value that passes.
        unit: In words.
        floor_ulp: For an excess: the least error counted for the reference, in ulp of the dtype
            at 1.0, relative to rms(oracle).
        measured: What was seen on healthy models, and on faulty ones.
        command: What repeats it.
        hidden_size: For an error of rounding: up to which width of a model the limit is meant.
            Beyond it the limit grows with the square root of the width, as the error of a sum of
            that many rounded terms does; None for a limit that holds at any width.
    """

    name: str
    dtype: str
    limit: float
    unit: str
    measured: Mapping[str, Any]
    command: str
    floor_ulp: float = 0.0
    hidden_size: int | None = None

    def __post_init__(self) -> None:
        """A limit is positive and comes from something."""
        texts = ("name", "dtype", "unit", "command")
        wrong = [f"{one} must be text" for one in texts if not isinstance(getattr(self, one), str)]
        if not (math.isfinite(self.limit) and self.limit > 0):
            wrong.append(f"limit={self.limit} must be a positive number")
        if not (math.isfinite(self.floor_ulp) and self.floor_ulp >= 0):
            wrong.append(f"floor_ulp={self.floor_ulp} must be zero or more")
        if self.hidden_size is not None and self.hidden_size < 1:
            wrong.append(f"hidden_size={self.hidden_size} must be positive")
        if not self.measured or not self.command:
            wrong.append("measured and command must say where the limit comes from")
        if wrong:
            raise ConfigError(f"threshold {self.name} of {self.dtype} is not usable", where=wrong)

    @property
    def floor(self) -> float:
        """The floor relative to rms(oracle)."""
        return self.floor_ulp * ulp_of_one(self.dtype)

    def for_hidden_size(self, hidden_size: int) -> Threshold:
        """The limit for a model of this width."""
        if self.hidden_size is None or hidden_size <= self.hidden_size:
            return self
        return replace(self, limit=self.limit * math.sqrt(hidden_size / self.hidden_size))

    def verdict(self, value: float, *, problems: tuple[str, ...] = ()) -> Verdict:
        """Hold a value to this limit."""
        return Verdict(
            name=self.name, value=value, limit=self.limit, unit=self.unit, problems=problems
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Every limit, by name and dtype."""

    by_key: Mapping[tuple[str, str], Threshold]

    def for_hidden_size(self, hidden_size: int) -> Thresholds:
        """The limits for a model of this width."""
        return Thresholds(
            by_key={key: one.for_hidden_size(hidden_size) for key, one in self.by_key.items()}
        )

    def get(self, name: str, dtype: str) -> Threshold:
        """The limit of this name in this dtype.

        Raises:
            ConfigError: BR100, there is none: nothing is judged by a guess.
        """
        try:
            return self.by_key[name, dtype]
        except KeyError:
            raise ConfigError(
                f"no limit for {name} in {dtype}",
                where="suites/thresholds.toml",
                hint="measure one with `python -m harness.calibrate` and write both down",
            ) from None


def load_thresholds(path: Path | None = None) -> Thresholds:
    """Read the limits, by default from `suites/thresholds.toml`.

    Raises:
        ConfigError: BR100, another schema, a field missing or unknown, or a limit given twice.
    """
    path = path or suites_dir() / "thresholds.toml"
    try:
        document = read_toml(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the limits: {error}", where=str(path)) from None
    if document.get("schema_version") != SCHEMA_VERSION:
        raise ConfigError(f"schema_version must be {SCHEMA_VERSION}", where=str(path))
    entries = document.get("threshold", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError("limits stand in [[threshold]] tables", where=str(path))
    found: dict[tuple[str, str], Threshold] = {}
    for entry in entries:
        try:
            threshold = Threshold(**entry)
        except (TypeError, OverflowError) as error:
            raise ConfigError(f"a threshold of {path.name}: {error}", where=str(path)) from None
        key = threshold.name, threshold.dtype
        if key in found:
            raise ConfigError(f"{key[0]} of {key[1]} is given twice", where=str(path))
        found[key] = threshold
    if not found:
        raise ConfigError("no thresholds in the file", where=str(path))
    return Thresholds(by_key=found)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogitJudgement:
    """What was measured about a candidate's logits, and the verdicts on it."""

    excess: Excess
    comparison: Comparison
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """Whether every verdict passed."""
        return all(verdict.passed for verdict in self.verdicts)

    @property
    def odd_one_out(self) -> Literal["candidate", "reference"] | None:
        """Which of the two is farther from the oracle than it may be; the reference first."""
        for verdict, side in zip(self.verdicts, ("reference", "candidate"), strict=True):
            if not verdict.passed:
                return "reference" if side == "reference" else "candidate"
        return None


def judge_logits(
    candidate: Logits,
    reference: Logits,
    oracle: Logits,
    *,
    dtype: str,
    thresholds: Thresholds | None = None,
) -> LogitJudgement:
    """Judge a candidate's logits by the rule at the top of this file.

    Args:
        candidate: (batch, seq, vocab_size).
        reference: Same shape and dtype.
        oracle: Same shape, float64.
        dtype: What both models computed in; bfloat16 logits come as float32 arrays.
        thresholds: By default those of `suites/thresholds.toml`.

    Raises:
        ConfigError: BR100, no limits for this dtype.
    """
    thresholds = thresholds or load_thresholds()
    on_excess = thresholds.get(EXCESS, dtype)
    on_reference = thresholds.get(REFERENCE_ERROR, dtype)
    measured = excess(candidate, reference, oracle, on_excess.floor)
    reference_ulp = measured.reference_error_ulp(dtype)
    return LogitJudgement(
        excess=measured,
        comparison=compare(candidate, reference, dtype=dtype),
        verdicts=(
            on_reference.verdict(reference_ulp, problems=measured.problems),
            on_excess.verdict(measured.value, problems=measured.problems),
        ),
    )
