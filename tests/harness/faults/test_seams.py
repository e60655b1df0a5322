"""Seams change what they name, and leave nothing behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bridge import parameters
from bridge.hf_config import spec_from_hf_config
from bridge.plan import Plan
from bridge.tiling import Box, Tile, Tiling
from harness.faults import CATALOGUE, applicable
from harness.faults.seams import permute_columns, permute_rows
from harness.toys import TOYS

WHOLE = Tiling((4, 6), (Tile("w", Box.whole((4, 6)), Box.whole((4, 6))),))


def apply(tiling: Tiling) -> np.ndarray[Any, np.dtype[np.int64]]:
    """What the tiling makes of a tensor of row numbers times ten plus column numbers."""
    source = 10 * np.arange(4)[:, None] + np.arange(6)
    out = np.empty(tiling.shape, np.int64)
    for tile in tiling.tiles:
        out[tile.target_box.slices] = source[tile.source_box.slices]
    return out


def test_permuting_rows_and_columns_is_indexing() -> None:
    """As numpy has it; runs of neighbours are one tile."""
    assert apply(permute_rows(WHOLE, [2, 3, 0, 1])).tolist() == apply(WHOLE)[[2, 3, 0, 1]].tolist()
    order = [5, 0, 1, 2, 4, 3]
    assert apply(permute_columns(WHOLE, order)).tolist() == apply(WHOLE)[:, order].tolist()
    assert len(permute_rows(WHOLE, [2, 3, 0, 1]).tiles) == 2


_FAMILIES = {"mapping", "layout"}
CODE = [
    name
    for name, fault in CATALOGUE.items()
    if fault.family in {"mapping", "layout"} and fault.code
]


@pytest.mark.parametrize("name", CODE)
def test_a_mapping_fault_changes_the_plan_or_the_shards_and_nothing_afterwards(name: str) -> None:
    """Inside the context another plan, other shards or a refusal; outside the healthy plan."""
    fault = CATALOGUE[name]
    toy = next(t for t in TOYS.values() if applicable(fault, spec_from_hf_config(t.config)))
    spec = spec_from_hf_config(toy.config)

    def seen() -> tuple[str, list[Tiling]]:
        plan = Plan(spec, spec.padded_vocab_size(1))
        return plan.digest(), [one.shard(1, 2) for one in plan.parameters.values()]

    healthy = seen()
    with fault.changed_code():
        changed = seen()
    assert changed != healthy
    assert seen() == healthy
    assert parameters._parameters.cache_info().currsize <= 16
