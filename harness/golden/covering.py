"""Pairwise covering sets: few rows in which any two values that go together meet.

Most mistakes need one value, or two together: a no-op first block *and* tied embeddings. All
combinations of a dozen traits are millions; all pairs fit into some thirty rows.

Rows are built one by one, greedily and without chance, so the same factors give the same rows on
every machine and in every year.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Row = dict[str, str]
Choice = tuple[str, str]
Pair = frozenset[Choice]


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """Traits, their values, and which values do not go together.

    Args:
        values: Of each factor, in order.
        conflicts: Per line two factors with values, no one of the first going with one of the
            second.
    """

    values: Mapping[str, Sequence[str]]
    conflicts: Sequence[tuple[str, Sequence[str], str, Sequence[str]]]

    def __post_init__(self) -> None:
        """Refuse conflicts over values that no factor has: they would exclude nothing."""
        for first, ones, second, others in self.conflicts:
            for name, values in ((first, ones), (second, others)):
                unknown = set(values) - set(self.values.get(name, ()))
                if unknown:
                    raise ValueError(f"no factor {name} with {', '.join(sorted(unknown))}")

    def forbidden(self) -> frozenset[Pair]:
        """Pairs that no row may hold."""
        return frozenset(
            frozenset({(first, one), (second, other)})
            for first, ones, second, others in self.conflicts
            for one, other in itertools.product(ones, others)
        )

    def pairs(self) -> list[Pair]:
        """Pairs that some row must hold, in the order of the factors."""
        forbidden = self.forbidden()
        return [
            frozenset({(a, x), (b, y)})
            for a, b in itertools.combinations(self.values, 2)
            for x, y in itertools.product(self.values[a], self.values[b])
            if frozenset({(a, x), (b, y)}) not in forbidden
        ]


def pairs_of(row: Mapping[str, str]) -> Iterator[Pair]:
    """The pairs that a row holds."""
    return (frozenset(pair) for pair in itertools.combinations(row.items(), 2))


def covering_rows(factors: Factors) -> list[Row]:
    """Rows that hold every allowed pair and no forbidden one.

    Raises:
        ValueError: a pair is allowed, yet no whole row can hold it: a conflict is missing.
    """
    forbidden, missing = factors.forbidden(), dict.fromkeys(factors.pairs())
    rows: list[Row] = []
    while missing:
        row = _complete(dict(next(iter(missing))), factors, forbidden, missing)
        if row is None:
            raise ValueError(f"no row can hold {sorted(next(iter(missing)))}")
        rows.append(row)
        for pair in pairs_of(row):
            missing.pop(pair, None)
    return rows


def _complete(
    row: Row, factors: Factors, forbidden: frozenset[Pair], missing: Mapping[Pair, None]
) -> Row | None:
    """The row with its open factors set, the most missing pairs first; None where none fits."""
    open_names = [name for name in factors.values if name not in row]
    if not open_names:
        return {name: row[name] for name in factors.values}
    left = {name: _fitting(name, row, factors, forbidden) for name in open_names}
    if not all(left.values()):
        return None

    def gain(choice: Choice) -> tuple[int, int]:
        met = sum(frozenset({choice, other}) in missing for other in row.items())
        # Among equals the choice with the most work left: it shall not be left over for the end.
        return met, sum(choice in pair for pair in missing)

    # What is the only one left comes first, then what meets most: all else follows from it.
    name = max(
        open_names,
        key=lambda one: (len(left[one]) == 1, *max(gain((one, value)) for value in left[one])),
    )
    for value in sorted(left[name], key=lambda one: gain((name, one)), reverse=True):
        found = _complete({**row, name: value}, factors, forbidden, missing)
        if found is not None:
            return found
    return None


def _fitting(name: str, row: Row, factors: Factors, forbidden: frozenset[Pair]) -> list[str]:
    return [
        value
        for value in factors.values[name]
        if all(frozenset({(name, value), other}) not in forbidden for other in row.items())
    ]
