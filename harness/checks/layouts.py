"""Layout invariance: a pipeline changes no bit, tensor parallelism only the order of sums."""

from __future__ import annotations

import math

import numpy as np

from harness.bench import BASE_LAYOUT, Bench
from harness.compare import Finding, exact, first_difference
from harness.metrics import excess
from harness.suite import Case
from harness.thresholds import EXCESS


def run(case: Case, bench: Bench) -> Finding:
    """Compare the case's layout with the same TP in one stage, or with a single rank."""
    layout = bench.layout(case)
    if layout.pipeline_model_parallel_size > 1:
        return _stages(case, bench)
    return _sums(case, bench)


def _stages(case: Case, bench: Bench) -> Finding:
    layout = bench.layout(case)
    base = f"tp{layout.tensor_model_parallel_size}-pp1"
    ours, theirs = bench.megatron_logits(case), bench.megatron_logits(case, layout=base)
    problems = []
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        problems.append(f"{ours.shape} {ours.dtype}, at {base} {theirs.shape} {theirs.dtype}")
    else:
        found = first_difference(ours.view(np.uint32), theirs.view(np.uint32))
        if found is not None:
            index, count = found
            problems.append(
                f"logits{list(index)}: {count} of {ours.size} differ from {base}, this one first"
            )
    return exact(problems, compared=ours.size, what=f"logits, bit for bit those of {base}")


def _sums(case: Case, bench: Bench) -> Finding:
    """Two sums in different order are each within the limit of the truth, so together twice it."""
    threshold = bench.limits(case).get(EXCESS, case.dtype)
    limit = 2 * threshold.limit
    reference = bench.reference_logits(case)
    ours, theirs = bench.megatron_logits(case), bench.megatron_logits(case, layout=BASE_LAYOUT)
    measured = excess(ours, reference, bench.oracle_logits(case), threshold.floor)
    if measured.problems or ours.shape != theirs.shape:
        problems = measured.problems or (f"shapes {ours.shape} and {theirs.shape}",)
        return Finding(passed=False, summary=f"not compared: {problems[0]}", places=problems)
    gap = ours.astype(np.float64) - theirs
    value = math.sqrt(float(np.mean(gap * gap))) / max(measured.reference_error, measured.floor)
    passed = math.isfinite(value) and value <= limit
    worst = np.unravel_index(int(np.abs(gap).argmax()), gap.shape)
    where = f"logits{[int(i) for i in worst]}: {ours[worst]:.9g}, at {BASE_LAYOUT} "
    return Finding(
        passed=passed,
        summary=f"rms difference from {BASE_LAYOUT} {value:.3g} "
        f"{'<=' if passed else 'is not within'} {limit:g} times the reference's own error",
        value=value,
        limit=limit,
        unit="times the reference's own error",
        places=() if passed else (where + f"{theirs[worst]:.9g}",),
    )
