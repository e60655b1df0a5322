"""RoPE: the frequencies and angles of every live model part, against HF's and a formula's."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness import live, oracle
from harness.bench import Bench
from harness.compare import Finding, exact
from harness.suite import Case

Float32s = np.ndarray[Any, np.dtype[np.float32]]


def run(case: Case, bench: Bench) -> Finding:
    """Hold `inv_freq` and the angles at far positions to both, bit for bit."""
    model = oracle.read_config(bench.config(case))
    formula = oracle.inverse_frequencies(model)
    reference = bench.reference(case).inv_freq
    positions = bench.probe(case, "long").position_ids
    angles = oracle.rotary_angles(model, positions).astype(np.float32)
    request = bench.request(case)
    ranks = bench.run(case, request.layout, live.rope_tables, request, positions)
    problems = _differences("the reference's inv_freq", reference, formula, "the formula's")
    compared = reference.size
    for rank, parts in enumerate(ranks):
        for vp_stage, tables in enumerate(parts):
            where = f"rank {rank} part {vp_stage}"
            found = tables["inv_freq"]
            compared += found.size + tables["angles"].size
            problems += _differences(f"{where} inv_freq", found, reference, "the reference's")
            problems += _differences(f"{where} inv_freq", found, formula, "the formula's")
            problems += _differences(
                f"{where} angle [position, channel]", tables["angles"], angles, "the formula's",
                rows=positions,
            )  # fmt: skip
    return exact(problems, compared=compared, what="frequencies and angles")


def _differences(
    name: str,
    ours: Float32s,
    theirs: Float32s,
    whose: str,
    *,
    rows: np.ndarray[Any, np.dtype[np.int64]] | None = None,
) -> list[str]:
    """One line for two tables that differ in any bit, the largest difference first."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return [f"{name}: {ours.shape} {ours.dtype}, {whose} {theirs.shape} {theirs.dtype}"]
    different = ours.view(np.uint32) != theirs.view(np.uint32)
    if not different.any():
        return []
    gap = np.abs(ours.astype(np.float64) - theirs)
    index = np.unravel_index(int(np.where(different, gap, -1).argmax()), ours.shape)
    at: list[int] = [int(i) for i in index]
    if rows is not None:
        at[0] = int(rows[at[0]])
    values = f"{ours[index]:.9g}, {whose} {theirs[index]:.9g}"
    return [f"{name}{at}: {values}; {int(different.sum())} of {ours.size} differ"]
