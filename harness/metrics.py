"""How far apart two arrays of logits are, by position, and how far each is from the truth.

Metrics measure and never judge; `harness.thresholds` gives verdicts. What cannot be compared is a
result that says so: `problems` is not empty, every number is NaN, and no verdict passes on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from bridge.errors import DtypeMismatchError

Logits = np.ndarray[Any, np.dtype[np.floating[Any]]]
Array = np.ndarray[Any, np.dtype[np.float64]]

FRACTION_BITS: Final[Mapping[str, int]] = {
    "float64": 52,
    "float32": 23,
    "bfloat16": 7,
}
"""Stored bits of the significand: one ulp of a number in [1, 2) is 2 ** -bits."""
ULP_EDGES: Final = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 256.0, 1024.0, math.inf)
_TOP: Final = 5
_SMALLEST: Final = -126
"""Exponent of the smallest normal float32 and bfloat16; below it the spacing stays the same."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """Two arrays of logits against each other.

    Attributes:
        problems: Why they could not be compared; empty when they could.
        rms: Root mean square of the difference.
        max_abs_diff: (batch, seq), the largest difference at each position.
        kl: (batch, seq), KL(reference || candidate) in nats per token.
        top1: (batch, seq), whether candidate and reference share a first choice.
        top5: (batch, seq), the share of the candidate's first five that are among the reference's.
        ulp_histogram: Upper edge of the bucket, in ulp of the reference in `dtype`, to count.
    """

    problems: tuple[str, ...]
    rms: float = math.nan
    max_abs_diff: Array = field(default_factory=lambda: np.empty((0, 0)))
    kl: Array = field(default_factory=lambda: np.empty((0, 0)))
    top1: np.ndarray[Any, np.dtype[np.bool_]] = field(
        default_factory=lambda: np.empty((0, 0), dtype=bool)
    )
    top5: Array = field(default_factory=lambda: np.empty((0, 0)))
    ulp_histogram: Mapping[float, int] = field(default_factory=dict)

    @property
    def comparable(self) -> bool:
        """Whether there was something to compare and nothing in the way."""
        return not self.problems

    @property
    def top1_agreement(self) -> float:
        """Share of positions with the same first choice; NaN if not comparable."""
        return float(self.top1.mean()) if self.comparable else math.nan

    @property
    def top5_agreement(self) -> float:
        """Mean share of the first five in common; NaN if not comparable."""
        return float(self.top5.mean()) if self.comparable else math.nan

    @property
    def kl_mean(self) -> float:
        """Nats per token, over all positions; NaN if not comparable."""
        return float(self.kl.mean()) if self.comparable else math.nan

    @property
    def worst_position(self) -> tuple[int, int] | None:
        """(batch, seq) index of the largest difference; None if not comparable."""
        if not self.comparable:
            return None
        batch, seq = np.unravel_index(int(self.max_abs_diff.argmax()), self.max_abs_diff.shape)
        return int(batch), int(seq)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Excess:
    """A candidate's distance from the truth in units of the reference's own.

    Attributes:
        problems: Why nothing could be measured; empty when it could.
        value: `candidate_error / max(reference_error, floor)`; NaN with problems.
        candidate_error: rms(candidate - oracle), in logits.
        reference_error: rms(reference - oracle), in logits.
        floor: The smallest error counted for the reference, in logits.
        scale: rms(oracle): divide by it for relative errors.
        candidate_by_position: (batch, seq), rms over the vocabulary.
        reference_by_position: (batch, seq), rms over the vocabulary.
    """

    problems: tuple[str, ...]
    value: float = math.nan
    candidate_error: float = math.nan
    reference_error: float = math.nan
    floor: float = math.nan
    scale: float = math.nan
    candidate_by_position: Array = field(default_factory=lambda: np.empty((0, 0)))
    reference_by_position: Array = field(default_factory=lambda: np.empty((0, 0)))

    def reference_error_ulp(self, dtype: str) -> float:
        """The reference's relative error, in ulp of a number in [1, 2) of this dtype."""
        return self.reference_error / self.scale / ulp_of_one(dtype)


def ulp_of_one(dtype: str) -> float:
    """Spacing of the numbers in [1, 2): 2 ** -23 for float32, 2 ** -7 for bfloat16.

    Raises:
        DtypeMismatchError: BR303, not a dtype that logits come in.
    """
    if dtype not in FRACTION_BITS:
        raise DtypeMismatchError(
            f"logits are not judged in {dtype}", hint=f"known: {', '.join(FRACTION_BITS)}"
        )
    return 2.0 ** -FRACTION_BITS[dtype]


def compare(candidate: Logits, reference: Logits, *, dtype: str = "float32") -> Comparison:
    """Measure the difference of two arrays of logits.

    Args:
        candidate: (batch, seq, vocab_size).
        reference: Same shape and dtype.
        dtype: What the models computed in; the unit of the ulp histogram. NumPy has no bfloat16,
            so logits of such a model come as float32.
    """
    unit = ulp_of_one(dtype)
    problems = _problems({"candidate": candidate, "reference": reference})
    if candidate.dtype != reference.dtype:
        problems += (f"dtypes differ: {candidate.dtype} and {reference.dtype}",)
    if problems:
        return Comparison(problems=problems)
    ours, theirs = candidate.astype(np.float64), reference.astype(np.float64)
    diff = np.abs(ours - theirs)
    log_ours, log_theirs = _log_softmax(ours), _log_softmax(theirs)
    return Comparison(
        problems=(),
        rms=_rms(diff),
        max_abs_diff=diff.max(axis=-1),
        kl=(np.exp(log_theirs) * (log_theirs - log_ours)).sum(axis=-1),
        top1=np.any(_is_first(ours) & _is_first(theirs), axis=-1),
        top5=_top_share(ours, theirs, min(_TOP, ours.shape[-1])),
        ulp_histogram=_ulp_histogram(diff, theirs, unit),
    )


def excess(candidate: Logits, reference: Logits, oracle: Logits, floor: float) -> Excess:
    """Measure how much farther from the truth the candidate is than the reference.

    Args:
        candidate: (batch, seq, vocab_size).
        reference: Same shape and dtype.
        oracle: Same shape, float64.
        floor: Relative to rms(oracle). A reference that happens to be closer than this is taken to
            be this far; the candidate's own error is never reduced, so nothing hides below it.
    """
    problems = _problems({"candidate": candidate, "reference": reference, "oracle": oracle})
    if candidate.dtype != reference.dtype:
        problems += (f"dtypes differ: {candidate.dtype} and {reference.dtype}",)
    if oracle.dtype != np.float64:
        problems += (f"the oracle is {oracle.dtype}, not float64",)
    if not problems and not oracle.any():
        problems = ("the oracle's logits are all zero: any model would agree",)
    if problems:
        return Excess(problems=problems)
    scale = _rms(oracle)
    candidate_diff, reference_diff = candidate - oracle, reference - oracle
    candidate_error, reference_error = _rms(candidate_diff), _rms(reference_diff)
    least = max(reference_error, floor * scale)
    if least > 0:
        value = candidate_error / least
    elif candidate_error == 0:
        value = 0.0
    else:  # without a floor, nothing but an exact candidate is as good as an exact reference
        value = math.inf
    return Excess(
        problems=(),
        value=value,
        candidate_error=candidate_error,
        reference_error=reference_error,
        floor=floor * scale,
        scale=scale,
        candidate_by_position=np.sqrt(np.mean(np.square(candidate_diff), axis=-1)),
        reference_by_position=np.sqrt(np.mean(np.square(reference_diff), axis=-1)),
    )


def _problems(arrays: Mapping[str, Logits]) -> tuple[str, ...]:
    found = []
    for name, array in arrays.items():
        if array.dtype.kind != "f":
            found.append(f"{name} is {array.dtype}, not floating point")
        elif array.ndim != 3:
            found.append(f"{name} has shape {array.shape}, not (batch, seq, vocab_size)")
        elif not array.size:
            found.append(f"{name} is empty, shape {array.shape}")
        else:
            bad = array.size - int(np.isfinite(array).sum())
            if bad:
                first = np.argwhere(~np.isfinite(array))[0].tolist()
                found.append(f"{name} holds {bad} NaN or infinite values, the first at {first}")
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) > 1:
        listed = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        found.append(f"shapes differ: {listed}")
    return tuple(found)


def _rms(values: Logits) -> float:
    return math.sqrt(float(np.mean(np.square(values, dtype=np.float64))))


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _is_first(logits: Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Marks the largest logit; all of them where several are equal, as is common in bfloat16."""
    marks: np.ndarray[Any, np.dtype[np.bool_]] = np.equal(
        logits, logits.max(axis=-1, keepdims=True)
    )
    return marks


def _top_share(ours: Array, theirs: Array, count: int) -> Array:
    """Share of our `count` largest that are at least as large as the reference's `count`-th."""
    picked = np.argsort(-ours, axis=-1, kind="stable")[..., :count]
    limit = -np.partition(-theirs, count - 1, axis=-1)[..., count - 1 : count]
    share: Array = (np.take_along_axis(theirs, picked, axis=-1) >= limit).mean(axis=-1)
    return share


def _ulp_histogram(diff: Array, reference: Array, unit: float) -> dict[float, int]:
    _, exponent = np.frexp(reference)  # |reference| is in [2 ** (exponent - 1), 2 ** exponent)
    exponent = np.where(reference == 0, _SMALLEST, np.maximum(exponent - 1, _SMALLEST))
    spacing = np.ldexp(unit, exponent)
    ulp = diff / spacing
    # side="left": a bucket holds its upper edge, so "0" holds the exact matches and nothing else
    bucket = np.searchsorted(np.array(ULP_EDGES), ulp.ravel(), side="left")
    counts = np.bincount(bucket, minlength=len(ULP_EDGES))
    return {edge: int(count) for edge, count in zip(ULP_EDGES, counts, strict=True)}
