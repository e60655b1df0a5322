"""Verdicts: the rule's edges, the file of limits, and the measurement behind it, repeated."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge.errors import ConfigError
from harness import calibrate
from harness.metrics import ulp_of_one
from harness.thresholds import (
    EXCESS,
    REFERENCE_ERROR,
    Threshold,
    Verdict,
    judge_logits,
    load_thresholds,
)

Array = np.ndarray[Any, Any]
ULP = 2.0**-23


def _verdict(value: float, limit: float = 2.0, *, problems: tuple[str, ...] = ()) -> Verdict:
    return Verdict(name="logits.excess", value=value, limit=limit, unit="times", problems=problems)


@pytest.mark.parametrize("value", [0.0, 1.0, 2.0])
def test_a_value_up_to_the_limit_passes(value: float) -> None:
    """The limit itself is allowed."""
    assert _verdict(value).passed


@pytest.mark.parametrize("value", [math.nextafter(2.0, 3.0), math.inf, -math.inf, math.nan])
def test_a_value_above_the_limit_or_not_finite_fails(value: float) -> None:
    """One step above fails, and so does everything that is not a number."""
    assert not _verdict(value).passed


def test_a_verdict_with_problems_fails_whatever_its_value() -> None:
    """What could not be compared never passes."""
    verdict = _verdict(0.0, problems=("candidate is empty",))
    assert not verdict.passed
    assert verdict.describe() == "logits.excess: FAILED, not measured: candidate is empty"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.25, "logits.excess: passed, 1.25 <= 2 times"),
        (2.0, "logits.excess: passed, 2 <= 2 times"),
        (183.4, "logits.excess: FAILED, 183 > 2 times"),
        (2.0001, "logits.excess: FAILED, 2.0001 > 2 times"),
        (1.999999, "logits.excess: passed, 1.999999 <= 2 times"),
        (math.nan, "logits.excess: FAILED, nan is not within 2 times"),
        (math.inf, "logits.excess: FAILED, inf > 2 times"),
    ],
)
def test_describe_shows_digits_until_value_and_limit_look_different(
    value: float, expected: str
) -> None:
    """A near miss is never printed as equal to its limit."""
    assert expected == _verdict(value).describe()


# --------------------------------------------------------------------------------------
# The rule
# --------------------------------------------------------------------------------------


def _noisy(oracle: Array, *, ulp: float, seed: int) -> Array:
    """The oracle with an independent relative error of this many ulp of float32."""
    noise = np.random.default_rng(seed).normal(size=oracle.shape)
    return np.asarray(oracle + noise * ulp * ULP * np.sqrt(np.mean(oracle**2)))


ORACLE = np.random.default_rng(0).normal(size=(1, 48, 257))


@pytest.mark.parametrize(
    ("candidate_ulp", "reference_ulp", "failed"),
    [
        (4.0, 4.0, []),
        (7.9, 4.0, []),
        (8.3, 4.0, [EXCESS]),
        (0.0, 4.0, []),
        (3.9, 0.0, []),  # an exact reference is luck: the floor of two ulp stands in for it
        (4.1, 0.0, [EXCESS]),  # and hides nothing beyond
        (23.0, 23.0, []),
        (25.0, 25.0, [REFERENCE_ERROR]),
        (60.0, 25.0, [REFERENCE_ERROR, EXCESS]),
    ],
)
def test_the_rule_fails_what_is_too_far_from_the_oracle(
    candidate_ulp: float, reference_ulp: float, failed: list[str]
) -> None:
    """Candidate against reference, the floor below, and the reference's own sanity."""
    judged = judge_logits(
        _noisy(ORACLE, ulp=candidate_ulp, seed=1),
        _noisy(ORACLE, ulp=reference_ulp, seed=2),
        ORACLE,
        dtype="float32",
    )
    assert failed == [verdict.name for verdict in judged.verdicts if not verdict.passed]
    assert judged.passed == (not failed)
    blamed = {REFERENCE_ERROR: "reference", EXCESS: "candidate"}
    assert judged.odd_one_out == (blamed[failed[0]] if failed else None)


@pytest.mark.parametrize(
    ("hidden_size", "limit"), [(64, 24.0), (1024, 24.0), (4096, 48.0), (16384, 96.0)]
)
def test_a_wide_models_reference_may_be_off_by_the_rounding_of_longer_sums(
    hidden_size: int, limit: float
) -> None:
    """Four times the terms, twice the error; a limit on a ratio is the same at any width."""
    plain, found = load_thresholds(), load_thresholds().for_hidden_size(hidden_size)
    assert found.get(REFERENCE_ERROR, "float32").limit == limit
    assert found.get(EXCESS, "float32") == plain.get(EXCESS, "float32")
    assert found.by_key.keys() == plain.by_key.keys()


def test_no_width_lets_the_nearest_faulty_block_pass() -> None:
    """That fault's size does not depend on the width; Ultra-253B is the widest of the family."""
    found = load_thresholds().for_hidden_size(16384).get("blocks.reference_error", "float32")
    assert 4 * found.limit < found.measured["fault_min"]


def test_a_candidate_of_nan_fails_every_verdict() -> None:
    """Nothing measured, nothing passed."""
    judged = judge_logits(np.full(ORACLE.shape, np.nan), ORACLE, ORACLE, dtype="float32")
    assert [verdict.passed for verdict in judged.verdicts] == [False, False]
    assert "NaN" in judged.verdicts[0].describe()


def test_a_fault_at_one_position_of_many_is_seen() -> None:
    """One wrong token among 48 fails although every other position is exact."""
    candidate = _noisy(ORACLE, ulp=4, seed=1)
    candidate[0, 17] = np.roll(candidate[0, 17], 1)
    judged = judge_logits(candidate, _noisy(ORACLE, ulp=4, seed=2), ORACLE, dtype="float32")
    assert judged.odd_one_out == "candidate"
    assert int(judged.excess.candidate_by_position.argmax()) == 17


# --------------------------------------------------------------------------------------
# suites/thresholds.toml
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_limit_leaves_room_on_both_sides_of_its_measurement(dtype: str) -> None:
    """Limits are above the worst healthy value, and well below the nearest fault where known."""
    for name in (EXCESS, REFERENCE_ERROR):
        threshold = load_thresholds().get(name, dtype)
        measured = threshold.measured
        assert threshold.limit > 1.5 * measured["healthy_max"]
        if name == EXCESS and "fault_min" in measured:
            assert 2 * threshold.limit < measured["fault_min"]
            assert 4 * threshold.limit * threshold.floor_ulp < measured["fault_min_ulp"]
    assert load_thresholds().get(EXCESS, dtype).floor == (
        {"float32": 2.0, "bfloat16": 0.5}[dtype] * ulp_of_one(dtype)
    )


def test_a_dtype_without_a_limit_is_refused() -> None:
    """Nothing is judged by a limit made for something else."""
    with pytest.raises(ConfigError, match="float16"):
        judge_logits(ORACLE, ORACLE, ORACLE, dtype="float16")


GOOD = """
schema_version = 1
[[threshold]]
name = "a"
dtype = "float32"
limit = 2.0
unit = "x"
measured = {max = 1.0}
command = "c"
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("schema_version = 1", "schema_version = 2"), "schema_version"),
        ("schema_version = 1", "no thresholds"),
        (GOOD.replace("limit = 2.0", "limit = nan"), "not usable"),
        (GOOD.replace("limit = 2.0", "limit = -1"), "not usable"),
        (GOOD.replace("limit = 2.0", "lim = 2.0"), "lim"),
        (GOOD.replace('command = "c"', ""), "command"),
        (GOOD.replace("{max = 1.0}", "{}"), "not usable"),
        (GOOD + GOOD.replace("schema_version = 1", ""), "twice"),
    ],
)
def test_a_file_of_limits_that_cannot_be_trusted_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    """Unknown schema or field, no limit, a senseless limit, no measurement, or two of a kind."""
    path = tmp_path / "thresholds.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_thresholds(path)


def test_a_threshold_of_the_file_is_read_with_all_its_fields(tmp_path: Path) -> None:
    """Values come back as they were written; without a floor there is none."""
    path = tmp_path / "thresholds.toml"
    path.write_text(GOOD, encoding="utf-8")
    expected = Threshold(
        name="a", dtype="float32", limit=2.0, unit="x", measured={"max": 1.0}, command="c"
    )
    assert load_thresholds(path).get("a", "float32") == expected
    assert expected.floor == 0.0


# --------------------------------------------------------------------------------------
# The measurement, repeated on a few models
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_healthy_models_measure_within_what_the_file_says(dtype: str) -> None:
    """Twelve random models, one without layers among them, land within the recorded range."""
    on_excess = load_thresholds().get(EXCESS, dtype).measured
    on_reference = load_thresholds().get(REFERENCE_ERROR, dtype).measured
    models = range(4, 16)
    assert any(calibrate.random_llama(model)["num_hidden_layers"] == 0 for model in models)
    for model in models:
        for found in calibrate.measure(model, dtype=dtype):
            # a quarter for another machine's order of summation
            assert max(found.excess.values()) <= 1.25 * on_excess["healthy_max"]
            assert found.reference_ulp <= 1.25 * on_reference["healthy_max"]
            assert found.reference_ulp >= 0.75 * on_reference["healthy_min"]


def test_the_nearest_fault_measures_beyond_the_limit_on_every_model() -> None:
    """Another epsilon, the smallest fault known, is over four times the limit, layers or none."""
    limit = load_thresholds().get(EXCESS, "float32").limit
    for model in range(4, 16):
        for found in calibrate.measure(model, dtype="float32", fault="eps"):
            assert found.excess["eps"] > 4 * limit


def test_the_calibration_command_prints_its_summary_as_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`python -m harness.calibrate` reports least, median and largest of each series."""
    assert calibrate.main(["--models", "2"]) == 0
    printed = capsys.readouterr().out
    assert '"unit": "one ulp of float32 at 1.0 is 1.19209e-07"' in printed
    for series in ("reference_ulp/long", "excess/eager/short", "excess/tp4/long"):
        assert f'"{series}"' in printed
