"""Metrics of logits: each figure by hand, and what cannot be compared says so."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from bridge.errors import DtypeMismatchError
from harness.metrics import ULP_EDGES, compare, excess, ulp_of_one

Array = np.ndarray[Any, Any]


def _logits(*positions: list[float], dtype: type = np.float32) -> Array:
    return np.array([positions], dtype)


def _random(seed: int, shape: tuple[int, ...] = (2, 5, 33)) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_differences_are_reported_position_by_position() -> None:
    """Two positions: the largest difference of each, the rms of all, and which is worst."""
    found = compare(_logits([1, 2, 3], [4, 5, 6]), _logits([1, 2, 3], [4, 5, 10]))
    assert found.max_abs_diff.tolist() == [[0.0, 4.0]]
    assert found.rms == pytest.approx(math.sqrt(16 / 6))
    assert found.worst_position == (0, 1)


def test_kl_is_in_nats_per_token_from_reference_to_candidate() -> None:
    """Probabilities (3/4, 1/4) held to (1/2, 1/2): KL(ref || cand) is ln 2 / 2 - ln(3/4) / 2."""
    candidate = _logits([math.log(0.75), math.log(0.25)], dtype=np.float64)
    reference = _logits([7.0, 7.0], dtype=np.float64)
    expected = -0.5 * math.log(0.75 * 2) - 0.5 * math.log(0.25 * 2)
    assert compare(candidate, reference).kl[0, 0] == pytest.approx(expected, rel=1e-14)


def test_kl_agrees_with_torch_on_random_logits() -> None:
    """Summed over the vocabulary, not averaged: torch's `reduction="none"` summed is the same."""
    ours, theirs = _random(1), _random(2)
    log_ours = torch.from_numpy(ours).double().log_softmax(-1)
    log_theirs = torch.from_numpy(theirs).double().log_softmax(-1)
    expected = torch.nn.functional.kl_div(
        log_ours, log_theirs, reduction="none", log_target=True
    ).sum(-1)
    np.testing.assert_allclose(compare(ours, theirs).kl, expected.numpy(), rtol=1e-12)


def test_kl_survives_logits_that_underflow() -> None:
    """A token a thousand nats behind costs a finite, correct amount."""
    found = compare(_logits([1000.0, 0.0]), _logits([0.0, 1000.0]))
    assert found.kl[0, 0] == pytest.approx(1000.0)


def test_top1_counts_a_shared_first_choice() -> None:
    """Same, other, and tied first choices."""
    ours = _logits([1, 2, 3], [3, 2, 1], [5, 5, 1])
    theirs = _logits([0, 0, 9], [0, 0, 9], [0, 9, 0])
    found = compare(ours, theirs)
    assert found.top1.tolist() == [[True, False, True]]
    assert found.top1_agreement == pytest.approx(2 / 3)


def test_top5_is_the_share_of_the_first_five_in_common() -> None:
    """Four of five in common is 0.8; a vocabulary of three counts three."""
    ours = _logits([9, 8, 7, 6, 5, 0, 0, 0])
    theirs = _logits([9, 8, 7, 6, 0, 5, 0, 0])
    assert compare(ours, theirs).top5.tolist() == [[0.8]]
    assert compare(_logits([3, 2, 1]), _logits([1, 2, 3])).top5_agreement == 1.0


def test_the_ulp_histogram_counts_in_the_dtype_s_own_spacing() -> None:
    """One step of float32 at 1.0, at 1000.0 and at zero, and exact equality, by `nextafter`."""
    theirs = _logits([1.0, 1000.0, 3.0, 0.0])
    ours = np.nextafter(theirs, np.float32(np.inf))
    ours[0, 0, 2] = 3.0
    found = compare(ours, theirs)
    assert found.ulp_histogram[0.0] == 1  # equal
    assert found.ulp_histogram[1.0] == 3  # one step each
    assert sum(found.ulp_histogram.values()) == theirs.size
    assert tuple(found.ulp_histogram) == ULP_EDGES


def test_the_ulp_histogram_of_bfloat16_uses_eight_bits() -> None:
    """At 1.0 one step of bfloat16 is 2^-7, a third of it falls below half an ulp."""
    theirs = _logits([1.0, 1.0, 1.0])
    ours = theirs + np.array([2**-7, 2**-7 / 3, 40 * 2**-7], np.float32)
    found = compare(ours, theirs, dtype="bfloat16").ulp_histogram
    assert {edge: count for edge, count in found.items() if count} == {1.0: 1, 0.5: 1, 64.0: 1}


def test_ulp_of_one_is_torch_s_eps() -> None:
    """The unit of each dtype is what torch calls its eps."""
    for name in ("float64", "float32", "bfloat16"):
        assert torch.finfo(getattr(torch, name)).eps == ulp_of_one(name)
    with pytest.raises(DtypeMismatchError, match="int8"):
        ulp_of_one("int8")


GOOD = _random(0)
NAN, INF = GOOD.copy(), GOOD.copy()
NAN[1, 2, 3] = np.nan
INF[0, 0, 0] = -np.inf
INCOMPARABLE = {
    "NaN": (NAN, "candidate holds 1 NaN or infinite values, the first at [1, 2, 3]"),
    "infinity": (INF, "candidate holds 1 NaN or infinite values, the first at [0, 0, 0]"),
    "fewer positions": (GOOD[:, :4], "shapes differ"),
    "a padded vocabulary": (np.pad(GOOD, ((0, 0), (0, 0), (0, 7))), "shapes differ"),
    "one position only": (GOOD[0], "not (batch, seq, vocab_size)"),
    "a batch that would broadcast": (GOOD[:1], "shapes differ"),
    "float64": (GOOD.astype(np.float64), "dtypes differ"),
    "integers": (GOOD.astype(np.int64), "not floating point"),
    "nothing": (GOOD[:, :0], "is empty"),
}


@pytest.mark.parametrize("what", INCOMPARABLE)
def test_what_cannot_be_compared_is_a_result_that_says_why(what: str) -> None:
    """The problem is named, every figure is NaN or empty, on both measures and both sides."""
    bad, message = INCOMPARABLE[what]
    with np.errstate(invalid="raise"):
        found = compare(bad, GOOD)
        measured = excess(bad, GOOD, GOOD.astype(np.float64), 0.0)
    for problems in (found.problems, measured.problems):
        assert any(message in problem for problem in problems), problems
    assert not found.comparable
    assert math.isnan(found.rms)
    assert math.isnan(found.top1_agreement)
    assert math.isnan(found.top5_agreement)
    assert math.isnan(found.kl_mean)
    assert found.worst_position is None
    assert math.isnan(measured.value)
    assert compare(GOOD, bad).problems
    assert excess(GOOD, bad, GOOD.astype(np.float64), 0.0).problems


def test_comparing_nothing_with_nothing_is_a_problem() -> None:
    """Two empty arrays agree on nothing."""
    empty = np.empty((2, 0, 33), np.float32)
    assert any("is empty" in problem for problem in compare(empty, empty).problems)
    assert excess(empty, empty, empty.astype(np.float64), 0.0).problems


def test_an_oracle_that_is_not_float64_or_all_zero_is_a_problem() -> None:
    """A rounded oracle cannot judge, and one of zeros agrees with any dead model."""
    assert excess(GOOD, GOOD, GOOD, 0.0).problems == ("the oracle is float32, not float64",)
    zeros = np.zeros(GOOD.shape)
    assert "all zero" in excess(GOOD, GOOD, zeros, 0.0).problems[0]


def test_excess_is_the_ratio_of_the_two_distances_from_the_oracle() -> None:
    """Errors of 0.03 and 0.01 everywhere: an excess of three, by position as well."""
    oracle = _random(3).astype(np.float64)
    found = excess(oracle + 0.03, oracle - 0.01, oracle, 0.0)
    assert found.value == pytest.approx(3.0)
    assert found.candidate_error == pytest.approx(0.03)
    assert found.reference_error == pytest.approx(0.01)
    np.testing.assert_allclose(found.candidate_by_position, 0.03)
    np.testing.assert_allclose(found.reference_by_position, 0.01)


def test_the_floor_replaces_a_smaller_reference_error_and_never_the_candidate_s() -> None:
    """With an exact reference the floor is the unit; above the floor it changes nothing."""
    oracle = 2 * np.ones((1, 2, 3))
    exact = excess(oracle + 0.06, oracle, oracle, 0.01)  # the floor is 0.01 x rms 2
    assert exact.value == pytest.approx(0.06 / 0.02)
    above = excess(oracle + 0.06, oracle + 0.03, oracle, 0.01)
    assert above.value == pytest.approx(2.0)


def test_without_a_floor_only_an_exact_candidate_is_as_good_as_an_exact_reference() -> None:
    """Zero over zero is no excess, anything over zero is infinite."""
    oracle = np.ones((1, 2, 3))
    assert excess(oracle, oracle, oracle, 0.0).value == 0.0
    assert excess(oracle + 1e-9, oracle, oracle, 0.0).value == math.inf


def test_the_reference_s_error_in_ulp_is_relative_to_the_oracle() -> None:
    """An error of three float32 steps at 1.0, on logits of rms 5, is 0.6 ulp."""
    oracle = np.full((1, 1, 4), 5.0)
    found = excess(oracle, oracle + 3 * 2**-23, oracle, 0.0)
    assert found.reference_error_ulp("float32") == pytest.approx(0.6)
