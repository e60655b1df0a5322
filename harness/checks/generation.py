"""Generation: greedy decoding by the reference and by Megatron over a layout, each with its cache.

Both are judged by the oracle on the same tokens. A step at which they choose differently is a
near-tie if the oracle, too, finds it hard to choose; decoding then goes on from the reference's
token. This is the only check that passes through either cache.

Log-probabilities have an error that grows with the logits, and so a limit in ulp of their rms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from harness import live_generation
from harness.bench import Array, Bench
from harness.compare import Finding
from harness.generation import Generated
from harness.metrics import ulp_of_one
from harness.suite import Case
from harness.thresholds import Thresholds, Verdict

NEAR_TIE: Final = "generation.near_tie"
LOG_PROBABILITY: Final = "generation.log_probability"
_MEGATRON: Final = "Megatron"
_REFERENCE: Final = "the reference"


def run(case: Case, bench: Bench) -> Finding:
    """Decode with both, and hold every step of both to the oracle."""
    generated, request = bench.generated(case), bench.request(case)
    ranks: list[Any] = bench.run(
        case,
        request.layout,
        live_generation.decode,
        request,
        generated.prompts,
        generated.tokens,
    )
    oracle = bench.oracle_continuation(case, generated)
    return judge(generated, ranks[0], oracle, dtype=case.dtype, thresholds=bench.limits(case))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Steps:
    """One model's steps, held to the oracle's.

    Args:
        name: Whose they are.
        tokens: (batch, num_steps), what it chooses.
        shortfall: (batch, num_steps), by how many nats the oracle prefers its own choice.
        error: (batch, num_steps), the largest error of a log-probability over the vocabulary, in
            ulp of rms(oracle).
    """

    name: str
    tokens: Array
    shortfall: Array
    error: Array


def judge(
    reference: Generated, candidate: Array, oracle: Array, *, dtype: str, thresholds: Thresholds
) -> Finding:
    """Judge two models' steps along the reference's tokens.

    Args:
        reference: What the reference chose, and by which logits.
        candidate: (batch, num_steps, vocab_size), the other model's logits given those tokens.
        oracle: Same shape, float64.
        dtype: What both models computed in.
        thresholds: Limits.
    """
    limits = thresholds.get(NEAR_TIE, dtype), thresholds.get(LOG_PROBABILITY, dtype)
    problems = _problems(reference, candidate, oracle)
    if problems:
        verdict = limits[1].verdict(math.nan, problems=problems)
        return Finding(passed=False, summary=verdict.describe(), places=problems)
    truth = _log_probabilities(oracle)
    unit = ulp_of_one(dtype) * math.sqrt(np.mean(oracle * oracle))
    sides = (
        _steps(_REFERENCE, reference.logits, reference.tokens, truth, unit),
        _steps(_MEGATRON, candidate, candidate.argmax(axis=-1), truth, unit),
    )
    verdicts = {
        (side.name, limit.name): limit.verdict(float(values.max()))
        for side in sides
        for limit, values in zip(limits, (side.shortfall, side.error), strict=True)
    }
    failed = [key for key, verdict in verdicts.items() if not verdict.passed]
    worst = verdicts[failed[0] if failed else (_MEGATRON, LOG_PROBABILITY)]
    apart = sides[0].tokens != sides[1].tokens
    agreement = f"{apart.size - int(apart.sum())} of {apart.size} tokens are the same"
    if apart.any() and not failed:
        agreement += f", {int(apart.sum())} nearly tied"
    whose = failed[0][0] if failed else _MEGATRON
    return Finding(
        passed=not failed,
        summary=f"{agreement}; {whose}: {worst.describe()}",
        value=worst.value,
        limit=worst.limit,
        unit=worst.unit,
        places=_places(sides, truth, verdicts, unit),
        details={
            "tokens": {side.name: side.tokens.tolist() for side in sides},
            "near_ties": np.argwhere(apart).tolist() if not failed else [],
            **{f"{name}: {limit}": one.value for (name, limit), one in verdicts.items()},
            "nats_per_ulp": unit,
        },
    )


def _problems(reference: Generated, candidate: Array, oracle: Array) -> tuple[str, ...]:
    """What is in the way of a comparison."""
    found = []
    logits = {_REFERENCE: reference.logits, _MEGATRON: candidate, "the oracle": oracle}
    if reference.logits.ndim != 3 or not reference.logits.size:
        found.append(f"the reference gave logits of shape {reference.logits.shape}")
    if len({one.shape for one in logits.values()}) > 1:
        found.append(f"shapes differ: {', '.join(f'{n} {x.shape}' for n, x in logits.items())}")
    if reference.logits.shape[:2] != reference.tokens.shape:
        found.append(f"{reference.tokens.shape} tokens from {reference.logits.shape} logits")
    if candidate.dtype != reference.logits.dtype:
        found.append(f"dtypes differ: {candidate.dtype} and {reference.logits.dtype}")
    for name, array in logits.items():
        bad = array.size - int(np.isfinite(array).sum())
        if bad:
            first = np.argwhere(~np.isfinite(array))[0].tolist()
            found.append(f"{name}: {bad} NaN or infinite logits, the first at {first}")
    if not found and not oracle.any():
        found.append("the oracle's logits are all zero: any model would agree")
    return tuple(found)


def _steps(name: str, logits: Array, tokens: Array, truth: Array, unit: float) -> _Steps:
    chosen = np.take_along_axis(truth, tokens[..., None], axis=-1)[..., 0]
    error = np.abs(_log_probabilities(logits) - truth).max(axis=-1) / unit
    return _Steps(name=name, tokens=tokens, shortfall=truth.max(axis=-1) - chosen, error=error)


def _log_probabilities(logits: Array) -> Array:
    """In nats, float64."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def _places(
    sides: Sequence[_Steps], truth: Array, verdicts: dict[tuple[str, str], Verdict], unit: float
) -> tuple[str, ...]:
    """Where each side first goes beyond a limit, and what the oracle says there."""
    best, places = truth.argmax(axis=-1), []
    for side in sides:
        for limit, values in ((NEAR_TIE, side.shortfall), (LOG_PROBABILITY, side.error)):
            verdict = verdicts[side.name, limit]
            if verdict.passed:
                continue
            steps = np.argwhere(~(values <= verdict.limit))
            batch, step = min(steps.tolist(), key=lambda at: (at[1], at[0]))
            where = f"{side.name}, sequence {batch}, new token {step}"
            if limit == NEAR_TIE:
                places.append(
                    f"{where}: chooses {side.tokens[batch, step]}, which the oracle finds "
                    f"{values[batch, step]:.3g} nats less likely than {best[batch, step]}"
                )
            else:
                places.append(
                    f"{where}: a log-probability is {values[batch, step] * unit:.3g} nats from "
                    "the oracle's"
                )
    return tuple(places)
