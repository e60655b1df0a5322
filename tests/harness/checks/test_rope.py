"""The RoPE check compares bits: one unit in the last place is 0.008 rad at the far end."""

from __future__ import annotations

import numpy as np

from harness.checks.rope import _differences

TABLE = np.array([1.0, 0.5, 2.0**-20], np.float32)


def test_one_ulp_in_one_frequency_is_a_difference_with_its_place() -> None:
    """The smallest of the three, moved by 2^-43."""
    other = TABLE.copy()
    other[2] = np.nextafter(other[2], np.float32(1))
    (found,) = _differences("rank 0 inv_freq", other, TABLE, "the reference's")
    assert found.startswith("rank 0 inv_freq[2]: 9.5367443e-07, the reference's 9.53674316e-07")
    assert found.endswith("1 of 3 differ")


def test_equal_tables_have_no_difference() -> None:
    """Nothing to report."""
    assert _differences("a", TABLE, TABLE.copy(), "b") == []


def test_another_shape_or_dtype_is_a_difference() -> None:
    """Broadcasting would compare a frequency with all of them."""
    assert _differences("a", TABLE[:1], TABLE, "b's") != []
    assert _differences("a", TABLE.astype(np.float64), TABLE, "b's") != []


def test_the_largest_difference_of_a_table_of_angles_is_named_by_position() -> None:
    """Row 1 stands for position 8192."""
    angles = np.zeros((2, 3), np.float32)
    other = angles.copy()
    other[0, 0], other[1, 2] = 0.25, 0.5
    positions = np.array([7, 8192])
    (found,) = _differences("angle", other, angles, "b's", rows=positions)
    assert found == "angle[8192, 2]: 0.5, b's 0; 2 of 6 differ"
