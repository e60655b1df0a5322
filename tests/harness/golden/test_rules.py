"""A golden catches a change of any single conversion rule, and of the streams below them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from unittest import mock

import pytest

from bridge import parameters
from bridge.parameters import Order, Row
from bridge.spec import GroupedQueryAttention, ModelSpec, SwiGLU
from harness.bench import Bench
from harness.checks import golden
from harness.compare import Finding
from harness.golden.cases import PREFIX, golden_model
from harness.hooks import Fault
from harness.suite import Case

RICH: Final = "puzzletron-11"
"""Grouped and linear attention, wide and linear feed-forward, and TP=2 can cut it; tied."""
UNTIED: Final = "released-02"
"""Has the output layer that `RICH` has not; its vocabulary is padded."""
TABLES: Final = ("ATTENTION_ROWS", "FFN_ROWS")
SINGLE: Final = ("EMBEDDING_ROW", "FINAL_NORM_ROW", "OUTPUT_ROW")


@dataclass(frozen=True)
class Mutant:
    """One row of one table, changed in one way."""

    table: str
    kind: type | None
    index: int
    row: Row
    what: str

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """The bridge with it."""
        changed: Any = self.row
        if self.kind is not None:
            table: Mapping[type, tuple[Row, ...]] = getattr(parameters, self.table)
            rows = list(table[self.kind])
            rows[self.index] = self.row
            changed = {**table, self.kind: tuple(rows)}
        parameters._parameters.cache_clear()
        with mock.patch.object(parameters, self.table, changed):
            try:
                yield
            finally:
                parameters._parameters.cache_clear()


def every_row() -> Iterator[tuple[str, type | None, int, Row]]:
    """All rows of the tables, as they are."""
    for table in TABLES:
        for kind, rows in getattr(parameters, table).items():
            for index, row in enumerate(rows):
                yield table, kind, index, row
    for table in SINGLE:
        yield table, None, 0, getattr(parameters, table)


def changes_of(row: Row) -> Iterator[tuple[str, Row]]:
    """Every other value of each of a row's rules."""
    for order in itertools.permutations(row.sources):
        if order != row.sources:
            names = ", ".join(source.name for source in order)
            yield f"sources {names}", replace(row, sources=order)
    axes = (None, 0) if len(row.sources[0].dims) == 1 else (None, 0, 1)
    for axis in axes:
        if axis != row.tp_axis:
            yield f"tp_axis {axis}", replace(row, tp_axis=axis)
    if len(row.sources) > 1:
        other = Order.STACKED if row.order is Order.GROUPED else Order.GROUPED
        yield f"order {other.name}", replace(row, order=other)
    if row.pad_rows_to is not None:
        yield "no padding", replace(row, pad_rows_to=None)
    yield "name", replace(row, name=row.name.replace(".weight", ".weights") + "_")


MUTANTS: Final = [
    Mutant(table, kind, index, changed, what)
    for table, kind, index, row in every_row()
    for what, changed in changes_of(row)
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One for all mutants: what they leave alone is made once."""
    with Bench(tmp_path_factory.mktemp("rules")) as found:
        yield found


def finding(name: str, bench: Bench, fault: Fault | None = None) -> Finding:
    """The check on one golden model, with a fault if one is given."""
    case = Case(check="golden", model=f"{PREFIX}{name}", dtype=golden_model(name).dtype)
    return golden.run(case, bench if fault is None else bench.under(fault))


@pytest.mark.parametrize("name", [RICH, UNTIED])
def test_the_bridge_as_it_is_holds(name: str, bench: Bench) -> None:
    """Or no failure below would mean anything."""
    found = finding(name, bench)
    assert found.passed, found.places
    assert found.summary.endswith("recorded values, 0 differences (limit 0)")


def test_every_row_of_the_tables_is_changed() -> None:
    """Thirteen parameters, and each of their rules at least once."""
    assert len(list(every_row())) == 13
    assert {mutant.row.name.rstrip("_") for mutant in MUTANTS} >= {
        row.name for *_, row in every_row()
    }
    assert len(MUTANTS) >= 40


@pytest.mark.parametrize(
    "mutant", MUTANTS, ids=lambda one: f"{one.row.name.rstrip('_')}: {one.what}"
)
def test_a_changed_rule_is_caught(mutant: Mutant, bench: Bench) -> None:
    """By one model of the set; the others only add to it."""
    name = UNTIED if mutant.table == "OUTPUT_ROW" else RICH
    found = finding(name, bench, Fault(name="mutant", code=mutant))
    assert not found.passed
    assert found.places


@contextlib.contextmanager
def _patched(target: str, change: Callable[[Any], Any]) -> Iterator[None]:
    module, _, name = target.rpartition(".")
    owner = __import__(module, fromlist=[name])
    with mock.patch.object(owner, name, change(getattr(owner, name))):
        yield


def _scaled(field: str, factor: float) -> Callable[[Any], Any]:
    """A RoPE reader that gets one value wrong."""

    def change(read: Any) -> Any:  # noqa: ANN401 - bridge.hf_rope.read_rope
        def wrong(*args: Any) -> Any:  # noqa: ANN401 - as above
            rope = read(*args)
            if field == "rotary_base":
                return replace(rope, rotary_base=rope.rotary_base * factor)
            if rope.scaling is None:
                return rope
            value = type(getattr(rope.scaling, field))(getattr(rope.scaling, field) * factor)
            return replace(rope, scaling=replace(rope.scaling, **{field: value}))

        return wrong

    return change


@pytest.mark.parametrize(
    "field",
    [
        "rotary_base", "factor", "low_freq_factor", "high_freq_factor",
        "original_max_position_embeddings",
    ],
)  # fmt: skip
def test_a_changed_rope_value_is_caught(field: str, tmp_path: Path) -> None:
    """Each of the five values, a model with llama3 scaling being needed for four of them."""
    fault = Fault(
        name=field,
        code=lambda: _patched("bridge.hf_config.read_rope", _scaled(field, 1.25)),
    )
    with Bench(tmp_path, fault=fault) as faulty:
        assert not finding(UNTIED, faulty).passed


def test_changed_rotary_frequencies_are_caught(bench: Bench) -> None:
    """The formula itself, one part in 100,000."""
    fault = Fault(
        name="frequencies",
        code=lambda: _patched(
            "bridge.rotary.inv_freq", lambda real: lambda *args: real(*args) * 1.00001
        ),
    )
    found = finding(RICH, bench, fault)
    assert [place for place in found.places if "inv_freq[0]" in place]


def _other_epsilon(spec: ModelSpec) -> ModelSpec:
    return replace(spec, layernorm_epsilon=spec.layernorm_epsilon * 2)


def _other_width(spec: ModelSpec) -> ModelSpec:
    blocks = tuple(
        replace(block, ffn=SwiGLU(ffn_hidden_size=block.ffn.ffn_hidden_size + 8))
        if isinstance(block.ffn, SwiGLU)
        else block
        for block in spec.blocks
    )
    return replace(spec, blocks=blocks)


def _other_groups(spec: ModelSpec) -> ModelSpec:
    blocks = tuple(
        replace(block, attention=GroupedQueryAttention(num_query_groups=2))
        if isinstance(block.attention, GroupedQueryAttention)
        else block
        for block in spec.blocks
    )
    return replace(spec, blocks=blocks)


@pytest.mark.parametrize("change", [_other_epsilon, _other_width, _other_groups])
def test_another_reading_of_the_configuration_is_caught(
    change: Callable[[ModelSpec], ModelSpec], bench: Bench
) -> None:
    """Norm epsilon, widths, query groups."""
    assert not finding(RICH, bench, Fault(name="spec", spec=change)).passed


def test_a_changed_width_rule_is_caught(tmp_path: Path) -> None:
    """`ffn_mult` rounded up to multiples of 128 in place of 256."""

    def change(_: object) -> Callable[[float, int], int]:
        def width(ffn_mult: float, hidden_size: int) -> int:
            return -(-int(2 * round(ffn_mult, 6) * hidden_size / 3) // 128) * 128

        return width

    fault = Fault(name="width", code=lambda: _patched("bridge.hf_blocks.ffn_mult_to_width", change))
    with Bench(tmp_path, fault=fault) as faulty:
        assert not finding(UNTIED, faulty).passed


def test_a_changed_oracle_is_caught(bench: Bench) -> None:
    """The truth is on record too: nothing else holds the oracle to itself over the years."""
    fault = Fault(name="oracle", oracle=lambda config: config | {"rms_norm_eps": 2e-6})
    found = finding(RICH, bench, fault)
    assert found.places
    assert all("logits" in place for place in found.places)


def test_a_changed_stream_is_caught(tmp_path: Path) -> None:
    """Weights and input ids hang on it."""

    def change(real: Callable[[int, str], int]) -> Callable[[int, str], int]:
        return lambda seed, name: real(seed, name) ^ 1

    with _patched("bridge.storage.philox.stream_key", change), Bench(tmp_path) as other:
        found = finding(UNTIED, other)
    assert [place for place in found.places if "hf_tensors" in place]
    assert [place for place in found.places if "probe" in place]
