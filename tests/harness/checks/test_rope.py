"""The RoPE check compares bits: one unit in the last place is 0.008 rad at the far end."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness import oracle
from harness.checks.rope import agreed_frequencies
from harness.live_rope import differences, rotation_error

TABLE = np.array([1.0, 0.5, 2.0**-20], np.float32)
UNIT = 2.0**-23


def _model(kv_channels: int, base: float) -> oracle.Architecture:
    return oracle.Architecture(
        hidden_size=8, num_attention_heads=1, kv_channels=kv_channels, vocab_size=3,
        layernorm_epsilon=1e-5, tied=False, rope=oracle.Rope(base, None), blocks=(),
    )  # fmt: skip


def test_one_ulp_in_one_frequency_is_a_difference_with_its_place() -> None:
    """The smallest of the three, moved by 2^-43."""
    other = TABLE.copy()
    other[2] = np.nextafter(other[2], np.float32(1))
    (found,) = differences("rank 0 inv_freq", other, TABLE, "the reference's")
    assert found.startswith("rank 0 inv_freq[2]: 9.5367443e-07, the reference's 9.53674316e-07")
    assert found.endswith("1 of 3 differ")


def test_equal_tables_have_no_difference() -> None:
    """Nothing to report."""
    assert differences("a", TABLE, TABLE.copy(), "b") == []


def test_another_shape_or_dtype_is_a_difference() -> None:
    """Broadcasting would compare a frequency with all of them."""
    assert differences("a", TABLE[:1], TABLE, "b's") != []
    assert differences("a", TABLE.astype(np.float64), TABLE, "b's") != []


def test_the_largest_difference_of_a_table_of_angles_is_named_by_position() -> None:
    """Row 1 stands for position 8192."""
    angles = np.zeros((2, 3), np.float32)
    other = angles.copy()
    other[0, 0], other[1, 2] = 0.25, 0.5
    positions = np.array([7, 8192])
    (found,) = differences("angle", other, angles, "b's", rows=positions)
    assert found == "angle[8192, 2]: 0.5, b's 0; 2 of 6 differ"


def test_a_reference_an_ulp_from_the_formula_is_wrong_where_power_functions_agree() -> None:
    """Powers of two are exact in any library: base 16, exponents 0, 1/4, 1/2, 3/4."""
    model = _model(8, 16.0)
    formula = np.array([1, 0.5, 0.25, 0.125], np.float32)
    assert agreed_frequencies(model, formula)[0] == []
    moved = formula.copy()
    moved[3] = np.nextafter(moved[3], np.float32(1))
    problems, agreed = agreed_frequencies(model, moved)
    assert problems[0].startswith("the reference's inv_freq[3]: 0.125000015")
    assert agreed.tolist() == formula.tolist()


def test_where_power_functions_disagree_the_reference_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A few ulp are the library's; anything more is not, nor is a NaN."""
    monkeypatch.setattr("harness.checks.rope.float32_powers", lambda *_: (1.0,))
    model = _model(8, 16.0)
    formula = np.array([1, 0.5, 0.25, 0.125], np.float32)
    near = np.nextafter(formula, np.float32(2))
    problems, agreed = agreed_frequencies(model, near)
    assert problems == []
    assert agreed.tolist() == near.tolist()
    for far in (formula * np.float32(1.0001), formula * np.float32(np.nan)):
        assert agreed_frequencies(model, far)[0] != []


def test_the_exact_rotation_has_no_error_and_one_ulp_of_length_is_one() -> None:
    """A pair of length 5, turned by 90 degrees: (3, 4) becomes (-4, 3)."""
    states = np.array([3.0, 4.0]).reshape(1, 1, 1, 2)
    turned = np.array([-4.0, 3.0]).reshape(1, 1, 1, 2)
    angle = np.array([[math.pi / 2]])
    assert rotation_error(states, turned, angle, unit=UNIT).item() < 1e-6
    off = turned + np.array([5 * UNIT, 0.0])
    assert rotation_error(states, off, angle, unit=UNIT).item() == pytest.approx(1.0)


def test_a_vector_from_nothing_or_not_a_number_is_infinitely_wrong() -> None:
    """Zero turns into zero, and a NaN must not hide behind a comparison."""
    zero, angle = np.zeros((1, 1, 1, 2)), np.array([[1.0]])
    assert rotation_error(zero, zero, angle, unit=UNIT).item() == 0
    for wrong in (zero + 1e-30, zero * np.nan):
        assert rotation_error(zero, wrong, angle, unit=UNIT).item() == math.inf
