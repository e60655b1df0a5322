"""Covering sets: every pair that goes together, and none that does not."""

from __future__ import annotations

import itertools

import pytest

from harness.golden.cases import FACTORS
from harness.golden.covering import Factors, Row, covering_rows

Quad = tuple[str, str, str, str]


def pairs_by_hand(factors: Factors) -> tuple[set[Quad], set[Quad]]:
    """The wanted and the forbidden pairs, as (factor, value, other factor, other value)."""
    names = list(factors.values)
    forbidden: set[Quad] = set()
    for first, ones, second, others in factors.conflicts:
        for one, other in itertools.product(ones, others):
            forbidden |= {(first, one, second, other), (second, other, first, one)}
    every = {
        (a, x, b, y)
        for a in names
        for b in names
        if names.index(a) < names.index(b)
        for x in factors.values[a]
        for y in factors.values[b]
    }
    return every - forbidden, forbidden


def held_by(rows: list[Row]) -> set[Quad]:
    """Every pair of every row."""
    return {(a, row[a], b, row[b]) for row in rows for a in row for b in row if a != b}


def test_the_covering_set_holds_every_pair_of_traits_that_go_together() -> None:
    """Each two values meet in at least one model, and there are at least 24 models."""
    rows = covering_rows(FACTORS)
    wanted, forbidden = pairs_by_hand(FACTORS)
    assert not wanted - held_by(rows)
    assert not forbidden & held_by(rows)
    assert len(rows) >= 24


def test_few_rows_do() -> None:
    """Ten factors of three values are 59,049 combinations; their pairs fit into a couple dozen."""
    factors = Factors(values={f"f{n}": ("a", "b", "c") for n in range(10)}, conflicts=())
    rows = covering_rows(factors)
    wanted, _ = pairs_by_hand(factors)
    assert not wanted - held_by(rows)
    assert 9 <= len(rows) <= 27


def test_an_allowed_pair_that_no_row_can_hold_is_refused() -> None:
    """Quietly leaving it out would make the set cover less than it says."""
    factors = Factors(
        values={"a": ("1", "2"), "b": ("1", "2"), "c": ("1", "2")},
        conflicts=(("a", ("1",), "c", ("1",)), ("b", ("1",), "c", ("2",))),
    )
    with pytest.raises(ValueError, match="no row can hold"):
        covering_rows(factors)


def test_a_conflict_over_an_unknown_value_is_refused() -> None:
    """A misspelt conflict would exclude nothing."""
    with pytest.raises(ValueError, match="no factor a with 3"):
        Factors(values={"a": ("1",), "b": ("1",)}, conflicts=(("a", ("3",), "b", ("1",)),))
