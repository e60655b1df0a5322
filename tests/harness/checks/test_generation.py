"""The generation check judges tokens by the oracle, and only near-ties may differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from harness.checks.generation import LOG_PROBABILITY, NEAR_TIE, judge
from harness.compare import Finding
from harness.generation import Generated
from harness.thresholds import Threshold, Thresholds

Array = np.ndarray[Any, np.dtype[Any]]
ULP = 2.0**-23 * 2.0006
"""One ulp of the rms of the oracle's nine logits below, in nats."""
LIMITS = {NEAR_TIE: 0.01, LOG_PROBABILITY: 0.02 / ULP}
# One sequence, three steps, three tokens: 2 is best, then a near-tie of 0 and 1, then 0.
TRUTH = np.array([[[0.0, 1.0, 3.0], [2.0, 2.005, 0.0], [4.0, 1.0, 1.0]]])


def _thresholds() -> Thresholds:
    limits = [
        Threshold(
            name=name, dtype="float32", limit=limit, unit="nats",
            measured={"of": "this test"}, command="none",
        )
        for name, limit in LIMITS.items()
    ]  # fmt: skip
    return Thresholds(by_key={(one.name, one.dtype): one for one in limits})


def _generated(logits: Array, tokens: list[int]) -> Generated:
    prompts = np.zeros((1, 2), np.int64)
    return Generated(prompts=prompts, tokens=np.array([tokens]), logits=logits.astype(np.float32))


def _judge(
    candidate: Array, *, reference: Array = TRUTH, tokens: tuple[int, ...] = (2, 1, 0)
) -> Finding:
    return judge(
        _generated(reference, list(tokens)),
        candidate.astype(np.float32),
        TRUTH,
        dtype="float32",
        thresholds=_thresholds(),
    )


def _with(step: int, token: int, value: float) -> Array:
    changed = TRUTH.copy()
    changed[0, step, token] = value
    return changed


def test_equal_tokens_pass() -> None:
    """Three of three."""
    found = _judge(TRUTH)
    assert found.passed
    assert found.summary.startswith("3 of 3 tokens are the same; Megatron: ")
    assert found.details["near_ties"] == []


def test_another_token_is_a_near_tie_where_the_oracle_can_hardly_choose() -> None:
    """0.005 nats apart, with a limit of 0.01; the steps behind it are judged as well."""
    found = _judge(_with(1, 0, 2.01))
    assert found.passed
    assert found.summary.startswith("2 of 3 tokens are the same, 1 nearly tied; ")
    assert found.details["near_ties"] == [[0, 1]]
    worse = _with(1, 0, 2.01)
    worse[0, 2] = [1.0, 4.0, 1.0]
    assert not _judge(worse).passed


def test_another_token_is_a_failure_where_the_oracle_is_sure() -> None:
    """The place says what was chosen, and by how much the oracle prefers another."""
    found = _judge(_with(0, 1, 3.5))
    assert not found.passed
    assert found.places[0] == (
        "Megatron, sequence 0, new token 0: chooses 1, which the oracle finds 2 nats less likely "
        "than 2"
    )


def test_the_references_own_choice_is_held_to_the_oracle() -> None:
    """A reference that decodes wrongly fails, even if its single forward pass would be right."""
    found = _judge(TRUTH, reference=_with(2, 2, 9.0), tokens=(2, 1, 2))
    assert not found.passed
    assert found.places[0].startswith("the reference, sequence 0, new token 2: chooses 2, which")


def test_a_moved_log_probability_fails_though_every_token_is_right() -> None:
    """Token 1 of step 2 moves by half a nat; token 0 stays the choice."""
    found = _judge(_with(2, 1, 1.5))
    assert not found.passed
    assert found.summary.startswith(f"3 of 3 tokens are the same; Megatron: {LOG_PROBABILITY}: ")
    assert found.value == pytest.approx(0.5 / ULP, rel=0.1)
    assert " nats from the oracle's" in found.places[0]


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    """Log-probabilities are compared, not logits."""
    assert _judge(TRUTH + 7).passed


@pytest.mark.parametrize(
    "candidate",
    [_with(0, 0, np.nan), _with(0, 0, np.inf), TRUTH[:, :2], TRUTH[..., :2], TRUTH[:, :0]],
    ids=["nan", "inf", "fewer steps", "fewer tokens", "nothing"],
)
def test_what_cannot_be_compared_fails(candidate: Array) -> None:
    """Never a pass, never an exception."""
    assert not _judge(candidate).passed


def test_nothing_generated_fails() -> None:
    """No step is no agreement."""
    nothing = np.zeros((1, 0, 3))
    found = judge(
        _generated(nothing, []), nothing.astype(np.float32), nothing,
        dtype="float32", thresholds=_thresholds(),
    )  # fmt: skip
    assert not found.passed
