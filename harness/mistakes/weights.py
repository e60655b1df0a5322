"""Other weights for the oracle: rows and columns moved, parts taken for each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from harness.mistakes.setup import Setup
from harness.oracle import Array, Weight


def _part(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def renamed(weight: Weight, names: Mapping[str, str]) -> Weight:
    """Some parts of a name stand for others: both directions must be given."""

    def find(name: str) -> Any:  # noqa: ANN401 - Rows
        stem = name.removesuffix(".weight")
        for old, new in names.items():
            if stem == old or stem.endswith(f".{old}"):
                return weight(stem.removesuffix(old) + new + ".weight")
        return weight(name)

    return find


def _changed(weight: Weight, change: Callable[[str, Array], Array]) -> Weight:
    def find(name: str) -> Any:  # noqa: ANN401 - Rows
        rows = weight(name)
        return change(_part(name), np.asarray(rows[0 : rows.shape[0]], np.float64))

    return find


def rows_in_order(
    weight: Weight, orders: Mapping[str, list[int]], *, within: int | None = None
) -> Weight:
    """Rows of some parts in another order; `within` repeats an order for every so many rows."""

    def change(part: str, matrix: Array) -> Array:
        if part not in orders:
            return matrix
        order = orders[part]
        if within is not None:
            order = [s + i for s in range(0, len(matrix), within) for i in order]
        return matrix[order]

    return _changed(weight, change)


def columns_in_order(weight: Weight, orders: Mapping[str, list[int]]) -> Weight:
    """Columns of some parts in another order."""
    return _changed(
        weight, lambda part, matrix: matrix[:, orders[part]] if part in orders else matrix
    )


def columns_kept(weight: Weight, rank: int, tp: int) -> Weight:
    """Row-parallel matrices with one rank's columns, zeros elsewhere."""

    def change(part: str, matrix: Array) -> Array:
        if part not in ("o_proj", "down_proj"):
            return matrix
        share = matrix.shape[1] // tp
        kept = np.zeros_like(matrix)
        kept[:, rank * share : (rank + 1) * share] = matrix[:, rank * share : (rank + 1) * share]
        return kept

    return _changed(weight, change)


def scaled(weight: Weight, wanted: str, scale: float) -> Weight:
    """One part times a number."""
    return _changed(weight, lambda part, matrix: matrix * scale if part == wanted else matrix)


def transposed(weight: Weight, wanted: str) -> Weight:
    """One part transposed."""
    return _changed(weight, lambda part, matrix: matrix.T if part == wanted else matrix)


def stacked(setup: Setup, groups: int) -> Weight:
    """Read [q; k; v] as if it were grouped."""
    model = setup.model
    size, heads = model.kv_channels, model.num_attention_heads
    prefix = f"model.layers.{setup.layer_idx}.self_attn"
    parts = []
    for name in ("q_proj", "k_proj", "v_proj"):
        rows = setup.weight(f"{prefix}.{name}.weight")
        parts.append(np.asarray(rows[0 : rows.shape[0]], np.float64))
    grouped = np.concatenate(parts).reshape(groups, heads // groups + 2, size, -1)
    width = grouped.shape[-1]
    taken = {
        "q_proj": grouped[:, :-2].reshape(-1, width),
        "k_proj": grouped[:, -2].reshape(-1, width),
        "v_proj": grouped[:, -1].reshape(-1, width),
    }
    return _changed(setup.weight, taken.get)
