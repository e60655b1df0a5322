"""Where and why a streamed model goes wrong: the block, its part, the tiles, the likely mistake."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from harness import oracle
from harness.live_blocks import EMBEDDING
from harness.localize import Localisation, answer, remembered
from harness.metrics import ulp_of_one
from harness.mistakes import Setup, suspects
from harness.probes import Probe
from harness.streaming.megatron import SegmentTilings
from harness.streaming.record import PartError, worst_part
from harness.streaming.segments import Segment
from harness.streaming.walk import Outcome
from harness.thresholds import Thresholds, judge_logits

Array = np.ndarray[Any, np.dtype[Any]]
_MAX_TILES: Final = 8
_MAX_PARAMETERS: Final = 1 << 28
"""Of a block on which typical mistakes are tried, each of which computes it again."""


def localise(
    found: Outcome,
    *,
    probe: Probe,
    model: oracle.Architecture,
    weight: oracle.Weight,
    mapping: SegmentTilings,
    segments: Sequence[Segment],
    dtype: str,
    thresholds: Thresholds,
) -> Localisation:
    """Look at the first block that fails by itself, then at the head."""
    judged = found.record.judgements[probe.name]
    for one in judged:
        reference, forced, _ = (verdict.passed for verdict in one.verdicts)
        if reference and forced:
            continue
        places = [f"{one.name} ({one.kind}): the first to compute wrong from a right input"]
        if not reference:
            places = [f"{one.name} ({one.kind}): the reference is wrong"]
        part = worst_part(found.record.parts[probe.name].get(one.layer_idx, []), ulp_of_one(dtype))
        segment = segments[0] if one.layer_idx == EMBEDDING else None
        if part is not None:
            places.append(_describe(part))
            segment = segments[part.segment_idx]
        if segment is not None:
            places += _tiles(mapping, segment)
        side = "megatron" if reference else "reference"
        held = found.suspects.get(probe.name)
        small = segment is not None and _size(segments, one.layer_idx) <= _MAX_PARAMETERS
        if not forced and small and held is not None and held.layer_idx == one.layer_idx:
            setup = _setup(model, weight, one.layer_idx, held.given, probe)
            return answer(
                side, places, one.layer_idx, suspects(setup, held.made.astype(np.float64))
            )
        return Localisation(side=side, places=tuple(places), block=one.layer_idx)
    return _head(
        found, probe=probe, model=model, mapping=mapping, segments=segments, dtype=dtype,
        thresholds=thresholds,
    )  # fmt: skip


def _head(
    found: Outcome,
    *,
    probe: Probe,
    model: oracle.Architecture,
    mapping: SegmentTilings,
    segments: Sequence[Segment],
    dtype: str,
    thresholds: Thresholds,
) -> Localisation:
    if probe.name not in found.logits:
        return Localisation(places=("every block computes right from a right input",))
    logits = found.logits[probe.name]
    judged = judge_logits(
        logits.ours_forced, logits.reference, logits.truth_forced,
        dtype=dtype, thresholds=thresholds,
    )  # fmt: skip
    if judged.passed:
        return Localisation(places=("every block computes right from a right input",))
    places = ["the final norm and the output layer compute wrong from a right input"]
    heads = [segment for segment in segments if segment.part == "head"]
    for segment in heads:
        columns = slice(segment.start, segment.stop)
        wrong = judge_logits(
            logits.ours_forced[..., columns],
            logits.reference[..., columns],
            logits.truth_forced[..., columns],
            dtype=dtype,
            thresholds=thresholds,
        )
        if not wrong.passed:
            places += [str(segment), *_tiles(mapping, segment)]
            break
    return Localisation(side="megatron", places=tuple(places), block=len(model.blocks))


def _size(segments: Sequence[Segment], layer_idx: int) -> int:
    return sum(one.num_parameters for one in segments if one.layer_idx == layer_idx)


def _describe(part: PartError) -> str:
    return (
        f"{part.name} ({part.kind}): what it adds is {part.candidate:.3g} of its size from the "
        f"truth, the reference's {part.reference:.3g}"
    )


def _tiles(mapping: SegmentTilings, segment: Segment) -> list[str]:
    """The tiles that a segment of Megatron was filled from, in the words of the plan."""
    lines = [
        f"{name}{tile.target_box} <- {tile.source or 'zeros'}{tile.source_box}"
        for name in mapping.names(segment)
        for tile in mapping.whole_tiles(name, segment)
    ]
    if len(lines) > _MAX_TILES:
        lines = [*lines[:_MAX_TILES], f"and {len(lines) - _MAX_TILES} more tiles"]
    return lines


def _setup(
    model: oracle.Architecture, weight: oracle.Weight, layer_idx: int, given: Array, probe: Probe
) -> Setup:
    return Setup(
        model=model,
        weight=remembered(weight),
        layer_idx=layer_idx,
        hidden=given.astype(np.float64),
        input_ids=probe.input_ids,
        position_ids=probe.position_ids,
        tp=1,
    )
