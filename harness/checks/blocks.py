"""Block parity: every block as close to the truth as the reference's, forced and running free."""

from __future__ import annotations

from harness.bench import Bench
from harness.block_states import BlockJudgement, rows_of, worst_token
from harness.compare import Finding
from harness.localize import localisation
from harness.suite import Case


def run(case: Case, bench: Bench) -> Finding:
    """Judge the embedding and every block of Megatron on the case's probe."""
    found = bench.block_judgements(case)
    largest = max(found, key=lambda one: one.forced.value)
    limit = largest.verdicts[1].limit
    details = {"blocks": rows_of(found)}
    first = first_failure(found)
    if first is None:
        free = max(found, key=lambda one: one.free.value)
        return Finding(
            passed=True,
            summary=f"{len(found) - 1} blocks, {largest.verdicts[1].describe()} "
            f"({largest.name}); running free {free.free.value:.3g} <= {free.verdicts[2].limit:g}",
            value=largest.forced.value,
            limit=limit,
            unit=largest.verdicts[1].unit,
            details=details,
        )
    verdict = next(one for one in first.verdicts if not one.passed)
    where = localisation(case, bench)
    return Finding(
        passed=False,
        summary=f"{first.name} ({first.kind}): {verdict.describe()}",
        value=verdict.value,
        limit=verdict.limit,
        unit=verdict.unit,
        places=(*_places(case, bench, first), *where.places),
        details={**details, "localisation": where.to_dict()},
    )


def first_failure(found: list[BlockJudgement]) -> BlockJudgement | None:
    """The first block over a limit of its own; failing that, the first that ran free over one."""
    own = [one for one in found if not all(verdict.passed for verdict in one.verdicts[:2])]
    free = [one for one in found if not one.verdicts[2].passed]
    return next(iter([*own, *free]), None)


def _places(case: Case, bench: Bench, first: BlockJudgement) -> tuple[str, ...]:
    reference, forced, free = first.verdicts
    if not reference.passed:
        places = [f"{first.name}, {first.kind}: the reference is wrong, {reference.describe()}"]
    elif not forced.passed:
        places = [f"{first.name}, {first.kind}: wrong given the right input, {forced.describe()}"]
    else:
        places = [
            f"{first.name}, {first.kind}: right given the right input, and yet {free.describe()}"
        ]
    if first.tp_rank is not None:
        places.append(f"TP ranks that should hold one state differ; farthest off: {first.tp_rank}")
    token = worst_token(first.forced if not forced.passed else first.free)
    if token is not None:
        position = int(bench.probe(case).position_ids[token[1]])
        places.append(
            f"largest error there at sequence {token[0]}, token {token[1]}, position {position}"
        )
    return tuple(places)
