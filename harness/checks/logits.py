"""Logit parity: Megatron and the reference, both judged by their distance from the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from harness.bench import Array, Bench
from harness.compare import Finding
from harness.localize import localisation
from harness.metrics import ulp_of_one
from harness.probes import CONTEXT_LENGTHS, STRETCHES
from harness.suite import Case
from harness.thresholds import LogitJudgement, judge_logits

_MAX_POINTS: Final = 512
"""That a figure has."""


def run(case: Case, bench: Bench) -> Finding:
    """Judge Megatron's logits on the case's probe."""
    reference = bench.reference_logits(case)
    found = judge(case, bench, bench.megatron_logits(case), reference)
    if case.probe in CONTEXT_LENGTHS:
        found = _count_too(found, bench.counting_difference(case))
    if found.passed:
        return found
    where = localisation(case, bench)
    return replace(
        found,
        places=(*found.places, *where.places),
        details={**found.details, "localisation": where.to_dict()},
    )


def _count_too(found: Finding, difference: float) -> Finding:
    """The finding, and that Megatron's own count of positions is what the probe told it."""
    if difference == 0:
        return replace(found, details={**found.details, "counts_as_told": True})
    place = f"told positions 0, 1, 2, ... logits are up to {difference:.3g} from those it counts by"
    return replace(
        found,
        passed=False,
        summary=place if found.passed else found.summary,
        places=(*found.places, place),
        details={**found.details, "counts_as_told": False},
    )


def judge(case: Case, bench: Bench, candidate: Array, reference: Array) -> Finding:
    """Judge any logits on the case's probe."""
    found = judge_logits(
        candidate,
        reference,
        bench.oracle_logits(case),
        dtype=case.dtype,
        thresholds=bench.limits(case),
    )
    if case.probe in CONTEXT_LENGTHS:
        found = by_stretch(found, case.dtype)
    failed = [verdict for verdict in found.verdicts if not verdict.passed]
    excess = found.verdicts[-1]
    return Finding(
        passed=found.passed,
        summary=failed[0].describe() if failed else excess.describe(),
        value=excess.value,
        limit=excess.limit,
        unit=excess.unit,
        places=_places(case, bench, found) if failed else (),
        details={
            **_details(found),
            "by_position": _by_position(found, bench.probe(case).position_ids.tolist()),
            "reference": _reference(case, bench),
        },
    )


def by_stretch(found: LogitJudgement, dtype: str) -> LogitJudgement:
    """The judgement of a whole context, each verdict on the stretch that is worst.

    A mistake at the last thousand tokens would drown in the mean over a hundred thousand.
    """
    measured = found.excess
    if measured.problems:
        return found
    ours, theirs = (
        np.sqrt([np.square(part).mean() for part in np.array_split(errors, STRETCHES, axis=1)])
        for errors in (measured.candidate_by_position, measured.reference_by_position)
    )
    on_reference, on_excess = found.verdicts
    excess = float((ours / np.maximum(theirs, measured.floor)).max())
    reference_ulp = float(theirs.max() / measured.scale / ulp_of_one(dtype))
    return replace(
        found,
        verdicts=(
            replace(on_reference, value=max(on_reference.value, reference_ulp)),
            replace(on_excess, value=max(on_excess.value, excess)),
        ),
    )


def _reference(case: Case, bench: Bench) -> str:
    """Whose numbers were taken for the reference's."""
    detached = bench.detached(case)
    if detached is None:
        return f"run here, with {bench.reference_attention(case)} attention"
    return f"{detached.where}: {detached.provenance.implementation}"


def _places(case: Case, bench: Bench, found: LogitJudgement) -> tuple[str, ...]:
    places = []
    if found.odd_one_out == "candidate":
        places.append("the oracle sides with the reference: Megatron's logits are wrong")
    elif found.odd_one_out == "reference":
        places.append("the oracle disagrees with the reference: the reference's logits are wrong")
    worst = found.comparison.worst_position
    if worst is not None:
        batch, seq = worst
        position = int(bench.probe(case).position_ids[seq])
        places.append(
            f"largest difference at sequence {batch}, token {seq}, position {position}: "
            f"{found.comparison.max_abs_diff[worst]:.3g}, KL {found.comparison.kl[worst]:.3g} "
            "nats per token"
        )
        ours = found.excess.candidate_by_position
        theirs = found.excess.reference_by_position.max()
        beyond = (ours > 4 * theirs).any(axis=0)
        if beyond.any():
            first = int(beyond.argmax())
            places.append(
                f"first token beyond four times the reference's largest error: {first}, "
                f"position {int(bench.probe(case).position_ids[first])}"
            )
    return tuple(places)


def _details(found: LogitJudgement) -> dict[str, object]:
    comparison, excess = found.comparison, found.excess
    return {
        "candidate_error": excess.candidate_error,
        "reference_error": excess.reference_error,
        "oracle_rms": excess.scale,
        "max_abs_diff": float(comparison.max_abs_diff.max()) if comparison.comparable else None,
        "kl_mean_nats_per_token": comparison.kl_mean,
        "kl_max_nats_per_token": float(comparison.kl.max()) if comparison.comparable else None,
        "top1_agreement": comparison.top1_agreement,
        "top5_agreement": comparison.top5_agreement,
        "ulp_histogram": {f"{edge:g}": n for edge, n in comparison.ulp_histogram.items()},
        "problems": list(comparison.problems),
    }


def _by_position(found: LogitJudgement, positions: list[int]) -> dict[str, object] | None:
    """What the report draws: at each position the worst of the probe's sequences.

    Of a long sequence it is the worst of each stretch, at the stretch's last position.
    """
    comparison, excess = found.comparison, found.excess
    if comparison.problems or excess.problems:
        return None
    stretch = -(-len(positions) // _MAX_POINTS)
    starts = np.arange(0, len(positions), stretch)
    worst = {
        name: extreme.reduceat(extreme.reduce(values, axis=0), starts)
        for name, extreme, values in (
            ("candidate_error", np.maximum, excess.candidate_by_position),
            ("reference_error", np.maximum, excess.reference_by_position),
            ("max_abs_diff", np.maximum, comparison.max_abs_diff),
            ("kl", np.maximum, comparison.kl),
            ("top1", np.minimum, comparison.top1),
            ("top5", np.minimum, comparison.top5),
        )
    }
    # Four digits are more than a figure shows, and a suite keeps thousands of them.
    return {
        "positions": [*positions[stretch - 1 :: stretch], positions[-1]][: len(starts)],
        **{name: [float(f"{one:.4g}") for one in row] for name, row in worst.items()},
    }
