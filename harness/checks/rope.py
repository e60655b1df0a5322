"""RoPE: frequencies, the angles of every position, and the vectors that attention rotates.

Frequencies and angles are held to the reference and to a formula bit for bit: one unit in the last
place of a frequency is 0.008 rad at position 131,071. Rotated vectors are rounded by whoever
rotates them, so they have a limit, in ulp.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from harness import live_rope, oracle
from harness.bench import Bench
from harness.compare import Finding, exact
from harness.live_rope import Float32s, Rotations, differences, rotation_error
from harness.metrics import ulp_of_one
from harness.reference import float32_powers
from harness.suite import Case
from harness.thresholds import Verdict

ROTATION: Final = "rope.rotation"
_POWER_ULP: Final = 16
"""How far libraries come apart where their power functions do: an ulp, or two, that the blend
between slowed and kept frequencies makes 15 of, by cancellation."""


def run(case: Case, bench: Bench) -> Finding:
    """Hold every model part to the reference and the formula."""
    model = oracle.read_config(bench.oracle_config(case))
    reference = bench.reference_inv_freq(case)
    problems, frequencies = agreed_frequencies(model, reference)
    probe, request = bench.probe(case, "long"), bench.request(case)
    ranks: list[Rotations] = bench.run(
        case, request.layout, live_rope.rotations, request, frequencies,
        bench.config(case)["max_position_embeddings"], probe.input_ids, probe.position_ids,
    )  # fmt: skip
    problems += [problem for one in ranks for problem in one.problems]
    worst = max(ranks, key=lambda one: one.error_ulp)
    limit = bench.limits(case).get(ROTATION, case.dtype)
    verdicts = {f"Megatron, {worst.where}": limit.verdict(worst.error_ulp)}
    pairs = 0
    if bench.detached_inv_freq(case) is None:  # a file of logits has frequencies, and no cosines
        turned, pairs = _reference_rotation(case, bench, probe.position_ids, frequencies)
        verdicts["the reference's cosines and sines"] = limit.verdict(turned)
    return _finding(
        problems,
        verdicts,
        compared=reference.size + sum(one.compared for one in ranks),
        rotated=pairs + sum(one.rotated for one in ranks),
    )


def agreed_frequencies(
    model: oracle.Architecture, reference: Float32s
) -> tuple[list[str], Float32s]:
    """Hold the reference's frequencies to the formula's.

    Returns:
        What is wrong with them, and the frequencies that models are to be held to: the formula's,
        or the reference's where this machine's float32 power function is not the formula's and
        the two are as near as that explains.
    """
    formula = oracle.inverse_frequencies(model)
    found = differences("the reference's inv_freq", reference, formula, "the formula's")
    if (
        not found
        or reference.shape != formula.shape
        or float32_powers(model.rope.base, model.kv_channels) is None
    ):
        return found, formula
    gap = np.abs(reference.astype(np.float64) - formula)
    if (gap <= _POWER_ULP * np.spacing(formula)).all():  # a NaN is not
        return [], reference
    return found, formula


def _reference_rotation(
    case: Case, bench: Bench, position_ids: np.ndarray[Any, np.dtype[np.int64]],
    frequencies: Float32s,
) -> tuple[float, int]:  # fmt: skip
    """The reference's cosines and sines: what it makes of the vector (1, 0) of each pair.

    Returns:
        The largest error in ulp, and how many pairs there are.
    """
    import torch

    model = bench.hf_model(case)
    with torch.no_grad():
        tables = model.model.rotary_emb(
            torch.ones(1, dtype=model.dtype, device=model.device),
            torch.from_numpy(position_ids)[None].to(model.device),
        )
    cos, sin = (table[0].double().cpu().numpy() for table in tables)
    half = len(frequencies)
    angles = (position_ids.astype(np.float32)[:, None] * frequencies).astype(np.float64)
    units = np.concatenate([np.ones_like(angles), np.zeros_like(angles)], axis=1)[None, None]
    errors = []
    for channels in (slice(None, half), slice(half, None)):
        turned = np.concatenate([cos[:, channels], sin[:, channels]], axis=1)[None, None]
        if turned.shape != units.shape:
            return float("inf"), 0
        errors.append(rotation_error(units, turned, angles, unit=ulp_of_one(case.dtype)))
    return float(np.max(errors)), sum(error.size for error in errors)


def _finding(
    problems: list[str], verdicts: dict[str, Verdict], *, compared: int, rotated: int
) -> Finding:
    """Bits first, then rounding."""
    worst = max(verdicts.values(), key=lambda one: one.value)
    details = {
        "rotation_error_ulp": {name.partition(",")[0]: v.value for name, v in verdicts.items()},
        "limit_ulp": worst.limit,
        "pairs_rotated": rotated,
    }
    failed = [f"{name}: {one.describe()}" for name, one in verdicts.items() if not one.passed]
    if problems or failed or not compared:
        what = "frequencies and angles"
        return exact([*problems, *failed], compared=compared, what=what, details=details)
    return Finding(
        passed=True,
        summary=f"{compared:,} frequencies and angles equal, bit for bit; {worst.describe()}",
        value=worst.value,
        limit=worst.limit,
        unit=worst.unit,
        details=details,
    )
