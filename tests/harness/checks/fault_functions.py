"""Deliberate mistakes, importable by name so that rank processes can make them too."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

from bridge import parameters
from bridge.parameters import ATTENTION_ROWS, FFN_ROWS, Order, Row
from bridge.spec import GroupedQueryAttention, ModelSpec, SwiGLU
from bridge.tiling import Box
from harness.hooks import Fault
from harness.ranks import RankContext


@contextlib.contextmanager
def _rows(
    table: Mapping[Any, tuple[Row, ...]], kind: type, name: str, **changes: object
) -> Iterator[None]:
    """Another row in the table, and nothing remembered of the old one."""
    changed = tuple(
        dataclasses.replace(row, **cast("dict[str, Any]", changes)) if row.name == name else row
        for row in table[kind]
    )
    assert changed != table[kind]
    parameters._parameters.cache_clear()
    with mock.patch.dict(cast("dict[Any, Any]", table), {kind: changed}):
        yield
    parameters._parameters.cache_clear()


def gate_and_up_swapped() -> contextlib.AbstractContextManager[None]:
    """Up before gate."""
    name = "mlp.linear_fc1.weight"
    sources = next(row.sources for row in FFN_ROWS[SwiGLU] if row.name == name)
    return _rows(FFN_ROWS, SwiGLU, name, sources=sources[::-1])


def qkv_one_after_the_other() -> contextlib.AbstractContextManager[None]:
    """All queries, then all keys, then all values: the same shape, and it round-trips."""
    name = "self_attention.linear_qkv.weight"
    return _rows(ATTENTION_ROWS, GroupedQueryAttention, name, order=Order.STACKED)


@contextlib.contextmanager
def first_two_keys_swapped() -> Iterator[None]:
    """Query groups 0 and 1 get each other's key head."""
    healthy = parameters._by_group

    def by_group(
        wholes: Sequence[tuple[str, Box]], groups: int
    ) -> Iterator[tuple[str | None, Box]]:
        parts = list(healthy(wholes, groups))
        if groups > 1:  # three sources a group: parts 1 and 4 are its first two keys
            parts[1], parts[4] = parts[4], parts[1]
        return iter(parts)

    parameters._parameters.cache_clear()
    with mock.patch.object(parameters, "_by_group", by_group):
        yield
    parameters._parameters.cache_clear()


def rope_factor_8(spec: ModelSpec) -> ModelSpec:
    """Super v1's factor for v1.5."""
    assert spec.rope.scaling is not None
    assert spec.rope.scaling.factor == 16
    scaling = dataclasses.replace(spec.rope.scaling, factor=8.0)
    return dataclasses.replace(spec, rope=dataclasses.replace(spec.rope, scaling=scaling))


def epsilon_1e_6(spec: ModelSpec) -> ModelSpec:
    """A norm epsilon of 1e-6 for 1e-5."""
    assert spec.layernorm_epsilon == 1e-5
    return dataclasses.replace(spec, layernorm_epsilon=1e-6)


def flip_one_bit(checkpoint: Path) -> None:
    """The lowest bit of a byte in the middle of the largest weight file."""
    path = max(checkpoint.glob("iter_*/*.distcp"), key=lambda one: one.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def scale_final_norm(model: Any) -> None:  # noqa: ANN401 - transformers is not typed
    """A wrong reference."""
    model.model.norm.weight.data *= 1.001


@contextlib.contextmanager
def half_a_weight(context: RankContext) -> Iterator[None]:
    """TP rank 1 computes with other weights than it was given."""
    import torch

    from bridge import model

    healthy = model.load_hf

    def load(parts: Any, *args: Any) -> None:  # noqa: ANN401 - the function's own
        healthy(parts, *args)
        if context.rank == 1:
            with torch.no_grad():
                next(p for n, p in parts[0].named_parameters() if "linear_fc2" in n).mul_(0.5)

    with mock.patch.object(model, "load_hf", load):
        yield


GATE_UP = Fault(name="gate_up", code=gate_and_up_swapped)
QKV = Fault(name="qkv", code=qkv_one_after_the_other)
KEY = Fault(name="key", code=first_two_keys_swapped)
ROPE = Fault(name="rope", spec=rope_factor_8)
EPSILON = Fault(name="epsilon", spec=epsilon_1e_6)
BIT = Fault(name="bit", checkpoint=flip_one_bit)
REFERENCE = Fault(name="reference", reference=scale_final_norm)
RANK = Fault(name="rank", rank=half_a_weight)
