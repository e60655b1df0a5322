"""Comparing with a record: nothing passes for equal that is not."""

from __future__ import annotations

import math
from typing import Any

import pytest

from harness.golden.compare import count_values, differences


@pytest.mark.parametrize(
    ("recorded", "observed", "said"),
    [
        ({"plan": ["a", "b"]}, {"plan": ["a", "c"]}, "plan[1]: c, on record is b"),
        ({"plan": ["a"]}, {"plan": ["a", "b"]}, "plan: 2 entries, 1 are on record"),
        ({"spec": {"n": 1}}, {"spec": {"n": 1.0}}, "spec: n: 1.0, on record is 1"),
        ({"spec": {"n": 1}}, {"spec": {"n": True}}, "spec: n: True, on record is 1"),
        ({"spec": {"n": 1}}, {"spec": {}}, "spec: n is on record, and not there any more"),
        ({"spec": {}}, {"spec": {"n": 1}}, "spec: n is new: 1"),
        ({"spec": {}}, {}, "spec: on record, yet nothing makes it any more"),
        ({}, {"spec": {}}, "spec: nothing is on record"),
        ({"logits": [[1.0, 2.0]]}, {"logits": [[1.0, 2.001]]}, "logits[0][1]: 2.001, on record"),
        ({"logits": [[1.0, 2.0]]}, {"logits": [[1.0], [2.0]]}, "or another shape"),
        ({"logits": []}, {"logits": []}, "logits: no numbers are on record"),
        ({"inv_freq": [1e-6]}, {"inv_freq": [1.00001e-6]}, "inv_freq[0]"),
    ],
)
def test_a_difference_is_named(
    recorded: dict[str, Any], observed: dict[str, Any], said: str
) -> None:
    """Field, place, both values."""
    found = differences(recorded, observed)
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize("where", ["recorded", "observed", "both"])
def test_nan_is_never_equal(where: str) -> None:
    """Not even to the same NaN on record."""
    fine, broken = {"logits": [[1.0, 2.0]]}, {"logits": [[1.0, math.nan]]}
    recorded = broken if where != "observed" else fine
    observed = broken if where != "recorded" else fine
    assert differences(recorded, observed)


def test_rounding_of_another_machine_is_no_difference() -> None:
    """The tenth digit of a logit, the last bit of a float32 frequency."""
    assert not differences(
        {"logits": [[1.0, 1e-12]], "inv_freq": [0.5]},
        {"logits": [[1.0 + 1e-9, 2e-12]], "inv_freq": [0.5 + 2**-25]},
    )


def test_many_differences_of_a_field_are_counted_and_the_first_shown() -> None:
    """A changed rule moves everything; the first places tell which rule."""
    found = differences({"plan": list("abcdefgh")}, {"plan": list("ABCDEFGH")})
    assert len(found) == 5
    assert found[0].startswith("plan[0]: A")
    assert found[-1] == "plan: 4 more differences"


def test_values_are_counted_through_lists_and_objects() -> None:
    """Six of them."""
    assert count_values({"a": [1, 2, [3]], "b": {"c": None, "d": "x"}, "e": []} | {"f": 0}) == 6
